"""Spaces and evaluators for the tests of the search itself. They know nothing of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longrope_kernels import Rope
from longrope_kernels.search import Candidate, Evaluation, EvolutionSettings, SearchSpace

SMALL = EvolutionSettings(population=12, iterations=5, mutants=4, crossovers=4, parents=6, seed=3)


def small_space(**arguments: Any) -> SearchSpace:
    """8 pairs, extended 4x."""
    whole = {"dim": 16, "base": 1e4, "original_length": 256, "target_length": 1024} | arguments
    return SearchSpace(**whole)


def all_spaces() -> list[SearchSpace]:
    """One of each kind."""
    stage = Rope.longrope([1.0] * 8, [1.0 + i / 4 for i in range(8)], 256, 1024)
    return [
        small_space(),
        small_space(monotone=False),
        small_space(attention="searched"),
        small_space(target_length=2048, ratio=2.0, stage=stage),
        small_space(critical=3),
        small_space(n_hats=(4, 64)),
        small_space(target_length=256, upper=1.5, attention=1.1),
        small_space(dim=4, original_length=4096, target_length=2**21),
    ]


def distance(candidate: Candidate) -> float:
    """How far a candidate is from a curve, a threshold of 4 and an attention factor of 1.2."""
    last = len(candidate.factors) - 1
    wanted = [100 + 250 * (i / max(last, 1)) ** 2 for i in range(last + 1)]
    logs = (math.log(a / b) ** 2 for a, b in zip(candidate.factors, wanted, strict=True))
    attention = 0.0 if candidate.attention is None else abs(candidate.attention - 120) / 1000
    return sum(logs) + abs(candidate.n_hat - 4) / 1000 + attention


def measure(candidates: Sequence[Candidate]) -> list[Evaluation]:
    """`distance` as fitness."""
    return [Evaluation(candidate, distance(candidate)) for candidate in candidates]
