"""Many readers and several writers on one adapter library: is anything lost or torn?

    OMP_NUM_THREADS=1 python benchmarks/library_load.py --seconds 60 --readers 100 --writers 8

Every reader and writer is a process of its own, forked from one that has imported everything. What an expert holds
follows from its name and its version, which its task tells, so every reader can say what it must find:

    reads      experts opened, which verifies three checksums, and every number compared
    gone       reads of an expert that was removed or replaced between index and file: the index says so too
    torn       reads that met something else than one complete expert
    adds       experts added, each read again by its writer; a third of them replace an earlier one of that name
    removes    experts removed
    lost       experts that a writer added and did not remove, and the index or the folder lacks, and removed ones
               that are still there

One JSON line for each kind of process, and one for all. The exit code is 1 if anything is torn or lost.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_modules.library.entry import AdapterEntry
from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.lora import LoraFactors

LAYERS = tuple(f"layers.{number}.q" for number in range(4))
KEPT = 20  # experts that a writer keeps at most, so that the index stays of one size


def content(name: str, number: int) -> dict[str, LoraFactors]:
    """Return what version `number` of an expert holds."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:6])
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: LoraFactors(
            torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator), 1.0 + number % 3
        )
        for layer in LAYERS
    }


def is_whole(entry: AdapterEntry) -> bool:
    """Open an expert, which verifies its checksums, and compare every number with what it must hold."""
    expert = entry.open()
    expected = content(entry.name, int(entry.tasks[0].removeprefix("version_")))
    found = {name.removesuffix(".weight"): expert.factors(name) for name in expert.names}
    return found.keys() == expected.keys() and all(
        torch.equal(found[layer].A, one.A)
        and torch.equal(found[layer].B, one.B)
        and found[layer].scaling == one.scaling
        for layer, one in expected.items()
    )


def read(root: Path, until: float, seed: int) -> dict[str, Any]:
    """Read experts at random until a time.

    Returns:
        Counts, and descriptions of what was torn.
    """
    rng = random.Random(f"reader {seed}")
    counts: Counter[str] = Counter()
    problems: list[str] = []
    library = AdapterLibrary(root)
    while time.monotonic() < until:
        if rng.random() < 0.1:
            library = AdapterLibrary(root)  # as a process that has just started
        names = list(library)
        if not names:
            continue
        entry = library.get(rng.choice(names))
        if entry is None:
            counts["gone"] += 1
            continue
        try:
            problem = "" if is_whole(entry) else "other numbers"
        except (ValueError, OSError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        now = AdapterLibrary(root).get(entry.name)
        if not problem:
            counts["reads"] += 1
        elif now is None or now.checksums != entry.checksums:
            counts["gone"] += 1
        else:
            counts["torn"] += 1
            problems.append(f"{entry.name}: {problem}")
    return {"counts": counts, "problems": problems}


def write(root: Path, until: float, seed: int) -> dict[str, Any]:
    """Add, replace and remove experts until a time.

    Returns:
        Counts, what must be there at the end, what must not, and descriptions of what was lost meanwhile.
    """
    rng = random.Random(f"writer {seed}")
    counts: Counter[str] = Counter()
    problems: list[str] = []
    alive: dict[str, int] = {}
    removed: list[str] = []
    made = 0
    library = AdapterLibrary(root)
    with tempfile.TemporaryDirectory() as aside:
        while time.monotonic() < until or not made:
            if len(alive) >= KEPT or (alive and rng.random() < 0.3):
                name = rng.choice(sorted(alive))
                library.remove(name)
                del alive[name]
                removed.append(name)
                counts["removes"] += 1
                continue
            made += 1
            again = removed and rng.random() < 0.33
            name = removed.pop(rng.randrange(len(removed))) if again else f"writer{seed}_{made}"
            folder = Path(aside) / str(made)
            folder.mkdir()
            write_expert(folder, content(name, made), "base/model")
            library.add(folder, name, tasks=[f"version_{made}"])
            alive[name] = made
            counts["adds"] += 1
            fresh = AdapterLibrary(root)
            if missing := [one for one in alive if one not in fresh]:
                problems.append(f"{missing} are not in the index")
            elif not is_whole(fresh[name]):
                problems.append(f"{name} reads otherwise than it was written")
    return {"counts": counts, "problems": problems, "alive": alive, "removed": removed}


def run(root: Path, readers: int, writers: int, seconds: float, seed: int) -> dict[str, dict[str, Any]]:
    """Run readers and writers, and compare the library with what the writers say.

    Args:
        root: The library, which is made.
        readers: Processes that read.
        writers: Processes that write.
        seconds: How long.
        seed: Of what is read and written; the order among processes is the machine's.

    Returns:
        Counts and problems of readers, of writers and of the library at the end.
    """
    AdapterLibrary(root, create=True)
    importlib.import_module("peft.utils.other")  # readers of LoRA would all import it, at once
    fork = multiprocessing.get_context("fork")
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as told:
        jobs: list[tuple[Callable[..., dict[str, Any]], int]] = [(write, n) for n in range(writers)]
        jobs += [(read, n) for n in range(readers)]

        def work(job: Callable[..., dict[str, Any]], number: int, file: Path) -> None:
            file.write_text(json.dumps(job(root, until, seed * 10_000 + number)))

        files = [Path(told) / str(number) for number in range(len(jobs))]
        processes = [
            fork.Process(target=work, args=(*job, file)) for job, file in zip(jobs, files, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        said = [json.loads(file.read_text()) if file.exists() else None for file in files]
    dead = sum(one is None for one in said)
    found = {
        "writers": _sum([one for one in said[:writers] if one]),
        "readers": _sum([one for one in said[writers:] if one]),
    }
    alive = {name: number for one in said[:writers] if one for name, number in one["alive"].items()}
    removed = {name for one in said[:writers] if one for name in one["removed"]}
    found["at the end"] = _compare(root, alive, removed)
    found["at the end"]["problems"] += [f"{dead} processes died"] if dead else []
    return found


def _sum(said: list[dict[str, Any]]) -> dict[str, Any]:
    counts: Counter[str] = sum((Counter(one["counts"]) for one in said), Counter())
    return {"processes": len(said), **counts, "problems": [text for one in said for text in one["problems"]]}


def _compare(root: Path, alive: dict[str, int], removed: set[str]) -> dict[str, Any]:
    """Compare index and folders with what must be there."""
    library = AdapterLibrary(root)
    problems = [f"{name} is lost" for name in sorted(alive.keys() - library.keys())]
    problems += [f"{name} is there again" for name in sorted(library.keys() & removed)]
    problems += [f"{name} came from nowhere" for name in sorted(library.keys() - alive.keys() - removed)]
    problems += [
        f"{name} is another version"
        for name, entry in library.items()
        if name in alive and (entry.tasks != (f"version_{alive[name]}",) or not is_whole(entry))
    ]
    return {"experts": len(library), "problems": problems + library.verify()}


def main() -> int:
    """Print what was counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--readers", type=int, default=100)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(
            Path(folder) / "library", arguments.readers, arguments.writers, arguments.seconds, arguments.seed
        )
    command = f"OMP_NUM_THREADS=1 python benchmarks/library_load.py {' '.join(sys.argv[1:])}".strip()
    facts = {"command": command, "seed": arguments.seed}
    torn, lost = len(found["readers"]["problems"]), 0
    for who, counts in found.items():
        problems = counts.pop("problems")
        lost += 0 if who == "readers" else len(problems)
        for problem in problems[:20]:
            print(f"{who}: {problem}", file=sys.stderr)
        print(json.dumps({**facts, "who": who, **counts, "problems": len(problems)}))
    total = {
        "who": "all",
        "reads": found["readers"].get("reads", 0),
        "gone": found["readers"].get("gone", 0),
        "writes": found["writers"].get("adds", 0) + found["writers"].get("removes", 0),
        "torn": torn,
        "lost": lost,
        "seconds": arguments.seconds,
        "processes": "each reader and writer one, forked from one parent",
        "versions": {name: version(name) for name in ("torch", "safetensors", "filelock")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps({**facts, **total}))
    return 1 if torn or lost else 0


if __name__ == "__main__":
    sys.exit(main())
