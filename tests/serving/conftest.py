"""Tests on vLLM's engine, in an environment of its own (`make test-vllm`); nowhere else collected.

The engine runs in the process of the tests, on one thread, with models of two layers.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ABSENT = importlib.util.find_spec("vllm") is None
collect_ignore_glob = ["test_*.py"] if ABSENT else []

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what takes long, unless LONGROPE_FULL=1 (`make test-vllm-long`)."""
    if os.environ.get("LONGROPE_FULL") != "1":
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def measured() -> Iterator[dict[str, Any]]:
    """What tests measured, which goes to the file that LONGROPE_MEASURED names."""
    found: dict[str, Any] = {}
    yield found
    if path := os.environ.get("LONGROPE_MEASURED"):
        Path(path).write_text(json.dumps(found, indent=2) + "\n")
