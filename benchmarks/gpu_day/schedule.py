"""The steps of a call, one after another, each a process of its own, within a budget of seconds.

Whatever a step does (fail, crash, hang, write nonsense), the next one runs, and what is known is
saved after each.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT

TAIL = 60  # lines of its output that are kept of a step
ENDING = 15.0  # seconds of its own that a step is not told of, to end and to write
AFTER_KILL = 5.0  # seconds for a killed process to go; one that the driver holds is left behind
BETWEEN = 2.0  # seconds to end a step and to save what is known


class Step(NamedTuple):
    """One process.

    Attributes:
        name: names its files too.
        importance: of two that do not both fit into the budget, the higher runs.
        least: seconds below which it is not begun, which are kept free for it.
        most: seconds after which it is stopped.
        command: what follows ``python``; in it "{into}" is a file for its results, JSON lines, and
            "{seconds}" what it may take to end by itself, "{state}" the folder of the state.
        needs: a program that has to be on the PATH.
        before: the words before ``python``, of a program that runs it.
        files: what it leaves under the state, to be copied to the results, and as what.
        environment: beside that of the call.
    """

    name: str
    importance: int
    least: float
    most: float
    command: tuple[str, ...]
    needs: str = ""
    before: tuple[str, ...] = ()
    files: Mapping[str, str] = {}
    environment: Mapping[str, str] = {}


def kept(steps: Sequence[Step], seconds: float) -> list[Step]:
    """Those that fit: the most important first, of equal ones the first."""
    chosen: set[str] = set()
    for step in sorted(steps, key=lambda step: -step.importance):
        if step.least + BETWEEN <= seconds:
            chosen.add(step.name)
            seconds -= step.least + BETWEEN
    return [step for step in steps if step.name in chosen]


def run_all(
    steps: Sequence[Step],
    state: Path,
    end: float,
    save: Callable[[list[dict[str, Any]]], None],
    environment: Mapping[str, str],
    done: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """What became of each step; ``save`` is told after each.

    Args:
        steps: in the order in which they run.
        state: a folder for logs, results and what they leave.
        end: by time.monotonic.
        save: writes what is known.
        environment: of all steps.
        done: what became of steps in an earlier run; those that passed are not run again.
    """
    passed = {x["step"]: x for x in done if x["outcome"] == "passed"}
    results: list[dict[str, Any]] = []
    for i, step in enumerate(steps):
        if step.name in passed:
            results.append({**passed[step.name], "earlier": True})
            continue
        rest = [other for other in steps[i:] if other.name not in passed]
        left = end - time.monotonic()
        fits = kept(rest, left)
        if step.needs and shutil.which(step.needs) is None:
            results.append(_told(step, "missing", f"there is no {step.needs} here"))
        elif step not in fits:
            left = max(left, 0.0)
            why = f"needs {step.least:g} s, and {left:.0f} s were left for it and what matters more"
            results.append(_told(step, "dropped", why))
        else:
            others = sum(x.least + BETWEEN for x in fits if x is not step)
            allowed = min(step.most, left - BETWEEN - others)
            results.append(run(step, state, allowed, environment))
        save(results)
    return results


def run(step: Step, state: Path, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What became of the step; its process, and all it started, end after ``seconds`` at most."""
    into, log = (state / f"{step.name.replace(' ', '-')}.{kind}" for kind in ("jsonl", "log"))
    for file in (into, log):
        file.unlink(missing_ok=True)
    within = max(seconds - ENDING, 1.0)
    given = {"into": str(into), "seconds": f"{within:.0f}", "state": str(state)}
    command = [*step.before, sys.executable, *step.command]
    for place, value in given.items():
        command = [part.replace(f"{{{place}}}", value) for part in command]
    begin, before = time.monotonic(), _below(os.getpid())
    print(f"{step.name}: at most {seconds:.0f} s", flush=True)
    _adopt()
    status = end_of(command, log, seconds, {**environment, **step.environment})
    for pid in _below(os.getpid()) - before:  # in sessions of their own, as those of pytest
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    took, entries = time.monotonic() - begin, read(into)
    outcome, why = outcome_of(status, seconds)
    print(f"{step.name}: {outcome} {why} ({took:.0f} s)", flush=True)
    told = _told(step, outcome, why)
    return {**told, "seconds": round(took, 1), "entries": entries, "output": tail(log)}


def outcome_of(status: int | None, seconds: float) -> tuple[str, str]:
    """What an exit status says, and why; None is that of a process that was stopped."""
    if status is None:
        return "stopped", f"it took longer than the {seconds:.0f} s it had"
    if status < 0:
        return "crashed", f"it ended by signal {-status}"
    return ("failed", f"it ended with {status}") if status else ("passed", "")


def end_of(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]
) -> int | None:
    """The exit status of the command, None where its time was over; output goes to ``log``."""
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(AFTER_KILL)


def _adopt() -> None:
    """Processes whose parent has ended become children of this one (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _below(pid: int) -> set[int]:
    """The processes that this one started, and those that they started (Linux)."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def read(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a step; one that is none says that it is none."""
    entries = []
    for line in file.read_text("utf-8", "replace").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        told = {"what": "a line of results", "outcome": "failed", "why": f"no JSON: {line[:200]}"}
        entries.append(entry if isinstance(entry, dict) else told)
    return entries


def write(file: Path, entry: Mapping[str, Any]) -> None:
    """One more JSON line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry, default=str) + "\n")


def tail(log: Path, lines: int = TAIL) -> list[str]:
    """The last lines of a file, however long it is."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500 * lines))
        return file.read().decode("utf-8", "replace").splitlines()[-lines:]


def _told(step: Step, outcome: str, why: str) -> dict[str, Any]:
    return {"step": step.name, "importance": step.importance, "outcome": outcome, "why": why}
