"""What changed between two reports, and whether it is more than noise."""

from __future__ import annotations

from pathlib import Path

from .results import Row, load
from .text import table


def compare(before: Path, after: Path) -> str:
    """A table of the rows that both reports have, and the names of those that one lacks.

    A change counts where the two intervals from p20 to p80 do not meet.

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
    verdict = ""
    if b.p80 < a.p20:
        verdict = "faster"
    elif a.p80 < b.p20:
        verdict = "slower"
    return (
        a.group,
        a.name,
        f"{1e6 * a.median:.1f}",
        f"{1e6 * b.median:.1f}",
        f"{100 * (ratio - 1):+.1f} %",
        f"{100 * (a.noise + b.noise):.1f} %",
        verdict,
    )


def _where(report: dict[str, object]) -> str:
    machine = report["machine"]
    assert isinstance(machine, dict)
    gpu = machine.get("gpu")
    return f"{gpu['name'] if gpu else machine['cpu']}, commit {machine['commit']}"
