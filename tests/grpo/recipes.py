"""The method of each recipe, built through its YAML on fixed rollouts of a tiny model."""

from __future__ import annotations

import lightning.pytorch as lightning
import torch
import yaml
from conftest import REPOSITORY
from fixed_rollouts import FixedGRPO, RecordGradients
from jsonargparse import ArgumentParser

from lightning_modules.grpo.rollout import Scores

FOLDER = REPOSITORY / "configs" / "grpo"
OTHERS = ("demo", "gsm8k", "reasoning_gym")  # data and models, no method of their own
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem not in OTHERS)


class RecipeGRPO(FixedGRPO):
    """Groups of any size: by the row's uid all right, all wrong, or every second one right."""

    def score(self, rollout):
        rewards = []
        for uid in rollout.batch.uids[:: rollout.group_size]:
            kinds = {0: [0.0, 0.0], 1: [1.0, 1.0], 2: [0.0, 1.0], 3: [1.0, 0.0]}[uid % 4]
            rewards += (kinds * rollout.group_size)[: rollout.group_size]
        total = torch.tensor(rewards)
        return Scores(total[:, None], total, total, ["fixed"])


def build(recipe: str, model: str, **options) -> RecipeGRPO:
    """The module of a recipe, with another model, adapter and optimiser, so that gradients can be compared."""
    settings = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())["model"]["init_args"]
    for name in ("optimizer", "lr_scheduler"):
        del settings[name]
    settings |= {
        "model": model,
        "rewards": ["builtins.max"],
        "gradient_clip_val": None,
        "updates_per_rollout": 1,
    }
    settings["adapter"] = {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False},
    }
    settings["num_generations"] = min(settings["num_generations"], 4)
    if "resampling" in settings:
        settings["resampling"] = {"live_groups": 4, "max_rollouts": 64}
    parser = ArgumentParser()
    parser.add_class_arguments(RecipeGRPO, "module", fail_untyped=False)
    parsed = parser.parse_object({"module": settings | options})
    lightning.seed_everything(3, verbose=False)
    module = parser.instantiate_classes(parsed).module
    module._optimizer = lambda parameters: RecordGradients(parameters, lr=0.1)
    return module
