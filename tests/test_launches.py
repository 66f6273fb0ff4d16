"""Launches past Triton's binder start the very kernel that it would take; see launches*.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_launches() -> None:
    """In a process without the interpreter, in which Triton would compile."""
    command = [sys.executable, "-m", "pytest", "-qx", "--noconftest", "-p", "no:cacheprovider"]
    left_out = ("TRITON_INTERPRET", "LONGROPE_PTX")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    run = subprocess.run(
        [*command, "-p", "launching", *sorted(TESTS.glob("launches*.py"))],
        cwd=TESTS,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
