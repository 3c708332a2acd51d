"""Sparse adapters on disk: round trips, size, experts in and out, bad files, and SHiRA both ways."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sparse_models import IDS, assert_equal_states, load, setup, state, train
from torch import nn

from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random, weight_magnitude
from lightning_modules.sparse.shira import export_shira, import_shira
from lightning_modules.sparse.storage import SparseFolder, fingerprint, write_sparse

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A trained adapter: its module, the adapter, and its folder."""
    model, adapter, optim = setup(tiny_model, lr=0.05, density=0.03)
    train(model, optim)
    folder = tmp_path_factory.mktemp("made") / "adapter"
    adapter.save(folder)
    return model, adapter, folder


def test_what_is_written_is_read_bit_for_bit(made):
    _, adapter, folder = made
    source = SparseFolder(folder)
    assert sorted(source.names) == sorted(adapter.deltas)
    assert len(source.names) == 14
    for name, delta in adapter.deltas.items():
        read = source.delta(name)
        assert read.shape == delta.shape == source.shape(name)
        assert read.indices.dtype == torch.int32
        assert read.values.dtype == torch.float32
        assert torch.equal(read.indices, delta.indices)
        assert torch.equal(read.values, delta.values)
        assert delta.values.any()
        assert torch.equal(read.dense(), delta.dense())
    plain = folder.parent / "plain"
    plain.touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {plain.stat().st_mode}, "others can read it"
    assert source.config["density"] == 0.03
    assert source.config["target_modules"] == "all-linear"
    with pytest.raises(ValueError, match="has no shape"):
        SparseDelta(read.indices, read.values).dense()


def test_a_trained_weight_takes_8_bytes_on_disk(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(400, 300) for _ in range(4))

    adapter = SparseAdapter(density=0.05, score=weight_magnitude, schedule=Static(0))
    adapter.attach(Wide())
    adapter.save(tmp_path / "adapter")
    count = 4 * 400 * 300 * 5 // 100
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert 8 * count <= size <= 1.1 * 8 * count


def test_the_entries_of_no_weight_and_of_all_weights(tiny_model, tmp_path):
    empty = SparseDelta(torch.empty(0, dtype=torch.int32), torch.empty(0), (32, 32))
    full = SparseDelta(torch.arange(1024), torch.randn(1024), (32, 32))
    write_sparse(tmp_path, {Q0: empty, Q0.replace("0", "1"): full}.items(), {})
    model, base = load(tiny_model), state(load(tiny_model))
    expert = SparseExpert(tmp_path).apply(model)
    assert torch.equal(model.get_parameter(Q0), base[Q0])
    other = Q0.replace("0", "1")
    assert torch.equal(model.get_parameter(other), base[other] + full.dense())
    expert.remove()
    assert_equal_states(state(model), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_expert_goes_in_and_out(made, tiny_model, dtype):
    trained, adapter, folder = made
    model = load(tiny_model, dtype)
    before = state(model)
    expert = SparseExpert(folder)
    for _ in range(2):
        assert expert.apply(model) is expert
        for name, delta in adapter.deltas.items():
            expected = (before[name].float() + delta.dense()).to(dtype)
            assert torch.equal(model.get_parameter(name), expected)
        if dtype == torch.float32:
            assert torch.equal(logits(model), logits(trained))
        with pytest.raises(ValueError, match=r"is in a model already\. Call remove"):
            expert.apply(model)
        expert.remove()
        assert_equal_states(state(model), before)


def test_the_fingerprint_knows_the_weights_in_either_precision():
    weight = torch.randn(40, 50)
    assert fingerprint(weight) == fingerprint(weight.bfloat16())
    assert fingerprint(weight) != fingerprint(weight + 0.1)
    assert fingerprint(torch.ones(1)) != fingerprint(torch.zeros(1))


# ---------------------------------------------------------------------- bad input


def rewrite(folder, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def put(kind, change):
    def apply(folder):
        rewrite(folder, lambda t: t.update({f"{Q0}.{kind}": change(t[f"{Q0}.{kind}"].clone())}))

    return apply


def configure(**changes):
    def apply(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return apply


def shape(new):
    def apply(folder):
        shapes = json.loads((folder / CONFIG).read_text())["shapes"]
        configure(shapes={**shapes, Q0: new})(folder)

    return apply


def cut(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])


BAD = {
    "no config": (lambda f: (f / CONFIG).unlink(), "is no sparse adapter: it has no adapter_config.json"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), r"adapter_model.safetensors is missing"),
    "no folder": (shutil.rmtree, "it has no adapter_config.json"),
    "cut off": (cut, r"adapter_model.safetensors is broken or cut off"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{'a"), r"adapter_config.json is no JSON"),
    "no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), r"adapter_config.json is no JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "describes no sparse adapter"),
    "LoRA": (configure(peft_type="LORA"), "its peft_type is not QUIVER_SPARSE"),
    "no shapes": (configure(shapes=None), "names no shapes"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop(f"{Q0}.indices")), rf"missing \['{Q0}.indices'\]"),
    "unknown": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), r"unknown \['x'\]"),
    "unsorted": (put("indices", lambda t: t.flip(0)), "must be sorted without repetition"),
    "twice": (put("indices", lambda t: t.index_fill(0, torch.tensor([3]), int(t[2]))), "number 3 is not"),
    "negative": (put("indices", lambda t: t.index_fill(0, torch.tensor([0]), -1)), "reach from -1 to"),
    "too large": (put("indices", lambda t: t + 1024 - t[-1]), "to 1024, but the weight has 1024 entries"),
    "float": (put("indices", torch.Tensor.float), "indices are torch.float32"),
    "matrix": (put("indices", lambda t: t[:, None]), "of 2 dimensions"),
    "fewer values": (put("values", lambda t: t[1:]), "29 values for 30 indices"),
    "NaN": (put("values", lambda t: t.index_fill(0, torch.tensor([1]), float("nan"))), "1 values are NaN or"),
    "infinite": (put("values", lambda t: t / 0), "30 values are NaN or infinite"),
    "other shape": (shape([16, 64]), r"of shape \(16, 64\); in this model it is \(32, 32\)"),
    "no shape": (shape("big"), "shape"),
    "other base": (configure(fingerprint={Q0: "0" * 16}), "was trained on other weights: .*q_proj"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_by_name_and_changes_nothing(made, tiny_model, tmp_path, name):
    folder = tmp_path / "bad-one"
    shutil.copytree(made[2], folder)
    (folder / "SHA256SUMS").unlink()  # which would notice at once; here the readers must
    damage, message = BAD[name]
    damage(folder)
    model = load(tiny_model)
    before = state(model)
    with pytest.raises(ValueError, match=message) as caught:
        SparseExpert(folder).apply(model)
    assert "bad-one" in str(caught.value)
    assert_equal_states(state(model), before)


def test_a_folder_without_fingerprints_is_taken(made, tiny_model, tmp_path):
    for value in ({}, None):
        folder = tmp_path / str(value)
        shutil.copytree(made[2], folder)
        (folder / "SHA256SUMS").unlink()
        configure(fingerprint=value)(folder)
        model = load(tiny_model)
        SparseExpert(folder).apply(model)
        assert torch.equal(logits(model), logits(made[0]))


def test_another_model_is_refused(made, tiny_model):
    model = load(tiny_model)
    with torch.no_grad():
        model.get_parameter(Q0).mul_(1.1)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"was trained on other weights: .*q_proj.* Its base model is .*tiny"
    ):
        SparseExpert(made[2]).apply(model)
    assert_equal_states(state(model), before)
    with pytest.raises(ValueError, match="which this model does not have"):
        SparseExpert(made[2]).apply(nn.Linear(2, 2))


def test_nothing_unreadable_is_written(tmp_path):
    one = torch.ones(1)
    for delta, message in (
        (SparseDelta(torch.tensor([4]), one, (2, 2)), "but the weight has 4 entries"),
        (SparseDelta(torch.tensor([0]), one), "needs the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            write_sparse(tmp_path, [("w", delta)], {})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- SHiRA


def test_an_exported_shira_adapter_gives_identical_logits(made, tiny_model, tmp_path):
    trained, _, folder = made
    export_shira(folder, tmp_path / "shira")
    assert not torch.equal(logits(load(tiny_model)), logits(trained))
    theirs = PeftModel.from_pretrained(load(tiny_model), tmp_path / "shira")
    torch.testing.assert_close(logits(theirs), logits(trained), atol=1e-6, rtol=0)
    assert torch.equal(logits(theirs.merge_and_unload()), logits(trained))
    import_shira(tmp_path / "shira", tmp_path / "back", load(tiny_model))
    model = load(tiny_model)
    SparseExpert(tmp_path / "back").apply(model)
    assert torch.equal(logits(model), logits(trained))


def test_a_shira_adapter_of_peft_gives_identical_logits(tiny_model, tmp_path):
    torch.manual_seed(0)
    theirs = get_peft_model(
        load(tiny_model), ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=1)
    )
    optim = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    train(theirs, optim)
    theirs.save_pretrained(tmp_path / "shira")
    import_shira(tmp_path / "shira", tmp_path / "ours", load(tiny_model))
    model = load(tiny_model)
    expert = SparseExpert(tmp_path / "ours").apply(model)
    assert (logits(model) - logits(load(tiny_model))).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-6, rtol=0)
    assert {len(delta.values) for delta in expert.deltas.values()} == {2 * 64, 2 * 96}


def test_an_adapter_too_dense_for_shira_is_refused(tiny_model, tmp_path):
    _, adapter, _ = setup(tiny_model, density=0.97, score=random)
    adapter.save(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"r=\d+ needs \d+ entries in model.* SHiRA cannot hold"):
        export_shira(tmp_path / "dense", tmp_path / "shira")
    assert not (tmp_path / "shira").exists()


def damaged(**changes):
    def apply(folder):
        def change(tensors):
            key = next(name for name in sorted(tensors) if name.endswith(changes["kind"]))
            tensors[key] = changes["change"](tensors[key].clone()).contiguous()

        rewrite(folder, change)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "it has no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json is no JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "describes no adapter"),
        (configure(peft_type="LORA"), "is no SHiRA adapter: its peft_type is 'LORA'"),
        (cut, "is missing, broken or cut off"),
        (lambda f: (f / TENSORS).unlink(), "is missing, broken or cut off"),
        (damaged(kind="indices", change=lambda t: t[:, 1:]), "lacks shira_indices of shape"),
        (damaged(kind="indices", change=lambda t: t + 99), "leave the matrix"),
        (damaged(kind="indices", change=lambda t: t * 0), "sorted without repetition"),
        (damaged(kind="weight", change=lambda t: t / 0), "NaN or infinite"),
    ],
)
def test_a_bad_shira_folder_is_refused_by_name(made, tiny_model, tmp_path, damage, message):
    folder = tmp_path / "bad-one"
    export_shira(made[2], folder)
    (folder / "SHA256SUMS").unlink()  # as PEFT writes it
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        import_shira(folder, tmp_path / "out", load(tiny_model))
    assert "bad-one" in str(caught.value)
    assert not (tmp_path / "out").exists()
