"""A report from beginning to end."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from . import build, facts, page, results, runs

ROOT = Path(__file__).resolve().parents[2]
TESTS_SHARE = 0.45  # of the budget, at most; what the tests leave goes to the benchmarks


class Written(NamedTuple):
    """Where a report is, and how many tests, benchmarks and other parts of it failed."""

    folder: Path
    failed: int


def make(
    out: Path | None,
    budget: float,
    *,
    tests: tuple[str, ...] | None,
    benchmarks: tuple[str, ...],
    builds: bool = True,
    root: Path = ROOT,
) -> Written:
    """Run everything and write report.md and results.json into one folder.

    Args:
        out: the folder, which `vacant` makes, or the next one where it has a report already; None
            for reports/<device>/<date>/ in the checkout.
        budget: seconds for everything: the build of what `build.stale` names, the tests, and the
            benchmarks, of which the least important rows are dropped. The ceilings are measured
            even where nothing of it is left.
        tests: what pytest is given to run, or None for no tests; `runs.options_here` on top.
        benchmarks: what pytest is given to time.
        builds: whether compiled backends that are missing or old are built first.
        root: the checkout.

    Raises:
        OSError: nothing can be written into ``out``; nothing was run.
    """
    begin = time.monotonic()
    machine = facts.describe(root)
    date = datetime.date.today().isoformat()
    out = vacant(out or root / "reports" / facts.folder_name(machine) / date)
    report: dict[str, Any] = {"machine": machine, "date": date, "tests": None}
    failed = build.build(root) if builds else None
    report["build"] = {"failed": failed, "seconds": time.monotonic() - begin}
    if tests is not None:
        share = TESTS_SHARE * (budget - report["build"]["seconds"])
        report["tests"] = runs.run_tests(root, share, (*runs.options_here(), *tests))
    left = budget - (time.monotonic() - begin)
    rows, found = runs.run_benchmarks(root, left, benchmarks)
    machine["clocks"] = found.pop("clocks")
    report |= found
    report["seconds"] = time.monotonic() - begin
    results.save(out / "results.json", report, rows)
    (out / "report.md").write_text(page.render(report, rows), encoding="utf-8")
    of_tests = report["tests"]["failed"] if report["tests"] else ()
    return Written(out, len(report["failed"]) + len(of_tests))


def vacant(out: Path) -> Path:
    """``out``, or where it has a report, the first of ``out``-2, ``out``-3, ... that has none.

    It has an empty page then, so that what cannot be written is seen before anything runs.
    """
    folder, named = out, Path(os.path.abspath(out))  # "." and ".." have no name to add to
    for number in itertools.count(2):
        if not any((folder / name).is_file() for name in ("report.md", "results.json")):
            break
        folder = named.with_name(f"{named.name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").touch()
    except OSError as error:
        raise OSError(f"--out: {error}") from error
    return folder
