"""Every module trains every adapter on a pretend accelerator: tensors lie where they must, and the host seldom waits.

`-s` prints how often it waits. A wait is a value that comes back, or a copy to the device that the host waits for.
"""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import lightning.pytorch as lightning
import peft
import pretend_device
import pytest
import torch
from pretend_device import DEVICE, PretendStrategy
from transformers import AutoModelForCausalLM

from datamodules import MultiTaskDataModule
from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules import (
    AdapterLibraryModule,
    ArrowRouter,
    CausalLMModule,
    CentroidRouter,
    GRPOModule,
    LinearRouter,
    NativeSampler,
    PhatgooseGates,
    PolyRouter,
    RetrievalRouter,
    RoutedAdapter,
    SFTModule,
    SparseAdapter,
    SparseAdapterModule,
    SpectralRouter,
    TaskRouter,
    UniformRouter,
    WeightsRouter,
)
from lightning_modules.grpo.reference import KL, Snapshot
from lightning_modules.library.mixing import factor_mixing
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sampling import GenerateSampler, Sampling
from lightning_modules.sampling.filters import cumulated
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, OneShot, Static
from lightning_modules.sparse.scores import random, signed_sensitivity, weight_magnitude

TASKS = ["less", "more"]
ROWS = [(f"{task} {i}=", str(i + (1 if task == "more" else -1)), task) for i in range(3) for task in TASKS]
SHORT = Sampling(max_new_tokens=3, temperature=0.0)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Torch knows the device, and base models come to it when they are loaded, as they do on a GPU."""
    load = CausalLMModule._load_base

    def load_there(self):
        with torch.device("cpu"):
            model = load(self)
        return model.to(DEVICE)

    monkeypatch.setattr(CausalLMModule, "_load_base", load_there)
    with pretend_device.installed() as waits:
        yield waits
    torch.use_deterministic_algorithms(False)


def by_number(completions, **columns) -> list[float]:
    """No two completions are equally good."""
    return [float(i) for i in range(len(completions))]


def batch(indices) -> TextBatch:
    prompts, answers, tasks = ([ROWS[i][column] for i in indices] for column in range(3))
    choices = [["1", "2"] if i == 5 else [] for i in indices]
    return TextBatch(prompts, answers, tasks, list(indices), {"answer": answers}, choices)


def loader(size=3) -> EvalLoader:
    return EvalLoader(batch, len(ROWS), size)


class Placed(lightning.Callback):
    """Looks where everything lies while it does, and how often the host waits in an update."""

    def __init__(self, waits):
        self.waits, self.norms, self.updates = waits, [], []

    def on_train_start(self, trainer, module):
        self.before = [p.detach().cpu().clone() for p in module.trained_parameters()]
        update = module.update

        def counted(losses):
            with self.waits.counted():
                norm = update(losses)
            self.updates.append((len(losses), self.waits.syncs, self.waits.blocking))
            return norm

        module.update = counted

    def on_train_batch_end(self, trainer, module, *_):
        assert {one.device.type for one in (*module.parameters(), *module.buffers())} == {DEVICE.type}
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
        self.after = [p.detach().cpu().clone() for p in module.trained_parameters()]


def fit(module, waits, *, data=None, steps=2, own=1, name="", **options) -> None:
    """Train two steps, with torch's deterministic algorithms, and validate.

    Args:
        module: Of ours.
        waits: The fixture.
        data: A DataModule in place of our rows.
        steps: How many.
        own: How often our code waits in an update; None does not look.
        name: For the printed line.
        **options: Of the Trainer.
    """
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(1)
    placed = Placed(waits)
    trainer = lightning.Trainer(
        **quiet, **options, strategy=PretendStrategy(), deterministic=True, enable_checkpointing=False, max_steps=steps,
        num_sanity_val_steps=0, inference_mode=False, val_check_interval=2, limit_val_batches=1, callbacks=[placed],
    )  # fmt: skip
    if data is None:
        trainer.fit(module, loader(), loader(size=6))
    else:
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    assert max(placed.norms) > 0
    assert any(metric.startswith("val/") for metric in trainer.callback_metrics)
    pairs = zip(placed.before, placed.after, strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
    assert all(bool(p.isfinite().all()) for p in placed.after)
    passes, syncs, copies = placed.updates[-1]
    of_transformers = {place: count for place, count in syncs.items() if place.startswith("transformers")}
    ours = syncs - Counter(of_transformers)
    kind = f"{type(module).__name__} {name}"
    theirs = sum(of_transformers.values())
    print(
        f"update  {kind:42} {ours.total()} waits, {copies.total()} blocking copies; transformers {theirs} waits"
    )
    if own is not None:
        assert ours.total() == own, ours
        routed = {place: count for place, count in copies.items() if "/library/" in place}
        assert copies.keys() == routed.keys()
        assert sum(routed.values()) <= 4 * passes  # where rows go is said once a pass, not once a layer
        assert theirs <= 3 * passes  # its masks: are there padded columns?


def adapters(structure="element", schedule=Static()):  # noqa: B008  frozen
    sparse = SparseAdapter(
        density=0.1, structure=structure, block=4, score=weight_magnitude, schedule=schedule
    )
    return {
        "full": None,
        "LoRA": peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        "sparse": sparse,
        "experts": RoutedAdapter(TaskRouter(), experts=TASKS, rank=2),
    }


def options(tiny_model, **more):
    optimizer = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    return {"model": tiny_model, **optimizer, **more}


@pytest.mark.parametrize("name", adapters())
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sft(tiny_model, waits, name, precision):
    module = SFTModule(adapter=adapters()[name], sampling=SHORT, **options(tiny_model))
    fit(module, waits, own=2 if name == "experts" else 1, name=f"{name}, {precision}", precision=precision)


@pytest.mark.parametrize("name", adapters())
def test_grpo(tiny_model, waits, name):
    sampler = GenerateSampler if name == "experts" else NativeSampler
    reference = Snapshot() if name == "full" else None
    kl = KL(coef=0.1, **({"reference": reference} if reference else {}))
    module = GRPOModule(
        rewards=[by_number], adapter=adapters()[name], num_generations=4, kl=kl, sampler=sampler(),
        sampling=Sampling(max_new_tokens=5, stop=["7"], repetition_penalty=1.1), **options(tiny_model),
    )  # fmt: skip
    fit(module, waits, own=2 if name == "experts" else 1, name=name)


SPARSE = {
    **{
        structure: {"structure": structure, "block": 4} for structure in ("element", "row", "column", "block")
    },
    "random": {"score": random},
    "one shot": {"schedule": OneShot(1)},
    "first epochs": {"schedule": FirstEpochs(2), "score": signed_sensitivity},
    "grow and drop": {"schedule": GrowAndDrop(1), "budget": "global"},
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_module(tiny_model, waits, name):
    module = SparseAdapterModule(density=0.1, sampling=SHORT, **SPARSE[name], **options(tiny_model))
    chooses = "schedule" in SPARSE[name]  # in the last update too
    fit(module, waits, steps=3, own=None if chooses else 1, name=name)


# ---------------------------------------------------------------------- libraries


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for part in ("train", "test"):
        for task in TASKS:
            file = folder / part / f"{task}.jsonl"
            file.parent.mkdir(exist_ok=True)
            rows = [{"input": p, "output": a} for p, a, own in ROWS if own == task]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data(tasks) -> MultiTaskDataModule:
    return MultiTaskDataModule(folder=str(tasks), batch_size=3, val_batch_size=4, validate_on_test=True)


@pytest.fixture(scope="module")
def library(tiny_model, tmp_path_factory):
    """Two LoRA experts."""
    root = tmp_path_factory.mktemp("library")
    store = AdapterLibrary(root / "lora", create=True)
    for number, task in enumerate(TASKS):
        torch.manual_seed(number)
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(
            root / task
        )
        store.add(root / task, tasks=[task])
    return str(root / "lora")


@pytest.fixture(scope="module")
def sparse_library(tiny_model, tmp_path_factory):
    """Two sparse experts."""
    root = tmp_path_factory.mktemp("sparse_library")
    store = AdapterLibrary(root / "sparse", create=True)
    for number, task in enumerate(TASKS):
        adapter = SparseAdapter(density=0.1, score=random, schedule=Static(batches=0))
        adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
        for weight in adapter.weights:
            torch.nn.init.normal_(weight.values, std=0.05, generator=torch.Generator().manual_seed(number))
        adapter.save(root / task)
        store.add(root / task, tasks=[task])
    return str(root / "sparse")


NEW = {
    "private": {"router": TaskRouter()},
    "shared": {"router": UniformRouter(), "experts": 1},
    "skills": {"router": PolyRouter(), "experts": 3, "mixing": factor_mixing},
    "heads": {"router": PolyRouter(num_heads=4), "experts": 3, "mixing": factor_mixing},
}
FOUND = {
    "task": {"router": TaskRouter(), "train_experts": True},
    "uniform": {"router": UniformRouter(), "train_experts": True},
    "weights": {"router": WeightsRouter({"less": 0.5, "more": 0.5}), "train_experts": True},
    "arrow": {"router": ArrowRouter(1), "train_experts": True},
    "arrow, a threshold": {"router": ArrowRouter(2, threshold=0.1), "train_experts": True},
    "spectral": {"router": SpectralRouter(1), "train_experts": True},
    "centroid": {"router": CentroidRouter(1), "train_experts": True},
    "linear": {"router": LinearRouter(2)},
    "gates": {"router": PhatgooseGates()},
    "retrieval": {"router": RetrievalRouter(), "train_experts": True},
    "poly": {"router": PolyRouter(), "mixing": factor_mixing, "train_experts": True},
}


@pytest.mark.parametrize("name", NEW)
def test_new_libraries(tiny_model, waits, tasks, name):
    """Beside the gradient, an update asks which experts are absent."""
    module = AdapterLibraryModule(rank=2, sampling=SHORT, **NEW[name], **options(tiny_model))
    fit(module, waits, data=data(tasks), own=2, name=name)


@pytest.mark.parametrize("name", FOUND)
def test_routers_of_a_library(tiny_model, waits, tasks, library, name):
    module = AdapterLibraryModule(library=library, sampling=SHORT, **FOUND[name], **options(tiny_model))
    fit(module, waits, data=data(tasks), own=1 if name == "linear" else 2, name=name)


@pytest.mark.parametrize("name", ["linear", "poly"])
def test_routers_of_a_sparse_library(tiny_model, waits, tasks, sparse_library, name):
    own = {"linear": {"router": LinearRouter(2)}, "poly": {"router": PolyRouter()}}[name]
    module = AdapterLibraryModule(library=sparse_library, sampling=SHORT, **own, **options(tiny_model))
    fit(module, waits, data=data(tasks), name=f"sparse, {name}")


# ---------------------------------------------------------------------- how often the host waits for a token


def made(tiny_model, adapter):
    """A module without a Trainer, its model on the device."""
    module = SFTModule(adapter=adapter, **options(tiny_model))
    module._trainer = SimpleNamespace(strategy=PretendStrategy(), precision="32-true", training=False)
    module.configure_model()
    module._trainer = None
    return module.to(DEVICE)


def per_token(module, waits, **sampling) -> tuple[float, float, Counter[str]]:
    """Waits for values, and blocking copies, that each further token of all rows costs, and where."""
    few, many, counted = 3, 7, []
    for tokens in (few, many):
        sampler = NativeSampler()
        sampler.bind(module.model, module.tokenizer)
        with waits.counted():
            done = sampler.generate(
                [[5, 6, 7]] * 8 + [[8, 9]] * 8,
                Sampling(max_new_tokens=tokens, **sampling),
                lambda rows: module.adapter.route(["more"] * len(rows), [""] * len(rows)),
                seeds=range(16),
            )
        assert {len(ids) for ids in done.token_ids} == {tokens}
        counted.append((waits.syncs, waits.blocking))
    (syncs, copies), (more_syncs, more_copies) = counted
    steps = many - few
    found = (
        (more.total() - less.total()) / steps for less, more in ((syncs, more_syncs), (copies, more_copies))
    )
    return *found, more_syncs - syncs + (more_copies - copies)


def test_a_token_costs_one_wait(tiny_model, library, sparse_library, waits, monkeypatch):
    """Have rows ended? Stop strings need the text, and sparse experts how many tokens each has in each layer."""
    monkeypatch.setattr("lightning_modules.sampling.native.stop_tokens", lambda *_: [])
    filters = {"repetition_penalty": 1.1, "top_p": 0.9, "top_k": 9, "min_p": 0.1}
    cases = {name: (adapter, {}, 1) for name, adapter in adapters().items()}
    cases["LoRA, stop strings"] = (adapters()["LoRA"], {"stop": ["never"]}, 2)
    cases["LoRA, all filters"] = (adapters()["LoRA"], filters, 1)
    for router in (ArrowRouter(1), UniformRouter(), TaskRouter()):
        cases[f"library, {type(router).__name__}"] = (RoutedAdapter(router, library=library), {}, 1)
    layers = 14
    cases["sparse library, TaskRouter"] = (
        RoutedAdapter(TaskRouter(), library=sparse_library),
        {},
        1 + layers,
    )
    cases["sparse library, UniformRouter"] = (RoutedAdapter(UniformRouter(), library=sparse_library), {}, 1)
    found = {}
    for name, (adapter, sampling, _) in cases.items():
        syncs, copies, places = per_token(made(tiny_model, adapter), waits, **sampling)
        print(f"token   {name:42} {syncs:g} waits, {copies:g} blocking copies")
        found[name] = (syncs, copies, places)
    for name, (_, _, expected) in cases.items():
        syncs, copies, places = found[name]
        assert (syncs, copies) == (expected, 0), (name, places)


# ---------------------------------------------------------------------- the pretend device itself


def test_tensors_of_both_kinds_do_not_mix(waits):
    there, here = torch.arange(3.0).to(DEVICE), torch.arange(3.0)
    for mixed in (
        lambda: there + here,
        lambda: here.index_select(0, there.long()),
        lambda: here[there.long()],
        lambda: torch.cat([there, here]),
        lambda: there.index_copy(0, torch.tensor([0]), there[:1]),
    ):
        with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
            mixed()
    assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]  # a number


def test_waits_are_counted_where_they_are_made(waits):
    there = torch.arange(3.0).to(DEVICE)
    with waits.counted():
        there.sum().item(), there.tolist(), bool(there.any()), there.nonzero(), there[there > 1], there.cpu()
    assert waits.syncs.total() == 6
    assert waits.blocking.total() == 0
    with waits.counted():
        (
            torch.ones(2).to(DEVICE),
            torch.ones(2).to(DEVICE, non_blocking=True),
            torch.tensor([1], device=DEVICE),
        )
    assert waits.blocking.total() == 2
    there.sum().item()
    assert waits.syncs.total() == 0


@pytest.mark.parametrize("algorithm", [lambda t: t.cumsum(0), lambda t: t.kthvalue(1), lambda t: t.histc(2)])
def test_what_a_gpu_cannot_do_deterministically_is_refused(waits, algorithm):
    there = torch.arange(3.0).to(DEVICE)
    algorithm(there)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="deterministic"):
        algorithm(there)


def test_nothing_of_it_stays(waits):
    patched = torch.autocast
    with pretend_device.installed():
        assert torch.autocast is not patched
    assert torch.autocast is patched
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype(DEVICE.type) == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("count", [1, 5, 256, 257, 70_000])
def test_sums_along_rows_have_a_deterministic_form(waits, count):
    torch.manual_seed(0)
    values = torch.rand(2, count, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(cumulated(values.to(DEVICE)).cpu(), values.cumsum(-1))
