"""The Adapter seam: what is learned on top of a base model, and nothing else of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.batches import Prompt
from lightning_modules.checksums import write_checksums
from lightning_modules.files import complete_folder
from lightning_modules.foreign_ranges import check_peft
from lightning_modules.lora import make_lean
from lightning_modules.ranks import is_first_rank
from lightning_modules.sharding import consolidated, copy_rows, read, sharded_like


class Adapter(ABC):
    """What is learned. Every module works with every adapter through these five methods.

    An adapter is used once: `attach` comes first and binds it to one model.

    Attributes:
        source: The base model, as the user named it; the module sets it before `attach`.
        purpose: What it is trained on, as any text; the module sets it before `attach`, where the data are known and
            `draws_by_purpose` is set. Random choices of adapters differ with it.
        draws_by_purpose: Whether `attach` uses `purpose`.
        choices: How often other entries than before were chosen to be trained since `attach`.
        moves_entries: Whether that can happen after something was learned.
        compute_dtype: Type in which the model computes, likewise; None is that of its weights.
        reads_weights: Whether `attach` reads base weights, which under sharding may not be in memory yet.
        joins_shards: Whether `attach` takes a model that is sharded already; else it comes before.
    """

    source: str | None = None
    purpose: str = ""
    draws_by_purpose: bool = False
    choices: int = 0
    moves_entries: bool = False
    compute_dtype: torch.dtype | None = None
    reads_weights: bool = False
    joins_shards: bool = False

    @abstractmethod
    def attach(self, model: nn.Module) -> nn.Module:
        """Make `model` carry this adapter.

        Args:
            model: A freshly loaded `transformers` causal language model.

        Returns:
            The model to call. Exactly the parameters to be trained require gradients.
        """

    @abstractmethod
    def disabled(self) -> AbstractContextManager[Any]:
        """Return a context in which the model is the base model: the reference policy of a KL term."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return only what was learned, indices included, where it lies: each rank its rows of sharded tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return only what was learned, indices included, in whole tensors; a collective under sharding."""
        return consolidated(self.tensors())

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: Whole tensors, or tensors in the files of a checkpoint, by name.

        Raises:
            ValueError: If a tensor is missing, unknown, or of another shape.
        """

    @abstractmethod
    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the files of this adapter into an existing folder.

        Args:
            folder: Where to.
            state: What `state_dict` returns; None asks for it. Under sharding all ranks ask, and one writes.
        """

    def watch(self, optimizer: Optimizer, epoch: Callable[[], int] = lambda: 0) -> None:  # noqa: B027
        """Follow an optimiser's steps. Most adapters have no need to.

        Args:
            optimizer: What trains the parameters of this adapter.
            epoch: Returns the number of the running epoch, from 0.
        """

    def route(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> None:  # noqa: B027
        """Hear which rows the next forward passes are about. Most adapters treat all rows alike.

        Args:
            tasks: The task of each row (B).
            prompts: The prompt of each row (B).
        """

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Divide what is trained into groups with settings of their own, as optimisers of torch take them.

        Args:
            parameters: All that is trained.
        """
        return parameters

    def gradients_ready(self) -> None:  # noqa: B027
        """Hear that the last backward pass of a step is over, before gradients are clipped."""

    def wants_single_rows(self, steps: int = 1) -> bool:
        """Return whether each row must have a forward and backward pass of its own in one of the next steps."""
        return False

    def backward_ready(self) -> None:  # noqa: B027
        """Hear that the backward pass of a micro-batch is over."""

    def take_resized(self) -> bool:
        """Return, once, whether parameters were replaced by others since the last call."""
        return False

    def save(self, folder: str | Path) -> None:
        """Write this adapter as `folder`; it appears complete or not at all. Rank 0 writes.

        Args:
            folder: The folder to make. An earlier one of this name is renamed, not overwritten.
        """
        state = self.state_dict()
        if is_first_rank():
            with complete_folder(Path(folder)) as aside:
                self.write(aside, state)
                if not (aside / "index.json").exists():  # a library has its own
                    write_checksums(aside)


class PeftAdapter(Adapter):
    """Any adapter of the PEFT library that lives in the layers: LoRA, IA3, LoHa, OFT, ...

    Args:
        config: Its configuration. A missing `task_type` becomes `CAUSAL_LM`.

    Raises:
        ValueError: If it learns virtual tokens (prompt, prefix and P-tuning). PEFT puts them before the
            padding and drops position ids, so that a row's log-probabilities would depend on the other rows.
    """

    def __init__(self, config: PeftConfig) -> None:
        if config.is_prompt_learning:
            raise ValueError(
                f"adapter={type(config).__name__} learns virtual tokens, which padded batches would move. "
                "Use an adapter that lives in the layers, such as peft.LoraConfig or peft.IA3Config."
            )
        check_peft(config)
        self.config = copy.deepcopy(config)
        self.config.task_type = self.config.task_type or TaskType.CAUSAL_LM
        # PiSSA, DoRA and others start from the base weights.
        plain_lora = type(config) is LoraConfig and not config.use_dora
        self.reads_weights = not (plain_lora and config.init_lora_weights in (True, False, "gaussian"))

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap `model` into a `PeftModel`; adapter weights are float32 whatever the base is.

        Where the base is of half precision, plain LoRA computes in that precision (`lora_linear`).
        """
        self._model: PeftModel = get_peft_model(model, self.config)
        make_lean(self._model)
        adapted: nn.Module = self._model
        return adapted

    def disabled(self) -> AbstractContextManager[Any]:
        """Return PEFT's context that switches every adapter layer off."""
        context: AbstractContextManager[Any] = self._model.disable_adapter()
        return context

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors under the names of PEFT's file format."""
        # "auto" would ask the hub whether the vocabulary was resized; we never resize it.
        state: dict[str, Tensor] = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the adapter's tensors."""
        own = self.tensors()
        check_state(own, state)
        set_peft_model_state_dict(
            self._model, {name: sharded_like(read(state[name]), tensor) for name, tensor in own.items()}
        )

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        # Not by PEFT's save_pretrained, which cannot be given tensors that were gathered before.
        config = copy.deepcopy(self._model.peft_config["default"])
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or self._model.config._name_or_path
        config.save_pretrained(str(folder))
        tensors = self.state_dict() if state is None else state
        save_file(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


class FullFineTuning(Adapter):
    """No adapter: every weight is learned."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every parameter trainable."""
        self._model = model.requires_grad_(True)
        return self._model

    def disabled(self) -> AbstractContextManager[Any]:
        """Refuse: the base weights are gone after the first update.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "adapter=None trains the base weights in place, so there is no base policy left to compare with. "
            "Set kl.coef: 0, keep a copy with kl.reference: Snapshot, or train an adapter such as peft.LoraConfig."
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every weight, those that are tied under one name."""
        aliases = self._aliases()
        return {name: tensor for name, tensor in self._model.state_dict().items() if name not in aliases}

    def _aliases(self) -> set[str]:
        """Further names of tied weights."""
        every = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        return every - {name for name, _ in self._model.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore every weight."""
        own, aliases = self.tensors(), self._aliases()
        state = {name: source for name, source in state.items() if name not in aliases}
        check_state(own, state)
        with torch.no_grad():
            for name, tensor in own.items():
                copy_rows(tensor, state[name])

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face model folder without tokenizer, in the type in which the model computes.

        Trained weights are float32 so that small updates count; what runs the model needs them no finer than the
        trainer's forward pass does. Checkpoints keep them as they are.
        """
        model: Any = self._model
        tensors = dict(self.state_dict() if state is None else state)
        dtype = self.compute_dtype or model.dtype
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        model.save_pretrained(str(folder), state_dict=tensors)
        config = copy.deepcopy(model.config)  # in which save_pretrained puts the type of the trained weights
        config.dtype = config.get_text_config().dtype = dtype
        config.save_pretrained(str(folder))


def as_adapter(adapter: Adapter | PeftConfig | None) -> Adapter:
    """Return the adapter that an `adapter:` argument stands for."""
    if isinstance(adapter, Adapter):
        return adapter
    return FullFineTuning() if adapter is None else PeftAdapter(adapter)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Check that a saved state belongs to this adapter on this model.

    Args:
        expected: The present state.
        state: The state to be loaded.

    Raises:
        ValueError: If a tensor is missing, unknown, or of another shape.
    """
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"The checkpoint does not fit model and adapter: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unknown)} are unknown {unknown[:3]}. Use the model and adapter settings of "
            "the run that wrote it."
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"The checkpoint does not fit: {name} has shape {tuple(state[name].shape)}, the model needs "
                f"{tuple(tensor.shape)}. Use the model and adapter settings of the run that wrote it."
            )
