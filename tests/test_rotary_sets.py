"""Several factor sets in one batch: chosen by length, pinned by sets, packed by cu_seqlens."""

from __future__ import annotations

import pytest
import torch
import truth
from cases import Shape, Target, every_target, factors, positions_for, two_sets
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope

both_int_dtypes = pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)


def three_sets(pairs: int, **kwargs: bool) -> Rope:
    """Everything differs from set to set, so that no mixture of two passes for a third."""
    return Rope(
        (
            FactorSet(factors(pairs, 1.1), 0, 1.0, 4096),
            FactorSet(factors(pairs, 3.3), 64, 1.5, 131072),
            FactorSet(factors(pairs, 17.0), 4000, 0.75, 262144),
        ),
        **kwargs,
    )


def check(
    target: Target,
    shape: Shape,
    rope: Rope,
    positions: torch.Tensor,
    **selection: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k = shape.qk()
    outs = target.rotary(q, k, positions, rope, layout=shape.layout, **selection)
    for name, x, out in (("q", q, outs[0]), ("k", k, outs[1])):
        expected = truth.rotary(x, positions, rope, layout=shape.layout, **selection)
        assert_close(out, expected, name)
    return outs


@both_int_dtypes
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@every_target
def test_lengths_choose_each_sequence_its_own_set(
    target: Target, layout: str, dtype: torch.dtype
) -> None:
    """4096 tokens are short and 4097 long; beyond the last bound the last set serves."""
    lengths = [4096, 4097, 131072, 131073, 262144, 262145, 1, 0, 2**31 - 1]
    shape = Shape(len(lengths), 18, 2, 1, 24, layout=layout)
    positions = positions_for(18 * shape.batch, 4000).reshape(shape.batch, 18)
    lengths = torch.tensor(lengths, dtype=dtype)
    check(target, shape, three_sets(12), positions, lengths=lengths)


@every_target
def test_the_boundary_between_short_and_long_is_strict(target: Target) -> None:
    """One token more than the original length and only that sequence changes."""
    rope = two_sets(16)
    shape = Shape(3, 5, 2, 1, 32)
    q, k = shape.qk()
    q[:], k[:] = q[:1].clone(), k[:1].clone()
    positions = torch.arange(4092, 4097)
    lengths = torch.tensor([4096, 4097, 4095])
    out, _ = target.rotary(q, k, positions, rope, lengths=lengths)
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])
    short, _ = target.rotary(q, k, positions, Rope(rope.sets[0]))
    long, _ = target.rotary(q, k, positions, Rope(rope.sets[1]))
    assert torch.equal(out[0], short[0])
    assert torch.equal(out[1], long[1])


@every_target
def test_length_counts_and_not_positions_or_tokens_of_this_call(target: Target) -> None:
    """One token of decode at position 9 of a sequence said to be long is rotated as long."""
    shape = Shape(2, 1, 2, 1, 32)
    check(target, shape, two_sets(16), torch.tensor([9]), lengths=torch.tensor([5000, 10]))


@every_target
def test_sets_pin_and_win_over_lengths(target: Target) -> None:
    shape = Shape(4, 7, 2, 1, 32, interleaved=True)
    rope = three_sets(16, interleaved=True)
    positions = positions_for(28, 64).reshape(4, 7)
    sets = torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    lengths = torch.tensor([1, 10**6, 10**6, 1])
    outs = check(target, shape, rope, positions, sets=sets)
    torch.manual_seed(0)
    positions_for(28, 64)  # the same random state as before the first call's tensors
    q, k = shape.qk()
    alone = target.rotary(q, k, positions, rope, sets=sets)
    beside = target.rotary(q, k, positions, rope, sets=sets, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert outs[0].shape == alone[0].shape


@both_int_dtypes
@every_target
def test_packed_sequences_with_empty_ones_between(target: Target, dtype: torch.dtype) -> None:
    """Empty sequences first, last, between and two in a row; their lengths must choose nothing."""
    counts = [0, 3, 0, 0, 5, 1, 0, 26, 1, 0]
    lengths = [99999, 4096, 5000, 1, 4097, 200000, 5, 131072, 131073, 4097]
    bounds = torch.tensor([0, *counts]).cumsum(0).to(dtype)
    tokens = sum(counts)
    shape = Shape(1, tokens, 2, 1, 24, layout="thd")
    positions = positions_for(tokens, 4000)
    check(
        target,
        shape,
        three_sets(12),
        positions,
        lengths=torch.tensor(lengths, dtype=dtype),
        cu_seqlens=bounds,
    )


@every_target
def test_packed_sequences_longer_than_a_tile(target: Target) -> None:
    shape = Shape(1, 301, 1, 1, 16, layout="thd", dtype=torch.bfloat16)
    bounds = torch.tensor([0, 1, 130, 257, 258, 301], dtype=torch.int32)
    sets = torch.tensor([1, 0, 2, 0, 1], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()]) + 3990
    check(target, shape, three_sets(8), positions, sets=sets, cu_seqlens=bounds)


@every_target
def test_many_packed_sequences_of_one_token(target: Target) -> None:
    tokens = 150
    shape = Shape(1, tokens, 1, 1, 16, layout="thd")
    sets = torch.randint(0, 3, (tokens,), dtype=torch.int32)
    bounds = torch.arange(tokens + 1, dtype=torch.int32)
    positions = positions_for(tokens, 4000, torch.int32)
    check(target, shape, three_sets(8), positions, sets=sets, cu_seqlens=bounds)


@every_target
def test_packed_tokens_without_cu_seqlens_are_one_sequence(target: Target) -> None:
    shape = Shape(1, 7, 2, 1, 32, layout="thd")
    check(target, shape, two_sets(16), positions_for(7, 7), lengths=torch.tensor([4097]))


@every_target
def test_packed_sequences_of_no_tokens_at_all(target: Target) -> None:
    shape = Shape(1, 0, 2, 1, 32, layout="thd")
    check(
        target,
        shape,
        two_sets(16),
        torch.zeros(0, dtype=torch.int32),
        lengths=torch.tensor([4097, 3]),
        cu_seqlens=torch.tensor([0, 0, 0]),
    )


@every_target
def test_strided_selection_tensors(target: Target) -> None:
    """Views with gaps, as a slice of a larger table gives them."""
    shape = Shape(4, 3, 2, 1, 32)
    lengths = torch.tensor([[1, 5000], [5000, 1], [4097, 7], [4096, 9000]])[:, 0]
    check(target, shape, two_sets(16), positions_for(3, 7), lengths=lengths)
    sets = torch.tensor([1, 9, 0, 9, 0, 9, 1, 9], dtype=torch.int32)[::2]
    check(target, shape, two_sets(16), positions_for(3, 7), sets=sets)
    packed = Shape(1, 9, 2, 1, 32, layout="thd")
    bounds = torch.tensor([[0, 1], [2, 1], [2, 1], [5, 1], [9, 1]])[:, 0]
    check(target, packed, two_sets(16), positions_for(9, 7), sets=sets, cu_seqlens=bounds)


@every_target
def test_one_set_needs_no_selection_and_takes_any(target: Target) -> None:
    shape = Shape(2, 5, 2, 1, 32)
    positions, rope = positions_for(5, 128), shape.rope()
    q, k = shape.qk()
    plain = target.rotary(q, k, positions, rope)
    named = target.rotary(q, k, positions, rope, lengths=torch.tensor([5, 10**6]))
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))


@every_target
def test_batch_of_zero_with_several_sets(target: Target) -> None:
    shape = Shape(0, 5, 2, 1, 32)
    lengths = torch.zeros(0, dtype=torch.int64)
    check(target, shape, two_sets(16), torch.arange(5), lengths=lengths)


@every_target
def test_more_sets_than_fit_a_small_table(target: Target) -> None:
    """Nine sets; each sequence of the batch takes another."""
    sets = [FactorSet(factors(8, 1.0 + i), i, 1.0 + i / 16, 100 * (i + 1)) for i in range(9)]
    shape = Shape(9, 4, 1, 1, 16)
    lengths = torch.arange(9).flip(0) * 100 + 100
    check(target, shape, Rope(tuple(sets)), positions_for(36, 5).reshape(9, 4), lengths=lengths)
