"""FSDP2Strategy: `trainer.strategy: fsdp2`, data parallel with parameters, gradients and moments sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.optim import Optimizer

from lightning_modules.ranges import check_seconds, check_whole
from lightning_modules.sharded_files import write_sharded
from lightning_modules.sharding import (
    consolidated_tree,
    local_optimizer_state,
    shard_model,
    unsharded,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks, on GPUs and, with gloo, on CPUs.

    Lightning's `ModelParallelStrategy` leaves sharding to the module, and its defaults shard nothing. Here modules
    call `shard`, as `CausalLMModule` does; every rank reads rows of its own. A checkpoint has the same content as
    that of one process: whatever world size or strategy wrote it, any other can go on from it.

    Deviation from Lightning: checkpoints hold what the module's `on_save_checkpoint` puts there, with sharded
    tensors; the sharded form is safetensors and JSON, because torch's own unpickles its metadata.

    Args:
        replicas: How many copies of the sharded model there are (hybrid sharding): 1 shards over all ranks,
            `nodes` within each machine.
        save_distributed_checkpoint: Each rank writes its rows into a checkpoint folder. Else rank 0 gathers
            everything, tensor by tensor, into one file.
        param_dtype: Precision of computing; None is that of the weights.
        reduce_dtype: Precision of exchanging gradients; None is that of computing.
        cpu_offload: Shards, gradients and moments rest in the memory of the CPU.
        reshard_after_forward: Free gathered layers after the forward pass, or keep them divided over so many
            ranks until the backward pass.
        whole_for_generation: Gather the model once before completions are drawn and free it afterwards, so that
            each rank generates on its own. Needs memory for all weights on every rank. False gathers layer by
            layer for each token, all ranks in step.
        process_group_backend: `gloo` on CPUs, `nccl` on GPUs; None chooses.
        timeout: Seconds after which a rank that waits for others gives up.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        save_distributed_checkpoint: bool = False,
        param_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        reduce_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool | int = True,
        whole_for_generation: bool = True,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        if replicas != "nodes":
            check_whole("strategy fsdp2: replicas", replicas, hint="`nodes` makes one of each node.")
        if not isinstance(reshard_after_forward, bool):
            check_whole("strategy fsdp2: reshard_after_forward", reshard_after_forward)
        check_seconds("strategy fsdp2: timeout", timeout)
        super().__init__(
            data_parallel_size=1,  # all ranks, once they are known
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.replicas = replicas
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.mp_policy = MixedPrecisionPolicy(
            param_dtype=None if param_dtype is None else _DTYPES[param_dtype],
            reduce_dtype=None if reduce_dtype is None else _DTYPES[reduce_dtype],
        )
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.whole_for_generation = whole_for_generation

    # ------------------------------------------------------------------ ranks

    def setup_environment(self) -> None:
        """Make the process group, and the mesh of all ranks.

        Raises:
            ValueError: If ranks cannot be divided into `replicas` equal parts.
        """
        ranks = self.num_nodes * self.num_processes
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        if replicas < 1 or ranks % replicas:
            raise ValueError(
                f"strategy fsdp2: replicas={self.replicas} does not divide the {ranks} ranks into equal parts. "
                "Take a divisor, or `nodes`."
            )
        self._data_parallel_size = ranks
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # shards are exchanged where they rest
        super().setup_environment()
        self.mesh: DeviceMesh = self.device_mesh["data_parallel"]
        if replicas > 1:
            self.mesh = init_device_mesh(
                self.root_device.type,
                (replicas, ranks // replicas),
                mesh_dim_names=("replicas", "shards"),
            )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: what was learned is there when the optimiser is made, as under every other strategy."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: through `load_optimizer_state_dict`."""
        return True

    # ------------------------------------------------------------------ the model

    def shard(self, model: nn.Module, prepare: Callable[[nn.Module], None] | None = None) -> None:
        """Shard a transformers model in place.

        Args:
            model: The base model with adapters inside.
            prepare: Called with each layer just before it is divided, and last with the model.
        """
        pinned = self.root_device.type == "cuda"
        shard_model(
            model,
            self.mesh,
            mp_policy=self.mp_policy,
            offload_policy=CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else OffloadPolicy(),
            reshard_after_forward=self.reshard_after_forward,
            prepare=prepare,
        )

    def generating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which the model draws completions."""
        return unsharded(model) if self.whole_for_generation else nullcontext()

    def model_to_device(self) -> None:
        """Move what `shard` has not placed already."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device  # where its inputs go; shards stay on the CPU
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, buffer.to(self.root_device), persistent)

    def teardown(self) -> None:
        """End, and wait for a checkpoint that is still being written."""
        super().teardown()
        self.checkpoint_io.teardown()

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `on_save_checkpoint` of the module says what is kept."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `on_load_checkpoint` of the module has done it."""

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state with sharded tensors, numbered as in one process."""
        return dict(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore optimisers, each rank its rows."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(local_optimizer_state(optimizer, state))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint: one file, or a folder with a file of each rank. A collective."""
        path = Path(self.broadcast(filepath))
        if self.save_distributed_checkpoint:
            write_sharded(checkpoint, path)
            return
        gathered = consolidated_tree(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(gathered, path, storage_options=storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of either form. Tensors of a folder are read when they are used, row by row.

        Raises:
            ValueError: If it is broken or not complete.
        """
        path = Path(self.broadcast(checkpoint_path))
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(
            path, weights_only=weights_only is not False
        )
        return loaded


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=FSDP2Strategy.__doc__ or "")
