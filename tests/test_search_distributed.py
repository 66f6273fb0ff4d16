"""Two processes, gloo: the result of one, and clear ends where one of them fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from space_cases import SMALL, distance, measure, small_space

from longrope_kernels.search import (
    Candidate,
    Evaluation,
    EvolutionarySearch,
    Search,
    run_search,
)
from longrope_kernels.search.candidate import Formula
from longrope_kernels.search.coarse import Sieve
from longrope_kernels.search.distributed import run_distributed, start_ranks


def near(candidates: Sequence[Candidate], reference: Candidate) -> list[Evaluation]:
    """A coarse fitness that ranks about as the full one does, from one space to the next."""
    return [Evaluation(c, distance(c) + 0.02 * (sum(c.factors) % 7)) for c in candidates]


def sifted(trouble: str) -> dict[str, Any]:
    """What makes the search of a trouble that is called "coarse" one with a coarse fitness."""
    named = trouble.startswith("coarse")
    return {"formulas": ("PI",), "sieve": Sieve()} if named else {}


def child(folder: str, trouble: str) -> None:
    rank, size = start_ranks(timeout=20)
    assert (rank, size) == (int(os.environ["RANK"]), 2)
    calls = 0

    def evaluate(candidates: Any, threshold: float | None = None) -> Any:
        nonlocal calls
        calls += 1
        if candidates and isinstance(candidates[0], Formula):
            return [Evaluation(one, 3.0) for one in candidates]
        if calls == 2 and trouble == f"coarse, raise{rank}":
            raise ValueError("stopped within the candidates for the full fitness")
        if calls == 4 and trouble == f"raise{rank}":
            raise ValueError(f"no such document, says {rank}")
        if calls == 4 and trouble == f"die{rank}":
            os._exit(7)
        return measure(candidates)

    def make_search() -> Search:
        assert rank == 0
        if trouble == "refuse":
            raise ValueError("the folder is another run's")
        return EvolutionarySearch(small_space(), SMALL, folder, **sifted(trouble))

    best = run_distributed(make_search, evaluate, coarse=near, racing=trouble == "race")
    assert best is not None
    print("BEST", best.fitness, calls)
    dist.destroy_process_group()


def run_ranks(folder: Path, trouble: str = "") -> list[tuple[int, str]]:
    """Exit status and output of both ranks, which are forked: they have the imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork_rank(rank, port, folder, trouble) for rank in range(2)]
    status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    return [(status[rank], output_of(folder, rank).read_text()) for rank in range(2)]


def output_of(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}-rank{rank}")


def fork_rank(rank: int, port: int, folder: Path, trouble: str) -> int:
    """The process id of one rank, with torchrun's variables."""
    process = os.fork()
    if process:
        return process
    signal.alarm(100)  # whatever happens, it ends
    rest = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(rest, RANK=str(rank), LOCAL_RANK=str(rank))
    status = 1
    with open(output_of(folder, rank), "w") as output, contextlib.redirect_stdout(output):
        try:
            child(str(folder), trouble)
            status = 0
        except Exception as error:
            print(error)
    os._exit(status)


@pytest.fixture(scope="module")
def whole() -> EvolutionarySearch:
    search = EvolutionarySearch(small_space(), SMALL)
    run_search(search, measure)
    return search


def assert_whole(ranks: list[tuple[int, str]], folder: Path, whole: EvolutionarySearch) -> None:
    assert whole.best is not None
    for status, output in ranks:
        assert status == 0, output
        assert f"BEST {whole.best.fitness} " in output
    with EvolutionarySearch(small_space(), SMALL, folder) as search:
        assert search.done
        assert search.evaluations == whole.evaluations


def test_two_ranks_share_the_work_and_agree(tmp_path: Path, whole: EvolutionarySearch) -> None:
    ranks = run_ranks(tmp_path, "race")
    assert_whole(ranks, tmp_path, whole)
    calls = [int(output.split()[-1]) for _, output in ranks]
    assert calls == [22, 22]  # 44 candidates


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_ends_all_ranks_and_the_resume_goes_on(
    rank: int, tmp_path: Path, whole: EvolutionarySearch
) -> None:
    for status, output in run_ranks(tmp_path, f"raise{rank}"):
        assert status == 1
        assert f"rank {rank}: ValueError: no such document, says {rank}; what was told" in output
    with EvolutionarySearch(small_space(), SMALL, tmp_path) as search:
        assert search.evaluated == 7  # three rounds, and the other rank's of the fourth
    assert_whole(run_ranks(tmp_path), tmp_path, whole)


@pytest.mark.parametrize("trouble", ["coarse", "coarse, raise1"])
def test_two_ranks_sift_as_one_process_does(trouble: str, tmp_path: Path) -> None:
    alone = EvolutionarySearch(small_space(), SMALL, tmp_path / "alone", **sifted("coarse"))
    full = lambda cs: [Evaluation(c, 3.0) if not c.factors else measure([c])[0] for c in cs]  # noqa: E731
    with alone:
        run_search(alone, full, coarse=near)
    shared = tmp_path / "shared"
    ranks = run_ranks(shared, trouble)
    if trouble != "coarse":
        assert [status for status, _ in ranks] == [1, 1]
        assert "stopped within the candidates" in ranks[0][1]
        ranks = run_ranks(shared, "coarse")
    assert alone.best is not None
    for status, output in ranks:
        assert status == 0, output
        assert f"BEST {alone.best.fitness} " in output
    with EvolutionarySearch(small_space(), SMALL, shared, **sifted("coarse")) as search:
        assert search.done
        assert search.evaluations == alone.evaluations
        assert search.correlation == alone.correlation
        assert search.judged == alone.judged


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_other(rank: int, tmp_path: Path, whole: EvolutionarySearch) -> None:
    ranks = run_ranks(tmp_path, f"die{rank}")
    assert ranks[rank][0] == 7
    status, output = ranks[1 - rank]
    assert status == 1
    assert f"rank {1 - rank}: another rank died or did not answer in time" in output
    assert "start the same command again to go on" in output
    with EvolutionarySearch(small_space(), SMALL, tmp_path) as search:
        assert search.evaluated == 6 + rank
        run_search(search, measure)
        assert search.evaluations == whole.evaluations


def test_a_search_that_cannot_begin_ends_all_ranks(tmp_path: Path) -> None:
    for status, output in run_ranks(tmp_path, "refuse"):
        assert status == 1
        assert "the folder is another run's" in output


def test_one_process_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_ranks() == (0, 1)
