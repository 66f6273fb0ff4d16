"""What the record says of vLLM is what it does today, with the plugin and without.

tests/test_understands.py asks the others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import understands


@pytest.mark.full
@pytest.mark.parametrize("name", ["vLLM", "vLLM, our plugin"])
def test_the_record_holds(name: str) -> None:
    assert understands.changed(name) == []
