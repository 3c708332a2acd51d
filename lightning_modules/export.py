"""Path in, path out: adapter folders with a model card, and merged Hugging Face folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_modules.adapter_tokenizer import check_vocabulary, own_tokenizer, set_ends
from lightning_modules.base_names import base_choice, base_named, name_base
from lightning_modules.checksums import check_checksums, write_checksums
from lightning_modules.files import complete_folder
from lightning_modules.finite import check_finite
from lightning_modules.merged_adapter import merge_peft, probe_of
from lightning_modules.secrets import redact
from lightning_modules.sources import check_model, code_choice, load_model, load_tokenizer
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.shira import export_shira, import_shira
from lightning_modules.sparse.storage import PEFT_TYPE, read_json

if TYPE_CHECKING:
    from lightning_modules.causal_lm import CausalLMModule

_CARD = """---
{base_model}library_name: {library}
pipeline_tag: text-generation
tags: [quiver, {method}]
---
# {title}

{what} of `{source}`, trained with `{module}` of Quiver. Optimiser steps: {steps}.

```python
{loading}
```

| metric at this step | value |
|---|---|
{metrics}

Versions: {versions}.
"""

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base}{choice})
model = PeftModel.from_pretrained(base, "path/of/this/folder")"""

_LOAD_CONVERTED_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_modules.sources import resolve_model  # pip install 'lightning-quiver[gguf]'

base = AutoModelForCausalLM.from_pretrained(resolve_model({base}))
model = PeftModel.from_pretrained(base, "path/of/this/folder")"""

_LOAD_SPARSE = """import torch
from transformers import AutoModelForCausalLM

from lightning_modules.sources import resolve_model  # pip install lightning-quiver
from lightning_modules.sparse.expert import SparseExpert

model = AutoModelForCausalLM.from_pretrained(resolve_model({base}){choice}, dtype=torch.{dtype})
expert = SparseExpert("path/of/this/folder").apply(model)  # expert.remove() restores the base model"""

_LOAD_LIBRARY = """import torch
from transformers import AutoModelForCausalLM

from lightning_modules import RoutedAdapter, UniformRouter  # pip install lightning-quiver
from lightning_modules.sources import resolve_model

model = AutoModelForCausalLM.from_pretrained(resolve_model({base}){choice}, dtype=torch.{dtype})
RoutedAdapter(UniformRouter(), library="path/of/this/folder").attach(model)  # or another router"""

_LOAD_MODEL = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")"""


def save_adapter(
    module: CausalLMModule,
    folder: Path,
    *,
    steps: int,
    metrics: Mapping[str, float],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a module's adapter, its tokenizer and a model card.

    Args:
        module: A module whose model is loaded.
        folder: The folder to make. An earlier one of this name is renamed, not overwritten.
        steps: Training steps, for the card.
        metrics: Metrics for the card.
        state: What `module.adapter.state_dict()` returns; None asks for it. Under sharding all ranks ask, and one
            saves.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    state = module.adapter.state_dict() if state is None else state
    check_finite(state.items(), f"{folder} is not written: the trained adapter has no usable values")
    with complete_folder(folder) as aside:
        module.adapter.write(aside, state)
        source, choice = module.adapter.source or module.source, module.adapter.choice
        name_base(aside / "adapter_config.json", source, module.tokenizer.name_or_path, choice)
        module.tokenizer.save_pretrained(aside)
        card = _card(module, folder.name, steps, metrics, aside)
        (aside / "README.md").write_text(redact(card), encoding="utf-8")
        if not (aside / "index.json").exists():  # a library has its own
            write_checksums(aside)


def _card(module: CausalLMModule, title: str, steps: int, metrics: Mapping[str, float], folder: Path) -> str:
    config = folder / "adapter_config.json"
    peft_type = json.loads(config.read_text(encoding="utf-8")).get("peft_type") if config.exists() else None
    is_library = (folder / "index.json").is_file()
    is_adapter = peft_type is not None
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    source = module.adapter.source or module.source
    place = check_model(source)
    is_hub_id = not Path(place).exists()
    template = _LOAD_MODEL
    if is_library:
        template = _LOAD_LIBRARY
    elif peft_type == PEFT_TYPE:
        template = _LOAD_SPARSE
    elif is_adapter:
        template = _LOAD_CONVERTED_ADAPTER if place.endswith(".gguf") else _LOAD_ADAPTER
    dtype = str(module.weights_dtype).removeprefix("torch.")
    choice = "".join(f", {name}={json.dumps(value)}" for name, value in module.adapter.choice.items())
    loading = template.format(base=json.dumps(source), choice=choice, dtype=dtype)
    return _CARD.format(
        # The hub takes no path here, and a path of this machine would tell nobody anything.
        base_model=f"base_model: {source}\n" if is_hub_id else "",
        library="lightning-quiver"
        if is_library or peft_type == PEFT_TYPE
        else ("peft" if is_adapter else "transformers"),
        method=type(module).__name__.removesuffix("Module").lower(),
        title=title,
        what="A library of adapters" if is_library else "An adapter" if is_adapter else "A fine-tuned copy",
        source=source + choice,
        module=type(module).__name__,
        steps=steps,
        loading=loading,
        metrics="\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(known.items()))
        or "| - | - |",
        versions=", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "lightning")
        ),
    )


def export_adapter(
    adapter: str,
    output: str,
    base: str | None = None,
    to: Literal["model", "shira", "sparse"] = "model",
    model_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write an adapter folder, sparse or of PEFT, in another form.

    Args:
        adapter: An adapter folder.
        output: The folder to make; must not exist.
        base: The base model, as in `model:` of a configuration; by default what the adapter names.
        to: `model` merges the adapter into its base model, a plain Hugging Face folder in float32; `shira`
            turns a sparse adapter into one of PEFT's SHiRA, and `sparse` the other way round.
        model_kwargs: Which version of the base model, and how it is read, as in a configuration, such as
            `--model_kwargs.trust_remote_code true`; `revision` by default what the adapter names.

    Raises:
        ValueError: If `adapter` is no adapter folder or of the wrong kind, `output` exists, or the base model
            is unknown or another one.
    """
    source, target = Path(adapter), Path(output)
    config = source / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"adapter={adapter!r} is no adapter folder: it has no adapter_config.json.")
    if target.exists():
        raise ValueError(f"output={output!r} exists already. Give a new folder, or remove that one.")
    check_checksums(source, (config.name, "adapter_model.safetensors"))
    facts = read_json(config)
    if not isinstance(facts, dict):
        raise ValueError(f"{config} describes no adapter.")
    named = base is None
    base = base or base_named(source, facts)
    if to != "shira" and not (base and isinstance(base, str)):
        raise ValueError(f"adapter={adapter!r} does not name its base model. Give it with --base.")
    model_kwargs = {**(base_choice(source) if named else {}), **(model_kwargs or {})}
    if to == "shira":
        export_shira(source, target)
    elif to == "sparse":
        import_shira(source, target, load_model(str(base), model_kwargs, dtype=torch.float32), base)
    else:
        _export_model(source, target, str(base), facts, model_kwargs)
    what = {
        "model": "the merged model, in float32,",
        "shira": "a SHiRA adapter",
        "sparse": "a sparse adapter",
    }[to]
    print(f"Wrote {what} to {target}")  # noqa: T201


def _export_model(
    source: Path, target: Path, base: str, facts: Mapping[str, Any], model_kwargs: Mapping[str, Any]
) -> None:
    """Write the merged model with the tokenizer it was trained with, and read it back."""
    model = load_model(base, model_kwargs, dtype=torch.float32)
    of_base = load_tokenizer(base, model_kwargs)
    tokenizer = own_tokenizer(source, of_base) or of_base
    if facts.get("peft_type") == PEFT_TYPE:
        SparseExpert(source).apply(model)
        check_finite(model.named_parameters(), f"{source}, merged")
        probe = probe_of(model)
    else:
        model, probe = merge_peft(model, source, facts)
    check_vocabulary(model, tokenizer, of_base, source)
    set_ends(model, tokenizer, of_base, source)
    with complete_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model  # two of them may not fit
        probe.check(load_model(str(folder), code_choice(model_kwargs), dtype=torch.float32), str(source))
        write_checksums(folder)
