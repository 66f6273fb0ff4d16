"""The rows of a report: read from the recorder's lines, kept in results.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
CEILINGS = "ceilings"  # the group whose rows are the limits of this machine


@dataclass(frozen=True)
class Row:
    """One timed function. Times in seconds."""

    group: str
    name: str
    median: float
    p20: float
    p80: float
    rounds: int
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, group: str, name: str, times: Sequence[float], info: dict[str, Any]) -> Row:
        """The row of some rounds."""
        low = high = times[0]
        if len(times) > 1:
            low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
        return cls(group, name, statistics.median(times), low, high, len(times), info)

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name

    @property
    def noise(self) -> float:
        """Half of the spread from p20 to p80, relative to the median."""
        return (self.p80 - self.p20) / (2 * self.median)


def benchmarks_of(entries: Iterable[dict[str, Any]]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the recorder's entries, and what else they tell.

    That is "failed" and "not_measured", with reasons; "dropped" by the budget, counts of rows by
    benchmark and group; "clocks" seen.
    """
    rows: list[Row] = []
    found: dict[str, Any] = {"failed": {}, "not_measured": {}, "dropped": {}, "clocks": {}}
    for entry in entries:
        if "note" in entry:  # one of each process; what was not measured, none forgets
            not_measured = {**found["not_measured"], **entry["note"].get("not_measured", {})}
            found |= {**entry["note"], "not_measured": not_measured}
        elif "begun" in entry:
            continue
        elif "benchmark" in entry:
            row = Row(**entry["benchmark"])
            if all(row.key != other.key for other in rows):  # the ceilings, in each process anew
                rows.append(row)
        elif entry["outcome"] == "failed":
            found["failed"][entry.get("row") or entry["test"]] = entry["reason"]
        elif entry["outcome"] == "skipped" and entry.get("row"):
            found["not_measured"][entry["row"]] = entry["reason"].removeprefix("Skipped: ")
    return rows, found


def tests_of(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the recorder's entries: counts, what passed, and what did not with its reason."""
    results: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if results.get(entry["test"], {}).get("outcome") != "failed":
            results[entry["test"]] = entry
    by_outcome: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for test, entry in results.items():
        by_outcome[entry["outcome"]].append(test)
    reasons = {t: e["reason"] for t, e in results.items() if e.get("reason")}
    return {**by_outcome, "reasons": reasons}


def save(path: Path, report: dict[str, Any], rows: list[Row]) -> None:
    """Write results.json."""
    content = {"format": FORMAT, **report, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The report and its rows, from a results.json or the folder it is in.

    Raises:
        ValueError: there is no such file, or it is none of this format.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path}: expected a report's folder or its results.json, found none")
    try:
        report = json.loads(file.read_text("utf-8"))
        if report["format"] != FORMAT:
            raise ValueError(f"{file}: expected format {FORMAT}, got {report['format']!r}")
        return report, [Row(**row) for row in report.pop("rows")]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a results.json of this package, got {error!r}"
        ) from None


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by group, in order."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.group, []).append(row)
    return result
