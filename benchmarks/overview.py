"""What a run ends with: this package beside stock RoPE, on one screen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import attentions
import decodes
import measure
import models
import rotations
import test_attention
import test_decode
import test_models
import test_rotary
from table import Row

ABSENT = " is not installed"  # what `ropes.not_importable` ends with
GROUPS = 4  # of each part; the first ones, which are the most important


class Part(NamedTuple):
    """Groups of a benchmark, and the names of its rows that are this package's."""

    name: str
    benchmark: ModuleType
    begin: str  # of the groups
    ours: Collection[str]


PARTS = (
    Part("rotation", test_rotary, "forward, ", rotations.IN_PLACE),
    Part("in place", test_rotary, "in place, ", rotations.IN_PLACE),
    Part("decode", test_decode, "decode, ", decodes.OURS),
    Part("prefill", test_attention, "attention forward, ", attentions.OURS),
    Part("model", test_models, "model, forward, ", models.OURS),
)
NOTES = (
    "stock: with transformers' rotary embedding; decode: SDPA over keys that were rotated before",
    "of ceiling: of a copy's speed, decode on a CPU of a read's, prefill and model of a matrix"
    " product's",
)


def lines() -> list[str]:
    """The table as text; none where nothing of it was timed."""
    found = [(part, row) for part in PARTS for row in _best(part)]
    if not found:
        return []
    cells = [
        (part.name, row.group.removeprefix(part.begin), row.name, *_numbers(row))
        for part, row in found
    ]
    heads = ("", "", "by", "us", "stock us", "x stock", "of ceiling")
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    aligned = [
        "  ".join(
            f"{cell:<{width}}" if i < 3 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *cells)
    ]
    return [*(line.rstrip() for line in aligned), "", *NOTES]


def _best(part: Part) -> Iterator[Row]:
    """The fastest of ours in each group."""
    groups: dict[str, list[Row]] = {}
    for row in part.benchmark.ROWS:
        if row.group.startswith(part.begin) and row.name in part.ours:
            groups.setdefault(row.group, []).append(row)
    for rows in list(groups.values())[:GROUPS]:
        yield min(rows, key=lambda row: row.median)


def _numbers(row: Row) -> tuple[str, str, str, str]:
    """Time, that of stock RoPE, how much faster, the share of the ceiling."""
    stock, times = "-", "-"
    if row.baseline is not None:
        stock, times = f"{1e6 * row.baseline:.0f}", f"{row.baseline / row.median:.1f}"
    share = "-" if row.fraction is None else f"{row.fraction:.2f}"
    return f"{1e6 * row.median:.0f}", stock, times, share


def left_out(
    dropped: Mapping[str, Mapping[str, int]],
    absent: Mapping[str, str],
    reasons: Mapping[str, str],
) -> list[str]:
    """A line for the rows that the budget dropped, and one for what cannot be timed here.

    A row that failed beside others, as for want of memory, has a line of its own.

    Args:
        dropped: how many rows, by benchmark and group.
        absent: why an implementation is not timed, by its name.
        reasons: why a row was not timed, by "group, name".
    """
    result = []
    counts = {name: sum(groups.values()) for name, groups in dropped.items()}
    cut = list(reasons.values()).count(measure.SPENT)
    total = sum(counts.values()) + cut
    if total:
        parts = [f"{name} {n}" for name, n in counts.items()]
        parts += [f"amid a group {cut}"] * bool(cut)
        listed = ", ".join(parts)
        result.append(f"left out by the budget, {total} rows: {listed} (--budget 0 times all)")
    packages = {why.removesuffix(ABSENT) for why in absent.values() if why.endswith(ABSENT)}
    others = [name for name, why in absent.items() if not why.endswith(ABSENT)]
    if absent:
        parts = [f"not installed: {', '.join(sorted(packages))}"] * bool(packages)
        parts += [f"not for this machine: {len(others)} others (-v names them)"] * bool(others)
        result.append("; ".join(parts))
    result += (f"{row}: {why}" for row, why in reasons.items() if why != measure.SPENT)
    return result
