"""The baseline optimiser behind the same ask and tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from space_cases import SMALL, all_spaces, distance, measure, small_space

from longrope_kernels.search import (
    Candidate,
    Evaluation,
    EvolutionSettings,
    SearchSpace,
    run_search,
)
from longrope_kernels.search.cmaes import CmaEsSearch, CmaEsSettings

TEN = CmaEsSettings(population=8, iterations=10, seed=1)


@pytest.mark.parametrize("space", all_spaces(), ids=lambda s: f"{s.genes}-{s.bounds}")
def test_every_candidate_is_allowed_and_new(space: SearchSpace) -> None:
    search = CmaEsSearch(space, TEN)
    seen: list[Candidate] = []
    while candidates := search.ask():
        assert all(space.allows(candidate) for candidate in candidates)
        seen += candidates
        search.tell(measure(candidates))
    assert len(set(seen)) == len(seen) == search.evaluated <= search.total + 1
    assert search.done


def test_it_begins_with_the_starts() -> None:
    space = small_space()
    assert CmaEsSearch(space, TEN).ask() == space.starts()


def test_search_improves_on_its_starts() -> None:
    space = small_space(attention="searched")
    best = run_search(CmaEsSearch(space), measure)
    assert best is not None
    assert best.fitness < 0.2 * min(map(distance, space.starts()))


def test_default_has_as_many_evaluations_as_the_papers_search() -> None:
    """Not more, and short of it by less than one population."""
    for settings in (EvolutionSettings(), SMALL, EvolutionSettings(population=1, iterations=1)):
        search = CmaEsSearch(small_space(), settings)
        paper = settings.population + (settings.iterations - 1) * (
            settings.mutants + settings.crossovers
        )
        assert search.settings.seed == settings.seed
        assert paper - search.settings.population < search.total <= max(paper, 3)
    assert 1312 - 16 < CmaEsSearch(small_space()).total <= 1312


def test_seed_decides() -> None:
    runs = [CmaEsSearch(small_space(), CmaEsSettings(8, 5, seed)) for seed in (1, 1, 2)]
    for search in runs:
        run_search(search, measure)
    assert runs[0].evaluations == runs[1].evaluations != runs[2].evaluations


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1.0])
def test_odd_and_equal_fitness_do_no_harm(odd: float) -> None:
    def sick(candidates: Sequence[Candidate]) -> list[Evaluation]:
        return [Evaluation(c, odd if sum(c.factors) % 2 else distance(c)) for c in candidates]

    for evaluate in (sick, lambda cs: [Evaluation(c, odd) for c in cs]):
        search = CmaEsSearch(small_space(attention="searched"), TEN)
        run_search(search, evaluate)
        assert search.done
        assert search.evaluated > 70


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"population": 3}, "population"), ({"iterations": 0}, "iterations"), ({"seed": 0.5}, "seed")],
)
def test_settings_name_what_is_wrong(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        CmaEsSettings(**arguments)
