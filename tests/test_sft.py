"""SFTModule: the gradient, the metrics, and that it learns."""

from __future__ import annotations

import csv
import math

import lightning.pytorch as lightning
import pytest
import torch
import transformers
import wandb
from conftest import REPOSITORY
from peft import LoraConfig
from saved import saved_bytes
from torchmetrics.text.rouge import ROUGEScore
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules import SFTModule
from lightning_modules.cli import main

END = 0
ROWS = [
    ("What is 2 + 2?", "4"),
    ("Say hello", "hello there"),
    ("A much longer question that needs padding of the others", "yes"),
    ("Count", "one two three four five"),
    ("Name a colour", "blue"),
    ("Hi", "a rather long answer, longer than the prompt"),
]


class RecordGradients(torch.optim.SGD):
    """SGD that keeps the gradient of its first step."""

    first = None

    def step(self, closure=None):
        if self.first is None:
            self.first = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def loader(rows, batch_size=None, choices=None) -> EvalLoader:
    choices = choices or [[] for _ in rows]

    def batch(indices) -> TextBatch:
        prompts, answers = ([rows[i][column] for i in indices] for column in range(2))
        return TextBatch(
            prompts, answers, ["t"] * len(prompts), list(indices), {}, [choices[i] for i in indices]
        )

    return EvalLoader(batch, len(rows), batch_size or len(rows))


def build(tiny_model, **options) -> SFTModule:
    torch.manual_seed(3)
    options.setdefault("adapter", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    options.setdefault("optimizer", lambda p: RecordGradients(p, lr=0.1))
    options.setdefault("gradient_clip_val", None)
    return SFTModule(model=tiny_model, **options)


def trainer(**options) -> lightning.Trainer:
    options = {"max_epochs": 1, "accelerator": "cpu", **options}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**quiet, enable_checkpointing=False, num_sanity_val_steps=0, **options)


def answer_logprobs(module, prompt: str, answer: str) -> torch.Tensor:
    """Log-probability of each answer token and the end token (T), from one row alone and unpadded."""
    [prompt_ids] = module.encode_prompts([prompt], room=0)
    answer_ids = [*module.tokenizer(answer)["input_ids"], END]
    logits = module.model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[0]
    start = len(prompt_ids) - 1
    return torch.stack([logits[start + t].log_softmax(-1)[token] for t, token in enumerate(answer_ids)])


def train_once(tiny_model, rows=ROWS, **options):
    module, run = build(tiny_model, **options), trainer()
    run.fit(module, loader(rows))
    return run, run.optimizers[0].first


@pytest.mark.parametrize("max_tokens", [4096, 150, 1])
def test_gradient_equals_a_loop_over_answer_tokens(tiny_model, max_tokens):
    """The prompt and the padding carry no loss, the end token does; the split changes nothing."""
    run, ours = train_once(tiny_model, max_tokens_per_microbatch=max_tokens)
    twin = build(tiny_model)
    twin.configure_model()
    losses = torch.cat([-answer_logprobs(twin, *row) for row in ROWS])
    count = sum(len(answer) + 1 for _, answer in ROWS)  # a byte is a token
    assert len(losses) == count
    losses.mean().backward()
    theirs = [p.grad for p in twin.parameters() if p.requires_grad]
    assert max(g.abs().max() for g in theirs) > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert run.callback_metrics["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert run.callback_metrics["train/answer_tokens"] == count
    norm = torch.cat([g.flatten() for g in theirs]).norm().item()
    assert run.callback_metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def kept_bytes(module, prompts, answers) -> int:
    return sum(saved_bytes(lambda: module._logprobs(prompts, answers)[0].sum()).values())


@pytest.mark.parametrize("adapter", ["lora", None])
def test_logits_are_made_a_chunk_at_a_time(tiny_model, adapter, monkeypatch):
    """Activations kept for the backward pass shrink by at least the logits of all answers; results stay."""
    options = {} if adapter else {"adapter": None}
    module = build(tiny_model, **options)
    module.configure_model()
    prompts, answers = [[5, 6, 7], [8, 9]], [[10 + t for t in range(90)], [20 + t for t in range(60)]]
    kept = kept_bytes(module, prompts, answers)
    ours, mask = module._logprobs(prompts, answers)
    assert module._logits_are_kept == {True: False}
    parameters = [p for p in module.parameters() if p.requires_grad]
    ours_gradients = torch.autograd.grad((ours * mask).sum(), parameters)
    module._logits_are_kept = {True: True}
    theirs, _ = module._logprobs(prompts, answers)
    logits = 150 * module.text_config.vocab_size * 4
    assert kept < kept_bytes(module, prompts, answers) - logits
    torch.testing.assert_close(ours * mask, theirs * mask)
    for a, b in zip(ours_gradients, torch.autograd.grad((theirs * mask).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("Gemma2", {"final_logit_softcapping": 2.0}), ("Cohere", {"logit_scale": 0.5})]
)
def test_models_that_change_logits_after_the_head_keep_all_of_them(tiny_model, tmp_path, name, options):
    """Which the first rows show. What is learned is right, the first rows' loss included."""
    tiny = AutoTokenizer.from_pretrained(tiny_model)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=END, bos_token_id=None,
        pad_token_id=None, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.save_pretrained(tmp_path / "model")
    place = str(tmp_path / "model")
    run, _ = train_once(place, attn_implementation="eager")
    assert run.lightning_module._logits_are_kept == {True: True}
    twin = build(place, attn_implementation="eager")
    twin.configure_model()
    with torch.no_grad():
        losses = torch.cat([-answer_logprobs(twin, *row) for row in ROWS])
    assert run.callback_metrics["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_only_the_answer_is_a_target(tiny_model):
    """With one token as answer there are two targets, however long the prompt is."""
    run, _ = train_once(tiny_model, [("x" * 200, "y")])
    assert run.callback_metrics["train/answer_tokens"] == 2


class Losses(lightning.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture(scope="module")
def taught(tiny_model):
    """A module that has learned ROWS by heart, and its losses."""
    options = {"adapter": None, "gradient_clip_val": 1.0, "max_tokens_per_microbatch": 100}
    module = build(tiny_model, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3), **options)
    losses = Losses()
    trainer(max_epochs=150, callbacks=[losses]).fit(module, loader(ROWS))
    return module, losses.losses


def test_overfits_a_few_rows(taught):
    module, losses = taught
    assert len(losses) == 150
    assert losses[-1] < losses[0] / 2
    run = trainer()
    [metrics] = run.validate(module, loader(ROWS), verbose=False)
    assert metrics["val/exact_match"] == 1
    assert metrics["val/rouge_l"] == 1
    assert metrics["val/loss"] < 0.1
    answers = [answer for _, answer in ROWS]
    predicted = run.predict(module, loader(ROWS, batch_size=3))
    assert [[row["completion"] for row in batch] for batch in predicted] == [answers[:3], answers[3:]]
    assert [row["prompt"] for batch in predicted for row in batch] == [prompt for prompt, _ in ROWS]


@torch.no_grad()
def slow_answer(module, prompt: str, limit: int) -> str:
    [ids] = module.encode_prompts([prompt], room=limit)
    answer: list[int] = []
    while len(answer) < limit and END not in answer:
        answer.append(int(module.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return module.tokenizer.decode([i for i in answer if i != END]).strip()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_equal_computation_by_hand(taught, stage):
    module, _ = taught
    limit = module.sampling.max_new_tokens
    module.eval()
    words = ["some", "more words", "in this answer", "of a 7"]
    prompts = ["Count", *(prompt for prompt, _ in ROWS[1:])]
    texts = [slow_answer(module, prompt, limit) for prompt in prompts]
    # Two exact, two nearly, two wrong. White space around a gold answer does not matter.
    golds = [texts[0], f" {texts[1]}\n", f"{texts[2]} {words[0]}", f"{words[1]} {texts[3]}", *words[2:]]
    long = "a choice of many tokens"
    choices = [["4", "5", long], [long, "blue", "b"], ["no", "yes"], ["left", "right or wrong", "up"]]
    asked = [("Pick", "5"), ("Which", long), ("Is it?", "yes"), ("Where to?", "up")]
    rows = [*zip(prompts, golds, strict=True), *asked]
    run = trainer()
    data = loader(rows, batch_size=4, choices=[*([[]] * len(golds)), *choices])
    outputs = []
    module.on_validation_batch_end = module.on_test_batch_end = lambda out, *_: outputs.append(out)
    [metrics] = getattr(run, stage)(module, data, verbose=False)
    name = "val" if stage == "validate" else "test"

    exact = [text == gold.strip() for text, gold in zip(texts, golds, strict=True)]
    assert sum(exact) == 2
    assert metrics[f"{name}/exact_match"] == pytest.approx(2 / 6)
    rouge = ROUGEScore(rouge_keys="rougeL")
    rouge.update(texts, golds)
    expected = rouge.compute()["rougeL_fmeasure"].item()
    assert 0.1 < expected < 0.9
    assert metrics[f"{name}/rouge_l"] == pytest.approx(expected, abs=1e-6)

    with torch.no_grad():
        scores = [
            [answer_logprobs(module, prompt, choice) for choice in row]
            for (prompt, _), row in zip(asked, choices, strict=True)
        ]
        losses = torch.cat([-answer_logprobs(module, *row) for row in rows])
    picked, by_sum = (
        [
            row[max(range(len(row)), key=lambda i: float(f(s[i])))]
            for row, s in zip(choices, scores, strict=True)
        ]
        for f in (torch.mean, torch.sum)
    )
    assert picked != by_sum  # the length counts
    correct = [choice == answer for choice, (_, answer) in zip(picked, asked, strict=True)]
    assert metrics[f"{name}/choice_accuracy"] == pytest.approx(sum(correct) / 4)
    assert metrics[f"{name}/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert [p for out in outputs for p in out["predictions"]] == [*texts, *picked]


def test_an_empty_answer_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"Row 1 of the data has an empty answer.*answer_column"):
        train_once(tiny_model, [("a", "b"), ("c", "")])


def test_refuses_a_budget_of_no_tokens(tiny_model):
    with pytest.raises(ValueError, match="max_tokens_per_microbatch=0: must be at least 1"):
        SFTModule(model=tiny_model, max_tokens_per_microbatch=0)


def test_the_configuration_runs(tiny_model, tmp_path, monkeypatch):
    data = REPOSITORY.parent / "shared" / "data" / "instruction_induction"
    if not data.is_dir():
        pytest.skip(f"the instruction induction data is not in {data}")
    monkeypatch.chdir(tmp_path)
    overrides = {
        "model.model": tiny_model,
        "model.dtype": "float32",
        "model.sampling.max_new_tokens": "8",
        "data.folder": str(data),
        "data.instructions": str(data / "instructions.json"),
        "data.tasks": "[sum, antonyms]",
        "trainer.limit_train_batches": "4",
        "trainer.val_check_interval": "2",
    }
    arguments = [part for name, value in overrides.items() for part in (f"--{name}", value)]
    try:
        assert main(["fit", "-c", "sft/instruction_induction.yaml", *arguments]) == 0
    finally:
        wandb.finish()
    with (tmp_path / "runs/sft/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert sum(bool(row["val/exact_match"]) for row in rows) == 2
    assert (tmp_path / "runs/sft/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/sft/adapter-best/README.md").is_file()
