"""Many small processes at once, each with its own limit: one that crashes or hangs ends alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from .schedule import end_of, outcome_of, tail


class Small(NamedTuple):
    """A process: what tells it from others, its command, its own environment.

    last: the last line of what it says, where it did all that it had to.
    """

    what: dict[str, Any]
    command: tuple[str, ...]
    environment: Mapping[str, str] = {}
    last: str = ""


def each(
    many: list[Small], folder: Path, limit: float, at_once: int, end: float
) -> Iterator[dict[str, Any]]:
    """What became of each, as they end: its ``what``, "outcome", "why", "seconds", "output".

    Args:
        many: the processes.
        folder: for their logs.
        limit: seconds that each has.
        at_once: how many run side by side.
        end: by time.monotonic; one that cannot begin before is dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(i: int) -> dict[str, Any]:
        small, begin, log = many[i], time.monotonic(), folder / f"{i}.log"
        if begin >= end - 1:
            return {**small.what, "outcome": "dropped", "why": "no time was left", "seconds": 0.0}
        log.unlink(missing_ok=True)
        allowed = min(limit, end - begin)
        status = end_of(small.command, log, allowed, small.environment)
        told = {**small.what, "outcome": "passed", "why": ""}
        told["seconds"], output = round(time.monotonic() - begin, 1), tail(log, 15)
        if status == 0 and (not small.last or output[-1:] == [small.last]):
            return told
        _, why = outcome_of(status, allowed)
        if output:
            why = f"{why}: {output[-1]}"
        return {**told, "outcome": "failed", "why": why, "output": output}

    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed([pool.submit(one, i) for i in range(len(many))]):
            yield future.result()
