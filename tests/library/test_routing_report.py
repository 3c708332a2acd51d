"""RoutingReport in real runs: its numbers against a loop over single rows, its files, and what it does not count."""

from __future__ import annotations

import csv
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from peft import LoraConfig, get_peft_model
from PIL import Image
from small_runs import quiver, write_rows, write_run
from test_wandb import items, of_kind
from transformers import AutoModelForCausalLM

from callbacks import RoutingReport
from callbacks.routing_figure import routing_figure
from callbacks.routing_report import Report, _Watch
from datamodules import JsonlDataModule
from lightning_modules import AdapterLibraryModule, SFTModule
from lightning_modules.library.mixing import factor_mixing
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter
from lightning_modules.library.routers.learned import LinearRouter
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.routers.token import ArrowRouter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.library.watch import own_tasks, token_sums
from lightning_modules.sampling import Sampling

NAMES = ["ada", "bob", "cy"]
# Of different lengths, so that batches are padded; nobody has `other`.
ROWS = [
    {"prompt": f"{'What comes after ' * (i % 3)}{i}?", "answer": str(i + 1) * (1 + i % 2), "task": task}
    for i, task in enumerate(["ada", "bob", "cy", "other", "ada", "ada", "cy"])
]
DATA = {"val_file": "rows.jsonl", "test_file": "rows.jsonl", "task_column": "task"}


@pytest.fixture(scope="module")
def library(tiny_model, tmp_path_factory):
    """Three LoRA experts with a task each."""
    root = tmp_path_factory.mktemp("libraries")
    store = AdapterLibrary(root / "three", create=True)
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        config = LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(root / name)
        store.add(root / name, tasks=[name])
    return str(root / "three")


def report_of(model, folder, router, *, library=None, rows=ROWS, stage="validate", new_tokens=1, **options):
    """Run one stage; return the scalars, the rows of the table, and the module."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "rows.jsonl", rows)
    lightning.seed_everything(3, verbose=False)
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0)
    module = AdapterLibraryModule(
        router=router,
        library=library,
        model=model,
        sampling=sampling,
        max_tokens_per_microbatch=200,
        **options,
    )
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[RoutingReport()],
    )  # fmt: skip
    files = {name: str(folder / value) if "file" in name else value for name, value in DATA.items()}
    data = JsonlDataModule(train_file=str(folder / "rows.jsonl"), batch_size=4, **files)
    [metrics] = getattr(trainer, stage)(module, data, verbose=False)
    return {k: v for k, v in metrics.items() if k.startswith("routing/")}, table(folder), module


def table(folder) -> list[dict[str, str]]:
    with (folder / "routing.csv").open() as file:
        return list(csv.DictReader(file))


def by_hand(module, rows, new_tokens) -> dict[str, dict[str, list]]:
    """The twin: one row at a time, without padding or batches, a token at a time."""
    adapter, model = module.adapter, module.model.eval()
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        [prompt] = module.encode_prompts([row["prompt"]], room=8)
        [answer] = module.encode_answers([row["answer"]])
        generated, ids = [], list(prompt)
        for _ in range(new_tokens):
            adapter.route([row["task"]], [row["prompt"]])
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == module.tokenizer.eos_token_id:
                break
            generated.append(ids[-1])
        # The last token that is drawn is never read.
        read = [prompt + answer, prompt + generated[: new_tokens - 1]]
        for ids in read:
            outputs = {}
            hooks = [
                layer.router.register_forward_hook(
                    lambda *a, name=name, outputs=outputs: outputs.__setitem__(name, a[-1])
                )
                for name, layer in adapter.layers.items()
            ]
            model(torch.tensor([ids]))
            for hook in hooks:
                hook.remove()
            for name, routing in outputs.items():
                for position in range(len(ids)):
                    weights = [0.0] * len(adapter.stacked.names)
                    chosen = routing.index[0, position] if routing.index is not None else range(len(weights))
                    for expert, weight in zip(chosen, routing.weight[0, position], strict=True):
                        weights[int(expert)] += float(weight)
                    one = found[name]
                    one["load"].append(weights)
                    one["abstained"].append(float(not any(weights)))
                    if any(weights):
                        one["entropy"].append(-sum(w * math.log(w) for w in weights if w))
                    if row["task"] in adapter.stacked.names:
                        own = adapter.stacked.names.index(row["task"])
                        hit = float(any(weights) and weights[own] == max(weights))
                        one["accuracy"].append(hit)
                        one[row["task"]].append(hit)
    return found


def mean(values) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_numbers_equal_single_rows(tiny_model, tmp_path, library, stage, threshold):
    router = ArrowRouter(top_k=2, temperature=0.5, threshold=threshold)
    scalars, rows, module = report_of(
        tiny_model, tmp_path, router, library=library, stage=stage, new_tokens=6
    )
    expected = by_hand(module, ROWS, 6)
    assert [row["layer"] for row in rows] == list(module.adapter.layers)
    assert list(rows[0]) == ["layer", "accuracy", "entropy", "abstained", *NAMES]
    loads = {}
    for row in rows:
        one = expected[row["layer"]]
        loads[row["layer"]] = [mean(column) for column in zip(*one["load"], strict=True)]
        for name in ("accuracy", "entropy", "abstained"):
            if one[name]:
                assert float(row[name]) == pytest.approx(mean(one[name]), abs=2e-5), (row["layer"], name)
            else:
                assert row[name] == "", "a layer where every token abstains"
        assert [float(row[name]) for name in NAMES] == pytest.approx(loads[row["layer"]], abs=2e-5)
        assert sum(loads[row["layer"]]) == pytest.approx(1 - mean(one["abstained"]), abs=1e-5)
    layers = expected.values()
    everything = [load for own in loads.values() for load in own]
    assert scalars == pytest.approx(
        {
            "routing/abstained": mean([mean(one["abstained"]) for one in layers]),
            "routing/entropy": mean([mean(one["entropy"]) for one in layers if one["entropy"]]),
            "routing/entropy_share": mean([mean(one["entropy"]) for one in layers if one["entropy"]])
            / math.log(3),
            "routing/load_max": max(everything),
            "routing/load_min": min(everything),
            "routing/load_variation": mean(
                [
                    math.sqrt(mean([(x - mean(own)) ** 2 for x in own])) / mean(own)
                    for own in loads.values()
                    if any(own)
                ]
            ),
            "routing/accuracy": mean([hit for one in layers for hit in one["accuracy"]]),
            **{f"routing/accuracy/{n}": mean([hit for one in layers for hit in one[n]]) for n in NAMES},
        },
        abs=2e-5,
    )
    assert (scalars["routing/abstained"] > 0) == (threshold is not None)


def test_the_oracle_is_always_right(tiny_model, tmp_path, library):
    rows = [row for row in ROWS if row["task"] != "other"]
    scalars, lines, _ = report_of(tiny_model, tmp_path, TaskRouter(), library=library, rows=rows)
    assert scalars["routing/accuracy"] == scalars["routing/accuracy/bob"] == 1
    assert scalars["routing/entropy"] == scalars["routing/abstained"] == 0
    assert {row["accuracy"] for row in lines} == {"1.0"}


def test_uniform_weights_are_right_as_often_as_chance(tiny_model, tmp_path, library):
    scalars, *_ = report_of(tiny_model, tmp_path, UniformRouter(), library=library)
    assert scalars["routing/accuracy/ada"] == pytest.approx(1 / 3, abs=1e-6)
    assert scalars["routing/accuracy/cy"] == pytest.approx(1 / 3, abs=1e-6)
    assert scalars["routing/entropy_share"] == pytest.approx(1, abs=1e-6)
    assert scalars["routing/load_variation"] == pytest.approx(0, abs=1e-5)


def test_skills_that_share_all_tasks_have_no_accuracy(tiny_model, tmp_path):
    """MHR: weights per row and head."""
    scalars, lines, _ = report_of(
        tiny_model, tmp_path, PolyRouter(num_heads=4), experts=2,
        mixing=factor_mixing,
    )  # fmt: skip
    assert not any("accuracy" in name for name in scalars)
    assert {row["accuracy"] for row in lines} == {""}
    assert scalars["routing/entropy_share"] == pytest.approx(1, abs=1e-3)
    assert (Image.open(tmp_path / "routing.png")).format == "PNG"


@pytest.mark.parametrize("seed", range(20))
def test_token_sums_equal_a_loop(seed):
    torch.manual_seed(seed)
    B, S, E, T = 3, 4, 5, 3
    weight = torch.randint(0, 3, (B, S, E)).float() * (torch.rand(B, S, 1) < 0.7)
    mask, row_task = torch.randint(0, 2, (B, S)), torch.randint(-1, T, (B,))
    owners = torch.randint(0, E, (T,))
    expected = [0.0] * (3 + E + 2 * T)
    for b in range(B):
        for s in range(S):
            if not mask[b, s]:
                continue
            row = weight[b, s].tolist()
            expected[0] += 1
            expected[1] += not any(row)
            expected[2] -= sum(w / sum(row) * math.log(w / sum(row)) for w in row if w)
            for e in range(E):
                expected[3 + e] += row[e]
            if (task := int(row_task[b])) >= 0:
                best = [e for e in range(E) if row[e] == max(row)]
                if any(row) and int(owners[task]) in best:
                    expected[3 + E + task] += 1 / len(best)
                expected[3 + E + T + task] += 1
    assert token_sums(weight, mask, row_task, owners).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_experts_task_is_its_own_if_no_other_has_it():
    assert own_tasks(["a", "b"], {"a": ["x", "x", "y"], "b": ["y"]}) == {"x": 0}
    none = torch.tensor([], dtype=torch.int64)
    assert token_sums(torch.ones(1, 1, 2), torch.ones(1, 1), torch.tensor([-1]), none).shape == (5,)


# ---------------------------------------------------------------------- training


def fit(model, folder, callback, router, *, logger=True, **options):
    folder.mkdir(exist_ok=True)
    write_rows(folder / "rows.jsonl", [row for row in ROWS if row["task"] != "other"] * 2)
    lightning.seed_everything(3, verbose=False)
    module = AdapterLibraryModule(
        router=router, model=model, sampling=Sampling(max_new_tokens=1, temperature=0.0), gradient_checkpointing=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), **options,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=6, val_check_interval=3, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, callbacks=[callback],
        logger=CSVLogger(folder, name="", version="") if logger is True else logger,
    )  # fmt: skip
    file = str(folder / "rows.jsonl")
    trainer.fit(module, JsonlDataModule(train_file=file, val_file=file, task_column="task", batch_size=2))
    hooks = [h for layer in module.adapter.layers.values() for h in layer.router._forward_hooks]
    assert not hooks
    assert not module.model._forward_pre_hooks
    return module


def logged(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_trained_router_is_watched_in_training(tiny_model, tmp_path, library):
    fit(tiny_model, tmp_path, RoutingReport(2), LinearRouter(), library=library)
    name = "train/routing/entropy"
    found = {int(row["step"]) + 1: row[name] for row in logged(tmp_path) if name in row}
    assert min(found) == 2
    assert found[2] == found[3] != found[4] == found[5] != found[6], "loggers repeat the last value"
    validations = [row for row in logged(tmp_path) if "routing/accuracy" in row]
    assert len(validations) == 2
    names = sorted(path.name for path in tmp_path.iterdir() if "routing" in path.name)
    assert names == ["routing.csv", "routing.png"], "the run's last validation, in place of earlier ones"
    loads = [[float(row[name]) for name in NAMES] for row in table(tmp_path)]
    assert max(map(max, loads)) == pytest.approx(float(validations[-1]["routing/load_max"]), abs=1e-5)


def test_a_second_run_keeps_the_files_of_the_first(tiny_model, tmp_path, library):
    for _ in range(2):
        fit(tiny_model, tmp_path, RoutingReport(2), TaskRouter(), library=library, train_experts=True)
    names = sorted(path.name for path in tmp_path.iterdir() if "routing" in path.name)
    assert names == ["routing.1.csv", "routing.1.png", "routing.csv", "routing.png"]
    assert not any("train/routing" in name for row in logged(tmp_path) for name in row), "nothing to learn"


def test_without_matplotlib_there_is_the_table(tiny_model, tmp_path, library, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.warns(UserWarning, match=r"matplotlib: pip install 'lightning-quiver\[plots\]'"):
            callback = RoutingReport()
    fit(tiny_model, tmp_path, callback, UniformRouter(), library=library, train_experts=True)
    assert (tmp_path / "routing.csv").is_file()
    assert not (tmp_path / "routing.png").exists()


def test_wandb_has_scalars_table_and_picture(tiny_model, tmp_path, library):
    wandb.finish()
    logger = WandbLogger(project="quiver", save_dir=tmp_path, offline=True)
    fit(tiny_model, tmp_path, RoutingReport(2), LinearRouter(), library=library, logger=logger)
    wandb.finish()
    [written] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(300):  # W&B's own process may flush after `finish` returns
        if of_kind(written, "exit"):
            break
        time.sleep(0.1)
    values = [items(record.item) for record in of_kind(written, "history")]
    assert [name for value in values for name in value if name == "routing/accuracy/bob"]
    assert [name for value in values for name in value if name == "train/routing/entropy"]
    pictures = [value["routing_heat.filenames"] for value in values if "routing_heat.filenames" in value]
    assert len(pictures) == 2
    last = written.parent / "files" / pictures[-1][0]
    [root] = [path.parent for path in tmp_path.rglob("routing.csv")]
    assert last.read_bytes() == (root / "routing.png").read_bytes()
    assert [value["routing.path"] for value in values if "routing.path" in value]


def test_the_figure_shows_the_table():
    columns = ["layer", "accuracy", "entropy", "abstained", "a", "b"]
    rows = [[f"layers.{i}", None if i == 2 else 0.5, 0.1, 0.0, i / 70, 1 - i / 70] for i in range(70)]
    figure = routing_figure(columns, rows)
    heat, lines = figure.axes[:2]
    [image] = heat.get_images()
    assert image.get_array().tolist() == [row[4:] for row in rows]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["a", "b"]
    accuracy = lines.get_lines()[0].get_xdata()
    assert math.isnan(accuracy[2])
    assert accuracy[3] == 0.5


def test_layers_come_in_their_order(tiny_model):
    """Experts of a library name layers as files do: 0, 1, 10, 11, 2."""
    module = AdapterLibraryModule(UniformRouter(), experts=1, model=tiny_model)
    module.configure_model()
    layer = next(iter(module.adapter.layers.values()))
    names = sorted(f"model.layers.{i}.{kind}" for i in range(12) for kind in ("mlp", "attn"))
    module.adapter.layers = dict.fromkeys(names, layer)
    watch = _Watch(module)
    expected = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("attn", "mlp")]
    assert list(watch.sums) == expected
    width = 4
    report = Report(tuple(watch.sums), ("skill_0",), (), torch.ones(24, width))
    columns, rows = report.table()
    assert [row[0] for row in rows] == expected
    figure = routing_figure(columns, rows)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == expected


def test_a_figure_of_many_experts_can_be_saved(tmp_path):
    names = [f"expert_{i}" for i in range(300)]
    rows = [[f"layer {i}", None, 0.0, 1.0, *[0.0] * 300] for i in range(3)]
    figure = routing_figure(["layer", "accuracy", "entropy", "abstained", *names], rows)
    figure.savefig(tmp_path / "x.png")
    assert max(Image.open(tmp_path / "x.png").size) < 10_000


# ---------------------------------------------------------------------- ranks and bad input


@pytest.mark.slow
def test_two_ranks_count_as_one(tiny_model, tmp_path, library):
    """Both see half of the rows; sums over ranks are those of one."""
    results = {}
    before = Path.cwd()
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        os.chdir(folder)
        try:
            router = {"class_path": "ArrowRouter", "init_args": {"top_k": 2}}
            adapter = {
                "class_path": "lightning_modules.RoutedAdapter",
                "init_args": {"router": router, "library": library},
            }
            file = write_run(
                tiny_model, module="SFTModule", init_args={"adapter": adapter},
                data={"task_column": "task", "val_file": "rows.jsonl"}, devices=ranks,
                strategy="ddp" if ranks == 2 else "auto", callbacks=[{"class_path": "RoutingReport"}],
            )  # fmt: skip
            write_rows("train.jsonl", ROWS)
            write_rows("rows.jsonl", ROWS)
            code, _, err = quiver("validate", "-c", file)
        finally:
            os.chdir(before)
        assert code == 0, err
        names = sorted(path.name for path in (folder / "run").iterdir() if "routing" in path.name)
        assert names == ["routing.csv", "routing.png"]
        results[ranks] = table(folder / "run")
    for one, two in zip(results[1], results[2], strict=True):
        for name in ("accuracy", "entropy", *NAMES):
            assert float(one[name]) == pytest.approx(float(two[name]), abs=1e-4), (one["layer"], name)


def test_a_module_without_router_is_named(tiny_model):
    with pytest.raises(
        ValueError, match=r"watches a router, and this SFTModule has none. Use AdapterLibraryModule"
    ):
        RoutingReport().setup(None, SFTModule(model=tiny_model), "fit")
    with pytest.raises(ValueError, match=r"this BoringModel has none.*leave RoutingReport out"):
        RoutingReport().setup(None, type("BoringModel", (lightning.LightningModule,), {})(), "fit")


def test_every_n_steps_is_at_least_one():
    with pytest.raises(ValueError, match="every_n_steps=0: must be at least 1"):
        RoutingReport(every_n_steps=0)
