"""Special tokens end completions: as stop strings, inside of them, and by their ids."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.sampling import GenerateSampler, NativeSampler, Sampling
from lightning_modules.sampling.stops import StopStrings, special_tokens
from lightning_modules.sampling.vllm_requests import sampling_parameters


@pytest.fixture(scope="module")
def chatty(tiny_model):
    """A model that often says a special token, which is not its end token, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(258, mean_resizing=False)
    with torch.no_grad():
        hidden = model.model(torch.arange(1, 200)[None]).last_hidden_state.mean((0, 1))
        model.lm_head.weight[257] = 3 * hidden / hidden.square().sum()
        model.lm_head.weight[0] = -4 * hidden / hidden.square().sum()
    return model.eval(), tokenizer


@pytest.mark.parametrize("sampler_class", [NativeSampler, GenerateSampler])
def test_a_special_token_ends_its_row(chatty, sampler_class):
    model, tokenizer = chatty
    sampler = sampler_class()
    sampler.bind(model, tokenizer)
    prompts = tokenizer(["hi", "what is 2 + 2?", "zz"])["input_ids"] * 4
    free = sampler.generate(prompts, Sampling(max_new_tokens=40), seeds=range(12))
    assert sum(257 in ids[:-1] for ids in free.token_ids) > 2
    after = next(
        tokenizer.decode(ids[ids.index(257) : ids.index(257) + 2])
        for ids in free.token_ids
        if 257 in ids[:-1]
    )
    for settings, ends in (
        ({"stop": ["<|im_end|>"]}, lambda ids: ids.index(257) + 1 if 257 in ids else None),
        ({"stop_token_ids": [257]}, lambda ids: ids.index(257) + 1 if 257 in ids else None),
        (  # a string that holds one
            {"stop": [after]},
            lambda ids: next((n for n in range(len(ids) + 1) if after in tokenizer.decode(ids[:n])), None),
        ),
    ):
        got = sampler.generate(prompts, Sampling(max_new_tokens=40, **settings), seeds=range(12))
        assert got.token_ids != free.token_ids
        for ids, reason, before, reason_before in zip(
            got.token_ids, got.finish, free.token_ids, free.finish, strict=True
        ):
            length = ends(before)
            assert ids == before[:length]
            assert reason == (reason_before if length is None else "stop")


def test_plain_strings_are_looked_for_in_text_without_special_tokens(chatty):
    _, tokenizer = chatty
    assert special_tokens(tokenizer) == {"</s>": 0, "<|im_end|>": 257}
    a, b = tokenizer("ab")["input_ids"]
    assert StopStrings(tokenizer, ["ab"]).completed([[a, 257, b], [a, b], [257]]) == [True, True, False]
    assert StopStrings(tokenizer, ["im_end"]).completed([[257]]) == [False]
    assert StopStrings(tokenizer, ["<|im_end|>b"]).completed([[a, 257, b], [257, a]]) == [True, False]


def test_vllm_keeps_special_tokens_where_a_stop_string_holds_one(chatty):
    _, tokenizer = chatty
    for text, reads in (("<|im_end|>", True), ("stop", False)):
        sampling = Sampling(stop=[text])
        special = StopStrings(tokenizer, sampling.stop).reads_special
        sent = sampling_parameters(sampling, 1, [257], reads_special=special)
        assert (special, sent["skip_special_tokens"]) == (reads, not reads)
        assert (sent["stop"], sent["stop_token_ids"]) == ([text], [257])


def test_ids_that_are_none_are_refused(chatty):
    for wrong in ([-1], [True], ["5"], [1.0]):
        with pytest.raises(
            ValueError, match=r"stop_token_ids\[0\]=.*must be .*at least 0. Write texts into stop"
        ):
            Sampling(stop_token_ids=wrong)
    assert hash(Sampling(stop_token_ids=[3])) == hash(Sampling(stop_token_ids=(3,)))
    sampler = NativeSampler()
    sampler.bind(*chatty)
    with pytest.raises(ValueError, match=r"stop_token_ids=\[258\]: 258 is no token of the model.*0 to 257"):
        sampler.generate([[5]], Sampling(stop_token_ids=[258]))
