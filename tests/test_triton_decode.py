"""What is particular to decoding by the Triton kernels; that it is right, test_decode_*.py say."""

from __future__ import annotations

import itertools
import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import CUDA
from decode_truth import TRITON, Case, bf16, check, fp8, fp16, same
from test_triton import phases

from longrope_kernels.backends.triton import decode as triton_decode
from longrope_kernels.backends.triton import device as triton_device
from longrope_kernels.calls.records import DecodeCall, Keys, Scores, Selection
from longrope_kernels.kernels import decode as kernels
from longrope_kernels.kernels.decode_float8 import CONVERT, SHIFT, half_of_e4m3
from longrope_kernels.kernels.decode_splits import split_keys
from longrope_kernels.kernels.rotation import cos_sin_approx
from longrope_kernels.kernels.splits import choose_splits, counters_for

DEVICE = "cuda" if CUDA else "cpu"

# ------------------------------------------------------------------------------- building blocks


@triton.jit
def _half_kernel(p_codes, p_out, FLOAT8: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(p_out + i, half_of_e4m3(tl.load(p_codes + i), FLOAT8))


@triton.jit
def _cos_sin_kernel(p_phase, p_cos, p_sin, N: tl.constexpr):
    i = tl.arange(0, N)
    cos, sin = cos_sin_approx(tl.load(p_phase + i))
    tl.store(p_cos + i, cos)
    tl.store(p_sin + i, sin)


@triton.jit
def _split_kernel(p_low, p_high, p_share, p_most, p_out, BLOCK_N: tl.constexpr):
    i = tl.program_id(0)
    splits, first, keys = split_keys(
        tl.load(p_low + i),
        tl.load(p_high + i),
        tl.load(p_share + i),
        tl.load(p_most + i),
        BLOCK_N,
    )
    tl.store(p_out + 3 * i, splits)
    tl.store(p_out + 3 * i + 1, first)
    tl.store(p_out + 3 * i + 2, keys)


@pytest.mark.parametrize("way", [CONVERT.value, SHIFT.value])
def test_all_float8_codes_become_float16(way: int) -> None:
    if CUDA and way == CONVERT.value and torch.cuda.get_device_capability() < (8, 9):
        way = SHIFT.value
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    out = torch.empty(256, dtype=fp16, device=DEVICE)
    _half_kernel[(1,)](codes.to(DEVICE), out, FLOAT8=way)
    expected = codes.view(fp8).to(fp16)
    assert int(expected.isnan().sum()) == 2
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out.cpu()[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_cos_and_sin_of_the_keys_are_within_1e_6() -> None:
    u = phases().to(DEVICE)
    cos, sin = (torch.empty(u.shape, device=DEVICE) for _ in range(2))
    _cos_sin_kernel[(1,)](u, cos, sin, N=u.numel())
    angle = u.cpu().double() * (2 * math.pi / 2**32)
    assert (cos.cpu().double() - angle.cos()).abs().max() < 1e-6
    assert (sin.cpu().double() - angle.sin()).abs().max() < 1e-6


# ----------------------------------------------------------------------------------------- splits


def test_one_sequence_fills_the_places_with_one_wave() -> None:
    splits = choose_splits(units=8, batch=1, capacity=131072, tile=64, places=264, least_tiles=2)
    assert (splits.even, splits.most) == (33, 33)


@pytest.mark.parametrize("units", [1, 8, 100, 256, 264, 300, 1000, 5000])
def test_the_last_wave_is_short(units: int) -> None:
    """The time of the splits chosen is near that of work without any grain."""
    splits = choose_splits(units, 2, 131072, 64, 264, 2)
    waves = math.ceil(units * splits.even / 264)
    one_full_wave = waves == 1 and units * (splits.even + 1) > 264
    assert one_full_wave or waves / splits.even <= 1.15 * units / 264
    assert splits.even <= splits.most


def test_a_small_cache_is_not_split() -> None:
    assert choose_splits(8, 4, 128, 64, 264, 2)[:2] == (1, 1)
    assert choose_splits(8, 4, 129, 64, 264, 2).most == 2


# Each with several splits: fewer tiles than the device has places. The last row of a tile is the
# 64th query of it.
A_FEW_TILES = [
    Case((80,), 64, 1, 1, boundary=(30, 60), dtype=bf16),
    Case((70, 90), 40, 2, 1, block=16, boundary=60, window=33, dtype=fp16),
    Case((90, 0), 33, 1, 1, n_hat=40, kv_start=(20, 0), dtype=bf16),
]


@pytest.mark.parametrize("case", A_FEW_TILES, ids=str)
def test_a_prompt_of_few_tiles_is_split(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    splits_of = kernels.splits_of

    def watched(*args: Any) -> Any:
        found.append(splits_of(*args))
        return found[-1]

    monkeypatch.setattr(kernels, "splits_of", watched)
    if not CUDA:
        wide = kernels.Config(64, 16, 4, 1, 1)
        monkeypatch.setattr(kernels, "config_of", lambda call, arch: wide)
        monkeypatch.setattr(kernels, "_LEAST_KEYS", 16)
    check(TRITON, case.call())
    if not CUDA:
        assert all(splits.most > 1 for splits in found)


def test_splits_cover_the_keys_once() -> None:
    block_n, count = 16, 100
    low = torch.randint(0, 500, (count,))
    high = low + torch.randint(0, 900, (count,))
    high[:10] = low[:10]
    share, most = torch.randint(1, 20, (count,)), torch.randint(1, 12, (count,))
    out = torch.empty(count, 3, dtype=torch.int32, device=DEVICE)
    arguments = (x.int().to(DEVICE) for x in (low, high, share, most))
    _split_kernel[(count,)](*arguments, out, BLOCK_N=block_n)
    for (splits, first, keys), begin, end, at_most in zip(
        out.tolist(), low.tolist(), high.tolist(), most.tolist(), strict=True
    ):
        assert 1 <= splits <= at_most
        assert first == begin // block_n * block_n
        assert keys % block_n == 0
        assert first + splits * keys >= end, "keys are left over"
        assert end == begin or first + (splits - 1) * keys < end, "a split without keys"


def splits_of(case: Case) -> Any:
    given = case.call().arguments
    k, v, lens = (given[name] for name in ("k_cache", "v_cache", "cache_lens"))
    keys = Keys(k, v, lens=lens, block_table=given.get("block_table"))
    tables = given["factors"].tables(k.device)
    call = DecodeCall(given["q"], keys, tables, Selection(), Scores(True, 1.0))
    return kernels.splits_of(call, 0, 16)


@pytest.mark.parametrize(
    "case",
    [
        Case((200,), heads=2, kv_heads=1, n_hat=40, dtype=bf16),
        Case((150, 1, 0, 33), heads=2, kv_heads=1, dim=80, block=16, dtype=fp16),
        Case((100, 90), 3, heads=2, kv_heads=1, kv_start=(70, 0), block=32, dtype=bf16),
        Case((150, 100), 2, heads=2, kv_heads=1, window=20, softcap=5.0, dtype=bf16),
        Case((120,), heads=2, kv_heads=1, positions="any", float8=True, dtype=bf16),
    ],
    ids=str,
)
def test_several_splits_are_one_result(case: Case) -> None:
    """Those of a short sequence that are not live, and those that see nothing, included."""
    assert splits_of(case).most > 1
    check(TRITON, case.call())


def test_every_number_of_splits_has_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((70,), heads=2, kv_heads=1, dim=16, dtype=bf16)
    call = case.call()
    for multiprocessors in (1, 2, 5):
        monkeypatch.setattr(triton_device, "multiprocessors_of", lambda *_, n=multiprocessors: n)
        check(TRITON, call)


def test_one_launch_serves_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs: nothing of a launch follows from values, the set included."""
    case = Case((100, 100), heads=1, kv_heads=1, dim=16, dtype=bf16, block=32, boundary=40)
    arguments = {name: TRITON.move(x) for name, x in case.call().arguments.items()}
    launched: list[Any] = []
    monkeypatch.setattr(triton_decode, "run", lambda *given: launched.append(given))
    out, lse = TRITON.decode(**arguments, return_lse=True)
    monkeypatch.undo()
    assert len(launched) == 1
    for lens in ((40, 41), (0, 17), (100, 1)):
        arguments["cache_lens"].copy_(torch.tensor(lens))
        for launch in launched:
            triton_decode.run(*launch)
        expected = TRITON.decode(**arguments, return_lse=True)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("queries", [1, 5])
def test_the_last_program_combines(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, which leaves what it counted in at 0: the next one is right, too."""
    case = Case((130, 16, 77), queries, 4, 2, 32, dtype=bf16, boundary=76, n_hat=20)
    launched: list[Any] = []
    run = triton_decode.run
    monkeypatch.setattr(triton_decode, "run", lambda *x: (launched.append(x[0](*x[1:])), run(*x)))
    call = case.call()
    for _ in range(2):
        check(TRITON, call)
    assert len(launched) == 2
    for launch in launched:
        given = [x for x in launch.args if isinstance(x, torch.Tensor)]
        (counters,) = (x for x in given if not x.is_floating_point())
        assert not counters.any()


def test_threads_count_apart() -> None:
    """As streams do: each has its own, which is kept and grows."""
    both = threading.Barrier(2)
    held: list[list[torch.Tensor]] = []

    def look() -> None:
        both.wait()
        held.append([counters_for(torch.zeros(1), count) for count in (3, 2, 100)])
        both.wait()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, again, more in held:
        assert first is again
        assert (len(first), len(more)) == (4, 128)
    assert len({x.data_ptr() for of_thread in held for x in of_thread}) == 4


# ---------------------------------------------------------------------------------- tiles and rows


def decoded(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    moved = {name: TRITON.move(x) for name, x in arguments.items()}
    return TRITON.decode(**moved, return_lse=True)


@lru_cache
def dense_call(float8: bool) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """The arguments of a call, and what it returns."""
    case = Case((37, 16), heads=2, kv_heads=1, dim=16, dtype=bf16, float8=float8)
    arguments = case.call().arguments
    return arguments, decoded(arguments)


def paged(dense: dict[str, Any], block_size: int) -> dict[str, Any]:
    """The same in blocks, which lie in reverse order."""
    batch, slots = dense["k_cache"].shape[:2]
    blocks = -(-slots // block_size)
    made = dict(dense)
    for name in ("k_cache", "v_cache"):
        x = same(dense[name])
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * block_size - slots))
        x = x.reshape(batch * blocks, block_size, *x.shape[2:]).flip(0)
        made[name] = x.view(dense[name].dtype)
    ids = torch.arange(batch * blocks, dtype=torch.int32).flip(0).reshape(batch, blocks)
    first = torch.arange(blocks) * block_size
    unused = first >= dense["cache_lens"][:, None]
    made["block_table"] = torch.where(unused, 2**31 - 1, ids).int()
    return made


@pytest.mark.parametrize("block_size", [1, 4, 8, 12, 16, 24, 32, 48])
@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "fp8"])
def test_blocks_narrower_and_wider_than_a_tile_give_the_same_bits(
    block_size: int, float8: bool
) -> None:
    arguments, wanted = dense_call(float8)
    results = decoded(paged(arguments, block_size))
    assert all(torch.equal(x, y) for x, y in zip(results, wanted, strict=True))


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (8, 2), (24, 1), (5, 16)])
def test_rows_fill_one_tile_or_several(heads: int, queries: int) -> None:
    check(TRITON, Case((19,), queries, heads, 1, 16, dtype=fp16).call())


def test_keys_outside_the_window_are_not_read() -> None:
    """NaN there would reach the output through a weight of 0."""
    arguments = Case((90, 33), heads=2, kv_heads=1, dim=16, dtype=bf16, window=10).call().arguments
    clean = TRITON.decode(**{name: TRITON.move(x) for name, x in arguments.items()})
    for name in ("k_cache", "v_cache"):
        for b, length in enumerate((90, 33)):
            arguments[name][b, : length - 10] = torch.nan
    assert torch.equal(TRITON.decode(**{n: TRITON.move(x) for n, x in arguments.items()}), clean)


def test_an_empty_cache_is_seen_by_nobody() -> None:
    empty = torch.empty(2, 0, 1, 16, dtype=bf16, device=DEVICE)
    q = torch.randn(2, 1, 2, 16).to(DEVICE, bf16)
    lens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    out, lse = TRITON.decode(q, empty, empty, lens, [1.0] * 8, 0, return_lse=True)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("keys", [10, 70], ids=["whole", "split"])
def test_offsets_of_queries_above_2_31_elements(keys: int, tmp_path: Path) -> None:
    """Of a token stride that fits 32 bits itself; on the CPU only used pages of the file exist.

    The views begin in the middle, so that an offset that wraps reads no memory of others.
    """
    size = 2**32 + 1024
    if CUDA:
        far = torch.zeros(size, dtype=bf16, device="cuda")
    else:
        far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=bf16)
    sizes, strides = (1, 3, 1, 16), (2**30, 2**30, 16, 1)
    q, out = (far.as_strided(sizes, strides, 2**31 + first) for first in (0, 32))
    case = Case((keys,), 3, 1, 1, 16, dtype=bf16)
    given = {name: TRITON.move(x) for name, x in case.call().arguments.items()}
    q.copy_(given["q"])
    assert (splits_of(case).most > 1) == (keys > 16)
    wanted, lse = TRITON.decode(**given, softmax_scale=1.0, return_lse=True)

    stored = Keys(given["k_cache"], given["v_cache"], lens=given["cache_lens"])
    tables = given["factors"].tables(q.device)
    triton_decode.decode(DecodeCall(q, stored, tables, Selection(), Scores(True, 1.0)), out, lse)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 120])
def test_every_head_dim_has_a_config(arch: int) -> None:
    for dim, rows in itertools.product(range(16, 257), (1, 16, 17, 512)):
        config = kernels.choose_config(arch, dim, rows)
        for size in (config.block_m, config.block_n):
            assert size in (16, 32, 64, 128)


def test_newer_devices_take_the_newest_config_below_them() -> None:
    for dim, (arch, known) in itertools.product((64, 128, 256), ((86, 80), (100, 90), (120, 80))):
        assert kernels.choose_config(arch, dim, 1) is kernels.CONFIGS[known][dim][0]
