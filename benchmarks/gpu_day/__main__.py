"""What a GPU is asked first, in three calls of under nine minutes each.

    python -m benchmarks.gpu_day --call 1    each kernel once; tests of the device; headlines
    python -m benchmarks.gpu_day --call 2    the report
    python -m benchmarks.gpu_day --call 3    profiles, generate() as a graph, ptxas, better tiles

From a bare checkout, without a network. ``--rehearse`` does the same small, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import PATHS, ROOT
from .calls import calls
from .page import FAULTS, NOT_RUN, render
from .schedule import Step, run_all

BUDGET = 520.0  # seconds of a call
LATE = 15.0  # seconds beyond, after which the call ends whatever it waits for
LOG = 2**20  # bytes of a step's output that are kept, its last


class Call:
    """One call: its state, and the files of its results, eight of them at most."""

    def __init__(self, number: int, state: Path, out: Path, rehearsal: bool) -> None:
        self.number, self.state, self.out, self.rehearsal = number, state, out, rehearsal
        self.steps: list[Step] = calls(rehearsal)[number]
        self.commit = _commit()
        self.results: list[dict[str, Any]] = []

    def done(self) -> list[dict[str, Any]]:
        """What became of the steps of the same commit in an earlier run of this call."""
        before = _load(self.state / f"call-{self.number}.json")
        same = before.get("commit") == self.commit and before.get("rehearsal") == self.rehearsal
        known = self.commit is not None and "with changes" not in self.commit
        return list(before["results"]) if same and known else []

    def save(self, results: list[dict[str, Any]]) -> None:
        """All files, each of them whole."""
        self.results = results
        name = f"call-{self.number}"
        told = {"call": self.number, "commit": self.commit, "rehearsal": self.rehearsal}
        content = json.dumps({**told, "results": results}, indent=1, default=str)
        _write(self.state / f"{name}.json", content)
        _write(self.out / f"{name}.json", content)
        _write(self.out / f"{name}.md", render(self.number, results, self.rows(), self.rehearsal))
        logs = []
        for step in self.steps:
            log = self.state / f"{step.name.replace(' ', '-')}.log"
            if log.exists():
                logs += [f"==== {step.name}", log.read_bytes()[-LOG:].decode("utf-8", "replace")]
            for file, copied in step.files.items():
                if (self.state / file).exists():
                    shutil.copy(self.state / file, self.out / f"{name}-{copied}")
        _write(self.out / f"{name}.log", "\n".join(logs))

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """All rows of all calls of this commit; where two have one, that of the later call."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for file in sorted(self.state.glob("call-?.json")):
            content = _load(file)
            if (content.get("commit"), content.get("rehearsal")) != (self.commit, self.rehearsal):
                continue
            for result in content["results"]:
                for entry in result.get("entries", []):
                    row = entry.get("row")
                    if isinstance(row, dict) and "ptxas" not in entry:
                        found[row["group"], row["name"]] = {**row, "file": file.name}
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a call; 1 where a step failed, 2 where one did not run and none failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--call", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "gpu-day",
        help="folder of caches, logs and what is done; a step that passed is not run again",
    )
    parser.add_argument("--out", type=Path, help="folder of the results [--state/results]")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds [%(default)g]")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small")
    chosen = parser.parse_args(arguments)
    if chosen.budget < 1:
        parser.error(f"--budget: expected a second at least, got {chosen.budget:g}")
    if not chosen.rehearse and not _has_gpu():
        parser.error("needs a CUDA device, torch finds none; --rehearse does without")
    begin = time.monotonic()
    state = chosen.state.absolute()
    out = (chosen.out or state / "results").absolute()
    for folder in (state, out):
        folder.mkdir(parents=True, exist_ok=True)
    call = Call(chosen.call, state, out, chosen.rehearse)
    watchdog = threading.Timer(chosen.budget + LATE, _give_up, (call,))
    watchdog.daemon = True
    watchdog.start()
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *filter(None, [inherited])]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(state / "triton"),
        **({"TRITON_INTERPRET": "1"} if chosen.rehearse else {}),
    }
    end = begin + chosen.budget
    results = run_all(call.steps, state, end, call.save, environment, call.done())
    watchdog.cancel()
    print((out / f"call-{chosen.call}.md").read_text("utf-8"))
    if any(result["outcome"] in FAULTS for result in results):
        return 1
    return 2 * any(result["outcome"] in NOT_RUN for result in results)


def _give_up(call: Call) -> None:
    """The driver may keep what waits for it from ever ending."""
    ran = {result["step"] for result in call.results}
    step = next((step for step in call.steps if step.name not in ran), None)
    if step is not None:
        why = "it could not be stopped, and the call ended with it"
        told = {"step": step.name, "importance": step.importance, "outcome": "stopped", "why": why}
        call.save([*call.results, told])
    print("benchmarks.gpu_day: the budget is over, and a step did not end", file=sys.stderr)
    os._exit(1)


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _commit() -> str | None:
    from report import facts

    return facts.commit(ROOT)


def _load(file: Path) -> dict[str, Any]:
    """An earlier result; empty where there is none, or none that can be read."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) and "results" in content else {}


def _write(file: Path, content: str) -> None:
    """Whole or not at all."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(content, encoding="utf-8")
    new.replace(file)


if __name__ == "__main__":
    raise SystemExit(main())
