"""The names of what results.json holds, and its losses by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FORMULAS = ("no scaling", "PI", "NTK", "dynamic NTK", "YaRN")
BEST_YARN, SEARCH, READJUSTED = "YaRN, best attention factor", "LongRoPE", "LongRoPE, readjusted"
NEEDLES = "LongRoPE2's search"
LONGER = "LongRoPE, a longer search"  # at the target alone, of `--rope`
ROWS = (*FORMULAS, BEST_YARN, SEARCH, READJUSTED, NEEDLES)
AGAIN = "YaRN again, "  # on the machine it names, less what the first one gave, by length
UNIFORM, N_HAT = "uniform lambda", f"{SEARCH}, n_hat"  # at the target alone
ROW = re.compile(r"(?P<name>.+), (?P<length>\d+) tokens, (?P<text>.+)")
WINDOW = re.compile(r"(?P<name>.+), a window, (?P<text>.+)")
ASKED = re.compile(r"(?P<name>.+), (?P<length>\d+) tokens: (?P<kind>.+)")
Losses = dict[str, dict[int, dict[str, float]]]  # by row, length and text


def losses(content: Mapping[str, Any]) -> Losses:
    """Of the rows of the tables, in nats per token."""
    found: Losses = {}
    for key, value in content["results"].items():
        if match := ROW.fullmatch(key):
            row = found.setdefault(match["name"], {})
            row.setdefault(int(match["length"]), {})[match["text"]] = float(value)
    return found
