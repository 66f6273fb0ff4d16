"""What the report's own machinery measures, as JSON lines: facts, the build, tests, some rows.

python -m benchmarks.gpu_day.measured facts|build|tests|rows|report|ptxas --into FILE --seconds 60
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from . import ROOT
from .schedule import write

# The ids of the rows by which a day is told, of benchmarks/.
ATTENTION, DECODE = "S = 8192, d = 128, causal", "keys, bfloat16"
HEADLINES = (
    *(f"forward-S8192-bfloat16-{name}" for name in ("triton", "cuda")),
    *(f"{way}-S8192-bfloat16-triton" for way in ("in place", "backward")),
    *(
        f"forward-{ATTENTION}-{x}"
        for x in (
            "composed",
            "triton prepass",
            "SDPA cuDNN, no rotation",
            "SDPA cuDNN, k rotated alone",
        )
    ),
    f"backward-{ATTENTION}-composed",
    *(
        f"{size} {DECODE}-{name}"
        for size in ("32 x 4096", "1 x 131072")
        for name in ("triton", "cuda")
    ),
    "append-8192-triton",
)
OF_TRITON = tuple(name for name in HEADLINES if "-triton" in name)
LATE = 10.0  # seconds that the benchmarks may take beyond their time, to end a row


def facts_of_machine(into: Path) -> int:
    """What a report says of it, and which programs there are."""
    from report import facts

    from .canaries import assemblers

    told = facts.describe(ROOT)
    programs = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump")
    told["programs"] = {name: shutil.which(name) for name in programs}
    told["ptxas"] = assemblers()
    told["clocks"] = facts.clocks()
    write(into, told)
    return 0


def build(into: Path) -> int:
    """The compiled backends, in place."""
    from report.build import build, stale

    before, failed = stale(ROOT), build(ROOT)
    write(into, {"built": before, "failed": failed, "missing": stale(ROOT)})
    return int(failed is not None)


def tests(into: Path, seconds: float, arguments: Sequence[str]) -> int:
    """Those that the device runs, by file; 1 where one failed or time was too short."""
    from report.runs import options_here, run_tests

    options = (*options_here(), *arguments)
    if "report.order" not in options:
        options = ("-p", "report.order", *options)
    if "-n" in options and importlib.util.find_spec("pytest_timeout"):
        # A test that hangs ends its process, whose place another takes.
        options = ("--timeout", "120", "--timeout-method", "thread", *options)
    found = run_tests(ROOT, seconds, ("--on-device", "-p", "no:cacheprovider", *options))
    for outcome in ("passed", "failed", "skipped"):
        counts = Counter(name.partition("::")[0] for name in found[outcome])
        for file, count in sorted(counts.items()):
            write(into, {"tests": file, "outcome": outcome, "count": count})
    for name in found["failed"]:
        write(into, {"test": name, "outcome": "failed", "why": found["reasons"].get(name, "")})
    write(into, {"complete": found["complete"]})
    return int(bool(found["failed"]) or not found["complete"] or not found["passed"])


def rows(
    into: Path, seconds: float, ids: Sequence[str], beside: Mapping[str, str] | None = None
) -> int:
    """Those of the benchmarks with these ids, and the ceilings; ``beside`` goes into each line."""
    from report.runs import run_benchmarks

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.write_text("\n".join(ids), encoding="utf-8")
        measured, found = run_benchmarks(ROOT, seconds - LATE, (f"--rows={file}", "benchmarks"))
    for row in measured:
        write(into, {"row": asdict(row), **(beside or {})})
    for outcome in ("failed", "not_measured"):
        for name, why in found[outcome].items():
            write(into, {"what": name, "outcome": outcome, "why": why, **(beside or {})})
    return int(bool(found["failed"]))


def report(into: Path, seconds: float, arguments: Sequence[str]) -> int:
    """The whole report, under the state, and its rows here too."""
    from report.make import make
    from report.results import load

    out = into.parent / "report"
    shutil.rmtree(out, ignore_errors=True)
    benchmarks = tuple(arguments) or ("benchmarks",)
    made = make(out, seconds - LATE, tests=None, benchmarks=benchmarks, builds=False)
    for row in load(made.folder)[1]:
        write(into, {"row": asdict(row)})
    return int(made.failed > 0)


def by_assembler(into: Path, seconds: float, ids: Sequence[str]) -> int:
    """The rows of Triton's kernels by each ptxas there is, each with a cache of its own."""
    from .canaries import assemblers

    found, failed = assemblers(), 0
    for i, (name, path) in enumerate(found.items()):
        os.environ["TRITON_PTXAS_PATH"] = path
        os.environ["TRITON_CACHE_DIR"] = str(into.with_suffix(f".cache-{i}"))
        write(into, {"ptxas": name, "path": path})
        failed += rows(into, seconds / len(found), ids, {"ptxas": name})
    return int(failed > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day.measured")
    parser.add_argument("what", choices=("facts", "build", "tests", "rows", "report", "ptxas"))
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--rows", choices=("headlines", "triton", "none"), default="headlines")
    chosen, rest = parser.parse_known_args(arguments)
    seconds = chosen.seconds
    if chosen.what == "facts":
        return facts_of_machine(chosen.into)
    if chosen.what == "build":
        return build(chosen.into)
    if chosen.what == "tests":
        return tests(chosen.into, seconds, rest or ["tests"])
    ids = {"headlines": HEADLINES, "triton": OF_TRITON, "none": ()}[chosen.rows]
    if chosen.what == "report":
        return report(chosen.into, seconds, rest)
    measure = by_assembler if chosen.what == "ptxas" else rows
    return measure(chosen.into, seconds, ids)


if __name__ == "__main__":
    raise SystemExit(main())
