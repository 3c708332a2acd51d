"""Drive TRL's own trainers on given tensors: their real code from rewards to the loss.

Only the ends are replaced: what generates, what scores and what computes log-probabilities return the tensors
that the test hands in. Everything is float64, so that a difference is one of definition.
"""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, RLOOConfig, RLOOTrainer

# What the constructors copy from the config to the trainer under its own name.
COPIED = (
    "beta",
    "importance_sampling_level",
    "loss_type",
    "mask_truncated_completions",
    "max_completion_length",
    "multi_objective_aggregation",
    "normalize_advantages",
    "num_generations",
    "num_iterations",
    "off_policy_mask_threshold",
    "reward_clip_range",
    "scale_rewards",
    "top_entropy_quantile",
    "use_vllm",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
)


class Tokenizer:
    """All that a batch of text asks for."""

    pad_token_id = 0


def reset():
    """Forget accelerate's global state, so that a test leaves none behind."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def driven(trainer_class, *, logps=(), config_class=None, **options):
    """Return a trainer set up as its constructor would, whose forward passes yield `logps` one by one."""

    class Driven(trainer_class):
        def _get_per_token_logps_and_entropies(self, *_, **__):
            now = self.logps.pop(0)
            return now, torch.zeros_like(now), None

    config_class = config_class or (RLOOConfig if trainer_class is RLOOTrainer else GRPOConfig)
    args = config_class("unused", use_cpu=True, bf16=False, report_to=[], **options)
    trainer = Driven.__new__(Driven)
    trainer.args = args
    for name in COPIED:
        if name in vars(args):
            setattr(trainer, name, getattr(args, name))
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.logps = list(logps)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model = trainer.ref_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    trainer.model.train()
    trainer._tokenizer = Tokenizer()
    trainer.environment_factories = trainer.environments = trainer.tools = trainer.pad_to_multiple_of = None
    trainer._is_vlm = trainer.log_multimodal = trainer.aux_loss_enabled = False
    trainer._entropy_bonus_enabled = False
    trainer._metrics = {"train": defaultdict(list)}
    trainer._logs = defaultdict(deque, rewards=defaultdict(deque), extra=defaultdict(deque))
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    return trainer


def loss_of(trainer, new, mask, advantages, **inputs):
    """Run TRL's `_compute_loss` on one batch; masked positions are tool output or padding to it."""
    rows, width = mask.shape
    ones = torch.ones(rows, 1, dtype=torch.long)
    trainer.logps.insert(0, new)
    batch = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": ones.expand(rows, width),
        "completion_mask": ones.expand(rows, width),
        "tool_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        **inputs,
    }
    return trainer._compute_loss(trainer.model, {key: x for key, x in batch.items() if x is not None})


def scored(trainer, rewards_BK, mask, *, weights=None, sampler=None):
    """Run TRL's `_generate_and_score_completions` on given rewards, masks and sampler log-probabilities."""
    rows, width = mask.shape
    functions = rewards_BK.shape[1]
    trainer.reward_funcs = [None] * functions
    trainer.reward_func_names = [f"f{k}" for k in range(functions)]
    trainer.reward_weights = torch.tensor(weights or [1.0] * functions, dtype=torch.float64)
    trainer._calculate_rewards = lambda *_: rewards_BK.clone()
    prompts, texts = [[1]] * rows, ["x"] * rows
    if isinstance(trainer, RLOOTrainer):  # knows no tool mask
        generated = prompts, [[1] * n for n in mask.sum(1).tolist()], texts
    else:
        sampled = None if sampler is None else sampler.tolist()
        ids, tools = [[1] * width] * rows, mask.long().tolist()
        generated = prompts, ids, tools, texts, sampled, {}, None, None
    trainer._generate = lambda _: generated
    return trainer._generate_and_score_completions([{"prompt": "p"} for _ in range(rows)])
