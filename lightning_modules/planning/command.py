"""`quiver plan`: parses what `quiver fit` parses, and plans the run in place of running it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lightning_modules.planning.gpus import GPUS, find_gpu
from lightning_modules.planning.plan import plan_run
from lightning_modules.planning.ranks import read_ranks
from lightning_modules.planning.report import RunPlan
from lightning_modules.training_cli import QuiverCLI


class PlanCLI(QuiverCLI):
    """Makes module and data of a configuration, and neither a Trainer nor loggers nor folders."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return `fit` alone: a parser for each of the others takes time to make."""
        return {"fit": QuiverCLI.subcommands()["fit"]}

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Make module and data alone: a Trainer asks for the devices that it names."""
        configured = self.config.clone()
        configured["fit"].pop("trainer")
        self.config_init = self.parser.instantiate(configured)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def make_plan(arguments: Sequence[str]) -> RunPlan:
    """Plan a run.

    Args:
        arguments: As on the command line, after `quiver plan`.

    Raises:
        ValueError: If an option is out of range, or the run cannot be planned.
        SystemExit: If the configuration is wrong.
    """
    options, rest = _parser().parse_known_args(arguments)
    return _plan(options, rest)


def _plan(options: argparse.Namespace, rest: list[str]) -> RunPlan:
    gpu = find_gpu(options.gpu)
    if options.devices is not None and options.devices < 1:
        raise ValueError(f"devices={options.devices}: a run has at least one rank. Set --devices 1 or more.")
    leading = next((i for i, one in enumerate(rest) if one.startswith("-")), len(rest))
    configs = [word for name in rest[:leading] for word in ("-c", name)]
    if options.strategy:
        rest = [*rest, f"--trainer.strategy={options.strategy}"]
    cli = PlanCLI(["fit", *configs, *rest[leading:]])
    trainer: Any = cli.config["fit"]["trainer"]
    return plan_run(
        cli.model,
        cli.datamodule,
        read_ranks(trainer, options.devices),
        gpu,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quiver plan",
        usage="quiver plan CONFIG [CONFIG ...] [--devices N] [--gpu NAME] [any option of `quiver fit`]",
        description="Say what a run needs in memory and traffic, before anything is loaded.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", type=int, help="ranks in all; by default those of the configuration")
    add("--gpu", default="H100-80GB", help=f"{', '.join(GPUS)}, or a size such as 48GB")
    add("--strategy", choices=("ddp", "fsdp2"), help="in place of the configuration's")
    add("--prompt_tokens", type=int, default=256, help="length of a prompt (default: 256)")
    add(
        "--answer_tokens", type=int, default=256, help="length of an answer in supervised runs (default: 256)"
    )
    add("--json", action="store_true", help="print numbers, in bytes, as one line of JSON")
    return parser


def run(arguments: list[str]) -> int:
    """Print a plan.

    Args:
        arguments: What stands after `quiver plan`.

    Returns:
        0.
    """
    options, rest = _parser().parse_known_args(arguments)
    plan = _plan(options, rest)
    print(json.dumps(plan.data()) if options.json else plan)  # noqa: T201
    return 0
