"""Packed weights: the same bits as plain layers, for as long as they are asked for and no longer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.lora import make_lean
from lightning_modules.sampling import NativeSampler, Sampling
from lightning_modules.sampling.packed import can_pack, packed_weights

needs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.ones(1, 1, dtype=torch.bfloat16)), reason="torch packs no bfloat16 weights on this CPU"
)


class Tokenizer:
    """What a sampler asks of a tokenizer."""

    eos_token_id = 0
    pad_token_id = 0

    def batch_decode(self, rows, **_options) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def tiny(dtype: torch.dtype = torch.bfloat16, *, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**shape, **heads, attention_bias=True)).to(dtype)
    if lora:
        config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(model, config)
        make_lean(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@needs_bfloat16
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rows", [1, 32, 37])
@torch.no_grad()
def test_outputs_are_the_same_to_the_bit(lora, rows):
    model = tiny(lora=lora)
    ids = torch.randint(1, 100, (rows, 3))
    plain = model(input_ids=ids).logits
    with packed_weights(model):
        assert len(own_forwards(model)) == 15  # seven layers twice, and the head
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert not own_forwards(model)


@needs_bfloat16
@torch.no_grad()
def test_copies_end_with_the_block_even_if_that_fails():
    model = tiny(lora=True)
    ids = torch.ones(1, 3, dtype=torch.long)

    def fail():
        with packed_weights(model):
            del vars(model.get_output_embeddings())["forward"]  # as somebody does who replaces it for a while
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not own_forwards(model)
    before = model(input_ids=ids).logits
    for parameter in model.parameters():
        parameter.mul_(1.5)
    after = model(input_ids=ids).logits
    assert not torch.equal(after, before)
    with packed_weights(model):
        assert torch.equal(model(input_ids=ids).logits, after)


@torch.no_grad()
def test_what_is_no_plain_layer_in_half_precision_stays_as_it_is():
    class Special(nn.Linear):
        pass

    for model in (tiny(torch.float32), tiny(torch.float32, lora=True)):
        with packed_weights(model):
            assert not own_forwards(model)
    parts = nn.ModuleList([Special(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, device="meta")]).bfloat16()
    vars(parts[1])["forward"] = nn.Identity().forward
    with packed_weights(parts):
        assert own_forwards(parts) == ["1"]
    assert own_forwards(parts) == ["1"]
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_weights(model):
        assert not own_forwards(model)


@needs_bfloat16
@torch.no_grad()
def test_adapters_that_are_off_or_several_are_left_to_peft():
    model = tiny(lora=True)
    ids = torch.arange(1, 5)[None]
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
        with packed_weights(model):
            assert torch.equal(model(input_ids=ids).logits, plain)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    plain = model(input_ids=ids).logits
    with packed_weights(model):
        assert torch.equal(model(input_ids=ids).logits, plain)


@needs_bfloat16
def test_the_sampler_draws_the_same_tokens_from_packed_weights(monkeypatch):
    model = tiny(lora=True)
    prompts = [[5, 6, 7]] * 3 + [[8, 9]] * 2
    drawn = []
    calls = []
    real = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *a: calls.append(1) or real(*a))
    for packs in (True, False):
        sampler = NativeSampler(pack_weights=packs)
        sampler.bind(model, Tokenizer())
        drawn.append(sampler.generate(prompts, Sampling(max_new_tokens=6), seeds=range(5)))
        assert len(calls) == 15
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn[0].token_ids))) > 2


@needs_bfloat16
def test_gradients_are_off_meanwhile():
    layer = nn.Linear(4, 4).bfloat16()
    with packed_weights(layer):
        assert not layer(torch.ones(1, 4, dtype=torch.bfloat16)).requires_grad
    assert layer(torch.ones(1, 4, dtype=torch.bfloat16)).requires_grad
