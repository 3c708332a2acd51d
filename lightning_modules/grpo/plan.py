"""The plan that is printed before training: what one step does, in units a user can reason about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.grpo.resampling import Resampling
from lightning_modules.sharding import local

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """One optimiser step of GRPO in numbers.

    Attributes:
        prompts_per_rank: Prompts per rank and rollout.
        world_size: Ranks.
        group_size: Completions per prompt.
        max_new_tokens: Length limit of a completion.
        updates_per_rollout: Optimiser updates per rollout.
        max_tokens_per_microbatch: Token budget of one forward pass.
        max_logits: Logits that a pass holds at most.
        kv_bytes_per_token: Key-value cache of one token.
        trainable: Parameters that are learned.
        frozen: Parameters that are not.
        weight_bytes: All parameters in memory.
        gradient_bytes: Gradients of the trainable ones.
        resampling: How dead groups are replaced; None not at all.
    """

    prompts_per_rank: int
    world_size: int
    group_size: int
    max_new_tokens: int
    updates_per_rollout: int
    max_tokens_per_microbatch: int
    max_logits: int
    kv_bytes_per_token: int
    trainable: int
    frozen: int
    weight_bytes: int
    gradient_bytes: int
    resampling: Resampling | None = None

    def __str__(self) -> str:
        prompts = self.prompts_per_rank * self.world_size
        rollouts = prompts * self.group_size
        moments = 2 * self.gradient_bytes
        cache = self.prompts_per_rank * self.group_size * self.max_new_tokens * self.kv_bytes_per_token
        logits = 3 * 4 * self.max_logits  # themselves, their float32 copy and its gradient
        total = self.weight_bytes + self.gradient_bytes + moments + max(cache, logits)
        period = "step" if self.resampling is None else "draw"
        resampled = (
            []
            if self.resampling is None
            else [
                f"  live groups a rollout  {self.resampling.live_groups:,}, from at most "
                f"{self.resampling.max_rollouts:,} rollouts",
            ]
        )
        lines = [
            "Plan",
            f"  prompts per {period}       {prompts:,} ({self.prompts_per_rank:,} x {self.world_size} ranks)",
            f"  rollouts per {period}      {rollouts:,} ({self.group_size} per prompt)",
            *resampled,
            f"  completion tokens      up to {rollouts * self.max_new_tokens:,} per {period} "
            f"({self.max_new_tokens:,} each)",
            f"  updates per rollout    {self.updates_per_rollout} (on live groups, at most "
            f"{self.max_tokens_per_microbatch:,} tokens a forward pass)",
            f"  parameters             {self.trainable:,} trained, {self.frozen:,} frozen",
            f"  memory per rank        about {total / _GIB:.2f} GiB without activations: weights "
            f"{self.weight_bytes / _GIB:.2f}, gradients {self.gradient_bytes / _GIB:.2f}, AdamW moments "
            f"{moments / _GIB:.2f}, then the larger of cache {cache / _GIB:.2f} (completions) and logits "
            f"{logits / _GIB:.2f} (at most)",
        ]
        return "\n".join(lines)


def parameter_facts(model: nn.Module, trained: Sequence[Tensor]) -> dict[str, int]:
    """Count parameters over all ranks, and the bytes that this rank holds of them.

    Args:
        model: Sharded or plain.
        trained: Those that are learned.

    Returns:
        `trainable`, `frozen`, `weight_bytes` and `gradient_bytes`.
    """
    every = list(model.parameters())
    count = sum(p.numel() for p in trained)
    return {
        "trainable": count,
        "frozen": sum(p.numel() for p in every) - count,
        "weight_bytes": sum(local(p).numel() * p.element_size() for p in every),
        "gradient_bytes": sum(local(p).numel() * p.element_size() for p in trained),
    }


def kv_bytes_per_token(config: object, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token leaves in the cache.

    Args:
        config: The text configuration of a transformers model.
        dtype: Precision of the cache.

    Returns:
        0 for models without attention heads, whose state does not grow.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize)  # type: ignore[attr-defined]
