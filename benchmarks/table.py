"""The short table, printed last: one line a row of the benchmark."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """What one benchmark found; times are medians, in seconds."""

    size: str
    direction: str
    name: str
    median: float
    traffic: int  # bytes
    copy_fraction: float  # of the speed of the copy timed in turns with this row

    @property
    def gb_per_s(self) -> float:
        return 1e-9 * self.traffic / self.median


def speedup(row: Row, rows: list[Row]) -> float | None:
    """Over transformers eager at the same size; its forward where it has no in-place form."""
    direction = "forward" if row.direction == "in place" else row.direction
    for other in rows:
        if (other.size, other.direction, other.name) == (row.size, direction, "transformers eager"):
            return other.median / row.median
    return None


def lines(rows: list[Row]) -> list[str]:
    """The table as text."""
    width = max(len(row.name) for row in rows)
    result = []
    group = None
    for row in rows:
        if group != (row.size, row.direction):
            group = (row.size, row.direction)
            result += [
                "",
                f"{row.direction}, {row.size}",
                f"  {'':<{width}}  {'us':>9}  {'GB/s':>7}  {'of copy':>7}  {'x eager':>7}",
            ]
        faster = speedup(row, rows)
        result.append(
            f"  {row.name:<{width}}  {1e6 * row.median:9.1f}  {row.gb_per_s:7.1f}"
            f"  {row.copy_fraction:7.2f}  {'-' if faster is None else f'{faster:.1f}':>7}"
        )
    return result
