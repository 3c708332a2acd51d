"""The package: what it imports, and what it says when an extra is missing."""

import subprocess
import sys

import pytest

import datamodules


def test_importing_it_imports_no_extra():
    code = "import sys, datamodules; print({'reasoning_gym', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("package", "data", "message"),
    [
        (
            "reasoning_gym",
            datamodules.ReasoningGymDataModule(["chain_sum"]),
            r"pip install 'lightning-quiver\[tasks\]'",
        ),
        ("datasets", datamodules.HubDataModule("parquet"), "needs `datasets`: pip install lightning-quiver"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, data, message):
    # None in sys.modules is Python's own way to make an import fail.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        data.setup("fit")
