"""call-N.md: what one reads first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report.page import table

from .goals import GOALS, Rows

FAULTS = ("failed", "crashed", "stopped")
NOT_RUN = ("dropped", "missing")


def render(call: int, results: Sequence[dict[str, Any]], rows: Rows, rehearsal: bool) -> str:
    """The page as Markdown: goals, steps, what failed, and the rows of this call."""
    title = f"# Call {call}" + (", a rehearsal: nothing here is of a GPU" * rehearsal)
    lines = [title, "", "## Goals", ""]
    told = [(goal.what, goal.wanted, *goal.told(rows)) for goal in GOALS]
    lines += table(("goal", "wanted", "measured", "met", "file"), told)
    lines += ["", "## Steps", ""]
    lines += table(
        ("step", "outcome", "s", "why"),
        [(x["step"], _outcome(x), str(x.get("seconds", "")), x["why"]) for x in results],
    )
    for result in results:
        lines += _of_step(result)
    return "\n".join(lines) + "\n"


def _outcome(result: dict[str, Any]) -> str:
    return result["outcome"] + (" (in an earlier run)" if result.get("earlier") else "")


def _of_step(result: dict[str, Any]) -> list[str]:
    """Its measured rows, the parts that did not pass, and where it did not, its last words."""
    entries, lines = result.get("entries", []), []
    measured = [entry for entry in entries if isinstance(entry.get("row"), dict)]
    if measured:
        cells = [_cells(entry["row"], entry.get("ptxas", "")) for entry in measured]
        head = ("group", "name", "ptxas", "us", "GB/s", "of copy", "TFLOP/s", "of matmul")
        lines += table(head, cells)
    timed = [x for x in entries if "seconds a token" in x]
    lines += [f"- {x['what']}: {1e3 * x['seconds a token']:.2f} ms a token" for x in timed]
    failing = {x["canary"] for x in entries if x.get("outcome") == "failed" and "canary" in x}
    for entry in entries:
        retried = "again" in entry and entry.get("canary") in failing
        if entry.get("outcome") in (*FAULTS, "dropped") or retried:
            names = ("canary", "again", "launch", "test", "what", "tests", "why")
            words = [str(entry[name]) for name in names if entry.get(name)]
            lines.append(f"- {entry['outcome']}: {': '.join(words)}")
    if result["outcome"] in FAULTS and result.get("output"):
        lines += ["", "```text", *result["output"][-20:], "```"]
    elif result["step"].startswith(("tune", "profile")) and result.get("output"):
        lines += ["", "```text", *result["output"], "```"]
    return ["", f"## {result['step']}", "", *lines] if lines else []


def _cells(row: dict[str, Any], ptxas: str) -> tuple[str, ...]:
    info = row["info"]
    speeds = (info.get(x) for x in ("gb_per_s", "of_copy", "tflop_per_s", "of_matmul"))
    shown = ("" if speed is None else f"{speed:.3g}" for speed in speeds)
    return (row["group"], row["name"], ptxas, f"{1e6 * row['median']:.1f}", *shown)
