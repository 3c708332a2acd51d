"""ShardedSparseWeight: a sparse weight of which each rank holds some rows (FSDP2).

Shapes: K trained entries of the whole weight, k of them in this rank's rows; N entries of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_modules.rounding import Rounding, rounding
from lightning_modules.sharding import local, local_rows, sharded_like, whole
from lightning_modules.sparse.delta import SparseDelta, write_entries
from lightning_modules.sparse.weight import BASE, INDICES, VALUES, SparseWeight


class ShardedSparseWeight(SparseWeight):
    """Trains K entries of a sharded weight, each rank those in its rows.

    The weight itself requires a gradient, so FSDP2 exchanges it as any other; when a layer's gradient arrives, a
    hook gathers the entries of this rank's rows and frees the rest. Indices and base entries are those of the
    rank's rows. `values` and with it the optimiser's moments are cut evenly over ranks, wherever the entries lie,
    so that they are ordinary sharded parameters of K entries; once before and once after an optimiser step they
    change places.

    While all entries are trained, base + values is written into the weight as well, and the rank keeps a copy of
    its rows of the base.

    Args:
        name: Parameter name in the model.
        weight: The weight, sharded by rows.
        users: Modules that use it. The first one holds values and indices.

    Attributes:
        shard: The weight, sharded.

    Raises:
        ValueError: If the rows lie on the host and the ranks compute on GPUs.
    """

    def __init__(self, name: str, weight: DTensor, users: Sequence[nn.Module]) -> None:
        if local(weight).device.type != weight.device_mesh.device_type:
            raise ValueError(
                "cpu_offload: true keeps base weights on the host, but a sparse adapter trains them in place. Set "
                "cpu_offload: false in the strategy, or train a LoRA adapter."
            )
        self.shard = weight
        first, end = local_rows(weight)
        row = weight[0].numel() if weight.dim() > 1 else 1
        self._span = (first * row, end * row)
        group = weight.device_mesh.get_group(weight.device_mesh.ndim - 1)  # of the ranks with other rows
        self._group = group
        self._spans: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(self._spans, self._span, group=group)
        self._counts = [0] * len(self._spans)
        self._all = False
        self._gradient: Tensor | None = None
        super().__init__(name, weight, users)  # type: ignore[arg-type]
        weight.requires_grad_(True)
        self._hooks.append(weight.register_post_accumulate_grad_hook(self._receive))

    def take_over(self) -> None:
        """Leave the modules as they are: FSDP2 brings the gradient."""

    # ------------------------------------------------------------------ state

    @property
    def weight(self) -> Tensor:
        """The whole weight; a collective."""
        return whole(self.shard.detach())

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight."""
        return self.shard.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.shard.dtype

    @property
    def device(self) -> torch.device:
        """Where this rank's rows are."""
        return local(self.shard).device

    @property
    def indices(self) -> Tensor | None:
        """Positions of the trained entries in the whole weight (K), int32; None for all. A collective."""
        if self._all:
            return None
        return self._joined(self._own_indices() + self._span[0])

    @property
    def trains_all(self) -> bool:
        """Whether all entries are trained."""
        return self._all

    @property
    def adds_in_forward(self) -> bool:
        """Never: what is trained is always in the weight."""
        return False

    @property
    def delta(self) -> SparseDelta:
        """What was learned, as a change of the whole weight; a collective."""
        indices = self.indices
        if indices is None:
            indices = torch.arange(self.shape.numel(), dtype=torch.int32, device=self.device)
        return SparseDelta(indices, whole(self.values.detach()), tuple(self.shape))

    def put(self, indices: Tensor | None, values: Tensor) -> bool:
        """Train these entries from now on.

        Args:
            indices: Sorted positions in the whole weight (K), the same on every rank; None for all.
            values: Their values (K).

        Returns:
            Whether `values` had to become a new parameter, because K changed.
        """
        self._erase()
        self._all = indices is None
        if indices is None:
            indices = torch.arange(self.shape.numel(), dtype=torch.int64)
        indices = indices.to(self.device, torch.int64)
        edges = torch.tensor([edge for span in self._spans for edge in span], device=self.device)
        places = torch.searchsorted(indices, edges).view(-1, 2)
        self._counts = (places[:, 1] - places[:, 0]).tolist()
        own = indices[(indices >= self._span[0]) & (indices < self._span[1])] - self._span[0]
        setattr(self.owner, INDICES, own.int())
        setattr(self.owner, BASE, local(self.shard.detach()).flatten().index_select(0, own))
        resized = values.shape != self.values.shape
        values = values.detach().float().to(self.device)
        if resized:
            setattr(self.owner, VALUES, nn.Parameter(self._evenly(values)))
        else:
            local(self.values.detach()).copy_(local(sharded_like(values, self.values)))
        self.write(always=True)
        return resized

    def rounding(self, dtype: torch.dtype | None = None) -> Rounding:
        """Measure what arrives of the learned change in what the model computes with; a collective.

        Args:
            dtype: What it computes in; None for the weight's type.
        """
        base = self._base()
        found = rounding(base, self._own_values(), dtype or base.dtype)
        sums = torch.tensor(astuple(found), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self._group)
        wanted, kept, lost, changes, still = sums.tolist()
        return Rounding(wanted, kept, lost, int(changes), int(still))

    def write(self, *, always: bool = False) -> None:
        """Write base + values into this rank's rows; a collective.

        Args:
            always: Else nothing is done: ranks cannot agree without asking each other whether values have changed.
        """
        if not always or self._off:
            return
        self._written = 0
        self._scatter(local(self.shard.detach()), self._chosen())

    def switch_off(self) -> None:
        """Make the weight the base weight again, until `switch_on`; may be nested."""
        self._off += 1
        if self._off == 1 and self._written is not None:
            self._scatter(local(self.shard.detach()), self._base())

    def switch_on(self) -> None:
        """Undo `switch_off`."""
        self._off -= 1
        if not self._off:
            self.write(always=True)

    def remove(self) -> None:
        """Restore the base weight bit for bit and take everything off the modules."""
        super().remove()
        self.shard.requires_grad_(False)

    def _erase(self) -> None:
        if self._written is not None and not self._off:
            self._scatter(local(self.shard.detach()), self._base())
        self._written = None

    def _chosen(self) -> Tensor:
        base = self._base()
        return (base + self._own_values()).to(base.dtype)

    def _own_values(self) -> Tensor:
        """Values of the entries in this rank's rows (k); a collective."""
        place = self._spans.index(self._span)
        start = sum(self._counts[:place])
        return whole(self.values.detach())[start : start + self._counts[place]]

    def _scatter(self, weight: Tensor, entries: Tensor) -> None:
        if len(entries):
            write_entries(weight, self._own_indices(), entries)

    def _own_indices(self) -> Tensor:
        return getattr(self.owner, INDICES)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ gradients

    def _receive(self, weight: Tensor) -> None:
        """Take what is wanted of a gradient that all ranks have averaged, and free it."""
        assert weight.grad is not None
        gradient = local(weight.grad).flatten()
        weight.grad = None
        if self.observing and not self._all:
            if self.observed is None:
                self.observed = torch.zeros_like(gradient, dtype=torch.float32)
            self.observed += gradient
        own = gradient.index_select(0, self._own_indices().long()).float()
        if self.idle:
            own.zero_()
        self._gradient = own if self._gradient is None else self._gradient + own

    def hand_out_gradient(self) -> None:
        """Give `values` the gradient of the step; a collective, after the last backward pass of a step."""
        if self._gradient is not None:
            self.values.grad = self._evenly(self._joined(self._gradient))
            self._gradient = None

    def gradient(self) -> Tensor:
        """Return the gradient of the whole weight, a mean over ranks; a collective."""
        if self._all:
            grad = self.values.grad
            found = torch.zeros(self.shape.numel(), device=self.device) if grad is None else whole(grad)
            return found.view(self.shape)
        observed, self.observed = self.observed, None
        if observed is None:
            observed = torch.zeros(self._span[1] - self._span[0], device=self.device)
        counts = [end - first for first, end in self._spans]
        return self._joined(observed, counts).view(self.shape)

    def forget_unmade_step(self) -> None:
        """Drop observed gradients of a step that was not made, whose gradients are gone from the values."""
        if self.values.grad is None and self._gradient is None:
            self.observed = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Keep this rank's rows of a tensor of the whole weight's entries."""
        return sharded_like(tensor.view(self.shape), self.shard)

    # ------------------------------------------------------------------ between ranks

    def _evenly(self, entries: Tensor) -> Tensor:
        """Cut K entries, the same on every rank, evenly over ranks."""
        mesh, places = self.shard.device_mesh, self.shard.placements
        # A copy: what `distribute_tensor` returns keeps all entries in memory.
        return distribute_tensor(entries, mesh, places, src_data_rank=None).clone()

    def _joined(self, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Put what each rank has for its rows after one another (K)."""
        counts = self._counts if counts is None else counts
        width = max(counts)
        padded = own.new_zeros(width)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
