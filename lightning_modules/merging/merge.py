"""`quiver merge`: folders of experts in, one folder out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.adapter_tokenizer import choose_tokenizer, set_ends
from lightning_modules.base_names import base_choice, name_base, whereabouts
from lightning_modules.checksums import write_checksums
from lightning_modules.files import complete_folder
from lightning_modules.merging.experts import Expert, open_expert
from lightning_modules.merging.methods import METHODS_OF_FACTORS, Method, check_options, find_method
from lightning_modules.merging.outputs import write_lora, write_model, write_sparse_adapter
from lightning_modules.merging.vectors import Delta
from lightning_modules.ranges import check_whole
from lightning_modules.sources import (
    check_model,
    load_model,
    load_tokenizer,
    resolve_model,
    written_choice,
)
from lightning_modules.sparse.delta import SparseDelta, check_indices

_CARD = """---
{base_model}tags: [quiver, merge]
---
# {title}

{count} experts merged into `{source}` with `quiver merge --method {method}`{options}:

{experts}
"""


@dataclass
class _Tally:
    """What a merge did.

    Attributes:
        changed: Parameters that an expert changes.
        touched: Entries that any sparse expert touches.
        shared: Entries that several of them touch.
    """

    changed: int = 0
    touched: int = 0
    shared: int = 0


def merge_experts(
    *,
    method: str,
    experts: list[str],
    output: str,
    base: str | None = None,
    to: Literal["model", "sparse", "lora"] = "model",
    rank: int = 16,
    dtype: Literal["float32", "bfloat16"] = "float32",
    options: dict[str, Any] | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> None:
    """Merge experts into one model or one adapter. They are read weight by weight; sums are in float32.

    Args:
        method: average, overlap_average, sign_consistent_average, task_arithmetic, ties, dare, breadcrumbs,
            consensus, iso_c, tsv_m, factor_average, or the dotted path of a function of yours.
        experts: Folders, separated by spaces: sparse adapters, LoRA adapters of PEFT, fine-tuned models.
        output: The folder to make; must not exist.
        base: The base model, as in `model:` of a configuration; by default what the experts name.
        to: What to write: the whole model, a sparse adapter, or a LoRA adapter that approximates the result.
        rank: Of the LoRA adapter.
        dtype: Of the model's weights on disk. The share of the change's norm that it keeps is printed; below 90%
            there is a warning.
        options: Settings of the method, such as --options.density 0.2.
        model_kwargs: Which version of the base model, and how it is read, as in a configuration, such as
            `--model_kwargs.trust_remote_code true`; `revision` by default what the experts name.

    Raises:
        ValueError: If an expert cannot be read, experts do not fit the base model or each other, `output`
            exists, or a method or an option is unknown. Nothing is written then.
    """
    settings = options or {}
    function = find_method(method)
    check_options(function, settings)
    target = Path(output)
    if target.exists():
        raise ValueError(f"output={output!r} exists already. Give a new folder, or remove that one.")
    _check_output(to, rank, dtype)
    opened = [open_expert(folder) for folder in experts]
    _check_distinct(opened)
    _check_sparse(to, opened)
    source, named = (base, {}) if base else _common_base(opened)
    kwargs = {**named, **(model_kwargs or {})}
    model = load_model(source, kwargs, dtype=torch.float32)
    for expert in opened:
        expert.fit(model)
    of_base = load_tokenizer(source, kwargs)
    source, choice = written_choice(source, kwargs)
    tokenizer, warning = choose_tokenizer([expert.folder for expert in opened], of_base)
    set_ends(model, tokenizer, of_base)
    tally = _Tally()
    of_factors = function in METHODS_OF_FACTORS
    changes = _changes(partial(function, **settings), opened, model, tally, of_factors=of_factors)
    writers = {
        "model": partial(write_model, dtype=getattr(torch, dtype)),
        "sparse": partial(write_sparse_adapter, source=source),
        "lora": partial(write_lora, source=source, rank=rank),
    }
    with complete_folder(target) as folder:
        note = writers[to](folder, changes, model)
        tokenizer.save_pretrained(folder)
        if to == "lora":
            name_base(folder / "adapter_config.json", source, resolve_model(source), choice)
        elif to == "sparse":
            name_base(folder / "adapter_config.json", source, choice=choice)
        card = _card(target.name, source, method, settings, experts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_checksums(folder)
    print(_summary(method, len(opened), tally, "\n".join(filter(None, [note, warning])), target))  # noqa: T201


def _check_output(to: str, rank: int, dtype: str) -> None:
    check_whole("rank", rank)
    if to != "model" and dtype != "float32":
        raise ValueError(f"dtype={dtype!r} is for --to model; adapters are written in float32.")


def _check_distinct(experts: Sequence[Expert]) -> None:
    places = [expert.folder.resolve() for expert in experts]
    for expert, place in zip(experts, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"experts: {expert.folder} is given twice. Leave one out.")


def _check_sparse(to: str, experts: Sequence[Expert]) -> None:
    if not experts:
        raise ValueError("experts is empty. Give at least one folder: --experts FOLDER FOLDER ...")
    dense = [str(expert.folder) for expert in experts if not expert.is_sparse]
    if to == "sparse" and dense:
        raise ValueError(
            f"to='sparse': {', '.join(dense)} changes weights densely, so the result is dense. Take --to model "
            "or --to lora, or sparse experts only."
        )


def _common_base(experts: Sequence[Expert]) -> tuple[str, dict[str, str]]:
    """The base model that the experts name, and which version of it."""
    named = [(expert.folder, expert.base) for expert in experts if expert.base]
    if not named:
        raise ValueError("No expert names its base model. Give it with --base.")
    if len({whereabouts(base) for _, base in named}) > 1:
        listed = ", ".join(f"{folder} names {base}" for folder, base in named)
        raise ValueError(
            f"experts: they have different base models: {listed}. Merge experts of one base model; if these "
            "are one model under several names, say which with --base."
        )
    choices = {expert.folder: base_choice(expert.folder) for expert in experts if expert.base}
    if len({tuple(sorted(choice.items())) for choice in choices.values()}) > 1:
        listed = ", ".join(f"{folder} names {choice or 'none'}" for folder, choice in choices.items())
        raise ValueError(
            f"experts: they have different versions of a base model: {listed}. Merge experts of one version, or say "
            "which with --base and --model_kwargs.revision."
        )
    return named[0][1], choices[named[0][0]]


def _changes(
    method: Method, experts: Sequence[Expert], model: nn.Module, tally: _Tally, *, of_factors: bool
) -> Iterator[tuple[str, Tensor | SparseDelta]]:
    """Merge parameter by parameter, in the base model's order, so that only one is in memory."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    changed = {name for expert in experts for name in expert.names}
    names = [name for name in weights if name in changed]
    owned = [set(expert.names) for expert in experts]
    started = time.monotonic()
    for number, name in enumerate(names, 1):
        vectors: list[Any] = [
            {name: expert.factors(name) if of_factors else expert.delta(name)} if name in own else {}
            for expert, own in zip(experts, owned, strict=True)
        ]
        shape = tuple(weights[name].shape)
        _count(vectors, weights[name].numel(), tally)
        merged = _checked(name, method(vectors), shape)
        del vectors
        yield name, merged
        if sys.stderr.isatty() and time.monotonic() - started > 3:
            end = "\n" if number == len(names) else ""
            print(f"\r{number} of {len(names)} parameters", end=end, file=sys.stderr)  # noqa: T201


def _count(vectors: Sequence[Mapping[str, Delta]], size: int, tally: _Tally) -> None:
    deltas = [delta for vector in vectors for delta in vector.values()]
    tally.changed += 1
    if not all(isinstance(delta, SparseDelta) for delta in deltas):
        return
    touched, shared = torch.zeros(2, size, dtype=torch.bool)
    for delta in deltas:
        indices = delta[0].long()
        shared[indices] |= touched[indices]
        touched[indices] = True
    tally.touched += int(touched.sum())
    tally.shared += int(shared.sum())


def _checked(name: str, merged: Mapping[str, Delta], shape: tuple[int, ...]) -> Tensor | SparseDelta:
    """Check what a method returned; it may be the user's."""
    change = merged.get(name) if isinstance(merged, Mapping) else None
    if isinstance(change, Tensor):
        values, found = change.detach().float(), tuple(change.shape)
        result: Tensor | SparseDelta = values
    elif isinstance(change, tuple):
        values = change[1].detach().float()
        result, found = SparseDelta(change[0], values, shape), shape
        check_indices(f"method: {name}", change[0], torch.Size(shape).numel())
    else:
        raise ValueError(f"method: its result has no change of {name}. Return a dict of the experts' names.")
    if found != shape:
        raise ValueError(f"method: its change of {name} has shape {found}; the parameter has {shape}.")
    if not bool(values.isfinite().all()):
        raise ValueError(f"method: its change of {name} has NaN or infinite values.")
    return result


def _card(title: str, source: str, method: str, options: Mapping[str, Any], experts: Sequence[str]) -> str:
    listed = ", ".join(f"{name}={value}" for name, value in options.items())
    is_hub_id = not Path(check_model(source)).exists()
    return _CARD.format(
        base_model=f"base_model: {source}\n" if is_hub_id else "",
        title=title,
        count=len(experts),
        source=source,
        method=method,
        options=f" ({listed})" if listed else "",
        experts="\n".join(f"- `{folder}`" for folder in experts),
    )


def _summary(method: str, count: int, tally: _Tally, note: str, target: Path) -> str:
    lines = [f"Merged {count} experts with {method}: {tally.changed} parameters changed."]
    if tally.touched:
        lines.append(f"Of the entries that experts touch, several touch {tally.shared / tally.touched:.1%}.")
    return "\n".join([*lines, *filter(None, [note]), f"Wrote {target}"])
