"""Writes sampled rollouts to JSON Lines and to a W&B table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.distributed import gathered
from lightning_modules.files import complete_file, naming, set_aside
from lightning_modules.grpo.module import GRPOModule
from lightning_modules.ranges import check_whole
from lightning_modules.secrets import redact_strings

_COLUMNS = ["step", "uid", "task", "prompt", "completion", "finish", "tokens", "reward", "advantage"]


class RolloutTable(lightning.Callback):
    """Shows what the policy writes and what it earns. Samples whole groups, so that it never slows a run.

    Args:
        filename: Name of the JSON Lines file in the run's folder; one rollout per line.
        groups_per_step: Groups written from each rank and step, the first of the batch.
        table_every_n_steps: How often a table goes to W&B.
    """

    def __init__(
        self, filename: str = "rollouts.jsonl", groups_per_step: int = 4, table_every_n_steps: int = 10
    ) -> None:
        check_whole("groups_per_step", groups_per_step)
        check_whole("table_every_n_steps", table_every_n_steps)
        self.filename = filename
        self.groups_per_step = groups_per_step
        self.table_every_n_steps = table_every_n_steps
        self._target: Path | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check that the module makes rollouts.

        Raises:
            ValueError: If it does not.
        """
        if not isinstance(pl_module, GRPOModule):
            raise ValueError(
                f"RolloutTable shows the rollouts of a GRPOModule; {type(pl_module).__name__} makes none. "
                "Leave it out."
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start a new file, or continue the one of a resumed run after its last saved step."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._target = Path(trainer.log_dir or trainer.default_root_dir) / self.filename
        if not trainer.is_global_zero:
            return
        self._target.parent.mkdir(parents=True, exist_ok=True)
        done = trainer.fit_loop.total_batch_idx + 1
        if done == 0:
            set_aside(self._target)
        elif self._target.exists():
            # As bytes: a killed process may have cut a character in two, and JSON does not escape all those
            # that end a line for `str.splitlines`.
            lines = self._target.read_bytes().splitlines(keepends=True)
            with complete_file(self._target) as file:
                file.write_bytes(b"".join(line for line in lines if _step(line) <= done))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write some rollouts of this step."""
        if self._target is None:
            return
        step = trainer.fit_loop.total_batch_idx + 1
        # A completion or a reward's log may quote a key of the environment.
        rows = redact_strings([row for part in gathered(self._rows(step, outputs)) for row in part])
        if not trainer.is_global_zero:
            return
        # Half a surrogate pair, which UTF-8 lacks, is written as JSON escapes it.
        with (
            naming(self._target),
            self._target.open("a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if step % self.table_every_n_steps == 0:
            extra = dict.fromkeys(name for row in rows for name in row if name not in _COLUMNS)
            columns = [*_COLUMNS, *map(_cell, extra)]
            data = [[_cell(row.get(name)) for name in (*_COLUMNS, *extra)] for row in rows]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_table("rollouts", columns=columns, data=data)

    def _rows(self, step: int, outputs: Any) -> list[dict[str, Any]]:
        if "rollout" not in outputs:  # with resampling a step may only take prompts in
            return []
        rollout, scores, advantages = outputs["rollout"], outputs["scores"], outputs["advantages"]
        batch, completions = rollout.batch, rollout.completions
        return [
            {
                "step": step,
                "uid": batch.uids[i],
                "task": batch.tasks[i],
                "prompt": batch.prompts[i],
                "completion": completions.texts[i],
                "finish": completions.finish[i],
                "tokens": len(completions.token_ids[i]),
                "reward": _number(scores.total[i]),
                "advantage": _number(advantages[i]),
                **{
                    f"reward/{name}": _number(scores.by_function[i, k]) for k, name in enumerate(scores.names)
                },
                **{_free(name): _plain(values[i]) for name, values in rollout.extra.items()},
            }
            for i in range(min(len(rollout), self.groups_per_step * rollout.group_size))
        ]


def _free(name: str) -> str:
    """The column of what a reward function logged, apart from those of every rollout."""
    return f"log_extra/{name}" if name in _COLUMNS or name.startswith("reward/") else name


def _number(value: Any) -> float | None:
    """A reward that is not applicable becomes null: JSON has no NaN."""
    number = float(value)
    return None if number != number else round(number, 6)


def _plain(value: Any) -> Any:
    """What a reward function logged, as JSON: numbers of numpy and torch too, anything unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if callable(getattr(value, "tolist", None)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return hex(value)  # JSON readers take it for a float, and Python prints no more than 4300 digits
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _cell(value: Any) -> Any:
    """A value as a W&B table takes it, of which a column holds one type."""
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _step(line: bytes) -> int:
    """The step of a line; a line that a killed process left half written counts as later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**62
