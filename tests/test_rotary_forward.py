"""The rotation against the truth: layouts, dtypes, heads, partial rotary, pairings, strides."""

from __future__ import annotations

import mmap

import pytest
import torch
import truth
from cases import (
    REFERENCE,
    Shape,
    Target,
    by_id,
    every_target,
    positions_for,
    special_positions,
)
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope
from longrope_kernels.backends.choose import choose_rotary

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Each value of each axis several times, and the pairs of values that share code.
SHAPES = [
    Shape(2, 63, 4, 2, 96, dtype=bf16),
    Shape(2, 63, 3, 1, 64, layout="bhsd"),
    Shape(1, 1000, 1, 1, 64, dtype=fp16, layout="thd"),
    Shape(1, 1, 1, 1, 128, layout="bhsd", interleaved=True),
    Shape(3, 1, 8, 2, 80, dtype=bf16, layout="bhsd"),
    Shape(1, 130, 2, 2, 128, dtype=bf16, layout="thd", interleaved=True),
    Shape(2, 33, 4, 4, 80, 16, dtype=fp16, interleaved=True),
    Shape(2, 18, 6, 2, 128, 48, dtype=bf16, layout="bhsd"),
    Shape(1, 18, 2, 0, 96, 7, layout="thd"),
    Shape(2, 19, 4, 0, 64, dtype=fp16),
    Shape(2, 20, 5, 1, 10, layout="bhsd", interleaved=True),
    Shape(2, 18, 3, 3, 31, 5),
    Shape(2, 18, 1, 1, 33, 5, dtype=bf16, interleaved=True),
    Shape(5, 3, 32, 8, 96, dtype=bf16),
    Shape(1, 18, 2, 1, 256, layout="thd"),
    Shape(2, 17, 2, 1, 2),
]
FLOAT64 = [
    Shape(2, 63, 4, 2, 96, dtype=fp64),
    Shape(2, 18, 2, 1, 128, 48, dtype=fp64, layout="bhsd", interleaved=True),
    Shape(1, 18, 2, 1, 64, dtype=fp64, layout="thd"),
]


def check(
    target: Target,
    shape: Shape,
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    n_hat: int = 128,
) -> None:
    """Rotate and compare; nothing given may change, nothing returned may alias it."""
    rope = shape.rope(n_hat)
    q, k, positions = (target.move(x) for x in (q, k, positions))
    before = [None if x is None else x.clone() for x in (q, k, positions)]
    outs = target.rotary(q, k, positions, rope, layout=shape.layout)
    for x, copy in zip((q, k, positions), before, strict=True):
        assert x is None or torch.equal(x, copy), "an input changed"
    assert (outs[1] is None) == (k is None)
    for name, x, out in (("q", q, outs[0]), ("k", k, outs[1])):
        if x is None:
            continue
        assert_close(out, truth.rotary(x, positions, rope, layout=shape.layout), name)
        rest = slice(rope.rotary_dim, None)
        assert torch.equal(out[..., rest], x[..., rest]), f"{name}: a pass-through bit changed"
        assert not x.numel() or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", by_id(SHAPES))
@every_target
def test_shapes(target: Target, shape: Shape) -> None:
    tokens = shape.batch * shape.seq
    if shape.layout == "thd":
        positions = positions_for(tokens, 128, torch.int32)
    elif shape.batch % 2:
        positions = positions_for(shape.seq, 128)
    else:
        positions = positions_for(tokens, 128).reshape(shape.batch, shape.seq)
    check(target, shape, *shape.qk(), positions)


@pytest.mark.parametrize("shape", by_id(FLOAT64))
def test_float64_in_the_reference(shape: Shape) -> None:
    """The formula in float64 rounds n * theta / lambda three times: 3 * 2**-53 of the angle."""
    q, k = shape.qk()
    rope, positions = shape.rope(), positions_for(shape.seq, 128)
    allowed = 3 * 2.0**-53 * positions.abs()[:, None, None] + 1e-14
    outs = REFERENCE.rotary(q, k, positions, rope, layout=shape.layout)
    for x, out in zip((q, k), outs, strict=True):
        ref64 = truth.rotary(x, positions, rope, layout=shape.layout).ref64
        error, size = (out - ref64).abs(), 2 * 1.19 * x.abs().max()
        error = error.transpose(1, 2) if shape.layout == "bhsd" else error
        assert out.dtype == fp64
        assert (error <= size * allowed).all()


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@every_target
def test_low_precision_outputs_are_rounded_once_to_nearest(
    target: Target, dtype: torch.dtype
) -> None:
    """Arithmetic is float32 at least: half a unit in the last place, and the promised 1e-6."""
    shape = Shape(2, 63, 2, 1, 96, dtype=dtype)
    rope, (q, k) = shape.rope(attention_factor=1.0), shape.qk()
    positions = positions_for(126, 128).reshape(2, 63)
    for x, out in zip((q, k), target.rotary(q, k, positions, rope), strict=True):
        ref64 = truth.rotary(x, positions, rope).ref64
        _, exponent = torch.frexp(ref64.abs().clamp(min=torch.finfo(dtype).tiny))
        half_unit = torch.finfo(dtype).eps / 4 * 2.0 ** exponent.double()
        error = (out.cpu().double() - ref64).abs()
        assert (error <= half_unit + 2e-6 * x.double().abs().max()).all()


# ------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("n_hat", [0, 1, 128, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@every_target
def test_special_positions(target: Target, dtype: torch.dtype, n_hat: int) -> None:
    safe = special_positions(n_hat, torch.int64).clamp(max=2**31 - 1).to(dtype)
    shape = Shape(1, len(safe), 2, 1, 96)
    check(target, shape, *shape.qk(), safe, n_hat)


@pytest.mark.parametrize("kind", ["ramp", "reversed", "strided", "shared-row", "constant"])
@every_target
def test_position_layouts(target: Target, kind: str) -> None:
    shape = Shape(3, 37, 2, 1, 64)
    ramp = 131072 - 18 + torch.arange(37)
    positions = {
        "ramp": ramp,
        "reversed": ramp.flip(0),
        "strided": (ramp[:, None] + torch.arange(3) * 1000).T,  # column-major (batch, seq)
        "shared-row": ramp.expand(3, 37),
        "constant": torch.tensor(2**21 + 1).expand(37),
    }[kind]
    check(target, shape, *shape.qk(), positions)


@pytest.mark.parametrize("start", [0, 120, 4090, 2**21 - 70, 2**31 - 140])
@every_target
def test_contiguous_run_across_tiles_and_n_hat(target: Target, start: int) -> None:
    """140 tokens in order, so that at least one tile straddles n_hat, 4096 and 2**21."""
    shape = Shape(1, 140, 1, 1, 64, layout="bhsd")
    check(target, shape, *shape.qk(), start + torch.arange(140), 128)


# --------------------------------------------------------------------------------------- strides


def packed(shape: Shape, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as views of something larger; all but the last dimension may be strided."""
    b, s, h, hk, d = shape.batch, shape.seq, shape.heads, shape.kv_heads, shape.dim
    if kind == "qkv-concatenated":
        qkv = torch.randn(b, s, (h + 2 * hk) * d).to(shape.dtype)
        q, k, _ = qkv.split([h * d, hk * d, hk * d], -1)
        return q.unflatten(-1, (h, d)), k.unflatten(-1, (hk, d))
    if kind == "qkv-per-head":
        qkv = torch.randn(b, s, h, 3, d).to(shape.dtype)
        return qkv[..., 0, :], qkv[..., 1, :]
    if kind == "every-second-batch":
        x = torch.randn(2 * b, s, h + hk, d).to(shape.dtype)[::2]
        return x[:, :, :h], x[:, :, h:]
    if kind == "every-third-token":
        x = torch.randn(b, 3 * s, h + hk, d).to(shape.dtype)[:, 1::3]
        return x[:, :, :h], x[:, :, h:]
    if kind == "dim-slice":  # rows that are not 16-byte aligned
        x = torch.randn(b, s, h + hk, d + 3).to(shape.dtype)[..., 1 : d + 1]
        return x[:, :, :h], x[:, :, h:]
    if kind == "heads-first":
        x = torch.randn(h + hk, b, s, d).to(shape.dtype).permute(1, 2, 0, 3)
        return x[:, :, :h], x[:, :, h:]
    if kind == "expanded":
        x = torch.randn(1, s, 1, d).to(shape.dtype)
        return x.expand(b, s, h, d), x.expand(b, s, hk, d)
    if kind == "sliding":  # the token stride is 1, too
        x = torch.randn(b, h + hk, d + s - 1).to(shape.dtype).unfold(-1, d, 1).transpose(1, 2)
        return x[:, :, :h], x[:, :, h:]
    raise AssertionError(kind)


KINDS = ["qkv-concatenated", "qkv-per-head", "every-second-batch", "every-third-token"]
KINDS += ["dim-slice", "heads-first", "expanded", "sliding"]


@pytest.mark.parametrize("kind", KINDS)
@every_target
def test_strided_views(target: Target, kind: str) -> None:
    shape = Shape(2, 19, 2, 2, 32, 12, dtype=bf16, interleaved=kind == "dim-slice")
    q, k = packed(shape, kind)
    check(target, shape, q, k, positions_for(38, 128).reshape(2, 19))


@pytest.mark.parametrize("kind", ["qkv-concatenated", "qkv-per-head", "heads-first"])
@every_target
def test_strided_views_heads_before_tokens(target: Target, kind: str) -> None:
    shape = Shape(2, 19, 2, 2, 32, layout="bhsd", dtype=fp16)
    q, k = (x.transpose(1, 2) for x in packed(shape, kind))
    check(target, shape, q, k, positions_for(19, 128))


@pytest.mark.parametrize("kind", ["qkv-concatenated", "qkv-per-head", "dim-slice"])
@every_target
def test_strided_packed_tokens(target: Target, kind: str) -> None:
    shape = Shape(1, 19, 2, 2, 32, layout="thd")
    q, k = (x[0] for x in packed(shape, kind))
    check(target, shape, q, k, positions_for(19, 128))


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "seq", "heads"])
@every_target
def test_offsets_above_2_to_the_31_elements(target: Target, axis: int) -> None:
    """A stride beyond int32 in each axis. The memory is reserved, not used.

    The view begins in the middle, so that an offset that wraps reads zeros and not past the end.
    """
    far = 2**31 + 256
    elements = 2 * far + 4096
    if target.device == "cuda":
        buffer = torch.zeros(elements, dtype=bf16, device="cuda")
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        buffer = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=bf16)
    sizes, strides = [2, 2, 2, 32], [256, 128, 64, 1]
    strides[axis] = far
    q = buffer.as_strided(sizes, strides, far)
    k = buffer.as_strided(sizes, strides, far + 32)
    for x in (q, k):
        x.copy_(torch.randn(sizes))
    shape = Shape(2, 2, 2, 2, 32, dtype=bf16)
    positions = torch.tensor([[0, 4097], [131072, 2**31 - 1]])
    check(target, shape, q, k, positions)
    expected = [truth.rotary(x, positions, shape.rope()) for x in (q, k)]
    target.rotary(q, k, positions, shape.rope(), inplace=True)
    for x, wanted in zip((q, k), expected, strict=True):
        assert_close(x, wanted)


# ----------------------------------------------------------------------------------------- empty


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@every_target
def test_no_tokens(target: Target, layout: str) -> None:
    shape = Shape(2, 0, 2, 1, 64, layout=layout)
    check(target, shape, *shape.qk(), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("positions_dim", [1, 2])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@every_target
def test_batch_of_zero(target: Target, layout: str, positions_dim: int) -> None:
    shape = Shape(0, 5, 2, 1, 64, layout=layout)
    positions = torch.arange(5) if positions_dim == 1 else torch.zeros(0, 5, dtype=torch.int64)
    check(target, shape, *shape.qk(), positions)


@every_target
def test_no_heads(target: Target) -> None:
    shape = Shape(2, 5, 2, 1, 64)
    q, k = shape.qk()
    check(target, shape, q, k[:, :, :0], torch.arange(5))


# ------------------------------------------------------------------------------------- semantics


@every_target
def test_tokens_below_n_hat_are_not_scaled(target: Target) -> None:
    """Below n_hat the attention factor does not act: the norm stays; from n_hat on it is a."""
    shape = Shape(1, 4, 2, 1, 64)
    q, k = shape.qk()
    positions = torch.tensor([-3, 127, 128, 129])
    rope = shape.rope(n_hat=128, attention_factor=3.0)
    for x, out in zip((q, k), target.rotary(q, k, positions, rope), strict=True):
        scale = out.cpu().norm(dim=-1) / x.norm(dim=-1)
        assert torch.allclose(scale, torch.tensor([1.0, 1.0, 3.0, 3.0])[None, :, None])


@every_target
def test_no_threshold_scales_negative_positions_too(target: Target) -> None:
    shape = Shape(1, 3, 2, 1, 64)
    q, k = shape.qk()
    rope = shape.rope(n_hat=0, attention_factor=3.0)
    out, _ = target.rotary(q, k, torch.tensor([-5, -1, 0]), rope)
    assert torch.allclose(out.cpu().norm(dim=-1), 3 * q.norm(dim=-1))


@every_target
def test_raw_factors_equal_the_rope(target: Target) -> None:
    shape = Shape(2, 18, 2, 1, 96, 40, dtype=bf16, interleaved=True)
    q, k = shape.qk()
    rope = shape.rope(n_hat=128, attention_factor=1.25)
    positions = special_positions(128)
    wanted = target.rotary(q, k, positions, rope)
    got = target.rotary(
        q, k, positions, list(rope.sets[0].factors), 128, interleaved=True, attention_factor=1.25
    )
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@every_target
def test_base(target: Target) -> None:
    shape = Shape(1, 18, 2, 0, 64)
    q, _ = shape.qk()
    rope = Rope((FactorSet((1.5,) * 32),), base=500000.0)
    positions = special_positions(0)
    out, _ = target.rotary(q, None, positions, (1.5,) * 32, 0, base=500000.0)
    assert_close(out, truth.rotary(q, positions, rope))


@pytest.mark.gpu
def test_default_backend_on_a_gpu_is_triton() -> None:
    assert choose_rotary(None, "cuda", False) == "triton"


def test_default_backend_on_the_cpu_is_native() -> None:
    assert choose_rotary(None, "cpu", False) == "native"
    assert choose_rotary(None, "cpu", True) == "reference"


@every_target
def test_threads_do_not_change_a_bit(target: Target) -> None:
    shape = Shape(2, 63, 4, 2, 64)
    q, k = shape.qk()
    positions = positions_for(63, 128)
    wanted = target.rotary(q, k, positions, shape.rope())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        got = target.rotary(q, k, positions, shape.rope())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
