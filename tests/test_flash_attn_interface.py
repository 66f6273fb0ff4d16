"""flash-attn's functions with a `Rope`: each beside the call of ours it stands for, written out.

Tensors are held to what `apply_rotary`, `attention` and `decode` return, whose truth others test.
"""

from __future__ import annotations

import pytest
import torch
from attention_truth import bf16, fp32
from cases import Shape, factors

from longrope_kernels import FactorSet, Rope, apply_rotary, attention, decode
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


def assert_same(outs, expected) -> None:
    """To the bit, but for the order of sums where q and k are rotated together."""
    torch.testing.assert_close(outs, expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------- rotation


@every_rope
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("offsets", [0, 9, [11, 0, 2**20]], ids=str)
def test_rotation(rope, packed, offsets):
    counts = (1, 13, 4) if packed else (6, 6, 6)
    (x,) = tensors((18, 2), dtype=bf16)
    before = torch.tensor(offsets).expand(3)
    positions = torch.cat([b + torch.arange(n) for n, b in zip(counts, before, strict=True)])
    rest = {"cu_seqlens": borders(*counts), "layout": "thd"}
    lengths = torch.tensor(counts) + before
    expected = apply_rotary(x, None, positions, rope, lengths=lengths, **rest)[0]
    given = {"seqlen_offsets": offsets if isinstance(offsets, int) else before.int()}
    if packed:
        given |= {"cu_seqlens": borders(*counts), "max_seqlen": max(counts)}
    else:
        x, expected = (y.view(3, 6, 2, DIM) for y in (x, expected))
    assert torch.equal(apply_rotary_emb(x, rope, **given), expected)
    assert apply_rotary_emb(x, rope, inplace=True, **given) is x
    assert torch.equal(x, expected)


def test_rotation_under_named_sets():
    (x,) = tensors((2, 6, 2))
    sets = torch.tensor([1, 0], dtype=torch.int32)
    expected = apply_rotary(x, None, torch.arange(6), TWO, sets=sets)[0]
    assert torch.equal(apply_rotary_emb(x, TWO, sets=sets), expected)
    assert torch.equal(apply_rotary_emb(x, TWO, lengths=torch.tensor([13, 12])), expected)


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
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 14), (9, 4)])
def test_windows_and_scores(theirs, ours, queries, keys):
    """The last query stands at the last key, the first key at 0, and keys make the length."""
    q, k, v = tensors((2, queries, 4), (2, keys, 2), (2, keys, 2))
    rest = {"softmax_scale": 0.3, "softcap": 2.0}
    expected = attention(
        *(q, k, v, torch.arange(keys - queries, keys), TWO),
        **{"key_positions": torch.arange(keys), "lengths": torch.full((2,), keys)},
        **rest,
        causal=ours[0],
        window=ours[1],
        return_lse=True,
    )
    of_theirs = {"causal": theirs[0], "window_size": theirs[1], "return_softmax_lse": True}
    assert_same(flash_attn_func(q, k, v, TWO, **rest, **of_theirs), expected)


def test_named_positions():
    q, k, v = tensors((2, 6, 2), (2, 8, 2), (2, 8, 2))
    at, of_keys = torch.randint(0, 9000, (2, 6)), torch.randint(0, 9000, (2, 8))
    rest = {"key_positions": of_keys, "lengths": torch.tensor([12, 13])}
    expected = attention(q, k, v, at, TWO, causal=False, **rest)
    assert torch.equal(flash_attn_func(q, k, v, TWO, positions=at, **rest), expected)
    rest.pop("lengths")
    refused("lengths: expected lengths= or", flash_attn_func, q, k, v, TWO, positions=at, **rest)


@every_rope
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("counts_k", [(3, 15, 0, 7), (9, 15, 2, 7)], ids=["same", "more keys"])
def test_packed_sequences(rope, causal, counts_k):
    counts = (3, 15, 0, 7)
    q, k, v = tensors((sum(counts), 4), (sum(counts_k), 2), (sum(counts_k), 2))
    cu, cu_k = borders(*counts), borders(*counts_k)
    expected = attention(
        *(q, k, v),
        torch.cat([torch.arange(b - a, b) for a, b in zip(counts, counts_k, strict=True)]),
        rope,
        key_positions=torch.cat([torch.arange(n) for n in counts_k]),
        lengths=torch.tensor(counts_k),
        **{"cu_seqlens": cu, "cu_seqlens_k": cu_k, "layout": "thd"},
        causal=causal,
        return_lse=True,
    )
    longest = max(counts), max(counts_k)
    rest = {"causal": causal, "return_softmax_lse": True}
    assert_same(flash_attn_varlen_func(q, k, v, rope, cu, cu_k, *longest, **rest), expected)
    if counts_k == counts:  # the very same borders: rotated together
        assert_same(flash_attn_varlen_func(q, k, v, rope, cu, cu, *longest, **rest), expected)


# ------------------------------------------------------------------------------------------ cache


@every_rope
@pytest.mark.parametrize("block", [0, 16], ids=["dense", "paged"])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_a_cache(rope, block, new):
    """`cache_seqlens` are those before the call, `cache_lens` those after it."""
    before = torch.tensor([11, 12, 30])
    q, k, v = tensors((3, max(new, 1), 4), (3, new, 2), (3, new, 2))
    caches, table = tensors((3, 48, 2), (3, 48, 2)), None
    if block:
        caches = tensors((9, block, 2), (9, block, 2))
        table = torch.randperm(9, dtype=torch.int32).view(3, 3)
    ours = [x.clone() for x in caches]
    pads = torch.tensor([0, 4, 2])
    expected = decode(
        *(q, *ours, before + new, rope),
        **({"k_new": k, "v_new": v} if new else {}),
        **{"block_table": table, "kv_start": pads, "window": 21, "return_lse": True},
    )
    given = {"cache_seqlens": before.int(), "cache_leftpad": pads, "block_table": table}
    rest = {"window_size": (20, 0), "return_softmax_lse": True}
    added = (k, v) if new else ()
    outs = flash_attn_with_kvcache(q, *caches, rope, *added, **given, **rest)
    for out, wanted in zip((*outs, *caches), (*expected, *ours), strict=True):
        assert torch.equal(out, wanted)


def test_a_number_of_tokens_for_all_rows_and_pinned_sets():
    k_cache, v_cache = tensors((2, 20, 2), (2, 20, 2))
    q, k, v = tensors((2, 2, 4), (2, 2, 2), (2, 2, 2))
    rest = {"sets": torch.tensor([0, 1]).int(), "softmax_scale": 0.2, "softcap": 3.0}
    out = flash_attn_with_kvcache(q, k_cache, v_cache, TWO, k, v, cache_seqlens=15, **rest)
    lens = torch.tensor([17, 17])
    assert torch.equal(out, decode(q, k_cache, v_cache, lens, TWO, **rest))
    assert torch.equal(k_cache[:, 15:17], k)
    assert torch.equal(v_cache[:, 15:17], v)


# ----------------------------------------------------------------------------------------- errors
# Of what is checked here, and one of each name that a callee has otherwise.


def refused(match: str, function, *args, kind=ValueError, **kwargs) -> None:
    with pytest.raises(kind, match=f"^{match}"):
        function(*args, **kwargs)


def test_rotation_says_what_is_wrong():
    (x,) = tensors((2, 6, 2))
    call = apply_rotary_emb
    refused("rope: expected a Rope, got float", call, x, 1.0, kind=TypeError)
    refused("x: expected a tensor", call, [1.0], ONE, kind=TypeError)
    refused(r"x: expected shape \(tokens", call, x, ONE, cu_seqlens=borders(6, 6))
    for offsets, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        refused("seqlen_offsets: ", call, x, ONE, seqlen_offsets=offsets, kind=kind)
    three = torch.arange(3)
    refused(r"seqlen_offsets: expected shape \(2,\)", call, x, ONE, seqlen_offsets=three)
    refused("seqlen_offsets: expected values from -2", call, x, ONE, seqlen_offsets=2**31)
    refused("inplace: x is a leaf", call, x.requires_grad_(), ONE, inplace=True)
    packed, cu = x.detach().flatten(0, 1), borders(6, 5)
    refused("cu_seqlens: expected ascending values from 0 to 12", call, packed, ONE, cu_seqlens=cu)


def test_attention_says_what_is_wrong():
    q, k, v = tensors((1, 6, 2), (1, 6, 2), (1, 6, 2))
    given, call = (q, k, v, ONE), flash_attn_func
    refused("rope: expected a Rope", call, q, k, v, [1.0], kind=TypeError)
    for sides in ((3, -1), (-1, 3), (2, 4)):
        refused(r"window_size: expected \(-1, -1\)", call, *given, window_size=sides)
    refused("window_size: expected", call, *given, window_size=3, kind=TypeError)
    refused("causal: expected a bool", call, *given, causal=1, kind=TypeError)
    refused("return_softmax_lse: ", call, *given, return_softmax_lse=1, kind=TypeError)
    refused("positions: expected them", call, *given, key_positions=torch.arange(6))
    packed, cu, call = [x[0] for x in (q, k, v)], borders(6), flash_attn_varlen_func
    refused("cu_seqlens_k: expected 1 sequences", call, *packed, ONE, cu, borders(2, 4))
    refused("cu_seqlens_q: expected ascending", call, *packed, ONE, borders(5), cu)
    refused("cu_seqlens_q: expected a tensor", call, *packed, ONE, None, cu, kind=TypeError)
    refused(r"q: expected shape \(tokens", call, q, k, v, ONE, cu, cu)


def test_a_cache_says_what_is_wrong_and_stays_as_it_was():
    caches = tensors((2, 8, 2), (2, 8, 2))
    q, k, v = tensors((2, 2, 4), (2, 2, 2), (2, 2, 2))
    before = [x.clone() for x in caches]
    lens = {"cache_seqlens": torch.tensor([1, 6])}
    given, call = (q, *caches, ONE), flash_attn_with_kvcache
    refused("causal: expected True for more than one query", call, *given, causal=False, **lens)
    refused("k, v: expected both or neither", call, *given, k, **lens)
    refused("v: expected shape", call, *given, k, v[:, :1], **lens)
    other = k.bfloat16()
    refused("k: expected the dtype of k_cache", call, *given, other, v, kind=TypeError, **lens)
    for held, wrong in (([1, 7], "7 for sequence 1"), ([-1, 6], "-1 for sequence 0")):
        match = f"cache_seqlens: expected from 0 to 6 .*got {wrong}"
        refused(match, call, *given, k, v, cache_seqlens=torch.tensor(held))
    refused("cache_seqlens: expected at least 0", call, *given, k, v, cache_seqlens=-1)
    one = torch.ones(1).int()
    refused(r"cache_seqlens: expected shape \(2,\)", call, *given, cache_seqlens=one)
    table = torch.zeros(1, 1).int()
    refused("block_table: expected shape", call, *given, k, v, block_table=table, **lens)
    pads = torch.tensor([0, -1])
    refused("cache_leftpad: expected slots", call, *given, k, v, cache_leftpad=pads, **lens)
    flat = (q, *(x.flatten() for x in caches), ONE, k, v)
    refused("k_cache: expected shape", call, *flat, cache_seqlens=9)
    assert all(map(torch.equal, caches, before))


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
