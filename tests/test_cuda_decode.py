"""What only the CUDA `decode` has: chunks of 16 dimensions, staged rows, blocks, splits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_truth import COMPILED, Call, Case, bf16, check, fp8, fp16, same

from longrope_kernels.backends.cuda import decode as cuda_decode
from longrope_kernels.kernels.splits import Splits, choose_splits, counters_for


def of(case: Case) -> None:
    check(COMPILED, case.call())


# In whole chunks, with a chunk of pairs that is not full, with nothing after it and with much; of
# each size of kernel.
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("dim", "pairs"),
    [(64, 32), (64, 24), (64, 8), (40, 13), (64, 31), (128, 48), (104, 52), (96, 40), (256, 127)],
)
def test_chunks(dim: int, pairs: int, interleaved: bool) -> None:
    of(Case((19,), 1, 2, 1, dim, pairs, dtype=bf16, interleaved=interleaved))


@pytest.mark.parametrize("pairs", [16, 13])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_chunks_of_float8(dtype: torch.dtype, pairs: int) -> None:
    of(Case((19,), 1, 2, 1, 64, pairs, dtype=dtype, float8=True))


@pytest.mark.parametrize(("groups", "queries"), [(8, 1), (9, 1), (3, 3), (2, 8)])
def test_rows_of_a_block(groups: int, queries: int) -> None:
    of(Case((20,), queries, groups, 1, 32, dtype=bf16))


@pytest.mark.parametrize("keys", [63, 64, 65, 192, 300])
def test_splits(keys: int) -> None:
    of(Case((keys, 1), 1, 1, 1, 16, dtype=bf16, block=48))


def test_rows_that_begin_between_pieces() -> None:
    """Staged rows are those of a cache whose rows are whole pieces."""
    case = Case((19,), 2, 2, 1, 64, dtype=bf16)
    for one in (case, replace(case, float8=True)):
        given = dict(one.call().arguments)
        for name in ("k_cache", "v_cache"):
            x = given[name]
            row = torch.nn.functional.pad(same(x), (1, 2))
            given[name] = row[..., 1:-2].view(x.dtype) if x.dtype == fp8 else row[..., 1:-2]
        check(COMPILED, Call(**given))


def test_splits_fill_a_device_and_no_more() -> None:
    """132 multiprocessors of 3 blocks; a sequence of 32 tiles has 16 splits of two at most."""
    assert choose_splits(8, 1, 2048, 64, 396, 2) == Splits(16, 16, 2)
    assert choose_splits(8, 1, 2**20, 64, 396, 2).even * 8 <= 396
    assert choose_splits(4096, 512, 2**20, 64, 396, 2).even <= 8
    assert choose_splits(2, 2, 64, 64, 396, 2) == Splits(1, 1, 2)


@pytest.mark.parametrize("queries", [1, 5])
def test_the_last_block_combines(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves what it counted in at 0: the next launch is right, too."""
    case = Case((300, 65, 130), queries, 16, 2, 64, dtype=bf16, boundary=129, n_hat=20)
    counters: list[torch.Tensor] = []

    def counted(q: torch.Tensor, count: int) -> torch.Tensor:
        counters.append(counters_for(q, count))
        return counters[-1]

    monkeypatch.setattr(cuda_decode, "counters_for", counted)
    call = case.call()
    for _ in range(2):
        check(COMPILED, call)
        assert not counters[-1].any()
