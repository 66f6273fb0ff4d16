"""One search from beginning to end, in a folder: what `search`, `readjust` and `extend` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..rope.value import Rope
from .base import Search
from .behind import BehindPrefix
from .budget import BUDGET, Costs, planned, seconds_of
from .candidate import Evaluation
from .coarse import Sieve
from .descent import YARN, best_attention, descent
from .distributed import run_distributed
from .documents import Document, Encode
from .evaluator import Evaluator
from .evolution import EvolutionarySearch
from .fitness import Documents
from .model import Losses
from .needles import DEPTHS
from .ranks import from_main, is_main, is_shared, rank_count
from .run import run_search
from .settings import Options
from .source import digest, save_rope, write_json
from .space import SearchSpace

RESULT = "result.json"
Progress = Callable[[Search], None]


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        rope: of the best candidate, one set.
        best: its evaluation.
        others: the fitness of the formulas beside it.
        descent: the formula it comes from (`descent.descent`).
    """

    rope: Rope
    best: Evaluation
    others: dict[str, float]
    descent: dict[str, Any] | None = None


def find(
    losses: Losses,
    documents: Sequence[Document],
    space: SearchSpace,
    options: Options,
    folder: Path,
    *,
    others: dict[str, Rope] | None = None,
    encode: Encode | None = None,
    context: dict[str, Any] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    sharing: int = 1,
) -> Found:
    """Search, in a folder where the same call goes on if it is stopped.

    Args:
        losses: the model.
        documents: each of at least the space's ``target_length`` tokens.
        space: what may be proposed.
        options: how to search, and the fitness.
        folder: of the journal; ``longrope.json`` and ``result.json`` have the best after every
            iteration.
        others: ropes to measure beside the best, by name.
        encode: see `Options.measure`.
        context: what else decides the fitness, as JSON values: the model.
        progress: as in `run_search`.
        say: told on rank 0 what was chosen for ``options.hours``.
        sharing: as in `run_distributed`.

    Raises:
        ValueError: an argument is out of range, the folder is another run's, or no candidate has a
            finite fitness.
    """
    length, ropes = space.target_length, others or {}
    fitness = options.measure(losses, documents, length, encode)
    first = options.measure_first(losses, documents, length, encode)
    sieve = None if first is None else options.coarse.sieve
    if options.hours is not None:
        wanted = options.hours, folder, space, fitness, first, len(ropes), sharing
        options, sieve, text = _within(options, *wanted)
        if say is not None and is_main():
            say(text)
    windows, attention = None, None
    if isinstance(first, BehindPrefix):
        windows = {"behind": "a prefix", "tokens": first.windows[0][0].last}
    elif first is not None:
        # Few keys want a small attention factor, whatever the length wants: one alone for all.
        attention = None if space.attention_bounds is None else space.attention_bounds[0]
        windows = options.coarse.describe(length) | {"attention": attention}
    whole = {
        **(context or {}),
        "documents": digest(documents),
        "fitness": {name: getattr(options, name) for name in ("fitness", "last", "stride")}
        | ({"needles": len(DEPTHS)} if options.fitness == "needle" else {}),
        "margin": options.margin if options.race else None,  # else the result is the same
        "windows": windows,
    }
    opened: list[Search] = []

    def make() -> Search:
        search = make_search(space, options, folder, whole, tuple(ropes), sieve)
        opened.append(search)
        return search

    content = {
        "length": length,
        "space": space.describe(),
        "options": asdict(options),
        "documents": [document.name for document in documents],
        "windows": windows,
    }
    note = _Note(folder, content, progress)
    evaluate = Evaluator(space, fitness, options.margin, ropes)
    arguments: dict[str, Any] = {"batch": options.batch, "racing": options.race}
    if first is not None:
        arguments["coarse"] = Evaluator(space, first, None, ropes, attention).coarse
    try:
        if is_shared():
            best = run_distributed(make, evaluate, note, sharing=sharing, **arguments)
        else:
            best = run_search(make(), evaluate, note, **arguments)
    finally:
        for search in opened:
            search.close()
    if best is None:
        raise ValueError(f"{folder}: no candidate has a finite loss; the journal has each of them")
    told = from_main(lambda: (_others(opened[0]), descent(opened[0])))
    return Found(space.rope(best.candidate), best, *told)


def _within(
    options: Options,
    hours: float,
    folder: Path,
    space: SearchSpace,
    fitness: Documents,
    first: Documents | None,
    formulas: int,
    sharing: int,
) -> tuple[Options, Sieve | None, str]:
    """Options and a sieve that fit into some hours, the same on all ranks, and a line on them."""
    ropes = [space.rope(space.starts()[0])] * options.batch

    def measure() -> Costs:
        each = options.batch * (rank_count() // sharing)
        coarse = None
        if first is not None:
            first.under(ropes[0])
            first.measure(ropes)  # reads what stands before windows, which an iteration does once
            coarse = seconds_of(lambda: first.measure(ropes)) / each
        full = seconds_of(lambda: fitness.measure(ropes)) / each
        if coarse is not None and isinstance(first, BehindPrefix):
            coarse += full / max(options.mutants + options.crossovers, 1)
        return Costs(full, coarse, formulas)

    if sharing > 1 and not from_main((folder / BUDGET).exists):  # all of them are needed for it
        costs = measure()
        measure = lambda: costs  # noqa: E731
    told, wanted = asdict(options), options.coarse.sieve
    settings, sieve, text = from_main(
        lambda: planned(folder, told, options.evolution, wanted, hours, measure)
    )
    return replace(options, **asdict(settings)), sieve, text


class _Note:
    """Hands on the progress, and writes the best so far after every iteration."""

    def __init__(self, folder: Path, content: dict[str, Any], progress: Progress | None) -> None:
        self._folder, self._content, self._progress = folder, content, progress
        self._written = (-1, False)

    def __call__(self, search: Search) -> None:
        if self._progress is not None:
            self._progress(search)
        now = len(search.history), search.done
        if now != self._written and search.best is not None:
            self._written = now
            _write(self._folder, search, self._content)


def _others(search: Search) -> dict[str, float]:
    """The formulas' fitness, and that of YaRN with the best attention factor that was measured."""
    found = {name: one.fitness for name, one in search.compared.items()}
    yarn = best_attention(search)
    if YARN in found and yarn is not None:
        found[f"{YARN}, best attention factor"] = yarn[0]
    return found


def _write(folder: Path, search: Search, content: dict[str, Any]) -> None:
    """The best so far, and how it came."""
    best = search.best
    assert best is not None
    save_rope(search.space.rope(best.candidate), folder)
    write_json(
        folder / RESULT,
        {
            **content,
            "others": _others(search),
            "best": best.to_json(),
            "descent": descent(search),
            "judged": search.judged,
            "evaluations": search.evaluated,
            "correlation": search.correlation,
            "coarse": search.sifts,
            "seconds": sum(one.seconds for one in search.history),
            "history": [[one.best, one.median] for one in search.history],
        },
    )


def make_search(
    space: SearchSpace,
    options: Options,
    folder: Path,
    context: dict[str, Any],
    formulas: Sequence[str] = (),
    sieve: Sieve | None = None,
) -> Search:
    """The search of ``options.optimizer``."""
    if options.optimizer == "evolution":
        return EvolutionarySearch(space, options.evolution, folder, context, formulas, sieve)
    from .cmaes import CmaEsSearch

    return CmaEsSearch(space, options.evolution, folder, context, formulas, sieve)
