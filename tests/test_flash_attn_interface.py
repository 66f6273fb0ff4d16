"""flash-attn's functions with a `Rope`: places, lengths and windows as flash-attn counts them."""

from __future__ import annotations

import pytest
import torch
import truth
from attention_truth import Call, assert_lse_close, bf16, fp32, fp64
from cases import Shape, factors
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope, apply_rotary, decode
from longrope_kernels.integrations.flash_attn import (
    apply_rotary_emb,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

DIM = 32
ONE = Shape(1, 1, 1, 1, DIM).rope(n_hat=5)
# Short up to 12 tokens, long after: lengths in these tests lie on both sides.
TWO = Rope(
    (FactorSet(factors(DIM // 2), 0, 1.05, 12), FactorSet(factors(DIM // 2, 2.0), 7, 1.19)),
)
every_rope = pytest.mark.parametrize("rope", [ONE, TWO], ids=["one set", "two sets"])


def tensors(*sizes: tuple[int, ...], dtype: torch.dtype = fp32) -> list[torch.Tensor]:
    return [torch.randn(*size, DIM).to(dtype) for size in sizes]


def borders(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


# --------------------------------------------------------------------------------------- rotation


@every_rope
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 9, [4, 0, 2**20]], ids=str)
def test_rotation_of_a_batch(rope, inplace, offsets):
    (x,) = tensors((3, 6, 2))
    offset = torch.tensor(offsets)
    positions = offset.expand(3)[:, None] + torch.arange(6)
    lengths = offset.expand(3) + 6
    expected = truth.rotary(x, positions, rope, lengths=lengths)
    given = offset.int() if offset.dim() else offsets
    out = apply_rotary_emb(x, rope, inplace=inplace, seqlen_offsets=given)
    assert (out is x) == inplace
    assert_close(out, expected)


@every_rope
@pytest.mark.parametrize("offsets", [0, 3, [11, 0, 12]], ids=str)
def test_rotation_of_packed_sequences(rope, offsets):
    counts = (1, 13, 4)
    (x,) = tensors((sum(counts), 2), dtype=bf16)
    before = torch.tensor(offsets).expand(3).tolist()
    positions = torch.cat([torch.arange(n) + b for n, b in zip(counts, before, strict=True)])
    lengths = torch.tensor(counts) + torch.tensor(before)
    rest = {"lengths": lengths, "cu_seqlens": borders(*counts)}
    expected = truth.rotary(x, positions, rope, layout="thd", **rest)
    given = offsets if isinstance(offsets, int) else torch.tensor(offsets)
    out = apply_rotary_emb(
        x, rope, seqlen_offsets=given, cu_seqlens=borders(*counts), max_seqlen=max(counts)
    )
    assert_close(out, expected)


def test_rotation_under_named_sets():
    (x,) = tensors((2, 6, 2))
    sets = torch.tensor([1, 0], dtype=torch.int32)
    expected = apply_rotary(x, None, torch.arange(6), TWO, sets=sets)[0]
    assert torch.equal(apply_rotary_emb(x, TWO, sets=sets), expected)
    lengths = torch.tensor([13, 12])
    assert torch.equal(apply_rotary_emb(x, TWO, lengths=lengths), expected)


# -------------------------------------------------------------------------------------- attention

# (causal, window_size) to the same in our terms
WINDOWS = [
    ((False, (-1, -1)), (False, None)),
    ((True, (-1, -1)), (True, None)),
    ((False, (-1, 0)), (True, None)),
    ((False, (3, 0)), (True, 4)),
    ((True, (3, 7)), (True, 4)),
    ((True, (0, 0)), (True, 1)),
    ((False, (2, 2)), (False, 3)),
]


@pytest.mark.parametrize(("theirs", "ours"), WINDOWS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 14)])
def test_windows(theirs, ours, queries, keys):
    q, k, v = tensors((2, queries, 4), (2, keys, 2), (2, keys, 2))
    at = torch.arange(keys)
    call = Call(
        q, k, v, at[-queries:], TWO, key_positions=at, lengths=torch.full((2,), keys),
        causal=ours[0], window=ours[1],
    )  # fmt: skip
    out = flash_attn_func(q, k, v, TWO, causal=theirs[0], window_size=theirs[1])
    assert_close(out, call.expected().out)


def test_a_window_counts_keys_beside_the_querys_own():
    """Values that say their slot: query 5 with two keys to the left sees slots 3, 4 and 5."""
    q, k = torch.zeros(1, 8, 1, DIM), torch.zeros(1, 8, 1, DIM)
    v = torch.arange(8.0)[None, :, None, None].expand(1, 8, 1, DIM).contiguous()
    left = flash_attn_func(q, k, v, ONE, window_size=(2, 0))
    both = flash_attn_func(q, k, v, ONE, window_size=(2, 2))
    torch.testing.assert_close(left[0, 5, 0, 0], torch.tensor(4.0))
    torch.testing.assert_close(both[0, 5, 0, 0], torch.tensor(5.0))
    torch.testing.assert_close(both[0, 1, 0, 0], torch.tensor(1.5))


@every_rope
def test_scale_softcap_and_log_sum_exp(rope):
    q, k, v = tensors((2, 13, 4), (2, 13, 2), (2, 13, 2), dtype=fp64)
    call = Call(
        q, k, v, torch.arange(13), rope, lengths=torch.full((2,), 13),
        softmax_scale=0.3, softcap=2.0, causal=True,
    )  # fmt: skip
    out, lse = flash_attn_func(
        q, k, v, rope, softmax_scale=0.3, softcap=2.0, causal=True, return_softmax_lse=True
    )
    assert_close(out, call.expected().out)
    assert_lse_close(lse, call.expected().lse)


def test_more_queries_than_keys():
    q, k, v = tensors((1, 9, 2), (1, 4, 2), (1, 4, 2))
    at = torch.arange(-5, 4)
    call = Call(q, k, v, at, ONE, key_positions=at[-4:])
    assert_close(flash_attn_func(q, k, v, ONE, causal=True), call.expected().out)


def test_named_positions():
    q, k, v = tensors((2, 6, 2), (2, 8, 2), (2, 8, 2))
    positions = torch.randint(0, 9000, (2, 6))
    of_keys = torch.randint(0, 9000, (2, 8))
    lengths = torch.tensor([12, 13])
    call = Call(q, k, v, positions, TWO, key_positions=of_keys, lengths=lengths, causal=False)
    rest = {"positions": positions, "key_positions": of_keys}
    assert_close(flash_attn_func(q, k, v, TWO, lengths=lengths, **rest), call.expected().out)
    with pytest.raises(ValueError, match="lengths: expected lengths= or sets="):
        flash_attn_func(q, k, v, TWO, **rest)


# ----------------------------------------------------------------------------------------- packed


@every_rope
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("counts_k", [(3, 15, 0, 7), (9, 15, 2, 7)], ids=["same", "more keys"])
def test_packed_sequences(rope, causal, counts_k):
    counts = (3, 15, 0, 7)
    q, k, v = tensors((sum(counts), 4), (sum(counts_k), 2), (sum(counts_k), 2))
    at = torch.cat([torch.arange(b - a, b) for a, b in zip(counts, counts_k, strict=True)])
    of_keys = torch.cat([torch.arange(n) for n in counts_k])
    cu, cu_k = borders(*counts), borders(*counts_k)
    call = Call(
        q, k, v, at, rope, key_positions=of_keys, cu_seqlens=cu, cu_seqlens_k=cu_k,
        lengths=torch.tensor(counts_k), layout="thd", causal=causal,
    )  # fmt: skip
    longest = max(counts), max(counts_k)
    out, lse = flash_attn_varlen_func(
        q, k, v, rope, cu, cu_k, *longest, causal=causal, return_softmax_lse=True
    )
    assert_close(out, call.expected().out)
    assert_lse_close(lse, call.expected().lse)


# ------------------------------------------------------------------------------------------ cache


def paged(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of a dense cache in another order, and the table to it."""
    batch, capacity = x.shape[:2]
    blocks = x.unflatten(1, (-1, block_size)).flatten(0, 1)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1))
    shuffled = torch.empty_like(blocks)
    shuffled[order] = blocks
    return shuffled, order.view(batch, capacity // block_size).int()


@every_rope
@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_a_cache(rope, is_paged, backend, new):
    """Query by query the attention to the keys up to it, under the set of the length there."""
    before, pads = (11, 12, 30), (0, 4, 2)
    dense = tensors((3, 48, 2), (3, 48, 2))
    q, k, v = tensors((3, max(new, 1), 4), (3, new, 2), (3, new, 2))
    full = [x.clone() for x in dense]
    for row, length in enumerate(before):
        for x, added in zip(full, (k, v), strict=True):
            x[row, length : length + new] = added[row]
    caches, table = list(dense), None
    if is_paged:
        (k_blocks, table), (v_blocks, _) = (paged(x, 16) for x in dense)
        caches = [k_blocks, v_blocks]
    out, lse = flash_attn_with_kvcache(
        q,
        *caches,
        rope,
        k if new else None,
        v if new else None,
        cache_seqlens=torch.tensor(before, dtype=torch.int32),
        cache_leftpad=torch.tensor(pads),
        block_table=table,
        window_size=(20, 0),
        return_softmax_lse=True,
        backend=backend,
    )
    # Only the slots of the new keys have changed.
    for x, cache in zip(full, caches, strict=True):
        assert torch.equal(paged(x, 16)[0] if is_paged else x, cache)
    for row, (length, pad) in enumerate(zip(before, pads, strict=True)):
        for t in range(q.shape[1]):
            one, total = slice(t, t + 1), length + new - q.shape[1] + t + 1
            at = torch.arange(total)[None] - pad
            call = Call(
                q[row : row + 1, one], full[0][row : row + 1, :total],
                full[1][row : row + 1, :total], at[:, -1:], rope, key_positions=at, window=21,
                kv_start=torch.tensor([pad]), lengths=torch.tensor([total - pad]),
            )  # fmt: skip
            assert_close(out[row : row + 1, one], call.expected().out)
            assert_lse_close(lse[row : row + 1, :, one], call.expected().lse)


def test_a_number_of_tokens_for_all_rows_and_pinned_sets():
    k_cache, v_cache = tensors((2, 20, 2), (2, 20, 2))
    q, k, v = tensors((2, 2, 4), (2, 2, 2), (2, 2, 2))
    sets = torch.tensor([0, 1], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, TWO, k, v, cache_seqlens=15, sets=sets, softmax_scale=0.2, softcap=3.0
    )
    lens = torch.tensor([17, 17])
    rest = {"sets": sets, "softmax_scale": 0.2, "softcap": 3.0}
    assert torch.equal(out, decode(q, k_cache, v_cache, lens, TWO, **rest))
    assert torch.equal(k_cache[:, 15:17], k)
    assert torch.equal(v_cache[:, 15:17], v)


# ----------------------------------------------------------------------------------------- errors


def refused(match: str, function, *args, kind=ValueError, **kwargs) -> None:
    with pytest.raises(kind, match=match):
        function(*args, **kwargs)


def test_rotation_says_what_is_wrong():
    (x,) = tensors((2, 6, 2))
    refused("rope: expected a Rope, got float", apply_rotary_emb, x, 1.0, kind=TypeError)
    refused("x: expected a tensor", apply_rotary_emb, [1.0], ONE, kind=TypeError)
    refused(r"x: expected shape \(tokens", apply_rotary_emb, x, ONE, cu_seqlens=borders(6, 6))
    for offsets, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        refused("seqlen_offsets: ", apply_rotary_emb, x, ONE, seqlen_offsets=offsets, kind=kind)
    refused(
        r"seqlen_offsets: expected shape \(2,\)",
        apply_rotary_emb, x, ONE, seqlen_offsets=torch.zeros(3, dtype=torch.int32),
    )  # fmt: skip
    refused(
        "seqlen_offsets: expected values from -2", apply_rotary_emb, x, ONE, seqlen_offsets=2**31
    )
    leaf = x.clone().requires_grad_()
    refused("inplace: x is a leaf", apply_rotary_emb, leaf, ONE, inplace=True)
    refused(
        "cu_seqlens: expected ascending values from 0 to 12",
        apply_rotary_emb, x.flatten(0, 1), ONE, cu_seqlens=borders(6, 5),
    )  # fmt: skip


@pytest.mark.parametrize("window_size", [(3, -1), (-1, 3), (2, 4)])
def test_windows_of_two_sizes_are_refused(window_size):
    q, k, v = tensors((1, 6, 2), (1, 6, 2), (1, 6, 2))
    refused("window_size: expected", flash_attn_func, q, k, v, ONE, window_size=window_size)


def test_attention_says_what_is_wrong():
    q, k, v = tensors((1, 6, 2), (1, 6, 2), (1, 6, 2))
    refused("rope: expected a Rope", flash_attn_func, q, k, v, [1.0], kind=TypeError)
    refused("window_size: ", flash_attn_func, q, k, v, ONE, window_size=3, kind=TypeError)
    refused("causal: expected a bool", flash_attn_func, q, k, v, ONE, causal=1, kind=TypeError)
    refused("k: expected shape", flash_attn_func, q, k[0], v, ONE)
    refused(
        "positions: expected them beside key_positions",
        flash_attn_func, q, k, v, ONE, key_positions=torch.arange(6),
    )  # fmt: skip
    packed = [x[0] for x in (q, k, v)]
    cu = borders(6)
    refused(
        "cu_seqlens_k: expected 1 sequences",
        flash_attn_varlen_func, *packed, ONE, cu, borders(2, 4), 6, 4,
    )  # fmt: skip
    refused(
        "cu_seqlens_q: expected ascending", flash_attn_varlen_func, *packed, ONE, borders(5), cu
    )
    for x in (packed, (q, k, v)):
        refused(
            "cu_seqlens_q: expected a tensor|q: expected shape",
            flash_attn_varlen_func, *x, ONE, None, None, kind=(TypeError, ValueError),
        )  # fmt: skip
    refused(
        "positions: expected them beside key_positions",
        flash_attn_varlen_func, *packed, ONE, cu, cu, key_positions=torch.arange(6),
    )  # fmt: skip


def test_a_cache_says_what_is_wrong_and_stays_as_it_was():
    k_cache, v_cache = tensors((2, 8, 2), (2, 8, 2))
    q, k, v = tensors((2, 2, 4), (2, 2, 2), (2, 2, 2))
    before = k_cache.clone(), v_cache.clone()
    given = {"cache_seqlens": torch.tensor([1, 6])}
    caches = (q, k_cache, v_cache, ONE)
    call = flash_attn_with_kvcache
    refused("causal: expected True for more than one query", call, *caches, causal=False, **given)
    refused("k, v: expected both or neither", call, *caches, k, **given)
    refused("v: expected shape", call, *caches, k, v[:, :1], **given)
    refused(
        "k: expected the dtype of k_cache", call, *caches, k.bfloat16(), v, kind=TypeError, **given
    )
    refused(
        "cache_seqlens: expected from 0 to 6 .*got 7 for sequence 1",
        call, *caches, k, v, cache_seqlens=torch.tensor([1, 7]),
    )  # fmt: skip
    refused("cache_seqlens: expected at least 0", call, *caches, k, v, cache_seqlens=-1)
    refused(
        r"cache_seqlens: expected shape \(2,\)", call, *caches, cache_seqlens=torch.ones(1).int()
    )
    refused(
        r"block_table: expected shape \(2, max_blocks\)",
        call, *caches, k, v, block_table=torch.zeros(1, 1).int(), **given,
    )  # fmt: skip
    refused("window_size: expected", call, *caches, k, v, window_size=None, kind=TypeError, **given)
    pads = torch.zeros(3, dtype=torch.int32)
    refused(r"cache_leftpad: expected shape \(2,\)", call, *caches, cache_leftpad=pads, **given)
    refused("return_softmax_lse: ", call, *caches, return_softmax_lse=1, kind=TypeError, **given)
    pads = torch.tensor([0, -1])
    refused(
        "cache_leftpad: expected slots from 0", call, *caches, k, v, cache_leftpad=pads, **given
    )
    flat = (q, k_cache.flatten(), v_cache.flatten(), ONE, k, v)
    refused("k_cache: expected shape", call, *flat, cache_seqlens=9)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


def test_compile_fullgraph():
    torch.compiler.reset()
    q, k, v = tensors((2, 13, 4), (2, 13, 2), (2, 13, 2))
    k_cache, v_cache = tensors((2, 20, 2), (2, 20, 2))

    def step(q, k, v, k_cache, v_cache, lens):
        out = flash_attn_func(q, k, v, TWO, causal=True)
        new = (x[:, :1] for x in (k, v))
        last = flash_attn_with_kvcache(q[:, :1], k_cache, v_cache, TWO, *new, cache_seqlens=lens)
        return out, last, apply_rotary_emb(q, TWO)

    lens = torch.tensor([11, 12])
    expected = step(q, k, v, k_cache.clone(), v_cache.clone(), lens)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v, k_cache, v_cache, lens), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(k_cache[1, 12], k[1, 0])
