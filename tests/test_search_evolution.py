"""The evolutionary search: the paper's numbers, no candidate twice, racing, odd fitness."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from space_cases import SMALL, all_spaces, distance, measure, small_space

from longrope_kernels.search import (
    Candidate,
    Evaluation,
    EvolutionarySearch,
    EvolutionSettings,
    SearchSpace,
    run_search,
)
from longrope_kernels.search.coarse import Sieve


def test_defaults_are_the_papers() -> None:
    one = EvolutionSettings()
    assert (one.population, one.iterations, one.mutants, one.crossovers) == (64, 40, 16, 16)
    assert (one.probability, one.parents) == (0.3, 32)
    assert EvolutionarySearch(small_space()).total == 64 + 39 * 32


def test_forty_iterations_take_less_than_two_seconds() -> None:
    """With a free evaluator, over 64 pairs. Processor time: others share the machine."""
    space = SearchSpace(128, 1e4, 4096, 131072, attention="searched")
    search = EvolutionarySearch(space)
    free = {"fitness": 1.0}
    begin = time.process_time()
    run_search(search, lambda cs: [Evaluation(c, **free) for c in cs], batch=64)
    assert time.process_time() - begin < 2
    assert search.evaluated == search.total == 1312


@pytest.mark.parametrize("kind", ["mixed", "paper"])
@pytest.mark.parametrize("space", all_spaces(), ids=lambda s: f"{s.genes}-{s.bounds}")
def test_every_candidate_is_allowed_and_new(space: SearchSpace, kind: str) -> None:
    search = EvolutionarySearch(space, replace(SMALL, moves=kind))
    seen: list[Candidate] = []
    while candidates := search.ask():
        assert all(space.allows(candidate) for candidate in candidates)
        seen += candidates
        search.tell(measure(candidates))
    assert len(set(seen)) == len(seen) == search.evaluated
    assert search.done
    assert [one.candidate for one in search.evaluations] == seen


def test_first_population_is_the_starts_and_mutants() -> None:
    space = small_space()
    search = EvolutionarySearch(space)
    first = search.ask()
    assert first[:3] == space.starts()
    assert len(first) == 64
    search.tell(measure(first))
    assert len(search.ask()) == 32


def test_parents_are_the_best_so_far() -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    told: list[Evaluation] = []
    while candidates := search.ask():
        # Those of the iterations before: the open one has none of its evaluations in it.
        best = sorted(told, key=lambda one: one.fitness)[: SMALL.parents]
        assert search.parents == best
        assert search.threshold == (best[-1].fitness if best else math.inf)
        told += measure(candidates)
        search.tell(measure(candidates))
    assert search.best == min(told, key=lambda one: one.fitness)


@pytest.mark.parametrize("kind", ["mixed", "paper"])
def test_search_improves_on_its_starts(kind: str) -> None:
    space = small_space()
    best = run_search(EvolutionarySearch(space, EvolutionSettings(moves=kind)), measure)
    assert best is not None
    assert best.fitness < 0.2 * min(map(distance, space.starts()))


def test_thresholds_and_attention_are_genes() -> None:
    """Far enough from the starts that chance does not find both."""
    best = run_search(EvolutionarySearch(small_space(attention="searched")), measure)
    assert best is not None
    assert best.candidate.n_hat == 4
    assert best.candidate.attention is not None
    assert abs(best.candidate.attention - 120) <= 2


def test_asking_again_gives_what_is_not_told() -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    first = search.ask()
    assert search.ask() == first
    search.tell(measure(first[:5]))
    search.tell(measure([first[7]])[0])
    assert search.ask() == first[5:7] + first[8:]
    assert search.history == []
    assert search.best == min(search.evaluations, key=lambda one: one.fitness)


def test_order_and_batches_of_telling_do_not_matter() -> None:
    """Also where fitness ties: the first asked is the best."""

    def flat(candidates: Sequence[Candidate]) -> list[Evaluation]:
        return [Evaluation(one, float(round(distance(one)))) for one in candidates]

    ahead, backwards = (EvolutionarySearch(small_space(), SMALL) for _ in range(2))
    run_search(ahead, flat, batch=3)
    while candidates := backwards.ask():
        for candidate in reversed(candidates):
            backwards.tell(flat([candidate]))
    assert ahead.evaluations == backwards.evaluations
    assert ahead.best == backwards.best
    assert ahead.history == backwards.history


def test_seed_decides() -> None:
    runs = [EvolutionarySearch(small_space(), replace(SMALL, seed=seed)) for seed in (1, 1, 2)]
    for search in runs:
        run_search(search, measure)
    assert runs[0].evaluations == runs[1].evaluations != runs[2].evaluations


def test_history() -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    run_search(search, lambda cs: [Evaluation(c, distance(c), seconds=2.0) for c in cs])
    assert [one.evaluations for one in search.history] == [12, 8, 8, 8, 8]
    assert [one.seconds for one in search.history] == [24.0, 16.0, 16.0, 16.0, 16.0]
    assert [one.best for one in search.history] == sorted(
        (one.best for one in search.history), reverse=True
    )
    first = sorted(one.fitness for one in search.evaluations[:12])
    assert search.history[0].median == (first[5] + first[6]) / 2
    assert search.best is not None
    assert search.history[-1].best == search.best.fitness


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_odd_fitness_is_recorded_and_ranked_last(odd: float) -> None:
    def sick(candidates: Sequence[Candidate]) -> list[Evaluation]:
        return [Evaluation(c, odd if sum(c.factors) % 2 else distance(c)) for c in candidates]

    search = EvolutionarySearch(small_space(), replace(SMALL, population=20))
    best = run_search(search, sick)
    assert best is not None
    assert math.isfinite(best.fitness)
    assert any(str(one.fitness) == str(odd) for one in search.evaluations)
    assert all(math.isfinite(one.fitness) for one in search.parents)


def test_nothing_finite_has_no_best_and_ends() -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    assert run_search(search, lambda cs: [Evaluation(c, math.nan) for c in cs]) is None
    assert search.done
    assert search.history[-1].best == math.inf
    assert math.isnan(search.history[-1].median)


def test_a_small_space_ends_when_there_is_nothing_new() -> None:
    """Two pairs in order, on 6 values each, and two thresholds: 42 candidates."""
    space = small_space(dim=4, target_length=256, n_hats=(0, 1), upper=1.05)
    search = EvolutionarySearch(space, EvolutionSettings(iterations=200))
    run_search(search, lambda cs: [Evaluation(c, float(sum(c.factors))) for c in cs], batch=64)
    assert search.done
    assert search.ask() == []
    assert 35 < search.evaluated <= 42
    assert search.iteration < 200


class Racer:
    """Sums document by document and gives up where the sum is above the threshold."""

    def __init__(self) -> None:
        self.documents = 0

    def __call__(
        self, candidates: Sequence[Candidate], threshold: float = math.inf
    ) -> list[Evaluation]:
        return [self._one(candidate, threshold) for candidate in candidates]

    def _one(self, candidate: Candidate, threshold: float) -> Evaluation:
        total = 0.0
        for share in (0.6, 0.3, 0.1):
            self.documents += 1
            total += share * distance(candidate)
            if total > threshold and share > 0.1:
                return Evaluation(candidate, total, complete=False)
        return Evaluation(candidate, total)


@pytest.mark.parametrize("sieve", [None, Sieve(0.5, adapts=False), Sieve(0.75, adapts=False)])
def test_racing_by_a_lower_bound_gives_the_same_result_for_less(sieve: Sieve | None) -> None:
    def coarse(candidates: Sequence[Candidate], reference: Candidate) -> list[Evaluation]:
        return [Evaluation(one, -distance(one)) for one in candidates]  # so that bad ones race

    settings = replace(SMALL, parents=3)
    plain, raced = (EvolutionarySearch(small_space(), settings, sieve=sieve) for _ in range(2))
    all_of_it, less = Racer(), Racer()
    run_search(plain, all_of_it, coarse=coarse)
    run_search(raced, less, racing=True, coarse=coarse)
    assert [one.candidate for one in plain.evaluations] == [
        one.candidate for one in raced.evaluations
    ]
    assert plain.best == raced.best
    stopped = [one for one in raced.evaluations if not one.complete]
    assert stopped
    assert less.documents < all_of_it.documents == 3 * plain.evaluated
    assert all(one.complete for one in raced.parents)


def test_telling_what_was_not_asked_is_an_error() -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    with pytest.raises(ValueError, match=r"evaluations: expected candidates that ask\(\) gave"):
        search.tell(measure([Candidate((100,) * 8)]))
    first = search.ask()
    search.tell(measure(first[:1]))
    for batch in (first[:1], [first[1], first[1]], [Candidate((101,) * 8)]):
        with pytest.raises(ValueError, match="evaluations: expected"):
            search.tell(measure(batch))
    assert search.evaluated == 1


def test_evaluators_must_answer_what_was_asked() -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    with pytest.raises(ValueError, match="evaluate: expected an evaluation for each of 2"):
        run_search(search, lambda cs: measure(cs[:1]), batch=2)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        run_search(search, measure, batch=0)
    assert search.evaluated == 0


def test_progress_is_called_after_every_batch() -> None:
    seen: list[tuple[int, int]] = []
    search = EvolutionarySearch(small_space(), SMALL)
    run_search(search, measure, lambda s: seen.append((s.evaluated, s.iteration)), batch=4)
    assert seen == [
        (0, 0),
        (4, 1),
        (8, 1),
        (12, 1),
        *((12 + 4 * i, 1 + (i + 1) // 2) for i in range(1, 9)),
    ]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"population": 0}, "population"),
        ({"iterations": 1.5}, "iterations"),
        ({"parents": 0}, "parents"),
        ({"mutants": -1}, "mutants"),
        ({"mutants": 0, "crossovers": 0}, "mutants"),
        ({"probability": 0.0}, "probability"),
        ({"probability": math.nan}, "probability"),
        ({"moves": "best"}, "moves"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
    ],
)
def test_settings_name_what_is_wrong(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        EvolutionSettings(**arguments)
