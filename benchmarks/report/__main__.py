"""The command line of a report; `main` is what it does."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from .compare import compare
from .make import make

BUDGET = 420.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and benchmarks here and write a report; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write into [reports/<device>/<date>]; where it has a report, its name with "
        "-2, -3 and so on",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help="seconds for build, tests and benchmarks together; rows that do not fit are left out "
        "and named [%(default)s]",
    )
    parser.add_argument("--no-tests", action="store_true", help="run the benchmarks alone")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="say what changed between two reports, and run nothing",
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.compare:
            print(compare(*chosen.compare))
            return 0
        if chosen.budget < 1:
            raise ValueError(f"--budget: expected a second at least, got {chosen.budget:g}")
        needed = ("pytest", "pytest_benchmark")
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise RuntimeError(f"missing {', '.join(missing)}: pip install --group benchmark")
        tests = None if chosen.no_tests else ("tests",)
        made = make(chosen.out, chosen.budget, tests=tests, benchmarks=("benchmarks",))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    print(f"\nwritten: {made.folder}/report.md")
    if made.failed:
        print(f"benchmarks.report: {made.failed} failed, which the page lists", file=sys.stderr)
    return int(made.failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
