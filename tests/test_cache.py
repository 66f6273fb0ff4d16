"""Caches: what is written where, sharing, full caches, float8, memory that stays in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from cache_cases import (
    DIM,
    KV_HEADS,
    ROPE,
    Cache,
    Maker,
    assert_decodes,
    assert_same_state,
    bf16,
    dense,
    every_cache,
    fp8,
    fp32,
    fp64,
    paged,
    state,
    tokens,
)

from longrope_kernels import CacheFullError, KVCache, PagedKVCache, Rope

E4M3 = torch.arange(256, dtype=torch.uint8).view(fp8)


def assert_row(cache: KVCache | PagedKVCache, row: int, k: torch.Tensor, v: torch.Tensor) -> None:
    got = cache.gather(row)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


@every_cache
@pytest.mark.parametrize("dtype", [fp64, fp32, bf16, torch.float16])
def test_all_rows_alike(make: Maker, dtype: torch.dtype) -> None:
    cache = make(policy="switch", dtype=dtype)
    parts = [tokens(3, count, dtype=dtype) for count in (1, 15, 1, 16, 17)]
    for k, v in parts:
        cache.append(k, v)
    assert cache.lengths == (50, 50, 50)
    assert cache.lens.tolist() == [50, 50, 50]
    assert cache.k().dtype == dtype
    for row in range(3):
        assert_row(
            cache, row, *(torch.cat([x[row] for x in xs]) for xs in zip(*parts, strict=True))
        )


@every_cache
def test_each_row_its_own_count(make: Maker) -> None:
    """Packed tokens, and the same in rows whose tokens come last; in an order of their own."""
    packed, padded = make(policy="switch"), make(policy="switch")
    counts, rows = (17, 0, 3), (2, 0, 1)
    k, v = tokens(3, 17)
    flat = [torch.cat([x[i, 17 - count :] for i, count in enumerate(counts)]) for x in (k, v)]
    for step in range(2):
        packed.append(*flat, counts, rows)
        padded.append(k, v, counts, rows)
        assert packed.lengths == padded.lengths == (0, 3 * (step + 1), 17 * (step + 1))
    for cache in (packed, padded):
        for i, row in enumerate(rows):
            new = [x[i, 17 - counts[i] :] for x in (k, v)]
            assert_row(cache, row, *(torch.cat((x, x)) for x in new))


@every_cache
@pytest.mark.parametrize("q_len", [1, 4, 16, 17])
def test_a_write_touches_new_tokens_only(make: Maker, q_len: int) -> None:
    cache = make(policy="switch")
    cache.append(*tokens(3, 20))
    counts = (q_len, 0, q_len // 2)
    cache.extend(counts)
    before = [x.clone() for x in (cache.k(), cache.v())]
    changed = torch.zeros(cache._k[0].shape[0], dtype=torch.bool)
    for row, count in enumerate(counts):
        changed[cache._places(row, 20, 20 + count)] = True
    cache.write(*tokens(3, q_len))
    for x, old in zip((cache.k(), cache.v()), before, strict=True):
        same = (x.view(fp64) == old.view(fp64)) | (x.isnan() & old.isnan())
        assert torch.equal(~same.flatten(0, 1).all(-1).all(-1), changed)


@every_cache
def test_layers_share_lengths(make: Maker) -> None:
    cache = make(policy="switch", layers=3)
    layers = [tokens(3, 5) for _ in range(3)]
    cache.extend(5)
    for layer in (2, 0, 1):
        cache.write(*layers[layer], layer)
    cache.extend((2, 18, 1))
    more = [tokens(21) for _ in range(3)]
    for layer in range(3):
        cache.write(*more[layer], layer)
    assert cache.lengths == (7, 23, 6)
    for layer in range(3):
        for got, x, y in zip(cache.gather(1, layer), layers[layer], more[layer], strict=True):
            assert torch.equal(got, torch.cat((x[1], y[2:20])))


@every_cache
def test_decode_equals_the_truth(make: Maker) -> None:
    cache = make(policy="switch")
    k, v = tokens(55)
    cache.append(k, v, (19, 36, 0))
    assert_decodes(cache, 0, k[:19], v[:19], 0, q_len=3)
    assert_decodes(cache, 1, k[19:], v[19:], 2, q_len=16)


@every_cache
def test_fork_and_truncate(make: Maker) -> None:
    cache = make(policy="switch")
    k, v = tokens(40)
    cache.append(k, v, (40, 0, 0))
    cache.fork(0, 2)
    assert cache.lengths == (40, 0, 40)
    more_k, more_v = tokens(3, 2)
    cache.append(more_k, more_v, (2, 0, 1))
    assert_row(cache, 0, torch.cat((k, more_k[0])), torch.cat((v, more_v[0])))
    assert_row(cache, 2, torch.cat((k, more_k[2, 1:])), torch.cat((v, more_v[2, 1:])))
    cache.truncate(0, 21)
    cache.append(more_k[:1], more_v[:1], rows=[0])
    assert_row(cache, 0, torch.cat((k[:21], more_k[0])), torch.cat((v[:21], more_v[0])))
    assert_row(cache, 2, torch.cat((k, more_k[2, 1:])), torch.cat((v, more_v[2, 1:])))


def test_blocks_are_shared_until_written() -> None:
    cache = paged(16)(policy="switch", layers=2)
    assert isinstance(cache, PagedKVCache)
    cache.extend((40, 0, 0))
    for layer in range(2):
        cache.write(*tokens(40), layer)
    assert cache.free_blocks == 12 - 3
    cache.fork(0, 1)
    cache.fork(0, 2)
    assert cache.free_blocks == 12 - 3
    assert cache.block_table[1, :3].tolist() == cache.block_table[0, :3].tolist()
    cache.extend(1)  # two rows copy the last block, the third is alone with it then
    assert cache.free_blocks == 12 - 5
    assert len({int(block) for block in cache.block_table[:, 2]}) == 3
    for layer in range(2):
        gathered = [cache.gather(row, layer)[0][:40] for row in range(3)]
        assert all(torch.equal(x, gathered[0]) for x in gathered)
    cache.truncate(0, 32)
    cache.free(1)
    assert cache.free_blocks == 12 - 3
    cache.extend(1, [0])  # at the border of a block: a new one, and no copy
    assert cache.free_blocks == 12 - 4
    cache.free(0)
    assert cache.free_blocks == 12 - 3
    cache.reset()
    assert cache.free_blocks == 12
    assert cache.lengths == (0, 0, 0)


def test_out_of_blocks() -> None:
    """The error says how many are missing; what is freed can be used at once."""
    cache = PagedKVCache(ROPE, 3, 4, 16, KV_HEADS, DIM, dtype=fp64, policy="switch")
    assert cache.max_length == 64
    cache.append(*tokens(56), (40, 16, 0))
    cache.fork(0, 2)
    before = state(cache)
    with pytest.raises(CacheFullError, match=r"counts.*at most 0 more blocks.*need 4") as caught:
        cache.append(*tokens(3, 9))  # row 0 a copy and a block, the others a block each
    assert (caught.value.needed, caught.value.free, caught.value.row) == (4, 0, None)
    assert_same_state(cache, before)
    cache.free(1)
    cache.append(*tokens(2, 8), rows=[0, 2])
    assert cache.free_blocks == 0


@every_cache
def test_out_of_slots(make: Maker) -> None:
    cache = make(policy="switch")
    cache.append(*tokens(60), (60, 0, 0))
    before = state(cache)
    with pytest.raises(
        CacheFullError, match=r"counts.*at most 4 tokens for row 0.*got 5"
    ) as caught:
        cache.append(*tokens(3, 5))
    assert (caught.value.needed, caught.value.free, caught.value.row) == (5, 4, 0)
    assert_same_state(cache, before)
    cache.append(*tokens(3, 4))
    assert cache.lengths == (64, 4, 4)


@every_cache
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on(make: Maker, copied: Callable[[Cache], Cache]) -> None:
    cache = make(policy="switch")
    cache.append(*tokens(3, 5))
    other, new = copied(cache), tokens(3, 2)
    for one in (cache, other):
        one.append(*new)
    assert other.lens.tolist() == [7, 7, 7]
    assert_same_state(other, state(cache))
    q = tokens(3, 1)[0]
    assert torch.equal(other.decode(q), cache.decode(q))


@every_cache
def test_memory_stays_where_it_is(make: Maker) -> None:
    """What a CUDA graph reads: storage, lengths, sets, block table, addresses of new tokens."""

    def addresses() -> list[int]:
        assert cache.sets is not None
        table = [] if cache.block_table is None else [cache.block_table]
        held = [cache.k(), cache.v(), cache.lens, cache.sets, cache._newest, *table]
        return [x.data_ptr() for x in held]

    cache = make(policy="pin")
    first = addresses()
    cache.append(*tokens(3, 20))
    cache.truncate(0, 3)
    cache.free(1)
    cache.fork(0, 1)
    cache.append(*tokens(3, 1))
    cache.reset()
    cache.pin(0, length=50)
    assert addresses() == first
    assert cache.lens.tolist() == [0, 0, 0]


@every_cache
def test_float8_rounds_to_nearest_and_saturates(make: Maker) -> None:
    """Against all numbers that e4m3 has: the nearest, of two the even one, 448 beyond."""
    scale = torch.tensor([1.0, 0.25])
    cache = make(policy="switch", dtype=fp8, k_scale=scale, v_scale=2 * scale)
    numbers = E4M3.double()[E4M3.double().isfinite()]
    middles = numbers.unique().unfold(0, 2, 1).mean(1)  # exact, and in float32 as well
    special = torch.tensor([448.0, 449, 463, 480, 1e30, -1e30, torch.inf, -torch.inf, 0.0])
    x = torch.cat((numbers, middles, special.double(), torch.randn(100).double() * 100))
    x = torch.nn.functional.pad(x, (0, 3 * 64 * DIM - len(x))).view(3, 64, 1, DIM)
    k = torch.cat((x, x * 0.25), 2).float()
    cache.append(k, 2 * k)

    distance = (x.clamp(-448, 448).reshape(-1, 1) - numbers).abs()
    odd = E4M3.view(torch.uint8)[E4M3.double().isfinite()] % 2
    wanted = numbers[(distance + odd * 1e-9).argmin(1)].view(3, 64, DIM)
    for row in range(3):
        for got, by in zip(cache.gather(row), (1.0, 2.0), strict=True):
            assert torch.equal(got[:, 0].double(), by * wanted[row])
            assert torch.equal(got[:, 1].double(), by * 0.25 * wanted[row])


@pytest.mark.parametrize("scaled", [False, True])
@every_cache
def test_float8_decode_uses_the_scales(make: Maker, scaled: bool) -> None:
    scale = torch.tensor([[0.5, 2.0], [3.0, 5 / 128]]) if scaled else None
    cache = make(policy="switch", dtype=fp8, layers=2, k_scale=scale, v_scale=scale)
    cache.extend((9, 40, 3))
    for layer in range(2):
        cache.write(*tokens(52, dtype=bf16), layer)
    q = torch.randn(3, 2, 4, DIM, dtype=fp64)
    for layer in range(2):
        plain = make(policy="switch")
        gathered = [cache.gather(row, layer) for row in range(3)]
        plain.append(*(torch.cat(x).double() for x in zip(*gathered, strict=True)), (9, 40, 3))
        out = cache.decode(q, layer, backend="reference")
        torch.testing.assert_close(out, plain.decode(q, backend="reference"), rtol=1e-9, atol=1e-9)


@every_cache
def test_inference_mode_and_gradients(make: Maker) -> None:
    """A cache made in inference mode serves outside of it; none keeps a graph of its tokens."""
    with torch.inference_mode():
        cache = make(policy="pin")
        cache.append(*tokens(3, 4))
    k, v = (x.requires_grad_() for x in tokens(3, 4))
    cache.append(k, v)
    assert not cache.k().requires_grad
    with torch.inference_mode():
        cache.append(*tokens(3, 1))
    assert cache.lengths == (9, 9, 9)
    assert torch.equal(cache.gather(1)[0][4:8], k[1])


@every_cache
@pytest.mark.parametrize("dtype", [fp32, bf16, fp8], ids=str)
def test_autocast_writes_in_the_dtype_of_the_cache(make: Maker, dtype: torch.dtype) -> None:
    """k and v of any; a float8 cache rounds them once."""
    cache, plain = (make(policy="pin", dtype=dtype) for _ in range(2))
    k, _ = tokens(3, 4, dtype=fp32)
    _, v = tokens(3, 4, dtype=bf16)
    with torch.autocast("cpu", dtype=bf16):
        cache.append(k, v)
        cache.extend(4)
        cache.write(k, v)
    for _ in range(2):
        plain.append(*((k, v) if dtype == fp8 else (k.to(dtype), v.to(dtype))))
    for found, expected in zip(cache.gather(1), plain.gather(1), strict=True):
        assert torch.equal(found, expected)
    if dtype != fp8:
        with pytest.raises(TypeError, match=r"[kv]: expected (float32|bfloat16), got"):
            cache.append(k, v)


@every_cache
def test_another_default_device_does_not_matter(make: Maker) -> None:
    cache = make(policy="pin")
    k, v = tokens(23)
    with torch.device("meta"):
        cache.append(k, v, (17, 0, 6))
        cache.fork(0, 1)
        cache.append(k[:3, None], v[:3, None])
    assert_row(cache, 1, torch.cat((k[:17], k[1:2])), torch.cat((v[:17], v[1:2])))


def test_one_set_needs_no_policy() -> None:
    rope = Rope.plain(DIM)
    for policy in (None, "switch", "pin", "recompute"):
        cache = dense(rope, policy=policy)
        k, v = tokens(3, 30)
        cache.pin(0, length=50)
        cache.append(k, v)
        assert cache.sets is None
        assert_decodes(cache, 0, k[0], v[0], 0)


def test_kv_start_and_other_arguments_pass_through() -> None:
    cache = paged(16)(policy="switch")
    k, v = tokens(3, 24)
    cache.append(k, v)
    q = torch.randn(3, 1, 4, DIM, dtype=fp64)
    start = torch.tensor([0, 5, 3])
    out, lse = cache.decode(q, kv_start=start, return_lse=True, backend="reference")
    assert lse.shape == (3, 4, 1)
    shorter = dense(policy="switch")
    shorter.append(
        torch.cat([k[i, s:] for i, s in enumerate(start)]),
        torch.cat([v[i, s:] for i, s in enumerate(start)]),
        (24, 19, 21),
    )
    torch.testing.assert_close(out, shorter.decode(q, backend="reference"), rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match="block_table"):
        cache.decode(q, block_table=cache.block_table)
