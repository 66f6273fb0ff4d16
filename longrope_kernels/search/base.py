"""`Search`: ask and tell, the journal and the resume; what to propose is its subclasses'.

An iteration has up to two stages: with a `Sieve` all of its candidates are judged by a coarse
fitness, and then the best of them by the full one. Before the first iteration formulas are judged,
to compare with, and after the last one what of the winner is its attention factor's.
"""

from __future__ import annotations

import math
import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

from .candidate import Candidate, Evaluation, Formula
from .coarse import Both, Sieve, correlation, standing
from .space import SearchSpace
from .state import JOURNAL, STATE, SearchFolder

Stage = Literal["formulas", "coarse", "full"]

# What stands before coarse windows is read anew under the best once its fitness is so much lower.
_CLOSER = 0.98


@dataclass(frozen=True)
class Iteration:
    """One finished iteration.

    Attributes:
        best: the lowest fitness so far; infinite where there is none yet.
        median: of this iteration's complete and finite ones; NaN where there is none.
        evaluations: how many it took, by the full fitness.
        seconds: their sum over `Evaluation.seconds`.
    """

    best: float
    median: float
    evaluations: int
    seconds: float = field(compare=False)


class Search(ABC):
    """Proposes candidates by iterations and learns their fitness; no candidate is asked twice.

    With a folder it can be killed at any moment: the same call goes on there, and ends with the
    result of a run that was not killed.

    Args:
        space: what may be proposed.
        config: JSON values: the optimiser and its settings.
        iterations: how many to ask for at most.
        folder: of the journal and the state; None keeps them in memory alone.
        context: JSON values that decide the fitness (model, documents, lengths): a folder made
            under others is refused.
        formulas: names of ropes to compare with, asked first, each as a `Formula`.
        sieve: which candidates get the full fitness, after a coarse one; None for all, at once.

    Raises:
        ValueError, RuntimeError, OSError: as `SearchFolder` does.
    """

    def __init__(
        self,
        space: SearchSpace,
        config: Mapping[str, Any],
        iterations: int,
        folder: str | os.PathLike[str] | None,
        context: Mapping[str, Any] | None,
        formulas: Sequence[str] = (),
        sieve: Sieve | None = None,
    ) -> None:
        self.space, self.sieve = space, sieve
        self._limit = iterations
        self._formulas = [Formula(name=name) for name in formulas]
        self._compared: dict[Candidate, Evaluation] = {}
        self._asked: list[list[Candidate]] = []
        # Of this iteration: whether its candidates are sifted, and those for the full fitness.
        self._sifted, self._chosen = False, list[Candidate]()
        self._coarse: dict[Candidate, Evaluation] = {}
        self._results: dict[Candidate, Evaluation] = {}
        self._best: Evaluation | None = None
        self._best_before: Evaluation | None = None
        self._reference: Evaluation | None = None
        self._history: list[Iteration] = []
        self._exhausted = self._closing = self._saved = False
        self._proposal: list[Candidate] | None = None
        self._folder: SearchFolder | None = None
        self.threshold = math.inf
        if folder is not None:
            whole = {"space": space.describe(), **config, "context": dict(context or {})}
            whole |= {"formulas": list(formulas), "sieve": sieve and asdict(sieve)}
            self._folder = SearchFolder(folder, whole)
            self._resume(self._folder)

    @property
    @abstractmethod
    def total(self) -> int:
        """The candidates of all iterations; fewer where a small space has no new ones.

        One more may come at the end: the winner's formula with the winner's attention factor.
        """

    @abstractmethod
    def _propose(self) -> list[Candidate]:
        """Candidates of the next iteration, none of them asked before; none if there are none."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What `_propose` goes on from, as JSON values."""

    @abstractmethod
    def _recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from what `_memory` gave; evaluations of all iterations before are there."""

    def _new_threshold(self, candidates: int) -> float:
        """What `threshold` is for the next iteration, of so many candidates."""
        return math.inf

    @property
    def done(self) -> bool:
        """Whether there is nothing more to ask."""
        return not self._open() and self._ended and (self._closing or not self._last_word())

    @property
    def best(self) -> Evaluation | None:
        """The lowest complete and finite fitness; the first asked of several; None before any."""
        return self._best

    @property
    def reference(self) -> Candidate:
        """One that candidates are near to: the best formula, or the best before this iteration.

        The best takes the place of a reference that it is better than by 2%. It is the same for a
        whole iteration, also where a search goes on.
        """
        near = self._near
        return self.space.starts()[0] if near is None else near.candidate

    @property
    def iteration(self) -> int:
        """The iterations asked for so far."""
        return len(self._asked)

    @property
    def stage(self) -> Stage:
        """What judges the candidates that `ask` gives: as formulas by the full fitness too."""
        if any(one not in self._compared for one in self._formulas):
            return "formulas"
        if self._sifted and any(one not in self._coarse for one in self._asked[-1]):
            return "coarse"
        return "full"

    @property
    def evaluations(self) -> list[Evaluation]:
        """All by the full fitness, in the order asked, without those of formulas."""
        return [self._results[c] for asked in self._asked for c in asked if c in self._results]

    @property
    def evaluated(self) -> int:
        """How many of these there are."""
        return len(self._results)

    @property
    def judged(self) -> int:
        """How many candidates and formulas have a fitness, be it the coarse one."""
        return len(self._compared) + len(self._coarse.keys() | self._results.keys())

    @property
    def compared(self) -> dict[str, Evaluation]:
        """The evaluations of the formulas so far, by name."""
        found = {one.name: self._compared.get(one) for one in self._formulas}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def formulas(self) -> int:
        """How many there are to compare with."""
        return len(self._formulas)

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of the two fitnesses, by the candidates that have both."""
        both, weights = list[Both](), list[float]()
        for asked in self._asked:
            coarse = [self._coarse[c] for c in asked if c in self._coarse]
            ranked = sorted(coarse, key=lambda one: one.rank)
            full = [self._results.get(one.candidate) for one in ranked]
            both += [(a, b) for a, b in zip(ranked, full, strict=True) if b is not None]
            weights += standing([one is not None for one in full])
        return correlation(both, weights)

    @property
    def sifts(self) -> bool:
        """Whether the next iteration is judged by the coarse fitness first."""
        return self.sieve is not None and not self.sieve.misleads(self.correlation)

    @property
    def history(self) -> list[Iteration]:
        """The finished iterations."""
        return list(self._history)

    def ask(self) -> list[Candidate]:
        """The candidates of this stage that have no fitness yet; none when `done`.

        When all have one, the next stage or iteration begins.

        Raises:
            OSError: its state cannot be saved; the same call can be made again.
        """
        if self._open() and not self._saved:
            self._save([])
        if not self._open() and not self.done:
            if self._proposal is None:
                self._proposal = self._next()
            if self._proposal:
                self._save(self._proposal)
                self._begin(self._proposal, self._ended)
            self._proposal = None
        return self._open()

    def tell(self, evaluations: Evaluation | Iterable[Evaluation]) -> None:
        """Learn the fitness of candidates that `ask` gave, of one or of several.

        Raises:
            ValueError: a candidate is not one of them, or has its fitness.
            OSError: the journal cannot be written; then nothing is learnt, and the same call can
                be made again.
        """
        batch = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
        waiting = set(self._open())
        for evaluation in batch:
            if evaluation.candidate not in waiting:
                raise ValueError(
                    f"evaluations: expected candidates that ask() gave and that have no fitness "
                    f"yet, got {evaluation.candidate}"
                )
            waiting.remove(evaluation.candidate)
        if self._folder is not None and batch:
            stage = self.stage
            asked = self._formulas if stage == "formulas" else self._asked[-1]
            place = {candidate: i for i, candidate in enumerate(asked)}
            where = {"iteration": max(len(self._asked) - 1, 0), "stage": stage}
            # As it was asked: an evaluator may hand back an equal one of another origin.
            batch = [replace(one, candidate=asked[place[one.candidate]]) for one in batch]
            self._folder.append(
                [{**where, "place": place[one.candidate], **one.to_json()} for one in batch]
            )
        self._learn(batch)

    def close(self) -> None:
        """Let go of the folder; also at the end of a ``with`` block, or of the object's life."""
        if self._folder is not None:
            self._folder.close()

    def __enter__(self) -> Search:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _near(self) -> Evaluation | None:
        return self._reference or _lowest(self._compared.values())

    @property
    def _ended(self) -> bool:
        spent = self.sieve is not None and self.sieve.spent(len(self._results))
        return self._exhausted or self._closing or spent or len(self._asked) >= self._limit

    def _open(self) -> list[Candidate]:
        wanted, known = self._current()
        return [candidate for candidate in wanted if candidate not in known]

    def _current(self) -> tuple[Sequence[Candidate], dict[Candidate, Evaluation]]:
        """The candidates of the present stage, and where its evaluations are kept."""
        if self.stage == "formulas":
            return self._formulas, self._compared
        if self.stage == "coarse":
            return self._asked[-1], self._coarse
        return self._chosen, self._results

    def _next(self) -> list[Candidate]:
        if not self._ended:
            proposal = self._propose()
            if proposal:
                return proposal
            self._exhausted = True
        return self._last_word()

    def _last_word(self) -> list[Candidate]:
        """The formula that the winner descends from with its attention factor, if that is new."""
        winner = None if self._best is None else self._best.candidate
        start = None if winner is None else self.space.start_of(winner)
        if winner is None or start is None:
            return []
        alike = replace(start, attention=winner.attention)
        return [] if alike in self._results else [alike]

    def _save(self, proposal: list[Candidate]) -> None:
        if self._folder is not None:
            self._folder.save(
                {
                    "finished": [len(asked) for asked in self._asked],
                    "asked": [candidate.to_json() for candidate in proposal],
                    "closing": bool(proposal) and self._ended,
                    "memory": self._memory(),
                }
            )
        self._saved = True

    def _begin(self, candidates: list[Candidate], closing: bool) -> None:
        self.threshold = math.inf if closing else self._new_threshold(len(candidates))
        self._closing, self._sifted = closing, self.sifts and not closing
        self._asked.append(candidates)
        self._chosen = [] if self._sifted else candidates

    def _learn(self, batch: Iterable[Evaluation]) -> None:
        _, known = self._current()
        known.update((one.candidate, one) for one in batch)
        if self.stage != "full" or not self._asked:
            return
        if self._sifted:
            self._choose()
        told = [self._results[c] for c in self._asked[-1] if c in self._results]
        self._best = _lowest([self._best_before, *told])
        if len(self._history) < len(self._asked) and not self._open():
            self._finish_iteration(told)

    def _choose(self) -> None:
        """Those for the full fitness; more, when these have it, if the two then rank otherwise."""
        assert self.sieve is not None
        asked = self._asked[-1]
        own = [c for c in asked if self.space.start_of(c) == c]
        order = own + [one.candidate for one in self.sieve.order([self._coarse[c] for c in asked])]
        order = list(dict.fromkeys(order))
        while all(candidate in self._results for candidate in self._chosen):
            count = self.sieve.wanted(len(asked), self.correlation)
            if self._chosen:  # in steps, since a correlation of a few is a guess
                count = min(count, 2 * len(self._chosen))
            more = order[len(self._chosen) : max(count, len(own))]
            if not more:
                return
            self._chosen = [*self._chosen, *more]

    def _finish_iteration(self, told: list[Evaluation]) -> None:
        before = self._history[-1].best if self._history else math.inf
        usable = [one.fitness for one in told if one.rank[0] == 0]
        best = min([before, *usable])
        median = statistics.median(usable) if usable else math.nan
        coarse = (self._coarse[c] for c in self._asked[-1] if c in self._coarse)
        seconds = sum(one.seconds for one in (*told, *coarse))
        self._history.append(Iteration(best, median, len(told), seconds))
        self._best_before, near = self._best, self._near
        if self._best and (near is None or self._best.fitness < _CLOSER * near.fitness):
            self._reference = self._best

    def _rank(self, candidate: Candidate) -> tuple[int, float]:
        """By the full fitness; behind all of these, those that have the coarse one alone."""
        if candidate in self._results:
            return self._results[candidate].rank
        kind, fitness = self._coarse[candidate].rank
        return 3 + kind, fitness

    def _resume(self, folder: SearchFolder) -> None:
        """Put back what a folder has."""
        if folder.state is None:
            return
        self._saved = True
        journal = folder.path / JOURNAL
        told = dict(
            _read_row(f"{journal}, line {number}", row) for number, row in enumerate(folder.rows, 1)
        )

        def take(iteration: int, stage: Stage, count: int) -> list[Evaluation | None]:
            return [told.pop((iteration, stage, place), None) for place in range(count)]

        self._learn([one for one in take(0, "formulas", len(self._formulas)) if one is not None])
        finished = folder.state["finished"]
        current = [Candidate.from_json(content) for content in folder.state["asked"]]
        counts = [*finished, len(current)] if current else finished
        for iteration, count in enumerate(counts):
            coarse, full = take(iteration, "coarse", count), take(iteration, "full", count)
            here = [a or b for a, b in zip(coarse, full, strict=True)]
            last = bool(current) and iteration == len(finished)
            asked = current if last else [one.candidate for one in here if one is not None]
            places = zip(coarse + full, asked * 2, strict=len(asked) == count)
            fits = len(asked) == count and all(a is None or a.candidate == b for a, b in places)
            if fits:
                self._begin(asked, last and folder.state["closing"])
                if self._sifted:
                    self._learn([one for one in coarse if one is not None])
                known = {one.candidate: one for one in full if one is not None}
                while more := [known.pop(c) for c in self._open() if c in known]:
                    self._learn(more)
                fits = not known and (last or not self._open())
            if not fits:
                raise ValueError(
                    f"{folder.path}: {JOURNAL} and {STATE} do not belong together: iteration "
                    f"{iteration} has {len([1 for one in here if one])} of {count} evaluations, "
                    "or others"
                )
        if told:
            raise ValueError(
                f"{folder.path}: {JOURNAL} has {len(told)} evaluations that {STATE} never asked for"
            )
        self._recall(folder.state["memory"])


def _read_row(where: str, row: Any) -> tuple[tuple[int, str, int], Evaluation]:
    """A line of the journal: iteration, stage and place in it, and the evaluation."""
    try:
        return (row["iteration"], row["stage"], row["place"]), Evaluation.from_json(row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected an evaluation, got {error}") from None


def _lowest(evaluations: Iterable[Evaluation | None]) -> Evaluation | None:
    """The first of the lowest complete and finite ones."""
    usable = [one for one in evaluations if one is not None and one.rank[0] == 0]
    return min(usable, key=lambda one: one.fitness, default=None)
