"""Path in, path out: adapter folders with a model card, and merged Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.files import complete_folder, set_aside
from lightning_modules.sources import resolve_model

if TYPE_CHECKING:
    from lightning_modules.causal_lm import CausalLMModule

_CARD = """---
base_model: {base}
library_name: {library}
tags: [quiver, {method}]
---
# {title}

{what} of `{source}`, trained with `{module}` of Quiver for {steps} optimiser steps.

```python
{loading}
```

| metric at the end of training | value |
|---|---|
{metrics}

Versions: {versions}.
"""

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/of/this/folder")"""

_LOAD_MODEL = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")"""


def save_adapter(module: CausalLMModule, folder: Path, *, steps: int, metrics: Mapping[str, float]) -> None:
    """Write a module's adapter, its tokenizer and a model card.

    Args:
        module: A module whose model is loaded.
        folder: The folder to make. An earlier one of this name is renamed, not overwritten.
        steps: Optimiser steps, for the card.
        metrics: Metrics for the card.
    """
    with complete_folder(folder) as aside:
        module.adapter.write(aside)
        module.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(_card(module, folder.name, steps, metrics, aside), encoding="utf-8")
        set_aside(folder)


def _card(module: CausalLMModule, title: str, steps: int, metrics: Mapping[str, float], folder: Path) -> str:
    assert module.model is not None
    is_adapter = (folder / "adapter_config.json").exists()
    base = str(module.model.config._name_or_path)  # type: ignore[union-attr]
    loading = (_LOAD_ADAPTER if is_adapter else _LOAD_MODEL).format(base=base)
    return _CARD.format(
        base=base,
        library="peft" if is_adapter else "transformers",
        method=type(module).__name__.removesuffix("Module").lower(),
        title=title,
        what="An adapter" if is_adapter else "A fine-tuned copy",
        source=module.source,
        module=type(module).__name__,
        steps=steps,
        loading=loading,
        metrics="\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()))
        or "| - | - |",
        versions=", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "lightning")
        ),
    )


def merge_adapter(adapter: str, output: str, base: str | None = None) -> None:
    """Merge a PEFT adapter folder into its base model and write a plain Hugging Face folder.

    Args:
        adapter: An adapter folder.
        output: The folder to make; must not exist.
        base: The base model, as in `model:` of a configuration; by default what the adapter names.

    Raises:
        ValueError: If `adapter` is no adapter folder or `output` exists.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = Path(adapter), Path(output)
    if not (source / "adapter_config.json").is_file():
        raise ValueError(f"adapter={adapter!r} is no adapter folder: it has no adapter_config.json.")
    if target.exists():
        raise ValueError(f"output={output!r} exists already. Give a new folder, or remove that one.")
    place = resolve_model(base or PeftConfig.from_pretrained(source).base_model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, source).merge_and_unload()
    with complete_folder(target) as folder:
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place).save_pretrained(folder)
