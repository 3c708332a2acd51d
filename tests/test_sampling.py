"""GenerateSampler: what it draws from is what it says, and it leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.sampling import GenerateSampler, Sampling

END = 0
TEXTS = ["a", "hello there, you", "what is 2 + 2?", "zz", "the end is near", "0123456789" * 3]


@pytest.fixture
def model(tiny_model):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    return get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture
def prompts(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer(TEXTS)["input_ids"]


def bound(model, tiny_model, **options) -> GenerateSampler:
    sampler = GenerateSampler(**options)
    sampler.bind(model, AutoTokenizer.from_pretrained(tiny_model))
    return sampler


@torch.no_grad()
def slow_distribution(model, ids: list[int], sampling: Sampling) -> torch.Tensor:
    """Probabilities of the next token (V), from one unpadded forward pass, by the definitions in Sampling."""
    model.eval()
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    p = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k:
        p = torch.where(p >= p.sort(descending=True).values[sampling.top_k - 1], p, 0)
        p = p / p.sum()
    if sampling.top_p < 1:
        order = p.argsort(descending=True)
        mass, kept = 0.0, torch.zeros_like(p)
        for token in order:  # the smallest set of most likely tokens that reaches the mass
            if mass >= sampling.top_p:
                break
            kept[token] = p[token]
            mass += p[token].item()
        p = kept / kept.sum()
    if sampling.min_p:
        p = torch.where(p >= sampling.min_p * p.max(), p, 0)
        p = p / p.sum()
    return p


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"temperature": 3.0, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_logprobs_equal_a_plain_forward_renormalised_by_hand(model, tiny_model, prompts, options):
    sampling = Sampling(max_new_tokens=8, **options)
    prompts = prompts * 12
    torch.manual_seed(5)
    got = bound(model, tiny_model).generate(prompts, sampling)
    assert {"stop", "length"} == set(got.finish)  # some rows are padded on the right
    for prompt, ids, logprobs in zip(prompts, got.token_ids, got.logprobs, strict=True):
        assert len(ids) == len(logprobs)
        for t, token in enumerate(ids):
            p = slow_distribution(model, prompt + ids[:t], sampling)
            assert logprobs[t] == pytest.approx(p[token].log().item(), abs=2e-4)


def test_draws_follow_the_distribution_without_hidden_settings(model, tiny_model, prompts):
    """Transformers fills open settings from the model's generation config, else with top_k=50."""
    for config in (model.generation_config, model.get_base_model().generation_config):
        config.top_k, config.repetition_penalty, config.min_p = 3, 5.0, 0.5
        config.suppress_tokens = list(range(1, 100))
    model.generation_config.do_sample = True
    sampling = Sampling(max_new_tokens=1, temperature=8.0)
    torch.manual_seed(0)
    n = 6000
    got = bound(model, tiny_model, max_rows=n).generate([prompts[1]] * n, sampling)
    expected = slow_distribution(model, prompts[1], sampling)
    counts = torch.bincount(torch.tensor([ids[0] for ids in got.token_ids]), minlength=len(expected))
    assert (counts > 0).sum() > 150  # not 3, nor 50
    common = expected * n > 5
    chi2 = ((counts - expected * n).square() / (expected * n))[common].sum()
    assert chi2 < 2 * common.sum()
    # ... and the model keeps its settings.
    assert model.generation_config.top_k == 3
    assert model.get_base_model().generation_config.repetition_penalty == 5.0


def slow_greedy(model, prompt: list[int], limit: int) -> list[int]:
    ids: list[int] = []
    model.eval()
    while len(ids) < limit and END not in ids:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_equals_an_argmax_loop_whatever_the_padding(model, tiny_model, prompts):
    got = bound(model, tiny_model).generate(prompts, Sampling(max_new_tokens=10, temperature=0.0))
    assert got.token_ids == [slow_greedy(model, prompt, 10) for prompt in prompts]
    assert len({tuple(ids) for ids in got.token_ids}) > 3  # the rows say different things
    alone = bound(model, tiny_model, max_rows=1)
    alone = alone.generate(prompts, Sampling(max_new_tokens=10, temperature=0.0))
    assert alone.token_ids == got.token_ids
    assert alone.finish == got.finish
    # Greedy log-probabilities are those of the unscaled policy.
    p = slow_distribution(model, prompts[0], Sampling())
    assert got.logprobs[0][0] == pytest.approx(p.max().log().item(), abs=1e-4)


def test_rows_end_at_the_first_end_token(model, tiny_model, prompts):
    limit = 8
    torch.manual_seed(2)
    got = bound(model, tiny_model).generate(prompts * 8, Sampling(max_new_tokens=limit))
    lengths = [len(ids) for ids in got.token_ids]
    assert len(set(lengths)) > 3
    for ids, reason, text in zip(got.token_ids, got.finish, got.texts, strict=True):
        assert END not in ids[:-1]
        assert reason == ("stop" if ids[-1] == END else "length")
        assert reason == "stop" or len(ids) == limit
        assert "</s>" not in text
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert got.texts == [tokenizer.decode([i for i in ids if i != END]) for ids in got.token_ids]
    assert {"stop", "length"} == set(got.finish)


def test_end_tokens_of_the_generation_config_end_rows_too(model, tiny_model, prompts):
    greedy = Sampling(max_new_tokens=10, temperature=0.0)
    before = bound(model, tiny_model).generate(prompts, greedy).token_ids
    row = next(i for i, ids in enumerate(before) if len(ids) > 4)
    turn = before[row][3]
    model.generation_config.eos_token_id = [END, turn]
    after = bound(model, tiny_model).generate(prompts, greedy)
    assert after.token_ids[row] == before[row][: before[row].index(turn) + 1]
    assert after.finish[row] == "stop"


@pytest.mark.parametrize("max_rows", [1, 4, 6, 100])
def test_chunks_keep_the_order(model, tiny_model, prompts, max_rows):
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    got = bound(model, tiny_model, max_rows=max_rows).generate(prompts, greedy)
    assert got.token_ids == [slow_greedy(model, prompt, 4) for prompt in prompts]
    assert len(got.texts) == len(got.finish) == len(got.logprobs) == len(prompts)


def test_leaves_every_module_in_its_mode(model, tiny_model, prompts):
    sampler = bound(model, tiny_model)
    model.train()
    layers = model.get_base_model().model.layers
    layers[0].eval()  # as a user who freezes a layer's dropout does
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    settings = model.generation_config
    seen = []
    hook = layers[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    sampler.generate(prompts, Sampling(max_new_tokens=2))
    assert seen
    assert not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == before
    hook.remove()

    def fail(*_):
        raise RuntimeError("out of memory")

    layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.generate(prompts, Sampling(max_new_tokens=2))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is settings


def test_the_seed_decides(model, tiny_model, prompts):
    def draw(seed):
        torch.manual_seed(seed)
        return bound(model, tiny_model).generate(prompts, Sampling(max_new_tokens=8))

    assert draw(3) == draw(3)
    assert draw(3).token_ids != draw(4).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0. 0 decodes greedily"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1. 1 keeps every token"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1: must be at least 0. 0 keeps"),
        ({"min_p": 1.0}, "min_p=1.0: must be at least 0 and below 1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty=0.0: must be above 0. 1 changes nothing",
        ),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\]: every entry must be a string that is not empty"),
        ({"stop": "end"}, r"stop='end': give a list of strings, such as \['end'\]"),
    ],
)
def test_refuses_settings_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_settings_stay_hashable_with_a_list_of_stop_strings():
    stop = ["a", "b"]
    sampling = Sampling(stop=stop)
    stop.append("c")
    assert sampling == Sampling(stop=("a", "b"))
    assert hash(sampling) == hash(Sampling(stop=("a", "b")))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_penalty_counts_prompt_and_completion_but_no_padding(model, tiny_model, prompts, temperature):
    sampling = Sampling(max_new_tokens=6, temperature=temperature, repetition_penalty=1.8)
    got = bound(model, tiny_model).generate(prompts * 3, sampling)
    assert "stop" in got.finish  # the end token is the padding too
    for prompt, ids, logprobs in zip(prompts * 3, got.token_ids, got.logprobs, strict=True):
        for t, token in enumerate(ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids[:t]])).logits[0, -1]
            for seen in {*prompt, *ids[:t]}:
                logits[seen] = logits[seen] / 1.8 if logits[seen] > 0 else logits[seen] * 1.8
            logits = logits / (temperature or 1.0)
            assert temperature or token == int(logits.argmax())
            assert logprobs[t] == pytest.approx(logits.log_softmax(-1)[token].item(), abs=2e-4)


def test_refuses_no_rows():
    with pytest.raises(ValueError, match="max_rows=0: must be at least 1"):
        GenerateSampler(max_rows=0)


def test_refuses_prompts_that_are_empty_or_do_not_fit(model, tiny_model, prompts):
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty. Give at least one token"):
        bound(model, tiny_model).generate([[1], []], Sampling(max_new_tokens=2))
    with pytest.raises(
        ValueError, match=r"prompts\[0\] has 30 tokens, .*: 513 do not fit the model's context of 512"
    ):
        bound(model, tiny_model).generate(prompts[5:], Sampling(max_new_tokens=483))


@pytest.mark.parametrize("seeds", [None, range(24)])
def test_models_without_an_end_token_draw_up_to_the_limit(model, tiny_model, prompts, seeds):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    for config in (model.generation_config, model.get_base_model().generation_config):
        config.eos_token_id = None
    sampler = GenerateSampler()
    sampler.bind(model, tokenizer)
    got = sampler.generate(prompts * 4, Sampling(max_new_tokens=20), seeds=seeds)
    assert set(got.finish) == {"length"}
    assert {len(ids) for ids in got.token_ids} == {20}
    assert any(END in ids for ids in got.token_ids)


SAMPLING = Sampling(max_new_tokens=6, temperature=1.3)


def test_a_seeded_row_does_not_depend_on_the_others(model, tiny_model, prompts):
    seeds = [100 + i for i in range(len(prompts))]
    together = bound(model, tiny_model).generate(prompts, SAMPLING, seeds=seeds)
    torch.manual_seed(99)  # makes no difference
    reverse = bound(model, tiny_model, max_rows=4).generate(prompts[::-1], SAMPLING, seeds=seeds[::-1])
    assert together.token_ids == reverse.token_ids[::-1]
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = bound(model, tiny_model).generate([prompt], SAMPLING, seeds=[seed])
        assert alone.token_ids == [together.token_ids[i]]
    other = bound(model, tiny_model).generate(prompts, SAMPLING, seeds=[seed + 1 for seed in seeds])
    assert other.token_ids != together.token_ids


def test_seeded_logprobs_are_those_of_the_drawn_tokens(model, tiny_model, prompts):
    sampling = Sampling(max_new_tokens=6, temperature=2.0, top_k=12, min_p=0.05)
    got = bound(model, tiny_model).generate(prompts * 4, sampling, seeds=range(4 * len(prompts)))
    for prompt, ids, logprobs in zip(prompts * 4, got.token_ids, got.logprobs, strict=True):
        for t, token in enumerate(ids):
            p = slow_distribution(model, prompt + ids[:t], sampling)
            assert p[token].log().item() == pytest.approx(logprobs[t], abs=1e-4)


def test_seeded_draws_follow_the_distribution(model, tiny_model, prompts):
    """Chi-square over first tokens, one row for each seed."""
    sampling = Sampling(max_new_tokens=1, temperature=2.0, top_k=8)
    number = 4000
    got = bound(model, tiny_model, max_rows=1000).generate(
        prompts[:1] * number, sampling, seeds=range(number)
    )
    p = slow_distribution(model, prompts[0], sampling)
    counts = torch.bincount(torch.tensor([ids[0] for ids in got.token_ids]), minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    expected = (number * p.double())[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001
