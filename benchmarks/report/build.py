"""The compiled backends of a checkout, built in place: a report needs no installation."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch


def stale(root: Path) -> list[str]:
    """The modules of this machine that are missing, or older than one of their sources."""
    sources = [root / "setup.py", root / "CMakeLists.txt", *(root / "csrc").rglob("*")]
    newest = max(path.stat().st_mtime for path in sources if path.is_file())
    modules = _modules(root).items()
    return [n for n, m in modules if not m.exists() or m.stat().st_mtime < newest]


def build(root: Path) -> str | None:
    """Build what is `stale`: with no network, by what is installed here. The output goes through.

    Returns:
        Why it could not be built, or None. What is missing then, `longrope_kernels.backends` says
        as it does elsewhere.
    """
    if not stale(root):
        return None
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("LONGROPE_BUILD_CUDA", "0")  # minutes, and nothing here would run it
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, env=environment)
    if done.returncode:
        return f"{' '.join(command[1:])} ended with {done.returncode}"
    for module in _modules(root).values():
        if module.exists():  # one that needed nothing keeps its time
            module.touch()
    return None


def _modules(root: Path) -> dict[str, Path]:
    names = ["_native", "_cuda"] if torch.cuda.is_available() else ["_native"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return {name: root / "longrope_kernels" / f"{name}{suffix}" for name in names}
