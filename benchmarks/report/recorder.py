"""A pytest plugin: one JSON line a finished test, so that a run cut short has told what it knew.

``python -m pytest -p report.recorder`` with ``LONGROPE_RECORD`` naming the file.
A benchmark's line has its row; see benchmarks/conftest.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BROKEN = 70  # how a process ends in which the GPU refuses all that comes after a row


def pytest_configure(config: Any) -> None:
    path = os.environ.get("LONGROPE_RECORD")
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist, the controller alone
        # By which runs.py stops it; ignored where a shell runs a report in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        config.pluginmanager.register(_Recorder(path), "longrope-recorder")


def tell(config: Any, line: Mapping[str, Any]) -> bool:
    """A line beside those of the tests, where a recorder runs; whether one does.

    A "note" is what is known beside them. "begun" has the rows, by node id, that run from now on:
    where the process ends amid them, one ended it.
    """
    recorder = config and config.pluginmanager.get_plugin("longrope-recorder")
    if recorder:
        recorder.write(line)
    return bool(recorder)


def broke(config: Any, test: str, row: str, error: Exception) -> None:
    """Ends this process, of which a row left nothing to measure with; others go on elsewhere."""
    if tell(config, failure(test, row, (str(error).splitlines() or [repr(error)])[0])):
        os._exit(BROKEN)  # what pytest would do at its end waits for the GPU


def failure(test: str, row: str, reason: str) -> dict[str, Any]:
    """The line of a row that no pytest could tell of any more."""
    return {"test": test, "outcome": "failed", "seconds": 0.0, "reason": reason, "row": row}


def entries(record: Path) -> list[dict[str, Any]]:
    """What the lines say; one that was cut short with its process says nothing."""
    found = []
    for line in record.read_text("utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class _Recorder:
    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A failed set-up or tear-down counts as a failure; one that passed says nothing."""
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        told = dict(report.user_properties)
        if report.outcome == "passed":
            line |= {"benchmark": told["benchmark"]} if "benchmark" in told else {}
        else:
            line |= {"reason": _reason(report.longrepr), "row": told.get("row")}
        self.write(line)

    def pytest_collectreport(self, report: Any) -> None:
        """A file whose tests cannot be collected has failed."""
        if report.outcome == "failed":
            line = {"test": report.nodeid, "outcome": "failed", "reason": _reason(report.longrepr)}
            self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, default=str) + "\n")

    def pytest_unconfigure(self) -> None:
        self._file.close()


def _reason(longrepr: Any) -> str:
    """One line: the message of the exception or of the skip."""
    if isinstance(longrepr, tuple):  # (file, line, reason) of a skip
        return str(longrepr[2])
    crash = getattr(longrepr, "reprcrash", None)
    lines = str(longrepr if crash is None else crash.message).strip().splitlines()
    return lines[0] if lines else ""
