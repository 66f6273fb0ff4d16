"""What only the native `decode` has: instruction sets, vector tails, splits, threads, offsets."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longrope_kernels import FactorSet, Rope, decode
from longrope_kernels.backends import native
from longrope_kernels.calls.records import DecodeCall, Keys, Scores, Selection

bf16 = torch.bfloat16
DTYPES = (torch.float32, bf16, torch.float16)


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Each one that this processor runs; without the extension the file fails to import."""
    return str(request.param)


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: torch.Tensor,
    rope: Rope,
    instruction_set: str = "",
    block_table: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by one instruction set ("" is the best), onto poisoned memory."""
    batch, queries, heads, dim = q.shape
    out = torch.full_like(q, torch.nan)
    lse = torch.full((batch, heads, queries), torch.nan)
    keys = Keys(k, v, key_positions, lens=lens, block_table=block_table)
    scores = Scores(True, dim**-0.5, window or 0, softcap or 0.0)
    call = DecodeCall(q, keys, rope.tables(q.device), Selection(), scores)
    native.decode(call, out, lse, instruction_set)
    return out, lse


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: torch.Tensor,
    rope: Rope,
    instruction_set: str = "",
    **more: Any,
) -> None:
    """At most twice as far from float64 as the reference in the dtype of q, and an ulp."""
    got = run(q, k, v, lens, rope, instruction_set, **more)
    options = {**more, "return_lse": True, "backend": "reference"}
    exact = decode(q.double(), k.double(), v.double(), lens, rope, **options)
    reference = decode(q, k, v, lens, rope, **options)
    for name, x, own, truth in zip(("out", "lse"), got, reference, exact, strict=True):
        seen = truth.isfinite()
        assert torch.equal(x.isfinite(), seen), name
        error = (x.double() - truth)[seen].abs().max()
        own_error = (own.double() - truth)[seen].abs().max()
        allowed = 2 * own_error + torch.finfo(x.dtype).eps * truth[seen].abs().max()
        assert error <= allowed, (name, float(error), float(allowed))


def random_cache(
    lens: tuple[int, ...],
    queries: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and lens; NaN past the end of each sequence."""
    q = torch.randn(len(lens), queries, heads, dim).to(dtype)
    k, v = torch.randn(2, len(lens), max(lens) + 3, kv_heads, dim).to(dtype)
    for b, n in enumerate(lens):
        k[b, n:] = v[b, n:] = torch.nan
    return q, k, v, torch.tensor(lens)


# Tails alone, one and several vectors of every width, with and without a tail, in both halves of a
# pair, in what is not rotated, and in the values.
@pytest.mark.parametrize(
    ("dim", "pairs"),
    [
        *((2, 1), (9, 3), (16, 8), (40, 7), (64, 32), (80, 40), (96, 48), (100, 50), (128, 32)),
        *((200, 64), (256, 128), (250, 101)),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree_with_the_formula(
    instruction_set: str, dtype: torch.dtype, interleaved: bool, dim: int, pairs: int
) -> None:
    torch.manual_seed(dim)
    rope = Rope((FactorSet((1.5,) * pairs, 11, 1.2),), interleaved=interleaved)
    cache = random_cache((70, 9), 1, 8, 2, dim, dtype)
    check(*cache, rope, instruction_set)


# Rows of a KV head: what is left of a block of them, one block, and many.
@pytest.mark.parametrize(
    ("group", "queries"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 16), (9, 2), (4, 16)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_group(
    instruction_set: str, dtype: torch.dtype, group: int, queries: int
) -> None:
    torch.manual_seed(group * queries)
    cache = random_cache((67, 130), queries, 2 * group, 2, 32, dtype)
    for options in ({}, {"window": 40}, {"softcap": 2.0}):
        check(*cache, Rope.plain(32), instruction_set, **options)


# Heads of frequent models have code of their own for up to 8 rows of a KV head.
@pytest.mark.parametrize(("dim", "pairs"), [(128, 64), (96, 48), (128, 48)])
@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_frequent_heads(
    instruction_set: str, dtype: torch.dtype, rows: int, dim: int, pairs: int
) -> None:
    torch.manual_seed(rows)
    queries = 2 if rows % 2 == 0 else 1
    cache = random_cache((70, 9, 1), queries, rows // queries * 3, 3, dim, dtype)
    rope = Rope((FactorSet(tuple(1 + 0.5 * i for i in range(pairs)), 11, 1.2),))
    check(*cache, rope, instruction_set)


# Splits hold 256 keys, tiles 64, groups 4 or 16; 64 splits at most, then they grow.
@pytest.mark.parametrize(
    "keys", [1, 3, 4, 5, 17, 63, 64, 65, 255, 256, 257, 5000, 16384, 16385, 20001]
)
def test_splits(keys: int) -> None:
    torch.manual_seed(keys)
    check(*random_cache((keys, 3), 2, 2, 1, 8, torch.float32), Rope.plain(8))


def test_blocks_change_no_bit() -> None:
    torch.manual_seed(0)
    q, k, v, lens = random_cache((3000, 1000), 1, 2, 1, 16, bf16)
    pools = torch.full((2, 400, 16, 1, 16), torch.nan, dtype=bf16)
    block_table = torch.randperm(400)[: 2 * 190].view(2, 190).to(torch.int32)
    for b, n in enumerate(lens.tolist()):
        slot = torch.arange(n)
        block = block_table[b, slot // 16].long()
        pools[0, block, slot % 16], pools[1, block, slot % 16] = k[b, :n], v[b, :n]
    dense = run(q, k, v, lens, Rope.plain(16))
    paged = run(q, pools[0], pools[1], lens, Rope.plain(16), block_table=block_table)
    assert all(torch.equal(x, y) for x, y in zip(dense, paged, strict=True))


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(instruction_set: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = random_cache((1500, 0, 700), 2, 4, 2, 32, dtype)
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(run(*cache, Rope.plain(32), instruction_set))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_small_calls_stay_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    extension = native._native
    assert extension is not None

    class Spy:
        @staticmethod
        def decode(*arguments: object) -> None:
            seen.append(arguments[-2])
            extension.decode(*arguments)

    monkeypatch.setattr(native, "_native", Spy)
    for keys in (8, 4096):
        run(*random_cache((keys,), 1, 1, 1, 16, torch.float32), Rope.plain(16))
    assert seen == [1, torch.get_num_threads()]


# Positions that follow one another share their cosines and sines by groups of four; these do for
# a while, with jumps, repetitions and the threshold inside of groups.
@pytest.mark.parametrize("start", [0, 90, -50, 2**21 - 30, 2**31 - 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_that_follow_one_another(
    instruction_set: str, dtype: torch.dtype, start: int
) -> None:
    torch.manual_seed(0)
    rope = Rope((FactorSet((1.5, 8.0, 30.0, 1.0) * 8, 100, 1.2),))
    positions = start + torch.arange(150)
    positions[37:] += 80
    positions[70] = positions[69]
    positions[90:] = positions[90:].flip(0)
    cache = random_cache((150,), 3, 2, 1, 64, dtype)
    check(*cache, rope, instruction_set, key_positions=positions[None])


# The scale of scores is fused into differences of them, or not: a largest one stays the largest.
@pytest.mark.parametrize("keys", [1, 3000])
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("score", [333.3, 1e4, 1e8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_one_score_weigh_the_same_however_large_it_is(
    instruction_set: str, dtype: torch.dtype, score: float, queries: int, keys: int
) -> None:
    torch.manual_seed(0)
    q, k, v, lens = random_cache((keys + queries - 1,), queries, 4, 1, 64, dtype)
    for x in (q, k):
        x[..., :2], x[..., 2:] = 0, score**0.5 / 2.78  # the first pair alone is rotated
    check(q, k, v, lens, Rope((FactorSet((1.0,)),)), instruction_set)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["blocks", "slots", "heads"])
def test_offsets_above_2_to_the_31_elements(axis: int) -> None:
    """A stride beyond int32 in each axis of the caches. The memory is reserved, not used.

    The view begins in the middle, so that an offset that wraps reads zeros and not past the end.
    """
    torch.manual_seed(0)
    far = 2**31 + 256
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = torch.frombuffer(mmap.mmap(-1, 2 * (2 * far + 4096), flags=flags), dtype=bf16)
    strides = [512, 256, 64, 1]
    strides[axis] = far
    small = torch.randn(2, 2, 2, 2, 32).to(bf16)
    k, v = (
        buffer.as_strided((2, 2, 2, 32), strides, far + 1024 * at).copy_(small[at]) for at in (0, 1)
    )
    q, lens, rope = torch.randn(1, 1, 4, 32).to(bf16), torch.tensor([4]), Rope.plain(32)
    block_table = torch.tensor([[1, 0]], dtype=torch.int32)
    expected = run(q, small[0], small[1], lens, rope, block_table=block_table)
    got = run(q, k, v, lens, rope, block_table=block_table)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
