"""Run the tests and the benchmarks of a checkout, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .recorder import BROKEN, entries, failure
from .results import Row, benchmarks_of, tests_of

MOST_PROCESSES = 16  # that share a GPU; each has a context there
LATE = 5  # seconds that a row may take beyond the budget before the benchmarks are stopped
CEILINGS = 45  # seconds that they have at least, in which they measure the ceilings
SILENT = 120  # seconds without a line after which a row is taken to hang; torch.compile takes 60
STOPPED = "silent"  # a process that was stopped for that
ENDED = (0, 1, None)  # pytest: all passed, some failed, or it was stopped when its time was over
RECORDER = ("-p", "report.recorder", "-q", "--no-header", "--continue-on-collection-errors")
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
    with _record() as record:
        status = _pytest(root, arguments, record, seconds, environment=_threads(arguments))
        found = tests_of(entries(record))
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

    The ceilings are measured whatever ``seconds`` is. A row that ends its process, hangs there or
    leaves a GPU that refuses what comes next has failed, and another process takes the rows that
    are left. What cannot be helped so has what it had measured.
    """
    budget = ("--benchmark-only", f"--until={time.time() + seconds}")
    left = max(seconds + LATE, CEILINGS)
    end = time.monotonic() + left
    with _record() as record:
        while True:
            seen, options = len(entries(record)), (*budget, f"--done={record}", *arguments)
            status = _pytest(root, options, record, left, silent=SILENT)
            if not _blame(record, seen, status):
                break
            left = end - time.monotonic()
        rows, found = benchmarks_of(entries(record))
    if status is None:
        found["not_measured"]["what came next"] = "a row took much longer than was left for it"
    if status not in ENDED:
        found["failed"]["the benchmarks"] = f"pytest ended with {status}; its output tells why"
    elif not (rows or found["failed"]):
        found["failed"]["the benchmarks"] = "nothing was measured"
    return rows, found


def _blame(record: Path, seen: int, status: int | str | None) -> bool:
    """Whether a row, by the lines after ``seen``, made the process end so; it is told as failed.

    Of a process that could not tell itself, those are that it had begun and not finished: one row,
    or all of a group amid its rounds.
    """
    if status in ENDED:
        return False
    told = entries(record)[seen:]
    if status == BROKEN:
        return any(entry.get("outcome") == "failed" for entry in told)
    begun = next((entry["begun"] for entry in reversed(told) if "begun" in entry), {})
    finished = {entry["test"] for entry in told if "test" in entry}
    how = f"nothing was heard for {SILENT} s" if status == STOPPED else f"it ended with {status}"
    blamed = {test: row for test, row in begun.items() if test not in finished}
    with record.open("a", encoding="utf-8") as file:
        if not record.read_bytes().endswith(b"\n"):
            file.write("\n")  # after a line that was cut short with the process
        for test, row in blamed.items():
            reason = f"{how} while this ran" + (" or another of its group" * (len(blamed) > 1))
            file.write(json.dumps(failure(test, row, reason)) + "\n")
    return bool(blamed)


@contextlib.contextmanager
def _record() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        yield record


def _pytest(
    root: Path,
    arguments: tuple[str, ...],
    record: Path,
    seconds: float,
    *,
    silent: float = math.inf,
    environment: dict[str, str] | None = None,
) -> int | str | None:
    """pytest's exit status, None where it was stopped; its output goes through.

    `STOPPED` where it was since ``record`` did not grow for ``silent`` seconds.
    """
    command = [sys.executable, "-m", "pytest", *RECORDER, *arguments]
    # Not those of a pytest around this one: under xdist it would time nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    inherited_path = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, [str(root), str(PLUGINS), inherited_path]))
    given = {"PYTHONPATH": path, "LONGROPE_RECORD": str(record), **(environment or {})}
    record.touch()
    # A session of its own: nothing that it started may go on beside the benchmarks.
    process = subprocess.Popen(
        command, cwd=root, env={**inherited, **given}, start_new_session=True
    )
    try:
        return _wait(process, seconds, record, silent)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(
    process: subprocess.Popen[Any], seconds: float, record: Path, silent: float
) -> int | str | None:
    """See `_pytest`."""
    end, left, status = time.monotonic() + seconds, seconds, None
    while status is None:
        patience = silent - (time.time() - record.stat().st_mtime)
        try:
            return process.wait(max(min(left, patience), 0))
        except subprocess.TimeoutExpired:
            if left <= patience:
                break
        status = STOPPED if patience <= 0 else None
        left = end - time.monotonic()
    process.send_signal(signal.SIGINT)  # pytest ends its workers and says what it has
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    return status
