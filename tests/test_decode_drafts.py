"""Several queries of one sequence that lie across the boundaries of factor sets.

Drafts of speculative decoding are verified together. Each takes the set of its own length, so that
it gives what it gives step by step, whatever comes after it and is rejected or not.
"""

from __future__ import annotations

from typing import Any

import torch
from attention_truth import assert_lse_close
from decode_truth import (
    REFERENCE,
    Backend,
    Call,
    Case,
    assert_decoded,
    bf16,
    check,
    every_backend,
    every_case,
    fp16,
    fp64,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_kernels import Rope, decode

# The boundary inside, at the first query and at the last, and beside them.
ACROSS_ONE = [
    Case((21,), 2, boundary=20, dtype=bf16),
    Case((22, 23), 4, 4, 2, boundary=20, block=16),
    Case((20, 21, 24), 4, 2, 1, boundary=20, n_hat=18),
    Case((23, 24), 4, 2, 1, 48, 9, boundary=20, interleaved=True, block=5),
    Case((25,), 16, 2, 1, boundary=20, dtype=fp16, block=16),
    Case((35, 36), 16, 4, 4, 64, boundary=20, dtype=bf16, n_hat=30),
    Case((4097,), 2, 2, 1, boundary=4096, block=256),
    Case((4096, 4097), 3, 2, 1, boundary=4096, dtype=bf16),
    Case((40,), 8, 8, 1, boundary=36, dtype=bf16, block=16),
]
# Three sets, two of them in one call or all; the middle one is of a single length.
ACROSS_TWO = [
    Case((24,), 8, 2, 1, boundary=(19, 22), dtype=bf16),
    Case((23, 21, 19, 18), 5, 2, 1, boundary=(19, 20), block=16),
    Case((30, 9), 16, 4, 2, 80, 16, boundary=(20, 25), n_hat=17, dtype=fp16),
    Case((24,), 16, 4, 1, boundary=(12, 13), interleaved=True, n_hat=9),
]
# Padding moves the boundary; windows and renumbered keys change what a query sees of either side.
MASKED = [
    Case((25, 30, 21), 5, 2, 1, boundary=20, kv_start=(4, 9, 0), block=16),
    Case((9, 9), 8, 2, 1, boundary=3, kv_start=(6, 2), dtype=bf16),
    Case((40, 23), 6, 2, 1, boundary=20, window=3, block=16),
    Case((70, 22), 4, 4, 1, boundary=(20, 68), window=33, dtype=bf16, softcap=3.0),
    Case((22, 40), 3, 2, 1, boundary=20, positions="sinks", n_hat=1010, dtype=fp16),
    Case((22, 9), 4, 2, 1, boundary=(20, 21), positions="any", block=16, n_hat=128),
    Case((22,), 4, 2, 1, 64, boundary=20, dtype=bf16, float8=True, block=16),
    Case((3, 1), 5, 2, 1, boundary=2, dtype=bf16),
]
# One length for all queries of a sequence, or one each, in any order.
GIVEN = [
    Case((22, 22), 4, 2, 1, boundary=20, lengths=(20, 21), block=16),
    Case((22, 22), 4, 2, 1, boundary=20, lengths=(5000, 1), dtype=bf16, index=torch.int64),
    Case((22, 9), 3, 4, 2, boundary=20, lengths=((20, 21, 20), (21, 0, 5000)), dtype=bf16),
    Case((22,), 3, 2, 1, boundary=(20, 30), lengths=((31, 3, 25),), index=torch.int64),
    Case((9, 22), 1, 2, 1, boundary=20, lengths=((21,), (20,)), block=16),
    Case((22, 22), 4, 2, 1, boundary=20, sets=(1, 0), lengths=((1, 50, 1, 50), (50, 1, 50, 1))),
]


@every_case(ACROSS_ONE)
def test_across_one_boundary(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case(ACROSS_TWO)
def test_across_two_boundaries(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case(MASKED)
def test_masks_and_positions(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case(GIVEN)
def test_lengths_that_are_given(backend: Backend, case: Case) -> None:
    check(backend, case.call())


def steps(call: Call, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same queries one by one, each with the keys up to its own: float64 in the reference."""
    queries, outs, lses = call.q.shape[1], [], []
    for t in range(queries):
        one = {**call.arguments, "q": call.q[:, t : t + 1].double()}
        one["cache_lens"] = (one["cache_lens"] - (queries - 1 - t)).clamp(min=0)
        for name in ("k_cache", "v_cache"):
            one[name] = one[name].double()
        out, lse = decode(**one, **more, backend="reference", return_lse=True)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def test_the_truth_is_step_by_step() -> None:
    for case in (*ACROSS_ONE[:4], *ACROSS_TWO, *MASKED[:5]):
        call = case.call()
        out, lse = steps(call)
        ref64 = call.truth()
        torch.testing.assert_close(out, ref64[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(lse, ref64[1], rtol=1e-9, atol=1e-11)
        # And not all under the set of the last one.
        if len(set(call.sequences[0].chosen)) > 1:
            last = torch.tensor([one.chosen[-1] for one in call.sequences]).int()
            other = Call(**call.arguments, sets=last).truth()[0]
            assert (other - ref64[0])[0, 0].abs().max() > 1e-3


@every_case([ACROSS_TWO[0], ACROSS_ONE[1]])
def test_rejected_drafts_do_not_matter(backend: Backend, case: Case) -> None:
    """Not to the factor set of those before them: a shorter call gives the same."""
    call = case.call()
    expected = call.expected()
    for kept in range(1, case.queries):
        arguments = {**call.arguments, "q": call.q[:, :kept]}
        arguments["cache_lens"] = arguments["cache_lens"] - (case.queries - kept)
        out, lse = backend.decode(**arguments, return_lse=True)
        cut = type(expected.out)(*(x[:, :kept] for x in expected.out))
        assert_decoded(out, cut)
        assert_lse_close(lse, type(expected.lse)(*(x[..., :kept] for x in expected.lse)))


@every_backend
def test_one_length_is_that_length_for_each_query(backend: Backend) -> None:
    """(batch,) and (batch, q_len) that repeats it: the same bits; strides of 0 too."""
    call = backend.nearest(Case((22, 23), 3, 2, 1, boundary=(20, 21), block=16)).call()
    lengths = torch.tensor([21, 30])
    wanted = backend.decode(**call.arguments, lengths=lengths)
    each = lengths[:, None].expand(-1, 3)
    first = backend.decode(**call.arguments, lengths=each)
    assert_decoded(first, Call(**call.arguments, lengths=lengths).expected().out)
    for same in (each.contiguous(), each.T.contiguous().T, each.int()):
        assert torch.equal(backend.decode(**call.arguments, lengths=same), first)
    assert not torch.equal(wanted, backend.decode(**call.arguments))


@every_backend
def test_one_set_takes_lengths_of_queries_and_reads_none(backend: Backend) -> None:
    given = backend.nearest(Case((9, 3), 2)).call().arguments
    wanted = backend.decode(**given)
    out = backend.decode(**given, lengths=torch.tensor([[1, 5000], [7, 2**31 - 1]]))
    assert torch.equal(out, wanted)


@settings(max_examples=60)
@given(
    lens=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    queries=st.integers(1, 16),
    first=st.integers(1, 30),
    more=st.integers(1, 8),
    start=st.integers(0, 12),
    window=st.none() | st.integers(1, 20),
)
def test_any_drafts_in_the_reference_equal_step_by_step(
    lens: list[int], queries: int, first: int, more: int, start: int, window: int | None
) -> None:
    """In float64, and by the set that `Rope.set_index` gives for each length."""
    case = Case(tuple(lens), queries, 2, 1, 8, boundary=(first, first + more), window=window)
    call = Case(**{**vars(case), "dtype": fp64, "kv_start": (start,) * len(lens)}).call()
    out, lse = REFERENCE.decode(**call.arguments, return_lse=True)
    wanted = steps(call)
    torch.testing.assert_close(out, wanted[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-9, atol=1e-11)
    rope, starts = call.rope, [start] * len(lens)
    assert isinstance(rope, Rope)
    for one, length, hidden in zip(call.sequences, lens, starts, strict=True):
        own = [max(length - hidden - (queries - 1 - t), 0) for t in range(queries)]
        assert one.chosen == tuple(map(rope.set_index, own))
