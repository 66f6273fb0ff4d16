"""The files under reports/, and tables of what they hold, as Markdown."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@cache
def read(path: str) -> Any:
    """A JSON file under reports/."""
    return json.loads((ROOT / path).read_text("utf-8"))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [[f" {cell} " if cell else " " for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)
