"""What goes to vLLM for a row and what comes back of it, the same over HTTP and in this process.

vLLM divides and cuts in the order penalty, temperature, min_p, top_k, top_p; transformers, and so the other samplers,
cut by min_p last. The two differ where min_p and top_p are both set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_modules.sampling.base import Completions, FinishReason, Sampling


@dataclass(frozen=True)
class Drawn:
    """One completion as vLLM returned it.

    Attributes:
        model: Name of the policy that drew it.
        token_ids: Generated ids, the end token included.
        logprobs: Their log-probabilities, nats; None for a token without one.
        finish: vLLM's finish reason.
    """

    model: str
    token_ids: list[int]
    logprobs: list[float | None]
    finish: str | None


def sampling_parameters(
    sampling: Sampling, seed: int, ends: Sequence[int], *, reads_special: bool = False
) -> dict[str, Any]:
    """Return the sampling parameters of a row, under the names that `SamplingParams` and the completions API share.

    All that shapes the distribution is named: what is left open, a server takes from the model's generation config.

    Args:
        sampling: How to draw.
        seed: Of the row, below 2^63.
        ends: Ids that end a completion.
        reads_special: Whether a stop string holds a special token.
    """
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends),
        # vLLM looks for stop strings in the text that it returns, and ours is made here.
        "skip_special_tokens": not reads_special,
        "seed": seed,
        "logprobs": 0,  # of the drawn token, and no others
    }


def row_seeds_or_drawn(seeds: Sequence[int] | None, rows: int) -> list[int]:
    """Return a seed for each row; those that nobody gave come from torch's generator."""
    return torch.randint(2**63 - 1, (rows,)).tolist() if seeds is None else list(seeds)


def check_room(prompts: Sequence[list[int]], sampling: Sampling, context: int | None) -> None:
    """Check that each prompt is there and fits the engine's context with its completion.

    Of a completion that does not fit, vLLM would silently draw fewer tokens.

    Args:
        prompts: Token ids (B).
        sampling: How to draw.
        context: The most tokens of a row in the engine; None where it does not say.

    Raises:
        ValueError: Naming the first prompt that is empty or too long.
    """
    for row, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompts[{row}] is empty. Give at least one token.")
        needed = len(ids) + sampling.max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"prompts[{row}] has {len(ids)} tokens, and max_new_tokens={sampling.max_new_tokens}: {needed} do not "
                f"fit the context of vLLM, {context} tokens. Lower max_new_tokens, leave out long prompts, or start "
                "vLLM with a larger --max-model-len."
            )


def completions_of(drawn: Sequence[Drawn], policy: str, tokenizer: Any) -> Completions:
    """Turn what vLLM returned into completions.

    Args:
        drawn: One per row, in order (B).
        policy: Name of the policy that had to draw them.
        tokenizer: Turns ids into text.

    Raises:
        ValueError: If another policy drew a row, or a row has no token, no end, or a token without a log-probability.
    """
    finish: list[FinishReason] = []
    logprobs: list[list[float]] = []
    for row, one in enumerate(drawn):
        if one.model != policy:
            raise ValueError(
                f"Row {row} was drawn by {one.model!r}, but the policy is {policy!r}: the rollout would be of a "
                "stale or another model. Let no one else load or unload adapters of this name, and go on from the last "
                "checkpoint."
            )
        if not one.token_ids:
            raise ValueError(
                f"vLLM returned no token for row {row} (finish reason {one.finish!r}). Look at its log; if it is short "
                "of memory, lower its --max-num-seqs. Go on from the last checkpoint."
            )
        if one.finish != "stop" and one.finish != "length":
            raise ValueError(
                f"vLLM ended row {row} with {one.finish!r}, neither at an end token nor at the limit of length. Look "
                "at its log, and go on from the last checkpoint."
            )
        known = [value for value in one.logprobs if value is not None]
        if len(known) != len(one.token_ids):
            raise ValueError(
                f"vLLM returned {len(one.token_ids)} tokens for row {row}, but {len(known)} log-probabilities. Update "
                "vLLM."
            )
        finish.append("stop" if one.finish == "stop" else "length")
        logprobs.append(known)
    token_ids = [one.token_ids for one in drawn]
    return Completions(
        token_ids=token_ids,
        texts=tokenizer.batch_decode(token_ids, skip_special_tokens=True),
        finish=finish,
        logprobs=logprobs,
    )
