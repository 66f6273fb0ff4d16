"""The short tables, printed last: one line a row of a benchmark."""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """What the rows of one benchmark have in common.

    ``unit`` of the speed and how many of an amount make one; ``ceiling``, ``baseline``: heads of
    the columns that compare.
    """

    title: str
    unit: str
    scale: float
    ceiling: str
    baseline: str
    note: str


class Row(NamedTuple):
    """What one benchmark found; the time is a median, in seconds."""

    group: str
    name: str
    median: float
    amount: int  # bytes or FLOP
    fraction: float | None  # of the speed of the ceiling timed in turns with this row
    baseline: float | None  # the median of what it is told against

    @property
    def speedup(self) -> float | None:
        return None if self.baseline is None else self.baseline / self.median


def median_of(rows: list[Row], group: str, name: str) -> float | None:
    """The median of a row timed before, or None."""
    return next((row.median for row in rows if (row.group, row.name) == (group, name)), None)


def lines(table: Table, rows: list[Row]) -> list[str]:
    """The table as text."""
    width = max(len(row.name) for row in rows)
    heads = f"{table.unit:>8}  {table.ceiling:>9}  {table.baseline:>8}"
    result = []
    group = None
    for row in rows:
        if group != row.group:
            group = row.group
            result += ["", group, f"  {'':<{width}}  {'us':>10}  {heads}"]
        faster = "-" if row.speedup is None else f"{row.speedup:.1f}"
        speed = row.amount / table.scale / row.median
        shown = f"{speed:.1f}" if speed >= 10 else f"{speed:.3f}"
        of_ceiling = "-" if row.fraction is None else f"{row.fraction:.2f}"
        result.append(
            f"  {row.name:<{width}}  {1e6 * row.median:10.1f}  {shown:>8}"
            f"  {of_ceiling:>9}  {faster:>8}"
        )
    return [*result, "", table.note]
