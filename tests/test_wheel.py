"""The wheel holds the three packages and the configurations, and runs from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

pytestmark = pytest.mark.slow
PACKAGES = ("lightning_modules", "datamodules", "callbacks")


def tracked_files() -> list[str]:
    """Files of the working tree that git tracks, and new ones that it would."""
    git = shutil.which("git")
    if git is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listing = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in out.split("\0") if name and (REPOSITORY / name).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "-w", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "hatchling" in done.stdout + done.stderr:
        pytest.skip(f"pip cannot get the build backend: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    [built] = target.glob("*.whl")
    return built


def test_contents(wheel):
    expected = set()
    for name in tracked_files():
        top = name.split("/")[0]
        if top in PACKAGES:
            expected.add(name)
        elif top == "configs":
            expected.add(f"lightning_modules/{name}")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    files = {name.split("/", 1)[1] for name in metadata}
    assert files == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_runs_from_another_folder(wheel, tmp_path):
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, capture_output=True, check=True)
    # PYTHONPATH comes before the editable installation.
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = python("-c", "import lightning_modules; print(lightning_modules.__file__)").strip()
    assert Path(place).is_relative_to(target)
    out = python("-m", "lightning_modules.cli", "fit", "-c", "grpo/demo.yaml", "--print_config")
    assert yaml.safe_load(out)["model"]["class_path"] == "lightning_modules.GRPOModule"
    assert "grpo/demo.yaml" in python("-m", "lightning_modules.cli", "configs")
