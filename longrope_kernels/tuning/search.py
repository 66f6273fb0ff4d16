"""The search behind `longrope tune`: the fastest tiles of each attention kernel on a device.

An entry of a table is one launch for one head_dim. Its candidates are compiled, what does not fit
is dropped, what computes something else than the present entry is reported, and the rest is timed
in turns, so that a change of the clock rate meets all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

from .calls import PRODUCTS, Call, difference, make_call
from .entries import Entry, Task, entries, list_candidates

_TRIAL_ROUNDS, _ROUNDS = 3, 12
_FINALISTS = 6
# The part of the time that compiling may take: it is by far the slowest.
_BUILDING = 0.75
# A new entry must take this much less time than the present one: less is noise.
_WORTH = 0.99


class Built(NamedTuple):
    """What the compiler made of a launch: per thread, and shared memory in bytes; or an error."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""


class Machine(Protocol):
    """Where kernels run. ``shared``: bytes a program may have. ``workers``: launches compiled at
    once. ``seconds``: the time of one launch with a cold L2 cache. ``now``: a clock in seconds.
    """

    name: str
    device: torch.device
    arch: int
    shared: int
    workers: int

    def now(self) -> float: ...
    def compile(self, launches: Sequence[Any]) -> list[Built]: ...
    def run(self, launch: Any) -> None: ...
    def seconds(self, launch: Any) -> float: ...


@dataclass
class Candidate:
    """A `Config` and what became of it; built, samples and flops for each mask of the entry."""

    config: Any
    present: bool = False
    dropped: str = ""
    built: list[Built] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Medians; empty where some mask has not been timed."""
        return [median(s) for s in self.samples] if all(self.samples) else []

    @property
    def score(self) -> float:
        """The geometric mean of the seconds; inf where there are none."""
        seconds = self.seconds
        return math.prod(seconds) ** (1 / len(seconds)) if seconds else math.inf

    @property
    def tflops(self) -> list[float]:
        return [1e-12 * f / s for f, s in zip(self.flops, self.seconds, strict=False)]


@dataclass
class Outcome:
    """An entry, its candidates (the present one first, where there is one), and the best."""

    entry: Entry
    candidates: list[Candidate]
    best: Candidate | None

    @property
    def present(self) -> Candidate | None:
        return next((c for c in self.candidates if c.present), None)


def tune(
    task: Task,
    machine: Machine,
    candidates: Callable[[Entry, int, int, int], list[Any]] = list_candidates,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Search every entry, each in its share of the time that is left.

    Args:
        task: what is tuned.
        machine: compiles, runs and times.
        candidates: as `list_candidates`.
        say: gets a line for each entry, and for each candidate that computes something else.
    """
    deadline = machine.now() + task.budget
    todo = entries(task)
    outcomes = []
    for done, entry in enumerate(todo):
        until = machine.now() + (deadline - machine.now()) / (len(todo) - done)
        found = candidates(entry, machine.arch, machine.shared, task.dtype.itemsize)
        outcome = _search(entry, task, machine, found, until)
        outcomes.append(outcome)
        timed = sum(bool(c.seconds) for c in outcome.candidates)
        counts = f"{timed} of {len(outcome.candidates)} timed"
        say(f"head_dim {entry.dim} {describe(outcome)} ({counts})")
        for candidate in outcome.candidates:
            if candidate.dropped.startswith("wrong"):
                say(f"  {tuple(candidate.config)}: {candidate.dropped}")
    return outcomes


def describe(outcome: Outcome) -> str:
    """One line: the TFLOP/s of the best and of the present one, for each mask of the entry."""
    entry, best, present = outcome.entry, outcome.best, outcome.present
    name = entry.launch
    if len(entry.causal) == 1:
        name += " causal" if entry.causal[0] else " not causal"
    if best is None:
        return f"{name}: nothing timed"
    line = f"{name}: {_rates(best)} TFLOP/s with {tuple(best.config)}"
    if best is present:
        return f"{line}, as before"
    return (
        line
        if present is None
        else f"{line}; before {_rates(present)} with {tuple(present.config)}"
    )


def _rates(candidate: Candidate) -> str:
    rates = (f"{rate:.0f}" if rate >= 10 else f"{rate:.3g}" for rate in candidate.tflops)
    return "/".join(rates) or candidate.dropped or "not timed"


def _search(
    entry: Entry, task: Task, machine: Machine, configs: Sequence[Any], until: float
) -> Outcome:
    if machine.now() >= until:
        return Outcome(entry, [], None)
    calls = [make_call(entry.dim, entry.launch, causal, task, machine) for causal in entry.causal]
    present = calls[0].present(entry.launch)
    found = [] if present is None else [Candidate(present, present=True)]
    found += [Candidate(config) for config in _nearest_first(configs, present)]
    _build(found, entry, calls, machine, until)
    _check(found, entry, calls, machine, until)
    return Outcome(entry, found, _time(found, entry, calls, machine, until))


def _nearest_first(configs: Sequence[Any], present: Any) -> list[Any]:
    """Those that differ least from the present one first, in case time runs out; without it."""
    if present is None:
        return list(configs)

    def distance(config: Any) -> float:
        pairs = zip(config, present, strict=True)
        return sum(abs(math.log2(x) - math.log2(y)) for x, y in pairs)

    return sorted((c for c in configs if c != present), key=distance)


def _build(
    found: list[Candidate], entry: Entry, calls: list[Call], machine: Machine, until: float
) -> None:
    """Compile in batches for most of the time, and drop what does not fit or spills."""
    begin = machine.now()
    end = begin + _BUILDING * (until - begin)
    size = max(1, machine.workers // len(calls))
    for start in range(0, len(found), size):
        batch = found[start : start + size]
        if machine.now() >= end:
            for candidate in batch:
                candidate.dropped = "out of time"
            continue
        launches = [call.launch(entry.launch, c.config) for c in batch for call in calls]
        built = machine.compile(launches)
        for i, candidate in enumerate(batch):
            candidate.built = built[i * len(calls) : (i + 1) * len(calls)]
            candidate.dropped = next(
                filter(None, (_unfit(b, machine) for b in candidate.built)), ""
            )


def _unfit(built: Built, machine: Machine) -> str:
    if built.error:
        return f"does not compile: {built.error}"
    if built.shared > machine.shared:
        return f"needs {built.shared} bytes of shared memory, there are {machine.shared}"
    return f"spills {built.spills} registers" if built.spills else ""


def _check(
    found: list[Candidate], entry: Entry, calls: list[Call], machine: Machine, until: float
) -> None:
    """Drop what does not compute what the present table does."""
    for call in calls:
        expected = call.expected(machine)[entry.launch]
        for candidate in found:
            if candidate.dropped:
                continue
            if machine.now() >= until:
                candidate.dropped = "out of time"
                continue
            outputs = call.outputs[entry.launch]
            for output in outputs:
                output.fill_(float("nan"))
            machine.run(call.launch(entry.launch, candidate.config))
            off = max(map(difference, outputs, expected))
            if not off <= 1:
                candidate.dropped = f"wrong result: {off:.3g} times what rounding may change"


def _time(
    found: list[Candidate], entry: Entry, calls: list[Call], machine: Machine, until: float
) -> Candidate | None:
    """Time all in turns, then the fastest of them again; returns the best."""
    running = [c for c in found if not c.dropped]
    for candidate in running:
        candidate.samples = [[] for _ in calls]
        candidate.flops = [PRODUCTS[entry.launch] * call.flops for call in calls]
    for i_round in range(_ROUNDS):
        if i_round == _TRIAL_ROUNDS:
            fastest = sorted(running, key=lambda c: c.score)[:_FINALISTS]
            running = [c for c in running if c.present or c in fastest]
        for candidate in running:
            for call, samples in zip(calls, candidate.samples, strict=True):
                if machine.now() >= until:
                    return _best(running)
                launch = call.launch(entry.launch, candidate.config)
                samples.append(machine.seconds(launch))
    return _best(running)


def _best(running: list[Candidate]) -> Candidate | None:
    timed = [c for c in running if c.seconds]
    best = min(timed, key=lambda c: c.score, default=None)
    present = next((c for c in timed if c.present), None)
    if best is None or present is None or best.score < _WORTH * present.score:
        return best
    return present
