"""The LightningCLI behind `quiver fit|validate|test|predict`: the only file that knows all three packages."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

import callbacks
import datamodules
import lightning_modules
from callbacks.rank_watch import follow_parent
from lightning_modules.configs import find_config
from lightning_modules.distributed import gathered
from lightning_modules.files import complete_file, set_aside
from lightning_modules.guarded_cli import GuardedCLI
from lightning_modules.hparams import withhold_secrets
from lightning_modules.latest import latest_checkpoint
from lightning_modules.parsing import NamedConfigFile, QuiverParser
from lightning_modules.precision import check_precision
from lightning_modules.secrets import (
    REDACTED,
    redacted_yaml,
    remember,
    secret_places,
    secrets_in,
    secrets_in_arguments,
)

# Short class names resolve among imported classes, so each public one is imported here.
PUBLIC_CLASSES = [
    getattr(package, name)
    for package in (lightning_modules, datamodules, callbacks)
    for name in package.__all__
]

# What these warn of is intended here, or is not ours to change.
for message in (
    "Using ModelCheckpoint with manual optimization",  # the state after the update is the one to resume from
    "`loftq_config` specified but will be ignored",  # jsonargparse spells out every default of LoraConfig
    "Found .* module.* in eval mode at the start of training",  # GRPO trains without dropout
    "`LightningModule.configure_optimizers` returned `None`",  # LoraHub searches without gradients
    "COBYLA: Invalid RHOEND",  # from inside nevergrad
    "Attribute .* is an instance of `nn.Module`",  # a router before it meets its experts; it is written as text
    "Total length of `list` across ranks is zero",  # a data set without validation rows
    "Experiment logs directory .* exists and is not empty",  # `take_folders` keeps the metrics it holds
    "Checkpoint directory .* exists and is not empty",  # of ours, it holds our lock; nothing is overwritten
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning calls it
    "`is_gradient_checkpointing` is deprecated",  # transformers calls it
):
    warnings.filterwarnings("ignore", message=message)
for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
    logging.getLogger(name).addFilter(lambda record: "💡 Tip" not in record.getMessage())


QuiverParser.class_names = [one.__name__ for one in PUBLIC_CLASSES if inspect.isclass(one)]


class SaveConfig(SaveConfigCallback):
    """Writes the full configuration, without secrets, beside the run's other files, and to W&B.

    Earlier ones are kept.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write nothing yet: a run that fails before it starts leaves no file."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write `config.yaml`."""
        folder = trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        text = redacted_yaml(self.parser.dump(self.config, skip_none=False))
        target = Path(folder) / self.config_filename
        set_aside(target)
        with complete_file(target) as file:
            file.write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": text})


class QuiverCLI(GuardedCLI):
    """LightningCLI with named configurations and without its surprises."""

    def __init__(self, args: list[str]) -> None:
        # Without abbreviations, a typo is no other option.
        options = {"default_env": True, "env_prefix": "QUIVER", "allow_abbrev": False}
        for name in (
            "QUIVER_CONFIG",
            *(f"QUIVER_{command.upper()}__CONFIG" for command in self.subcommands()),
        ):
            if name in os.environ:  # jsonargparse reads it without asking NamedConfigFile
                os.environ[name] = find_config(os.environ[name])
        super().__init__(
            lightning.LightningModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            seed_everything_default=42,
            parser_class=QuiverParser,
            parser_kwargs={"prog": "quiver", **options, **dict.fromkeys(self.subcommands(), options)},
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose `-c` finds our configurations by name."""
        kwargs.setdefault("dump_header", [f"lightning=={version('lightning')}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=NamedConfigFile,
            help="A YAML file, or the name of one of ours. Repeatable.",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`, without LightningCLI's warning about a program that was started with others."""
        QuiverParser.files = []
        self.config = parser.parse_args(args)
        settings = self.config.as_dict()
        remember(secrets_in(settings))
        if places := secret_places(settings):
            parser.error(
                f"{places[0]} is {REDACTED!r}, as Quiver writes in place of a key or password. Give it in a "
                "further -c file or in the environment"
            )

    def instantiate_classes(self) -> None:
        """Build everything; the classes get the secrets, checkpoints and loggers do not."""
        super().instantiate_classes()
        for part in (self.model, self.datamodule):
            if part is not None:
                withhold_secrets(part)

    def _instantiate_trainer(
        self, config: dict[str, Any], extra: list[lightning.Callback]
    ) -> lightning.Trainer:
        """Refuse a precision before Lightning replaces it, as 16-mixed on CPUs, or asks for packages."""
        if isinstance(self.model, lightning_modules.CausalLMModule):
            check_precision(config["precision"])
        return super()._instantiate_trainer(config, extra)

    def _parse_ckpt_path(self) -> None:
        """Do not let hyper-parameters in a checkpoint override the YAML, as LightningCLI does by default."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Unpickle nothing from a checkpoint unless `--weights_only false` asks for it; Lightning would."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return {
            **arguments,
            "ckpt_path": self.config[subcommand].get("ckpt_path"),  # `latest` has a name by now
            "weights_only": arguments.get("weights_only") is not False,
        }

    def _find_latest(self, command: str) -> None:
        """Put the newest complete checkpoint in place of `--ckpt_path latest`; nothing if there is none yet.

        Raises:
            ValueError: If no folder of checkpoints is known, or there is nothing to validate, test or predict with.
        """
        if self.config[command].get("ckpt_path") != "latest":
            return
        savers = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        folders = [Path(one.dirpath) for one in savers if one.dirpath]
        if not folders:
            raise ValueError(
                "ckpt_path: latest looks in the dirpath of ModelCheckpoint, and none is set: Lightning gives each run "
                "a new folder. Name the checkpoint's file, and from the first run on set "
                "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.dirpath=FOLDER."
            )
        found = latest_checkpoint([*folders, Path(self.trainer.default_root_dir)])
        if found is None and command != "fit":
            raise ValueError(
                f"ckpt_path: latest: there is no checkpoint in {folders[0]}. Train first: quiver fit."
            )
        self.config[command]["ckpt_path"] = None if found is None else str(found)
        if self.trainer.is_global_zero:
            what = (
                f"Going on from {found}." if found else f"No checkpoint in {folders[0]} yet: starting anew."
            )
            sys.stderr.write(what + "\n")

    def _check_checkpoint(self, command: str) -> None:
        """Check that a checkpoint that was named is there.

        Raises:
            FileNotFoundError: If it is not.
        """
        place = self.config[command].get("ckpt_path")
        if place is None or "://" in str(place) or place in ("best", "last", "hpc", "registry"):
            return
        if not Path(place).exists():
            raise FileNotFoundError(
                f"ckpt_path: there is no checkpoint {place}. latest takes the newest one of the run."
            )

    def _check_inputs(self, stage: str) -> None:
        """Meet problems of data, model and checkpoint before any logger or folder is made."""
        self._find_latest(stage)
        self._check_checkpoint(stage)
        if isinstance(self.datamodule, datamodules.TextDataModule):
            self.datamodule.setup(stage)
        if isinstance(self.model, lightning_modules.CausalLMModule):
            check_precision(self.trainer.precision)  # that of a plugin or strategy
            self.model.check_source()

    def before_fit(self) -> None:
        """Check inputs, take the run's folders, and start its W&B run."""
        self._check_inputs("fit")
        self.take_folders("fit")
        self.own_callback(callbacks.WandbRun).begin(self.trainer, self.config["fit"].get("ckpt_path"))

    def before_validate(self) -> None:
        """Check inputs."""
        self._check_inputs("validate")
        self.take_folders("validate")

    def before_test(self) -> None:
        """Check inputs."""
        self._check_inputs("test")
        self.take_folders("test")

    def before_predict(self) -> None:
        """Check inputs."""
        self._check_inputs("predict")
        self.take_folders("predict")

    def predict(self, **arguments: Any) -> None:
        """Print one JSON line per row: `uid`, `prompt`, `completion`."""
        batches = self.trainer.predict(**arguments) or []
        mine = [row for batch in batches for row in batch]
        rows = [row for part in gathered(mine) for row in part]
        if self.trainer.is_global_zero:
            for row in rows:
                print(json.dumps(row, ensure_ascii=False))  # noqa: T201


def run(args: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        args: The command and its options.

    Returns:
        0; or, of rank 0, 130 when Ctrl-C and 143 when SIGTERM stopped the run.
    """
    follow_parent()
    # W&B would end with two screens of its own history, after the results of the run.
    os.environ.setdefault("WANDB_QUIET", "true")
    # Without W&B a run goes on: it must not wait for it at its start, nor for hours at its end.
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
    if given := secrets_in_arguments(args):
        remember(given)
        os.environ["WANDB_X_DISABLE_META"] = "true"  # W&B would write the command line
    failed = 1
    try:
        cli = QuiverCLI(args)
        failed = 0
    finally:
        # A W&B run that stays open would swallow the next one of this process.
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            folder = Path(wandb.run.dir).parent
            try:
                wandb.finish(exit_code=failed)
            except Exception as error:  # of its own process or its server; the run itself has ended
                sys.stderr.write(f"W&B did not end well ({error}). To upload the run: wandb sync {folder}\n")
    stop = cli.own_callback(callbacks.GracefulStop)
    # The other ranks end with 0: a launcher that sees an error kills rank 0 while it still writes.
    return 128 + stop.number if stop.stopped and cli.trainer.is_global_zero else 0
