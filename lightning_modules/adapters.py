"""The Adapter seam: what is learned on top of a base model, and nothing else of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
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
from lightning_modules.lora_start import (
    add_start,
    as_plain_lora,
    has_start,
    load_start,
    start_tensors,
    without_start,
)
from lightning_modules.peft_configs import check_trainable
from lightning_modules.ranks import is_first_rank
from lightning_modules.sharding import consolidated, copy_rows, read, sharded_like
from lightning_modules.sparse.storage import fingerprint


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
        choice: Which version of it, as `written_choice` returns; the module sets it too.
        reads_weights: Whether `attach` reads base weights, which under sharding may not be in memory yet.
        joins_shards: Whether `attach` takes a model that is sharded already; else it comes before.
    """

    source: str | None = None
    purpose: str = ""
    draws_by_purpose: bool = False
    choices: int = 0
    moves_entries: bool = False
    compute_dtype: torch.dtype | None = None
    choice: Mapping[str, str] = MappingProxyType({})
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

    The base weights stay as they are, so that `disabled` is the base model: PiSSA and OLoRA, which PEFT takes out of
    them, are made by `lora_start`.

    Args:
        config: Its configuration. A missing `task_type` becomes `CAUSAL_LM`.

    Raises:
        ValueError: If it learns virtual tokens (prompt, prefix and P-tuning): PEFT puts them before the
            padding and drops position ids, so that a row's log-probabilities would depend on the other rows. Or if
            it needs calls in training that our loop does not make, or its files do not hold what was trained.
    """

    def __init__(self, config: PeftConfig) -> None:
        check_trainable(config)
        check_peft(config)
        self.config = copy.deepcopy(config)
        self.config.task_type = self.config.task_type or TaskType.CAUSAL_LM
        self._has_start = has_start(config)
        # PiSSA, DoRA and others start from the base weights.
        plain_lora = type(config) is LoraConfig and not config.use_dora
        self.reads_weights = not (plain_lora and config.init_lora_weights in (True, False, "gaussian"))
        self._plain: PeftConfig = without_start(self.config) if self._has_start else self.config

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap `model` into a `PeftModel`; adapter weights are float32 whatever the base is.

        Where the base is of half precision, plain LoRA computes in that precision (`lora_linear`).

        Raises:
            ValueError: If PEFT cannot put it into this model, it would change base weights, or nothing is left to
                train.
        """
        name = type(self.config).__name__
        planned = any(parameter.is_meta for parameter in model.parameters())
        before = {} if planned or not self.reads_weights else _fingerprints(model)
        try:
            self._model: PeftModel = get_peft_model(model, self._plain)
            if self._has_start:
                add_start(self._model, self.config)
        except Exception as error:  # of many kinds, for settings that this model does not take
            if planned:
                raise
            said = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"adapter={name} does not go into this model. {said[0]}") from error
        for weight, (own, expected) in before.items():
            if fingerprint(own) != expected:
                raise ValueError(
                    f"adapter={name} changes the base weights where it is made ({weight}), so that the model without "
                    "it is no longer the base model. Use another start of it, or peft.LoraConfig."
                )
        if getattr(self._model.peft_config["default"], "target_modules_to_tie", None):
            raise ValueError(
                f"adapter={name} with ensure_weight_tying: PEFT trains the factors of tied layers apart. Leave "
                "ensure_weight_tying out, or name the embedding in modules_to_save in place of target_modules."
            )
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise ValueError(
                f"adapter={name} has nothing to train with these settings. Name other layers, or drop inference_mode."
            )
        _warn_of_rounding(name, self._model)
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
        return {**state, **start_tensors(self._model)} if self._has_start else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the adapter's tensors."""
        own = self.tensors()
        check_state(own, state)
        loaded = {name: sharded_like(read(state[name]), tensor) for name, tensor in own.items()}
        if self._has_start:
            load_start(self._model, loaded)
            loaded = {name: loaded[name] for name in loaded.keys() - start_tensors(self._model).keys()}
        set_peft_model_state_dict(self._model, loaded)

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        # Not by PEFT's save_pretrained, which cannot be given tensors that were gathered before.
        config = copy.deepcopy(self._model.peft_config["default"])
        tensors = self.state_dict() if state is None else state
        if self._has_start:
            config, tensors = as_plain_lora(config, tensors)
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or self._model.config._name_or_path
        config.save_pretrained(str(folder))
        save_file(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


def _warn_of_rounding(name: str, model: nn.Module) -> None:
    """Warn of whole modules that PEFT copies in the type of the base, where it makes factors in float32."""
    rounded = [key for key, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if rounded:
        rank_zero_warn(
            f"adapter={name} trains {len(rounded)} tensors in {model.get_parameter(rounded[0]).dtype}, such as "
            f"{rounded[0]}: small updates vanish there. Set dtype: float32."
        )


def _fingerprints(model: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
    return {name: (weight, fingerprint(weight)) for name, weight in model.named_parameters()}


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
