"""Run the tests and the benchmarks of a checkout, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .results import Row, read_benchmarks, tests_of


def run_tests(root: Path, seconds: float, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What passed and what did not, within ``seconds``; see `results.tests_of`."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        complete = _pytest(
            root,
            ["-p", "longrope_kernels.report.recorder", "-q", "--no-header", *arguments],
            {"LONGROPE_RECORD": str(record)},
            seconds,
        )
        # A line may have been cut short with the process.
        lines = [line for line in record.read_text("utf-8").splitlines() if line.endswith("}")]
    return {**tests_of(lines), "complete": complete}


def run_benchmarks(
    root: Path, seconds: float, arguments: tuple[str, ...]
) -> tuple[list[Row], dict[str, str]]:
    """The rows, and what was not measured with the reasons.

    Raises:
        RuntimeError: the benchmarks broke before they wrote anything.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "benchmarks.json"
        _pytest(
            root,
            [
                "--benchmark-only",
                f"--benchmark-json={data}",
                f"--budget={seconds:.0f}",
                "-q",
                "--no-header",
                *arguments,
            ],
            {},
            None,
        )
        if not data.exists() or not data.stat().st_size:
            raise RuntimeError("the benchmarks ended without a result; their output is above")
        return read_benchmarks(json.loads(data.read_text("utf-8")))


def _pytest(
    root: Path, arguments: list[str], environment: dict[str, str], seconds: float | None
) -> bool:
    """Whether pytest came to its end in time; its output goes through."""
    command = [sys.executable, "-m", "pytest", *arguments]
    # Not those of a pytest around this one: under xdist it would time nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, cwd=root, env={**inherited, "PYTHONPATH": path, **environment}
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    return True
