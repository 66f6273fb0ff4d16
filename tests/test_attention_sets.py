"""Several factor sets in one call of `attention`, and packed sequences of any lengths."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Backend, Case, check, every_case, every_forward, forwards_of_scores
from attention_truth import Call, assert_lse_close, bf16, fp16
from cases import two_sets
from tolerance import assert_close

from longrope_kernels import Rope

# 4096 tokens are short, 4097 long; the first set has no threshold and the second one of 7.
MIXED = [
    Case(4, lengths=(4096, 4097, 1, 2**31 - 1), dtype=bf16, dim=64),
    Case(2, sets=(1, 0), layout="bhsd", dim=96, pairs=20),
    Case(2, 5, 40, lengths=(4096, 4097), heads=6, kv_heads=1),
    Case(2, lengths=(4097, 4095), causal=False, window=4, dtype=fp16, interleaved=True),
    Case(3, sets=(0, 1, 1), kv_start=(5, 0, 19), dtype=bf16),
    Case(3, 20, 9, lengths=(10, 5000, 10), layout="bhsd", dim=80, dtype=bf16),
    Case(2, sets=(1, 0), softcap=2.0, return_lse=True),
]
PACKED = [
    Case(counts=(19,)),
    Case(counts=(1,) * 9, dtype=bf16),
    Case(counts=(0, 5, 0, 0, 13, 1, 0), dim=64),
    Case(counts=(63, 1, 66), heads=2, kv_heads=1, dim=128, dtype=bf16),
    Case(counts=(7, 0, 12), causal=False, dtype=fp16, heads=3, kv_heads=3),
    Case(counts=(20, 9), window=4, pairs=9, interleaved=True),
    Case(counts=(20, 9), window=4, causal=False, dtype=bf16),
    Case(counts=(11, 0, 8), lengths=(4096, 4097, 4097), dtype=bf16, dim=96),
    Case(counts=(11, 8), sets=(1, 0), scale=0.3),
    Case(counts=(4, 9, 2), lengths=(5000, 5, 4096), softcap=1.5, return_lse=True),
]
PACKED_CHUNKS = [
    Case(counts=(3, 5), counts_k=(9, 5)),
    Case(counts=(3, 0, 5, 2), counts_k=(9, 4, 0, 2), dtype=bf16, dim=64),
    Case(counts=(9, 1), counts_k=(2, 30), causal=False, dtype=fp16),
    Case(counts=(9, 4), counts_k=(4, 9), window=3),
    Case(counts=(9, 4), counts_k=(4, 9), window=3, causal=False, dim=80, dtype=bf16),
    Case(counts=(3, 5), counts_k=(5, 3), lengths=(4096, 4097), heads=3, kv_heads=1),
    Case(counts=(3, 0, 5), counts_k=(7, 2, 20), sets=(1, 1, 0), dtype=bf16, return_lse=True),
]
PACKED_PADDING = [
    Case(counts=(9, 4, 6), kv_start=(2, 0, 5)),
    Case(counts=(9, 0, 6), kv_start=(9, 3, 100), dtype=bf16, causal=False),
    Case(counts=(3, 5), counts_k=(9, 12), kv_start=(8, 4), dtype=fp16, window=6),
    Case(counts=(9, 6), kv_start=(4, 1), lengths=(5, 5000), return_lse=True),
]


def packed(cases: list[Case]) -> list[Case]:
    return [Case(**{**vars(case), "layout": "thd"}) for case in cases]


@every_case(MIXED)
def test_one_batch_mixes_sets(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case(packed([*PACKED, *PACKED_CHUNKS]))
def test_packed_sequences(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case(packed(PACKED_PADDING))
def test_kv_start_of_packed_sequences(backend: Backend, case: Case) -> None:
    """Slots count from the beginning of each sequence."""
    check(backend, case)


@pytest.mark.parametrize("sequences", [1, 2])
@every_forward
def test_one_token_more_than_short_is_long(backend: Backend, sequences: int) -> None:
    """The same tensors: 4096 gives what the short set alone gives, 4097 what the long one does."""
    case = backend.nearest(Case(sequences, 19))
    tensors, at, rope = case.tensors(), torch.arange(4078, 4097), two_sets(16)
    alone = [backend.attend(*tensors, at, Rope(one)) for one in rope.sets]
    assert not torch.equal(*alone)
    for length, wanted in ((4096, alone[0]), (4097, alone[1])):
        lengths = torch.full((sequences,), length)
        assert torch.equal(backend.attend(*tensors, at, rope, lengths=lengths), wanted)


@every_forward
def test_sets_win_over_lengths(backend: Backend) -> None:
    case = backend.nearest(Case(2, 9, 14))
    arguments = case.arguments()
    args = (*case.tensors(), arguments.pop("positions"), two_sets(16))
    sets = torch.tensor([1, 0], dtype=torch.int32)
    pinned = backend.attend(*args, **arguments, sets=sets)
    both = backend.attend(*args, **arguments, sets=sets, lengths=torch.tensor([5, 5000]))
    assert torch.equal(both, pinned)
    assert_close(pinned, Call(*args, **arguments, sets=sets).expected().out)
    other = backend.attend(*args, **arguments, lengths=torch.tensor([5, 5000]))
    assert not torch.equal(other, pinned)


@every_forward
def test_keys_take_the_set_of_their_own_sequence(backend: Backend) -> None:
    """Borders of q and k differ, and so does which token of either is in which sequence."""
    case = backend.nearest(Case(counts=(2, 9), counts_k=(12, 3), layout="thd"))
    arguments = case.arguments()
    args = (*case.tensors(), arguments.pop("positions"), two_sets(16))
    for lengths in ([5, 5000], [5000, 5]):
        chosen = torch.tensor(lengths)
        out = backend.attend(*args, **arguments, lengths=chosen)
        assert_close(out, Call(*args, **arguments, lengths=chosen).expected().out)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@every_forward
def test_index_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    """int32 and int64 serve alike for borders, lengths and kv_start."""
    case = backend.nearest(Case(counts=(4, 9), counts_k=(7, 9), layout="thd"))
    tensors, arguments = case.tensors(), case.arguments()
    arguments["lengths"], arguments["kv_start"] = torch.tensor([5000, 5]), torch.tensor([2, 0])
    expected = Call(*tensors, arguments["positions"], two_sets(16), **rest(arguments)).expected()
    arguments = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and "positions" not in name else x
        for name, x in arguments.items()
    }
    out = backend.attend(*tensors, arguments["positions"], two_sets(16), **rest(arguments))
    assert_close(out, expected.out)


def rest(arguments: dict[str, object]) -> dict[str, object]:
    return {name: x for name, x in arguments.items() if name != "positions"}


@every_forward
def test_packed_without_borders_is_one_sequence(backend: Backend) -> None:
    case = backend.nearest(Case(1, 19, layout="thd"))
    args = (*case.tensors(), case.arguments()["positions"], case.rope())
    one = backend.attend(*args, layout="thd", cu_seqlens=torch.tensor([0, 19]))
    assert torch.equal(backend.attend(*args, layout="thd"), one)


@every_forward
def test_one_packed_sequence_of_several_sets(backend: Backend) -> None:
    """No borders and a Rope of two sets: one length for all tokens."""
    case = backend.nearest(Case(1, 19, layout="thd"))
    args = (*case.tensors(), case.arguments()["positions"], two_sets(16))
    for length in (4096, 4097):
        arguments = {"layout": "thd", "lengths": torch.tensor([length])}
        assert_close(backend.attend(*args, **arguments), Call(*args, **arguments).expected().out)


@forwards_of_scores
def test_log_sum_exp_of_packed_sequences(backend: Backend) -> None:
    """(heads, tokens): each sequence its own columns, empty ones none."""
    case = backend.nearest(Case(counts=(4, 0, 9), counts_k=(2, 3, 9), layout="thd"))
    arguments = case.arguments()
    args = (*case.tensors(), arguments.pop("positions"), case.rope())
    _, lse = backend.attend(*args, **arguments, return_lse=True)
    assert_lse_close(lse, Call(*args, **arguments).expected().lse)
    assert (lse[:, :2] == -torch.inf).all()
    assert lse[:, 2:].isfinite().all()


@every_forward
def test_borders_of_the_keys_alone_may_differ_in_nothing(backend: Backend) -> None:
    """cu_seqlens_k equal to cu_seqlens, as a tensor of its own, beside key_positions."""
    case = backend.nearest(Case(counts=(4, 9), layout="thd"))
    arguments = case.arguments()
    positions = arguments.pop("positions")
    args = (*case.tensors(), positions, case.rope())
    wanted = backend.attend(*args, **arguments)
    borders = arguments["cu_seqlens"].clone()
    got = backend.attend(*args, **arguments, cu_seqlens_k=borders, key_positions=positions.clone())
    assert torch.equal(got, wanted)


@every_forward
def test_keys_of_other_borders_at_the_same_positions(backend: Backend) -> None:
    """A token of q and one of k at one place of a tensor are of sequences of two sets."""
    lengths = (4096, 4097)
    case = backend.nearest(Case(counts=(3, 5), counts_k=(5, 3), lengths=lengths, causal=False))
    case = Case(**{**vars(case), "layout": "thd"})
    arguments = case.arguments()
    positions = torch.arange(100, 108)[None]
    arguments |= {"positions": positions, "key_positions": positions}
    args = (*case.tensors(), arguments.pop("positions"), case.rope())
    assert_close(backend.attend(*args, **arguments), Call(*args, **arguments).expected().out)
