"""A pytest plugin: the tests that the device runs come first, the others where time is left.

``python -m pytest -p report.order``; with ``--on-device`` there are no others. Of processes of
pytest-xdist, one in which the GPU refuses what comes next ends, and another takes its place.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from .facts import gpu_refuses
from .recorder import BROKEN

# What test modules call the place where they run, of those that give it no parameter.
PLACES = {"CUDA", "DEVICE", "TRITON", "COMPILED"}
# Modules that a device runs nothing of, and what they can't be imported without.
ELSEWHERE = {"test_llamacpp.py": "gguf", "test_lm_eval.py": "lm_eval"}

_failed: set[str] = set()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--on-device", action="store_true", help="no tests but those it runs")


def pytest_ignore_collect(collection_path: Path, config: Any) -> bool | None:
    """A module that fails to be imported would end pytest before it runs any other."""
    package = ELSEWHERE.get(collection_path.name) if config.getoption("on_device") else None
    return True if package and importlib.util.find_spec(package) is None else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    items.sort(key=lambda item: not _on_device(item))
    if config.getoption("on_device"):
        config.hook.pytest_deselected(items=[item for item in items if not _on_device(item)])
        items[:] = filter(_on_device, items)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _failed.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Once the failure was told; alone in a process, a test would end all others with it."""
    if "PYTEST_XDIST_WORKER" in os.environ and nodeid in _failed and gpu_refuses():
        os._exit(BROKEN)


def _on_device(item: Any) -> bool:
    """Whether it is marked, or its parameters name the device, or its module does."""
    if item.get_closest_marker("gpu"):
        return True
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    devices = [device for value in values if (device := getattr(value, "device", None))]
    return "cuda" in map(str, devices) if devices else bool(PLACES & vars(item.module).keys())
