"""A router that reads rows hears of each of them: other forward passes are refused, beams and sequences follow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_modules import RoutedAdapter
from lightning_modules.library.layers import LoraStack
from lightning_modules.library.mixing import factor_mixing, output_mixing
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter
from lightning_modules.library.routers.learned import PhatgooseGates
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.routers.retrieval import RetrievalRouter
from lightning_modules.library.store import AdapterLibrary

TASKS = ["ada", "bob", "cy"]
IDS = torch.randint(1, 256, (3, 9), generator=torch.Generator().manual_seed(0))
ROUTERS = {
    "task": lambda: TaskRouter(),
    "gates": lambda: PhatgooseGates(),
    "poly": lambda: PolyRouter(TASKS),
    "heads": lambda: PolyRouter(TASKS, num_heads=2),
}


def routed(tiny_model, router, mixing=factor_mixing):
    """Three new experts that are far apart."""
    torch.manual_seed(0)
    adapter = RoutedAdapter(router, experts=TASKS, rank=2, mixing=mixing)
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.experts.B, std=0.3)
        for parameter in layer.router.parameters():
            nn.init.normal_(parameter, std=2)
    return model.eval(), adapter


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTERS)
def test_only_the_rows_that_were_heard_of_may_run(tiny_model, kind):
    model, adapter = routed(tiny_model, ROUTERS[kind]())
    with pytest.raises(ValueError, match=r"has heard of no row\. Call adapter.route\(tasks, prompts\)"):
        model(IDS)
    adapter.route(["bob"], [""])
    with pytest.raises(ValueError, match="has heard of 1 rows, and the model gets 3"):
        model(IDS)
    adapter.route(TASKS, [""] * 3)
    for rows in (1, 2):
        with pytest.raises(ValueError, match=f"has heard of 3 rows, and the model gets {rows}"):
            model(IDS[:rows])
    whole = model(IDS).logits
    with adapter.disabled():
        assert model(IDS[:1]).logits.shape[0] == 1, "the base model needs to hear of no row"
    for row, task in enumerate(TASKS):
        adapter.route([task], [""])
        torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], whole[row], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 tasks and 1 prompts"):
        adapter.route(["ada", "bob"], [""])


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTERS)
def test_one_row_stands_for_all_where_that_is_said(tiny_model, kind):
    model, adapter = routed(tiny_model, ROUTERS[kind]())
    adapter.route(["bob"] * 3, [""] * 3)
    expected = model(IDS).logits
    adapter.route_all("bob")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(IDS[:2]).logits, expected[:2], rtol=1e-4, atol=1e-4)
    drawn = model.generate(IDS, max_new_tokens=3, num_beams=2, pad_token_id=0)
    assert len(drawn) == 3
    adapter.route(["bob"], [""])
    with pytest.raises(ValueError, match="has heard of 1 rows"):
        model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=["beams", "several beams"]
)
def test_beams_are_those_of_each_row_alone(tiny_model, kind, options):
    model, adapter = routed(tiny_model, ROUTERS[kind]())
    options = {**options, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    adapter.route(TASKS, [""] * 3)
    together = model.generate(IDS, **options)
    assert adapter.state.tasks == tuple(TASKS), "afterwards the rows are those of before"
    model(IDS)
    with pytest.raises(ValueError, match="has heard of 3 rows, and the model gets 9"):
        model(IDS.repeat(3, 1))
    several = len(together) // 3
    differ = []
    for row, task in enumerate(TASKS):
        adapter.route([task], [""])
        alone = model.generate(IDS[row : row + 1], **options)
        assert together[row * several : (row + 1) * several].tolist() == alone.tolist()
        adapter.route([TASKS[row - 1]], [""])
        differ.append(model.generate(IDS[row : row + 1], **options).tolist() != alone.tolist())
    assert any(differ), "other experts write the same: this shows nothing"


@torch.no_grad()
def test_sampled_sequences_of_a_row_have_its_expert(tiny_model):
    model, adapter = routed(tiny_model, TaskRouter())
    adapter.route(TASKS, [""] * 3)
    seen = []
    layer = next(iter(adapter.layers.values()))
    handle = layer.router.register_forward_hook(
        lambda module, inputs, routing: seen.append(routing.index[:, 0])
    )
    model.generate(IDS, max_new_tokens=3, do_sample=True, num_return_sequences=2, pad_token_id=0)
    handle.remove()
    assert seen
    assert all(index.tolist() == [0, 0, 1, 1, 2, 2] for index in seen)
    with pytest.raises(ValueError, match="has heard of 3 rows, and the model gets 2"):
        model.generate(IDS[:2], max_new_tokens=3, num_beams=2, pad_token_id=0)
    assert adapter.state.count == 3


@torch.no_grad()
def test_a_copy_of_the_model_generates_with_its_own_weights(tiny_model):
    model, adapter = routed(tiny_model, TaskRouter())
    adapter.route(TASKS, [""] * 3)
    options = {"max_new_tokens": 5, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(IDS, **options)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other.generate(IDS, **options), before)


@torch.no_grad()
def test_retrieval_hears_of_prompts(tiny_model, tmp_path):
    _, made = routed(tiny_model, TaskRouter())
    library = AdapterLibrary(tmp_path / "library", create=True)
    made.publish(library)
    router = RetrievalRouter(top_k=1)
    for name, text in zip(TASKS, ("numbers sum", "translate words", "sort letters"), strict=True):
        library.put_arrays(name, router.kind, router.describe([text], dict), router.description_settings())
    adapter = RoutedAdapter(router, str(library.root))
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model)).eval()
    with pytest.raises(ValueError, match="router=RetrievalRouter routes by the rows' tasks or prompts"):
        model(IDS)
    adapter.route(["?"] * 3, ["sort these letters", "sum the numbers", "translate all words"])
    logits = model(IDS).logits
    oracle = RoutedAdapter(TaskRouter(), str(library.root))
    expected = oracle.attach(AutoModelForCausalLM.from_pretrained(tiny_model)).eval()
    oracle.route(["cy", "ada", "bob"], [""] * 3)
    torch.testing.assert_close(logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_routers_that_read_no_rows_need_none(tiny_model):
    model, _ = routed(tiny_model, UniformRouter())
    for rows in (1, 3):
        assert model(IDS[:rows]).logits.shape[0] == rows


def test_rows_go_to_the_device_of_the_layers_once():
    """With what a row-wise router makes on the CPU, as `torch.tensor` does, layers elsewhere would copy each time."""

    class Meta(Router):
        def encode(self, tasks, prompts):
            return torch.zeros(len(tasks), dtype=torch.int64)

        def forward(self, x, rows):
            raise NotImplementedError

    adapter = RoutedAdapter(Meta(), experts=TASKS)
    linear = nn.Module()
    linear.base_layer = nn.Linear(2, 2, device="meta")
    adapter.layers["layer"] = linear
    adapter.route(TASKS, [""] * 3)
    assert adapter.state.rows.device.type == "meta"


@pytest.mark.parametrize("router", [UniformRouter, PolyRouter])
def test_mixing_of_another_kind_than_the_paper_s_is_said(tiny_model, router, recwarn):
    def said():
        return [str(one.message) for one in recwarn if "averages the changes" in str(one.message)]

    routed(tiny_model, router(), output_mixing)
    [message] = said()
    assert f"output_mixing with {router.__name__}" in message
    assert "mixing: lightning_modules.library.mixing.factor_mixing" in message
    recwarn.clear()
    routed(tiny_model, router(), factor_mixing)
    routed(tiny_model, TaskRouter(), output_mixing)
    one = RoutedAdapter(UniformRouter(), experts=1, rank=2)
    one.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert isinstance(next(iter(one.layers.values())).experts, LoraStack)
    assert not said()


def test_heads_without_factors_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"mixing=output_mixing: num_heads=4 mixes parts of the factors"):
        RoutedAdapter(PolyRouter(TASKS, num_heads=4), experts=2)
