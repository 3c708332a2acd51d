"""AdapterLibrary: round trips, bases, writers that meet or die, and hostile files."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.storage import write_sparse

WEIGHTS = "adapter_model.safetensors"


def lora(folder: Path, *, width=6, source="base/model", seed=0, layers=("layers.0.q", "layers.1.q")) -> Path:
    """Write a small LoRA adapter."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    write_expert(folder, {name: (torch.randn(2, width), torch.randn(4, 2), 1.5) for name in layers}, source)
    return folder


def content(root: Path) -> dict[str, bytes]:
    """Return every file of a library but its lock."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def library(tmp_path):
    store = AdapterLibrary(tmp_path / "library", create=True)
    store.add(
        lora(tmp_path / "first"),
        tasks=["t1"],
        metrics={"exact_match": 0.5},
        fingerprint={"layers.0.q.weight": "f"},
    )
    return store


def test_round_trip(library, tmp_path):
    entry = AdapterLibrary(library.root)["first"]
    assert (entry.kind, entry.rank, entry.parameters, entry.tasks) == ("lora", 2, 40, ("t1",))
    assert entry.metrics == {"exact_match": 0.5}
    assert entry.base == "base/model"
    assert entry.fingerprint == {"layers.0.q.weight": "f"}
    factors = entry.open().factors("layers.1.q.weight")
    saved = load_file(tmp_path / "first" / WEIGHTS)
    assert torch.equal(factors.A, saved["base_model.model.layers.1.q.lora_A.weight"])
    assert factors.scaling == 1.5
    assert library.verify() == []
    assert library.get("second") is None
    library.remove("first")
    assert len(AdapterLibrary(library.root)) == 0
    assert not (library.root / "experts" / "first").exists()
    library.add(lora(tmp_path / "other", width=9, source="another"))  # an empty library has no base


def test_sparse_adapters_go_in_too(library, tmp_path):
    folder = tmp_path / "sparse"
    folder.mkdir()
    delta = SparseDelta(torch.tensor([1, 5], dtype=torch.int32), torch.tensor([0.5, -1.0]), (4, 6))
    config = {"base_model_name_or_path": "base/model", "fingerprint": {"layers.0.q.weight": "f"}}
    write_sparse(folder, [("layers.0.q.weight", delta)], config)
    entry = library.add(folder)
    assert (entry.kind, entry.rank, entry.parameters) == ("sparse", 0, 2)
    assert entry.open().delta("layers.0.q.weight").values.tolist() == [0.5, -1.0]


def test_a_reader_sees_what_others_add(library, tmp_path):
    reader = AdapterLibrary(library.root)
    assert list(reader) == ["first"]
    library.add(lora(tmp_path / "second", seed=1))
    assert sorted(reader) == ["first", "second"]


def test_quiver_json_brings_tasks_along(library, tmp_path):
    folder = lora(tmp_path / "told", seed=2)
    facts = {"tasks": ["a", "b"], "metrics": {"rouge_l": 0.25}, "lineage": ["first"], "fingerprint": {}}
    (folder / "quiver.json").write_text(json.dumps(facts))
    entry = library.add(folder)
    assert (entry.tasks, entry.metrics, entry.lineage) == (("a", "b"), {"rouge_l": 0.25}, ("first",))


def test_arrays_belong_to_the_content(library, tmp_path):
    made = []

    def compute():
        made.append(1)
        return {"v": torch.ones(3)}

    for _ in range(2):
        assert library.arrays("first", "arrow", {"k": 1}, compute)["v"].tolist() == [1, 1, 1]
    assert len(made) == 1
    library.arrays("first", "arrow", {"k": 2}, compute)
    assert len(made) == 2
    [broken, _] = (library.root / "arrays").iterdir()
    broken.write_bytes(b"nonsense")
    library.arrays("first", "arrow", {"k": 1}, compute)
    library.arrays("first", "arrow", {"k": 2}, compute)
    assert len(made) == 3
    library.remove("first")
    library.add(lora(tmp_path / "again" / "first", seed=9), fingerprint={"layers.0.q.weight": "f"})
    assert library.find_arrays("first", "arrow", {"k": 1}) is None


# ---------------------------------------------------------------------- refusals


def spoil(folder: Path, change) -> Path:
    change(folder)
    return folder


def with_weights(change):
    def spoiled(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoiled


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def as_link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])


def config(**values):
    def changed(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return changed


A0, B0 = (f"base_model.model.layers.0.q.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
        (as_pickle, "a pickle, which could run any code"),
        (as_link, "is a link to"),
        (cut, "broken or cut off"),
        (lambda folder: (folder / WEIGHTS).write_bytes(os.urandom(300)), "broken or cut off"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no expert"),
        (config(peft_type="IA3"), "adapter of kind IA3"),
        (config(lora_alpha="many"), "names no lora_alpha"),
        (config(use_dora=True), "trained with use_dora=True"),
        (with_weights(lambda t: t.update({A0: t[A0] * torch.nan})), "NaN or infinite"),
        (with_weights(lambda t: t.update({B0: torch.ones(4, 3)})), "do not match"),
        (with_weights(lambda t: t.pop(A0)), "no pair of LoRA factors"),
        (with_weights(lambda t: t.update({A0: torch.ones(2, 7)})), r"of shape \(4, 7\); in the library it is \(4, 6\)"),
        (config(base_model_name_or_path="other/model"), "names the base model 'other/model'"),
    ],
)  # fmt: skip
def test_bad_adapters_leave_the_library_as_it_was(library, tmp_path, change, message):
    folder = spoil(lora(tmp_path / "second", seed=1), change)
    before = content(library.root)
    with pytest.raises(ValueError, match=message):
        library.add(folder)
    assert content(library.root) == before
    assert list(AdapterLibrary(library.root)) == ["first"]


def test_another_base_is_known_by_its_fingerprint(library, tmp_path):
    folder = lora(tmp_path / "second", seed=1)
    before = content(library.root)
    with pytest.raises(ValueError, match=r"'second' was trained on another base model: layers\.0\.q\.weight"):
        library.add(folder, fingerprint={"layers.0.q.weight": "g"})
    assert content(library.root) == before
    # The same model under another name, a local copy say.
    spoil(folder, config(base_model_name_or_path="/a/copy"))
    library.add(folder, fingerprint={"layers.0.q.weight": "f"})


@pytest.mark.parametrize("name", ["", "a/b", "../up", "two words", ".hidden", "-x", "n" * 101, "a\n", "ä"])
def test_names_that_cannot_be_folders_are_refused(library, tmp_path, name):
    before = content(library.root)
    with pytest.raises(ValueError, match="letters, digits"):
        library.add(lora(tmp_path / "second"), name)
    assert content(library.root) == before


def test_a_name_is_given_once(library, tmp_path):
    before = content(library.root)
    with pytest.raises(ValueError, match="has an expert 'first' already"):
        library.add(lora(tmp_path / "second", seed=1), "first")
    with pytest.raises(ValueError, match="has no expert 'second'"):
        library.remove("second")
    assert content(library.root) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ('{"format": 1', "is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"format": 2, "experts": {}}', "has the format 2"),
        ('{"format": 1, "experts": []}', "names no experts"),
        ('{"format": 1, "experts": {}}', "describes no base model"),
        (
            '{"format": 1, "base": {"name": 3, "shapes": {}, "fingerprint": {}}, "experts": {}}',
            "no base model",
        ),
    ],
)
def test_a_broken_index_is_told(library, text, message):
    (library.root / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        AdapterLibrary(library.root)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "pickle"},
        {"tasks": [1]},
        {"metrics": {"a": "b"}},
        {"checksums": {"../../evil": "0"}},
        {"rank": -1},
        {"base": 7},
    ],
)
def test_a_malformed_entry_is_told(library, change):
    index = library.root / "index.json"
    values = json.loads(index.read_text())
    values["experts"]["first"].update(change)
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="the entry 'first' is malformed"):
        AdapterLibrary(library.root)


def test_an_index_cannot_lead_out_of_the_library(library):
    index = library.root / "index.json"
    values = json.loads(index.read_text())
    values["experts"]["../../etc"] = values["experts"].pop("first")
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is malformed"):
        AdapterLibrary(library.root)


def test_verify_names_what_changed(library):
    file = library.root / "experts" / "first" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    [problem] = library.verify()
    assert "has changed since it was added" in problem
    with pytest.raises(ValueError, match="has changed since it was added"):
        library["first"].open()
    file.unlink()
    assert "is missing" in library.verify()[0]
    (library.root / "experts" / "stray").mkdir()
    assert "is not in the index" in library.verify()[1]


def test_a_file_that_is_removed_while_it_is_opened_is_named(library, monkeypatch):
    """safetensors opens a file twice, the second time through torch, whose error is another one."""
    from_file = torch.UntypedStorage.from_file

    def too_late(name, *arguments, **options):
        Path(name).unlink()
        return from_file(name, *arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", too_late)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is broken or cut off"):
        library["first"].open()


def test_a_folder_that_is_no_library(tmp_path):
    with pytest.raises(ValueError, match="is no adapter library"):
        AdapterLibrary(tmp_path)


# ---------------------------------------------------------------------- several writers

ADD = """
import sys
from lightning_modules.library.store import AdapterLibrary
store = AdapterLibrary(sys.argv[1])
for number in range(int(sys.argv[4])):
    store.add(sys.argv[2], f"{sys.argv[3]}_{number}")
    print(number, flush=True)
"""


def start(library, folder, name, count) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ADD, str(library.root), str(folder), name, str(count)], stdout=subprocess.PIPE
    )


@pytest.mark.slow
def test_two_processes_lose_nothing(library, tmp_path):
    folder = lora(tmp_path / "second", seed=1)
    writers = [start(library, folder, name, 50) for name in ("x", "y")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    expected = {"first", *(f"{name}_{number}" for name in ("x", "y") for number in range(50))}
    assert set(AdapterLibrary(library.root)) == expected
    assert library.verify() == []


@pytest.mark.slow
def test_killing_a_writer_leaves_a_valid_library(library, tmp_path):
    folder = lora(tmp_path / "second", seed=1, layers=[f"layers.{i}.q" for i in range(60)])
    writer = start(library, folder, "w0", 1000)
    generator = torch.Generator().manual_seed(0)
    survived = set()
    for moment in range(12):
        if moment:
            writer = start(library, folder, f"w{moment}", 1000)
        writer.stdout.readline()
        time.sleep(float(torch.rand((), generator=generator)) * 0.15)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        store = AdapterLibrary(library.root)
        assert survived <= set(store), "an expert was lost"
        survived = set(store)
        assert all("interrupted addition" in problem for problem in store.verify())
        for entry in store.values():
            entry.open()
    assert len(survived) > 12
    # What the dead writers left is in nobody's way.
    store = AdapterLibrary(library.root)
    for problem in store.verify():
        name = Path(problem.split(" ")[0]).name
        if not name.startswith("."):
            store.add(folder, name)
    store.add(folder, "after")
