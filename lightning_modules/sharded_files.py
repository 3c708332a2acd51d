"""Checkpoint folders that each rank writes its rows into: safetensors, JSON, and checksums of everything.

torch's own distributed checkpoints keep their metadata as a pickle, which a checkpoint from outside could use to run
code. Here a folder holds `shard-<rank>.safetensors`, `manifest.json`, which says where the rows of each tensor are,
and `meta.pt` with all that is no large tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.distributed import gathered
from lightning_modules.files import UNREADABLE, sync
from lightning_modules.sharding import local, local_rows, map_tensors, writes_shard

MANIFEST, META = "manifest.json", "meta.pt"
_FORMAT = 1
_MARK = "quiver.tensor"
_TREES = ("state_dict", "optimizer_states")


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint folder."""
    return path.is_dir() and (path / MANIFEST).is_file()


# ---------------------------------------------------------------------- writing


def write_sharded(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Write a checkpoint folder; it appears complete or not at all. A collective.

    Args:
        checkpoint: Its `state_dict` and `optimizer_states` may hold sharded tensors.
        target: The folder. An earlier one of this name is there until the new one is complete, under this name or
            for an instant under that of `previous_name`.

    Raises:
        OSError: On every rank, if one cannot write.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    aside = target.with_name(f".{target.name}.part")
    failure = _attempt(lambda: _make_empty(aside)) if rank == 0 else None
    _agree(failure, target)
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Any:
        tensors[name] = tensor
        return {_MARK: name}

    skeleton = {**checkpoint, **map_tensors({k: checkpoint[k] for k in _TREES if k in checkpoint}, keep)}
    parts: dict[str, Any] = {}
    failure = _attempt(lambda: parts.update(_write_shard(tensors, aside, rank)))
    all_parts = gathered(parts)
    _agree(failure, target)
    if rank == 0:
        failure = _attempt(lambda: _finish(skeleton, all_parts, aside, target))
    _agree(failure, target)


def _attempt(work: Any) -> str | None:
    try:
        work()
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"
    return None


def _agree(failure: str | None, target: Path) -> None:
    """Raise on all ranks what one has met: the others would wait for it for ever."""
    for rank, found in enumerate(gathered(failure)):
        if found:
            raise OSError(
                f"{target} cannot be written (rank {rank}: {found}). Earlier checkpoints are as they were. Free "
                "some space or name another folder, and go on from the latest one."
            )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_shard(tensors: Mapping[str, Tensor], folder: Path, rank: int) -> dict[str, Any]:
    """Write this rank's rows; return what the manifest says of them."""
    file = f"shard-{rank:05d}.safetensors"
    mine: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        rows = local(tensor.detach())
        first, end = local_rows(tensor) if tensor.dim() else (0, 0)
        if not writes_shard(tensor) or (tensor.dim() and end == first and tensor.numel()):
            continue
        mine[name] = rows.to("cpu", copy=True).contiguous()
        facts[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "part": [file, first, end, _tensor_hash(mine[name])],
        }
    if mine:
        save_file(mine, folder / file)
        sync(folder / file)
    return facts


def _finish(skeleton: Mapping[str, Any], all_parts: list[dict[str, Any]], aside: Path, target: Path) -> None:
    torch.save(skeleton, aside / META)
    sync(aside / META)
    tensors: dict[str, Any] = {}
    for facts in all_parts:
        for name, fact in facts.items():
            entry = tensors.setdefault(name, {"shape": fact["shape"], "dtype": fact["dtype"], "parts": []})
            entry["parts"].append(fact["part"])
    content = {"format": _FORMAT, "meta": _file_hash(aside / META), "tensors": tensors}
    text = json.dumps({"sha256": _text_hash(content), "content": content})
    (aside / MANIFEST).write_text(text, encoding="utf-8")
    sync(aside / MANIFEST)
    sync(aside)
    previous = target.with_name(previous_name(target.name))
    if target.exists():
        _remove(previous)
        target.rename(previous)
    aside.rename(target)
    sync(target.parent)
    _remove(previous)


def previous_name(name: str) -> str:
    """Return the name under which an earlier folder stands while a new one takes its place."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.previous{suffix}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in the files of a checkpoint folder; `[first:end]` reads rows, `[:]` all of it.

    Attributes:
        name: In the manifest.
        folder: The checkpoint.
        shape: Of the whole tensor.
        dtype: Its type.
        parts: File, first and last (exclusive) row, and checksum of each part, in order.
    """

    name: str
    folder: Path
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[tuple[str, int, int, str], ...]

    def __getitem__(self, rows: slice) -> Tensor:
        """Read rows.

        Raises:
            ValueError: If a file is missing, broken, or not the one that was written.
        """
        if not self.shape:
            return self._part(*self.parts[0])
        first, end, _ = rows.indices(self.shape[0])
        found = [
            self._part(*part)[max(first - part[1], 0) : end - part[1]]
            for part in self.parts
            if part[1] < end and part[2] > first
        ]
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:], dtype=self.dtype)

    def _part(self, file: str, first: int, end: int, expected: str) -> Tensor:
        path = self.folder / file
        try:
            with safe_open(path, "pt") as opened:
                part: Tensor = opened.get_tensor(self.name)
        except UNREADABLE as error:
            raise _broken(self.folder, f"{file} cannot be read: {error}") from None
        shape = [end - first, *self.shape[1:]] if self.shape else []
        if list(part.shape) != shape or part.dtype != self.dtype or _tensor_hash(part) != expected:
            raise _broken(self.folder, f"{self.name} in {file} is not what was written")
        return part


def read_sharded(folder: Path) -> dict[str, Any]:
    """Read a checkpoint folder; its large tensors are read when they are used.

    Args:
        folder: What `write_sharded` made, on any number of ranks.

    Returns:
        The checkpoint with a `SavedTensor` in place of each tensor.

    Raises:
        ValueError: If it is not complete, or not as it was written.
    """
    content = _read_manifest(folder)
    path = folder / META
    if not path.is_file() or _file_hash(path) != content["meta"]:
        raise _broken(folder, f"{META} is not the one that was written")
    skeleton: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    saved = {
        name: SavedTensor(
            name,
            folder,
            torch.Size(entry["shape"]),
            getattr(torch, entry["dtype"]),
            tuple(
                (file, first, end, text) for file, first, end, text in sorted(entry["parts"], key=_first_row)
            ),
        )
        for name, entry in content["tensors"].items()
    }
    for tensor in saved.values():
        _check_parts(tensor)
    return {key: _fill(value, saved, folder) if key in _TREES else value for key, value in skeleton.items()}


def check_parts(checkpoint: Mapping[str, Any]) -> None:
    """Check that every part of a checkpoint folder can be opened, without reading what is in it.

    Raises:
        ValueError: If a file is missing or cut off.
    """
    found: dict[Path, set[str]] = {}

    def note(tree: Any) -> None:
        if isinstance(tree, SavedTensor):
            for file, *_ in tree.parts:
                found.setdefault(tree.folder / file, set()).add(tree.name)
        elif isinstance(tree, Mapping):
            for value in tree.values():
                note(value)
        elif isinstance(tree, list | tuple):
            for value in tree:
                note(value)

    note({key: checkpoint.get(key) for key in _TREES})
    for path, names in found.items():
        try:
            with safe_open(path, "pt") as opened:
                missing = names - set(opened.keys())
        except UNREADABLE as error:
            raise _broken(path.parent, f"{path.name} cannot be read: {error}") from None
        if missing:
            raise _broken(path.parent, f"{path.name} lacks {sorted(missing)[0]}")


def whole_tensors(tree: Any) -> Any:
    """Return nested data with every tensor read from its file.

    Raises:
        ValueError: If a file is broken.
    """
    if isinstance(tree, SavedTensor):
        return tree[:]
    if isinstance(tree, Mapping):
        return {key: whole_tensors(value) for key, value in tree.items()}
    return type(tree)(map(whole_tensors, tree)) if isinstance(tree, list | tuple) else tree


def _fill(tree: Any, saved: Mapping[str, SavedTensor], folder: Path) -> Any:
    if isinstance(tree, Mapping):
        if tree.keys() == {_MARK}:
            if tree[_MARK] not in saved:
                raise _broken(folder, f"{tree[_MARK]} is missing")
            return saved[tree[_MARK]]
        return {key: _fill(value, saved, folder) for key, value in tree.items()}
    return (
        type(tree)(_fill(value, saved, folder) for value in tree) if isinstance(tree, list | tuple) else tree
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = manifest["content"]
        is_sound = manifest["sha256"] == _text_hash(content)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _broken(folder, f"{MANIFEST} cannot be read: {type(error).__name__}") from None
    if not is_sound:
        raise _broken(folder, f"{MANIFEST} is not what was written")
    if content["format"] != _FORMAT:
        raise ValueError(
            f"{folder} has the format {content['format']!r}; this version of Quiver reads {_FORMAT}."
        )
    return content


def _check_parts(tensor: SavedTensor) -> None:
    for file, *_ in tensor.parts:
        if Path(file).name != file:
            raise _broken(tensor.folder, f"{file!r} is no file name")
    if not tensor.shape:
        return
    row = 0
    for _, first, end, _ in tensor.parts:
        if first != row or (end == first and tensor.shape.numel()):
            raise _broken(tensor.folder, f"rows {row} and on of {tensor.name} are missing")
        row = end
    if row != tensor.shape[0]:
        raise _broken(tensor.folder, f"rows {row} and on of {tensor.name} are missing")


def _broken(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"The checkpoint {folder} is damaged: {what}. Go on from an earlier one (--ckpt_path latest finds it when "
        "this one is moved away)."
    )


def _first_row(part: list[Any]) -> int:
    return int(part[1])


def _tensor_hash(tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten()
    content: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return hashlib.sha256(content).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
