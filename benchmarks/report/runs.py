"""Run the tests and the benchmarks of a checkout, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .results import Row, benchmarks_of, tests_of

MOST_PROCESSES = 16  # that share a GPU; each has a context there
LATE = 5  # seconds that a row may take beyond the budget before the benchmarks are stopped
CEILINGS = 45  # seconds that they have at least, in which they measure the ceilings
ENDED = (0, 1, None)  # pytest: all passed, some failed, or it was stopped when its time was over
RECORDER = ("-p", "report.recorder", "-q", "--no-header")
PLUGINS = Path(__file__).resolve().parents[1]  # where that is found


def options_here() -> tuple[str, ...]:
    """What pytest is told of the tests on this machine.

    Where there is a GPU, those that it runs come first, those that take long and need none are left
    out, and as many run at once as there are cores: most of their time, Triton compiles.
    """
    if not torch.cuda.is_available():
        return ()
    options: tuple[str, ...] = ("-p", "report.order", "-m", "gpu or not slow")
    if importlib.util.find_spec("xdist") is not None:
        options += ("-n", str(min(os.cpu_count() or 1, MOST_PROCESSES)), "--dist", "loadgroup")
    return options


def run_tests(root: Path, seconds: float, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What passed and what did not, within ``seconds``; see `results.tests_of`."""
    if seconds <= 0:
        return {**tests_of([]), "complete": False}
    lines, status = _recorded(root, arguments, _threads(arguments), seconds)
    found = tests_of(lines)
    if status not in ENDED:
        found["failed"].append("the tests")
        found["reasons"]["the tests"] = f"pytest ended with {status}; its output tells why"
    return {**found, "complete": status is not None}


def _threads(arguments: tuple[str, ...]) -> dict[str, str]:
    """Processes that share the cores have one thread each."""
    return {"OMP_NUM_THREADS": "1"} if "-n" in arguments else {}


def run_benchmarks(
    root: Path, seconds: float, arguments: tuple[str, ...]
) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what else there is to tell; see `results.benchmarks_of`.

    The ceilings are measured whatever ``seconds`` is. A run that broke, or that one row kept from
    its end, has what it had measured.
    """
    budget = ("--benchmark-only", f"--until={time.time() + seconds}")
    longest = max(seconds + LATE, CEILINGS)
    lines, status = _recorded(root, (*budget, *arguments), {}, longest)
    rows, found = benchmarks_of(lines)
    if status is None:
        found["not_measured"]["what came next"] = "a row took much longer than was left for it"
    if status not in ENDED:
        found["failed"]["the benchmarks"] = f"pytest ended with {status}; its output tells why"
    elif not (rows or found["failed"]):
        found["failed"]["the benchmarks"] = "nothing was measured"
    return rows, found


def _recorded(
    root: Path, arguments: tuple[str, ...], environment: dict[str, str], seconds: float
) -> tuple[list[str], int | None]:
    """The recorder's lines, and pytest's exit status, or None where it was stopped."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        environment = {"LONGROPE_RECORD": str(record), **environment}
        status = _pytest(root, [*RECORDER, *arguments], environment, seconds)
        # The last line may have been cut short with the process.
        lines = record.read_text("utf-8").rpartition("\n")[0].splitlines()
    return lines, status


def _pytest(
    root: Path, arguments: list[str], environment: dict[str, str], seconds: float
) -> int | None:
    """pytest's exit status, None where it was stopped; its output goes through."""
    command = [sys.executable, "-m", "pytest", *arguments]
    # Not those of a pytest around this one: under xdist it would time nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    inherited_path = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, [str(root), str(PLUGINS), inherited_path]))
    # A session of its own: nothing that it started may go on beside the benchmarks.
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**inherited, "PYTHONPATH": path, **environment},
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest ends its workers and says what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
