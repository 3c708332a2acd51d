"""PolicyFolderSampler: what samplers have in common whose engine reads the policy from a folder.

Shapes: B rows.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from lightning_modules.distributed import gathered
from lightning_modules.ranks import is_first_rank
from lightning_modules.sampling.base import Announce, Completions, Sampler, Sampling
from lightning_modules.sampling.stops import StopStrings, stop_tokens
from lightning_modules.sampling.vllm_policy import SavedPolicy, saved_policy, tied_layers
from lightning_modules.sampling.vllm_requests import (
    Drawn,
    check_room,
    completions_of,
    row_seeds_or_drawn,
    sampling_parameters,
)

Loaded = TypeVar("Loaded")


class PolicyFolderSampler(Sampler, Generic[Loaded]):
    """Samples with an engine that reads the policy from a folder: a new folder under a new name for each version.

    A subclass loads what was saved and draws. A name holds a random part beside the version, so that a resumed run
    never meets what an earlier one left in the engine.

    Args:
        sync_folder: Where policies are written for the engine; None makes a temporary folder.

    Attributes:
        context: The most tokens of a row in the engine; None while it is not known.
    """

    def __init__(self, sync_folder: str | None = None) -> None:
        self.sync_folder = sync_folder
        self._folder: Path | None = None
        self._version: int | None = None
        self._policy = ""
        self.context: int | None = None

    def bind(self, model: nn.Module, tokenizer: Any) -> None:
        """Take model and tokenizer. What was synchronised before does not count any more."""
        self._model, self._tokenizer = model, tokenizer
        self._version = None

    def sync(self, version: int, save: Callable[[Path], None]) -> None:
        """Save the policy and load it into the engine, unless it is there in this version.

        Raises:
            ValueError: If the engine cannot serve it or refuses it.
            OSError: If the engine cannot be reached, or a file cannot be written.
        """
        if version == self._version:
            return
        self._version = None  # until it is there
        name, base = self._names(version)
        folder = base / name
        save(folder)
        loaded: Loaded | None = None
        problem: Exception | None = None
        if is_first_rank():
            try:
                policy = saved_policy(name, folder, tied_layers(self._model))
                loaded = self.load(policy)
                if self._policy:
                    self.forget(self._policy)
                    shutil.rmtree(base / self._policy, ignore_errors=True)
            except (ValueError, OSError) as error:
                problem = error
                shutil.rmtree(folder, ignore_errors=True)
        # A problem of rank 0 is everybody's: else the others would wait for it.
        loaded, problem = gathered((loaded, problem))[0]
        if problem is not None:
            raise problem
        assert loaded is not None
        self.adopt(loaded)
        self._policy, self._version = name, version

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        announce: Announce | None = None,
        seeds: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Completions:
        """Draw one completion per row with the policy of the last `sync`.

        Neither `announce` nor `groups` is needed: adapters that treat rows differently are refused by `sync`.

        Raises:
            ValueError: If there was no `sync`, a prompt is empty or too long, or what comes back is not what was
                asked for: of another policy, without tokens, or without log-probabilities.
            OSError: If the engine cannot be reached or takes too long.
        """
        if self._version is None:
            raise ValueError(
                f"{type(self).__name__}.generate before sync: the engine does not have this policy yet. Call "
                "sampler.sync(global_step, adapter.save) on every rank before each rollout."
            )
        check_room(prompts, sampling, self.context)
        if not prompts:
            return Completions([], [], [], [])
        ends = stop_tokens(self._model, self._tokenizer, sampling)
        seeds = row_seeds_or_drawn(seeds, len(prompts))
        special = StopStrings(self._tokenizer, sampling.stop).reads_special
        parameters = [sampling_parameters(sampling, seed, ends, reads_special=special) for seed in seeds]
        drawn = self.draw(self._policy, prompts, parameters)
        return completions_of(drawn, self._policy, self._tokenizer)

    def _names(self, version: int) -> tuple[str, Path]:
        """Name the policy and the folder for it, the same on every rank."""
        if self._folder is None:
            mine = None
            if is_first_rank():
                mine = self.sync_folder or tempfile.mkdtemp(prefix="quiver-vllm-")
                atexit.register(self.close)
            self._folder = Path(gathered(mine)[0]).absolute()
        return gathered(f"quiver-{uuid.uuid4().hex[:12]}-v{version}")[0], self._folder

    @property
    def place(self) -> str:
        """Hub id or folder of the base model."""
        return str(self._tokenizer.name_or_path)

    @property
    def revision(self) -> str | None:
        """Commit of the base model that was loaded from the hub; None for a folder."""
        found: str | None = getattr(self._model.config, "_commit_hash", None)
        return None if Path(self.place).exists() else found

    @property
    def dtype(self) -> str:
        """Precision in which the engine holds the base weights and computes: that in which the trainer computes."""
        weights: torch.dtype = self._model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return str(self.compute_dtype or weights).removeprefix("torch.")

    def check_reload(self, device: str) -> None:
        """Check that the engine's weights can be replaced by others.

        On CPUs vLLM computes with packed copies, and after a reload the head of tied embeddings keeps its old one: the
        rollouts would be of a mixture of two policies, without any error.

        Args:
            device: Of the engine.

        Raises:
            ValueError: If they cannot.
        """
        config: Any = self._model.config
        if device == "cpu" and config.get_text_config().tie_word_embeddings:
            raise ValueError(
                "vLLM on a CPU cannot replace the weights of a model with tied embeddings: its head would keep the old "
                "ones. Train an adapter such as peft.LoraConfig, use NativeSampler, or run vLLM on a GPU."
            )

    def close(self) -> None:
        """Forget the policy and remove its folder. Called at the end of the process."""
        if self._policy and self._folder is not None:
            shutil.rmtree(self._folder / self._policy, ignore_errors=True)
        if self.sync_folder is None and self._folder is not None:
            with suppress(OSError):  # what else is in it is to be read
                self._folder.rmdir()
        self._policy, self._version = "", None

    @abstractmethod
    def load(self, policy: SavedPolicy) -> Loaded:
        """Load a policy into the engine, on rank 0.

        Returns:
            What every rank needs to know, for `adopt`; not None.
        """

    @abstractmethod
    def adopt(self, loaded: Loaded) -> None:
        """Take what `load` returned on rank 0, on every rank."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Unload an earlier policy, on rank 0."""

    @abstractmethod
    def draw(
        self, name: str, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]]
    ) -> list[Drawn]:
        """Draw a completion of each row with a policy (B)."""
