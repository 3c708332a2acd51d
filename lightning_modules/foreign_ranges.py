"""Checks of the numbers of parts that are not ours: optimisers, schedules, PEFT configurations, the Trainer.

Their own checks let NaN, infinity or negative steps through, or come when the model is loaded.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from peft import PeftConfig
from torch import nn

from lightning_modules.ranges import check_number, check_whole

# Steps of a schedule's rehearsal: a few milliseconds.
_REHEARSED = 200
# Settings of optimisers by name. Others need to be finite only: Adafactor's decay is negative.
_NOT_NEGATIVE = {"lr", "weight_decay", "eps", "dampening", "rho", "lambd"}
_SHARES = {"momentum", "betas"}
_RANKS = {"r", "init_r", "target_r", "rank_pattern"}
_SCALES = {"lora_alpha", "alpha_pattern"}
_TRAINER_COUNTS = {
    "max_steps": -1,
    "max_epochs": -1,
    "min_steps": 0,
    "min_epochs": 0,
    "num_sanity_val_steps": -1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "reload_dataloaders_every_n_epochs": 0,
}


def rehearse(optimizer: Callable[..., Any], lr_scheduler: Callable[..., Any] | None) -> None:
    """Build optimiser and schedule over a small weight, before a model is loaded, and check their numbers.

    What needs the real weights is left for `check_optimizer` to check when it has them.

    Args:
        optimizer: Takes parameters.
        lr_scheduler: Takes the optimiser.

    Raises:
        ValueError: If one refuses its numbers, one of these is out of range, or a learning rate of the first steps is
            negative or not finite.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the schedule: that nothing was trained
        built = _build("optimizer", optimizer, [nn.Parameter(torch.zeros(2, 2))])
        if built is None:
            return
        check_optimizer(built)
        schedule = None if lr_scheduler is None else _build("lr_scheduler", lr_scheduler, built)
        if schedule is None:
            return
        _check_schedule(schedule)
        for _ in range(_REHEARSED):
            check_optimizer(built)
            try:
                built.step()
                schedule.step()
            except (ZeroDivisionError, OverflowError) as error:
                raise ValueError(f"lr_scheduler: {error}. Give it a positive number of steps.") from None
            except Exception:  # its steps are over, or it needs a loss
                return


def _build(name: str, make: Callable[..., Any], argument: Any) -> Any:
    try:
        return make(argument)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{name}: {str(error).rstrip('.')}. Correct its settings.") from None
    except Exception:
        return None


def check_optimizer(optimizer: Any) -> None:
    """Check the numbers of all parameter groups.

    Raises:
        ValueError: If one is not finite, or out of its range.
    """
    for group in optimizer.param_groups:
        for name, value in group.items():
            least = 0 if name in _NOT_NEGATIVE | _SHARES else None
            below = 1 if name in _SHARES else None
            if name != "params":
                for place, number in _numbers(f"optimizer.{name}", value):
                    check_number(place, number, least=least, below=below)


def _check_schedule(schedule: Any) -> None:
    """Check the settings of a schedule, and of those that it is made of."""
    settings = inspect.signature(type(schedule)).parameters.keys() - {"optimizer", "last_epoch"}
    for name in settings & vars(schedule).keys():
        for place, number in _numbers(f"lr_scheduler.{name}", getattr(schedule, name)):
            check_number(place, number, least=0)
    for part in getattr(schedule, "_schedulers", []):
        _check_schedule(part)


def check_peft(config: PeftConfig) -> None:
    """Check the numbers of a PEFT configuration.

    Raises:
        ValueError: If one is NaN or infinite, or out of its range.
    """
    usual: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(config)}
    for name, value in vars(config).items():
        default = usual.get(name)
        for place, number in _numbers(f"adapter.{name}", value):
            if name in _RANKS:  # a default of 0 leaves the rank to another setting
                check_whole(place, number, least=0 if default == 0 else 1)
            elif name in _SCALES:
                check_number(place, number, above=0)
            elif "dropout" in name:
                check_number(place, number, least=0, below=1)
            else:  # a negative default leaves the number to PEFT
                check_number(place, number, least=min(default, 0) if isinstance(default, int | float) else 0)


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Check the numbers of a Trainer that Lightning lets through.

    Args:
        settings: By the names of Trainer's arguments. Those that are missing or None are Lightning's defaults.

    Raises:
        ValueError: If one is out of range.
    """
    hint = "Leave it out for Lightning's default."
    for name, least in _TRAINER_COUNTS.items():
        check_whole(f"trainer.{name}", settings.get(name), least=least, none=True, hint=hint)
    check_number(
        "trainer.gradient_clip_val", settings.get("gradient_clip_val"), above=0, none=True, hint=hint
    )
    interval = settings.get("val_check_interval")
    if isinstance(interval, int | float):  # else a time
        check_number("trainer.val_check_interval", interval, above=0, hint=hint)


def check_trainer_of(trainer: lightning.Trainer) -> None:
    """Check the numbers of a Trainer that was built without the command line.

    Raises:
        ValueError: If one is out of range.
    """
    names = [*_TRAINER_COUNTS, "gradient_clip_val", "val_check_interval"]
    settings = {name: getattr(trainer, name, None) for name in names}
    if settings["num_sanity_val_steps"] == float("inf"):  # how a Trainer keeps -1
        settings["num_sanity_val_steps"] = None
    check_trainer(settings)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """Find the numbers in nested lists, mappings and dataclasses, with their places. Bools are switches."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(f"{name}[{key!r}]", one)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _numbers(f"{name}[{number}]", one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
