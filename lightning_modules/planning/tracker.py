"""torch's own memory tracker, made fast enough for whole models and taught to tell logits and caches apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.optim import Optimizer


class Kind(StrEnum):
    """What memory is used for, in the order of the table."""

    WEIGHTS = "weights"
    GATHERED = "gathered weights"
    GRADIENTS = "gradients"
    EXCHANGE = "gradient exchange"
    MOMENTS = "optimiser moments"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    CACHE = "KV cache"


_OF_TORCH: dict[Any, Kind] = {
    _MemRefType.PARAM: Kind.WEIGHTS,
    _MemRefType.BUFFER: Kind.WEIGHTS,
    _MemRefType.GRAD: Kind.GRADIENTS,
    _MemRefType.ACT: Kind.ACTIVATIONS,
    _MemRefType.TEMP: Kind.ACTIVATIONS,
    _MemRefType.OPT: Kind.MOMENTS,
    _MemRefType.OTH: Kind.ACTIVATIONS,
    _FSDPRefType.SHARDED_PARAM: Kind.WEIGHTS,
    _FSDPRefType.UNSHARDED_PARAM: Kind.GATHERED,
    _FSDPRefType.BUFFER: Kind.WEIGHTS,
    _FSDPRefType.SHARDED_GRAD: Kind.GRADIENTS,
    _FSDPRefType.UNSHARDED_GRAD: Kind.EXCHANGE,
    _FSDPRefType.ACT: Kind.ACTIVATIONS,
    _FSDPRefType.TEMP: Kind.ACTIVATIONS,
    _FSDPRefType.ALL_GATHER: Kind.GATHERED,
    _FSDPRefType.REDUCE_SCATTER: Kind.EXCHANGE,
    _FSDPRefType.OPT: Kind.MOMENTS,
    _FSDPRefType.INP: Kind.ACTIVATIONS,
    Kind.LOGITS: Kind.LOGITS,
    Kind.CACHE: Kind.CACHE,
}

# Given a new tensor, says whether it is of a kind that torch's tracker does not know.
Classify = Callable[[Tensor], Kind | None]


class _PeakTracker(MemTracker):
    """Keeps the peak of the whole, where torch's tracker keeps several snapshots of every module.

    Those are copied at every module and looked through at every operation, which takes minutes for a large model.

    Attributes:
        classify: Recognises logits and caches; None while nothing is recognised.
        elsewhere: Kinds in the memory of the host, which do not count for the peak.
        gradient: torch's name for the kind of gradients.
    """

    gradient: Any

    classify: Classify | None = None
    elsewhere: frozenset[Kind] = frozenset()

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < (total := self._total(now)):
                self._peak_mem[device] = total
                self._peak_mem_snap[device] = dict(now)

    def _total(self, snapshot: dict[str, int]) -> int:
        away = sum(size for name, size in snapshot.items() if _OF_TORCH.get(name) in self.elsewhere)
        return snapshot["Total"] - away

    def _track(self, reftype: Any, t: Tensor) -> None:
        kind = self.classify(t) if self.classify else None
        super()._track(reftype if kind is None else kind, t)  # type: ignore[arg-type]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let trained parameters have gradients, as after a backward pass."""
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
            self._update_and_maybe_create_winfos(parameter.grad, self.gradient)

    def forget_peak(self) -> None:
        """Start a new phase: what is there now is the highest so far."""
        self._peak_mem_snap = self.get_tracker_snapshot("current")
        self._peak_mem = {device: self._total(now) for device, now in self._peak_mem_snap.items()}

    def by_kind(self, which: str) -> dict[Kind, int]:
        """Return bytes by kind, `current` or at the `peak` of this phase."""
        kinds = dict.fromkeys(Kind, 0)
        for snapshot in self.get_tracker_snapshot(which).values():
            for name, size in snapshot.items():
                if name != "Total":
                    kinds[_OF_TORCH[name]] += size
        return kinds


class PlainTracker(_PeakTracker):
    """Of a model that every rank holds whole.

    Args:
        model: The model.
        optimizer: Its optimiser.
    """

    gradient = _MemRefType.GRAD

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self._ref_class = (*_MemRefType, Kind.LOGITS, Kind.CACHE)  # type: ignore[assignment]
        self._model = model
        # torch's hooks are made for models all of whose parameters are trained.
        self._track_module_params_and_buffers(model, install_grad_hooks=False)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._is_gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        self.track_external(optimizer)

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    def _skip(self, *_: Any) -> None:
        """Stands for the hooks that would take snapshots of each module."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _skip  # type: ignore[assignment]


class ShardedTracker(_PeakTracker, FSDPMemTracker):
    """Of a model that is sharded by `fully_shard`.

    Args:
        root: The sharded base model.
        optimizer: Its optimiser.
    """

    gradient = _FSDPRefType.SHARDED_GRAD

    def __init__(self, root: nn.Module, optimizer: Optimizer) -> None:
        FSDPMemTracker.__init__(self, root, optimizer)
        self._ref_class = (*_FSDPRefType, Kind.LOGITS, Kind.CACHE)  # type: ignore[assignment]


def logits_and_caches(vocab_size: int, cache_shapes: Collection[tuple[int, ...]] = ()) -> Classify:
    """Return a function that recognises logits by their width, and keys and values by their shape.

    Args:
        vocab_size: Width of the logits.
        cache_shapes: Shapes that keys and values of a layer may have.
    """

    def classify(tensor: Tensor) -> Kind | None:
        if tensor.dim() > 0 and tensor.shape[-1] == vocab_size and not isinstance(tensor, nn.Parameter):
            return Kind.LOGITS
        return Kind.CACHE if tuple(tensor.shape) in cache_shapes else None

    return classify


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Be rank 0 of a process group in which nobody else is there and nothing is sent."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError(
            "`quiver plan` needs a process of its own, but a process group is running in this one."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_tensors() -> Any:
    """Return the mode in which tensors have shape, type and device but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
