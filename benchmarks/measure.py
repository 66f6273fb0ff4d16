"""The rows of a group, timed in turns: a round of each, after one of the ceiling that bounds it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from clock import CLOCK, Clock, seconds
from memory import available, peak_bytes
from report import recorder
from report.facts import Asked, gpu_refuses
from ropes import DEVICE, DTYPE, WrongResultError

FEWEST, MOST = 5, 60  # rounds
REASONS: dict[str, str] = {}  # why a row of a group could not be timed
SPENT = "the budget was spent"
COMPILED = "torch.compile"  # in the name of a row
COMPILING = 60  # seconds that torch.compile may take; with fewer left its rows are dropped
CLOCKS: list[dict[str, str]] = []  # of the GPU, amid the rounds of each group
deadline = math.inf  # by time.monotonic
config: pytest.Config | None = None  # by which a recorder is found; conftest.py sets it


class NotMeasuredError(Exception):
    """A row cannot be timed here; the report says why."""


class Ceiling(NamedTuple):
    """What nothing of its kind outruns: ``amount`` bytes copied, or FLOP of a matrix product."""

    name: str
    run: Callable[[], Any]
    amount: int


class Timed(NamedTuple):
    """A row whose result was checked: ``run(*arguments())`` is timed.

    ``arguments`` and the ceiling are not. ceiling: None where nothing bounds the work. ``amount``:
    of one call, in the ceiling's unit.
    """

    run: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    ceiling: Ceiling | None
    amount: int


class Measured(NamedTuple):
    """Medians, in seconds; the speed as a fraction of that of the ceiling; bytes at the peak.

    ``amount``: of `Timed`.
    """

    amount: int
    median: float
    ceiling_seconds: float | None
    fraction: float | None
    peak_bytes: int | None


def measure(
    benchmark: Any,
    request: pytest.FixtureRequest,
    prepare: Callable[[str], Timed],
    peers: Collection[str],
    seconds_a_row: float,
    fewest: int = FEWEST,
    clock: Clock = CLOCK,
) -> Measured | None:
    """Time the row of this test, with the others of its group where it is the first of them.

    Args:
        benchmark: pytest-benchmark's fixture, which is told of the rounds.
        prepare: makes a row of the group by its name and checks its result.
        peers: names of which an error means that the peer cannot run here; others fail.
        seconds_a_row: what the rounds of a row should take, with what is not timed in them.
        fewest: rounds, however long they take.
        clock: whose ``now`` is pytest-benchmark's timer.

    Returns:
        What was found, or None where pytest-benchmark is told not to measure.

    Raises:
        WrongResultError: the result is wrong.
    """
    global _turns
    name, key, items = _of_item(request.node)
    if benchmark.disabled:
        timed = prepare(name)
        benchmark.pedantic(timed.run, setup=lambda: (timed.arguments(), {}))
        return None
    if _turns is None or _turns.key != key:
        _turns = None  # what it holds is freed first
        full_size = bool(request.config.getoption("benchmark_only"))
        rounds = (fewest, MOST) if full_size else (3, 3)
        ids = {n: (item.nodeid, f"{benchmark.group}, {n}") for n, item in items.items()}
        _turns = _Turns(key, ids, clock, seconds_a_row, *rounds)
        _turns.take(list(items), prepare, peers)
    if name in _turns.failed:
        error = _turns.failed[name]
        if not isinstance(error, NotMeasuredError):
            raise error
        REASONS[f"{benchmark.group}, {name}"] = str(error)
        pytest.skip(str(error))
    data = _turns.times[name]
    clock.replay(data)
    benchmark.pedantic(lambda: None, rounds=len(data))
    return _turns.found(name)


def is_timed(item: pytest.Item) -> bool:
    """Whether the row was timed already, with the first of its group."""
    return _turns is not None and is_row(item) and _turns.key == _row_of(item)[1]


def fits(item: pytest.Item, seconds_a_row: float) -> bool:
    """Whether the group of a row can be prepared and timed, the fewest rounds, in the time left.

    By what rows of the same benchmark took, or ``seconds_a_row`` where there was none.
    """
    if deadline == math.inf or not is_row(item):
        return True
    left = deadline - time.monotonic()
    _, key, items = _of_item(item)
    names = list(items)
    if left < COMPILING:  # see `require_time_to_compile`
        names = [name for name in names if COMPILED not in name]
    return sum(_expected(key, name, seconds_a_row) for name in names) <= left


def require_memory(amount: int) -> None:
    """Raises `NotMeasuredError` where ``amount`` bytes are not there."""
    if amount > available():
        raise NotMeasuredError(
            f"needs {1e-9 * amount:.0f} GB, {1e-9 * available():.0f} GB are there"
        )


def require_time_to_compile() -> None:
    """Raises `NotMeasuredError` where the budget will be spent before."""
    if time.monotonic() > deadline - COMPILING:
        raise NotMeasuredError(SPENT)


def _expected(key: Any, name: str, unknown: float) -> float:
    """Seconds to prepare a row and for its fewest rounds, by those of its name or its benchmark.

    In proportion to the tokens, where there are more of them now.
    """
    seen = _took.get(key[0], {})
    alike = [seen[name]] if name in seen else list(seen.values())
    return max((took * max(1, _tokens(key) / n) for took, n in alike), default=unknown)


def _tokens(key: Any) -> int:
    """Of a group, by its parameters; 1 where they have none."""
    of = dict(key[1])
    tokens = [of.get("tokens", 0), *(getattr(x, "tokens", 0) for x in of.values())]
    lengths = [sum(getattr(x, "lengths", ())) for x in of.values()]
    return max(*tokens, *lengths, 1)


class _Turns:
    """The rounds of all rows of a group."""

    def __init__(
        self,
        key: Any,
        ids: dict[str, tuple[str, str]],
        clock: Clock,
        seconds_a_row: float,
        fewest: int,
        most: int,
    ) -> None:
        self.key, self._ids, self._clock = key, ids, clock
        self.failed: dict[str, Exception] = {}
        self.times: dict[str, list[float]] = {}
        self.ceilings: dict[str, list[float]] = {}
        self._amounts: dict[str, tuple[int, int | None]] = {}  # of a row, of its ceiling
        self._peaks: dict[str, int | None] = {}
        self._peers: Collection[str] = ()
        self._one: dict[str, float] = {}  # seconds of a round, with what is not timed in it
        self._seconds, self._fewest, self._most = seconds_a_row, fewest, most

    def take(
        self, names: list[str], prepare: Callable[[str], Timed], peers: Collection[str]
    ) -> None:
        """Check all rows, then time those that are right; what the budget cuts off is named."""
        rows: dict[str, Timed] = {}
        rounds: dict[str, int] = {}
        self._peers = peers
        for name in names:
            need = self._least(rounds) + _expected(self.key, name, 0.0)
            if time.monotonic() + need > deadline:
                self.failed[name] = NotMeasuredError(SPENT)
            else:
                self._begin(name, prepare, rows, rounds)
        self._shorten(rounds)
        if rounds:
            self._all_rounds(rows, rounds)
        for name in rows:
            if name not in self.failed and len(self.times[name]) < self._fewest:
                self.failed[name] = NotMeasuredError(SPENT)

    def _least(self, rounds: Collection[str]) -> float:
        """Seconds that the fewest rounds of these rows take."""
        return self._fewest * sum(self._one[name] for name in rounds)

    def _shorten(self, rounds: dict[str, int]) -> None:
        """To what fits into the time left: the same part of each beyond the fewest."""
        left = deadline - time.monotonic()
        while rounds and self._least(rounds) > left:
            rounds.popitem()
        more = {name: n - self._fewest for name, n in rounds.items()}
        spare = left - self._least(rounds)
        wanted = sum(n * self._one[name] for name, n in more.items())
        if wanted > spare:
            rounds |= {name: self._fewest + int(n * spare / wanted) for name, n in more.items()}

    def _all_rounds(self, rows: dict[str, Timed], rounds: dict[str, int]) -> None:
        recorder.tell(config, {"begun": dict(self._ids[name] for name in rounds)})
        collects = gc.isenabled()
        gc.disable()
        passes = max(rounds.values())
        asked = None
        for i in range(passes):
            if time.monotonic() > deadline:
                break
            if i == passes // 4:
                asked = Asked() if DEVICE.type == "cuda" else None
            # Those of fewer rounds are spread over all passes; another row begins each time.
            due = [name for name, n in rounds.items() if (i + 1) * n // passes > i * n // passes]
            start = i % len(due)
            for name in due[start:] + due[:start]:
                self._another_round(name, rows[name])
        if asked is not None:
            CLOCKS.append(asked.answer())
        if collects:
            gc.enable()

    def found(self, name: str) -> Measured:
        times, ceilings = self.times[name], self.ceilings[name]
        (amount, of_ceiling), peak = self._amounts[name], self._peaks[name]
        median = statistics.median(times)
        if of_ceiling is None:
            return Measured(amount, median, None, None, peak)
        fractions = (amount / of_ceiling * c / t for c, t in zip(ceilings, times, strict=True))
        return Measured(
            *(amount, median, statistics.median(ceilings), statistics.median(fractions), peak)
        )

    def _begin(
        self,
        name: str,
        prepare: Callable[[str], Timed],
        rows: dict[str, Timed],
        rounds: dict[str, int],
    ) -> None:
        recorder.tell(config, {"begun": dict([self._ids[name]])})
        begin = time.monotonic()
        try:
            row = prepare(name)
            rounds[name] = self._rounds(name, row)
            rows[name] = row
            took = time.monotonic() - begin + self._least([name])
            _took.setdefault(self.key[0], {})[name] = took, _tokens(self.key)
        except Exception as error:
            self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        if gpu_refuses():
            recorder.broke(config, *self._ids[name], error)
        is_told = isinstance(error, (NotMeasuredError, WrongResultError))
        self.failed[name] = error if is_told or name not in self._peers else _cannot_run(error)

    def _rounds(self, name: str, row: Timed) -> int:
        """How many there will be, by a first one, which is not counted."""
        self.times[name], self.ceilings[name] = [], []
        self._amounts[name] = row.amount, row.ceiling.amount if row.ceiling else None
        self._peaks[name] = _peak_of(row)
        begin = time.perf_counter()
        self._round(name, row)
        one = self._one[name] = time.perf_counter() - begin
        self.times[name].clear()
        self.ceilings[name].clear()
        return min(self._most, max(self._fewest, round(self._seconds / one)))

    def _another_round(self, name: str, row: Timed) -> None:
        """None of a row that failed."""
        if name not in self.failed:
            try:
                self._round(name, row)
            except Exception as error:
                self._fail(name, error)

    def _round(self, name: str, row: Timed) -> None:
        # The ceiling before each round, since the speed of a shared machine changes by the second.
        if row.ceiling is not None:
            self.ceilings[name].append(seconds(row.ceiling.run, self._clock))
        ready = row.arguments()
        self.times[name].append(seconds(lambda: row.run(*ready), self._clock))


_turns: _Turns | None = None
# By benchmark and name of a row: seconds to prepare the latest and for its fewest rounds; tokens.
_took: dict[Any, dict[str, tuple[float, int]]] = {}


def _of_item(item: Any) -> tuple[str, Any, dict[str, Any]]:
    """The name of a row, the key of its group, and the items of it that will be run, by name."""
    name, key = _row_of(item)
    rows = ((x, _row_of(x)) for x in item.session.items if hasattr(x, "callspec"))
    return name, key, {n: x for x, (n, k) in rows if k == key}


def is_row(item: Any) -> bool:
    """Whether a test is a row of a group, by its parameters."""
    return "name" in getattr(getattr(item, "callspec", None), "params", {})


def _row_of(item: Any) -> tuple[str, Any]:
    params = dict(item.callspec.params)
    name = params.pop("name", "")
    return name, (item.function, tuple(sorted(params.items(), key=lambda pair: pair[0])))


def _peak_of(row: Timed) -> int | None:
    ready = row.arguments()
    return peak_bytes(lambda: row.run(*ready))


def _cannot_run(error: Exception) -> NotMeasuredError:
    """Of a peer; the frames of its error are let go, since they hold tensors."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return NotMeasuredError("out of memory")
    lines = str(error).strip().splitlines()
    return NotMeasuredError(f"{type(error).__name__}: {lines[0] if lines else ''}")


@lru_cache(maxsize=1)
def matmul() -> Ceiling:
    """A large matrix product."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE).to(DTYPE) for _ in range(2))
    into = torch.empty_like(a)
    return Ceiling("matmul", lambda: torch.mm(a, b, out=into), 2 * size**3)
