"""The record of who understands what of a rope is what those say today that are installed here."""

from __future__ import annotations

import importlib.util
import json
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
    known = json.loads(understands.RECORD.read_text("utf-8"))[name]
    for what, rope in understands.ROPES.items():
        now, then = understands.tried(name, rope), known[what]
        assert now.keys() == then.keys(), what
        if "refused" not in now:
            assert {n: off < 1e-2 for n, off in now.items()} == {
                n: off < 1e-2 for n, off in then.items()
            }, what
