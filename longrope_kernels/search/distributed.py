"""A search on several processes (torchrun): candidates are split over the ranks, or over groups
of ranks that share each sequence.

Rank 0 owns the search and its journal; the others only evaluate. What is exchanged are Python
objects, over gloo, also where a model runs on GPUs: a process group made by `start_ranks` has
NCCL for whatever an evaluator does on its device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .base import Search
from .candidate import Candidate, Evaluation
from .run import Evaluate, Progress, evaluated, judge_of

_RESUME = "what was told is in the journal: start the same command again to go on"


def start_ranks(timeout: float = 1800.0) -> tuple[int, int]:
    """Join the process group torchrun describes, where it does and nobody has yet.

    With GPUs each process takes the one of its local rank.

    Args:
        timeout: in seconds; longer than the slowest evaluation, since ranks wait for one another.

    Returns:
        The rank and the number of ranks; (0, 1) without torchrun.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return 0, 1
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size()


def run_distributed(
    make_search: Callable[[], Search],
    evaluate: Evaluate,
    progress: Progress | None = None,
    *,
    coarse: Evaluate | None = None,
    batch: int = 1,
    racing: bool = False,
    sharing: int = 1,
) -> Evaluation | None:
    """`run_search` over all ranks of the process group; every one of them calls it.

    In each round every rank, with ``sharing`` every group of so many, evaluates up to ``batch``
    candidates, and rank 0 tells the search. The result is that of `run_search` where the evaluator
    does not depend on the rank.

    Args:
        make_search: called on rank 0 alone.
        evaluate: as in `run_search`; on every rank.
        progress: on rank 0 alone.
        coarse: as in `run_search`; on every rank.
        batch: candidates per rank and round.
        racing: as in `run_search`.
        sharing: how many ranks, one after another, evaluate the same candidates, together.

    Returns:
        `Search.best`, on every rank.

    Raises:
        RuntimeError: on every rank, where a rank's evaluator failed (naming the rank and its
            error), where rank 0 failed, and where a rank died or did not answer in time. What
            rank 0 has got of that round is told before.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if dist.get_rank() == 0:
        return _lead(make_search, evaluate, coarse, progress, batch, racing, sharing)
    return _follow(evaluate, coarse, sharing)


def _lead(
    make_search: Callable[[], Search],
    evaluate: Evaluate,
    coarse: Evaluate | None,
    progress: Progress | None,
    batch: int,
    racing: bool,
    sharing: int,
) -> Evaluation | None:
    try:
        search = make_search()
        if progress is not None:
            progress(search)
        while candidates := search.ask():
            width = batch * (dist.get_world_size() // sharing)
            for start in range(0, len(candidates), width):
                judge, given = judge_of(search, evaluate, coarse, racing)
                _round(search, judge, candidates[start : start + width], given, sharing)
                if progress is not None:
                    progress(search)
    except _RankError:
        raise
    except Exception as error:
        # The others wait for a message: let them end now, and not at the timeout.
        _tell_end(f"rank 0: {type(error).__name__}: {error}")
        raise
    _broadcast(("done", search.best))
    return search.best


class _RankError(RuntimeError):
    """Every rank knows of it, or cannot be told."""


def _tell_end(text: str) -> None:
    try:
        _broadcast(("failed", text))
    except RuntimeError:
        return  # they are gone; the error itself is what counts


def _round(
    search: Search,
    judge: Evaluate,
    candidates: list[Candidate],
    given: Any,
    sharing: int,
) -> None:
    """Rank 0's part: split, evaluate its own, gather, tell."""
    groups = dist.get_world_size() // sharing
    shares = [candidates[group::groups] for group in range(groups)]
    _broadcast(("evaluate", search.stage, shares, given))
    own = _attempt(judge, shares[0], given)
    try:
        answers = _gather(own)
    except _RankError:
        search.tell(own[0])
        raise
    search.tell([one for found, _ in answers[::sharing] for one in found])
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]
    if failures:
        text = "; ".join(failures)
        _broadcast(("failed", text))
        raise _RankError(f"{text}; {_RESUME}")


def _follow(evaluate: Evaluate, coarse: Evaluate | None, sharing: int) -> Evaluation | None:
    while True:
        message = _broadcast(None)
        if message[0] == "done":
            best: Evaluation | None = message[1]
            return best
        if message[0] == "failed":
            raise _RankError(f"{message[1]}; {_RESUME}")
        _, stage, shares, given = message
        judge = coarse if stage == "coarse" and coarse is not None else evaluate
        _gather(_attempt(judge, shares[dist.get_rank() // sharing], given))


def _attempt(
    evaluate: Evaluate, candidates: list[Candidate], given: Any
) -> tuple[list[Evaluation], str]:
    """The evaluations, and an error's text instead of an error."""
    if not candidates:
        return [], ""
    try:
        return evaluated(evaluate, candidates, given), ""
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"


def _broadcast(message: Any) -> Any:
    """Rank 0's message, on every rank."""
    box = [message]
    try:
        dist.broadcast_object_list(box, src=0)
    except (RuntimeError, dist.DistError) as error:
        raise _lost(error) from error
    return box[0]


def _gather(answer: tuple[list[Evaluation], str]) -> list[Any]:
    """The answers of all ranks, on rank 0; an empty list elsewhere."""
    answers: list[Any] | None = None
    if dist.get_rank() == 0:
        answers = [None] * dist.get_world_size()
    try:
        dist.gather_object(answer, answers, dst=0)
    except (RuntimeError, dist.DistError) as error:
        # One that shares sequences with this rank was missed, by its name, in the evaluation.
        raise _lost(error, answer[1]) from error
    return answers or []


def _lost(error: Exception, earlier: str = "") -> _RankError:
    text = (earlier or str(error)).strip().splitlines()
    return _RankError(
        f"rank {dist.get_rank()}: another rank died or did not answer in time "
        f"({text[-1] if text else type(error).__name__}); {_RESUME}"
    )
