"""`decode` against the truth: every feature, on every backend that serves it.

Every cache here holds NaN wherever no key is, and every table garbage past the end of a sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_truth import assert_lse_close
from cases import DTYPE_NAMES, factors
from decode_truth import (
    BACKENDS,
    REFERENCE,
    Backend,
    Call,
    Case,
    assert_decoded,
    bf16,
    check,
    every_backend,
    every_case,
    fp8,
    fp16,
    fp32,
    fp64,
    nans,
)

from longrope_kernels import FactorSet, Rope, decode

# Each value of each axis several times, and the pairs of values that share code.
SHAPES = [
    Case((9, 17, 1), 1, 4, 2, 96, dtype=bf16),
    Case((33, 5), 1, 3, 1, 64, block=16),
    Case((40,), 2, 2, 2, 128, dtype=fp16, block=32),
    Case((21, 3), 5, 8, 2, 80, 16, dtype=bf16, interleaved=True),
    Case((70,), 1, 8, 1, 64, dtype=bf16, block=64),
    Case((18, 2), 2, 4, 4, 128, block=16),
    Case((37,), 1, 6, 2, 96, 36, dtype=fp16, interleaved=True, block=16),
    Case((23, 11), 5, 2, 1, 64, 12),
    Case((19,), 1, 5, 5, 80, dtype=bf16, block=16),
    Case((17,), 2, 2, 1, 6, interleaved=True),
    Case((20, 4), 1, 2, 1, 33, 7, dtype=fp16, block=5),
    Case((24,), 1, 2, 1, 256, dtype=bf16),
    Case((24,), 5, 4, 2, 256, 64, dtype=fp16, block=16),
    Case((13, 29), 3, 6, 3, 100, 50, dtype=bf16),
    Case((20,), 1, 32, 2, 16, dtype=bf16),
    Case((20,), 16, 2, 1, 32, dtype=bf16, block=16),
    Case((20,), 16, 8, 1, 32, block=16),
    Case((40, 16), 16, 4, 4, 64, dtype=fp16),
    Case((31, 30), 16, 4, 2, 48, 5, interleaved=True),
]
RAGGED = [
    Case((1, 15, 16, 17, 35), block=16, dtype=bf16),
    Case((15, 16, 17), heads=2, kv_heads=1, block=16, dtype=bf16),
    Case((31, 33), heads=2, kv_heads=1, block=32, dtype=fp16),
    Case((9, 3), 2, 4, 2, 48, block=8, dtype=bf16),
    Case((17,), 1, 6, 2, 64, block=16, dtype=fp16),
    Case((1, 2, 3, 4), 2, 2, 1, block=3, dtype=bf16),
    Case((1, 31, 32, 33, 67), block=32),
    Case((31, 32, 33), 2, block=32, kv_heads=1, dtype=fp16),
    *(Case((1, n - 1, n, n + 1), heads=2, block=n, dtype=bf16) for n in (64, 128, 256)),
    *(Case((n + 1,), heads=2, kv_heads=1, block=n, dtype=bf16) for n in (64, 96)),
    Case((3, 2, 1, 7), block=1, queries=2),
    Case((1, 2, 3, 4, 5, 6), block=3, dtype=bf16),
    Case((1, 127, 128, 129), heads=2, kv_heads=1, dtype=bf16),
    Case((63, 65, 1), block=32, index=torch.int64),
]
# 4096 tokens are short and 4097 long, or the same two steps further down.
CROSSING = [
    Case((4096, 4097), boundary=4096, heads=2, kv_heads=1),
    Case((4097, 4096), 2, boundary=4096, heads=2, kv_heads=1, dtype=bf16, block=256),
    Case((4096, 4097), boundary=4096, heads=1, kv_heads=1, n_hat=4090, block=64),
    Case((20, 21, 1), boundary=20, dtype=bf16),
    Case((20, 21, 19), 2, boundary=20, block=16, n_hat=0),
    Case((17, 16), 5, boundary=16, block=32, n_hat=14, dtype=fp16, interleaved=True),
    Case((25, 21), boundary=20, kv_start=(5, 0), block=16, dtype=bf16),
    Case((25, 30, 21), 2, boundary=20, kv_start=(5, 9, 0)),
    Case((9, 9, 9), boundary=40, lengths=(41, 40, 5000), index=torch.int64),
    Case((20, 40), sets=(1, 0), block=16, dtype=bf16),
    Case((50, 20, 9), 3, sets=(0, 1, 1), kv_start=(4, 0, 9), dtype=fp16, pairs=9),
]
THRESHOLDS = [
    *(Case((40, 33), n_hat=n, block=16, dtype=bf16) for n in (0, 1, 5, 16, 20, 32, 40, 41)),
    *(Case((33,), 1, 2, 1, n_hat=n, block=16, dtype=bf16) for n in (1, 16, 20, 32, 33, 34)),
    *(Case((40, 33), 2, n_hat=n) for n in (32, 33, 34, 39, 2**31 - 1)),
    Case((40, 33), n_hat=16, kv_start=(3, 16), block=16, dtype=bf16),
    Case((40,), 5, n_hat=37, interleaved=True, dtype=fp16),
    Case((20, 30), attention_factor=1.0, n_hat=0, dtype=bf16, pairs=8),
    Case((20, 30), attention_factor=0.8, n_hat=9, block=16),
]
WINDOWS = [
    Case(window=1, dtype=bf16),
    Case((40, 3), 5, window=1, block=16),
    Case((40, 17), window=5, block=16, dtype=fp16),
    Case((70, 33), 2, window=16, block=16),
    Case((33, 20), 2, window=16, block=16, dtype=bf16),
    Case((70, 33), window=40, block=32),
    Case((70, 100), 5, window=33, dtype=bf16, heads=2),
    Case((30, 9), window=30, block=16, dtype=fp16),
    Case((30, 9), 2, window=10**6, dtype=bf16),
    Case((70,), window=4, heads=2, kv_heads=1, block=32, dtype=bf16),
    Case((300, 1), window=4, heads=2, block=32),
    Case((1500,), 2, window=600, heads=2, block=128),
]
PADDING = [
    Case((20, 9, 17), kv_start=(0, 5, 16), dtype=bf16),
    Case((40, 30), 2, kv_start=(16, 17), block=16),
    Case((40, 20), 5, kv_start=(39, 17), block=16, dtype=fp16),
    Case((20, 9), kv_start=(20, 100), dtype=bf16),
    Case((20, 9), kv_start=(2**31 - 1, 3), dtype=bf16),
    Case((20, 9), 2, kv_start=(2**33 + 2, 1), boundary=5, dtype=fp16, index=torch.int64),
    Case((40, 30), 2, kv_start=(7, 25), window=9, block=16, index=torch.int64),
    Case((70, 70), kv_start=(60, 1), window=3, dtype=bf16, interleaved=True),
]
RENUMBERED = [
    Case((40, 9), positions="sinks", block=16, dtype=bf16),
    Case((40, 9), 2, positions="sinks", window=20, n_hat=1010),
    Case((30, 18), 5, positions="top", dtype=fp16, index=torch.int64),
    Case((33, 40), positions="top", block=16, n_hat=0),
    Case((33, 18), positions="any", block=16, n_hat=128, dtype=bf16, index=torch.int64),
    Case((33, 18), 3, positions="any", n_hat=4096, interleaved=True),
    Case((23, 25), positions="sinks", boundary=20, kv_start=(3, 4), block=16, dtype=bf16),
]
SCORES = [
    Case(scale=0.5),
    Case((20, 40), 2, scale=1e-3, dtype=bf16, block=16),
    Case(softcap=0.7, dtype=fp16),
    Case((20, 40), softcap=30.0, dtype=bf16, dim=64, window=5, block=16),
    Case((20, 40), 5, softcap=1.5, scale=2.0, kv_start=(3, 19), heads=6),
]
FLOAT8 = [
    Case((9, 17, 1), dtype=bf16, float8=True),
    Case((9, 17, 1), dtype=bf16, float8=True, scales=False, block=16),
    Case((33, 20), 2, 4, 2, 64, dtype=fp16, float8=True, block=16),
    Case((20, 33), 3, 8, 2, 80, 16, dtype=bf16, float8=True, interleaved=True, n_hat=20),
    Case((20, 21), boundary=20, dtype=bf16, float8=True, block=32, softcap=3.0, window=18),
    Case((70,), 1, 2, 1, 128, dtype=fp16, float8=True, kv_start=(5,), positions="sinks"),
    Case((16, 24), 1, 4, 4, 256, dtype=bf16, float8=True, block=16),
    Case((20, 30), float8=True, block=16),
]
# A query before the first slot, and one whose keys are all hidden, see nothing.
EMPTY = [
    Case((0, 5, 0)),
    Case((0, 5, 0), block=16, dtype=bf16),
    Case((0, 0), 2, dtype=fp16),
    Case((0, 0), 2, block=16),
    Case((3, 1, 0, 7), 5, dtype=bf16, block=16),
    Case((3, 15, 16), 16, heads=2, dtype=fp16),
    Case((2, 4), 5, kv_start=(1, 4), positions="any", block=16),
    Case((3, 0), 4, boundary=40, window=2, softcap=2.0, dtype=bf16),
    Case((0, 2), positions="sinks", boundary=40, kv_start=(5, 1)),
    Case((0, 3), 2, dtype=bf16, float8=True, block=16),
]


@every_case([*SHAPES, *RAGGED])
def test_shapes(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case([*CROSSING, *THRESHOLDS])
def test_sets_and_thresholds(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case([*WINDOWS, *PADDING])
def test_masks(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case([*RENUMBERED, *SCORES])
def test_positions_and_scores(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case(FLOAT8)
def test_float8_caches(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@every_case(EMPTY)
def test_queries_that_see_nothing(backend: Backend, case: Case) -> None:
    out = check(backend, case.call())
    for b, length in enumerate(case.lens):
        assert not out[b, : max(case.queries - length, 0)].any()


def test_the_rule_of_slots_written_out() -> None:
    """By hand: the last query stands at the last key, and sees so many slots back."""
    one = Case((6,), 2, window=3, kv_start=(2,)).call().sequences[0]
    assert one.first == 4
    assert [one.seen(slot, None) for slot in (4, 5)] == [[2, 3, 4], [2, 3, 4, 5]]
    assert [one.seen(slot, 2) for slot in (4, 5)] == [[3, 4], [4, 5]]
    assert [one.keys[j].position for j in (0, 2, 5)] == [-2, 0, 3]
    two = Case((1,), 3).call().sequences[0]
    assert [two.seen(two.first + t, None) for t in range(3)] == [[], [], [0]]


def test_the_low_precision_truth_is_the_truth_in_float64() -> None:
    for case in (
        Case((6, 9), 3, softcap=1.3, window=7, kv_start=(0, 8), pairs=9, block=4),
        Case((6, 9), positions="any", float8=True, boundary=8, heads=6, kv_heads=3),
    ):
        for ref64, low, _ in replace(case, dtype=fp64).call().expected():
            seen = ref64 > -torch.inf
            assert ref64[seen].any()
            off = (low - ref64)[seen].abs().max()
            assert off <= 64 * torch.finfo(fp64).eps * ref64[seen].abs().max()


@pytest.mark.parametrize("block", [0, 16], ids=["dense", "paged"])
def test_float64_in_the_reference(block: int) -> None:
    """Angles of float64 are off by 3 * 2**-53 of their size; scores and output follow."""
    one = Case((20, 33, 0), 2, dim=48, pairs=9, dtype=fp64, boundary=30, block=block, softcap=3.0)
    for case in (one, replace(one, positions="sinks", float8=True)):
        call = case.call()
        out, lse = REFERENCE.decode(**call.arguments, return_lse=True)
        assert out.dtype == lse.dtype == fp64
        expected = call.expected()
        keys = [key for sequence in call.sequences for key in sequence.keys.values()]
        k, v = (torch.stack([key[i].double() for key in keys]) for i in (0, 1))
        k, v = (x * s[:, None] for x, s in ((k, call.k_scale), (v, call.v_scale)))
        longest = 1.19**2 * 48**-0.5 * call.q.norm(dim=-1).max() * k.norm(dim=-1).max()
        off = longest * (2 * 3 * 2.0**-53 * 1040 + 48 * torch.finfo(fp64).eps)
        seen = expected.lse.ref64 > -torch.inf
        assert torch.equal(lse == -torch.inf, ~seen)
        assert (lse - expected.lse.ref64)[seen].abs().max() <= off
        assert (out - expected.out.ref64).abs().max() <= 2 * off * v.abs().max()


@every_case([Case((20, 3), 2), Case((20,), 5, block=16, positions="sinks", boundary=18)])
def test_one_output_without_the_lse(backend: Backend, case: Case) -> None:
    arguments = case.call().arguments
    out = backend.decode(**arguments)
    assert torch.equal(out, backend.decode(**arguments, return_lse=True)[0])


@pytest.mark.parametrize(
    ("backend", "dtype"), [(backend, dtype) for backend in BACKENDS for dtype in backend.dtypes]
)
def test_dtypes_of_the_output(backend: Backend, dtype: torch.dtype) -> None:
    """That of q; the lse has no less than float32."""
    for case in (Case((9,), 2, 2, 1), Case((9,), 2, 2, 1, float8=backend.float8, block=16)):
        out, lse = backend.decode(**replace(case, dtype=dtype).call().arguments, return_lse=True)
        assert out.dtype == dtype
        assert tuple(out.shape) == (1, 2, 2, 32)
        assert lse.dtype == (fp64 if dtype == fp64 else fp32)
        assert tuple(lse.shape) == (1, 2, 2)


@pytest.mark.parametrize("code", range(0, 256, 64))
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.float8], ids=str)
def test_all_float8_numbers(backend: Backend, code: int) -> None:
    """One key with every float8_e4m3fn number as its values: out is exactly that."""
    codes = torch.arange(code, code + 64, dtype=torch.uint8)
    codes = codes[codes % 128 != 127]  # the two that are NaN
    dim = len(codes) // 2 * 2
    v_cache = codes[:dim].view(fp8).reshape(1, 1, 1, dim)
    k_cache = torch.zeros(dim).to(fp8).reshape(1, 1, 1, dim)
    q = torch.randn(1, 1, 1, dim).to(backend.dtypes[0])
    out = backend.decode(q, k_cache, v_cache, torch.tensor([1]), Rope.plain(dim))
    assert torch.equal(out.cpu(), v_cache.to(q.dtype))


@every_backend
def test_no_heads_at_all(backend: Backend) -> None:
    none = torch.empty(2, 5, 0, 32, dtype=backend.dtypes[0])
    out = backend.decode(none[:, :1], none, none, torch.tensor([1, 5]), Rope.plain(32))
    assert out.shape == (2, 1, 0, 32)


@every_backend
def test_the_crossing_changes_all_keys(backend: Backend) -> None:
    """One token over the boundary: what the long set alone gives, for keys cached long before."""
    case = backend.nearest(Case((21, 21), 1, 2, 1, boundary=20))
    call = case.call()
    alone = [Call(**{**call.arguments, "factors": Rope(one)}) for one in case.rope().sets]
    wanted = [each.expected() for each in alone]
    assert (wanted[0].out.ref64 - wanted[1].out.ref64).abs().amax((1, 2, 3)).min() > 0.01
    for lens in ((20, 20), (20, 21), (21, 20)):
        given = {**call.arguments, "cache_lens": torch.tensor(lens)}
        out, lse = backend.decode(**given, return_lse=True)
        given["sets"] = torch.tensor([int(n > 20) for n in lens], dtype=torch.int32)
        expected = Call(**given).expected()
        assert_decoded(out, expected.out)
        assert_lse_close(lse, expected.lse)


@every_backend
def test_sets_win_over_lengths_and_lengths_over_cache_lens(backend: Backend) -> None:
    case = backend.nearest(Case((9, 9), 2, 2, 1, boundary=40))
    given = case.call().arguments
    sets, lengths = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([5, 5000])
    by_cache_lens, by_lengths, pinned, both = (
        backend.decode(**given, **more)
        for more in ({}, {"lengths": lengths}, {"sets": sets}, {"sets": sets, "lengths": lengths})
    )
    assert torch.equal(both, pinned)
    assert torch.equal(by_lengths[0], by_cache_lens[0])
    assert torch.equal(pinned[1], by_cache_lens[1])
    assert not torch.equal(pinned[0], by_lengths[0])
    assert not torch.equal(pinned[1], by_lengths[1])
    assert_decoded(pinned, Call(**given, sets=sets).expected().out)
    assert_decoded(by_lengths, Call(**given, lengths=lengths).expected().out)


@every_backend
def test_one_set_reads_no_selection(backend: Backend) -> None:
    case = backend.nearest(Case((9, 3)))
    given = case.call().arguments
    wanted = backend.decode(**given)
    more = {"sets": torch.tensor([7, -1], dtype=torch.int32), "lengths": torch.tensor([1, 5000])}
    assert torch.equal(backend.decode(**given, **more), wanted)


@every_backend
def test_raw_factors_are_the_rope_they_describe(backend: Backend) -> None:
    case = backend.nearest(Case((9, 3), 2, pairs=12, interleaved=True, block=16))
    given = dict(case.call().arguments)
    values = factors(12)
    raw: dict[str, Any] = {"n_hat": 7, "base": 5e5, "interleaved": True, "attention_factor": 1.3}
    rope = Rope(FactorSet(values, 7, 1.3), base=5e5, interleaved=True)
    expected = Call(**{**given, "factors": rope}).expected().out
    for kind in (list(values), torch.tensor(values, dtype=fp64)):
        given["factors"] = kind
        assert_decoded(backend.decode(**given, **raw), expected)


@every_backend
def test_huge_scores_do_not_overflow(backend: Backend) -> None:
    """Scores of some 1e4, where exp alone is infinite: still a mean of values."""
    case = backend.nearest(Case((40,), 2, scale=2000.0, block=16))
    call = case.call()
    out, lse = backend.decode(**call.arguments, return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    longest = max(key.v.abs().max() for s in call.sequences for key in s.keys.values())
    assert out.abs().max() <= longest * (1 + 4 * torch.finfo(out.dtype).eps)


@every_case([Case(()), Case((), block=16, dtype=bf16), Case((), 5, positions="any", boundary=9)])
def test_no_sequences(backend: Backend, case: Case) -> None:
    check(backend, case.call())


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@every_backend
def test_caches_without_any_room(backend: Backend, paged: bool) -> None:
    """No slots, no blocks, no columns, empty blocks, no key positions: zeros, whatever q holds."""
    q = torch.full((2, 3, 4, 16), torch.inf).to(backend.dtypes[0])
    no_keys = {"cache_lens": torch.zeros(2).int(), "factors": Rope.plain(16)}
    shapes = [((2, 0, 2, 16), None)]
    if paged:
        some, none, empty = (4, 16, 2, 16), (0, 16, 2, 16), (4, 0, 2, 16)
        shapes = [(some, 0), (none, 0), (none, 3), (empty, 0), (empty, 3)]
    for shape, columns in shapes:
        cache = nans(shape, q.dtype)
        more = {} if columns is None else {"block_table": torch.full((2, columns), -1).int()}
        for slots in (None, 0, 2):
            if slots is not None:
                more["key_positions"] = torch.zeros(2, slots).int()
            out, lse = backend.decode(q, cache, cache, **no_keys, **more, return_lse=True)
            assert torch.equal(out.cpu(), torch.zeros_like(q))
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "hides", [{"kv_start": torch.tensor([50, 3])}, {"window": 16}], ids=["kv_start", "window"]
)
@every_backend
def test_slots_that_no_query_sees_may_hold_anything(
    backend: Backend, hides: dict[str, object]
) -> None:
    q = torch.randn(2, 3, 2, 16).to(backend.dtypes[0])
    caches = [torch.randn(2, 70, 2, 16).to(q.dtype) for _ in "kv"]
    lens = torch.tensor([68, 9])
    expected = backend.decode(q, *caches, lens, Rope.plain(16), **hides)
    for cache in caches:
        cache[0, :50] = torch.nan
        cache[1, :3] = torch.nan if "kv_start" in hides else 0.0
        cache[0, 68:] = cache[1, 9:] = torch.nan
    out = backend.decode(q, *caches, lens, Rope.plain(16), **hides)
    assert torch.equal(out[0], expected[0])
    assert not out.isnan().any()


@every_backend
def test_no_heads(backend: Backend) -> None:
    q, cache = torch.randn(2, 1, 0, 16), torch.randn(2, 5, 2, 16)
    q, cache = q.to(backend.dtypes[0]), cache.to(backend.dtypes[0])
    out, lse = backend.decode(
        q, cache, cache, torch.tensor([3, 5]), Rope.plain(16), return_lse=True
    )
    assert out.shape == q.shape
    assert tuple(lse.shape) == (2, 0, 1)


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16, fp64], ids=DTYPE_NAMES.get)
def test_the_default_backend_serves_everything(dtype: torch.dtype) -> None:
    """backend=None: whatever it picks is right."""
    for case in (
        Case((40, 9), dim=64, dtype=dtype),
        Case((40, 41), 2, boundary=40, block=16, window=20, dtype=dtype),
        Case((40, 9), float8=True, block=16, softcap=3.0, dtype=dtype),
        Case((20,), 1, 2, 1, 300, dtype=dtype),
        Case((20,), 3, 2, 1, 8, dtype=dtype),
    ):
        call = case.call()
        out, lse = decode(**call.arguments, return_lse=True)
        if dtype == fp64:
            assert (out - call.expected().out.ref64).abs().max() < 1e-11
            continue
        assert_decoded(out, call.expected().out)
        assert_lse_close(lse, call.expected().lse)


@every_backend
def test_autocast_takes_caches_of_two_dtypes_to_its_own(backend: Backend) -> None:
    given = backend.nearest(Case((9, 3), 2)).call().arguments
    k, v = (given[name].to(bf16) for name in ("k_cache", "v_cache"))
    call = Call(**{**given, "q": given["q"].to(bf16), "k_cache": k, "v_cache": v})
    for wide in ("k_cache", "v_cache"):
        mixed = {**call.arguments, wide: call.arguments[wide].float()}
        with torch.autocast(backend.device, dtype=bf16):
            out, lse = backend.decode(**mixed, return_lse=True)
        assert_decoded(out, call.expected().out)
        assert_lse_close(lse, call.expected().lse)
        with pytest.raises(TypeError, match="v_cache: expected the dtype of"):
            backend.decode(**{**mixed, "q": mixed["q"].to(mixed["k_cache"].dtype)})


@every_backend
def test_autocast_takes_q_to_the_dtype_of_the_cache(backend: Backend) -> None:
    """Beside float8 to its own; a cache is never cast, which would cost more than the step."""
    for case in (Case((9, 3), 2), Case((9, 3), block=16, float8=backend.float8)):
        given = backend.nearest(case).call().arguments
        dtype = bf16 if case.float8 else given["k_cache"].dtype
        call = Call(**{**given, "q": given["q"].to(dtype)})
        wide = {**given, "q": call.q.float()}
        with torch.autocast(backend.device, dtype=bf16):
            out, lse = backend.decode(**wide, return_lse=True)
        assert_decoded(out, call.expected().out)
        assert_lse_close(lse, call.expected().lse)
