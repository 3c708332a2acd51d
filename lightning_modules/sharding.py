"""Sharded models (FSDP2): dividing parameters over ranks, and whole tensors where they are needed.

A sharded parameter is a `DTensor` that every rank holds some rows of. What is plain here is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model that are gathered and freed one after the other.

    Args:
        model: The base model, adapters inside it or not.

    Raises:
        ValueError: If the model does not say which modules must not be split.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not name its decoder layers (_no_split_modules), so it cannot be "
            "sharded layer by layer. Use strategy: ddp."
        )
    return found


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    reshard_after_forward: bool | int = True,
    prepare: Callable[[nn.Module], None] | None = None,
) -> None:
    """Shard a transformers model in place, decoder layer by decoder layer, the rest as one group.

    Embeddings and a head that is tied to them are in the same group, so they stay tied. Adapters must be inside
    already: parameters that come later are neither sharded nor exchanged. `generate` works because the base model
    itself is sharded, not a `PeftModel` around it.

    Args:
        model: The base model; its parameters may be on the meta device.
        mesh: One dimension shards; with two, the first one replicates.
        mp_policy: Precision of computing and of exchanging gradients.
        offload_policy: Where shards rest.
        reshard_after_forward: Whether gathered layers are freed after the forward pass, or over how many ranks
            they stay divided until the backward pass.
        prepare: Called with each layer, and last with the model, just before its parameters are divided: so that
            only one layer is whole in memory at a time.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
    }
    for layer in decoder_layers(model):
        if prepare is not None:
            prepare(layer)
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    if prepare is not None:
        prepare(model)
    # The backward pass begins with what the forward pass ends with.
    fully_shard(model, reshard_after_forward=False, **options)
    # Without this, gradients of equal shape are added to those of other parameters where ranks use different ones
    # (routed experts), without an error.
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose parameters are gathered together; none of a model that is not sharded."""
    found = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [module for module in found if module._get_fsdp_state()._fsdp_param_group is not None]


def gathered_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the type that sharded layers compute in; None for that of their weights, or for a plain model."""
    policies = [module._get_fsdp_state()._mp_policy for module in sharded_modules(model)]
    return next((policy.param_dtype for policy in policies), None)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank, so that ranks may run it as often as each of them wants.

    A collective at the start; none inside or at the end. Each rank needs memory for all weights. No backward pass
    inside. Does nothing for a model that is not sharded.

    Args:
        model: The model, or something that contains it.
    """
    modules = sharded_modules(model)
    if modules and is_whole(model):  # nested
        yield
        return
    for module in modules:
        _keep_whole(module, keep=True)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            _keep_whole(module, keep=False)
            module.reshard()


def is_whole(model: nn.Module) -> bool:
    """Return whether every rank holds the whole model for now, or always does."""
    return all(_stays_whole(module) for module in sharded_modules(model))


_WAS = "_quiver_reshard_after_forward"


def _stays_whole(module: FSDPModule) -> bool:
    return _WAS in vars(module)


def _keep_whole(module: FSDPModule, *, keep: bool) -> None:
    """Switch the freeing of gathered parameters after a forward pass off, or back to what it was."""
    group: Any = module._get_fsdp_state()._fsdp_param_group
    assert group is not None
    if keep:
        vars(module)[_WAS] = group.post_forward_mesh_info
        # The group's own attribute: set_reshard_after_forward forgets a partial resharding.
        group.post_forward_mesh_info = None
    else:
        group.post_forward_mesh_info = vars(module).pop(_WAS)


# ---------------------------------------------------------------------- single tensors


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its rows; a collective for a sharded one.

    Args:
        tensor: Sharded or plain.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds, as a plain tensor that shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return first and last (exclusive) row that this rank holds; all of them of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """Divide a tensor as another one of the same shape is divided; each rank has all of it.

    Args:
        full: The same on every rank.
        like: Sharded or plain.
    """
    if not isinstance(like, DTensor):
        return full.to(like.device)
    full = full.to(local(like).device)
    # A copy: what `distribute_tensor` returns keeps all of `full` in memory.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).clone()


def copy_rows(target: Tensor, source: Any) -> None:
    """Copy from a whole tensor, or a tensor in a file, what this rank holds of a tensor.

    Args:
        target: Sharded or plain.
        source: Of the target's shape: a tensor, or anything that gives rows by slice.
    """
    if isinstance(target, DTensor):
        first, end = local_rows(target)
        if end > first:
            local(target).copy_(source[first:end])
    else:
        target.copy_(read(source))


def read(source: Any) -> Tensor:
    """Return a tensor, or read one that is in a file."""
    found: Tensor = source if isinstance(source, Tensor) else source[:]
    return found


def writes_shard(tensor: Tensor) -> bool:
    """Return whether this rank is the one to save its rows of a tensor, of those that hold the same."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return all(
        place.is_shard() or position == 0
        for place, position in zip(tensor.placements, coordinate, strict=True)
    )


def consolidated(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Gather tensors one after the other into the memory of the CPU; a collective if one is sharded.

    Args:
        tensors: Sharded or plain; the same names in the same order on every rank.
        keep: Whether this rank wants them; others take part and keep nothing.

    Returns:
        Plain tensors by name; empty without `keep`. Plain ones come back as they are, the same memory.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach()).cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full
    return found


def sum_of_shards(values: Tensor, like: Tensor) -> Tensor:
    """Sum what each rank found in its rows of a tensor; a collective if that is sharded.

    Args:
        values: Plain.
        like: The tensor that was looked at.

    Returns:
        The sum over ranks with different rows; `values` for a plain tensor.
    """
    if not isinstance(like, DTensor):
        return values
    places = [Partial() if place.is_shard() else place for place in like.placements]
    return DTensor.from_local(values, like.device_mesh, places).full_tensor()


def entries_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return some entries of a tensor; a collective for a sharded one.

    Args:
        tensor: Sharded or plain.
        positions: In the flattened whole tensor, int64 (K).

    Returns:
        (K).
    """
    rows = local(tensor).flatten()
    positions = positions.to(rows.device)
    if not isinstance(tensor, DTensor):
        return rows[positions]
    first = local_rows(tensor)[0] * (tensor.numel() // max(tensor.shape[0], 1))
    mine = (positions >= first) & (positions < first + len(rows))
    found = rows.new_zeros(len(positions))
    found[mine] = rows[positions[mine] - first]
    return sum_of_shards(found, like=tensor)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, sharded ones with the rows of all ranks; a plain scalar."""
    return whole(torch.nn.utils.get_total_norm(tensors))


# ---------------------------------------------------------------------- nested state


def consolidated_tree(checkpoint: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Return a checkpoint whose sharded tensors are gathered; a collective.

    Args:
        checkpoint: `state_dict` and `optimizer_states` may hold sharded tensors.
        keep: Whether this rank wants the result; others get an empty one.
    """
    learned = consolidated(checkpoint["state_dict"], keep=keep)
    states = map_tensors(
        checkpoint.get("optimizer_states", []), lambda _, tensor: _gathered(tensor, keep=keep)
    )
    return {**checkpoint, "state_dict": learned, "optimizer_states": states} if keep else {}


def _gathered(tensor: Tensor, *, keep: bool) -> Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor
    full = whole(tensor).cpu()
    return full if keep else None


def map_tensors(tree: Any, change: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """Return a copy of nested dicts, lists and tuples with every tensor changed, always in the same order.

    Args:
        tree: Nested data.
        change: Gets the place of a tensor, such as `0.state.3.exp_avg`, and the tensor.
        path: The place of `tree` itself.
    """
    if isinstance(tree, Tensor):
        return change(path, tree)
    below = f"{path}." if path else ""
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change, f"{below}{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, change, f"{below}{i}") for i, value in enumerate(tree))
    return tree


def local_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Divide an optimiser's saved state over ranks as its parameters are divided.

    Args:
        optimizer: Its parameters may be sharded.
        saved: What its `state_dict` returned under any strategy, with whole tensors or tensors in files. State of
            a parameter's own shape is divided with it, other state is the same on all ranks.

    Raises:
        ValueError: If the optimiser has other parameters than the saved one.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(parameters) != len(numbers):
        raise ValueError(
            f"The checkpoint's optimiser trains {len(numbers)} parameters, this run's {len(parameters)}. Use the "
            "adapter and optimizer settings of the run that wrote it."
        )
    states = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            states[number] = {
                name: _divided(value, parameter) for name, value in saved["state"][number].items()
            }
    return {**saved, "state": states}


def _divided(value: Any, parameter: Tensor) -> Any:
    if not hasattr(value, "shape"):
        return value
    if tuple(value.shape) != tuple(parameter.shape) or not isinstance(parameter, DTensor):
        return read(value)
    divided = torch.empty_like(parameter, dtype=value.dtype)
    copy_rows(divided, value)
    return divided.detach()
