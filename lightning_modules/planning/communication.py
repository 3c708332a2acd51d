"""Bytes that a rank sends in one step, in closed form.

All counts are those of ring algorithms, which send as little as any: over n ranks an all-gather or a
reduce-scatter of a tensor of S bytes sends (n - 1) / n x S from each rank, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step.

    Attributes:
        gathers: All-gathers of weights in the updates.
        scatters: Reduce-scatters of gradients.
        reduces: All-reduces of gradients.
        generation: All-gathers of weights for the rollout.
    """

    gathers: int = 0
    scatters: int = 0
    reduces: int = 0
    generation: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.gathers + self.scatters + self.reduces + self.generation


def one_way(size: int, ranks: int) -> int:
    """Bytes that each of `ranks` sends in an all-gather to, or a reduce-scatter of, `size` bytes.

    >>> one_way(800, 8)
    700
    """
    return size * (ranks - 1) // ranks


def data_parallel(gradient_bytes: int, *, ranks: int, updates: int) -> Traffic:
    """Traffic of DDP: gradients of an update are all-reduced once, however many micro-batches made them.

    Args:
        gradient_bytes: Of the whole model.
        ranks: How many there are.
        updates: In one step.

    >>> data_parallel(800, ranks=8, updates=2).total
    2800
    """
    return Traffic(reduces=2 * one_way(gradient_bytes, ranks) * updates)


def sharded(
    layer_bytes: int,
    root_bytes: int,
    gradient_bytes: int,
    *,
    shards: int,
    replicas: int,
    passes: int,
    reads: int = 0,
    gathers_again: bool,
    generation_gathers: int,
) -> Traffic:
    """Traffic of FSDP2.

    Each micro-batch gathers the weights for its forward pass and, where they were freed after it, again for its
    backward pass; then gradients are reduce-scattered, and among replicas all-reduced.

    Args:
        layer_bytes: Weights of all decoder layers, in the precision that is gathered.
        root_bytes: The other weights; they stay from the forward to the backward pass.
        gradient_bytes: Gradients of the whole model, in the precision of the exchange.
        shards: Ranks that share one copy of the model.
        replicas: Copies.
        passes: Micro-batches of all updates of a step.
        reads: Further forward passes, without a backward pass.
        gathers_again: Whether layers are freed after the forward pass.
        generation_gathers: How often the whole model is gathered to generate.

    >>> sharded(800, 80, 880, shards=8, replicas=1, passes=1, gathers_again=True, generation_gathers=1)
    Traffic(gathers=1470, scatters=770, reduces=0, generation=770)
    """
    forward = one_way(layer_bytes + root_bytes, shards)
    backward = one_way(layer_bytes, shards) if gathers_again else 0
    return Traffic(
        gathers=(forward + backward) * passes + forward * reads,
        scatters=one_way(gradient_bytes, shards) * passes,
        reduces=2 * one_way(gradient_bytes // shards, replicas) * passes,
        generation=forward * generation_gathers,
    )
