"""GuardedCLI: a LightningCLI whose runs own their folders, and say in a line what ended them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

import callbacks
from callbacks.graceful_stop import StoppedError
from lightning_modules.files import DISK_ERRORS, set_aside
from lightning_modules.foreign_ranges import check_trainer
from lightning_modules.ranges import check_whole
from lightning_modules.run_folder import taken

# The guards of every run.
DEFAULT_CALLBACKS = (callbacks.RankWatch, callbacks.RunNumber, callbacks.GracefulStop, callbacks.WandbRun)
OneOfOurs = TypeVar("OneOfOurs", bound=lightning.Callback)


class GuardedCLI(LightningCLI):
    """LightningCLI with guards against what can go wrong around a run.

    `before_<command>` hooks of a subclass call `take_folders`.
    """

    def take_folders(self, command: str) -> None:
        """Take the folders that a command writes to, and keep files of an earlier run.

        These are files that would be deleted, or mistaken for this run's.
        """
        trainer = self.trainer
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics = [Path(one.log_dir) for one in trainer.loggers if isinstance(one, CSVLogger)]
        folders = list(metrics)
        if command == "fit":
            savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
            saved = [Path(one.dirpath) for one in savers if one.dirpath and "://" not in str(one.dirpath)]
            folders += [Path(trainer.log_dir or trainer.default_root_dir), *saved]
        for folder in dict.fromkeys(one.resolve() for one in folders):
            self._at_end.enter_context(taken(folder))
        for folder in metrics:
            # Lightning deletes what it finds there, also where it will write nothing.
            if kept := set_aside(folder / "metrics.csv"):
                beside = None if command == "fit" else folder / f"metrics-{command}.csv"
                self._at_end.callback(_put_back, kept, folder / "metrics.csv", beside)

    def own_callback(self, kind: type[OneOfOurs]) -> OneOfOurs:
        """Return the callback of a class of ours that every run has."""
        return next(one for one in self.trainer.callbacks if isinstance(one, kind))  # type: ignore[attr-defined]

    def _set_seed(self) -> None:
        """Check the seed too, whose error in Lightning names no argument."""
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool):
            check_whole("seed_everything", seed, least=0, most=2**32 - 1, none=True)
        super()._set_seed()

    def _instantiate_trainer(
        self, config: dict[str, Any], extra: list[lightning.Callback]
    ) -> lightning.Trainer:
        """Check its numbers; leave out our default callbacks of which the configuration has one."""
        check_trainer(config)
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        ours = [one() for one in DEFAULT_CALLBACKS if one not in map(type, given)]
        # The watch first, so that it hears of an error before others act on it; the others see a step's end last.
        config["callbacks"] = [*(one for one in ours if isinstance(one, callbacks.RankWatch)), *given]
        last = [one for one in ours if not isinstance(one, callbacks.RankWatch)]
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": last}
        return super()._instantiate_trainer(config, extra)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command in folders of its own.

        Raises:
            RankDeathError: If another rank ended it.
            OSError: If a disk did, with the file and a remedy; or a worker process of a loader.
            ValueError: If somebody's function called `sys.exit`: with code 0 the command would seem to succeed.
        """
        with ExitStack() as self._at_end:
            try:
                super()._run_subcommand(subcommand)
            except StoppedError:
                pass
            except SystemExit as error:
                # Lightning makes Ctrl-C an exit, and SIGTERM.
                if isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt):
                    raise
                frame, line = list(walk_tb(error.__traceback__))[-1]
                raise ValueError(
                    f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {line}) called sys.exit({error.code!r}) "
                    f"during `quiver {subcommand}`, which ended it. Let it return, or raise an error."
                ) from None
            except Exception as error:
                if died := self.own_callback(callbacks.RankWatch).died:
                    raise died from None
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise OSError(self._disk_message(error)) from None
                if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
                    raise ChildProcessError(
                        f"{str(error).rstrip('. ')}. A worker process of the data loader died; often memory ran "
                        "out (see dmesg). Lower its num_workers; 0 shows the error of a worker that crashed."
                    ) from None
                raise

    def _disk_message(self, error: OSError) -> str:
        place = error.filename
        if place is None:
            places = [Path(frame.f_code.co_filename).stem for frame, _ in walk_tb(error.__traceback__)]
            loggers = [one for one in self.trainer.loggers if isinstance(one, CSVLogger)]
            place = f"{loggers[0].log_dir}/metrics.csv" if "csv_logs" in places and loggers else "A file"
        return (
            f"{place} cannot be written: {error.strerror}. Earlier checkpoints are as they were. Free some space, "
            "or name a folder on another disk, and go on from the latest one: --ckpt_path latest."
        )


def _put_back(kept: Path, target: Path, beside: Path | None) -> None:
    """Give a file its name back: if no other has taken it, or if there is a place beside it for that other."""
    if beside is not None and target.exists():
        set_aside(beside)
        target.rename(beside)
    if not target.exists():
        kept.rename(target)
