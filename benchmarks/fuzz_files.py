"""Damages every kind of file that Quiver reads and counts what happens.

    OMP_NUM_THREADS=1 python benchmarks/fuzz_files.py --cases 2000 --seed 0

Each case damages one file (cut off, bits flipped, bytes zeroed, inserted or taken out, exchanged with another file,
replaced by noise) and reads it as a user would. Good outcomes are:

    error      a message of Quiver's that names the file or its folder, without a traceback
    same       the result is that of the intact file: the damage hit nothing that matters, such as a space
    as written text without checksums (JSONL, YAML) still says something, and that is what was read
    unnoticed  the weights of an adapter without checksums, which Quiver did not write, differ and are still numbers

Any other is a failure: a traceback of another library, or a wrong result. It is printed with its seed, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from datamodules import JsonlDataModule
from lightning_modules.checksums import SUMS, write_checksums
from lightning_modules.cli import main as quiver
from lightning_modules.errors import _is_message, _origin
from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.experts import Expert, LoraExpert, open_expert
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.storage import write_sparse

GOOD = ("error", "same", "as written", "unnoticed")
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SHAPES = {LAYERS[0]: (32, 32), LAYERS[1]: (32, 64)}


# ---------------------------------------------------------------------- damage


def damage(data: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return what was done and the damaged bytes."""
    how = rng.choice(["cut", "flip", "flips", "zeros", "insert", "take", "swap", "noise", "retype"])
    at = rng.randrange(len(data)) if data else 0
    changed = bytearray(data)
    if how == "cut":
        return how, data[:at]
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else 8):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif how == "insert":
        changed[at:at] = rng.randbytes(rng.randint(1, 16))
    elif how == "take":
        del changed[at : at + rng.randint(1, 64)]
    elif how == "swap":
        return how, other
    elif how == "noise":
        return how, rng.choice([rng.randbytes(rng.randint(0, 300)), b"[" * 100_000, b'{"a":' * 100_000])
    else:
        return how, retyped(data, rng)
    return how, bytes(changed)


ODD = (
    None,
    -1,
    10**400,
    10**5000,
    1.5,
    "",
    "../../x",
    [],
    [[]],
    {},
    {"": 0},
    True,
    "\ud800",
    "[(",
    float("nan"),
)


def retyped(data: bytes, rng: random.Random) -> bytes:
    """Replace a random value of a JSON, JSONL or YAML text by an odd one; other files get their first half twice."""
    sys.set_int_max_str_digits(0)
    try:
        text = data.decode()
        for load, dump in ((json.loads, json.dumps), (_jsonl, _to_jsonl), (yaml.safe_load, yaml.safe_dump)):
            with contextlib.suppress(ValueError, yaml.YAMLError):
                content = load(text)
                if isinstance(content, dict | list):
                    return dump(_odd(content, rng)).encode()
    except UnicodeDecodeError:
        pass
    finally:
        sys.set_int_max_str_digits(4300)
    return data[: len(data) // 2] * 2


def _jsonl(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line]


def _to_jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _odd(content: Any, rng: random.Random) -> Any:
    """Put an odd value into nested data."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        pairs = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in pairs:
            places.append((value, key))
            walk(item)

    walk(content)
    if places:
        owner, key = rng.choice(places)
        owner[key] = rng.choice(ODD)
    return content


# ---------------------------------------------------------------------- what is read


@dataclass
class Kind:
    """A kind of file.

    Attributes:
        name: For the count.
        files: What may be damaged.
        read: Reads all of it and returns what can be compared.
        accept: Says whether another result is right, given the damaged file: "as written", "unnoticed" or None.
        others: What files are exchanged with; by default each other.
        share: Of the cases of other kinds; less where reading takes seconds.
    """

    name: str
    files: list[Path]
    read: Callable[[], Any]
    accept: Callable[[Any, Path], str | None] = lambda result, file: None  # noqa: ARG005
    others: list[Path] = field(default_factory=list)
    share: float = 1.0


def kinds(root: Path, model: str | None = None) -> list[Kind]:
    """Write intact files of every kind below a folder.

    Args:
        root: An empty folder.
        model: A tiny model, for what needs one.
    """
    found = [*_library(root), *_adapters(root, model), *_texts(root)]
    return [*found, *_models(root, model), *_checkpoints(root, model)] if model else found


def _lora(folder: Path, seed: int, base: str | None) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    factors = {
        name: (torch.randn(2, SHAPES[name][1]), torch.randn(SHAPES[name][0], 2), 1.5) for name in LAYERS
    }
    write_expert(folder, factors, base)
    return folder


def _sparse(folder: Path, seed: int, base: str | None) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    deltas = []
    for name in LAYERS:
        size = SHAPES[name][0] * SHAPES[name][1]
        indices = torch.randperm(size)[:20].sort().values.int()
        deltas.append((name + ".weight", SparseDelta(indices, torch.randn(20), SHAPES[name])))
    write_sparse(folder, deltas, {"base_model_name_or_path": base})
    return folder


def _library(root: Path) -> list[Kind]:
    place = root / "library"
    store = AdapterLibrary(place, create=True)
    for number in range(3):
        tasks = [f"task_{number}", "all"]
        store.add(
            _lora(root / f"lora_{number}", number, "base/model"), tasks=tasks, metrics={"exact_match": 0.5}
        )
    store.add(_sparse(root / "sparse_3", 3, "base/model"))
    store.put_arrays("lora_0", "arrow", {"v": torch.randn(4, 5)}, {"k": 1})
    index = place / "index.json"

    def experts() -> Any:
        library = AdapterLibrary(place)
        opened = {
            name: (entry.as_json(), dict(entry.fingerprint), entry.open()) for name, entry in library.items()
        }
        return {name: (*facts, values(expert)) for name, (*facts, expert) in opened.items()}

    def arrays() -> Any:
        found = AdapterLibrary(place).find_arrays("lora_0", "arrow", {"k": 1})
        return None if found is None else {name: array.tolist() for name, array in found.items()}

    held = sorted(path for path in (place / "experts").rglob("*") if path.is_file())
    return [
        Kind("library index.json: list", [index], command("library", "list", place, "--as_json", "true")),
        Kind("library index.json: experts", [index], experts, others=held),
        Kind("library experts: open", held, experts),
        Kind("library experts: verify", held, command("library", "verify", place)),
        Kind(
            "library arrays",
            sorted((place / "arrays").iterdir()),
            arrays,
            accept=lambda result, file: "error" if result is None else None,  # noqa: ARG005
            others=[*held, index],
        ),
    ]


def _adapters(root: Path, model: str | None) -> list[Kind]:
    found = []
    for name, make in (("LoRA", _lora), ("sparse", _sparse)):
        sealed = [make(root / f"sealed_{name}_{number}", number, model or "base/model") for number in (0, 1)]
        for folder in sealed:
            write_checksums(folder)
        plain = [make(root / f"plain_{name}_{number}", number, model or "base/model") for number in (0, 1)]
        files = [path for folder in sealed for path in sorted(folder.iterdir())]
        found.append(
            Kind(
                f"{name} adapter of ours",
                files,
                lambda sealed=sealed: [values(open_expert(str(f))) for f in sealed],
            )
        )
        files = [path for folder in plain for path in sorted(folder.iterdir())]
        found.append(
            Kind(
                f"{name} adapter without checksums",
                files,
                lambda plain=plain: [values(open_expert(str(folder))) for folder in plain],
                accept=lambda result, file: "unnoticed" if finite(result) else None,  # noqa: ARG005
            )
        )
    return found


def _texts(root: Path) -> list[Kind]:
    rows = root / "rows.jsonl"
    lines = [
        {"prompt": f"{i}+1=", "answer": str(i + 1), "note": "ä\u2028é", "n": [i, 1.5, None]} for i in range(8)
    ]
    rows.write_text("".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(lines)))

    def read_rows() -> Any:
        data = JsonlDataModule(train_file=str(rows), batch_size=2)
        data.setup("fit")
        return list(data.rows("train"))

    def is_as_written(result: Any, file: Path) -> str | None:
        data = file.read_bytes().split(b"\n")
        texts = [line.decode("utf-8-sig" if i == 0 else "utf-8").strip() for i, line in enumerate(data)]
        return "as written" if repr([json.loads(text) for text in texts if text]) == repr(result) else None

    config = root / "run.yaml"
    recipe = Path(__file__).resolve().parent.parent / "configs" / "sft" / "instruction_induction.yaml"
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings["data"] = {
        "class_path": "JsonlDataModule",
        "init_args": {"train_file": str(rows), "batch_size": 2},
    }
    config.write_text("# A run\n" + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    other = root / "other.yaml"
    other.write_text("trainer:\n  max_steps: 3\n", encoding="utf-8")
    printed = command("fit", "-c", config, "--print_config")
    return [
        Kind("JSONL", [rows], read_rows, accept=is_as_written, others=[config]),
        Kind(
            "YAML",
            [config],
            lambda: yaml.safe_load(printed()),
            accept=says_the_same,
            others=[rows, other],
            share=0.2,
        ),
    ]


def _models(root: Path, model: str) -> list[Kind]:
    """What goes through a model: `quiver export` and `quiver merge`, and a fine-tuned model as an expert."""
    from safetensors.torch import load_file

    own = root / "fine_tuned"
    own.mkdir()
    for file in Path(model).iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    weights = load_file(own / "model.safetensors")
    save_file(
        {name: weight + 0.5 for name, weight in weights.items()},
        own / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_checksums(own)
    lora, sparse = _lora(root / "to_merge", 7, model), _sparse(root / "to_merge_too", 8, model)
    write_checksums(lora)
    write_checksums(sparse)
    count = iter(range(10**9))

    def written(*arguments: Any) -> Callable[[], Any]:
        def run() -> Any:
            output = root / "written" / str(next(count))
            command(*(output if argument == "OUTPUT" else argument for argument in arguments))()
            merged = load_file(output / "model.safetensors")
            return {name: weight.double().sum().item() for name, weight in merged.items()}

        return run

    files = [path for folder in (lora, sparse) for path in sorted(folder.iterdir())]
    ours = [path for path in sorted(own.iterdir()) if path.name in ("model.safetensors", SUMS)]
    merge = ("merge", "--output", "OUTPUT", "--experts", lora, sparse, "--method", "task_arithmetic")
    average = ("merge", "--output", "OUTPUT", "--experts", own, lora, "--method", "average", "--base", model)
    return [
        Kind("quiver merge", files, written(*merge), share=0.3),
        Kind("quiver merge, a model", ours, written(*average), share=0.3),
        Kind(
            "quiver export, LoRA",
            sorted(lora.iterdir()),
            written("export", lora, "OUTPUT"),
            others=files,
            share=0.3,
        ),
        Kind(
            "quiver export, sparse",
            sorted(sparse.iterdir()),
            written("export", sparse, "OUTPUT"),
            others=files,
        ),
    ]


def _checkpoints(root: Path, model: str) -> list[Kind]:
    """What a run wrote, as a file and as a folder, and what a command makes of it."""
    from lightning_modules.checkpoint_io import CompleteCheckpointIO
    from lightning_modules.sharded_files import write_sharded

    place = root / "checkpoints"
    rows = root / "to_learn.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(4)))
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": "all-linear"}}
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(place)},
    }
    settings = {
        "model": {"class_path": "SFTModule", "init_args": {"model": model, "adapter": lora}},
        "data": {
            "class_path": "JsonlDataModule",
            "init_args": {"train_file": str(rows), "val_file": str(rows), "batch_size": 2},
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 1, "num_sanity_val_steps": 0, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(root / "run"),
            "callbacks": [saver],
        },
    }  # fmt: skip
    config = root / "to_learn.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command("fit", "-c", config)()
    [file] = place.glob("*.ckpt")
    io_of_ours = CompleteCheckpointIO()
    folder = root / "sharded.ckpt"
    write_sharded(io_of_ours.load_checkpoint(file), folder)
    others = [path for path in root.rglob("*.safetensors") if path.stat().st_size > 1000][:3]

    def loaded(path: Path) -> Callable[[], Any]:
        return lambda: _numbers(io_of_ours.load_checkpoint(path))

    validate = ("validate", "-c", config, "--trainer.default_root_dir", root / "validated", "--ckpt_path")
    return [
        Kind("checkpoint, a file", [file], loaded(file), others=others),
        Kind("checkpoint, a folder", sorted(folder.iterdir()), loaded(folder)),
        Kind(
            "quiver validate --ckpt_path",
            [file, *sorted(folder.iterdir())],
            lambda: [command(*validate, one)() for one in (file, folder)],
            share=0.05,
        ),
    ]


def _numbers(value: Any) -> Any:
    """Nested data with tensors as lists; those in files are read."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value[:].tolist() if type(value).__name__ == "SavedTensor" else value


def values(expert: Expert) -> Any:
    """Everything that an adapter says."""
    expert.inspect()  # type: ignore[attr-defined]
    if isinstance(expert, LoraExpert):
        factors = {name: expert.factors(name) for name in expert.names}
        return {
            name: [one.A.tolist(), one.B.tolist(), one.scaling] for name, one in factors.items()
        }, expert.base
    deltas: dict[str, Any] = {name: expert.delta(name) for name in expert.names}
    return {name: [one.indices.tolist(), one.values.tolist()] for name, one in deltas.items()}, expert.base


def finite(value: Any) -> bool:
    """Whether all numbers of nested data are finite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or value - value == 0


def says_the_same(result: Any, file: Path) -> str | None:
    """Whether a printed configuration says all that a damaged YAML file says."""
    said = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return "as written" if _within(said, result) else None


def _within(said: Any, shown: Any) -> bool:
    if isinstance(said, str) and isinstance(shown, dict):
        return shown.get("class_path", "").endswith(said)
    if isinstance(said, dict) and isinstance(shown, dict):
        return all(
            key in shown and (key == "class_path" or _within(item, shown[key])) for key, item in said.items()
        )
    if isinstance(said, list) and isinstance(shown, list):
        return len(said) == len(shown) and all(map(_within, said, shown))
    if said == shown or str(said) == str(shown):
        return True
    with contextlib.suppress(TypeError, ValueError):
        return float(said) == float(shown)
    return False


class CommandError(Exception):
    """What a command printed to stderr before it failed."""


def command(*arguments: Any) -> Callable[[], str]:
    """Return a function that runs a command and returns what it prints."""

    def run() -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = quiver(list(map(str, arguments)))
            except SystemExit as stop:
                code = stop.code
        if code:
            raise CommandError(err.getvalue())
        return out.getvalue()

    return run


# ---------------------------------------------------------------------- the outcome


def outcome(kind: Kind, file: Path, intact: Any) -> str:
    """Read damaged files and say what happened; what is none of GOOD is a failure, described."""
    try:
        result = kind.read()
    except CommandError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        message = lines[-1] if lines else ""
        if "Traceback" in str(error) or not message.startswith("quiver: error: "):
            return "traceback: " + " | ".join(lines[-6:])
        return _named(file, message)
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None and "jsonargparse" in _origin(root).parts:
            root = root.__cause__
        if not _is_message(root):
            return f"traceback: {type(root).__name__} in {_origin(root).name}: {root}"
        return _named(file, str(root))
    except BaseException as error:  # a panic of Rust is no Exception
        return f"crash: {type(error).__name__}: {error}"
    if repr(result) == repr(intact):
        return "same"
    return kind.accept(result, file) or "wrong result: another one than that of the intact files"


def _named(file: Path, message: str) -> str:
    named = file.name in message or str(file.parent) in message or f"{file.parent.name!r}" in message
    return "error" if named else f"unclear: the message does not name {file.name}: {message[:300]}"


@dataclass(frozen=True)
class Case:
    """One damaged file and what came of it."""

    kind: str
    file: str
    how: str
    outcome: str


def run_cases(found: list[Kind], cases: int, seed: int) -> Iterator[Case]:
    """Damage and read; files are as before afterwards.

    Args:
        found: What `kinds` returned.
        cases: How many, spread over the kinds.
        seed: Of everything random; each kind has its own sequence.
    """
    whole = sum(kind.share for kind in found)
    for kind in found:
        intact = kind.read()
        if repr(kind.read()) != repr(intact):
            raise RuntimeError(f"{kind.name}: reading intact files twice gives two results")
        rng = random.Random(f"{seed} {kind.name}")
        for _ in range(math.ceil(cases * kind.share / whole)):
            file = rng.choice(kind.files)
            data = file.read_bytes()
            others = [path for path in kind.others or kind.files if path != file]
            how, damaged = damage(data, rng.choice(others).read_bytes() if others else b"", rng)
            file.write_bytes(damaged)
            try:
                result = "same" if damaged == data else outcome(kind, file, intact)
            finally:
                file.write_bytes(data)
            yield Case(kind.name, file.name, how, result)


def main() -> int:
    """Print a JSON line for each kind and one for all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the name of the kinds to run")
    arguments = parser.parse_args()
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from conftest import build_tiny_model

    started = time.monotonic()
    counts: dict[str, Counter[str]] = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_tiny_model(Path(folder) / "model"))
        found = [kind for kind in kinds(Path(folder) / "files", model) if arguments.only in kind.name]
        for name, cases in groupby(run_cases(found, arguments.cases, arguments.seed), lambda case: case.kind):
            counter = counts[name] = Counter()
            for case in cases:
                counter[case.outcome if case.outcome in GOOD else case.outcome.partition(":")[0]] += 1
                if case.outcome not in GOOD:
                    failures.append(case)
                    print(f"FAILED {case}", file=sys.stderr)
            print(json.dumps({"kind": name, "cases": counter.total(), **counter}), flush=True)
    total = sum(counts.values(), Counter())
    facts = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
    }
    print(json.dumps({"all": total.total(), **total, "failures": len(failures), **facts}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
