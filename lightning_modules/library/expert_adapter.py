"""LibraryExpert: one expert of a library as the adapter to go on training."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from lightning_modules.adapters import PeftAdapter
from lightning_modules.library.entry import AdapterEntry
from lightning_modules.library.loading import check_base, choose_experts
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.reading import open_tensors


class LibraryExpert(PeftAdapter):
    """A LoRA expert of a library, trained on: by GRPO, say, after supervised fine-tuning.

    The library stays as it is; `LibraryExport` puts the result into it under a new name. `disabled` is the base
    model, not the expert as it was.

    Args:
        library: Folder of an `AdapterLibrary`.
        expert: Name of the expert.

    Raises:
        ValueError: If there is no such library or expert, or it is no LoRA.
    """

    def __init__(self, library: str, expert: str) -> None:
        self.library = library
        self.expert = expert
        store = AdapterLibrary(library)
        choose_experts(store, [expert])
        self.entry: AdapterEntry = store[expert]
        if self.entry.kind != "lora":
            raise ValueError(
                f"expert={expert!r} is a sparse adapter. LibraryExpert goes on with LoRA experts."
            )
        self.entry.open()
        config = PeftConfig.from_pretrained(str(self.entry.folder))
        assert isinstance(config, LoraConfig)
        config.inference_mode = False
        config.init_lora_weights = True  # what it started from is behind it
        super().__init__(config)
        self.reads_weights = True

    def attach(self, model: nn.Module) -> nn.Module:
        """Put the expert into `model`.

        Raises:
            ValueError: If the expert belongs to another base model, or its files not to each other.
        """
        check_base(self.entry, model)
        self.entry.open().fit(model)
        adapted = super().attach(model)
        file: Any = open_tensors(self.entry.folder / "adapter_model.safetensors")
        # PEFT adds the frozen weight of a head that has factors.
        keys = [key for key in file.keys() if not key.endswith(".base_layer.weight")]  # noqa: SIM118
        state: dict[str, Tensor] = {key: file.get_tensor(key) for key in keys}
        try:
            self.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"{self.entry.folder}: its adapter_config.json describes other weights than it holds. Remove "
                f"{self.expert!r} and add it again."
            ) from error
        return adapted
