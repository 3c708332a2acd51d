"""SparseWeight: one base weight of which some entries are trained, in place.

Shapes: K trained entries; N entries of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.ranks import mean_over_ranks
from lightning_modules.rounding import Rounding, rounding
from lightning_modules.sparse.delta import SparseDelta, write_entries
from lightning_modules.sparse.layers import FORWARDS, with_gradient

VALUES, INDICES, BASE = "sparse_values", "sparse_indices", "sparse_base"


class SparseWeight:
    """Trains K entries of a weight through a vector of values.

    Chosen entries are written into the weight, W[indices] = base + values, so a forward pass costs what it
    costs without adapter. The backward pass makes the weight's gradient layer by layer, gathers it at the
    indices into the gradient of `values`, and frees it. While `indices` is None all entries are trained: the
    weight stays as it was and values are added in the forward pass, which stores no second copy of it.

    Values are float32 whatever the weight is; what is written is rounded to the weight's type.

    Args:
        name: Parameter name in the model.
        weight: The weight.
        users: Modules that use it, `nn.Linear` or `nn.Embedding`; several where weights are tied. The first
            one holds values and indices.

    Attributes:
        observing: Add up gradients of the whole weight; those of all entries are in `values` anyway.
        of_examples: Add them up there too, because single examples are wanted.
        observed: Their sum since it was last taken, float32; None where there was none.
        idle: Values get zero gradients: nothing was chosen yet.
        line_dim: 0 where whole rows are trained, 1 where whole columns are, else None.
    """

    def __init__(self, name: str, weight: nn.Parameter, users: Sequence[nn.Module]) -> None:
        self.name = name
        self.weight_name = name.rpartition(".")[2]
        self.users = list(users)
        self.owner = self.users[0]
        self.observing = False
        self.of_examples = False
        self.idle = False
        self.line_dim: int | None = None
        self.observed: Tensor | None = None
        self._off = 0
        self._written: int | None = None
        self.owner.register_parameter(VALUES, nn.Parameter(_vector(weight, 0)))
        self.owner.register_buffer(INDICES, torch.empty(0, dtype=torch.int32, device=weight.device))
        self.owner.register_buffer(BASE, _vector(weight, 0).to(weight.dtype), persistent=False)
        self._hooks = [
            self.owner.register_state_dict_post_hook(partial(SparseWeight._hide, self)),  # type: ignore[no-untyped-call]
            self.owner.register_load_state_dict_pre_hook(self._refuse),  # type: ignore[no-untyped-call]
        ]
        self.take_over()

    def take_over(self) -> None:
        """Let the modules compute with this weight."""
        for user in self.users:
            user.forward = partial(FORWARDS[type(user).forward], self, user)

    # ------------------------------------------------------------------ state

    @property
    def weight(self) -> Tensor:
        """The weight itself, without gradient."""
        return self.owner.get_parameter(self.weight_name).detach()

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.owner.get_parameter(self.weight_name).shape

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.owner.get_parameter(self.weight_name).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.owner.get_parameter(self.weight_name).dtype

    @property
    def values(self) -> nn.Parameter:
        """What is learned (K), float32; (N) while all entries are trained."""
        return self.owner.get_parameter(VALUES)

    @property
    def indices(self) -> Tensor | None:
        """Positions of the trained entries (K), int32; None for all."""
        return getattr(self.owner, INDICES)  # type: ignore[no-any-return]

    @property
    def delta(self) -> SparseDelta:
        """What was learned, as a change of the weight."""
        indices = self.indices
        if indices is None:
            indices = torch.arange(self.weight.numel(), dtype=torch.int32, device=self.weight.device)
        return SparseDelta(indices, self.values.detach(), tuple(self.weight.shape))

    def put(self, indices: Tensor | None, values: Tensor) -> bool:
        """Train these entries from now on.

        Args:
            indices: Sorted positions (K); None for all.
            values: Their values (K).

        Returns:
            Whether `values` had to become a new parameter, because K changed.
        """
        self._erase()
        weight = self.weight
        resized = values.shape != self.values.shape
        with torch.no_grad():
            if resized:
                setattr(
                    self.owner, VALUES, nn.Parameter(values.detach().float().to(weight.device, copy=True))
                )
            else:
                self.values.copy_(values)
        if indices is None:
            setattr(self.owner, INDICES, None)
            setattr(self.owner, BASE, None)
        else:
            indices = indices.to(weight.device, torch.int32)
            setattr(self.owner, INDICES, indices)
            setattr(self.owner, BASE, weight.flatten().index_select(0, indices))
        self.line_dim = None if indices is None else _line_dim(indices, weight.shape)
        self.write()
        return resized

    def rounding(self, dtype: torch.dtype | None = None) -> Rounding:
        """Measure what arrives of the learned change in what the model computes with; under sharding a collective.

        Args:
            dtype: What it computes in; None for the weight's type.
        """
        base = self.weight.flatten() if self.indices is None else self._base()
        return rounding(base, self.values.detach(), dtype or self.dtype)

    def write(self, *, always: bool = False) -> None:
        """Write base + values into the weight, where values have changed since the last time.

        Args:
            always: Do not ask autograd, which does not see what is written through `.data` or by a kernel.
        """
        if self.indices is None or self._off:
            return
        if not always and self._written == self.values._version:
            return
        self._scatter(self.weight, self._chosen())
        self._written = self.values._version

    def switch_off(self) -> None:
        """Make the weight the base weight again, until `switch_on`; may be nested."""
        self._off += 1
        if self._off == 1 and self.indices is not None and self._written is not None:
            # A graph that waits for its backward pass must not notice: the same bits come back before it.
            self._scatter(self.owner.get_parameter(self.weight_name).data, self._base())

    def switch_on(self) -> None:
        """Undo `switch_off`."""
        self._off -= 1
        if not self._off and self.indices is not None:
            if self._written == self.values._version:
                self._scatter(self.owner.get_parameter(self.weight_name).data, self._chosen())
            self.write()

    def remove(self) -> None:
        """Restore the base weight bit for bit and take everything off the modules."""
        self._erase()
        for hook in self._hooks:
            hook.remove()
        for user in self.users:
            vars(user).pop("forward", None)
        for name in (VALUES, INDICES, BASE):
            delattr(self.owner, name)

    def _hide(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        """Let the model's own `state_dict`, and so `save_pretrained`, have the changed weight and no more."""
        for name in (VALUES, INDICES):
            state.pop(prefix + name, None)
        if self.adds_in_forward and not self.is_off:
            for key in [key for key in state if key == prefix + self.weight_name]:
                state[key] = self.sum()

    @property
    def adds_in_forward(self) -> bool:
        """Whether the weight is still the base weight, and values are added in the forward pass."""
        return self.trains_all

    def _refuse(self, *_: Any) -> None:
        raise ValueError(
            "This model carries a sparse adapter, whose values and indices belong together. Load what was "
            "learned with adapter.load_state_dict, or base weights after adapter.remove()."
        )

    def gradient(self) -> Tensor:
        """Return the gradient of the whole weight, a mean over ranks; of observed ones, their sum."""
        if self.indices is None:  # DDP has averaged it
            gradient = self.values.grad
            return (
                torch.zeros(self.shape, device=self.device) if gradient is None else gradient.view(self.shape)
            )
        observed, self.observed = self.observed, None
        if observed is None:
            observed = torch.zeros(self.shape, device=self.device)
        return mean_over_ranks(observed)

    def take_observed(self) -> Tensor | None:
        """Return the gradients of the whole weight that this rank has observed since the last time."""
        observed, self.observed = self.observed, None
        return None if observed is None else observed.view(self.shape)

    def hand_out_gradient(self) -> None:
        """Give `values` the gradient of the step, where the backward pass has not."""

    def keep(self, tensor: Tensor) -> Tensor:
        """Keep a tensor of the weight's entries from one step to the next."""
        return tensor

    def forget_unmade_step(self) -> None:
        """Drop observed gradients of a step that was not made, whose gradients are gone from the values."""
        if self.values.grad is None:
            self.observed = None

    def _erase(self) -> None:
        if self._written is not None and not self._off:
            self._scatter(self.weight, self._base())
        self._written = None

    def _base(self) -> Tensor:
        return getattr(self.owner, BASE)  # type: ignore[no-any-return]

    def _chosen(self) -> Tensor:
        base = self._base()
        return (base + self.values.detach()).to(base.dtype)

    def _scatter(self, weight: Tensor, entries: Tensor) -> None:
        assert self.indices is not None
        write_entries(weight, self.indices, entries)

    # ------------------------------------------------------------------ forward and backward

    def effective(self) -> Tensor:
        """Return the weight to compute with; its gradient reaches `values`."""
        if self.is_off or not (self.trains_all or torch.is_grad_enabled()):
            return self.weight
        if not torch.is_grad_enabled():
            return self.sum()
        return with_gradient(self)

    @property
    def is_off(self) -> bool:
        """Whether the weight is the base weight for now."""
        return self._off > 0

    @property
    def trains_all(self) -> bool:
        """Whether all entries are trained."""
        return self.indices is None

    def sum(self) -> Tensor:
        """Return base + values while all entries are trained."""
        weight = self.weight
        return (weight + self.values.detach().view(weight.shape)).to(weight.dtype)

    @property
    def lines(self) -> Tensor | None:
        """Numbers of the rows or columns that are trained as a whole, where nothing else needs a gradient."""
        if self.line_dim is None or self.idle or self.observing:
            return None
        assert self.indices is not None
        rows, columns = self.weight.shape
        if self.line_dim == 0:
            return self.indices[::columns] // columns
        return self.indices[: len(self.indices) // rows]

    def gather(self, gradient: Tensor) -> Tensor:
        """Return the gradient of `values` from that of the weight; keep the whole one if it is observed."""
        if self.observing and (self.indices is not None or self.of_examples):
            if self.observed is None:
                self.observed = torch.zeros_like(gradient, dtype=torch.float32)
            self.observed += gradient
        if self.indices is None:
            return gradient.float().view(-1)
        if self.idle:
            return torch.zeros_like(self.values)
        return gradient.reshape(-1).index_select(0, self.indices).float()


def _vector(like: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.float32, device=like.device)


def _line_dim(indices: Tensor, shape: torch.Size) -> int | None:
    """Return 0 if sorted positions are some whole rows, 1 if some whole columns, else None."""
    if len(shape) != 2 or not 0 < len(indices) < shape.numel():
        return None
    rows, columns = shape
    row, column = indices // columns, indices % columns
    if len(indices) % columns == 0 and bool((row.view(-1, columns) == row.view(-1, columns)[:, :1]).all()):
        return 0
    if len(indices) % rows == 0 and bool((column.view(rows, -1) == column.view(rows, -1)[:1]).all()):
        return 1
    return None
