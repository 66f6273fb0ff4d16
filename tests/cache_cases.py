"""Caches to test, tokens to put there, and what a row of them must answer, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import truth
from cases import two_sets

from longrope_kernels import FactorSet, KVCache, PagedKVCache, Rope

fp64, fp32, bf16, fp8 = torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn
KV_HEADS, DIM = 2, 12
# Shorter boundaries than a model has: 20, 33, none.
ROPE = Rope(
    (
        FactorSet((1.0, 1.5, 2.5), 0, 1.0, 20),
        FactorSet((1.1, 2.5, 6.0), 5, 1.1, 33),
        FactorSet((1.2, 4.0, 9.0), 3, 1.2),
    )
)
REAL = two_sets(DIM // 2)  # 4096 tokens are short, 4097 long

Cache = KVCache | PagedKVCache
Maker = Callable[..., Cache]


def dense(rope: Rope = ROPE, batch: int = 3, capacity: int = 64, **kwargs: Any) -> Cache:
    return KVCache(rope, batch, capacity, KV_HEADS, DIM, **{"dtype": fp64, **kwargs})


def paged(block_size: int) -> Maker:
    def make(rope: Rope = ROPE, batch: int = 3, capacity: int = 64, **kwargs: Any) -> Cache:
        blocks = batch * -(-capacity // block_size)
        rest = {"dtype": fp64, "max_length": capacity, **kwargs}
        return PagedKVCache(rope, batch, blocks, block_size, KV_HEADS, DIM, **rest)

    return make


MAKERS = [pytest.param(dense, id="dense")]
MAKERS += [pytest.param(paged(size), id=f"paged{size}") for size in (16, 32)]
every_cache = pytest.mark.parametrize("make", MAKERS)


def tokens(*shape: int, dtype: torch.dtype = fp64) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values: (*shape, KV_HEADS, DIM) each."""
    k, v = (torch.randn(*shape, KV_HEADS, DIM, dtype=fp64).to(dtype) for _ in range(2))
    return k, v


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope, of_queries: list[int]
) -> torch.Tensor:
    """The truth for one row: q (q_len, heads, dim), k and v (length, KV_HEADS, dim), any dtype.

    of_queries: the factor set of each query.
    """
    length = k.shape[0]
    positions = torch.arange(length)
    queries = positions[length - q.shape[0] :]
    out = torch.empty_like(q, dtype=fp64)
    for i, (slot, set_index) in enumerate(zip(queries.tolist(), of_queries, strict=True)):
        sets = torch.tensor([set_index])
        q_rot = truth.rotary(q[None].double(), queries, rope, sets=sets).ref64[0]
        k_rot = truth.rotary(k[None].double(), positions, rope, sets=sets).ref64[0]
        for head in range(q.shape[1]):
            of_head = head // (q.shape[1] // k.shape[1])
            scores = k_rot[: slot + 1, of_head] @ q_rot[i, head] * q.shape[2] ** -0.5
            out[i, head] = scores.softmax(0) @ v[: slot + 1, of_head].double()
    return out


def assert_decodes(
    cache: Cache,
    row: int,
    k: torch.Tensor,
    v: torch.Tensor,
    set_index: int,
    q_len: int = 1,
    layer: int = 0,
) -> None:
    """The row answers as a sequence of keys k and values v under this set does.

    Where rows keep no set, it is that of the last query; each other takes that of its own length.
    """
    of_queries = [set_index] * q_len
    if cache.sets is None:
        of_queries = [cache.rope.set_index(len(k) - q_len + 1 + i) for i in range(q_len)]
        assert of_queries[-1] == set_index
    q = torch.randn(cache.batch, q_len, 2 * KV_HEADS, DIM, dtype=fp64)
    out = cache.decode(q, layer, backend="reference")
    assert isinstance(out, torch.Tensor)
    wanted = attend(q[row], k, v, cache.rope, of_queries)
    torch.testing.assert_close(out[row].cpu(), wanted, rtol=1e-9, atol=1e-9)


def state(cache: Cache) -> list[Any]:
    """All that a call that fails may not change: bookkeeping, device tensors, every byte stored."""
    counters = [cache.lens, cache.block_table, cache.sets]
    pools = [pool.view(torch.uint8) for pool in (*cache._k, *cache._v)]
    shown = [None if x is None else x.clone() for x in (*counters, cache._newest, *pools)]
    rows = {name: str(value) for name, value in vars(cache._rows).items()}
    return [shown, rows, [list(getattr(cache, name, [])) for name in ("_free", "_users")]]


def assert_same_state(cache: Cache, before: list[Any]) -> None:
    after = state(cache)
    assert after[1:] == before[1:]
    for a, b in zip(after[0], before[0], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
