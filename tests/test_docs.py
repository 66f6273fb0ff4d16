"""The code that README and docs show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/quickstart.md",
    "docs/attention.md",
    "docs/scaling.md",
    "docs/decode.md",
    "docs/models.md",
    "docs/search.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks, f"{page} shows no code"
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
