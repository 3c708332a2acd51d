"""Hooks of Lightning that a class overrides call those of its parents, which do something too."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import lightning.pytorch as lightning

import callbacks
import datamodules
import lightning_modules
from lightning_modules.library.lorahub import LoraHubModule

ROOTS = (lightning.LightningModule, lightning.Callback, lightning.LightningDataModule)
ON_PURPOSE = ["SaveConfig.setup overrides SaveConfigCallback's"]  # which writes before the run has started
HOOK = re.compile(r"(on_\w+|setup|teardown|configure_model|state_dict|load_state_dict)$")


def classes():
    for package in (lightning_modules, callbacks, datamodules):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            for one in vars(module).values():
                if inspect.isclass(one) and one.__module__ == found.name and issubclass(one, ROOTS):
                    yield one


def lacking(cls) -> list[str]:
    """Hooks that a class overrides without its parent's, where the parent's is more than Lightning's empty one."""
    missing = []
    for name, method in vars(cls).items():
        if not HOOK.match(name) or not inspect.isfunction(method):
            continue
        parent = next((base for base in cls.__mro__[1:] if name in vars(base)), None)
        empty = parent is None or parent.__module__.startswith("lightning.pytorch.core") or parent in ROOTS
        if not empty and f"super().{name}(" not in inspect.getsource(method):
            missing.append(f"{cls.__qualname__}.{name} overrides {parent.__qualname__}'s")
    return missing


def test_every_override_calls_its_parent():
    found = list(classes())
    assert LoraHubModule in found
    assert len(found) > 15
    assert [line for cls in found for line in lacking(cls)] == ON_PURPOSE


def test_the_check_finds_what_is_missing():
    class Forgetful(LoraHubModule):
        def setup(self, stage):
            pass

    assert lacking(Forgetful) == [f"{Forgetful.__qualname__}.setup overrides LoraHubModule's"]
