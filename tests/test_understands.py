"""The record of who understands what of a rope is what those say today that are installed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/understands.py"

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def understands() -> Any:
    spec = importlib.util.spec_from_file_location("understands", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["this package", "transformers", "llama.cpp"])
def test_the_record_holds(understands: Any, name: str) -> None:
    assert understands.changed(name) == []
