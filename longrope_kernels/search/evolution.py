"""LongRoPE's evolutionary search (arXiv 2402.13753), by ask and tell."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any

import typer

from .base import Search
from .candidate import Candidate, Evaluation
from .coarse import Sieve
from .space import SearchSpace, check_whole

# How often a candidate that was seen before is drawn again. A space with no new ones ends there.
_ATTEMPTS = 100


@dataclass(frozen=True)
class EvolutionSettings:
    """The paper's numbers by default.

    Attributes:
        population: of the first iteration: PI, NTK, YaRN and mutants of them.
        iterations: populations that are evaluated, the first one included.
        mutants: of the parents, in every later iteration.
        crossovers: of the parents, likewise.
        probability: p, by which a gene is drawn again.
        parents: the best so far, of which mutants and crossovers are made; where a `Sieve` has a
            part of the candidates judged in full, that part of the number.
        moves: "mixed" or "paper", as in `SearchSpace.mutate`.
        seed: of all random choices.

    Raises:
        ValueError, TypeError: naming the attribute that is out of range.
    """

    population: Annotated[int, typer.Option(min=1, help="Candidates of the first iteration.")] = 64
    iterations: Annotated[int, typer.Option(min=1, help="How many, with the first.")] = 40
    mutants: Annotated[int, typer.Option(min=0, help="Made in each later iteration.")] = 16
    crossovers: Annotated[int, typer.Option(min=0, help="Made in each later iteration.")] = 16
    probability: Annotated[float, typer.Option(help="Of a mutation to draw a gene again.")] = 0.3
    parents: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many of the best so far have children, where all are judged in full.",
        ),
    ] = 32
    moves: str = "mixed"
    seed: Annotated[int, typer.Option(min=0, help="Of all random choices.")] = 0

    def __post_init__(self) -> None:
        least = {"population": 1, "iterations": 1, "parents": 1, "mutants": 0, "crossovers": 0}
        for name, smallest in {**least, "seed": 0}.items():
            check_whole(name, getattr(self, name), smallest)
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability: expected above 0 and up to 1, got {self.probability}")
        if self.moves not in ("mixed", "paper"):
            raise ValueError(f'moves: expected "mixed" or "paper", got {self.moves!r}')
        if self.mutants + self.crossovers == 0 and self.iterations > 1:
            raise ValueError("mutants: expected at least 1 where there are no crossovers, got 0")

    @property
    def children(self) -> int:
        """Of each later iteration."""
        return self.mutants + self.crossovers

    @property
    def candidates(self) -> int:
        """Of all iterations."""
        return self.population + (self.iterations - 1) * self.children


class EvolutionarySearch(Search):
    """LongRoPE's search: the best so far are the parents of mutants and crossovers.

    Args:
        space: what may be proposed.
        settings: the paper's where not given.
        folder: of the journal and the state, as in `Search`.
        context: as in `Search`.
        formulas: as in `Search`.
        sieve: as in `Search`.
    """

    def __init__(
        self,
        space: SearchSpace,
        settings: EvolutionSettings | None = None,
        folder: str | os.PathLike[str] | None = None,
        context: Mapping[str, Any] | None = None,
        formulas: Sequence[str] = (),
        sieve: Sieve | None = None,
    ) -> None:
        self.settings = settings or EvolutionSettings()
        self._rng = Random(self.settings.seed)
        config = {"optimizer": "evolution", "settings": asdict(self.settings)}
        super().__init__(space, config, self.settings.iterations, folder, context, formulas, sieve)

    @property
    def total(self) -> int:
        return self.settings.candidates

    @property
    def parents(self) -> list[Evaluation]:
        """The best of the finished iterations, best first; ties by the order asked.

        A NaN or infinite one only where there is no other.
        """
        return self._ranked()[: self._wanted()]

    def _ranked(self) -> list[Evaluation]:
        told = [self._results[c] for c in self._finished() if c in self._results]
        ranked = sorted(told, key=lambda evaluation: evaluation.rank)
        return [one for one in ranked if one.rank[0] < 2] or ranked

    def _wanted(self, more: int = 0) -> int:
        """How many parents: as many as settings say, where all candidates have the full fitness.

        Where a part of them has, that part of the number, and two at least: a search whose parents
        are all that it judged in full selects nothing. ``more`` of an iteration that is not
        finished count as if they had it.
        """
        finished, whole = self._finished(), self.settings.parents
        told = sum(candidate in self._results for candidate in finished) + more
        return max(math.ceil(whole * told / max(len(finished) + more, 1)), min(whole, 2))

    def _finished(self) -> list[Candidate]:
        return [candidate for asked in self._asked[: len(self._history)] for candidate in asked]

    def _propose(self) -> list[Candidate]:
        one, rng, space = self.settings, self._rng, self.space
        if not self._asked:
            first = space.starts()[: one.population]
            starts = list(first)
            return first + self._new(
                one.population - len(first), lambda: self._mutant(rng.choice(starts)), first
            )
        parents = [evaluation.candidate for evaluation in self.parents]
        mutants = self._new(one.mutants, lambda: self._mutant(rng.choice(parents)), [])
        children = self._new(one.crossovers, lambda: self._child(parents), mutants)
        return mutants + children

    def _new(
        self, count: int, draw: Callable[[], Candidate], taken: list[Candidate]
    ) -> list[Candidate]:
        """Up to ``count`` draws, none taken or asked before; fewer where they run out."""
        found: list[Candidate] = []
        known = set(taken)
        for _ in range(count):
            for attempt in range(_ATTEMPTS):
                candidate = draw()
                # Parents that have become alike have no new child: then mutants of one.
                if attempt >= _ATTEMPTS // 4:
                    candidate = self._mutant(candidate)
                if not any(candidate in of for of in (known, self._results, self._coarse)):
                    known.add(candidate)
                    found.append(candidate)
                    break
            else:
                break
        return found

    def _mutant(self, candidate: Candidate) -> Candidate:
        one = self.settings
        return self.space.mutate(candidate, self._rng, one.probability, one.moves)

    def _child(self, parents: list[Candidate]) -> Candidate:
        a, b = self._rng.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
        return self.space.crossover(a, b, self._rng, self.settings.moves)

    def _memory(self) -> dict[str, Any]:
        version, internal, gauss = self._rng.getstate()
        return {"rng": [version, list(internal), gauss]}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        version, internal, gauss = memory["rng"]
        self._rng.setstate((version, tuple(internal), gauss))

    def _new_threshold(self, candidates: int) -> float:
        """The fitness of the last parent that there may be: what is above it cannot become one."""
        ranked, most = self._ranked(), self._wanted(candidates)
        full = len(ranked) >= most and ranked[most - 1].rank[0] == 0
        return ranked[most - 1].fitness if full else math.inf
