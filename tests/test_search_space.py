"""What a search space allows, proposes and means."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from space_cases import all_spaces, small_space

from longrope_kernels import Rope
from longrope_kernels.rope import scaling
from longrope_kernels.search import (
    PAPER_N_HATS,
    Candidate,
    Evaluation,
    SearchSpace,
    critical_dimension,
)

SPACES = all_spaces()
spaces = st.sampled_from(SPACES)
kinds = st.sampled_from(["paper", "mixed"])


@given(spaces, st.integers(0, 10**6), kinds, st.floats(0.01, 1.0))
def test_nothing_forbidden_is_proposed(
    space: SearchSpace, seed: int, kind: str, probability: float
) -> None:
    rng = Random(seed)
    known = [*space.starts(), space.random(rng), space.random(rng)]
    for _ in range(10):
        a, b = rng.choice(known), rng.choice(known)
        known.append(space.mutate(a, rng, probability, kind))
        known.append(space.crossover(a, b, rng, kind))
    low, high = space.bounds
    for candidate in known:
        assert space.allows(candidate)
        assert all(low <= value <= high for value in candidate.factors)
        if space.monotone:
            assert list(candidate.factors) == sorted(candidate.factors)
        assert candidate.n_hat in space.thresholds
        assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate


@given(spaces, st.integers(0, 10**6), kinds)
def test_the_random_state_decides(space: SearchSpace, seed: int, kind: str) -> None:
    def run() -> list[Candidate]:
        rng = Random(seed)
        a, b = space.random(rng), space.random(rng)
        return [a, b, space.mutate(a, rng, kind=kind), space.crossover(a, b, rng, kind)]

    assert run() == run()


@given(spaces, st.integers(0, 10**6))
def test_what_is_not_in_the_space_is_not_allowed(space: SearchSpace, seed: int) -> None:
    one = space.random(Random(seed))
    low, high = space.bounds
    odd = [
        Candidate(one.factors[:-1], one.n_hat, one.attention),
        Candidate((*one.factors[:-1], high + 1), one.n_hat, one.attention),
        Candidate((low - 1, *one.factors[1:]), one.n_hat, one.attention),
        Candidate(one.factors, 3, one.attention),
        Candidate(one.factors, one.n_hat, 115 if one.attention is None else None),
    ]
    if space.monotone and space.genes > 1:
        odd.append(Candidate((high, *[low] * (space.genes - 1)), one.n_hat, one.attention))
    assert not any(space.allows(candidate) for candidate in odd)


def test_order_is_free_without_monotone() -> None:
    space = small_space(monotone=False)
    rng = Random(0)
    found = [space.mutate(space.starts()[1], rng) for _ in range(50)]
    assert any(list(one.factors) != sorted(one.factors) for one in found)
    assert space.allows(Candidate((400, *[100] * 7)))


@pytest.mark.parametrize("start", [0, 1, 2], ids=["PI", "NTK", "YaRN"])
def test_mixed_moves_reach_every_pair_by_fine_and_coarse_steps(start: int) -> None:
    """Also from a plateau, where the paper's redraw has no room."""
    space = SearchSpace(64, 1e4, 4096, 32768)
    from_here = space.starts()[start]
    rng = Random(1)
    moved = [space.mutate(from_here, rng).factors for _ in range(1000)]
    for i, before in enumerate(from_here.factors):
        steps = [abs(math.log(factors[i] / before)) for factors in moved]
        assert sum(0 < step < 0.05 for step in steps) > 5
        assert sum(step > 0.2 for step in steps) > 2


def test_the_papers_moves_cannot_leave_a_plateau() -> None:
    """Why there are others: of PI only the first and the last pair have room."""
    space = SearchSpace(64, 1e4, 4096, 32768)
    even = space.starts()[0]
    rng = Random(1)
    moved = [space.mutate(even, rng, kind="paper").factors for _ in range(300)]
    assert all(factors[16] == 800 for factors in moved)


def test_mutation_has_the_papers_probability() -> None:
    space = small_space(monotone=False, dim=64)
    rng = Random(2)
    start = space.starts()[1]
    changed = thresholds = 0
    for _ in range(200):
        one = space.mutate(start, rng, 0.3, "paper")
        changed += sum(a != b for a, b in zip(one.factors, start.factors, strict=True))
        thresholds += one.n_hat != 0
    assert 0.27 < changed / (200 * 32) < 0.33
    # One of the thresholds drawn is the present one.
    assert 0.17 < thresholds / 200 < 0.37


@given(st.integers(0, 10**6), kinds)
def test_a_child_lies_between_its_parents(seed: int, kind: str) -> None:
    space, rng = small_space(attention="searched"), Random(seed)
    a, b = space.random(rng), space.random(rng)
    child = space.crossover(a, b, rng, kind)
    assert child.n_hat in (a.n_hat, b.n_hat)
    assert child.attention in (a.attention, b.attention)
    for value, x, y in zip(child.factors, a.factors, b.factors, strict=True):
        if kind == "paper":
            assert value in (x, y)
        assert min(a.factors[0], b.factors[0]) <= value <= max(a.factors[-1], b.factors[-1])


def test_starts_are_the_formulas_on_the_grid() -> None:
    space = SearchSpace(128, 1e4, 4096, 32768, attention="searched")
    ropes = (
        scaling.linear(128, 8.0),
        scaling.ntk_aware(128, 8.0),
        scaling.yarn(128, 8.0, 4096),
    )
    starts = space.starts()
    assert len(starts) == 9
    names = ("PI", "NTK", "YaRN")
    for name, start, rope in zip(names, starts, ropes, strict=False):
        assert start.origin == name
        assert start.factors == tuple(round(100 * value) for value in rope.sets[0].factors)
        assert start.n_hat == 0
    paper = round(100 * math.sqrt(1 + math.log(8) / math.log(4096)))
    yarn = round(100 * (0.1 * math.log(8) + 1))
    assert [start.attention for start in starts[:3]] == [paper, paper, yarn]
    of = {name: {s.attention for s in starts if s.origin == name} for name in names}
    assert all(found == {100, paper, yarn} for found in of.values())
    fixed = SearchSpace(128, 1e4, 4096, 32768).starts()
    assert [start.origin for start in fixed] == list(names)


def test_children_know_the_formula_they_descend_from() -> None:
    space, rng = small_space(attention="searched"), Random(7)
    pi, ntk, yarn = space.starts()[:3]
    for start in (pi, ntk, yarn):
        mutant = space.mutate(space.mutate(start, rng), rng)
        assert mutant.origin == start.origin
        assert Candidate.from_json(mutant.to_json()).origin == start.origin
        assert space.start_of(mutant) == start

    def far(child: Candidate, start: Candidate) -> float:
        return sum(math.log(a / b) ** 2 for a, b in zip(child.factors, start.factors, strict=True))

    seen = set()
    for _ in range(60):
        child = space.crossover(pi, yarn, rng)
        assert child.origin == ("PI" if far(child, pi) <= far(child, yarn) else "YaRN")
        seen.add(child.origin)
    assert seen == {"PI", "YaRN"}
    assert space.start_of(Candidate((100,) * 8)) is None


def test_starts_come_once() -> None:
    assert small_space(target_length=256).starts() == [Candidate((100,) * 8)]


def test_grid_ends_at_a_quarter_above_the_ratio() -> None:
    assert small_space().bounds == (100, 500)
    assert small_space(target_length=1100).bounds == (100, 537)  # 1.25 * 4.296875 = 5.371
    assert small_space(upper=2.0).bounds == (100, 200)
    assert small_space(target_length=1100, critical=4).bounds == (430, 859)


def test_thresholds_are_the_papers_below_the_target() -> None:
    assert small_space().thresholds == PAPER_N_HATS
    assert small_space(original_length=64, target_length=128).thresholds == PAPER_N_HATS[:-2]
    assert small_space(n_hats=(4, 64)).starts()[0].n_hat == 4


def test_rope_is_what_the_candidate_says() -> None:
    space = small_space(attention="searched")
    rope = space.rope(Candidate((100, 100, 133, 150, 200, 300, 400, 450), 8, 117), max_length=1024)
    (one,) = rope.sets
    assert one.factors == (1.0, 1.0, 1.33, 1.5, 2.0, 3.0, 4.0, 4.5)
    assert (one.n_hat, one.attention_factor, one.max_length) == (8, 1.17, 1024)
    assert (rope.base, rope.interleaved) == (1e4, False)


@pytest.mark.parametrize(
    ("attention", "wanted"), [(None, math.sqrt(1 + math.log(4) / math.log(256))), (1.0, 1.0)]
)
def test_attention_is_fixed_unless_searched(attention: float | None, wanted: float) -> None:
    space = small_space(attention=attention)
    start = space.starts()[0]
    assert start.attention is None
    assert space.rope(start).sets[0].attention_factor == wanted


def test_stage_is_composed() -> None:
    """With the set that serves the target, and the attention factor of the whole extension."""
    long = tuple(1.0 + i / 2 for i in range(8))
    stage = Rope.longrope([1.0] * 8, long, 256, 1024, n_hat=16)
    space = small_space(target_length=4096, ratio=4.0, stage=stage)
    candidate = space.starts()[0]
    assert candidate.factors == (400,) * 8
    (one,) = space.rope(candidate).sets
    assert one.factors == tuple(4.0 * value for value in long)
    assert one.n_hat == 0
    assert one.attention_factor == math.sqrt(1 + math.log(16) / math.log(256))


def test_critical_restricts_and_meets_ntk() -> None:
    space = small_space(critical=3)
    assert (space.genes, space.bounds) == (5, (400, 800))
    (one,) = space.rope(Candidate((500, 500, 600, 600, 800))).sets
    assert one.factors == (1.0, 5 ** (1 / 3), 5 ** (2 / 3), 5.0, 5.0, 6.0, 6.0, 8.0)
    assert space.starts()[0].factors == (400,) * 5


def test_critical_dimension_is_the_theorys() -> None:
    for dim, base, length, wanted in ((128, 5e5, 8192, 70), (96, 1e4, 4096, 68)):
        formula = 2 * math.ceil(dim / 2 * math.log(length / (2 * math.pi), base))
        assert critical_dimension(dim, base, length) == formula == wanted


def test_nearest_moves_into_the_range() -> None:
    space = small_space()
    one = space.nearest([0.5, 1.004, 1.006, 3.0, 2.0, 9.0, 9.0, 9.0], n_hat=63)
    assert one == Candidate((100, 100, 101, 300, 300, 500, 500, 500), 32)
    assert space.allows(one)
    with pytest.raises(ValueError, match="factors: expected 8 finite numbers"):
        space.nearest([1.0, math.nan])


def test_description_tells_spaces_apart() -> None:
    texts = {json.dumps(space.describe()) for space in SPACES}
    assert len(texts) == len(SPACES)
    assert small_space().describe() == small_space(ratio=4.0, n_hats=PAPER_N_HATS).describe()
    assert hash(small_space()) == hash(small_space())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dim": 15}, "dim"),
        ({"dim": 2}, "dim"),
        ({"dim": 16.0}, "dim"),
        ({"base": 1.0}, "base"),
        ({"original_length": 1}, "original_length"),
        ({"target_length": 0}, "target_length"),
        ({"target_length": 128}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"stage": Rope.plain(16)}, "ratio"),
        ({"stage": Rope.plain(32), "ratio": 2.0}, "stage"),
        ({"stage": Rope.plain(16, base=5e5), "ratio": 2.0}, "stage"),
        ({"stage": "x", "ratio": 2.0}, "stage"),
        ({"n_hats": ()}, "n_hats"),
        ({"n_hats": (4, 0)}, "n_hats"),
        ({"n_hats": (0, 1024)}, "n_hats"),
        ({"n_hats": (0, 1.5)}, "n_hats"),
        ({"attention": "free"}, "attention"),
        ({"attention": 0.0}, "attention"),
        ({"attention_range": (1.5, 1.0)}, "attention_range"),
        ({"critical": 0}, "critical"),
        ({"critical": 8}, "critical"),
        ({"critical": 3, "monotone": False}, "critical"),
        ({"critical": 3, "stage": Rope.plain(16), "ratio": 4.0}, "critical"),
        ({"upper": 0.5}, "upper"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        small_space(**arguments)


def test_errors_of_candidates() -> None:
    with pytest.raises(ValueError, match="candidate: expected 8 factors, got 2"):
        small_space().rope(Candidate((100, 100)))
    with pytest.raises(ValueError, match="candidate: expected an attention factor"):
        small_space(attention="searched").rope(Candidate((100,) * 8))
    with pytest.raises(ValueError, match="candidate: expected whole numbers"):
        Candidate.from_json({"factors": [1.5], "n_hat": 0, "attention": None})
    with pytest.raises(ValueError, match="candidate: expected factors"):
        Candidate.from_json({"factors": [100]})


@given(st.floats(), st.booleans(), st.floats(0, 1e6))
def test_evaluations_survive_json(fitness: float, complete: bool, seconds: float) -> None:
    one = Evaluation(Candidate((100, 200), 4), fitness, complete, seconds, {"losses": [1.5]})
    text = json.dumps(one.to_json(), allow_nan=False)
    again = Evaluation.from_json(json.loads(text))
    assert again.candidate == one.candidate
    assert str(again.fitness) == str(one.fitness)
    assert (again.complete, again.seconds, again.details) == (complete, seconds, {"losses": [1.5]})


def test_rank_puts_the_stopped_and_the_odd_last() -> None:
    one = Candidate((100,))
    order = [
        Evaluation(one, 2.0),
        Evaluation(one, 9.0),
        Evaluation(one, 1.0, complete=False),
        Evaluation(one, math.inf),
    ]
    ranks = [evaluation.rank for evaluation in order]
    assert ranks == sorted(ranks)
    for odd in (math.nan, -math.inf):
        assert Evaluation(one, odd).rank == ranks[-1]
        assert Evaluation(one, odd, complete=False).rank == ranks[-1]
