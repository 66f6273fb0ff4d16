"""What only the CUDA rotation has: pieces of 16 bytes or single elements, and shared heads."""

from __future__ import annotations

import pytest
import torch
import truth
from cases import COMPILED, Shape, by_id, positions_for
from tolerance import assert_close

from longrope_kernels.backends.cuda import device as cuda

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def check(shape: Shape, q: torch.Tensor, k: torch.Tensor | None) -> None:
    positions = positions_for(shape.seq, 128)
    outs = COMPILED.rotary(q, k, positions, shape.rope(), layout=shape.layout)
    for x, out in zip((q, k), outs, strict=True):
        if x is not None:
            assert_close(out, truth.rotary(x, positions, shape.rope(), layout=shape.layout))
            rest = slice(2 * shape.rotated_pairs, None)
            assert torch.equal(out[..., rest].cpu(), x[..., rest])


WIDE = [
    # Pieces of 8 and of 4 elements, in one row fewer and more than threads.
    Shape(1, 3, 2, 1, 32, 8, dtype=bf16),
    Shape(1, 3, 2, 1, 32, 8, dtype=bf16, interleaved=True),
    Shape(1, 3, 2, 1, 24, 4, dtype=fp32),
    Shape(1, 2, 1, 1, 2112, dtype=bf16),
    Shape(1, 2, 1, 1, 2112, 8, dtype=fp16),
    Shape(1, 2, 2, 0, 1040, 516, dtype=fp32),
    # One element at a time, of which a row has more than threads.
    Shape(1, 2, 1, 1, 301, 150, dtype=bf16),
    Shape(1, 2, 1, 1, 302, dtype=fp16, interleaved=True),
    Shape(1, 2, 1, 1, 301, 3, dtype=fp32),
    # More heads than fly at once, of few tokens and of many.
    Shape(1, 1, 37, 5, 16, dtype=bf16),
    Shape(600, 1, 9, 2, 16, dtype=bf16),
]


@pytest.mark.parametrize("shape", by_id(WIDE))
def test_pieces_and_heads(shape: Shape) -> None:
    check(shape, *shape.qk())


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_rows_that_begin_between_pieces(offset: int) -> None:
    shape = Shape(1, 5, 2, 1, 32, dtype=bf16)
    x = torch.randn(1, 5, 3, 48).to(bf16)[..., offset : offset + 32]
    check(shape, x[:, :, :2], x[:, :, 2:])


def test_a_backend_that_is_not_built_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda name: (None, f"No module named {name}"))
    for emulated, hint in (("1", "emulator is not built"), ("0", "LONGROPE_BUILD_CUDA=1 pip")):
        monkeypatch.setenv("LONGROPE_CUDA_EMULATE", emulated)
        reason = cuda.missing()
        assert reason is not None
        assert hint in reason
        with pytest.raises(RuntimeError, match="No module named _cuda"):
            cuda.extension()
