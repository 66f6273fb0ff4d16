"""`run_search`: the loop between a search and an evaluator, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .base import Search
from .candidate import Candidate, Evaluation

# Takes candidates, and in a race the fitness above which one is hopeless; gives as many
# evaluations.
Evaluate = Callable[..., Sequence[Evaluation]]
Progress = Callable[[Search], None]


def run_search(
    search: Search,
    evaluate: Evaluate,
    progress: Progress | None = None,
    *,
    coarse: Evaluate | None = None,
    batch: int = 1,
    racing: bool = False,
) -> Evaluation | None:
    """Ask, evaluate and tell until the search is done.

    Args:
        search: goes on where it is.
        evaluate: ``evaluate(candidates)`` gives an `Evaluation` for each. In a race it is
            ``evaluate(candidates, threshold)``, and may give up on a candidate whose fitness is
            certain to be above the threshold (`Evaluation.complete` False). Where it never gives
            up on one that would have come out lower, the search ends with the same result.
        coarse: ``coarse(candidates, reference)`` by the coarse fitness, for a search that has a
            sieve; it never races. The second is `Search.reference`.
        progress: called with the search at the start and after every evaluation told.
        batch: candidates per call; as many are lost when the process is killed.
        racing: off for exact reproduction by evaluators that only guess.

    Returns:
        `Search.best`.

    Raises:
        ValueError: ``evaluate`` gave other candidates than it was asked for.
        OSError: as in `Search.tell`. What ``evaluate`` raises goes through too, and nothing told
            is lost.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if progress is not None:
        progress(search)
    while candidates := search.ask():
        for start in range(0, len(candidates), batch):
            part = candidates[start : start + batch]
            judge, given = judge_of(search, evaluate, coarse, racing)
            search.tell(evaluated(judge, part, given))
            if progress is not None:
                progress(search)
    return search.best


def judge_of(
    search: Search, evaluate: Evaluate, coarse: Evaluate | None, racing: bool
) -> tuple[Evaluate, Any]:
    """What judges the candidates of a search's stage, and what it is given beside them."""
    if search.stage != "coarse":
        return evaluate, search.threshold if racing else None
    if coarse is None:
        raise ValueError("coarse: expected an evaluator, since the search has a sieve, got None")
    return coarse, search.reference


def evaluated(evaluate: Evaluate, candidates: list[Candidate], given: Any) -> list[Evaluation]:
    """The evaluations of ``evaluate``, checked, and timed where it did not time them.

    Args:
        evaluate: as in `run_search`.
        candidates: what to evaluate.
        given: a second argument: the threshold in a race, a reference; None for none.
    """
    begin = time.perf_counter()
    found = list(evaluate(candidates, *(() if given is None else (given,))))
    seconds = (time.perf_counter() - begin) / max(len(candidates), 1)
    if [one.candidate for one in found] != candidates:
        raise ValueError(
            f"evaluate: expected an evaluation for each of {len(candidates)} candidates, in order; "
            f"got {len(found)}, or others"
        )
    return [one if one.seconds else replace(one, seconds=seconds) for one in found]
