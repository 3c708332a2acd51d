"""A pretend accelerator, for machines without one: which tensors lie on it, and how often the host waits for it.

A tensor of the device `lazy` holds a tensor of the CPU, and each operation runs on that. Operations that mix both kinds
raise, as they do on a GPU; those that bring a value back to the host are counted by where they were asked for. It says
nothing of kernels, precision or speed.

Importing this changes nothing; `installed` teaches torch what it must know of the device for as long as it is entered.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
_OURS = ("lightning_modules", "callbacks")
_COPIES = {"aten.copy_.default", "aten._to_copy.default", "aten._local_scalar_dense.default"}
_INDEXED = {
    "aten.index.Tensor",
    "aten.index_put.default",
    "aten.index_put_.default",
    "aten._index_put_impl_.default",
}
_NOT_DETERMINISTIC = {
    *("aten.put_.default", "aten.kthvalue.default", "aten.histc.default"),
    *("aten.median.dim", "aten.nanmedian.dim", "aten.nll_loss2d_forward.default"),
}
# The host must know a result, or the size of one.
_ASKS = {
    *("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"),
    *("aten.masked_select.default", "aten._unique2.default", "aten.unique_consecutive.default"),
    *("aten.unique_dim.default", "aten.bincount.default", "aten.repeat_interleave.Tensor"),
}


class Waits:
    """Counts how often the host waits for the device.

    Attributes:
        on: Whether it counts now.
        syncs: Times that a value came back, by place.
        blocking: Times that a value of the host went to the device in a copy that the host waits for, by place.
        ops: Operations on the device.
    """

    def __init__(self) -> None:
        self.on = False
        self.syncs: Counter[str] = Counter()
        self.blocking: Counter[str] = Counter()
        self.ops = 0

    @contextmanager
    def counted(self) -> Iterator[Waits]:
        """Count from zero in here."""
        self.syncs, self.blocking, self.ops, self.on = Counter(), Counter(), 0, True
        try:
            yield self
        finally:
            self.on = False

    def sync(self) -> None:
        """The host waits for a value."""
        if self.on:
            self.syncs[_place()] += 1

    def block(self) -> None:
        """The device gets a value from memory that it cannot read by itself."""
        if self.on:
            self.blocking[_place()] += 1


WAITS = Waits()


class PretendTensor(torch.Tensor):
    """A tensor of the device; what it holds lies on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        """Wrap a tensor."""
        options: dict[str, Any] = {"dtype": held.dtype, "device": DEVICE}
        if held.layout == torch.strided:
            options |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self: PretendTensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), **options)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation with one of these."""
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        copied = PretendTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        """Bring the values to the host."""
        WAITS.sync()
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as for every accelerator."""
        raise TypeError("can't convert a tensor of the device to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        """Where it lies."""
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        """The storage that holds it."""
        return self.held.untyped_storage()

    def values(self) -> torch.Tensor:
        """Of a sparse matrix."""
        return PretendTensor(self.held.values())

    def col_indices(self) -> torch.Tensor:
        """Of a sparse matrix."""
        return PretendTensor(self.held.col_indices())

    def crow_indices(self) -> torch.Tensor:
        """Of a sparse matrix."""
        return PretendTensor(self.held.crow_indices())


class PretendMode(TorchDispatchMode):
    """Lets functions that make tensors make them on the device, where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run any operation."""
        return _run(func, args, kwargs or {})


class PretendStrategy(SingleDeviceStrategy):
    """One device: this one."""

    def __init__(self) -> None:
        super().__init__(device=DEVICE, accelerator=_Accelerator())


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """There is nothing to tell."""
        return {}


@contextmanager
def installed() -> Iterator[Waits]:
    """Make the device known to torch: tensors can be made there, and autocast takes it for a CPU."""
    enabled, get_dtype, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast

    def known(device_type: str | None = None) -> str:
        return "cpu" if device_type in (None, DEVICE.type) else str(device_type)

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(known(device_type), *args, **kwargs)

    torch._C._set_only_lift_cpu_tensors(True)  # tensors made of numbers are made on the CPU, then moved
    torch.is_autocast_enabled = lambda device_type=None: enabled(known(device_type))
    torch.get_autocast_dtype = lambda device_type: get_dtype(known(device_type))
    torch.autocast = torch.amp.autocast = Autocast
    try:
        with PretendMode():
            yield WAITS
    finally:
        torch.is_autocast_enabled, torch.get_autocast_dtype = enabled, get_dtype
        torch.autocast = torch.amp.autocast = autocast
        torch._C._set_only_lift_cpu_tensors(False)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what its tensors hold, after a look at where they lie."""
    name = str(func)
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    ours = [one for one in tensors if isinstance(one, PretendTensor)]
    others = [one for one in tensors if one.device.type == "cpu"]
    _check(name, args, ours, [one for one in others if one.dim()])
    if ours and torch.are_deterministic_algorithms_enabled():
        _check_deterministic(name, args)
    on_device = bool(ours)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu") if on_device else kwargs["device"]}
    if WAITS.on:
        _count(name, args, kwargs, ours, others, to_device=on_device)
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not on_device or name == "aten._local_scalar_dense.default":
        return result
    same = {id(one.held): one for one in ours} if func._schema.is_mutable else {}

    def wrapped(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or isinstance(one, PretendTensor):
            return one
        return same.get(id(one)) if id(one) in same else PretendTensor(one)

    return tree_map(wrapped, result)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, PretendTensor) else one


def _check(name: str, args: Any, ours: list[Any], hard: list[torch.Tensor]) -> None:
    """Raise where tensors of both kinds meet. Those without dimensions are numbers, and indices may come over.

    Raises:
        RuntimeError: Like a GPU's.
    """
    if not ours or not hard or name in _COPIES or name == "aten.set_.source_Tensor":
        return
    if name in _INDEXED and isinstance(args[0], PretendTensor):
        values = args[2] if len(args) > 2 else None
        if not (isinstance(values, torch.Tensor) and values.dim() and not isinstance(values, PretendTensor)):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device: {name} got "
        + ", ".join(f"{tuple(one.shape)} on cpu" for one in hard)
        + f" and {', '.join(f'{tuple(one.shape)} on {DEVICE}' for one in ours)}"
    )


def _check_deterministic(name: str, args: Any) -> None:
    """Raise where CUDA has no deterministic form.

    Raises:
        RuntimeError: As torch says it.
    """
    of_floats = name == "aten.cumsum.default" and args[0].is_floating_point()
    if of_floats or name in _NOT_DETERMINISTIC or (name == "aten.bincount.default" and len(args) > 1):
        raise RuntimeError(f"{name} does not have a deterministic implementation on this device")


def _count(
    name: str, args: Any, kwargs: Any, ours: list[Any], others: list[torch.Tensor], *, to_device: bool
) -> None:
    WAITS.ops += bool(ours)
    if name in ("aten._to_copy.default", "aten.copy_.default"):
        non_blocking = kwargs.get("non_blocking") or (name == "aten.copy_.default" and args[2:] == (True,))
        target_is_ours = to_device if name == "aten._to_copy.default" else isinstance(args[0], PretendTensor)
        if ours and not target_is_ours:
            WAITS.sync()
        elif target_is_ours and not non_blocking and any(one.dim() and one.numel() for one in others):
            WAITS.block()
    elif ours and name in _ASKS:
        WAITS.sync()
    elif ours and name in _INDEXED:
        indices = [one for one in args[1] if isinstance(one, torch.Tensor)]
        if any(one.dtype in (torch.bool, torch.uint8) and isinstance(one, PretendTensor) for one in indices):
            WAITS.sync()  # how many are there?
        if any(not isinstance(one, PretendTensor) for one in indices):
            WAITS.block()


def _place() -> str:
    """Name the innermost line of ours that asks, and the library's that it asks through."""
    found = []
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        ours = next((one for one in _OURS if one in parts and "site-packages" not in parts), None)
        library = next((one for one in ("transformers", "peft") if one in parts), None)
        if package := ours or library:
            line = f"{'/'.join(parts[parts.index(package) :])}:{frame.lineno}"
            found += [line] if ours or not found else []
        if ours:
            break
    return " < ".join(found) or "elsewhere"
