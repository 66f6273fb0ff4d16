"""What the codegen scripts compile now, beside the pages under reports/codegen/ that they made."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TRITON = "3.6.0"  # what the pages were made with: registers and instructions are its own

Row = dict[str, Any]  # of one compiled kernel


def counts_hold() -> bool:
    """Whether the Triton here is that of the pages, with its own ptxas."""
    if "TRITON_PTXAS_PATH" in os.environ:
        return False
    try:
        return metadata.version("triton") == TRITON
    except metadata.PackageNotFoundError:  # as on macOS
        return False


def spills(row: Row, allowed: bool = False) -> bool:
    """Whether there is local memory; allowed: but for some accesses around the loop."""
    if allowed and row["local"] <= 6:
        return bool(row["tile_local"])
    return bool(row["local"] or row["stack"])


def compiled(script: str, temporary: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/SCRIPT prints, in a process without the interpreter: its rows and its page.

    Once for all workers of pytest-xdist: it takes minutes, and every core.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return dict(json.loads(_printed(script)))
    kept = temporary.getbasetemp().parent / f"{script}.json"  # what all workers share
    with kept.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            text = _printed(script)
            file.write(text)
    return dict(json.loads(text))


def _printed(script: str) -> str:
    command = [sys.executable, Path(__file__).with_name(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_current(page: str, name: str) -> None:
    """The page under reports/codegen/ is that of today's kernels and compiler."""
    kept = (ROOT / "reports" / "codegen" / name).read_text("utf-8")
    if page != kept:
        command = page.partition("`")[2].partition("`")[0]
        lines = difflib.unified_diff(kept.splitlines(), page.splitlines(), lineterm="", n=0)
        changes = "\n".join(line for line in lines if line[:2] not in ("--", "++", "@@"))
        pytest.fail(f"{command} > reports/codegen/{name}\n{changes}", pytrace=False)


def assert_all(rows: list[Row], rule: Callable[[Row], bool]) -> None:
    """Every row keeps the rule; shows those that do not."""
    offenders = [row for row in rows if not rule(row)]
    assert not offenders, "\n".join(map(str, offenders))
