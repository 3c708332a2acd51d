"""SparseStats in real runs: its numbers against python sets, its table, its picture, and what W&B gets."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from small_runs import ADDITIONS, quiver, write_rows, write_run
from test_wandb import items, of_kind

from callbacks import SparseStats
from callbacks.density_figure import density_figure, heat_maps
from callbacks.sparse_stats import expert_labels
from datamodules import JsonlDataModule
from lightning_modules import SFTModule, SparseAdapterModule
from lightning_modules.cli import main
from lightning_modules.sparse import schedules, scores
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.stats import WeightStats, overlap, shared_count
from lightning_modules.sparse.storage import write_sparse

KINDS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
SHAPES = {f"model.layers.{i}.{kind}.weight": shape for i in range(2) for kind, shape in KINDS.items()}
STEPS = 6


def write_expert(folder, names, density, seed, **shapes) -> str:
    """An expert that trains random entries of the weights of these names."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        shape = shapes.get(name, SHAPES.get(name, (257, 32)))
        indices = (torch.rand(math.prod(shape), generator=generator) < density).nonzero().flatten().int()
        deltas[name] = SparseDelta(indices, torch.ones(len(indices)), shape)
    folder.mkdir(parents=True)
    write_sparse(folder, deltas.items(), {})
    return str(folder)


def two_experts(folder) -> list[str]:
    """One that changes layer 0 and a weight that no run trains, and one that changes everything but q_proj."""
    names = list(SHAPES)
    first = [*names[: len(KINDS)], "model.embed_tokens.weight"]
    second = [name for name in names if "q_proj" not in name]
    return [
        write_expert(folder / "sums" / "adapter", first, 0.3, 1),
        write_expert(folder / "logic" / "adapter", second, 0.6, 2),
    ]


def sets_of(folder) -> dict[str, set[int]]:
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return {
        name.removesuffix(".indices"): set(tensor.tolist())
        for name, tensor in tensors.items()
        if name.endswith(".indices")
    }


class States(lightning.Callback):
    """Keeps the trained positions and values of each weight after each step."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = pl_module.adapter.state_dict()
        self.kept.append(
            {
                name: (
                    set(state.get(f"{name}.indices", torch.arange(math.prod(shape))).tolist()),
                    state[f"{name}.values"].tolist(),
                )
                for name, shape in SHAPES.items()
                if f"{name}.values" in state
            }
        )


def fit(model, folder, *callbacks, module=None, max_steps=STEPS, lr=0.01, **adapter):
    """Train the tiny model on CPU; return what each step logged."""
    lightning.seed_everything(5, verbose=False)
    folder.mkdir(exist_ok=True)
    write_rows(folder / "rows.jsonl", ADDITIONS * 4)
    module = module or SparseAdapterModule(
        model=model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr), **adapter
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks),
    )
    trainer.fit(module, JsonlDataModule(train_file=str(folder / "rows.jsonl"), batch_size=1))
    return metrics(folder)


def metrics(folder) -> dict[int, dict[str, float]]:
    """What was logged, by step from 1; values that are repeated are left in."""
    with (folder / "metrics.csv").open() as file:
        return {
            int(row["step"]) + 1: {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def by_hand(state, previous, experts) -> dict[str, float]:
    """The twin: everything from python sets."""
    sizes = {name: math.prod(SHAPES[name]) for name in state}
    trained = {name: entries for name, (entries, _) in state.items()}
    count = sum(map(len, trained.values()))
    layers = []
    for layer in ("layers.0.", "layers.1."):
        names = [name for name in state if layer in name]
        layers.append(sum(len(trained[name]) for name in names) / sum(sizes[name] for name in names))
    result = {
        "sparse/trained": count,
        "sparse/density": count / sum(sizes.values()),
        "sparse/delta_norm": math.sqrt(sum(value**2 for _, values in state.values() for value in values)),
        "sparse/layer_density/min": min(layers),
        "sparse/layer_density/mean": sum(layers) / 2,
        "sparse/layer_density/max": max(layers),
    }
    if previous is not None:
        new = sum(len(trained[name] - previous[name][0]) for name in state)
        result["sparse/churn"] = new / count
    for label, theirs in experts.items():
        both = [name for name in state if name in theirs]
        mine = sum(len(trained[name]) for name in both)
        shared = sum(len(trained[name] & theirs[name]) for name in both)
        chance = sum(len(trained[name]) * len(theirs[name]) / sizes[name] for name in both)
        result[f"sparse/overlap/{label}"] = shared / mine if mine else 0
        result[f"sparse/overlap_by_chance/{label}"] = chance / mine if mine else 0
    return result


@pytest.mark.parametrize(
    "adapter",
    [
        {"schedule": schedules.FirstEpochs(every=2), "score": scores.gradient_magnitude},
        {"schedule": schedules.GrowAndDrop(every=1, steps=9, fraction=0.5), "density": 0.2},
        {"schedule": schedules.OneShot(steps=3), "density": 0.001, "budget": "global"},
        {"schedule": schedules.Static(batches=0), "score": scores.random, "structure": "row"},
    ],
    ids=["dense then chosen anew", "grow and drop", "global with empty weights", "static rows"],
)
@pytest.mark.parametrize("every", [1, 2])
def test_numbers_equal_python_sets(tiny_model, tmp_path, adapter, every):
    folders = two_experts(tmp_path)
    states = States()
    logged = fit(tiny_model, tmp_path / "run", SparseStats(every, folders), states, **adapter)
    experts = dict(zip(["sums/adapter", "logic/adapter"], map(sets_of, folders), strict=True))
    assert len(states.kept) == STEPS
    previous = None
    for step in range(every, STEPS + 1, every):
        expected = by_hand(states.kept[step - 1], previous, experts)
        found = {name: value for name, value in logged[step].items() if name.startswith("sparse/")}
        rounded = [found.pop(f"sparse/{name}") for name in ("kept", "rounding_error", "unmoved")]
        assert rounded == pytest.approx([1, 0, 0], abs=0.01)  # the base is float32
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), step
        previous = states.kept[step - 1]
    assert every == 1 or not any(name.startswith("sparse/") for name in logged[1])
    counts = [len(entries) for entries, _ in states.kept[-1].values()]
    assert (0 in counts) == (adapter.get("budget") == "global")
    check_table(tmp_path / "run", states.kept[-1], experts)


def check_table(folder, state, experts):
    with (folder / "sparse_density.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["weight", "trained", "size", "density", *(f"overlap/{name}" for name in experts)]
    assert [row["weight"] for row in rows] == list(state)
    for row in rows:
        entries, size = state[row["weight"]][0], math.prod(SHAPES[row["weight"]])
        assert (int(row["trained"]), int(row["size"])) == (len(entries), size)
        assert float(row["density"]) == len(entries) / size
        for name, theirs in experts.items():
            if row["weight"] not in theirs or not entries:
                assert row[f"overlap/{name}"] == ""
            else:
                shared = len(entries & theirs[row["weight"]]) / len(entries)
                assert float(row[f"overlap/{name}"]) == shared


def test_what_rounding_leaves_in_a_bfloat16_base_is_logged(tiny_model, tmp_path):
    class Written(lightning.Callback):
        """Measures on the weights themselves, after each step."""

        def __init__(self):
            self.measured = []

        def on_fit_start(self, trainer, pl_module):
            self.base = {
                n: p.detach().double() for n, p in pl_module.model.named_parameters() if p.dim() == 2
            }

        def on_train_batch_end(self, trainer, pl_module, *args):
            wanted, arrived = [], []
            for name, delta in pl_module.adapter.deltas.items():
                moved = pl_module.model.get_parameter(name).detach().double() - self.base[name]
                wanted.append(delta.values.double())
                arrived.append(moved.flatten()[delta.indices.long()])
            wanted, arrived = torch.cat(wanted), torch.cat(arrived)
            kept = (arrived * wanted.sign()).clamp(min=0).minimum(wanted.abs())
            still = (arrived == 0) & (wanted != 0)
            self.measured.append(
                {
                    "sparse/kept": float(kept.norm() / wanted.norm()),
                    "sparse/rounding_error": float((arrived - wanted).norm() / wanted.norm()),
                    "sparse/unmoved": float(still.sum() / (wanted != 0).sum()),
                }
            )

    written = Written()
    options = {"schedule": schedules.Static(batches=0), "score": scores.weight_magnitude}
    logged = fit(tiny_model, tmp_path, SparseStats(1), written, dtype="bfloat16", lr=1e-4, **options)
    assert len(written.measured) == STEPS
    for step, expected in enumerate(written.measured, 1):
        assert {name: logged[step][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert logged[1]["sparse/unmoved"] > 0.3


def test_dense_and_unchosen_phases_are_told_apart(tiny_model, tmp_path):
    dense = fit(tiny_model, tmp_path / "dense", SparseStats(1), schedule=schedules.OneShot(steps=3))
    assert [dense[step]["sparse/density"] for step in (1, 2)] == [1, 1]
    assert dense[3]["sparse/density"] == pytest.approx(0.05, rel=0.02)
    assert "sparse/churn" not in dense[1]
    assert [dense[step]["sparse/churn"] for step in range(2, STEPS + 1)] == [0] * (STEPS - 1)
    late = fit(tiny_model, tmp_path / "late", SparseStats(1), schedule=schedules.Static(batches=3))
    assert [late[step]["sparse/trained"] for step in (1, 2)] == [0, 0]
    assert late[3]["sparse/density"] == pytest.approx(0.05, rel=0.02)
    assert [late[step]["sparse/churn"] for step in (2, 3, 4)] == [0, 1, 0]


@pytest.mark.parametrize(("sizes", "size"), [((0, 7), 50), ((50, 50), 50), ((9, 40), 60), ((1, 1), 2)])
def test_shared_count_equals_sets(sizes, size):
    for seed in range(20):
        torch.manual_seed(seed)
        first, second = (torch.randperm(size)[:count].sort().values for count in sizes)
        expected = len(set(first.tolist()) & set(second.tolist()))
        assert shared_count(first.int(), second, size) == expected
        assert shared_count(second, first.int(), size) == expected
        assert shared_count(None, first, size) == shared_count(first, None, size) == len(first)
    assert shared_count(None, None, size) == size


def test_overlap_by_chance_is_what_random_choices_share():
    torch.manual_seed(0)
    sizes, mine, theirs = [400, 100], [40, 60], [200, 30]
    shares = []
    for _ in range(2000):
        shared = [
            shared_count(torch.randperm(n)[:a].sort().values, torch.randperm(n)[:b].sort().values, n)
            for n, a, b in zip(sizes, mine, theirs, strict=True)
        ]
        shares.append(sum(shared) / sum(mine))
    stats = [
        WeightStats(str(i), a, n, {"x": (0, b)})
        for i, (n, a, b) in enumerate(zip(sizes, mine, theirs, strict=True))
    ]
    assert overlap(stats, "x")[1] == pytest.approx(sum(shares) / len(shares), abs=0.005)
    assert overlap([WeightStats("w", 0, 10, {"x": (0, 5)})], "x") == (0, 0)


# ---------------------------------------------------------------------- the picture


def test_heat_maps_put_each_weight_into_its_cell():
    stats = [
        WeightStats("model.embed_tokens.weight", 1, 10, {}),
        WeightStats("model.layers.10.attn.c_proj.weight", 2, 10, {"x": (1, 5)}),
        WeightStats("model.layers.10.mlp.c_proj.weight", 0, 10, {"x": (0, 5)}),
        WeightStats("model.layers.2.attn.c_proj.weight", 4, 10, {"x": (3, 5)}),
        WeightStats("model.layers.2.mlp.experts.0.up.weight", 5, 10, {}),
        WeightStats("model.layers.2.mlp.experts.1.up.weight", 1, 20, {}),
    ]
    panels, rows, columns = heat_maps(stats, ["x"])
    assert rows == ["2", "10", "other"]
    assert columns == ["attn.c_proj", "mlp.c_proj", "up", "embed_tokens"]
    nan = math.nan
    density, shared = panels.values()
    np.testing.assert_array_equal(density, [[0.4, nan, 0.2, nan], [0.2, 0, nan, nan], [nan, nan, nan, 0.1]])
    np.testing.assert_array_equal(shared, [[0.75, nan, nan, nan], [0.5, nan, nan, nan], [nan] * 4])
    assert list(panels) == ["density", "overlap with x\n0.667, by chance 0.5"]
    two = [WeightStats(f"{stack}.layers.0.q_proj.weight", 1, 2, {}) for stack in ("vision", "text")]
    assert heat_maps(two, [])[1] == ["vision.layers.0", "text.layers.0"]


@pytest.mark.parametrize("experts", [0, 2, 5])
def test_the_figure_has_a_panel_for_each_matrix(experts):
    matrices = {"density": np.array([[0.1, np.nan, 0.2]] * 2)}
    matrices |= {f"overlap with {i}": np.full((2, 3), i / 10) for i in range(experts)}
    figure = density_figure(matrices, ["0", "1"], ["q_proj", "k_proj", "up_proj"])
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == list(matrices)
    for axis, matrix in zip(panels, matrices.values(), strict=True):
        [image] = axis.get_images()
        np.testing.assert_array_equal(image.get_array().filled(np.nan), matrix)
        assert [label.get_text() for label in axis.get_xticklabels()] == ["q_proj", "k_proj", "up_proj"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
    tops = [axis.get_images()[0].get_clim() for axis in panels]
    assert tops == [(0, 0.2), *[(0, (experts - 1) / 10)] * experts]


def test_the_figure_of_nothing_trained_can_be_saved(tmp_path):
    matrices = {"density": np.zeros((60, 2)), "overlap": np.full((60, 2), np.nan)}
    density_figure(matrices, [str(i) for i in range(60)], ["a", "b"]).savefig(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").format == "PNG"


def test_a_second_run_keeps_the_files_of_the_first(tiny_model, tmp_path):
    for density in (0.1, 0.2):
        fit(tiny_model, tmp_path, SparseStats(), max_steps=1, density=density)
    names = sorted(path.name for path in tmp_path.iterdir() if "sparse_density" in path.name)
    assert names == [f"sparse_density{end}" for end in (".1.csv", ".1.png", ".csv", ".png")]
    for name, density in (("sparse_density.1.csv", 0.1), ("sparse_density.csv", 0.2)):
        with (tmp_path / name).open() as file:
            found = [float(row["density"]) for row in csv.DictReader(file)]
        assert found == pytest.approx([density] * len(SHAPES), rel=0.01)
    assert (tmp_path / "sparse_density.png").read_bytes() != (tmp_path / "sparse_density.1.png").read_bytes()


def test_without_image_or_matplotlib_there_is_the_table(tiny_model, tmp_path, monkeypatch):
    fit(tiny_model, tmp_path / "without", SparseStats(image=False), max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.warns(UserWarning, match=r"matplotlib: pip install 'lightning-quiver\[plots\]'"):
            callback = SparseStats()
    fit(tiny_model, tmp_path / "missing", callback, max_steps=1)
    for folder in (tmp_path / "without", tmp_path / "missing"):
        assert (folder / "sparse_density.csv").is_file()
        assert not (folder / "sparse_density.png").exists()


# ---------------------------------------------------------------------- the command line and W&B


def stats(**arguments):
    return {"class_path": "SparseStats", "init_args": arguments}


def sparse(**arguments):
    return {"class_path": "lightning_modules.SparseAdapter", "init_args": arguments}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The folder of a finished run through the command line, and the path of its .wandb file."""
    folder = tmp_path_factory.mktemp("sparse_stats")
    before = Path.cwd()
    os.chdir(folder)
    try:
        loggers = [
            {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "run", "name": "", "version": ""},
            },
            {
                "class_path": "lightning.pytorch.loggers.WandbLogger",
                "init_args": {"project": "quiver", "save_dir": str(folder / "run"), "offline": True},
            },
        ]
        (folder / "run").mkdir()
        one_shot = {"class_path": "lightning_modules.sparse.schedules.OneShot", "init_args": {"steps": 2}}
        file = write_run(
            tiny_model,
            module="SFTModule",
            init_args={"adapter": sparse(density=0.1, schedule=one_shot)},
            data={"batch_size": 1},
            max_steps=4,
            log_every_n_steps=1,
            logger=loggers,
            limit_val_batches=0,
            callbacks=[stats(every_n_steps=1, experts=two_experts(folder))],
        )
        wandb.finish()
        assert main(["fit", "-c", file]) == 0
        wandb.finish()
    finally:
        os.chdir(before)
    [written] = (folder / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(300):  # W&B's own process may flush after `finish` returns
        if of_kind(written, "exit"):
            break
        time.sleep(0.1)
    return folder / "run", written


def test_wandb_has_the_scalars_of_the_csv(run):
    folder, written = run
    in_history = {
        (name, values["trainer/global_step"] + 1, round(float(value), 6))
        for values in map(items, (record.item for record in of_kind(written, "history")))
        for name, value in values.items()
        if name.startswith("sparse/")
    }
    in_csv = {
        (name, step, round(value, 6))
        for step, row in metrics(folder).items()
        for name, value in row.items()
        if name.startswith("sparse/")
    }
    assert in_history == in_csv
    density = {step: value for name, step, value in in_csv if name == "sparse/density"}
    assert [round(density[step], 2) for step in (1, 2, 3, 4)] == [1, 0.1, 0.1, 0.1]
    assert {"sparse/overlap/sums/adapter", "sparse/overlap_by_chance/logic/adapter"} <= {
        n for n, *_ in in_csv
    }


def test_wandb_has_picture_and_table(run):
    folder, written = run
    values = [items(record.item) for record in of_kind(written, "history")]
    [names] = [value["sparse_density.filenames"] for value in values if "sparse_density.filenames" in value]
    logged = written.parent / "files" / names[0]
    assert logged.read_bytes() == (folder / "sparse_density.png").read_bytes()
    with Image.open(logged) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # not blank
    [path] = [value["sparse_weights.path"] for value in values if "sparse_weights.path" in value]
    table = json.loads((written.parent / "files" / path).read_text())
    with (folder / "sparse_density.csv").open() as file:
        columns, *rows = csv.reader(file)
    assert table["columns"] == columns
    assert [["" if cell is None else str(cell) for cell in row] for row in table["data"]] == rows


def test_other_ranks_write_nothing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", property(lambda trainer: False))
    fit(tiny_model, tmp_path, SparseStats(), max_steps=1)
    assert not list(tmp_path.glob("*sparse_density*"))


@pytest.mark.slow
def test_two_ranks_end_with_one_set_of_files(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_run(
        tiny_model,
        module="SFTModule",
        init_args={"adapter": sparse()},
        data={"batch_size": 1},
        devices=2,
        strategy="ddp",
        max_steps=1,
        limit_val_batches=0,
        callbacks=[stats(every_n_steps=1)],
    )
    code, _, err = quiver("fit", "-c", file)
    assert code == 0, err
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if "sparse_density" in path.name)
    assert names == ["sparse_density.csv", "sparse_density.png"]


# ---------------------------------------------------------------------- bad input


def break_file(folder):
    file = Path(folder) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: [str(place)], "no adapter_config.json"),
        (lambda place: [write_expert(place / "x", list(SHAPES), 0.1, 1)] * 2, "x is named twice"),
        (
            lambda place: [write_expert(place / "x", ["model.embed_tokens.weight"], 0.1, 1)],
            "x changes none of the weights that this run trains: it has",
        ),
        (
            lambda place: [write_expert(place / "x", list(SHAPES), 0.1, 1, **{list(SHAPES)[1]: (32, 32)})],
            r"self_attn.k_proj.weight of shape \(32, 32\); in this run it is \(16, 32\)",
        ),
    ],
    ids=["no adapter", "twice", "nothing shared", "shape"],
)
def test_bad_experts_are_named(tiny_model, tmp_path, make, message):
    with pytest.raises(ValueError, match=f"SparseStats, experts: .*{message}"):
        fit(tiny_model, tmp_path / "run", SparseStats(experts=make(tmp_path)))


def test_a_broken_expert_stops_the_command_before_training(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expert = write_expert(tmp_path / "expert", list(SHAPES), 0.1, 1)
    break_file(expert)
    file = write_run(
        tiny_model,
        module="SFTModule",
        init_args={"adapter": sparse()},
        callbacks=[stats(experts=[expert])],
    )
    code, _, err = quiver("fit", "-c", file)
    assert code != 0
    assert "SparseStats, experts: " in err
    assert "adapter_model.safetensors is broken or cut off" in err
    assert "Traceback" not in err


def test_a_module_without_sparse_adapter_is_named(tiny_model, tmp_path):
    with pytest.raises(
        ValueError, match=r"this SFTModule is \w+. Use SparseAdapterModule, or set model.init"
    ):
        fit(tiny_model, tmp_path, SparseStats(), module=SFTModule(model=tiny_model))
    with pytest.raises(ValueError, match=r"watches a CausalLMModule, not BoringModel.*leave SparseStats out"):
        SparseStats().setup(None, type("BoringModel", (lightning.LightningModule,), {})(), "fit")


def test_every_n_steps_is_at_least_one():
    with pytest.raises(ValueError, match="every_n_steps=0: must be at least 1"):
        SparseStats(every_n_steps=0)


def test_experts_are_named_by_what_tells_them_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(expert_labels(["a/sums", "b/logic/", "./c"])) == ["sums", "logic", "c"]
    assert list(expert_labels(["a/x/adapter", "b/x/adapter"])) == ["a/x/adapter", "b/x/adapter"]
    assert expert_labels([]) == {}
