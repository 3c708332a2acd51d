"""The Adapter seam: what is learned on top of a base model, and nothing else of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.batches import Prompt
from lightning_modules.files import complete_folder


class Adapter(ABC):
    """What is learned. Every module works with every adapter through these five methods.

    An adapter is used once: `attach` comes first and binds it to one model.

    Attributes:
        source: The base model, as the user named it; the module sets it before `attach`.
    """

    source: str | None = None

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
    def state_dict(self) -> dict[str, Tensor]:
        """Return only what was learned, indices included."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If a tensor is missing, unknown, or of another shape.
        """

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the files of this adapter into an existing folder."""

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

    def take_resized(self) -> bool:
        """Return, once, whether parameters were replaced by others since the last call."""
        return False

    def save(self, folder: str | Path) -> None:
        """Write this adapter as `folder`; it appears complete or not at all.

        Args:
            folder: The folder to make. An earlier one of this name is renamed, not overwritten.
        """
        with complete_folder(Path(folder)) as aside:
            self.write(aside)


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
        self.config = copy.deepcopy(config)
        self.config.task_type = self.config.task_type or TaskType.CAUSAL_LM

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap `model` into a `PeftModel`; adapter weights are float32 whatever the base is."""
        self._model: PeftModel = get_peft_model(model, self.config)
        adapted: nn.Module = self._model
        return adapted

    def disabled(self) -> AbstractContextManager[Any]:
        """Return PEFT's context that switches every adapter layer off."""
        context: AbstractContextManager[Any] = self._model.disable_adapter()
        return context

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter's tensors under the names of PEFT's file format."""
        # "auto" would ask the hub whether the vocabulary was resized; we never resize it.
        state: dict[str, Tensor] = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the adapter's tensors."""
        check_state(self.state_dict(), state)
        set_peft_model_state_dict(self._model, state)

    def write(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template; `export` writes a real card


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
            "Set kl_coef: 0, or train an adapter such as peft.LoraConfig."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return every weight."""
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore every weight."""
        check_state(self.state_dict(), state)
        self._model.load_state_dict(state)

    def write(self, folder: Path) -> None:
        """Write a Hugging Face model folder without tokenizer."""
        self._model.save_pretrained(str(folder))  # type: ignore[operator]


def as_adapter(adapter: Adapter | PeftConfig | None) -> Adapter:
    """Return the adapter that an `adapter:` argument stands for."""
    if isinstance(adapter, Adapter):
        return adapter
    return FullFineTuning() if adapter is None else PeftAdapter(adapter)


def check_state(expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
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
