"""What changed between two reports, and whether it is more than noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .page import table
from .results import Row, load

ENOUGH = 3  # rounds, of which the times at 20 and 80 % are not all one


def compare(before: Path, after: Path) -> str:
    """A table of the rows that both reports have, and the names of those that one lacks.

    A change counts where the two intervals from p20 to p80 do not meet, it is larger than their
    noise together, and both rows have `ENOUGH` rounds.

    Raises:
        ValueError: one of them is no report.
    """
    (of_a, rows_a), (of_b, rows_b) = load(before), load(after)
    a, b = ({row.key: row for row in rows} for rows in (rows_a, rows_b))
    lines = [f"before: {before} ({_where(of_a)})", f"after:  {after} ({_where(of_b)})", ""]
    both = [key for key in a if key in b]
    cells = [_cells(a[key], b[key]) for key in both]
    head = ("group", "name", "before us", "after us", "change", "noise", "")
    lines += table(head, cells) if cells else ["no row in common"]
    for title, ours, theirs in (("only before", a, b), ("only after", b, a)):
        names = [" / ".join(key) for key in ours if key not in theirs]
        if names:
            lines += ["", f"{title}:", *(f"  {name}" for name in names)]
    return "\n".join(lines)


def _cells(a: Row, b: Row) -> tuple[str, ...]:
    ratio = b.median / a.median
    noise = a.noise + b.noise
    return (
        a.group,
        a.name,
        f"{1e6 * a.median:.1f}",
        f"{1e6 * b.median:.1f}",
        f"{100 * (ratio - 1):+.1f} %",
        f"{100 * noise:.1f} %",
        _verdict(a, b, abs(ratio - 1) > noise),
    )


def _verdict(a: Row, b: Row, is_more_than_noise: bool) -> str:
    if min(a.rounds, b.rounds) < ENOUGH:
        return "too few rounds"
    if is_more_than_noise and b.p80 < a.p20:
        return "faster"
    return "slower" if is_more_than_noise and a.p80 < b.p20 else ""


def _where(report: dict[str, Any]) -> str:
    """Of any age: what a report does not say is unknown."""
    machine = report.get("machine", {})
    name = (machine.get("gpu") or {}).get("name") or machine.get("cpu") or "an unknown machine"
    return f"{name}, commit {machine.get('commit') or 'unknown'}"
