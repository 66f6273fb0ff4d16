"""What a search proposes, and what an evaluator answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One point of a `SearchSpace`, on its grid. Whole numbers, so equal candidates are equal.

    Attributes:
        factors: the searched ``lambda_i`` in hundredths; one for each pair from the space's
            ``critical`` on, for all pairs where it has none.
        n_hat: in tokens, as in `FactorSet`.
        attention: the attention factor in hundredths; None where the space fixes it.
        origin: the formula it descends from, by mutations and crossovers; not a part of the point.
    """

    factors: tuple[int, ...]
    n_hat: int = 0
    attention: int | None = None
    origin: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "factors": list(self.factors),
            "n_hat": self.n_hat,
            "attention": self.attention,
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Candidate:
        """The candidate that `to_json` wrote.

        Raises:
            ValueError: a field is missing or no whole number.
        """
        try:
            factors, n_hat = content["factors"], content["n_hat"]
            attention = content["attention"]
            values = [*factors, n_hat] + ([] if attention is None else [attention])
        except (KeyError, TypeError):
            raise ValueError(
                f"candidate: expected factors, n_hat and attention, got {content!r}"
            ) from None
        if not all(type(value) is int for value in values):
            raise ValueError(f"candidate: expected whole numbers, got {content!r}")
        return cls(tuple(factors), n_hat, attention, str(content.get("origin", "")))


@dataclass(frozen=True)
class Formula(Candidate):
    """A rope to compare with, by its name: judged as a candidate is, and no point of the grid."""

    factors: tuple[int, ...] = ()
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        """The name as JSON."""
        return {"formula": self.name}


@dataclass(frozen=True)
class Evaluation:
    """The fitness of a candidate, or of a formula beside them.

    Attributes:
        candidate: as it was asked.
        fitness: lower is better. NaN and infinite are allowed: recorded, and ranked last.
        complete: False where the evaluator gave up early; then ``fitness`` is what it saw until
            then, a lower bound of the whole, and ranks after every complete one.
        seconds: what the evaluation took.
        details: more to keep in the journal, as JSON values.
    """

    candidate: Candidate
    fitness: float
    complete: bool = True
    seconds: float = field(default=0.0, compare=False)
    details: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.candidate, Candidate):
            raise TypeError(f"candidate: expected a Candidate, got {self.candidate!r}")
        if isinstance(self.fitness, str | bool):
            raise TypeError(f"fitness: expected a number, got {self.fitness!r}")
        object.__setattr__(self, "fitness", float(self.fitness))

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts the best first: complete, then stopped early, then NaN and infinite ones."""
        if not math.isfinite(self.fitness):
            return (2, 0.0)
        return (0 if self.complete else 1, self.fitness)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; a fitness that is not finite as a word."""
        finite = math.isfinite(self.fitness)
        return {
            **self.candidate.to_json(),
            "fitness": self.fitness if finite else str(self.fitness),
            "complete": self.complete,
            "seconds": self.seconds,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_json` wrote, number for number.

        Raises:
            ValueError: a field is missing or of another type.
        """
        if isinstance(content, Mapping) and "formula" in content:
            candidate: Candidate = Formula(name=str(content["formula"]))
        else:
            candidate = Candidate.from_json(content)
        try:
            fitness, seconds = float(content["fitness"]), float(content["seconds"])
            return cls(candidate, fitness, content["complete"], seconds, content["details"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"evaluation: {error} is missing or odd in {content!r}") from None
