"""The LightningCLI behind `quiver fit|validate|test|predict`: the only file that knows all three packages."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
import warnings
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import lightning.pytorch as lightning
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

import callbacks
import datamodules
import lightning_modules
from lightning_modules.configs import find_config
from lightning_modules.distributed import gathered
from lightning_modules.errors import shorten
from lightning_modules.files import complete_file, set_aside

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
    "Experiment logs directory .* exists and is not empty",  # `before_fit` keeps the metrics it holds
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning calls it
    "`is_gradient_checkpointing` is deprecated",  # transformers calls it
):
    warnings.filterwarnings("ignore", message=message)
for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
    logging.getLogger(name).addFilter(lambda record: "💡 Tip" not in record.getMessage())


class NamedConfigFile(ActionConfigFile):  # type: ignore[misc]
    """A `-c` option that also takes the name of one of our configurations."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: Any) -> None:
        """Read the file that `value` names."""
        ActionConfigFile.apply_config(
            parser, cfg, dest, find_config(value) if isinstance(value, str) else value
        )


class QuiverParser(LightningArgumentParser):
    """A parser whose error is one line with a remedy, in place of two screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        if not self.exit_on_error:  # a parser inside another one
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = shorten(message).rstrip(".")
        self.exit(2, f"quiver: error: {text}. {_remedy(text, parser)}\n")


def _remedy(text: str, parser: LightningArgumentParser) -> str:
    """What to do about an error of the parser."""
    if "File does not exist" in text:
        return "`quiver configs` lists the configurations that come with quiver."
    if "are required" in text:
        return "Give a configuration: quiver fit -c FILE. `quiver configs` lists ours."
    classes = re.findall(r"class_path '([\w.]+)'", text)
    if option := re.search(r"[Oo]ption '([\w.]+)' is not accepted|not accept option '([\w.]+)'", text):
        known = {action.dest for action in parser._actions}
        if classes:
            known = _parameters(classes[-1])
        close = get_close_matches(option[1] or option[2], known, n=1)
    elif short_name := re.search(r"there is no class (\w+)", text):
        close = get_close_matches(
            short_name[1], [one.__name__ for one in PUBLIC_CLASSES if inspect.isclass(one)], n=1
        )
    else:
        close = []
    if close:
        return f"Did you mean {close[0]}?"
    command = parser.prog.replace(" [options]", "")
    part = re.match(r'Parser key "(model|data)"', text)
    options = f"--{part[1]}.help {classes[0]}" if part and len(classes) == 1 else "--help"
    return f"`{command} {options}` lists what there is."


def _parameters(class_path: str) -> set[str]:
    """Names of a class's constructor arguments, those included that it hands to its bases."""
    found = locate(class_path)
    bases = inspect.getmro(found) if inspect.isclass(found) else ()
    return {name for base in bases if "__init__" in vars(base) for name in inspect.signature(base).parameters}


class SaveConfig(SaveConfigCallback):
    """Writes the full configuration beside the run's other files, and to W&B. Earlier ones are kept."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write nothing yet: a run that fails before it starts leaves no file."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write `config.yaml`."""
        folder = trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        text = self.parser.dump(self.config, skip_none=False)
        target = Path(folder) / self.config_filename
        set_aside(target)
        with complete_file(target) as file:
            file.write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": text})


class QuiverCLI(LightningCLI):
    """LightningCLI with named configurations and without its surprises."""

    def __init__(self, args: list[str]) -> None:
        options = {"default_env": True, "env_prefix": "QUIVER"}
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
            trainer_defaults={"callbacks": [callbacks.GracefulStop()]},
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
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do not let hyper-parameters in a checkpoint override the YAML, as LightningCLI does by default."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Unpickle nothing from a checkpoint unless `--weights_only false` asks for it; Lightning would."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return {**arguments, "weights_only": arguments.get("weights_only") is not False}

    def _check_inputs(self, stage: str) -> None:
        """Meet problems of data and model before any logger or folder is made."""
        if isinstance(self.datamodule, datamodules.TextDataModule):
            self.datamodule.setup(stage)
        if isinstance(self.model, lightning_modules.CausalLMModule):
            self.model.check_source()

    def before_fit(self) -> None:
        """Check inputs, and keep files of an earlier run that would be deleted or mistaken for this one's."""
        self._check_inputs("fit")
        self._kept: dict[Path, Path] = {}
        trainer = self.trainer
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        csv_loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        targets = [Path(logger.log_dir) / "metrics.csv" for logger in csv_loggers]
        if not self.config["fit"].get("ckpt_path"):
            savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
            folders = [Path(one.dirpath) for one in savers if one.dirpath]
            targets += [folder / name for folder in folders for name in ("last.ckpt", "interrupted.ckpt")]
        for target in targets:
            if kept := set_aside(target):
                self._kept[target] = kept

    def after_fit(self) -> None:
        """Put back what a run without a step to do has not replaced."""
        for target, kept in self._kept.items():
            if target.name == "metrics.csv" and not target.exists():
                kept.rename(target)

    def before_validate(self) -> None:
        """Check inputs."""
        self._check_inputs("validate")

    def before_test(self) -> None:
        """Check inputs."""
        self._check_inputs("test")

    def before_predict(self) -> None:
        """Check inputs."""
        self._check_inputs("predict")

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
        0, or 130 when Ctrl-C or SIGTERM stopped the run.
    """
    # W&B would end with two screens of its own history, after the results of the run.
    os.environ.setdefault("WANDB_QUIET", "true")
    failed = 1
    try:
        cli = QuiverCLI(args)
        failed = 0
    finally:
        # A W&B run that stays open would swallow the next one of this process.
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=failed)
    stopped = any(
        isinstance(callback, callbacks.GracefulStop) and callback.stopped
        for callback in cli.trainer.callbacks  # type: ignore[attr-defined]
    )
    return 130 if stopped else 0
