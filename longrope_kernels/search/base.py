"""`Search`: ask and tell, the journal and the resume; what to propose is its subclasses'."""

from __future__ import annotations

import math
import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .candidate import Candidate, Evaluation
from .space import SearchSpace
from .state import JOURNAL, STATE, SearchFolder


@dataclass(frozen=True)
class Iteration:
    """One finished iteration.

    Attributes:
        best: the lowest fitness so far; infinite where there is none yet.
        median: of this iteration's complete and finite ones; NaN where there is none.
        evaluations: how many it took.
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
    ) -> None:
        self.space = space
        self._limit = iterations
        self._asked: list[list[Candidate]] = []
        self._results: dict[Candidate, Evaluation] = {}
        self._best: Evaluation | None = None
        self._best_before: Evaluation | None = None
        self._history: list[Iteration] = []
        self._exhausted = False
        self._proposal: list[Candidate] | None = None
        self._folder: SearchFolder | None = None
        self.threshold = math.inf
        if folder is not None:
            whole = {"space": space.describe(), **config, "context": dict(context or {})}
            self._folder = SearchFolder(folder, whole)
            self._resume(self._folder)

    @property
    @abstractmethod
    def total(self) -> int:
        """The evaluations of the whole search; fewer where a small space has no new ones."""

    @abstractmethod
    def _propose(self) -> list[Candidate]:
        """Candidates of the next iteration, none of them asked before; none if there are none."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What `_propose` goes on from, as JSON values."""

    @abstractmethod
    def _recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from what `_memory` gave; evaluations of all iterations before are there."""

    def _new_threshold(self) -> float:
        """What `threshold` is for the next iteration."""
        return math.inf

    @property
    def done(self) -> bool:
        """Whether there is nothing more to ask."""
        ended = self._exhausted or len(self._asked) >= self._limit
        return ended and not self._open()

    @property
    def best(self) -> Evaluation | None:
        """The lowest complete and finite fitness; the first asked of several; None before any."""
        return self._best

    @property
    def iteration(self) -> int:
        """The iterations asked for so far."""
        return len(self._asked)

    @property
    def evaluations(self) -> list[Evaluation]:
        """All of them, in the order asked."""
        found = (self._results.get(c) for asked in self._asked for c in asked)
        return [evaluation for evaluation in found if evaluation is not None]

    @property
    def evaluated(self) -> int:
        """How many evaluations there are."""
        return len(self._results)

    @property
    def history(self) -> list[Iteration]:
        """The finished iterations."""
        return list(self._history)

    def ask(self) -> list[Candidate]:
        """The candidates of this iteration that have no fitness yet; none when `done`.

        When all have one, the next iteration begins.

        Raises:
            OSError: its state cannot be saved; the same call can be made again.
        """
        if not self._open() and not self.done:
            if self._proposal is None:
                self._proposal = self._propose()
            proposal = self._proposal
            if proposal:
                if self._folder is not None:
                    self._folder.save(
                        {
                            "finished": [len(asked) for asked in self._asked],
                            "asked": [candidate.to_json() for candidate in proposal],
                            "memory": self._memory(),
                        }
                    )
                self._begin(proposal)
            else:
                self._exhausted = True
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
            place = {candidate: i for i, candidate in enumerate(self._asked[-1])}
            iteration = len(self._asked) - 1
            self._folder.append(
                [
                    {"iteration": iteration, "place": place[one.candidate], **one.to_json()}
                    for one in batch
                ]
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

    def _open(self) -> list[Candidate]:
        if not self._asked:
            return []
        return [candidate for candidate in self._asked[-1] if candidate not in self._results]

    def _begin(self, candidates: list[Candidate]) -> None:
        self.threshold = self._new_threshold()
        self._asked.append(candidates)

    def _learn(self, batch: Iterable[Evaluation]) -> None:
        for evaluation in batch:
            self._results[evaluation.candidate] = evaluation
        if not self._asked:
            return
        told = [self._results[c] for c in self._asked[-1] if c in self._results]
        self._best = _lowest([self._best_before, *told])
        if len(told) == len(self._asked[-1]):
            self._finish_iteration(told)

    def _finish_iteration(self, told: list[Evaluation]) -> None:
        before = self._history[-1].best if self._history else math.inf
        usable = [one.fitness for one in told if one.rank[0] == 0]
        best = min([before, *usable])
        median = statistics.median(usable) if usable else math.nan
        seconds = sum(one.seconds for one in told)
        self._history.append(Iteration(best, median, len(told), seconds))
        self._best_before = self._best

    def _resume(self, folder: SearchFolder) -> None:
        """Put back what a folder has."""
        if folder.state is None:
            return
        journal = folder.path / JOURNAL
        told = dict(
            _read_row(f"{journal}, line {number}", row) for number, row in enumerate(folder.rows, 1)
        )
        finished = folder.state["finished"]
        current = [Candidate.from_json(content) for content in folder.state["asked"]]
        for iteration, count in enumerate([*finished, len(current)]):
            here = [told.pop((iteration, place), None) for place in range(count)]
            known = [one for one in here if one is not None]
            last = iteration == len(finished)
            if last:
                places = zip(here, current, strict=True)
                fits = all(one is None or one.candidate == wanted for one, wanted in places)
            else:
                fits = len(known) == count
            if not fits:
                raise ValueError(
                    f"{folder.path}: {JOURNAL} and {STATE} do not belong together: iteration "
                    f"{iteration} has {len(known)} of {count} evaluations, or others"
                )
            self._begin(current if last else [one.candidate for one in known])
            self._learn(known)
        if told:
            raise ValueError(
                f"{folder.path}: {JOURNAL} has {len(told)} evaluations that {STATE} never asked for"
            )
        self._recall(folder.state["memory"])


def _read_row(where: str, row: Any) -> tuple[tuple[int, int], Evaluation]:
    """A line of the journal: iteration and place in it, and the evaluation."""
    try:
        return (row["iteration"], row["place"]), Evaluation.from_json(row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected an evaluation, got {error}") from None


def _lowest(evaluations: Iterable[Evaluation | None]) -> Evaluation | None:
    """The first of the lowest complete and finite ones."""
    usable = [one for one in evaluations if one is not None and one.rank[0] == 0]
    return min(usable, key=lambda one: one.fitness, default=None)
