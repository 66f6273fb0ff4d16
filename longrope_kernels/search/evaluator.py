"""`Evaluator`: candidates of a search to their fitness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ..rope.value import Rope
from .candidate import Candidate, Evaluation, Formula
from .fitness import Measured, Race
from .space import SearchSpace


class Fitness(Protocol):
    """`Perplexity`, `NeedlePerplexity`, or another with their `measure`."""

    def measure(self, ropes: Sequence[Rope], *, race: Race | None = None) -> list[Measured]:
        """A result for each rope."""
        ...

    def under(self, reference: Rope) -> None:
        """As `Documents.under`."""
        ...


class Evaluator:
    """What `run_search` calls: the ropes of candidates, measured in one batch.

    Args:
        space: whose candidates come.
        fitness: of their ropes.
        margin: as in `Race`, of a search that races; None gives up on what has lost for certain
            alone, so that the search ends with the same result as one that does not race.
        formulas: the ropes that a `Formula` names.
        attention: in place of a candidate's own searched attention factor, in hundredths.
    """

    def __init__(
        self,
        space: SearchSpace,
        fitness: Fitness,
        margin: float | None = None,
        formulas: Mapping[str, Rope] | None = None,
        attention: int | None = None,
    ) -> None:
        self.space, self.fitness, self.margin = space, fitness, margin
        self.formulas, self.attention = dict(formulas or {}), attention
        self._best: Measured | None = None

    def __call__(
        self, candidates: Sequence[Candidate], threshold: float = math.inf
    ) -> list[Evaluation]:
        """An evaluation for each; its details have the loss of each document, in nats per token.

        Args:
            candidates: of the space.
            threshold: in a race, the perplexity above which a candidate is of no interest.
        """
        race = Race(threshold, self.margin, self._best) if math.isfinite(threshold) else None
        ropes = [self._rope(candidate) for candidate in candidates]
        found = []
        for candidate, measured in zip(
            candidates, self.fitness.measure(ropes, race=race), strict=True
        ):
            losses = [
                loss / count for loss, count in zip(measured.sums, measured.counts, strict=False)
            ]
            details = {"losses": [x if math.isfinite(x) else str(x) for x in losses]}
            fitness, complete = measured.perplexity, not measured.stopped
            found.append(Evaluation(candidate, fitness, complete, details=details))
            if complete and measured.loss < (math.inf if self._best is None else self._best.loss):
                self._best = measured
        return found

    def coarse(
        self, candidates: Sequence[Candidate], reference: Candidate | None = None
    ) -> list[Evaluation]:
        """The same by a fitness that orders candidates of an iteration alone.

        Args:
            candidates: of the space.
            reference: `Search.reference`, under which what stands before windows may be read.
        """
        if reference is not None:
            self.fitness.under(self._rope(reference))
        return self(candidates)

    def _rope(self, candidate: Candidate) -> Rope:
        if isinstance(candidate, Formula):
            return self.formulas[candidate.name]
        if self.attention is not None and candidate.attention is not None:
            candidate = replace(candidate, attention=self.attention)
        return self.space.rope(candidate)
