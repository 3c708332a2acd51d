"""Tells what training gained: success on the validation set before and after, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

from lightning_modules.distributed import gathered
from lightning_modules.files import complete_file, set_aside
from lightning_modules.grpo.evaluation import mean_interval, paired_gain


class HeldOutGain(lightning.Callback):
    """Prints held-out accuracy before and after training, and the paired gain, with 95% intervals.

    The same numbers go to a JSON file in the run's folder.

    "Before" is Lightning's sanity check, so it needs `num_sanity_val_steps: -1`; "after" is the last
    validation. Works with modules whose `validation_step` returns `success` per prompt and completion and
    the `rollout`, such as GRPOModule.

    Args:
        filename: Name of the JSON file.
    """

    def __init__(self, filename: str = "held_out_gain.json") -> None:
        self.filename = filename
        self._before: dict[int, float] = {}
        self._after: dict[int, float] = {}
        self._without: set[int] = set()  # prompts of which no completion has a reward
        self._measured_at = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check that the whole validation set is measured.

        Raises:
            ValueError: If the sanity check covers a part only, or none.
        """
        shortened = trainer.fast_dev_run  # type: ignore[attr-defined]
        if stage == "fit" and not shortened and trainer.num_sanity_val_steps != float("inf"):
            raise ValueError(
                f"HeldOutGain measures accuracy before training in the sanity check, which covers only "
                f"{trainer.num_sanity_val_steps} batches. Set trainer.num_sanity_val_steps: -1."
            )

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Forget the validation before."""
        self._after, self._without = {}, set()
        self._measured_at = trainer.global_step

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        *args: Any,
    ) -> None:
        """Collect the success of each prompt.

        Raises:
            ValueError: If the module does not return it.
        """
        if not isinstance(outputs, Mapping) or not {"rollout", "success"} <= outputs.keys():
            raise ValueError(
                f"HeldOutGain needs `rollout` and `success` from validation_step; {type(pl_module).__name__} "
                "does not return them. Use it with GRPOModule, or leave it out."
            )
        uids = outputs["rollout"].batch.uids[:: outputs["rollout"].group_size]
        means = outputs["success"].float().nanmean(1).tolist()  # NaN: the reward applies to no completion
        success = {uid: mean for uid, mean in zip(uids, means, strict=True) if not math.isnan(mean)}
        self._without |= set(uids) - success.keys()
        if not trainer.sanity_checking:
            self._after |= success
        elif not trainer.ckpt_path:  # a resumed run keeps the accuracy from before its first part
            self._before |= success

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the result and write it down."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        before, after = _merged(self._before), _merged(self._after)
        without = set().union(*gathered(self._without))
        uids = sorted(before.keys() & after.keys())
        if not (before or without) or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        if without:
            pl_module.print(
                f"The first reward function judged no completion of {len(without)} of "
                f"{len(without | after.keys())} prompts in the last validation; held-out accuracy leaves them out."
            )
        if not uids:
            if without:
                return
            pl_module.print(
                "Held-out accuracy after training was not measured: no validation ran. Finish an epoch, or "
                "set trainer.val_check_interval."
            )
            return
        if self._measured_at != trainer.global_step:
            pl_module.print(
                f"The last validation ran at step {self._measured_at} of {trainer.global_step}; what came "
                "after it was not measured."
            )
        first = [before[uid] for uid in uids]
        last = [after[uid] for uid in uids]
        result = {
            "before": mean_interval(first),
            "after": mean_interval(last),
            "gain": paired_gain(first, last),
        }
        pl_module.print(
            f"Held-out accuracy over {len(uids)} prompts, 95% intervals\n"
            f"  before training  {_text(result['before'])}\n"
            f"  after training   {_text(result['after'])}\n"
            f"  gain             {_text(result['gain'])}"
        )
        target = folder / self.filename
        set_aside(target)
        with complete_file(target) as file:
            file.write_text(json.dumps({"prompts": len(uids), **result}) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Keep the accuracy from before training for a resumed run."""
        return {"before": _merged(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._before = state_dict["before"]


def _merged(mine: dict[int, float]) -> dict[int, float]:
    """Join the dictionaries of all ranks."""
    return {uid: value for part in gathered(mine) for uid, value in part.items()}


def _text(interval: tuple[float, float, float]) -> str:
    mean, low, high = interval
    return f"{mean:.3f}  [{low:.3f}, {high:.3f}]"
