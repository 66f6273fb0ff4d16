"""Laws of `decode`, and shapes and features nobody wrote down together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attention_truth
import pytest
import torch
from attention_truth import assert_lse_close
from cases import factors, two_sets
from decode_truth import (
    NATIVE,
    REFERENCE,
    TRITON,
    Backend,
    Call,
    Case,
    assert_decoded,
    bf16,
    check,
    every_backend,
    every_case,
    fp16,
    fp32,
    nans,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope, apply_rotary, attention


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Any sizes from nothing on, and any features that can meet."""
    lens = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    kv_heads, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 12))

    def for_each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        if not lens or draw(st.booleans()):
            return ()
        return tuple(draw(st.lists(values, min_size=len(lens), max_size=len(lens))))

    return Case(
        lens,
        draw(st.sampled_from([1, 1, 2, 5, 16])),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        2 * pairs + draw(st.sampled_from([0, 0, 1, 6])),
        pairs,
        draw(st.sampled_from([0, 1, 3, 8, 16, 64])),
        draw(st.sampled_from([fp32, bf16, fp16])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.one_of(st.none(), st.integers(1, 45))),
        draw(st.sampled_from([None, None, 0.5, 20.0])),
        draw(st.sampled_from([None, 0.2])),
        for_each(st.integers(0, 45)),
        draw(st.sampled_from(["", "", "sinks", "any", "top"])),
        draw(st.sampled_from([0, 7, 20])),
        for_each(st.sampled_from([0, 7, 8, 5000])),
        for_each(st.integers(0, 1)),
        draw(st.sampled_from([0, 1, 16, 128, 4096])),
        draw(st.sampled_from([1.0, 1.19])),
        draw(st.sampled_from([torch.int32, torch.int64])),
        draw(st.booleans()),
    )


def check_any(backend: Backend, case: Case) -> None:
    torch.manual_seed(0)
    check(backend, replace(backend.nearest(case), float8=case.float8 and backend.float8).call())


@settings(max_examples=60)
@given(any_case())
@pytest.mark.parametrize("backend", [REFERENCE, NATIVE], ids=str)
def test_any_case(backend: Backend, case: Case) -> None:
    check_any(backend, case)


@settings(max_examples=12)
@given(any_case())
def test_any_case_in_triton(case: Case) -> None:
    if TRITON.slow:
        case = replace(case, lens=case.lens[:1], heads=case.heads // case.kv_heads, kv_heads=1)
        names = ("kv_start", "lengths", "sets")
        case = replace(case, **{name: getattr(case, name)[: len(case.lens)] for name in names})
    check_any(TRITON, case)


def dense(call: Call) -> Call:
    """The same keys without blocks, NaN past each length."""
    made = dict(call.arguments)
    table, lens = made.pop("block_table"), made["cache_lens"].tolist()
    for name in ("k_cache", "v_cache"):
        cache = made[name]
        x = nans((len(lens), max(lens, default=0) + 1, *cache.shape[2:]), cache.dtype)
        for b, length in enumerate(lens):
            for j in range(length):
                block, at = divmod(j, cache.shape[1])
                same(x)[b, j] = same(cache)[table[b, block], at]
        made[name] = x
    return Call(**made)


@every_case(
    [
        Case((9, 33), 2, block=16, dtype=bf16),
        Case((20, 9, 0), 5, block=16, window=7, kv_start=(3, 1, 0), positions="any"),
        Case((21, 8, 20), block=8, boundary=20, float8=True, dtype=fp16),
        Case((70, 3), block=32, interleaved=True, softcap=2.0, heads=2),
    ]
)
def test_paged_equals_dense(backend: Backend, case: Case) -> None:
    """Tiles may differ between them, so they take the rule."""
    call = case.call()
    expected = call.expected()
    for each in (call, dense(call)):
        out, lse = backend.decode(**each.arguments, return_lse=True)
        assert_decoded(out, expected.out)
        assert_lse_close(lse, expected.lse)


@every_case(
    [
        Case((20, 33), 2, block=16, dtype=bf16),
        Case((9, 20, 10), block=4, boundary=10, positions="sinks"),
        Case((64, 10, 40), block=4, boundary=40, positions="sinks"),
    ]
)
def test_where_blocks_lie_does_not_matter(backend: Backend, case: Case) -> None:
    """Not a bit, in a pool of another size either."""
    given = dict(case.call().arguments)
    wanted = backend.decode(**given, return_lse=True)
    blocks = given["k_cache"].shape[0]
    order = torch.randperm(blocks + 3)[:blocks]
    for name in ("k_cache", "v_cache"):
        pool = nans((blocks + 3, *given[name].shape[1:]), given[name].dtype)
        same(pool)[order] = same(given[name])
        given[name] = pool
    table = given["block_table"].long()
    real = (table >= 0) & (table < blocks)
    given["block_table"] = torch.where(real, order[table.clamp(0, blocks - 1)], -7).int()
    for got, one in zip(backend.decode(**given, return_lse=True), wanted, strict=True):
        assert torch.equal(got, one)


@every_case(
    [
        Case((21, 9, 0), 2, boundary=10, kv_start=(0, 7, 2), block=16, dtype=bf16),
        Case((41, 20, 40, 0), 2, boundary=40, kv_start=(0, 7, 30, 2), block=16),
        Case((20, 9, 17), 1, positions="any", softcap=3.0, lengths=(3, 50, 40), boundary=40),
    ]
)
def test_a_batch_equals_its_sequences_one_by_one(backend: Backend, case: Case) -> None:
    call = case.call()
    expected = call.expected()
    whole = ("factors", "k_cache", "v_cache") if case.block else ("factors",)
    for b in range(len(case.lens)):
        one = {
            name: x[b : b + 1] if isinstance(x, torch.Tensor) and name not in whole else x
            for name, x in call.arguments.items()
        }
        out, lse = backend.decode(**one, return_lse=True)
        part = slice(b, b + 1)
        assert_decoded(out, type(expected.out)(*(x[part] for x in expected.out)))
        assert_lse_close(lse, type(expected.lse)(*(x[part] for x in expected.lse)))


@every_case(
    [
        Case((20, 33), 2, boundary=40, block=16, dtype=bf16),
        Case((9, 9), 5, boundary=40, kv_start=(0, 5)),
    ]
)
def test_neighbours_do_not_matter(backend: Backend, case: Case) -> None:
    """Not a bit: what the other sequence asks, holds, and which set it takes."""
    call = case.call()
    lengths = torch.tensor(case.lens)
    wanted = backend.decode(**call.arguments, lengths=lengths)
    given = dict(call.arguments)
    given["q"] = given["q"].clone()
    given["q"][1] *= -30
    lengths[1] = 5000
    out = backend.decode(**given, lengths=lengths)
    assert torch.equal(out[0], wanted[0])
    assert not torch.equal(out[1], wanted[1])


def written(
    k: torch.Tensor, v: torch.Tensor, block: int, kv_start: torch.Tensor | None = None
) -> dict[str, Any]:
    """Caches that hold k and v (batch, tokens, kv_heads, dim), paged where ``block`` is not 0."""
    if not block:
        return {"k_cache": k, "v_cache": v}
    batch, tokens = k.shape[:2]
    count = -(-tokens // block)
    order = torch.randperm(batch * count)
    made: dict[str, Any] = {}
    for name, x in (("k_cache", k), ("v_cache", v)):
        padded = nans((batch, count * block, *x.shape[2:]), x.dtype)
        padded[:, :tokens] = x
        pool = torch.empty(batch * count, block, *x.shape[2:], dtype=x.dtype)
        pool[order] = padded.unflatten(1, (count, block)).flatten(0, 1)
        made[name] = pool
    return {**made, "block_table": order.view(batch, count).int()}


STEPS = [
    pytest.param(0, (1,) * 9, None, id="one-by-one"),
    pytest.param(4, (1, 5, 1, 13), None, id="paged-chunks"),
    pytest.param(16, (16, 1, 3), 6, id="paged-window"),
    pytest.param(0, (7, 2, 12), 3, id="window"),
]


@pytest.mark.parametrize(("block", "chunks", "window"), STEPS)
@every_backend
def test_step_by_step_equals_one_prefill(
    backend: Backend, block: int, chunks: tuple[int, ...], window: int | None
) -> None:
    """The same tokens by `attention` with the set pinned, one sequence padded on the left."""
    dtype, tokens = backend.dtypes[0], sum(chunks)
    q, k, v = (torch.randn(2, tokens, h, 32).to(dtype) for h in (2, 1, 1))
    rope, starts = two_sets(16), torch.tensor([0, 6])
    sets = torch.tensor([1, 0], dtype=torch.int32)
    at = torch.arange(tokens) - starts[:, None]
    more: dict[str, Any] = {"sets": sets, "kv_start": starts, "window": window}
    expected = attention_truth.Call(q, k, v, at, rope, **more).expected().out
    assert_close(attention(q, k, v, at, rope, **more), expected)
    caches, outs, length = written(k, v, block), [], 0
    for count in chunks:
        length += count
        chunk, lens = q[:, length - count : length], torch.full((2,), length)
        outs.append(backend.decode(chunk, cache_lens=lens, factors=rope, **caches, **more))
    assert_close(torch.cat(outs, 1), expected)


@every_case(
    [
        Case((18,), 4, 2, 1, block=16, dtype=bf16),
        Case((33, 4, 2), 4, window=3, kv_start=(2, 1, 0), sets=(1, 0, 1)),
        Case((33, 40), 4, positions="any", softcap=2.0, block=8, dtype=fp16),
    ]
)
def test_four_queries_equal_four_calls_of_one(backend: Backend, case: Case) -> None:
    """The keys after a query are there already in one case, and not counted in the other."""
    call = case.call()
    expected = call.expected()
    outs, lses = [], []
    for t in range(4):
        given = {**call.arguments, "q": call.q[:, t : t + 1]}
        given["cache_lens"] = (given["cache_lens"] - 3 + t).clamp(min=0)
        out, lse = backend.decode(**given, return_lse=True)
        outs.append(out)
        lses.append(lse)
    assert_decoded(torch.cat(outs, 1), expected.out)
    assert_lse_close(torch.cat(lses, 2), expected.lse)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("shift", [1, 4096, 131072, 2**21, 2**31 - 200, -(2**30)])
@every_backend
def test_shifting_all_positions_changes_nothing(
    backend: Backend, shift: int, interleaved: bool
) -> None:
    """With no threshold and one set; the expected output is that of the positions unshifted."""
    call = backend.nearest(Case((20, 9), 2, 2, 1, block=16)).call()
    given = dict(call.arguments)
    given["factors"] = Rope(FactorSet(factors(16), 0, 1.19), interleaved=interleaved)
    expected = Call(**given).expected()
    at = (torch.arange(20) + shift).expand(2, -1)
    out, lse = backend.decode(**given, key_positions=at, return_lse=True)
    assert_decoded(out, expected.out)
    assert_lse_close(lse, expected.lse)


@every_backend
def test_shifting_across_the_threshold_changes_much(backend: Backend) -> None:
    """The law above is not true of everything."""
    given = backend.nearest(Case((20,), n_hat=128)).call().arguments
    low, high = (
        backend.decode(**given, key_positions=torch.arange(20)[None] + shift) for shift in (0, 128)
    )
    assert (low - high).abs().max() > 0.01


@every_case([Case((3, 9), 2, dtype=bf16), Case((33, 20), n_hat=16, positions="sinks")])
def test_left_padding_moves_nothing(backend: Backend, case: Case) -> None:
    """kv_start hides the padding and numbers what follows as if it were not there."""
    call = case.call()
    expected = call.expected()
    given = dict(call.arguments)
    starts = torch.tensor([5, 16])
    for name in ("k_cache", "v_cache", "key_positions"):
        if name in given:
            x = given[name]
            moved = torch.full((2, x.shape[1] + 16, *x.shape[2:]), 77, dtype=x.dtype)
            for b, start in enumerate(starts.tolist()):
                moved[b, start : start + x.shape[1]] = x[b]
            given[name] = moved
    given["cache_lens"] = given["cache_lens"] + starts
    out, lse = backend.decode(**given, kv_start=starts, return_lse=True)
    assert_decoded(out, expected.out)
    assert_lse_close(lse, expected.lse)


@every_backend
def test_hidden_keys_do_not_matter(backend: Backend) -> None:
    """Not a bit, whatever finite values they hold: padding, the future, beyond the window."""
    for case, hidden, queries in (
        (Case((30,), 1, 2, 1, kv_start=(17,)), slice(0, 17), slice(None)),
        (Case((20,), 5, 2, 1, window=4), slice(0, 12), slice(None)),
        (Case((20,), 2, 2, 1, block=16, window=3), slice(0, 16), slice(None)),
        (Case((20,), 5, 2, 1), slice(17, 20), slice(0, 2)),
    ):
        given = dict(backend.nearest(case).call().arguments)
        out = backend.decode(**given)
        for name in ("k_cache", "v_cache"):
            x = given[name].clone()
            if case.block:
                x[given["block_table"][:, 0].long()] = 1000
            else:
                x[:, hidden] = 1000 * torch.randn_like(x[:, hidden])
            given[name] = x
        assert torch.equal(backend.decode(**given)[:, queries], out[:, queries])
        given.pop("kv_start", None)
        given.pop("window", None)
        assert not torch.equal(backend.decode(**given), out)


@every_case([Case((9, 4), 2, block=16), Case((20,), dtype=bf16)])
def test_masks_that_hide_nothing(backend: Backend, case: Case) -> None:
    call = case.call()
    expected = call.expected().out
    longest = max(case.lens)
    at = torch.arange(longest).repeat(len(case.lens), 1)
    for more in (
        {"window": longest},
        {"window": 2**40},
        {"kv_start": torch.zeros(len(case.lens)).int()},
        {"key_positions": at},
    ):
        assert_decoded(backend.decode(**call.arguments, **more), expected)


@every_backend
def test_the_order_of_cached_keys_does_not_matter(backend: Backend) -> None:
    """With their positions, and the query's own key at its slot."""
    call = backend.nearest(Case((33, 33), 1, 2, 1, positions="any")).call()
    expected = call.expected()
    given = dict(call.arguments)
    order = torch.cat((torch.randperm(32), torch.tensor([32])))
    for name in ("k_cache", "v_cache", "key_positions"):
        x = given[name].clone()
        x[:, :33] = x[:, order]
        given[name] = x
    out, lse = backend.decode(**given, return_lse=True)
    assert_decoded(out, expected.out)
    assert_lse_close(lse, expected.lse)


@every_case(
    [
        Case((20, 9), 3, dim=64, dtype=bf16),
        Case((33, 45), boundary=40, window=12, n_hat=35),
        Case((20, 21), boundary=20, window=12, n_hat=18, dtype=bf16),
        Case((3, 20), 2, positions="sinks", interleaved=True, pairs=9, dtype=fp16),
    ]
)
def test_rotating_then_decoding_equals_decoding(backend: Backend, case: Case) -> None:
    """Tokens rotated before stand at position 0 of a plain embedding, which turns nothing."""
    call = case.call()
    expected = call.expected().out
    given, rope = dict(call.arguments), case.rope()
    at = given.pop("key_positions", torch.arange(given["k_cache"].shape[1]).expand(2, -1))
    slots = given["cache_lens"][:, None].long() - case.queries + torch.arange(case.queries)
    lengths = given["cache_lens"]
    given["q"], _ = apply_rotary(given["q"], None, at.gather(1, slots), rope, lengths=lengths)
    keys = given["k_cache"][:, : at.shape[1]]
    given["k_cache"], _ = apply_rotary(keys, None, at, rope, lengths=lengths)
    given["v_cache"] = given["v_cache"][:, : at.shape[1]]
    given["factors"] = Rope.plain(case.dim)
    assert_decoded(backend.decode(**given, key_positions=torch.zeros_like(at)), expected)


@every_case([Case((9,), 2, heads=6, kv_heads=2, block=16), Case((20,), heads=4, kv_heads=1)])
def test_shared_heads_equal_repeated_heads(backend: Backend, case: Case) -> None:
    """Query heads g * n to g * n + n - 1 share KV head g, in this order."""
    call = case.call()
    expected = call.expected().out
    given = dict(call.arguments)
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].repeat_interleave(case.heads // case.kv_heads, 2)
    assert_decoded(backend.decode(**given), expected)
    assert_decoded(backend.decode(**call.arguments), expected)


@every_case([Case((40, 7), 5, dtype=bf16, block=16), Case((33,), 2, window=9)])
def test_equal_scores_give_the_mean_of_what_is_seen(backend: Backend, case: Case) -> None:
    """q = 0: out is the mean of the values seen, and the lse the logarithm of their number."""
    call = case.call()
    call = Call(**{**call.arguments, "q": torch.zeros_like(call.q)})
    out, lse = backend.decode(**call.arguments, return_lse=True)
    expected = call.expected().out
    means = torch.zeros_like(expected.ref64)
    for b, sequence in enumerate(call.sequences):
        for t in range(case.queries):
            seen = sequence.seen(sequence.first + t, case.window)
            mean = torch.stack([sequence.keys[j].v.double() for j in seen]).mean(0)
            means[b, t] = mean.repeat_interleave(call.group, 0)
            counted = torch.tensor(len(seen), dtype=torch.float64).log()
            assert (lse[b, :, t].cpu().double() - counted).abs().max() < 1e-5
    assert_decoded(out, type(expected)(means, expected.low))
