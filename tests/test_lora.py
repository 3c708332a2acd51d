"""LoRA in half precision: `lora_linear` against its formula, and the layer against PEFT's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved import saved_bytes
from torch import nn

from lightning_modules.lora import LeanLoraLinear, lora_linear, make_lean

TOKENS, INPUTS, OUTPUTS, RANK, SCALING = 6, 8, 5, 3, 0.5


def parts(dtype: torch.dtype, *, bias: bool) -> list[torch.Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(2, TOKENS // 2, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (RANK, INPUTS), (OUTPUTS, RANK)]
    tensors: list = [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]
    for number in (0, 3, 4):
        tensors[number].requires_grad_()
    if not bias:
        tensors[2] = None
    return tensors


def plain(x, weight, bias, down, up):
    output = x @ weight.T + SCALING * (x @ down.T) @ up.T
    return output if bias is None else output + bias


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(bias):
    tensors = parts(torch.float64, bias=bias)
    torch.testing.assert_close(lora_linear(*tensors, SCALING), plain(*tensors))
    with torch.no_grad():
        torch.testing.assert_close(lora_linear(*tensors, SCALING), plain(*tensors))
    x, weight, offset, down, up = tensors
    assert torch.autograd.gradcheck(
        lambda x, down, up: lora_linear(x, weight, offset, down, up, SCALING), (x, down, up)
    )


@pytest.mark.parametrize("learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_reach_what_requires_them_and_nothing_else(learns):
    tensors = parts(torch.float64, bias=True)
    leaves = [tensors[0], tensors[3], tensors[4]]
    for leaf, learned in zip(leaves, learns, strict=True):
        leaf.requires_grad_(learned)
    lora_linear(*tensors, SCALING).square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    plain(*tensors).square().sum().backward()
    for leaf, gradient in zip(leaves, found, strict=True):
        assert (gradient is None) == (leaf.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, leaf.grad)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


def adapted(dtype: torch.dtype = torch.bfloat16, **options):
    """A block with LoRA whose factors are not zero."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ["first", "second"]} | options)
    model = get_peft_model(Block().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def run(model, x):
    x = x.clone().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"output": output.detach(), "x": x.grad} | trained


def test_half_precision_is_about_as_close_to_float32_as_peft_is():
    own, peft = adapted(), adapted()
    make_lean(own)
    x = torch.randn(200, 64).bfloat16()
    truth = run(copy.deepcopy(peft).float(), x.float())
    expected = run(peft, x)
    for name, value in run(own, x).items():
        error, error_of_peft = (
            float((found.float() - truth[name]).norm() / truth[name].norm())
            for found in (value, expected[name])
        )
        assert value.dtype == expected[name].dtype
        assert error < 2**-7  # two steps of bfloat16
        if name in ("output", "x"):  # PEFT makes the factors' gradients in float32
            assert error < 2 * error_of_peft


def bytes_of_activations(model, x) -> int:
    kept = saved_bytes(lambda: model(x))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in kept.items() if place not in own)


def test_no_float32_copy_of_the_input_is_kept():
    own, peft = adapted(), adapted()
    make_lean(own)
    x = torch.randn(1000, 64).bfloat16()
    in_half, in_float32 = 2 * 1000 * (64 + 96), 4 * 1000 * (64 + 96)
    assert bytes_of_activations(peft, x) - bytes_of_activations(own, x) >= in_float32 - in_half


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.5},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all", "target_modules": ["first"]},
    ],
    ids=str,
)
def test_other_kinds_of_lora_are_left_to_peft(options):
    own, peft = adapted(**options), adapted(**options)
    make_lean(own)
    x = torch.randn(20, 64).bfloat16()
    torch.manual_seed(3)
    expected = run(peft, x)
    torch.manual_seed(3)
    for name, value in run(own, x).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_float32_disabled_merged_and_autocast_are_left_to_peft():
    x = torch.randn(20, 64)
    for dtype in (torch.float32, torch.bfloat16):
        own, peft = adapted(dtype), adapted(dtype)
        make_lean(own)
        row = x.to(dtype)
        with own.disable_adapter(), peft.disable_adapter():
            assert torch.equal(own(row), peft(row))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(own(row), peft(row))
        if dtype == torch.float32:
            assert torch.equal(own(row), peft(row))
        own.merge_adapter()
        peft.merge_adapter()
        assert torch.equal(own(row), peft(row))
        own.unmerge_adapter()


def test_only_plain_layers_over_plain_linear_layers_change():
    class Special(nn.Linear):
        pass

    model = Block()
    model.second = Special(96, 64)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["first", "second"]))
    names = set(model.state_dict())
    make_lean(model)
    assert isinstance(model.first, LeanLoraLinear)
    assert not isinstance(model.second, LeanLoraLinear)
    assert set(model.state_dict()) == names
