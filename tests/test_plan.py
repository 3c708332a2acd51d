"""`quiver plan`: what it says of memory and traffic, against real models and closed forms."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import LORA

from lightning_modules.cli import main
from lightning_modules.grpo.plan import kv_bytes_per_token
from lightning_modules.logprobs import token_logprobs
from lightning_modules.planning.communication import data_parallel, one_way, sharded
from lightning_modules.planning.gpus import find_gpu
from lightning_modules.planning.tracker import Kind, PlainTracker, fake_tensors, logits_and_caches

V, H, L = 512, 64, 3
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 128,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FSDP2 = "lightning_modules.fsdp2.FSDP2Strategy"
LENGTHS = ("--prompt_tokens", "24", "--answer_tokens", "8")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty folder with a model that has no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))


@pytest.fixture
def plan(tmp_path, capsys):
    """`quiver plan` of a small run, as numbers; nothing may be written."""

    def run(*options, module="SFTModule", trainer=None, text=False, **init_args):
        own = (
            {"rewards": ["small_runs.spread"], "sampling": {"max_new_tokens": 8}}
            if module == "GRPOModule"
            else {}
        )
        config = {
            "model": {"class_path": module, "init_args": {"model": "model", **own, **init_args}},
            "data": {
                "class_path": "JsonlDataModule",
                "init_args": {"train_file": "none.jsonl", "batch_size": 4},
            },
            "trainer": {"accelerator": "cpu", "default_root_dir": "runs", **(trainer or {})},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        before = sorted(tmp_path.rglob("*"))
        code = main(["plan", "run.yaml", *LENGTHS, *options, *([] if text else ["--json"])])
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        if code or text:
            return code, captured.out, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture(scope="module")
def real_model():
    """The model with weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "architectures"}))


def num_bytes(model, *, trained=False):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


# ---------------------------------------------------------------- memory


def test_full_fine_tuning_is_that_of_a_real_model(plan, real_model):
    facts = plan()
    size = num_bytes(real_model)
    assert (facts["trained"], facts["frozen"]) == (real_model.num_parameters(), 0)
    update = facts["phases"]["backward"]
    buffers = sum(b.numel() * b.element_size() for b in real_model.buffers())
    assert update["weights"] == size + buffers
    assert update["optimiser moments"] >= 2 * size
    assert update["peak"] == sum(update[kind.value] for kind in Kind if kind.value in update)


def test_lora_is_that_of_a_real_adapter(plan, real_model):
    from peft import LoraConfig, get_peft_model

    facts = plan(adapter=LORA, dtype="bfloat16", max_tokens_per_microbatch=64)
    frozen = real_model.num_parameters()
    adapted = get_peft_model(real_model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    learned = num_bytes(adapted, trained=True)
    adapted.unload()
    assert (facts["trained"], facts["frozen"]) == (learned // 4, frozen)
    update = facts["phases"]["backward"]
    assert update["gradients"] == learned  # of the first of two micro-batches
    assert 0 <= update["optimiser moments"] - 2 * learned < 4096  # moments, and a step counter each


@pytest.mark.parametrize("adapter", [None, LORA])
def test_sharded_state_is_divided_by_the_ranks(plan, adapter):
    # The micro-batch is one row of two, so gradients are there at every moment.
    if adapter:  # a rank holds at least a row of each tensor
        adapter = {**LORA, "init_args": {**LORA["init_args"], "r": 8}}
    options = {"adapter": adapter, "max_tokens_per_microbatch": 32}
    one = plan("--strategy", "fsdp2", "--devices", "1", **options)["phases"]["backward"]
    eight = plan("--strategy", "fsdp2", "--devices", "8", **options)["phases"]["backward"]
    buffers = 4 * H // 4 // 2  # rotary frequencies are not sharded
    assert (eight["weights"] - buffers) * 8 == pytest.approx(one["weights"] - buffers, rel=0.02)
    assert eight["gradients"] * 8 == pytest.approx(one["gradients"], rel=0.02)
    if not adapter:
        copies = {"class_path": FSDP2, "init_args": {"replicas": 2}}
        hybrid = plan("--devices", "16", trainer={"strategy": copies}, **options)["phases"]["backward"]
        state = ("weights", "gradients", "optimiser moments")
        assert [hybrid[kind] for kind in state] == [eight[kind] for kind in state]
        assert hybrid["gradient exchange"] > 0  # between the copies
    assert eight["optimiser moments"] < one["optimiser moments"] / 4
    assert eight["gathered weights"] > 0


def test_ddp_has_buckets_as_large_as_its_gradients(plan, real_model):
    alone, together = plan("--devices", "1"), plan("--devices", "4", "--strategy", "ddp")
    assert "gradient exchange" not in alone["phases"]["backward"]
    assert together["phases"]["backward"]["gradient exchange"] == num_bytes(real_model)
    assert together["peak"] - alone["peak"] == num_bytes(real_model)


def test_cache_has_the_size_of_its_formula(plan):
    from transformers import LlamaConfig

    drawn = {"module": "GRPOModule", "num_generations": 4, "sampling": {"max_new_tokens": 120}}
    size = plan("--prompt_tokens", "8", **drawn)["phases"]["decode"]["KV cache"]
    token = 16 * kv_bytes_per_token(LlamaConfig(**SHAPE), torch.float32)
    # While a layer's cache grows by a token, it is there twice.
    assert 127 * token <= size <= (128 + 128 // L) * token
    sampler = {"class_path": "GenerateSampler", "init_args": {"max_rows": 4}}
    fewer = plan("--prompt_tokens", "8", sampler=sampler, **drawn)["phases"]["decode"]["KV cache"]
    assert fewer * 4 == size


def test_logits_have_the_size_of_their_formula():
    b, T = 4, 16
    with fake_tensors():
        head = torch.nn.Linear(H, V, bias=False, dtype=torch.bfloat16)
        hidden = torch.zeros(b, T, H, dtype=torch.bfloat16)
        tracker = PlainTracker(head, torch.optim.AdamW(head.parameters()))
        tracker.classify = logits_and_caches(V)
        with tracker:
            logprobs = token_logprobs(head(hidden), torch.zeros(b, T, dtype=torch.long))
            kept = tracker.by_kind("current")[Kind.LOGITS]
        assert logprobs.shape == (b, T)
    # In bfloat16 from the model; autograd keeps the float32 copy.
    assert b * T * V * 4 <= kept <= b * T * V * (2 + 4)


def test_generation_gathers_the_whole_model_once(plan, tmp_path):
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 6}))
    shards = {"strategy": {"class_path": FSDP2}}
    whole = plan("--devices", "8", module="GRPOModule", trainer=shards)
    shards["strategy"]["init_args"] = {"whole_for_generation": False}
    layered = plan("--devices", "8", module="GRPOModule", trainer=shards)
    size = 4 * whole["trained"]
    assert whole["phases"]["decode"]["gathered weights"] == size
    assert layered["phases"]["decode"]["gathered weights"] < 0.7 * size  # the root and a few layers
    assert layered["sent_per_step"]["generation"] == 8 * whole["sent_per_step"]["generation"]


def test_checkpointing_offload_and_precision_lower_the_peak(plan):
    plain = plan("--prompt_tokens", "248")
    checkpointed = plan("--prompt_tokens", "248", gradient_checkpointing=True)
    assert (
        checkpointed["phases"]["backward"]["activations"] < plain["phases"]["backward"]["activations"] * 0.7
    )
    half = plan("--prompt_tokens", "248", dtype="bfloat16")["phases"]["backward"]
    assert half["weights"] * 2 == pytest.approx(plain["phases"]["backward"]["weights"], rel=0.01)
    shards = {"strategy": {"class_path": FSDP2}}
    resident = plan("--devices", "8", trainer=shards)["phases"]["backward"]
    shards["strategy"]["init_args"] = {"cpu_offload": True}
    offloaded = plan("--devices", "8", trainer=shards)["phases"]["backward"]
    assert offloaded["peak"] < resident["peak"]
    assert offloaded["host"] > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_deep_models_are_extended_from_short_ones(plan, tmp_path, monkeypatch, strategy):
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 9}))
    options = ("--devices", "4", "--strategy", strategy)
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 8, "target_modules": ["q_proj"]}}
    quick = plan(*options, module="GRPOModule", adapter=adapter)
    monkeypatch.setattr("lightning_modules.planning.plan.is_uniform", lambda *_: False)
    exact = plan(*options, module="GRPOModule", adapter=adapter)
    for name, phase in exact["phases"].items():
        assert quick["phases"][name]["peak"] == pytest.approx(phase["peak"], rel=0.01), name
        assert quick["phases"][name] == pytest.approx(phase, abs=0.05 * phase["peak"]), name


def test_sparse_adapters_have_as_many_entries_as_they_would_train(plan, real_model):
    from torch import nn

    linear = [m.weight for m in real_model.modules() if isinstance(m, nn.Linear)][:-1]
    facts = plan(module="SparseAdapterModule", density=0.1, max_tokens_per_microbatch=32)
    entries = sum(weight.numel() // 10 for weight in linear)
    assert (facts["trained"], facts["frozen"]) == (entries, real_model.num_parameters() - entries)
    assert set(facts["phases"]) == {"choosing backward", "choosing step", "backward", "step"}
    assert facts["phases"]["backward"]["gradients"] == 4 * entries


# ---------------------------------------------------------------- traffic and counts


def test_traffic_is_that_of_ring_algorithms(plan, real_model):
    assert one_way(800, 8) == 700
    assert data_parallel(800, ranks=8, updates=2).total == 2800
    hybrid = sharded(800, 80, 880, shards=8, replicas=2, passes=3, gathers_again=False, generation_gathers=0)
    assert hybrid.gathers == 3 * 770
    assert hybrid.scatters == 3 * 770
    assert hybrid.reduces == 3 * 110
    size = num_bytes(real_model)
    assert plan("--devices", "4", "--strategy", "ddp")["sent_per_step"]["total"] == 2 * size * 3 // 4
    sent = plan("--devices", "4", "--strategy", "fsdp2", max_tokens_per_microbatch=64)["sent_per_step"]
    root = V * H * 4 + H * 4
    assert sent["scatters"] == 2 * one_way(size, 4)
    assert sent["gathers"] == 2 * (one_way(size, 4) + one_way(size - root, 4))


def test_step_is_counted(plan):
    options = {"module": "GRPOModule", "num_generations": 4, "text": True}
    code, text, _ = plan("--devices", "8", "--gpu", "L4-24GB", **options)
    assert code == 0
    assert f"up to {4 * 4 * 32 * 8:,} a step, {4 * 4 * 8 * 8:,} of completions" in text
    assert "32 prompts (4 x 8 ranks) x 4 completions" in text
    assert "fits on L4-24GB" in text


def test_verdict_says_what_to_change(plan):
    text = plan(text=True)[1]
    assert "fits on H100-80GB" in text
    assert "try" not in text
    gpu = find_gpu("1GB")
    assert [gpu.verdict(size) for size in (gpu.memory // 2, gpu.memory - 1, gpu.memory + 1)] == [
        "fits",
        "tight",
        "does not fit",
    ]
    large = SHAPE | {"hidden_size": 4096, "intermediate_size": 16384, "vocab_size": 128000}
    Path("model/config.json").write_text(json.dumps(large))
    facts = plan("--gpu", "t4-16gb")
    assert facts["verdict"] == "does not fit"
    assert any("fsdp2" in one for one in facts["advice"])
    assert any("LoraConfig" in one for one in facts["advice"])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H10-80GB"], "gpu='H10-80GB' is not known. Did you mean"),
        (["--devices", "0"], "devices=0"),
        (["--prompt_tokens", "0"], "prompt_tokens=0"),
        (["--prompt_tokens", "600"], "--prompt_tokens lower"),
        (["--model.model", "nowhere/at/all"], "there is no such folder"),
        (["--model.model", "empty"], "the folder has no config.json"),
        (["--trainer.strategy", "fsdp"], "strategy='fsdp' cannot be planned"),
        (
            ["--model", "AdapterLibraryModule", "--model.router", "UniformRouter"],
            "RoutedAdapter cannot be planned",
        ),
    ],
)
def test_mistakes_are_explained(plan, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    code, _, err = plan(*options)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_missing_configuration_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "missing.yaml", "--devices", "8"])
    assert stop.value.code == 2
    assert "missing.yaml" in capsys.readouterr().err
