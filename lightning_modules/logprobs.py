"""Log-probabilities of completions under a policy, with the LM head on scored positions only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.microbatches import PaddedRows


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Log-probability of each token: its logit minus the log-sum-exp, in float32.

    For the backward pass autograd keeps a float32 copy of the logits.

    Args:
        logits_BTV: Logits, already divided by the temperature.
        ids_BT: Token ids.

    Returns:
        Nats, float32 (B, T).

    >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """
    rows = []
    for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):  # a row at a time bounds temporary copies
        exact_TV = logits_TV.float()
        rows.append(exact_TV.gather(-1, ids_T[:, None])[:, 0] - exact_TV.logsumexp(-1))
    return torch.stack(rows)


def token_entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy of the distribution at each position.

    Args:
        logits_BTV: Logits, already divided by the temperature.

    Returns:
        Nats, float32 (B, T).

    >>> token_entropy(torch.zeros(1, 1, 4)).exp()
    tensor([[4.]])
    """
    rows = []
    for logits_TV in logits_BTV:
        logprobs_TV = logits_TV.float().log_softmax(-1)
        rows.append(-(logprobs_TV.exp() * logprobs_TV).sum(-1))
    return torch.stack(rows)


def completion_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion_tokens: int,
    temperature: float,
) -> Tensor:
    """Logits that predict the last T positions.

    Args:
        model: A `transformers` causal language model, with or without adapter.
        input_ids: (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: 1 on real tokens (B, P+T).
        num_completion_tokens: T.
        temperature: Divides the logits, so that the policy is the one that was sampled from.
            0 (greedy) leaves them as they are.

    Returns:
        (B, T, V).
    """
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        # The position before the first completion token predicts it; the last position predicts nothing.
        logits_to_keep=num_completion_tokens + 1,
    ).logits[:, :-1]
    return logits if temperature in (0.0, 1.0) else logits / temperature


def whole_logprobs(
    model: nn.Module, rows: PaddedRows, *, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completions, with the logits of all of them.

    Args:
        model: A `transformers` causal language model, with or without adapter.
        rows: B of them, with T completion tokens.
        temperature: As in `completion_logits`.
        entropy_gradient: Whether the entropy carries a gradient.

    Returns:
        Nats, float32 (B, T) each; what stands on padding does not count.
    """
    T = rows.completion_mask.shape[1]
    logits_BTV = completion_logits(model, rows.input_ids, rows.attention_mask, T, temperature)
    return (
        token_logprobs(logits_BTV, rows.input_ids[:, -T:]),
        token_entropy(logits_BTV if entropy_gradient else logits_BTV.detach()),
    )
