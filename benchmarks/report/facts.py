"""What a report says about the machine it was made on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_LASTING = ("driver_version", "clocks.max.sm", "power.limit")
_NUMBER = r"(\d+(?:\.\d+)?) ?(\S*)"  # and its unit
_CHANGING = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def describe(root: Path) -> dict[str, Any]:
    """The facts of the header; ``root`` is the checkout."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": commit(root),
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
            **Asked(_LASTING).answer(None),
        }
    return facts


def commit(root: Path) -> str | None:
    """The commit of a checkout, with a mark where tracked files differ from it.

    A copy without git has it from LONGROPE_COMMIT; without that it is None.
    """
    head = None
    if (root / ".git").exists():  # that of a repository around it would be another's
        told = ("--always", "--abbrev=12", "--exclude=*", "--dirty= with changes")
        head = _output("git", "-C", str(root), "describe", *told)
    return head or os.environ.get("LONGROPE_COMMIT")


def folder_name(facts: dict[str, Any]) -> str:
    """A folder for reports of this machine, "nvidia-h200" or "cpu-2-cores"."""
    if "gpu" in facts:
        return re.sub(r"[^a-z0-9]+", "-", facts["gpu"]["name"].lower()).strip("-")
    return f"cpu-{facts['threads']}-cores"


def clocks() -> dict[str, str]:
    """What nvidia-smi says now of clocks, power and heat; empty without it."""
    return Asked().answer(None) if torch.cuda.is_available() else {}


def gpu_refuses() -> bool:
    """Whether the GPU takes nothing more of this process: so it is after an illegal access."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Asked:
    """nvidia-smi, which looks while this process has other things to do."""

    def __init__(self, fields: tuple[str, ...] = _CHANGING) -> None:
        self._fields, self._process = fields, None
        if shutil.which("nvidia-smi") is not None:
            self._process = subprocess.Popen(
                _question(fields),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                text=True,
            )

    def answer(self, seconds: float | None = 0.0) -> dict[str, str]:
        """What it says within seconds, None for as long as it takes; empty where it is nothing."""
        if self._process is None:
            return {}
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        line, _ = self._process.communicate()
        values = (value.strip() for value in line.split(","))
        return {} if self._process.returncode else dict(zip(self._fields, values, strict=False))


def spread(samples: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Of each field the lowest, the median and the highest, their unit and how many there are."""
    result = {}
    for name in _CHANGING:
        texts = (sample.get(name, "") for sample in samples)
        found = [match for text in texts if (match := re.fullmatch(_NUMBER, text))]
        numbers = [float(match[1]) for match in found]
        if numbers:
            result[name] = {
                **{"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)},
                "unit": found[0][2],
                "samples": len(numbers),
            }
    return result


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Its name, and the vectors that torch takes of it: processors of one name may have others."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _question(fields: tuple[str, ...]) -> tuple[str, ...]:
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"  # torch's first
    return (
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
        f"--id={device}",
    )


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
