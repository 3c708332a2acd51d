"""Looks the tested versions up in the advisory database, and says what it could not look up.

    python .ci/audit.py PIP_AUDIT constraints.txt

pip-audit prints "No known vulnerabilities found" too where its service knows none of the packages, as behind a mirror
of the index without advisories. Here packages without an answer are counted, and an audit that could not be made is
never called a passed one. The exit code is 1 for a known vulnerability, and 0 else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(tool: str, requirements: str) -> int:
    """Run pip-audit and report.

    Args:
        tool: The pip-audit executable.
        requirements: A file of pinned versions.

    Returns:
        The exit code.
    """
    command = [tool, "--requirement", requirements, "--no-deps", "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run(
            [*command, "--timeout", "15"], capture_output=True, text=True, timeout=600, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _not_made(f"pip-audit did not run: {error}")
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()
        return _not_made(said[-1] if said else f"pip-audit printed nothing and ended with {done.returncode}")
    return report(packages, Path(requirements).name)


def report(packages: list[dict[str, Any]], name: str) -> int:
    """Print what is known of packages.

    Args:
        packages: As pip-audit lists them: name, and `vulns` or `skip_reason`.
        name: Where they are from.

    Returns:
        1 if one is vulnerable, else 0.
    """
    answered = [one for one in packages if "vulns" in one]
    vulnerable = [one for one in answered if one["vulns"]]
    for one in vulnerable:
        for found in one["vulns"]:
            fixed = ", ".join(found.get("fix_versions") or ()) or "no version yet"
            print(f"{one['name']} {one['version']}: {found['id']}, fixed in {fixed}")
    if vulnerable:
        print(
            f"audit: FAILED: {len(vulnerable)} of {len(packages)} packages of {name} have known vulnerabilities."
        )
        return 1
    if not answered:
        return _not_made(f"the advisory service answered for none of the {len(packages)} packages of {name}")
    if len(answered) < len(packages):
        missing = ", ".join(sorted(one["name"] for one in packages if "vulns" not in one)[:5])
        return _not_made(
            f"the advisory service answered for {len(answered)} of {len(packages)} packages of {name}, without finding "
            f"anything, but not for {missing} ..."
        )
    print(f"audit: passed: no known vulnerability in {len(packages)} packages of {name}.")
    return 0


def _not_made(why: str) -> int:
    print(
        f"audit: NOT MADE: {why}. Nothing is known about vulnerabilities; run make audit where pypi.org is reachable."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
