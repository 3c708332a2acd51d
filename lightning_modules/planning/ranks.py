"""What a Trainer's configuration says of ranks, sharding and precision, without making a Trainer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_modules.fsdp2 import FSDP2Strategy
from lightning_modules.precision import check_precision

Strategy = Literal["single", "ddp", "fsdp2"]
_SINGLE = ("auto", "SingleDeviceStrategy")


@dataclass(frozen=True)
class Ranks:
    """Where a model runs.

    Attributes:
        devices: Ranks.
        strategy: What they share.
        replicas: Copies of a sharded model.
        param_dtype: Precision in which sharded weights compute; None is their own.
        reduce_dtype: Precision in which their gradients are exchanged; None is that of computing.
        cpu_offload: Whether shards, gradients and moments rest in the memory of the host.
        reshard_after_forward: Whether gathered layers are freed after the forward pass, or what part stays.
        whole_for_generation: Whether completions are drawn from a gathered model.
        bucket_view: Whether DDP keeps gradients in its buckets, not beside them.
        autocast: Precision of a mixed-precision run.
        on_gpu: Whether the run is for GPUs, where optimisers work on all parameters at once.
    """

    devices: int
    strategy: Strategy
    replicas: int = 1
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    reshard_after_forward: bool | int = True
    whole_for_generation: bool = True
    bucket_view: bool = False
    autocast: torch.dtype | None = None
    on_gpu: bool = True

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the state."""
        return self.devices // self.replicas if self.strategy == "fsdp2" else 1


def read_ranks(trainer: Any, devices: int | None) -> Ranks:
    """Read the `trainer:` part of a configuration.

    Args:
        trainer: Its parsed form.
        devices: Ranks in all; None takes `devices` x `num_nodes` of the configuration.

    Raises:
        ValueError: If ranks are no number, the strategy cannot be planned, or no run can have the precision.
    """
    nodes = int(trainer.get("num_nodes") or 1)
    if devices is None:
        configured = trainer.get("devices")
        if isinstance(configured, list):
            configured = len(configured)
        if configured not in (None, "auto", "-1", -1) and not str(configured).isdigit():
            raise ValueError(f"trainer.devices={configured!r}: give the number of ranks as --devices.")
        devices = nodes * (int(configured) if str(configured).isdigit() else 1)
    if devices < 1:
        raise ValueError(f"devices={devices}: a run has at least one rank. Set --devices 1 or more.")
    name, options = _strategy(trainer.get("strategy"))
    autocast = torch.bfloat16 if check_precision(trainer.get("precision")) else None
    accelerator = trainer.get("accelerator")
    on_gpu = not (accelerator == "cpu" or "CPU" in str(getattr(accelerator, "class_path", "")))
    if name == "fsdp2":
        return Ranks(devices, "fsdp2", **_fsdp2(options, devices, nodes), autocast=autocast, on_gpu=on_gpu)
    if name == "ddp" or (name == "single" and devices > 1):
        view = bool(options.get("gradient_as_bucket_view", False))
        return Ranks(devices, "ddp", bucket_view=view, autocast=autocast, on_gpu=on_gpu)
    return Ranks(devices, "single", autocast=autocast, on_gpu=on_gpu)


def _strategy(configured: Any) -> tuple[Strategy, dict[str, Any]]:
    class_path = getattr(configured, "class_path", None)
    options = dict(getattr(configured, "init_args", None) or {}) | dict(
        getattr(configured, "dict_kwargs", None) or {}
    )
    name = str(class_path or configured or "auto").rpartition(".")[2]
    if name in _SINGLE:
        return "single", options
    if name in ("fsdp2", FSDP2Strategy.__name__):
        return "fsdp2", options
    if name == "DDPStrategy" or name == "ddp" or name.startswith("ddp_"):
        return "ddp", options
    raise ValueError(
        f"strategy={name!r} cannot be planned. Use ddp or fsdp2, or plan with --strategy ddp or --strategy fsdp2."
    )


def _fsdp2(options: dict[str, Any], devices: int, nodes: int) -> dict[str, Any]:
    known = inspect.signature(FSDP2Strategy).parameters
    found = {name: options.get(name, one.default) for name, one in known.items()}
    replicas = nodes if found.get("replicas") == "nodes" else int(found.get("replicas") or 1)
    if replicas < 1 or devices % replicas:
        raise ValueError(f"replicas={replicas} does not divide devices={devices}. Take a divisor.")
    return {
        "replicas": replicas,
        "param_dtype": _dtype(found.get("param_dtype")),
        "reduce_dtype": _dtype(found.get("reduce_dtype")),
        "cpu_offload": bool(found.get("cpu_offload")),
        "reshard_after_forward": found.get("reshard_after_forward", True),
        "whole_for_generation": bool(found.get("whole_for_generation", True)),
    }


def _dtype(name: str | None) -> torch.dtype | None:
    found: torch.dtype | None = None if name is None else getattr(torch, name)
    return found
