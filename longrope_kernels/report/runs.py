"""Run the tests and the benchmarks of a checkout, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .results import Row, read_benchmarks, tests_of

MOST_PROCESSES = 16  # that share a GPU; each has a context there


def options_here() -> tuple[str, ...]:
    """What pytest is told of the tests on this machine.

    Where there is a GPU, those that it runs come first, those that take long and need none are left
    out, and as many run at once as there are cores: most of their time, Triton compiles.
    """
    if not torch.cuda.is_available():
        return ()
    options: tuple[str, ...] = ("-p", "longrope_kernels.report.order", "-m", "gpu or not slow")
    if importlib.util.find_spec("xdist") is not None:
        options += ("-n", str(min(os.cpu_count() or 1, MOST_PROCESSES)), "--dist", "loadgroup")
    return options


def run_tests(root: Path, seconds: float, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What passed and what did not, within ``seconds``; see `results.tests_of`."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        complete = _pytest(
            root,
            ["-p", "longrope_kernels.report.recorder", "-q", "--no-header", *arguments],
            {"LONGROPE_RECORD": str(record), **_threads(arguments)},
            seconds,
        )
        # A line may have been cut short with the process.
        lines = [line for line in record.read_text("utf-8").splitlines() if line.endswith("}")]
    return {**tests_of(lines), "complete": complete}


def _threads(arguments: tuple[str, ...]) -> dict[str, str]:
    """Processes that share the cores have one thread each."""
    return {"OMP_NUM_THREADS": "1"} if "-n" in arguments else {}


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
    # A session of its own: nothing that it started may go on beside the benchmarks.
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**inherited, "PYTHONPATH": path, **environment},
        start_new_session=True,
    )
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest ends its workers and says what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
