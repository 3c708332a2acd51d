"""Lets the configuration win over optimiser settings that a checkpoint brings along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def settings(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimiser's constructor arguments that are plain numbers, such as `lr` and `betas`."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in optimizer.defaults.items()
        if isinstance(value, bool | int | float | tuple)
    }


def override_restored(optimizer: Optimizer, saved: Mapping[str, Any], scheduler: Any = None) -> list[str]:
    """Put the configured settings back after a checkpoint has restored those of the run that wrote it.

    torch keeps `lr` and the like in the optimiser's state, so a resumed run would go on with the old ones
    whatever its configuration says. A learning rate is scaled, so that a schedule keeps its course.

    Args:
        optimizer: Built from the configuration, then restored.
        saved: `settings` of the earlier run's optimiser.
        scheduler: Its learning rate scheduler, if there is one.

    Returns:
        One line for each setting that differs.
    """
    changes = []
    for name, configured in settings(optimizer).items():
        if name not in saved or saved[name] == configured:
            continue
        changes.append(f"{name}: {saved[name]} in the checkpoint, {configured} in the configuration")
        for group in optimizer.param_groups:
            if name == "lr" and saved["lr"]:
                for key in ("lr", "initial_lr"):
                    if key in group:
                        group[key] *= configured / saved["lr"]
            else:
                group[name] = optimizer.defaults[name]
        if name == "lr" and saved["lr"] and scheduler is not None:
            scheduler.base_lrs = [lr * configured / saved["lr"] for lr in scheduler.base_lrs]
    return changes
