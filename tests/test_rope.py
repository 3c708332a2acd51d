"""Rotary embeddings that depend on the length of the row: every row equals a whole forward pass of it alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    modeling_rope_utils,
)

from lightning_modules.grpo.groups import Row
from lightning_modules.grpo.passes import best_passes
from lightning_modules.prefix import can_share
from lightning_modules.rope import switching_length
from lightning_modules.sampling import GenerateSampler, NativeSampler, Sampling

TINY = {
    "vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 59,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 8.0, 16.0], "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "dynamic": LlamaConfig(**TINY, max_position_embeddings=16, rope_parameters=DYNAMIC),
    "longrope": LlamaConfig(**TINY, max_position_embeddings=64, rope_parameters=LONG),
    "Phi3": Phi3Config(
        **TINY, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=LONG
    ),
    "Phimoe": PhimoeConfig(
        **TINY,
        num_local_experts=4,
        max_position_embeddings=64,
        rope_parameters=LONG | {"short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "by layer": Gemma3TextConfig(
        **TINY,
        head_dim=8,
        max_position_embeddings=16,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}
# Rows that stay short, that grow beyond 16 tokens, and that begin beyond them.
PROMPTS = [[5, 6, 7, 8, 9, 10]] * 2 + [[3] * 20 + [4], [9, 8, 7]]
COMPLETIONS = [[1, 2, 3], [4, 5, 6, 7, 8, 9] * 3, [3, 4, 5], [7] * 12]


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def alone(model, ids):
    """Log-probabilities of a whole row, by a model that has seen no other."""
    twin = AutoModelForCausalLM.from_config(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def test_these_are_the_types_that_read_a_length():
    reads = {
        kind
        for kind, function in modeling_rope_utils.ROPE_INIT_FUNCTIONS.items()
        if "seq_len" in inspect.getsource(function).split('"""')[2]
    }
    assert reads == {"dynamic", "longrope"}
    assert [switching_length(config) for config in CONFIGS.values()] == [16] * 5
    still = {"linear": {"factor": 2.0}, "yarn": {"factor": 2.0}, "default": {}}
    for kind, settings in still.items():
        parameters = {"rope_type": kind, "rope_theta": 100.0, **settings}
        assert switching_length(LlamaConfig(**TINY, rope_parameters=parameters)) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_whole_rows_whatever_stands_beside_or_came_before(name):
    model = build(CONFIGS[name])
    assert can_share(model) is not None
    passes, _ = best_passes(model)
    rows = [
        Row(prompt, "task", prompt, completion, [0.0] * len(completion), 1.0)
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    inputs = passes.pad(rows, pad_token_id=0, device=torch.device("cpu"))
    for _ in range(2):  # the second time after longer rows
        with torch.no_grad():
            found, _ = passes.logprobs(model, inputs, temperature=1.0, announce=lambda _: None)
        for logprobs, prompt, ids in zip(found, PROMPTS, COMPLETIONS, strict=True):
            expected = alone(model, prompt + ids)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
            torch.testing.assert_close(logprobs[: len(ids)], expected[:, 0], atol=1e-4, rtol=0)


class Tokenizer:
    """Of ids alone."""

    eos_token_id, pad_token_id = 59, None

    def batch_decode(self, rows, **_):
        return [str(row) for row in rows]


@pytest.mark.parametrize("sampler", [NativeSampler, GenerateSampler])
@pytest.mark.parametrize("name", ["longrope", "Phi3", "Phimoe"])
def test_tokens_are_drawn_from_whole_passes_over_the_row_so_far(name, sampler):
    model = build(CONFIGS[name])
    drawer = sampler()
    drawer.bind(model, Tokenizer())
    for prompts in (PROMPTS, [[3] * 20, [4] * 24], [[5, 6]]):  # crossing, long from the start, and short
        number = 4 if prompts == [[5, 6]] else 14
        got = drawer.generate(prompts, Sampling(max_new_tokens=number), seeds=range(len(prompts)))
        for prompt, ids, logprobs in zip(prompts, got.token_ids, got.logprobs, strict=True):
            for i, token in enumerate(ids):
                assert abs(float(alone(model, prompt + ids[:i])[-1, token]) - logprobs[i]) < 1e-4
