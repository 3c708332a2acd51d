"""On a GPU: the losses and weights of the CPU, the tokens of `generate`, and the memory that was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_tiny_model
from parallel_runs import assert_equal_runs, lora, strategy_options, write_config
from peft import LoraConfig, get_peft_model
from small_runs import QUIET, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_modules.cli import main
from lightning_modules.grpo.passes import SharedPasses, best_passes
from lightning_modules.prefix import can_share, share_prompts, shared_logprobs
from lightning_modules.sampling import GenerateSampler, NativeSampler, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
ONE_GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]
# Other kernels: sums in another order, in float32, over five steps of SGD with momentum.
TOLERANCE = 1e-3


# LoRA factors start from random numbers, which a GPU draws differently.
@pytest.mark.parametrize("case", ["sft_full", "grpo_full", "sparse", "sparse_dense"])
def test_one_gpu_equals_the_cpu(case, tiny_model, tmp_path):
    ours, theirs = tmp_path / "gpu", tmp_path / "cpu"
    assert main(["fit", "-c", str(write_config(case, tiny_model, theirs))]) == 0
    assert main(["fit", "-c", str(write_config(case, tiny_model, ours)), *ONE_GPU]) == 0
    worst = assert_equal_runs(ours, theirs, case, TOLERANCE)
    print(f"{case}: weights differ by at most {worst:.1e}")


@pytest.mark.parametrize(
    ("case", "offload"),
    [("sft_full", False), ("sft_full", True), ("grpo_full", False), ("grpo_full", True), ("sparse", False)],
)
def test_a_sharded_model_on_a_gpu_equals_the_cpu(case, offload, tiny_model, tmp_path):
    ours, theirs = tmp_path / "gpu", tmp_path / "cpu"
    assert main(["fit", "-c", str(write_config(case, tiny_model, theirs))]) == 0
    strategy = strategy_options("fsdp2", 1, cpu_offload=offload)
    arguments = ["fit", "-c", str(write_config(case, tiny_model, ours)), ONE_GPU[0], *strategy]
    assert main(arguments) == 0
    assert_equal_runs(ours, theirs, case, TOLERANCE)


def test_offloaded_weights_and_a_sparse_adapter_are_refused(tiny_model, tmp_path, capsys):
    strategy = strategy_options("fsdp2", 1, cpu_offload=True)
    assert main(["fit", "-c", str(write_config("sparse", tiny_model, tmp_path)), ONE_GPU[0], *strategy]) == 1
    assert "Set cpu_offload: false" in capsys.readouterr().err


def test_greedy_tokens_are_those_of_generate(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).cuda().eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [list(range(5, 5 + length)) for length in (3, 11, 40) for _ in range(4)]
    found = []
    for sampler in (NativeSampler(), GenerateSampler()):
        sampler.bind(model, tokenizer)
        found.append(sampler.generate(prompts, Sampling(max_new_tokens=24, temperature=0)))
    assert found[0].token_ids == found[1].token_ids
    assert found[0].finish == found[1].finish


def lora_gradients(folder: str, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities of completions that share prompts, and gradients of LoRA factors drawn on the CPU."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).to(device)
    assert can_share(model) is None
    rows = share_prompts(
        [[5, 6, 7]] * 3 + [[8] * 9],
        [[1], [2, 3], [4] * 6, [9, 9]],
        pad_token_id=0,
        device=torch.device(device),
    )
    logprobs, _ = shared_logprobs(model, rows, temperature=1.0)
    logprobs.sum().backward()
    return logprobs.detach().cpu(), [p.grad.cpu() for p in model.parameters() if p.requires_grad]


def test_shared_prompts_have_the_gradients_of_the_cpu(tiny_model):
    (ours, our_gradients), (theirs, their_gradients) = (
        lora_gradients(tiny_model, d) for d in ("cuda", "cpu")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    a, b = (torch.cat([g.flatten() for g in one]) for one in (our_gradients, their_gradients))
    assert (a - b).norm() < 1e-4 * b.norm()


def test_prompts_are_shared_in_bfloat16(tiny_model):
    passes, reason = best_passes(AutoModelForCausalLM.from_pretrained(tiny_model).cuda().bfloat16())
    assert isinstance(passes, SharedPasses), reason


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """A model whose tensors are far larger than what CUDA's libraries take for themselves."""
    folder = build_tiny_model(tmp_path_factory.mktemp("wide"), chat_template=None, context=2048)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


PLANNED = {
    "sft full": ("SFTModule", {"max_tokens_per_microbatch": 4096}),
    "sft lora": ("SFTModule", {"adapter": lora(r=16), "max_tokens_per_microbatch": 4096}),
    "grpo lora": (
        "GRPOModule",
        {
            "adapter": lora(r=16),
            "rewards": ["small_runs.spread"],
            "sampling": {"max_new_tokens": 128},
            "max_tokens_per_microbatch": 4096,
        },
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_peak_is_the_planned_one(name, wide_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module, arguments = PLANNED[name]
    write_rows("train.jsonl", [{"prompt": "a" * (384 - i % 8), "answer": "b" * 127} for i in range(64)])
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": module,
            "init_args": {"model": str(wide_model), "chat_template": False, **arguments},
        },
        "data": {
            "class_path": "JsonlDataModule",
            "init_args": {"train_file": "train.jsonl", "batch_size": 16},
        },
        "trainer": {**QUIET, "accelerator": "gpu", "devices": 1, "max_steps": 3},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    lengths = ["--prompt_tokens", "384", "--answer_tokens", "128"]
    assert main(["plan", "run.yaml", "--devices", "1", *lengths, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["peak"]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert main(["fit", "-c", "run.yaml"]) == 0
    measured = torch.cuda.max_memory_allocated() - before
    with capsys.disabled():
        print(f"\n{name}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=0.15)
