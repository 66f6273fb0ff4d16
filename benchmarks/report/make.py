"""A report from beginning to end."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import tempfile
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
        out: the folder, made if needed; None for reports/<device>/<date>/ in the checkout. Where
            it has a report already, `vacant` says which comes in its place. It is written at the
            end, all at once.
        budget: seconds for everything: the build of what `build.stale` names, the tests, and the
            benchmarks, of which the least important rows are dropped. The ceilings are measured
            even where nothing of it is left.
        tests: what pytest is given to run, or None for no tests; `runs.options_here` on top.
        benchmarks: what pytest is given to time.
        builds: whether compiled backends that are missing or old are built first.
        root: the checkout.

    Raises:
        ValueError: nothing can be written into ``out``; nothing was run.
        OSError: nor could it be in the end. The message says where the report is.
    """
    begin = time.monotonic()
    machine = facts.describe(root)
    date = datetime.date.today().isoformat()
    out = out or root / "reports" / facts.folder_name(machine) / date
    check_out(vacant(out))
    report: dict[str, Any] = {"machine": machine, "date": date, "tests": None}
    clocks = {"before": facts.clocks()}
    failed = build.build(root) if builds else None
    report["build"] = {"failed": failed, "seconds": time.monotonic() - begin}
    if tests is not None:
        share = TESTS_SHARE * (budget - report["build"]["seconds"])
        report["tests"] = runs.run_tests(root, share, (*runs.options_here(), *tests))
    left = budget - (time.monotonic() - begin)
    rows, found = runs.run_benchmarks(root, left, benchmarks)
    machine["clocks"] = {**clocks, "during": found.pop("clocks"), "after": facts.clocks()}
    report |= found
    report["seconds"] = time.monotonic() - begin
    out = vacant(out)  # another report may have ended since
    write(out, report, rows)
    of_tests = report["tests"]["failed"] if report["tests"] else ()
    return Written(out, len(report["failed"]) + len(of_tests))


def vacant(out: Path) -> Path:
    """``out``, or where it has a report, the first of ``out``-2, ``out``-3, ... that has none."""
    folder, named = out, Path(os.path.abspath(out))  # "." and ".." have no name to add to
    for number in itertools.count(2):
        if not any((folder / name).is_file() for name in ("report.md", "results.json")):
            break
        folder = named.with_name(f"{named.name}-{number}")
    return folder


def check_out(out: Path) -> None:
    """Raises ValueError where no folder can be made or written into at ``out``."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--out: expected a folder or a path to make one at, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out: expected a folder that can be written, {there} cannot be")


def write(out: Path, report: dict[str, Any], rows: list[results.Row]) -> None:
    """Both files of a report.

    Raises:
        OSError: they cannot be put into ``out``; the message says where they are.
    """
    folder = Path(tempfile.mkdtemp(prefix="longrope-report-"))
    results.save(folder / "results.json", report, rows)
    (folder / "report.md").write_text(page.render(report, rows), encoding="utf-8")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            shutil.copy(file, out / file.name)
    except OSError as error:
        raise OSError(f"--out: {error}; the report is in {folder}") from error
    shutil.rmtree(folder)
