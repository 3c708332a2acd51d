"""A tiny random Llama with a byte-level tokenizer, made on the fly: no download, milliseconds a step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lightning_modules  # noqa: F401  (before torch, for which it bounds how long OpenMP's threads spin)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

REPOSITORY = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tiny_model(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, context: int = 512) -> Path:
    """Write model and tokenizer to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    # Sharper than random initialisation, and with an end token that is likely in any context, so that
    # completions differ and end at different lengths.
    embeddings = model.model.embed_tokens.weight
    with torch.no_grad():
        embeddings.mul_(15)
        hidden_BTH = model.model(torch.arange(1, 257)[None]).last_hidden_state
        typical_H = hidden_BTH.mean((0, 1))
        embeddings[0] = typical_H * 1.2 / typical_H.square().sum()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny model."""
    return str(build_tiny_model(tmp_path_factory.mktemp("tiny")))
