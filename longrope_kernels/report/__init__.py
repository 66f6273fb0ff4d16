"""`longrope report`: tests, then benchmarks, then a page with what this machine showed."""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from . import build, machine, page, plots, results, runs

ROOT = Path(__file__).resolve().parents[2]
TESTS_SHARE = 0.45  # of the budget, at most; what the tests leave goes to the benchmarks


def check_checkout(root: Path = ROOT) -> None:
    """The tests and benchmarks are part of the repository, not of an installed package.

    Raises:
        RuntimeError: they are not there.
    """
    for folder in ("tests", "benchmarks"):
        if not (root / folder).is_dir():
            raise RuntimeError(
                f"a report needs the repository's {folder}/, and {root} has none: run it from a "
                "checkout (git clone, then python -m longrope_kernels report)"
            )


def make(
    out: Path | None,
    budget: float,
    *,
    tests: tuple[str, ...] | None,
    benchmarks: tuple[str, ...],
    builds: bool = True,
    root: Path = ROOT,
) -> Path:
    """Run everything and write report.md, results.json and PNGs into one folder.

    Args:
        out: the folder, made if needed; None for reports/<device>/<date>/ in the checkout. It is
            written at the end, all at once.
        budget: seconds for everything: the build of what `build.stale` names, the tests, and the
            benchmarks, of which the least important rows are dropped.
        tests: what pytest is given to run, or None for no tests; `runs.options_here` on top.
        benchmarks: what pytest is given to time.
        builds: whether compiled backends that are missing or old are built first.
        root: the checkout.

    Returns:
        The folder.

    Raises:
        RuntimeError: there is no checkout, or the benchmarks broke.
    """
    check_checkout(root)
    begin = time.monotonic()
    facts = machine.describe(root)
    date = datetime.date.today().isoformat()
    report: dict[str, Any] = {"machine": facts, "date": date, "tests": None}
    failed = build.build(root) if builds else None
    report["build"] = {"failed": failed, "seconds": time.monotonic() - begin}
    if tests is not None:
        share = TESTS_SHARE * (budget - report["build"]["seconds"])
        report["tests"] = runs.run_tests(root, max(share, 0.0), (*runs.options_here(), *tests))
    left = max(budget - (time.monotonic() - begin), 0.0)
    rows, report["not_measured"] = runs.run_benchmarks(root, left, benchmarks)
    facts["clocks after"] = machine.clocks()
    report["seconds"] = time.monotonic() - begin

    out = out or root / "reports" / machine.folder_name(facts) / date
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = plots.draw(rows, folder)
        results.save(folder / "results.json", report, rows)
        (folder / "report.md").write_text(page.render(report, rows, pictures), encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            shutil.copy(file, out / file.name)
    return out
