"""Hidden states of any causal language model of transformers, as its head would get them, and what they score.

Shapes: b rows, P prompt tokens, T completion tokens, S tokens of a pass, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.head import scored_logprobs
from lightning_modules.microbatches import PaddedRows


def chunked_logprobs(
    model: nn.Module, rows: PaddedRows, *, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completions in whole rows, by the chunked head. See `can_chunk`.

    Args:
        model: As in `shared_logprobs`.
        rows: From `pad_rows`.
        temperature: As in `shared_logprobs`.
        entropy_gradient: Whether the entropy carries a gradient.

    Returns:
        Nats, float32, 0 on padding (b, T) each.
    """
    return _scored_rows(model, _hidden_of(model, rows), rows, temperature, entropy_gradient)


def try_chunked(model: nn.Module, rows: PaddedRows, *, temperature: float) -> tuple[Tensor, Tensor] | str:
    """Return what `chunked_logprobs` does, or why that would be wrong, which this pass of the model tells.

    So nothing runs through the model but its rows: `can_chunk` tries tokens that an adapter which routes rows has not
    heard of, and that whoever watches the model would count.

    Args:
        model: As in `chunked_logprobs`.
        rows: Likewise.
        temperature: Likewise.
    """
    if reason := can_chunk(model, tries=False):
        return reason
    with _head_outputs(model) as seen:
        hidden_bTH = _hidden_of(model, rows)
    return _changes(hidden_bTH, seen) or _scored_rows(model, hidden_bTH, rows, temperature)


def _hidden_of(model: nn.Module, rows: PaddedRows) -> Tensor:
    """Return the hidden states before each completion token, and that of the last one (b, T+1, H)."""
    kept = rows.completion_mask.shape[1] + 1
    hidden: Tensor = without_head(model, rows.input_ids, rows.attention_mask, logits_to_keep=kept).logits
    return hidden


def _scored_rows(
    model: nn.Module, hidden: Tensor, rows: PaddedRows, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    ids_bT = rows.input_ids[:, -rows.completion_mask.shape[1] :]
    return scored(model, hidden[:, :-1], ids_bT, rows.scored, temperature, entropy_gradient)


def can_chunk(model: nn.Module, *, tries: bool = True) -> str | None:
    """Return why `chunked_logprobs` would be wrong or impossible for a model; None if it would not.

    Runs a few tokens through the model, a collective under sharding. An adapter that routes rows must have heard of
    one row.

    Args:
        model: What is to be called.
        tries: Whether tokens are run; without, only what is known of the model's parts is looked at.
    """
    base = base_of(model)
    if base is None:
        return "there is no transformers model in it"
    if base.config.is_encoder_decoder:
        return "prompts go through an encoder"
    head: Any = base.get_output_embeddings()
    # By the forward function: adapters replace the layer, or its forward.
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"its head ({type(head).__name__}) is more than a plain linear layer"
    if not tries:
        return None
    with _head_outputs(model) as seen, evaluating(model):
        logits = without_head(model, *few_tokens(base)).logits
    return _changes(logits, seen)


@contextmanager
def _head_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the head returns."""
    base = base_of(model)
    assert base is not None
    seen: list[Tensor] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    try:
        yield seen
    finally:
        hook.remove()


def _changes(logits: Tensor, seen: list[Tensor]) -> str | None:
    if len(seen) != 1 or not torch.equal(logits.float(), seen[0].float()):
        return "it changes logits after the head, by a scale, a soft cap or the like"
    return None


# ---------------------------------------------------------------------- parts of these, and of shared prefixes


def base_of(model: nn.Module) -> PreTrainedModel | None:
    """Return the transformers model in what is called, adapters inside it or not; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def without_head(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    *,
    logits_to_keep: int = 0,
    cache: Any = None,
    use_cache: bool = False,
) -> Any:
    """Call a model whose head passes hidden states on, so that they come back as `logits`.

    The model is called from outside, as always, so that hooks on it fire: those that gather shards, or write a sparse
    adapter. What it returns is still what carries the gradient.

    Args:
        model: What is to be called.
        ids: (b, S).
        mask: 1 on real tokens, those in the cache too: (b, S) or longer.
        logits_to_keep: How many positions, the last ones, are returned; 0 for all.
        cache: What came before, if anything.
        use_cache: Whether a cache is used and returned.

    Returns:
        The output of the transformers model.
    """
    base = base_of(model)
    assert base is not None
    head: Any = base.get_output_embeddings()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    vars(head)["forward"] = _same
    try:
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
    finally:
        del vars(head)["forward"]


def _same(hidden: Tensor) -> Tensor:
    return hidden.clone()  # FSDP2 warns of outputs that are views


def scored(
    model: nn.Module,
    hidden_bTH: Tensor,
    ids_bT: Tensor,
    scored_N: Tensor,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Put hidden states of scored tokens through the chunked head, after a pass of the model.

    Args:
        model: What was called.
        hidden_bTH: What predicts each token.
        ids_bT: The tokens.
        scored_N: Positions of those that are scored, in the flat (b T).
        temperature: As in `scored_logprobs`.
        entropy_gradient: Likewise.

    Returns:
        Log-probabilities and entropies, nats, float32, 0 elsewhere (b, T) each.
    """
    base = base_of(model)
    assert base is not None
    head: Any = base.get_output_embeddings()
    logprobs_N, entropy_N = scored_logprobs(
        # Mixed precision of a sharded model may turn outputs into float32.
        hidden_bTH.flatten(0, 1).index_select(0, scored_N).to(head.weight.dtype),
        head.weight,
        head.bias,
        ids_bT.flatten()[scored_N],
        temperature=temperature,
        entropy_gradient=entropy_gradient,
    )
    zeros = logprobs_N.new_zeros(ids_bT.numel())
    logprobs, entropy = (zeros.index_put((scored_N,), one) for one in (logprobs_N, entropy_N))
    return logprobs.view(ids_bT.shape), entropy.view(ids_bT.shape)


def few_tokens(base: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return ids and mask to try a model with (1, 6) each."""
    vocabulary = base.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(1, 7, device=base.device)[None] % vocabulary
    return ids, torch.ones_like(ids)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for a while."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
