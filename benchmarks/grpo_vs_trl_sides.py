"""The two sides of grpo_vs_trl.py: a training run of Quiver and one of TRL, which wait for their turn before a step."""

from __future__ import annotations

import argparse
import random
import resource
import time
import zlib
from pathlib import Path

# name: (completions of a prompt, prompts of a step, tokens of a prompt)
SETTINGS = {"S1": (8, 4, 44), "S2": (16, 2, 445), "S3": (2, 16, 445), "S4": (2, 64, 44)}
RANK, TEMPERATURE, CLIP, CLIP_NORM = 16, 1.0, 0.2, 1.0
RATES = {"lora": 1e-5, "full": 1e-6}
SEED = 0


def make_prompts(number: int, length: int, tokenizer) -> list[str]:
    """Write word problems of about `length` tokens, no two alike."""
    draw = random.Random(SEED)
    prompts = []
    for problem in range(1, number + 1):
        thing = draw.choice(("apples", "books", "coins", "stamps", "shells", "pencils", "cards", "eggs"))
        text, question = f"Problem {problem}.", f" How many {thing} are there in the end?"
        while len(tokenizer(text + question)["input_ids"]) < length - 6:  # half a sentence
            name = draw.choice(("Mara", "Tom", "Lena", "Omar", "Ines", "Paul", "Ruth", "Kofi"))
            verb = draw.choice(("brings", "buys", "finds", "loses", "sells", "gives away"))
            text += f" {name} {verb} {draw.randint(2, 99)} {thing}."
        prompts.append(text + question)
    return prompts


class Steps:
    """The steps of one side: waits for its turn, rewards, times the phases, and sends what it found.

    Each phase ends where the next begins: `generate` where the reward is asked for, `score` where it is given,
    `gradients` before the optimiser's step, `optimizer` at the end. The largest memory counts from the first step.
    """

    def __init__(self, options: argparse.Namespace, connection) -> None:
        self.options, self.connection = options, connection
        self.before: float | None = None

    def begin(self) -> None:
        """Wait for this side's turn."""
        if self.before is None:
            self.before = reset_memory(self.options.device)
            self.connection.send("loaded")
        self.connection.recv()
        self.found: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def ends(self, phase: str) -> None:
        """Note that a phase ends."""
        if self.options.device == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self.found[phase] = now - self.last
        self.last = now

    def reward(self, prompts, completions, completion_ids, **_) -> list[float]:
        """Reward by a hash: of text and row, so that no two rows have the same reward, or of the text, 0 or 1."""
        self.ends("generate")
        if self.options.binary_reward:
            rewards = [float(zlib.crc32(text.encode()) % 2) for text in completions]
        else:
            rewards = [zlib.crc32(f"{row} {text}".encode()) / 2**32 for row, text in enumerate(completions)]
        G = SETTINGS[self.options.setting][0]
        groups = [rewards[i : i + G] for i in range(0, len(rewards), G)]
        self.counts = {
            "tokens": sum(map(len, completion_ids)),
            "lengths": [min(map(len, completion_ids)), max(map(len, completion_ids))],
            "prompts": zlib.crc32("".join(prompts).encode()),
            "dead_groups": sum(len(set(group)) == 1 for group in groups) / len(groups),
        }
        self.ends("score")
        return rewards

    def finish(self, read_tokens: int) -> None:
        """Send what the step took; `read_tokens` are those of prompts and completions, by the trainer's count."""
        self.ends("optimizer")
        peak = memory(self.options.device)
        self.connection.send(
            self.counts
            | {"phases": self.found, "seconds": self.last - self.start}
            | {"prompt_tokens": read_tokens - self.counts["tokens"]}
            | {"peak_mb": peak, "beyond_model_mb": peak - self.before}
        )


def memory(device: str) -> float:
    """Return the largest memory so far in MB: resident, or allocated on the GPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6


def reset_memory(device: str) -> float:
    """Let the largest memory start anew, and return it."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return memory(device)


def switch_end_off(model, tokenizer) -> None:
    """Let a token end completions that is as good as never drawn: the last one of the vocabulary."""
    last = len(tokenizer) - 1
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    model.generation_config.eos_token_id = last


def lora():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def quiver(options: argparse.Namespace, connection) -> None:
    """Train with Quiver."""
    import lightning.pytorch as lightning
    import torch
    from transformers import AutoTokenizer

    from datamodules.base import TextDataModule
    from lightning_modules import ClippedSurrogate, GRPOModule
    from lightning_modules.sampling import NativeSampler, Sampling

    steps = Steps(options, connection)
    group_size, count, length = SETTINGS[options.setting]
    prompts = make_prompts(count * (options.steps + 1), length, AutoTokenizer.from_pretrained(options.folder))

    class Problems(TextDataModule):
        def rows(self, split):
            return [{"prompt": prompt} for prompt in prompts] if split == "train" else []

    class Turns(lightning.Callback):
        def on_train_start(self, trainer, module):
            if options.equal:
                switch_end_off(module.model, module.tokenizer)

        def on_train_batch_start(self, *_):
            steps.begin()

        def on_before_optimizer_step(self, *_):
            steps.ends("gradients")

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            rollout = outputs["rollout"]
            steps.finish(sum(map(len, rollout.prompt_ids)) + int(rollout.lengths.sum()))

    lightning.seed_everything(SEED, verbose=False)
    module = GRPOModule(
        model=options.folder,
        adapter=lora() if options.adapter == "lora" else None,
        dtype=options.dtype,
        chat_template=False,
        rewards=[steps.reward],
        num_generations=group_size,
        sampling=Sampling(max_new_tokens=options.new_tokens, temperature=TEMPERATURE),
        sampler=NativeSampler(),
        advantage="std",
        policy_loss=ClippedSurrogate((CLIP, CLIP)),
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=RATES[options.adapter], weight_decay=0.0, fused=True
        ),
        gradient_clip_val=CLIP_NORM,
        max_tokens_per_microbatch=options.quiver_tokens,
    )
    trainer = lightning.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        max_steps=options.steps + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns()],
    )
    trainer.fit(module, Problems(batch_size=count, answer_column=None, shuffle=False))


def trl(options: argparse.Namespace, connection) -> None:
    """Train with TRL, or send `too large` if a micro-batch does not fit the memory."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if options.device == "cpu":
        # A failed allocation can be caught; where memory is used up, the kernel ends processes.
        limit = int(options.trl_memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    steps = Steps(options, connection)
    group_size, count, length = SETTINGS[options.setting]
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=options.dtype, attn_implementation="sdpa"
    )
    prompts = make_prompts(count * (options.steps + 1), length, tokenizer)
    if options.equal:
        switch_end_off(model, tokenizer)

    class Turns(TrainerCallback):
        seen = 0

        def on_step_begin(self, args, state, control, **_):
            steps.begin()

        def on_pre_optimizer_step(self, *_, **__):
            steps.ends("gradients")

        def on_step_end(self, args, state, control, **_):
            before, self.seen = self.seen, state.num_input_tokens_seen
            steps.finish(self.seen - before)

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=steps.reward,
        args=GRPOConfig(
            output_dir=options.scratch,
            per_device_train_batch_size=options.trl_micro_batch,
            gradient_accumulation_steps=group_size * count // options.trl_micro_batch,
            num_generations=group_size,
            num_iterations=1,
            max_completion_length=options.new_tokens,
            temperature=TEMPERATURE,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            epsilon=CLIP,
            learning_rate=RATES[options.adapter],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=CLIP_NORM,
            max_steps=options.steps + 1,
            shuffle_dataset=False,
            seed=SEED,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=options.device == "cpu",
            use_transformers_continuous_batching=options.trl_continuous_batching,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=lora() if options.adapter == "lora" else None,
        callbacks=[Turns()],
    )
    try:
        trainer.train()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        connection.send("too large")
