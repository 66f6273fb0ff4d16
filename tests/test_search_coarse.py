"""A coarse fitness before the full one: which candidates go on, what switches it off, resumes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from space_cases import SMALL, distance, measure, small_space

from longrope_kernels.search import Candidate, Evaluation, EvolutionarySearch, Search, run_search
from longrope_kernels.search.cmaes import CmaEsSearch, CmaEsSettings
from longrope_kernels.search.coarse import BEHIND, Coarse, Sieve, correlation, standing
from longrope_kernels.search.descent import best_attention, descent

SPACE = small_space(attention="searched")
FORMULAS = ("no scaling", "YaRN")


def near(candidates: Sequence[Candidate], reference: Any = None) -> list[Evaluation]:
    """A coarse fitness that ranks about as `distance` does."""
    noise = (0.05 * math.sin(sum(c.factors) + c.n_hat) for c in candidates)
    return [Evaluation(c, distance(c) * (1 + x)) for c, x in zip(candidates, noise, strict=True)]


def against(candidates: Sequence[Candidate], reference: Any = None) -> list[Evaluation]:
    """One that says the contrary."""
    return [Evaluation(c, -distance(c)) for c in candidates]


def full(candidates: Sequence[Candidate], threshold: float | None = None) -> list[Evaluation]:
    return [Evaluation(c, 1.0) if not c.factors else measure([c])[0] for c in candidates]


def evolution(folder: Path | None = None, sieve: Sieve | None = Sieve()) -> Search:  # noqa: B008
    return EvolutionarySearch(SPACE, SMALL, folder, {}, FORMULAS, sieve)


def cma_es(folder: Path | None = None) -> Search:
    settings = CmaEsSettings(population=8, iterations=5, seed=2)
    return CmaEsSearch(SPACE, settings, folder, {}, FORMULAS, Sieve(0.5))


def finish(search: Search, coarse: Any = near, **arguments: Any) -> Search:
    with search:
        run_search(search, full, coarse=coarse, **arguments)
    assert search.done
    return search


# ------------------------------------------------------------------------------ what goes on


def test_formulas_come_first_and_are_no_parents() -> None:
    search = evolution(sieve=None)
    first = search.ask()
    assert [one.to_json() for one in first] == [{"formula": name} for name in FORMULAS]
    assert search.stage == "formulas"
    search.tell(Evaluation(first[0], 3.0))
    assert search.compared["no scaling"].fitness == 3.0
    assert (search.evaluated, search.best, search.history) == (0, None, [])
    search.tell(Evaluation(first[1], -9.0))
    assert search.best is None
    assert search.stage == "full"
    assert len(search.ask()) == SMALL.population
    finish(search)
    assert search.best is not None
    assert search.best.fitness > -9
    assert all(one.candidate.factors for one in search.parents)


def test_all_are_judged_coarsely_and_the_best_share_in_full() -> None:
    search = evolution(sieve=Sieve(0.25, adapts=False))
    search.tell(full(search.ask()))
    first = search.ask()
    assert search.stage == "coarse"
    assert len(first) == SMALL.population
    search.tell(near(first[:5]))
    assert search.ask() == first[5:]
    assert search.best is None  # the coarse fitness decides nothing
    search.tell(near(first[5:]))
    assert search.stage == "full"
    chosen = search.ask()
    own = SPACE.starts()[:3]  # each formula is judged in full
    assert len(chosen) == 3 == round(0.25 * SMALL.population)
    assert chosen == own
    search.tell(full(chosen))
    children = search.ask()
    assert search.stage == "coarse"
    assert set(children).isdisjoint(first)
    search.tell(near(children))
    ranked = [one.candidate for one in sorted(near(children), key=lambda one: one.fitness)]
    assert search.ask() == ranked[:2]
    finish(search)
    # Two of each eight, and the formula with the winner's attention factor.
    assert search.evaluated in (3 + 4 * 2, 3 + 4 * 2 + 1)
    assert search.judged == len(FORMULAS) + search.total + search.evaluated - 11
    assert [one.evaluations for one in search.history][:5] == [3, 2, 2, 2, 2]
    assert {one.candidate for one in search.parents} <= set(first) | {
        one.candidate for one in search.evaluations
    }


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_parents_are_fewer_by_as_much_as_candidates_in_full(share: float) -> None:
    def parents(told: int, asked: int) -> int:
        return max(math.ceil(SMALL.parents * told / max(asked, 1)), 2)

    search, seen = evolution(sieve=Sieve(share, adapts=False)), 0
    while candidates := search.ask():
        if search.stage == "coarse" and search.iteration > seen:
            told = sorted(search.evaluations, key=lambda one: one.fitness)
            asked = SMALL.population + (seen - 1) * SMALL.children if seen else 0
            assert search.parents == told[: parents(len(told), asked)]
            # What it gives up on is no parent, however many of these it judges in full.
            most = parents(len(told) + len(candidates), asked + len(candidates))
            assert search.threshold == (told[most - 1].fitness if len(told) >= most else math.inf)
            seen += 1
        search.tell((near if search.stage == "coarse" else full)(candidates))
    assert seen == SMALL.iterations


def test_one_from_the_middle_is_among_those_judged_in_full() -> None:
    judged = [Evaluation(Candidate((100 + i,)), float(i)) for i in range(9)]
    order = [one.fitness for one in Sieve().order(judged[::-1])]
    assert order == [0, 1, 4, 2, 3, 5, 6, 7, 8]
    assert [one.fitness for one in Sieve().order(judged[:4])] == [0, 1, 2, 3]


def spearman(values: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation of ranks, each counted from the values that are smaller or equal."""
    columns = np.array(values).T
    ranks = [
        [(column < x).sum() + ((column == x).sum() - 1) / 2 for x in column] for column in columns
    ]
    return float(np.corrcoef(ranks)[0, 1])


def test_correlation_is_spearmans() -> None:
    rng = Random(3)
    one = Candidate((100,))
    values = [(rng.choice((1.0, 2.0, rng.random())), rng.random()) for _ in range(30)]
    both = [(Evaluation(one, a), Evaluation(one, b)) for a, b in values]
    alike = [1.0] * 30
    assert correlation(both, alike) == pytest.approx(spearman(values))
    assert correlation(both[:7], alike[:7]) is None
    assert correlation([(both[0][0], b) for _, b in both], alike) is None
    # One that stands for several counts as if it were there as often.
    times = [rng.randint(1, 5) for _ in values]
    repeated = [value for value, n in zip(values, times, strict=True) for _ in range(n)]
    assert correlation(both, times) == pytest.approx(spearman(repeated))
    # What a race gave up ranks last, whatever was seen of it; what is not finite behind it.
    odd = [
        *both,
        (Evaluation(one, 5.0), Evaluation(one, 0.0, complete=False)),
        (Evaluation(one, 5.0), Evaluation(one, 0.5, complete=False)),
        (Evaluation(one, math.nan), Evaluation(one, math.nan)),
    ]
    ranks = [*values, (5.0, 2.0), (5.0, 2.0), (9.0, 3.0)]
    assert correlation(odd, [1.0] * 33) == pytest.approx(spearman(ranks))


def test_the_best_stand_for_themselves_and_others_for_those_that_were_not_judged() -> None:
    yes, no = True, False
    assert standing([yes, yes, no, no, yes, no, no, no]) == [1, 1, 6]
    assert standing([no, yes, no, yes]) == [2, 2]
    assert standing([yes, yes, yes]) == [1, 1, 1]
    assert standing([yes, no, no]) == [1]
    assert standing([no, no]) == standing([]) == []


@pytest.mark.parametrize(
    ("found", "adapts", "count"),
    [(None, False, 8), (0.9, True, 8), (0.74, True, 16), (0.69, True, 32), (0.1, False, 8)],
)
def test_more_are_judged_in_full_where_the_correlation_falls(
    found: float | None, adapts: bool, count: int
) -> None:
    sieve = Sieve(0.25, adapts)
    assert sieve.wanted(32, found) == count
    assert sieve.misleads(found) == (count == 32)
    assert Sieve(0.9).wanted(32, 0.72) == 32
    assert Sieve(0.001).wanted(5, 0.9) == 1
    assert [Sieve(0.001).wanted(n, None) for n in (20, 5)] == [8, 5]  # as many as tell


def test_a_coarse_fitness_that_contradicts_is_switched_off_and_changes_nothing() -> None:
    plain, misled = finish(evolution(sieve=None)), finish(evolution(), against)
    assert misled.correlation is not None
    assert misled.correlation < -0.5
    assert not misled.sifts
    assert misled.best == plain.best
    assert misled.evaluations == plain.evaluations
    assert misled.history == plain.history
    assert misled.iteration == plain.iteration
    stubborn = finish(evolution(sieve=Sieve(adapts=False)), against)
    assert stubborn.sifts
    assert stubborn.evaluated < plain.evaluated


def test_a_good_one_finds_as_much_with_less() -> None:
    space = small_space()
    plain = EvolutionarySearch(space)
    sifted = EvolutionarySearch(space, sieve=Sieve())
    run_search(plain, measure)
    run_search(sifted, measure, coarse=near)
    assert plain.best is not None
    assert sifted.best is not None
    assert sifted.correlation is not None
    assert sifted.correlation > 0.9
    assert sifted.evaluated <= 0.26 * plain.evaluated
    start = min(map(distance, space.starts()))
    assert sifted.best.fitness < plain.best.fitness + 0.05 * start


def test_noise_among_the_best_switches_nothing_off() -> None:
    """The best lie within a percent; windows tell them from bad ones, and not from one another."""

    def rough(candidates: Sequence[Candidate], reference: Any) -> list[Evaluation]:
        seeds = (sum((i + 1) * x for i, x in enumerate(c.factors)) + c.n_hat for c in candidates)
        noise = (Random(seed).uniform(0.8, 1.25) for seed in seeds)
        return [Evaluation(c, distance(c) * x) for c, x in zip(candidates, noise, strict=True)]

    search = finish(evolution(), rough)
    both = [
        (search._coarse[one.candidate], one)
        for one in search.evaluations
        if one.candidate in search._coarse
    ]
    alike = correlation(both, [1.0] * len(both))
    assert search.correlation is not None
    assert alike is not None
    assert alike < search.correlation
    assert search.sifts


def test_a_few_that_rank_otherwise_do_not_have_all_judged() -> None:
    """Of 32 candidates the first eight have a correlation below 0.7, and sixteen of 0.8."""

    def rough(candidates: Sequence[Candidate], reference: Any) -> list[Evaluation]:
        seeds = (f"63 {c.factors} {c.n_hat} {c.attention}" for c in candidates)
        noise = (Random(seed).uniform(0.3, 3.3) for seed in seeds)
        return [Evaluation(c, distance(c) * x) for c, x in zip(candidates, noise, strict=True)]

    settings = replace(SMALL, population=32, iterations=1)
    found: list[float | None] = []

    def watched(candidates: Sequence[Candidate], threshold: Any = None) -> list[Evaluation]:
        found.append(search.correlation)
        return full(candidates, threshold)

    with EvolutionarySearch(SPACE, settings, None, {}, FORMULAS, Sieve()) as search:
        run_search(search, watched, coarse=rough)
    low = [one for one in found if one is not None and one < 0.7]
    assert low
    assert search.history[0].evaluations == 16
    assert search.correlation is not None
    assert search.correlation > 0.75


def test_with_no_time_left_no_iteration_begins(tmp_path: Path) -> None:
    """Where windows are switched off, each candidate takes the full length."""
    whole = finish(evolution(), against)
    search = finish(evolution(tmp_path, Sieve(most=16)), against)
    assert search.history[:2] == whole.history[:2]
    first, second, *closing = (one.evaluations for one in search.history)
    assert first < 16 <= first + second
    assert closing in ([], [1])  # the formula of the winner
    assert len(whole.history) > 3
    again = evolution(tmp_path, Sieve(most=16))
    assert again.done
    assert again.best == search.best


def test_a_sieve_needs_a_coarse_fitness() -> None:
    with pytest.raises(ValueError, match="coarse: expected an evaluator, since the search has"):
        run_search(evolution(), full)


# --------------------------------------------------------------------------------- resuming


def test_what_comes_before_is_read_under_a_rope_near_the_best(tmp_path: Path) -> None:
    """The same for all candidates of an iteration, also where a search goes on within them.

    It is another one where the best before the iteration is better by 2%.
    """

    def flat(candidate: Candidate) -> float:
        return 2 + distance(candidate) if candidate.factors else 9.0

    def flatter(candidates: Sequence[Candidate], threshold: Any = None) -> list[Evaluation]:
        return [Evaluation(one, flat(one)) for one in candidates]

    def judged(folder: Path, limit: float = math.inf) -> list[Candidate]:
        references = []

        def watched(candidates: Sequence[Candidate], reference: Candidate) -> list[Evaluation]:
            if len(references) >= limit:
                raise InterruptedError
            references.append(reference)
            return near(candidates)

        with contextlib.suppress(InterruptedError), evolution(folder) as search:
            run_search(search, flatter, coarse=watched)
        return references

    whole = judged(tmp_path / "whole")
    with evolution(tmp_path / "whole") as search:
        counts, history = list(map(len, search._asked)), search.history
        best = [one.best for one in history]
        formula = search.compared[FORMULAS[0]]
    assert whole[: counts[0]] == [formula.candidate] * counts[0]
    at, near_to, stayed = counts[0], formula.fitness, 0
    for count, before in zip(counts[1:-1], best, strict=False):
        assert len({*whole[at : at + count]}) == 1
        if before < 0.98 * near_to:
            near_to = before
            assert flat(whole[at]) == before
        else:
            stayed += flat(whole[at]) == near_to > before
            assert whole[at] == whole[at - 1]
        at += count
    assert stayed
    parts = judged(tmp_path / "parts", at // 2)
    assert parts + judged(tmp_path / "parts") == whole


@pytest.mark.parametrize("make", [evolution, cma_es])
@pytest.mark.parametrize("coarse", [near, against])
def test_killed_after_each_line_of_the_journal(
    make: Callable[..., Search], coarse: Any, tmp_path: Path
) -> None:
    """Formulas, windows and the full length: the same lines, in the same order."""
    whole = finish(make(tmp_path / "whole"), coarse)
    lines = (tmp_path / "whole" / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    stages = [json.loads(line)["stage"] for line in lines]
    assert {"formulas", "coarse", "full"} == set(stages)
    for left in range(1, len(lines), 7):
        folder = tmp_path / str(left)

        def stop(search: Search, left: int = left) -> None:
            done = len(search.compared) + len(search._coarse) + search.evaluated
            if done == left:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finish(make(folder), coarse, progress=stop)
        assert finish(make(folder), coarse).evaluations == whole.evaluations
        again = (folder / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
        assert [timeless(line) for line in again] == [timeless(line) for line in lines]


def timeless(line: bytes) -> dict[str, Any]:
    return {**json.loads(line), "seconds": 0}


def test_a_search_with_another_sieve_is_another_one(tmp_path: Path) -> None:
    finish(evolution(tmp_path))
    with pytest.raises(ValueError, match=r"sieve\.share is 0\.125 there and 0\.5 here"):
        evolution(tmp_path, Sieve(0.5))
    with pytest.raises(ValueError, match="another run's: sieve"):
        evolution(tmp_path, None)


# ---------------------------------------------------------------------------------- descent


def test_the_winner_names_its_formula() -> None:
    search = finish(evolution(sieve=None))
    assert search.best is not None
    winner = search.best.candidate
    start = next(one for one in SPACE.starts() if one.origin == winner.origin)
    alike = replace(start, attention=winner.attention)
    assert descent(search) == {
        "formula": winner.origin,
        "largest_change": max(
            max(a / b, b / a) for a, b in zip(winner.factors, start.factors, strict=True)
        ),
        "pair": pytest.approx(
            max(
                range(8),
                key=lambda i: abs(math.log(winner.factors[i] / start.factors[i])),
            )
        ),
        "fitness": distance(start),
        "with_attention": distance(alike),
    }
    of_yarn = {
        one.candidate.attention: one.fitness
        for one in search.evaluations
        if one.candidate.factors == SPACE.starts()[2].factors and one.candidate.n_hat == 0
    }
    attention = min(of_yarn, key=lambda one: of_yarn[one])
    assert attention is not None
    assert best_attention(search) == (of_yarn[attention], attention / 100)
    assert len(of_yarn) >= 3
    assert descent(evolution()) is None


# ---------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "perhaps"}, "coarse: expected one of auto, on, off, got 'perhaps'"),
        ({"share": 0.0}, "coarse-share: expected above 0 and up to 1, got 0"),
        ({"share": 1.1}, "coarse-share: expected above 0 and up to 1, got 1.1"),
        ({"share": math.nan}, "coarse-share: expected above 0"),
        ({"tokens": 3}, "coarse-tokens: expected 4 or more, got 3"),
        ({"chunks": 5}, "coarse-chunks: expected 2 to 4, got 5"),
        ({"windows": 0}, "coarse-windows: expected 1 or more, got 0"),
    ],
)
def test_options_name_what_is_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Coarse(**given)
    with pytest.raises(ValueError, match="share: expected above 0 and up to 1, got 2"):
        Sieve(2.0)


def test_windows_by_length() -> None:
    assert Coarse().window(131072) == 4096
    assert Coarse().window(2048) == 512
    assert Coarse().window(256) is None  # too short to be worth it
    assert Coarse(mode="on").window(256) == 64
    assert Coarse(mode="off").window(131072) is None
    assert Coarse(tokens=100).window(199) is None
    behind = {n: Coarse().window(n, BEHIND) for n in (131072, 16384, 2048, 512, 256)}
    assert behind == {131072: 4096, 16384: 2048, 2048: 256, 512: 128, 256: None}
    assert Coarse(tokens=100).window(2048, BEHIND) == 100
    with pytest.raises(ValueError, match="coarse-tokens: expected at most 99, since 199 tokens"):
        Coarse(mode="on", tokens=100).window(199)
