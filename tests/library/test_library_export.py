"""LibraryExport and LibraryExpert: what is trained enters a library, and what is in one is trained on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import LORA, quiver, write_rows, write_run
from transformers import AutoModelForCausalLM

from callbacks import GracefulStop, LibraryExport
from callbacks.graceful_stop import StoppedError
from callbacks.library_export import metrics_of
from datamodules import JsonlDataModule
from lightning_modules import AdapterLibraryModule, SFTModule
from lightning_modules.adapters import PeftAdapter
from lightning_modules.cli import main
from lightning_modules.library.expert_adapter import LibraryExpert
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sampling import Sampling
from lightning_modules.sparse.adapter import SparseAdapter

EXPERT = "lightning_modules.library.expert_adapter.LibraryExpert"
ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "task": "ab"[i % 2]} for i in range(4)]
IDS = torch.arange(1, 41)[None] * 5 % 257


@pytest.fixture
def library(tiny_model, tmp_path):
    """A library of one LoRA expert, `parent`."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 2}, use_rslora=True,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "made")
    store = AdapterLibrary(tmp_path / "library", create=True)
    store.add(tmp_path / "made", "parent", tasks=["sums", "more sums"], metrics={"loss": 1.0})
    return str(tmp_path / "library")


def weights(library, name) -> dict[str, torch.Tensor]:
    return load_file(AdapterLibrary(library)[name].folder / "adapter_model.safetensors")


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.log_softmax(-1)


def fit(model, folder, adapter, *callbacks, max_steps=2, module=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", ROWS)
    lightning.seed_everything(5, verbose=False)
    options = {"sampling": Sampling(max_new_tokens=1, temperature=0.0), "model": model, **options}
    module = module or SFTModule(
        adapter=adapter, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), **options
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    file = str(folder / "rows.jsonl")
    trainer.fit(module, JsonlDataModule(train_file=file, val_file=file, task_column="task", batch_size=2))
    return module


# ---------------------------------------------------------------------- GRPO on top of an expert


class FirstLogprobs(lightning.Callback):
    """Compares the policy of the first training step with the parent."""

    def __init__(self, library: str, model: str) -> None:
        self.library, self.model = library, model

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0 and batch_idx == 0:
            base = AutoModelForCausalLM.from_pretrained(self.model)
            before = logprobs(base)
            parent = PeftModel.from_pretrained(base, AdapterLibrary(self.library)["parent"].folder)
            own, training = logprobs(pl_module.model), pl_module.model.training
            assert (own - before).abs().max() > 0.01
            torch.testing.assert_close(own, logprobs(parent), rtol=0, atol=1e-5)
            with pl_module.adapter.disabled():
                torch.testing.assert_close(logprobs(pl_module.model), before, rtol=0, atol=1e-6)
            pl_module.model.train(training)
            Path("compared").touch()


def test_grpo_on_top_of_an_expert_from_yaml(tiny_model, tmp_path, library, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in AdapterLibrary(library)["parent"].folder.iterdir()}
    file = write_run(
        tiny_model,
        init_args={
            "adapter": {"class_path": EXPERT, "init_args": {"library": library, "expert": "parent"}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "kl": {"coef": 0.01},
        },
        callbacks=[
            {"class_path": "LibraryExport", "init_args": {"library": library, "name": "after_grpo"}},
            {
                "class_path": "test_library_export.FirstLogprobs",
                "init_args": {"library": library, "model": tiny_model},
            },
        ],
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["fit", "-c", file]) == 0, capsys.readouterr().err
    assert f"Added after_grpo to the library {library}" in capsys.readouterr().out
    assert Path("compared").exists()
    store = AdapterLibrary(library)
    assert list(store) == ["parent", "after_grpo"]
    entry = store["after_grpo"]
    assert entry.lineage == ("parent",)
    assert entry.tasks == ("sums", "more sums")
    assert entry.base == tiny_model
    assert "reward" in entry.metrics
    assert len(entry.fingerprint) == 14
    assert store.verify() == []
    assert before == {path: path.read_bytes() for path in store["parent"].folder.iterdir()}
    old, new = weights(library, "parent"), weights(library, "after_grpo")
    assert old.keys() == new.keys()
    assert all(old[name].shape == new[name].shape for name in old)
    assert any(not torch.equal(old[name], new[name]) for name in old)
    # It is what was trained, and a parent in turn.
    again = LibraryExpert(library, "after_grpo")
    model = again.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), entry.folder)
    torch.testing.assert_close(logprobs(model), logprobs(peft), rtol=0, atol=1e-6)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == len(new)


def test_an_expert_is_trained_from_what_it_is(tiny_model, tmp_path, library):
    """Without an update nothing changes: the copy holds the parent's numbers."""
    module = SFTModule(
        model=tiny_model, adapter=LibraryExpert(library, "parent"),
        sampling=Sampling(max_new_tokens=1, temperature=0.0),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )  # fmt: skip
    fit(tiny_model, tmp_path / "run", None, LibraryExport(library, name="copy"), max_steps=1, module=module)
    old, new = weights(library, "parent"), weights(library, "copy")
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("name", ["nobody", "sparse", "other base", "broken"])
def test_an_expert_that_cannot_be_trained_on_is_named(tiny_model, tmp_path, library, name):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    if name == "nobody":
        with pytest.raises(ValueError, match=r"has no 'nobody'. It has parent"):
            LibraryExpert(library, name)
    elif name == "sparse":
        fit(tiny_model, tmp_path / "run", SparseAdapter(density=0.1), LibraryExport(library, name="sparse"))
        with pytest.raises(ValueError, match="expert='sparse' is a sparse adapter"):
            LibraryExpert(library, name)
    elif name == "other base":
        fit(
            tiny_model,
            tmp_path / "run",
            LoraConfig(r=2, target_modules="all-linear"),
            LibraryExport(library, name="known"),
        )
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight.add_(1)
        with pytest.raises(
            ValueError, match=r"known was trained on other weights: model.layers.0.mlp.up_proj"
        ):
            LibraryExpert(library, "known").attach(base)
    else:
        config = tmp_path / "made" / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 3', '"r": 7'))
        AdapterLibrary(library).add(tmp_path / "made", name)
        with pytest.raises(ValueError, match=r"describes other weights than it holds. Remove 'broken'"):
            LibraryExpert(library, name).attach(base)


# ---------------------------------------------------------------------- other adapters


def test_a_lora_enters_under_the_name_of_the_run(tiny_model, tmp_path):
    library = str(tmp_path / "new")
    config = LoraConfig(r=2, target_modules="all-linear")
    module = fit(tiny_model, tmp_path / "first_run", config, LibraryExport(library))
    entry = AdapterLibrary(library)["first_run"]
    assert (entry.kind, entry.tasks, entry.lineage, entry.base) == ("lora", ("a", "b"), (), tiny_model)
    assert entry.metrics.keys() == {"loss", "exact_match", "rouge_l"}
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), entry.folder)
    torch.testing.assert_close(logprobs(peft), logprobs(module.model), rtol=0, atol=1e-5)


def test_a_sparse_adapter_brings_its_fingerprint(tiny_model, tmp_path):
    library = str(tmp_path / "new")
    export = LibraryExport(library, name="few", tasks=["c"])
    fit(tiny_model, tmp_path / "run", SparseAdapter(density=0.1), export)
    entry = AdapterLibrary(library)["few"]
    assert (entry.kind, entry.tasks, entry.base) == ("sparse", ("c",), tiny_model)
    assert len(entry.fingerprint) == 14


def routed(tiny_model, **options):
    return AdapterLibraryModule(
        model=tiny_model, sampling=Sampling(max_new_tokens=1, temperature=0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), **options,
    )  # fmt: skip


def test_experts_enter_with_the_metrics_of_their_tasks(tiny_model, tmp_path):
    library = str(tmp_path / "new")
    module = routed(tiny_model, router=TaskRouter(), experts={"one": ["a"], "two": ["b"]}, rank=2)
    fit(tiny_model, tmp_path / "run", None, LibraryExport(library, prefix="v1-"), module=module)
    store = AdapterLibrary(library)
    assert list(store) == ["v1-one", "v1-two"]
    metrics = module.trainer.callback_metrics
    for name, task in (("v1-one", "a"), ("v1-two", "b")):
        assert store[name].metrics["loss"] == pytest.approx(float(metrics[f"val/loss/{task}"]))
        assert store[name].tasks == (task,)
    again = routed(tiny_model, router=TaskRouter(), experts={"one": ["a"], "two": ["b"]}, rank=2)
    with pytest.raises(ValueError, match=r"has an expert 'v1-one' already. Set another name or prefix"):
        fit(tiny_model, tmp_path / "run", None, LibraryExport(library, prefix="v1-"), module=again)
    assert again.trainer.global_step == 0


def test_experts_trained_on_name_their_parents(tiny_model, tmp_path, library):
    module = routed(tiny_model, router=UniformRouter(), library=library, train_experts=True)
    fit(tiny_model, tmp_path / "run", None, LibraryExport(library, prefix="more-"), module=module)
    assert AdapterLibrary(library)["more-parent"].lineage == ("parent",)


def test_metrics_of_an_expert_are_means_over_its_tasks():
    metrics = {"f1": 9.0, "f1/x": 1.0, "f1/y": 3.0, "f1/z": 7.0, "bleu/en/de": 0.5, "bleu/de": 4.0}
    assert metrics_of(metrics, ("x", "y")) == {"f1": 2.0}
    assert metrics_of(metrics, ("en/de",)) == {"bleu": 0.5}
    assert metrics_of(metrics, ()) == {}


# ---------------------------------------------------------------------- names that are taken, and other refusals


class Occupy(lightning.Callback):
    """Another run that adds an expert of the same name while this one trains."""

    def __init__(self, library: str, name: str) -> None:
        self.library, self.name = library, name

    def on_train_end(self, trainer, pl_module):
        store = AdapterLibrary(self.library)
        store.add(store["parent"].folder, self.name)


def test_a_taken_name_is_refused_before_the_model_is_loaded(tiny_model, tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = {"class_path": "LibraryExport", "init_args": {"library": library, "name": "parent"}}
    file = write_run(tiny_model, module="SFTModule", callbacks=[export])
    code, out, err = quiver("fit", "-c", file)
    assert code == 1
    assert "has an expert 'parent' already. Set another name or prefix, or remove it first" in err
    assert "Traceback" not in err
    assert "step" not in out


def test_a_name_that_is_taken_meanwhile_gets_a_number(tiny_model, tmp_path, library):
    config = LoraConfig(r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match=r"another run took 'mine'.* the adapter is added as 'mine.1'"):
        fit(tiny_model, tmp_path / "run", config, LibraryExport(library, "mine"), Occupy(library, "mine"))
    assert list(AdapterLibrary(library)) == ["parent", "mine", "mine.1"]
    assert [AdapterLibrary(library)[name].rank for name in ("mine", "mine.1")] == [3, 2]
    module = routed(tiny_model, router=TaskRouter(), experts=["a", "b"], rank=2)
    with pytest.warns(UserWarning, match=r"another run took 'x-'.* experts begin with 'x-1.'"):
        fit(
            tiny_model,
            tmp_path / "run",
            None,
            LibraryExport(library, prefix="x-"),
            Occupy(library, "x-b"),
            module=module,
        )
    assert {"x-1.a", "x-1.b"} <= set(AdapterLibrary(library))


class Spoil(lightning.Callback):
    """A library whose index breaks while a run trains."""

    def __init__(self, library: str) -> None:
        self.library = library

    def on_train_end(self, trainer, pl_module):
        (Path(self.library) / "index.json").write_text("{")


@pytest.mark.parametrize("kind", ["lora", "routed"])
def test_what_a_library_refuses_is_kept(tiny_model, tmp_path, library, kind):
    module = None
    if kind == "routed":
        module = routed(tiny_model, router=TaskRouter(), experts=["a", "b"], rank=2)
    export = LibraryExport(library) if kind == "routed" else LibraryExport(library, "mine")
    with pytest.raises(ValueError, match=r"What was trained is kept as .*run/not-in-library"):
        fit(
            tiny_model,
            tmp_path / "run",
            LoraConfig(r=2, target_modules="all-linear"),
            export,
            Spoil(library),
            module=module,
        )
    kept = tmp_path / "run" / "not-in-library"
    if kind == "routed":
        assert list(AdapterLibrary(kept)) == ["a", "b"]
    else:
        assert json.loads((kept / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("adapter", "arguments", "message"),
    [
        (
            None,
            {"name": "x"},
            "holds LoRA and sparse adapters, and this SFTModule trains FullFineTuning. Set",
        ),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), {"name": "x"}, "trains IA3Config"),
        (LoraConfig(r=2, target_modules="all-linear", use_dora=True), {"name": "x"}, "a rehearsal.*use_dora"),
        (
            LoraConfig(r=2, target_modules="all-linear"),
            {"prefix": "x"},
            "prefix: is for the experts of a Rou",
        ),
        (LoraConfig(r=2, target_modules="all-linear"), {}, "the run's folder is called 'a run', which is no"),
    ],
    ids=["full", "ia3", "dora", "prefix", "folder"],
)
def test_what_cannot_be_added_is_said_before_training(tiny_model, tmp_path, adapter, arguments, message):
    module = SFTModule(model=tiny_model, adapter=adapter)
    with pytest.raises(ValueError, match=f"LibraryExport.*{message}"):
        fit(tiny_model, tmp_path / "a run", None, LibraryExport("new", **arguments), module=module)
    assert module.trainer.global_step == 0
    assert not (tmp_path / "new").exists()


def test_arguments_that_do_not_apply_are_named(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"name='../x': an expert's name has"):
        LibraryExport("new", name="../x")
    with pytest.raises(ValueError, match="exports a CausalLMModule, not BoringModel"):
        LibraryExport("new").setup(None, type("BoringModel", (lightning.LightningModule,), {})(), "fit")
    module = routed(tiny_model, router=TaskRouter(), experts=["a", "b"])
    with pytest.raises(ValueError, match="name and tasks: are for a single adapter"):
        fit(tiny_model, tmp_path, None, LibraryExport("new", name="x"), module=module)


# ---------------------------------------------------------------------- runs that did not end


class Fail(lightning.Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("out of memory")


class Stop(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        next(one for one in trainer.callbacks if isinstance(one, GracefulStop))._asked = signal.SIGTERM


def test_a_run_that_did_not_end_adds_nothing(tiny_model, tmp_path, library):
    config = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tiny_model, tmp_path / "failed", config, LibraryExport(library), Fail())
    with pytest.raises(StoppedError):
        fit(tiny_model, tmp_path / "stopped", config, LibraryExport(library), Stop(), GracefulStop())
    fit(tiny_model, tmp_path / "nothing", config, LibraryExport(library), max_steps=0)
    assert list(AdapterLibrary(library)) == ["parent"]


def test_other_ranks_add_nothing(tiny_model, tmp_path, library, monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", property(lambda trainer: False))
    fit(tiny_model, tmp_path / "run", LoraConfig(r=2, target_modules="all-linear"), LibraryExport(library))
    assert list(AdapterLibrary(library)) == ["parent"]


@pytest.mark.slow
def test_two_ranks_add_one_expert(tiny_model, tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = {"class_path": "LibraryExport", "init_args": {"library": library}}
    file = write_run(
        tiny_model, module="SFTModule", init_args={"adapter": LORA}, data={"batch_size": 1}, devices=2,
        strategy="ddp", max_steps=1, callbacks=[export],
    )  # fmt: skip
    code, _, err = quiver("fit", "-c", file)
    assert code == 0, err
    assert list(AdapterLibrary(library)) == ["parent", "run"]
    assert isinstance(LibraryExpert(library, "run"), PeftAdapter)
