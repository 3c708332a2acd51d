"""A GRPOModule whose completions and rewards depend on the row's uid alone, so that runs can be compared.

What is under test stays real: the model, the losses, the update, the strategy.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules import GRPOModule
from lightning_modules.grpo.objective import Objective
from lightning_modules.grpo.rollout import Rollout, Scores, repeat_rows
from lightning_modules.sampling import Completions

# Rewards of each prompt's two completions: 0, 1, 4 and 5 are dead.
REWARDS = [(0, 0), (1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (1, 0), (0, 1)]


def text_batch(uids) -> TextBatch:
    prompts = [f"prompt {'x' * (uid * 3 % 11)} {uid}" for uid in uids]
    return TextBatch(prompts, [""] * len(prompts), ["t"] * len(prompts), list(uids), {}, [[] for _ in uids])


class FixedGRPO(GRPOModule):
    def __init__(self, objective: Objective = Objective(), **kwargs) -> None:  # noqa: B008  frozen
        # Nobody drew these completions, so no sampler knows their log-probabilities.
        super().__init__(objective=replace(objective, max_sampler_gap=None), **kwargs)

    def rollout(self, batch, num_generations, sampling):
        prompt_ids = [
            ids for ids in self.encode_prompts(batch.prompts, room=16) for _ in range(num_generations)
        ]
        token_ids = []
        for uid in batch.uids:
            generator = torch.Generator().manual_seed(uid)
            for _ in range(num_generations):
                length = int(torch.randint(1, 13, (1,), generator=generator))
                token_ids.append(torch.randint(1, 257, (length,), generator=generator).tolist())
        completions = Completions(
            token_ids,
            [""] * len(token_ids),
            ["stop"] * len(token_ids),
            [[0.0] * len(ids) for ids in token_ids],
        )
        return Rollout(repeat_rows(batch, num_generations), prompt_ids, completions, num_generations)

    def score(self, rollout):
        uids = rollout.batch.uids[:: rollout.group_size]
        rewards = torch.tensor([r for uid in uids for r in REWARDS[uid]], dtype=torch.float32)
        return Scores(rewards[:, None], rewards, (rewards > 0).float(), ["fixed"])


class RecordGradients(torch.optim.SGD):
    """SGD that keeps the gradient of its first step."""

    first: list[torch.Tensor] | None = None

    def step(self, closure=None):
        if self.first is None:
            self.first = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def loader(uids, rank=0, world_size=1) -> EvalLoader:
    uids = list(uids)
    per_rank = len(uids) // world_size
    return EvalLoader(lambda rows: text_batch([uids[rank * per_rank + i] for i in rows]), per_rank, per_rank)


def first_gradients(module, trainer, train_loader) -> list[torch.Tensor]:
    trainer.fit(module, train_loader)
    return trainer.optimizers[0].first
