"""Every number that a configuration can hold has its range checked, also one that is added tomorrow."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

import pytest

import callbacks
import datamodules
import lightning_modules
from lightning_modules import cli
from lightning_modules.merging.methods import METHODS, check_options

NAN, INF = math.nan, math.inf
# What no argument takes, whatever its range.
NEVER = {float: [NAN, -INF, True, "0.5", 10**400], int: [NAN, -INF, INF, True, "2", 2.5, 10**30]}

# Arguments that must be there before a number can be tried.
LIBRARY = {"library": "nowhere"}
NEEDED: dict[str, dict[str, Any]] = {
    "StuckCallWatch": {"repeat": 1.0},
    "CausalLMModule": {"model": "nowhere"},
    "PolicyUpdates": {"model": "nowhere"},
    "RolloutEvaluation": {"model": "nowhere"},
    "SFTModule": {"model": "nowhere"},
    "GRPOModule": {"model": "nowhere", "rewards": [len]},
    "SparseAdapterModule": {"model": "nowhere"},
    "AdapterLibraryModule": {"model": "nowhere", "router": lightning_modules.UniformRouter()},
    "LoraHubModule": {"model": "nowhere", **LIBRARY},
    "RoutedAdapter": {"router": lightning_modules.UniformRouter()},
    "Resampling": {"live_groups": 2, "max_rollouts": 8},
    "LengthReward": {"target": 1, "maximum": 2},
    "HubDataModule": {"path": "nowhere"},
    "JsonlDataModule": {"train_file": "nowhere"},
    "MultiTaskDataModule": {"folder": "nowhere"},
    "ReasoningGymDataModule": {"tasks": ["leg_counting"]},
    "TrainingAlarm": {"max_kl": 1.0},
    "merge_experts": {"method": "average"},
}
# Numbers below zero that mean something.
NEGATIVE = {
    ("Scoring", "weights"): "a penalty",
    ("Scoring", "success"): "rewards may be negative",
    ("WeightsRouter", "weights"): "an expert may be subtracted, as LoraHub does",
    ("ArrowRouter", "threshold"): "a score over the norm of the input",
    ("SpectralRouter", "threshold"): "a score over the norm of the input",
    ("CentroidRouter", "threshold"): "a score over the norm of the input",
    ("RetrievalRouter", "threshold"): "a cosine",
    ("show_rollouts", "min_reward"): "rewards may be negative",
    ("show_rollouts", "max_reward"): "rewards may be negative",
    ("show_rollouts", "success"): "rewards may be negative",
    **{(name, "scale"): "changes may be subtracted (task arithmetic)" for name in METHODS},
}
# Infinity that bounds nothing.
INFINITE = {
    ("ClippedSurrogate", "clip"),
    ("CISPO", "clip"),
    ("GMPO", "clip"),
    ("TruncatedImportance", "cap"),
    ("MaskedImportance", "bounds"),
}
# Results, intermediate states and parts that our own code makes: no configuration holds them.
INTERNAL = set(
    """
    GroupSizeStatistics ContrastCovariance Rewards Group Row Plan Pool RewardWatch Rollout Sample RolloutFile
    GuardedCLI Clusters LoopedDispatch TiledDispatch GroupedDispatch AdapterEntry Base FoundAdapter
    LoraStack WeightSearch SparseStack LeanLoraLinear Part Parameter Traffic Gpu Phase Ranks RunPlan
    StepShape SharedRows Completions RowBatch Decoding Served VLLMClient SavedPolicy Drawn SavedTensor Rule
    WeightStats TextBatch TrainLoader EvalLoader History Audit RoutingState Rounding Selection
    """.split()  # noqa: SIM905
)


def public_classes() -> list[type]:
    found = []
    for package in (lightning_modules, datamodules, callbacks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            members = vars(importlib.import_module(module.name))
            found += [
                one
                for name, one in members.items()
                if inspect.isclass(one) and one.__module__ == module.name and not name.startswith("_")
            ]
    # NamedTuples are results too.
    return [
        one for one in found if not issubclass(one, tuple | BaseException) and not inspect.isabstract(one)
    ]


def commands() -> list[Callable[..., Any]]:
    places = [one.split(":") for one in (*cli.LIGHT_COMMANDS.values(), *cli.LIBRARY_COMMANDS.values())]
    return [getattr(importlib.import_module(module), name) for module, name in places]


def filled(annotation: Any, kind: type, number: Any, default: Any = None) -> list[Any]:
    """Every value of a type in which one number of a kind is the given one."""
    if annotation is kind:
        return [number]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return [one for part in parts for one in filled(part, kind, number, default)]
    if origin is tuple and Ellipsis not in parts:
        values = default or (1.0,) * len(parts)
        return [
            (*values[:place], one, *values[place + 1 :])
            for place, part in enumerate(parts)
            for one in filled(part, kind, number)
        ]
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return [{"one": one} for one in filled(parts[1], kind, number)]
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return [[one] for one in filled(parts[0], kind, number)]
    return []


def numeric_arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return [one for one in parameters if any(filled(one.annotation, kind, 0) for kind in (float, int))]


def mistakes(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Arguments of a function with values that they must refuse."""
    found = []
    for one in numeric_arguments(function):
        key = (function.__name__, one.name)
        default = None if one.default is one.empty else one.default
        also = [*([] if key in NEGATIVE else [-1]), *([] if key in INFINITE else [INF])]
        for kind, numbers in NEVER.items():
            for number in [*numbers, *also]:
                # A union with text or a switch gives these a meaning.
                if not (type(number) in (str, bool) and type(number) in get_args(one.annotation)):
                    found += [(one.name, value) for value in filled(one.annotation, kind, number, default)]
    return found


def assert_refused(function: Callable[..., Any], call: Callable[..., Any]) -> None:
    for name, value in mistakes(function):
        try:
            call(**{name: value})
        except ValueError as error:
            message = str(error)
            assert name in message, message
            assert "must be" in message, message
            assert "\n" not in message, message
            assert len(message) < 250, message
        else:
            pytest.fail(f"{function.__name__} takes {name}={value!r:.50}")


CONFIGURABLE = [one for one in public_classes() if one.__name__ not in INTERNAL and numeric_arguments(one)]


@pytest.mark.parametrize("kind", CONFIGURABLE, ids=lambda one: one.__name__)
def test_a_class_refuses_numbers_out_of_range(kind, recwarn):
    needed = NEEDED.get(kind.__name__, {})
    kind(**needed)
    assert_refused(kind, lambda **number: kind(**{**needed, **number}))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda one: one.__name__)
def test_a_method_of_merging_refuses_options_out_of_range(method):
    check_options(method, {})
    assert_refused(method, lambda **option: check_options(method, option))


@pytest.mark.parametrize(
    "command", [one for one in commands() if numeric_arguments(one)], ids=lambda one: one.__name__
)
def test_a_command_refuses_numbers_before_it_reads_anything(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = {
        one.name: [] if "list" in str(one.annotation) else "nowhere"
        for one in inspect.signature(command).parameters.values()
        if one.default is one.empty
    } | NEEDED.get(command.__name__, {})
    assert_refused(command, lambda **number: command(**{**needed, **number}))
    assert not list(tmp_path.iterdir())


def test_the_lists_above_name_what_there_is():
    classes = {one.__name__: one for one in public_classes()}
    assert classes.keys() >= INTERNAL
    names = classes.keys() | METHODS.keys() | {one.__name__ for one in commands()}
    assert names >= NEEDED.keys() | {name for name, _ in NEGATIVE} | {name for name, _ in INFINITE}
    for name, argument in [*NEGATIVE, *INFINITE]:
        if name in classes:
            assert argument in inspect.signature(classes[name]).parameters
