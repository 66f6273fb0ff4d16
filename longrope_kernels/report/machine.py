"""What a report says about the machine it was made on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def describe(root: Path) -> dict[str, Any]:
    """The facts of the header; ``root`` is the checkout."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _commit(root),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **_smi(),
        }
    return facts


def folder_name(facts: dict[str, Any]) -> str:
    """A folder for reports of this machine, "nvidia-h200" or "cpu-2-cores"."""
    if "gpu" in facts:
        return re.sub(r"[^a-z0-9]+", "-", facts["gpu"]["name"].lower()).strip("-")
    return f"cpu-{facts['threads']}-cores"


def clocks() -> dict[str, str]:
    """What nvidia-smi says now; empty without it."""
    return _smi() if torch.cuda.is_available() else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit, with a mark where tracked files differ from it.

    A copy of a checkout without git has it from LONGROPE_COMMIT.
    """
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("LONGROPE_COMMIT")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head + (" with changes" if changed else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _smi() -> dict[str, str]:
    query = f"--query-gpu={','.join(_SMI_FIELDS)}"
    line = _output("nvidia-smi", query, "--format=csv,noheader", "--id=0")
    if line is None:
        return {}
    values = (value.strip() for value in line.split(","))
    return dict(zip(_SMI_FIELDS, values, strict=False))


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
