"""Compile some of the launches that the package ships with, in parallel, and tell what they take.

    python -m benchmarks.gpu_day.compiles --into FILE --seconds 60 --count 80

The calls are those of reports/codegen; registers, spills and shared memory are of the ptxas here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .many import Small, each
from .schedule import write

LIMIT = 60.0  # seconds of one


def launches(arch: int) -> list[tuple[Any, Any]]:
    """(compile, case) of every kernel for this compute capability, head dims of each in turns."""
    import codegen
    import codegen_append
    import codegen_attention
    import codegen_decode

    modules: list[Any] = [codegen_attention, codegen_decode, codegen, codegen_append]
    kinds: dict[tuple[str, int], list[Any]] = {}
    for m in modules:
        for case in m.cases():
            if case.arch == arch:
                kinds.setdefault((m.__name__, case.dim), []).append((m.compile_case, case))
    turns = itertools.zip_longest(*kinds.values())
    return [x for turn in turns for x in turn if x is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day.compiles")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--one", type=int, help="compile this one, here")
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--seconds", type=float, default=100.0)
    chosen = parser.parse_args(arguments)
    if chosen.one is not None:
        compile_case, case = launches(chosen.arch)[chosen.one]
        with tempfile.TemporaryDirectory() as folder:
            row = compile_case(case, Path(folder))
        counted = (
            *("registers", "stack", "local", "shared", "warps", "stages"),
            "touched_too_early",
        )
        write(chosen.into, {"launch": str(case), **{x: row[x] for x in counted if x in row}})
        return int(any(map(row.get, ("local", "stack", "touched_too_early"))))
    end, folder = time.monotonic() + chosen.seconds, chosen.into.with_suffix(".logs")
    many = []
    for i in range(min(chosen.count, len(launches(chosen.arch)))):
        own = folder / f"{i}.jsonl"
        own.unlink(missing_ok=True)
        rest = ("--one", str(i), "--arch", str(chosen.arch), "--into", str(own))
        command = (sys.executable, "-m", "benchmarks.gpu_day.compiles", *rest)
        many.append(Small({"launch": i}, command, {"TRITON_INTERPRET": "0"}))
    failed = 0
    for told in each(many, folder, LIMIT, os.cpu_count() or 1, end):
        own = folder / f"{told['launch']}.jsonl"
        found = json.loads(own.read_text("utf-8")) if own.exists() else {}
        write(chosen.into, {**told, **found})
        failed += told["outcome"] != "passed"
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
