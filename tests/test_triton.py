"""What is particular to the Triton backend; that it is right, test_rotary_*.py say."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import CUDA

from longrope_kernels import FactorSet, Rope
from longrope_kernels import attention as longrope_attention
from longrope_kernels.backends import reference
from longrope_kernels.backends.triton import attention, device, rotary
from longrope_kernels.calls import kinds
from longrope_kernels.calls.records import RotaryCall, Selection
from longrope_kernels.kernels import attention as forward
from longrope_kernels.kernels import attention_backward as backward
from longrope_kernels.kernels import rotary as kernels
from longrope_kernels.kernels.attention_tiles import UNEVEN, nearest
from longrope_kernels.kernels.rotation import cos_sin, phase, sequence_of_token, set_of_length

DEVICE = "cuda" if CUDA else "cpu"

# ------------------------------------------------------------------------------- building blocks


@triton.jit
def _phase_kernel(p_n, p_step, p_out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(p_out + i, phase(tl.load(p_n + i), tl.load(p_step + i)))


@triton.jit
def _cos_sin_kernel(p_phase, p_cos, p_sin, N: tl.constexpr):
    i = tl.arange(0, N)
    cos, sin = cos_sin(tl.load(p_phase + i))
    tl.store(p_cos + i, cos)
    tl.store(p_sin + i, sin)


@triton.jit(do_not_specialize=["search_step"])
def _select_kernel(
    p_cu_seqlens,
    p_lengths,
    p_max_length,
    p_sequence,
    p_set,
    sequences,
    search_step,
    SETS: tl.constexpr,
    N: tl.constexpr,
):
    i = tl.arange(0, N)
    sequence = sequence_of_token(i.to(tl.int64), p_cu_seqlens, 1, sequences, search_step)
    tl.store(p_sequence + i, sequence)
    tl.store(p_set + i, set_of_length(tl.load(p_lengths + sequence), p_max_length, SETS))


def phases() -> torch.Tensor:
    """Both sides of every octant's border, and 8192 phases at random: int32."""
    borders = [octant * 2**29 + d for octant in range(-4, 5) for d in (-2, -1, 0, 1, 2)]
    inside = [u for u in borders if -(2**31) <= u < 2**31]
    rest = torch.randint(-(2**31), 2**31, (8192 - len(inside),))
    return torch.cat((torch.tensor(inside), rest)).int()


def test_cos_sin_within_2e_7_in_every_quadrant() -> None:
    u = phases().to(DEVICE)
    cos, sin = (torch.empty(u.shape, device=DEVICE) for _ in range(2))
    _cos_sin_kernel[(1,)](u, cos, sin, N=u.numel())
    angle = u.cpu().double() * (2 * math.pi / 2**32)
    assert (cos.cpu().double() - angle.cos()).abs().max() < 2e-7
    assert (sin.cpu().double() - angle.sin()).abs().max() < 2e-7


def test_cos_sin_is_exact_on_the_axes() -> None:
    u = torch.tensor([0, 2**30, -(2**31), -(2**30)], dtype=torch.int32, device=DEVICE)
    cos, sin = (torch.empty(4, device=DEVICE) for _ in range(2))
    _cos_sin_kernel[(1,)](u, cos, sin, N=4)
    assert cos.tolist() == [1, 0, -1, 0]
    assert sin.tolist() == [0, 1, 0, -1]


def test_phase_is_the_top_half_of_the_wrapped_product() -> None:
    ends = [0, 1, -1, 2**31 - 1, -(2**31), 12345]
    n = torch.tensor(ends + torch.randint(-(2**31), 2**31, (250,)).tolist())
    step = torch.randint(-(2**63), 2**63 - 1, (256,))
    out = torch.empty(256, dtype=torch.int32, device=DEVICE)
    _phase_kernel[(1,)](n.to(DEVICE), step.to(DEVICE), out, N=256)
    wrapped = [(a * b % 2**64) >> 32 for a, b in zip(n.tolist(), step.tolist(), strict=True)]
    assert out.tolist() == [u - 2**32 if u >= 2**31 else u for u in wrapped]


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 5, 8, 9, 33])
def test_tokens_find_their_sequence_and_set(sequences: int) -> None:
    """Empty sequences, and tokens past the end, included."""
    tokens = 64
    cuts = torch.randint(0, tokens - 8, (sequences + 1,)).sort().values
    cuts[0] = 0
    lengths = torch.randint(0, 300, (sequences,))
    lengths[0] = 100
    bounds = torch.tensor([99, 100, 200, 2**62])
    sequence = torch.searchsorted(cuts[1:], torch.arange(tokens), right=True)
    sequence = sequence.clamp(max=sequences - 1)
    expected = torch.searchsorted(bounds, lengths[sequence])
    got, got_set = (torch.empty(tokens, dtype=t, device=DEVICE) for t in (torch.int64, torch.int32))
    _select_kernel[(1,)](
        cuts.to(DEVICE),
        lengths.to(DEVICE),
        bounds.to(DEVICE),
        got,
        got_set,
        sequences,
        kernels._power_of_2(sequences) // 2,
        SETS=4,
        N=tokens,
    )
    assert got.tolist() == sequence.tolist()
    assert got_set.tolist() == expected.tolist()


# ----------------------------------------------------------------------------------------- launch


def rotate(
    q: torch.Tensor, k: torch.Tensor, rope: Rope, positions: torch.Tensor, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backend without the public function."""
    out = (q, k) if inplace else (torch.empty_like(q), torch.empty_like(k))
    call = RotaryCall(q, k, positions, rope.tables(q.device), Selection())
    rotary.rotary(call, *out)
    return out


class CountingKernel:
    """Stands for `rotary_kernel`, notes each grid and launches nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> CountingKernel:
    counting = CountingKernel()
    monkeypatch.setattr(kernels, "rotary_kernel", counting)
    return counting


def test_q_and_k_in_one_launch(kernel: CountingKernel) -> None:
    q, k = (torch.empty(2, 40, heads, 32, device=DEVICE) for heads in (4, 2))
    rotate(q, k, Rope.plain(32), torch.arange(40, device=DEVICE).expand(2, 40))
    assert len(kernel.grids) == 1


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_nothing_to_do_launches_nothing(
    kernel: CountingKernel, shape: tuple[int, int, int]
) -> None:
    q = torch.empty(*shape, 32, device=DEVICE)
    positions = torch.zeros(shape[:2], dtype=torch.int64, device=DEVICE)
    rotate(q, q[:, :, :0], Rope.plain(32), positions)
    assert kernel.grids == []


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("seq", "heads", "pairs", "rest"),
    [
        (8192, 32, 64, 0),
        (1, 32, 64, 0),
        (1, 1, 1, 0),
        (8192, 8, 4, 504),
        (3, 5, 7, 1),
        (9, 2, 2048, 0),
    ],
)
def test_a_tile_fits_the_registers(
    seq: int, heads: int, pairs: int, rest: int, itemsize: int, interleaved: bool
) -> None:
    tile = kernels.choose_tile(seq, heads, pairs, rest, itemsize, interleaved)
    assert 1 <= tile.warps <= 4
    assert tile.tokens < 2 * seq
    assert tile.heads < 2 * heads
    row = max(2 * kernels._power_of_2(pairs), kernels._power_of_2(rest)) * itemsize
    of_thread = tile.tokens * tile.heads * row / (32 * tile.warps)
    assert of_thread <= max(128, row / 128), "more than eight loads of 16 bytes a thread"


@pytest.mark.parametrize("programs", [1, 3, 100, 512, 5000])
@pytest.mark.parametrize("groups", [1, 2, 7, 10, 64])
def test_few_tokens_share_the_heads_among_programs(programs: int, groups: int) -> None:
    of_program = kernels.choose_groups(programs, groups)
    assert 1 <= of_program <= groups
    assert of_program == groups if programs >= 512 else programs * -(-groups // of_program) <= 1024


# -------------------------------------------------------------------------------- wide addresses

# Two strides of it are 2**31 elements, and it fits an int32 itself: products must be int64.
FAR = 2**30


@pytest.fixture
def far_memory(tmp_path: Path) -> torch.Tensor:
    """2**31 + 1024 bf16 elements; on the CPU in a sparse file, of which only used pages exist."""
    size = 2 * FAR + 1024
    if CUDA:
        return torch.empty(size, dtype=torch.bfloat16, device="cuda")
    return torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "seq", "heads"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_offsets_above_2_31_elements(
    far_memory: torch.Tensor, axis: int, interleaved: bool
) -> None:
    shape, strides = [1, 1, 1, 40], [40, 40, 40, 1]
    shape[axis], strides[axis] = 3, FAR
    far = far_memory.as_strided(shape, strides)
    far.copy_(torch.randn(shape))
    near = far.clone(memory_format=torch.contiguous_format)
    positions = torch.randint(0, 2**31, shape[:2]).to(DEVICE)
    rope = Rope((FactorSet((1.5,) * 16),), interleaved=interleaved)
    k = far[:, :, :0]
    rest = (positions, rope.tables(far.device), Selection())
    expected, _ = reference.rotary(RotaryCall(near, near[:, :, :0], *rest))

    out = torch.empty_like(near, memory_format=torch.contiguous_format)
    rotary.rotary(RotaryCall(far, k, *rest), out, k)
    torch.testing.assert_close(out, expected)
    assert torch.equal(far, near)
    rotate(far, k, rope, positions, inplace=True)
    torch.testing.assert_close(far, expected)


# ----------------------------------------------------------------------------------- availability


def test_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'longrope-kernels[triton]'" in str(device.missing())


def test_missing_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "LONGROPE_PTX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(device.missing())


def test_the_interpreter_needs_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.missing() is None
    assert device.interpreting()


def test_a_device_is_asked_for_its_numbers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        return SimpleNamespace(major=9, minor=index, multi_processor_count=100 + index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device._numbers.cache_clear()
    assert [device._numbers(index) for index in (0, 1, 0)] == [(90, 100), (91, 101), (90, 100)]
    device._numbers.cache_clear()
    assert asked == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    """The interpreter's conversion once made 1e-38 of a bfloat16 zero."""
    x = torch.zeros(1, 3, 2, 16, dtype=dtype, device=DEVICE)
    rope = Rope((FactorSet((1.5,) * 8),))
    out, _ = rotate(x, x[:, :, :0], rope, torch.arange(3, device=DEVICE)[None])
    assert not out.any()


# -------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("at_once", [1, 2])
def test_kv_heads_in_turns(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the scratch has room for, the last time what is left."""
    q, k, v = (torch.randn(1, 20, n, 32, device=DEVICE).bfloat16() for n in (6, 3, 3))
    given = (q, k, v, torch.arange(20, device=DEVICE), Rope.plain(32))
    named: dict[str, Any] = {"k_rotation": "prepass", "backend": "triton", "return_lse": True}
    together = longrope_attention(*given, **named)
    kinds.forget()
    monkeypatch.setattr(attention, "_SCRATCH_BYTES", at_once * 20 * 32 * 2)
    launched: list[int] = []
    run = attention.run

    def watched(plan: Any, call: Any, *rest: Any) -> None:
        launched.append(call.keys.heads)
        run(plan, call, *rest)

    monkeypatch.setattr(attention, "run", watched)
    for one, other in zip(longrope_attention(*given, **named), together, strict=True):
        assert torch.equal(one, other)
    assert launched == {1: [1, 1, 1], 2: [2, 1]}[at_once]


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 120])
def test_every_head_dim_has_tiles_that_products_take(arch: int) -> None:
    for dim, masks in itertools.product(range(16, 257), itertools.product((False, True), repeat=4)):
        interleaved, packed, window, padded = masks
        chosen = [forward.choose_config(arch, dim, among, *masks) for among in (False, True)]
        softcap = 50.0 * padded
        chosen += filter(
            None, backward.choose_configs(arch, dim, softcap, window, packed, interleaved)
        )
        assert {size for config in chosen for size in config[:2]} <= {16, 32, 64, 128}, (dim, masks)


def test_uneven_head_dims_share_an_entry_until_they_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = forward.CONFIGS[90]
    for dim in (17, 40, 72, 100, 120, 248):
        assert forward.choose_config(90, dim, False) is table[UNEVEN][0]
    assert forward.choose_config(90, 80, False) is table[96][0]
    tuned = (table[128][1],) * 3
    monkeypatch.setitem(table, 72, tuned)
    assert nearest(forward.CONFIGS, 90, 72) is tuned
