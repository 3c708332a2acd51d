"""The rows of a full micro-batch: as long as rows may be, and as many as fit."""

from __future__ import annotations

from lightning_modules.grpo.groups import Row
from lightning_modules.grpo.module import GRPOModule
from lightning_modules.grpo.passes import WholePasses
from lightning_modules.sft import SFTModule


def filled_rows(
    module: GRPOModule | SFTModule, prompts: int, group_size: int, prompt_tokens: int, completion_tokens: int
) -> list[Row]:
    """Return the rows of a full micro-batch, divided as the module divides them.

    Args:
        module: Says how rows go through the model, and how many tokens of them together.
        prompts: Prompts of a rank.
        group_size: Completions of a prompt.
        prompt_tokens: Length of a prompt.
        completion_tokens: Length of a completion.
    """
    max_tokens = int(module.max_tokens_per_microbatch)
    passes = (isinstance(module, GRPOModule) and module.passes) or WholePasses()
    rows = [
        Row("", "", prompt_ids, completion_ids, [0.0] * completion_tokens, 1.0)
        for prompt_ids in ([number] * prompt_tokens for number in range(min(prompts, max_tokens)))
        for completion_ids in [[0] * completion_tokens] * group_size
    ][: max(1, max_tokens // completion_tokens)]
    return [rows[i] for i in passes.plan(rows, max_tokens)[0]]
