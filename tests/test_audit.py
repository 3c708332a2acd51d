"""The audit of the tested versions: never called passed when it could not be made."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SOUND = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)"}
BAD = {"name": "c", "version": "2.6.2", "vulns": [{"id": "GHSA-1", "fix_versions": ["2.6.4"]}]}


def audit(tmp_path, text: str, code: int = 0) -> tuple[int, str]:
    """Run the script with a pip-audit that prints `text`."""
    tool = tmp_path / "pip-audit"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nprint({text!r})\nprint('said', file=sys.stderr)\nsys.exit({code})\n"
    )
    tool.chmod(0o755)
    return run(tool)


def run(tool) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / ".ci" / "audit.py"), str(tool), "constraints.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([SOUND], 0, "audit: passed: no known vulnerability in 1 packages"),
        ([SOUND, BAD, UNKNOWN], 1, "c 2.6.2: GHSA-1, fixed in 2.6.4\naudit: FAILED: 1 of 3 packages"),
        ([UNKNOWN], 0, "audit: NOT MADE: the advisory service answered for none of the 1 packages"),
        ([SOUND, UNKNOWN], 0, "audit: NOT MADE: the advisory service answered for 1 of 2 packages"),
        ([], 0, "audit: NOT MADE"),
    ],
)
def test_what_is_said(tmp_path, packages, code, words):
    returned, out = audit(tmp_path, json.dumps({"dependencies": packages}), code=1)
    assert returned == code
    assert words in out
    assert ("passed" in out) == (packages == [SOUND])


def test_a_service_that_cannot_be_reached(tmp_path):
    assert audit(tmp_path, "", code=1)[1].startswith("audit: NOT MADE: said.")
    code, out = run(tmp_path / "nothing")
    assert code == 0
    assert out.startswith("audit: NOT MADE: pip-audit did not run")
