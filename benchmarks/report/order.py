"""A pytest plugin: the tests that the device runs come first, the others where time is left.

``python -m pytest -p report.order``
"""

from __future__ import annotations

from typing import Any

# What test modules call the place where they run, of those that give it no parameter.
PLACES = {"CUDA", "DEVICE", "TRITON", "COMPILED"}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    items.sort(key=lambda item: not _on_device(item))


def _on_device(item: Any) -> bool:
    """Whether it is marked, or its parameters name the device, or its module does."""
    if item.get_closest_marker("gpu"):
        return True
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    devices = [device for value in values if (device := getattr(value, "device", None))]
    return "cuda" in map(str, devices) if devices else bool(PLACES & vars(item.module).keys())
