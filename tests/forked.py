"""pytest in processes of its own, forked from one that has imported what takes seconds to import.

Where there is a GPU they are started anew: CUDA bears no fork.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("pytest", "pytest_benchmark.plugin", "hypothesis", "anyio.pytest_plugin", "torch"),
        *("torch.nn.attention.bias", "transformers.models.phi3.modeling_phi3"),
    ]
)


class Forked:
    """As much of `subprocess.Popen` as is asked of one of ``python -m pytest``."""

    def __init__(
        self, command: list[str], cwd: Path, env: Mapping[str, str], stdout: Any = None, **_: Any
    ) -> None:
        self._output = stdout or tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        given = (command[3:], str(cwd), dict(env), self._output.name)
        self._process = CONTEXT.Process(target=_main, args=given)
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("pytest", timeout or 0)
        print(self._output.read())
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _main(arguments: list[str], cwd: str, env: dict[str, str], output: str) -> None:
    os.setsid()
    gc.freeze()  # what was imported; pytest collects garbage often
    into = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(into, 1)
    os.dup2(into, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.exit(pytest.main(arguments))


Popen: Any = subprocess.Popen if torch.cuda.is_available() else Forked


def processes(popen: Any = Popen) -> SimpleNamespace:
    """In place of the module `subprocess` in `report.runs`."""
    return SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)


def run(*arguments: str) -> tuple[int, str]:
    """The exit status and the output of ``python -m pytest`` in the checkout.

    Without the variables of the pytest around it: under xdist it would time nothing.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    with tempfile.NamedTemporaryFile("w+") as output:
        process = Popen([*command, *arguments], cwd=ROOT, env=env, stdout=output, stderr=output)
        status = process.wait()
        output.seek(0)
        return status, output.read()
