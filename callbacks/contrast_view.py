"""Measures whether two rollouts per prompt are enough for a policy, from gradients of single completions.

Shapes: Q prompts, C completions of each, B = Q x C rows, d entries of a sketch.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor

from callbacks.contrast_figure import contrast_figure
from datamodules.batches import TextBatch
from lightning_modules.distributed import gathered, rng_state, set_rng_state
from lightning_modules.files import complete_file, set_aside
from lightning_modules.grpo.advantages import Scale
from lightning_modules.grpo.contrast import contrast_covariance, group_size_statistics, sketch
from lightning_modules.grpo.module import GRPOModule
from lightning_modules.grpo.rollout import Rollout
from lightning_modules.logprobs import completion_logits, token_logprobs
from lightning_modules.microbatches import pad_pairs
from lightning_modules.ranges import check_whole, check_wholes


class ContrastView(lightning.Callback):
    """Compares group sizes on the policy at hand, after chosen training steps ("It Takes Two", arXiv 2510.00977).

    It draws `completions` for each of the first `prompts` of the step's batch, takes the gradient of each completion's
    mean log-probability by itself, and writes one JSON line with what `group_size_statistics` and
    `contrast_covariance` of `lightning_modules.grpo.contrast` say about them: variance relative to the squared norm at
    as many rollouts as the step had, dead groups, and whether failed completions are a control variate of successful
    ones. The main numbers are logged as `contrast/...`, where loggers that write more often repeat the last value; the
    latest line is drawn. Numbers that a pool does not have, one without both outcomes say, are null there and NaN here.

    Several ranks measure prompts of their own, and the line is about all of them. Training goes on as if nothing had
    been measured; a reward function that keeps a state of its own sees more completions, though. A measurement takes
    one backward pass for each completion; on CPUs these are many times slower in bfloat16 than in float32.

    Args:
        every_n_steps: Training steps between two measurements.
        steps: Measure after these steps instead.
        prompts: Q on each rank, at most; the first of the batch.
        completions: C.
        sizes: Group sizes to compare, each a divisor of C.
        scale: How advantages are scaled; that of the module, to see what it does.
        sketch_dim: Numbers kept of each gradient; None keeps all, which only small models allow.
        filename: Of the lines, in the run's folder.
        figure: Name of the picture there; None draws none.

    Raises:
        ImportError: If there is to be a picture and matplotlib (extra `plots`) is missing.
        ValueError: If an argument is out of range, or a size does not divide `completions`.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        steps: list[int] | None = None,
        prompts: int = 8,
        completions: int = 16,
        sizes: Sequence[int] = (2, 4, 8, 16),
        scale: Scale = "population",
        sketch_dim: int | None = 16384,
        filename: str = "contrast.jsonl",
        figure: str | None = "contrast.png",
    ) -> None:
        if figure is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                "ContrastView draws with matplotlib: pip install 'lightning-quiver[plots]', or set figure: null."
            )
        for name, value in {
            "every_n_steps": every_n_steps,
            "prompts": prompts,
            "completions": completions,
        }.items():
            check_whole(name, value)
        check_wholes("steps", steps, none=True)
        check_wholes("sizes", sizes, least=2)
        check_whole("sketch_dim", sketch_dim, none=True, hint="null keeps whole gradients.")
        if bad := [size for size in sizes if completions % size]:
            raise ValueError(
                f"sizes={list(sizes)}: {bad[0]} does not divide completions={completions} into groups of 2 or more. "
                "Leave it out, or set completions to a multiple of all sizes."
            )
        if not sizes:
            raise ValueError("sizes is empty: name at least one group size.")
        self.every_n_steps = every_n_steps
        self.steps = steps
        self.prompts = prompts
        self.completions = completions
        self.sizes = sorted(sizes)
        self.scale: Scale = scale
        self.sketch_dim = sketch_dim
        self.filename = filename
        self.figure = figure
        self._records: list[dict[str, Any]] = []
        self._folder: Path | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the module and the strategy.

        Raises:
            ValueError: If the module makes no rollouts, or its weights are sharded.
        """
        if not isinstance(pl_module, GRPOModule):
            raise ValueError(
                f"ContrastView measures the rollouts of a GRPOModule; {type(pl_module).__name__} makes none. Leave it "
                "out."
            )
        if pl_module.sharding is not None:
            raise ValueError(
                "ContrastView takes the gradient of each completion by itself, which sharded weights do not allow. "
                "Set trainer.strategy to ddp or auto, or leave ContrastView out."
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the files of an earlier run in this folder."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if trainer.is_global_zero and not self._records:
            for name in (self.filename, self.figure):
                if name is not None:
                    set_aside(self._folder / name)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: TextBatch,
        batch_idx: int,
    ) -> None:
        """Measure, if it is time."""
        step = trainer.fit_loop.total_batch_idx + 1
        if not (step in self.steps if self.steps is not None else step % self.every_n_steps == 0):
            return
        assert isinstance(pl_module, GRPOModule)
        with _unnoticed(trainer, pl_module):
            mine = self._measure(trainer, pl_module, batch)
        record = {"step": step, **self._record(gathered(mine))}
        pl_module.log_dict({f"contrast/{name}": value for name, value in _scalars(record).items()})
        self._records.append(record)
        self._write(trainer)

    def _measure(self, trainer: lightning.Trainer, module: GRPOModule, batch: TextBatch) -> dict[str, Any]:
        """Return what this rank contributes: a row for each prompt, and the rollouts of its step."""
        some = batch.take(range(min(self.prompts, len(batch))))
        with trainer.precision_plugin.train_step_context():
            rollout = module.rollout(some, self.completions, module.sampling)
            scores = module.score(rollout)
            gradients_Bd = completion_gradients(module, rollout, self.sketch_dim)
        shape = (len(some), self.completions)
        return {
            "gradients": gradients_Bd.cpu().view(*shape, -1),
            "rewards": scores.total.cpu().view(shape),
            "success": scores.success.cpu().view(shape),
            "rollouts": len(batch) * module.num_generations,
        }

    def _record(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the measurement over the prompts of all ranks, alike on each."""
        gradients_QCd, rewards_QC, success_QC = (
            torch.cat([part[name] for part in parts]) for name in ("gradients", "rewards", "success")
        )
        rollouts = sum(part["rollouts"] for part in parts)
        statistics = group_size_statistics(
            gradients_QCd, rewards_QC, self.sizes, self.scale, rollouts=rollouts
        )
        record = {
            "prompts": len(rewards_QC),
            "completions": self.completions,
            "rollouts": rollouts,
            "success": float(success_QC.nanmean()),
            "group_sizes": [asdict(one) for one in statistics],
            "contrast": asdict(contrast_covariance(gradients_QCd, success_QC)),
        }
        return {name: _plain(value) for name, value in record.items()}

    def _write(self, trainer: lightning.Trainer) -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        with complete_file(self._folder / self.filename) as file:
            file.write_text("".join(json.dumps(record) + "\n" for record in self._records), encoding="utf-8")
        if self.figure is not None:
            with complete_file(self._folder / self.figure) as file:
                contrast_figure(self._records[-1]).savefig(file, dpi=120)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Send the picture to W&B."""
        if not (trainer.is_global_zero and self._records and self._folder and self.figure):
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("contrast", [str(self._folder / self.figure)])

    def state_dict(self) -> dict[str, Any]:
        """Keep the lines for a resumed run."""
        return {"records": self._records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the lines."""
        self._records = list(state_dict["records"])


def completion_gradients(module: GRPOModule, rollout: Rollout, sketch_dim: int | None) -> Tensor:
    """Take the gradient of each completion's mean log-probability, (1/|o|) sum_t log pi(o_t), by itself.

    Gradients that the parameters hold stay as they are.

    Args:
        module: The policy.
        rollout: B rows.
        sketch_dim: See `sketch`.

    Returns:
        Over what the optimiser trains, float32 (B, d).
    """
    parameters = module.trained_parameters()
    rows = []
    for row, (prompt, completion) in enumerate(
        zip(rollout.prompt_ids, rollout.completions.token_ids, strict=True)
    ):
        module.route(rollout.batch, [row])
        input_ids, attention_mask, _ = pad_pairs(
            [prompt], [completion], pad_token_id=module.pad_token_id, device=module.device
        )
        logits_1TV = completion_logits(
            module, input_ids, attention_mask, len(completion), module.sampling.temperature
        )
        total = token_logprobs(logits_1TV, input_ids[:, len(prompt) :]).sum()
        gradients = torch.autograd.grad(total / max(len(completion), 1), parameters, materialize_grads=True)
        rows.append(sketch(gradients, sketch_dim))
    return torch.stack(rows)


@contextmanager
def _unnoticed(trainer: lightning.Trainer, module: GRPOModule) -> Iterator[None]:
    """Undo what drawing and scoring leave behind: random numbers, counters, and what reward functions log."""
    random, counters = rng_state(), dict(module.counters())
    loop = trainer.fit_loop.epoch_loop
    results, loop._results = loop._results, _ResultCollection(training=True)
    try:
        yield
    finally:
        loop._results = results
        module.load_counters(counters)
        set_rng_state(random)


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    contrast = record["contrast"]
    values = {
        f"{name}/{group['group_size']}": group[name][0]
        for group in record["group_sizes"]
        for name in ("relative_variance", "signal_to_noise", "dead", "cosine")
    }
    values |= {name: contrast[name] for name in ("covariance", "p_value", "correlation", "remaining")}
    values |= {"permuted_covariance": contrast["permuted"][0], "success": record["success"]}
    return {name: math.nan if value is None else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    """Turn what JSON has no number for into null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
