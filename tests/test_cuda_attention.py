"""Backend "cuda" of `attention` against the truth; without a GPU its kernel runs in the emulator.

A tile is 128 queries by 64 keys (96 up to head dim 64). The emulator begins shared memory with
NaN, and lets copies arrive only where the kernel waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_attention_forward as forward
import test_attention_sets as of_sets
import torch
from attention_cases import Backend, Case, check
from attention_truth import bf16, fp16, fp32
from cases import CUDA, positions_for

from longrope_kernels.backends import choose as backends
from longrope_kernels.backends.cuda import attention as cuda_attention
from longrope_kernels.backends.cuda import device as cuda

COMPILED = Backend("cuda", "cuda" if CUDA else "cpu", (bf16, fp16), smallest_dim=16)


def served(cases: list[Case]) -> list[Any]:
    """The cases in a dtype and with a head dim that the kernel takes."""
    made = {}
    for case in cases:
        near = COMPILED.nearest(case)
        near = replace(near, dim=min(-(-near.dim // 8) * 8, 128))
        made[str(near)] = near
    return [pytest.param(case, id=name) for name, case in made.items()]


# Several tiles of queries and of keys, and every way for a tile to be full, cut or empty.
TILES = [
    Case(1, 200, heads=2, kv_heads=1, dim=128, dtype=bf16, return_lse=True),
    Case(1, 200, heads=1, kv_heads=1, dim=64, dtype=fp16, causal=False, interleaved=True),
    Case(1, 129, 193, heads=2, kv_heads=2, dim=96, dtype=bf16, layout="bhsd"),
    Case(1, 128, 192, heads=1, kv_heads=1, dim=128, dtype=fp16, return_lse=True),
    Case(1, 190, 70, heads=1, kv_heads=1, dim=72, dtype=bf16, return_lse=True),
    Case(1, 200, heads=1, kv_heads=1, dim=128, window=70, dtype=bf16, return_lse=True),
    Case(1, 200, heads=1, kv_heads=1, dim=64, window=20, causal=False, dtype=bf16),
    Case(3, 140, heads=1, kv_heads=1, dim=64, kv_start=(0, 77, 139), dtype=fp16),
    Case(1, 150, heads=1, kv_heads=1, dim=96, softcap=2.0, return_lse=True, dtype=bf16),
    Case(counts=(130, 0, 3, 67), heads=2, kv_heads=1, dim=64, layout="thd", dtype=bf16),
    Case(counts=(3, 130), counts_k=(100, 140), heads=1, kv_heads=1, layout="thd", dtype=fp16),
    Case(counts=(128, 1), sets=(1, 0), heads=1, kv_heads=1, dim=128, layout="thd", dtype=bf16),
]
MORE_ROPES = [
    Case(1, 20, dim=128, pairs=9, dtype=bf16),
    Case(1, 20, dim=128, pairs=61, interleaved=True, dtype=bf16),
    Case(1, 20, dim=128, pairs=24, dtype=fp16),
    Case(1, 20, dim=8, dtype=fp16),
]


@pytest.mark.parametrize("case", served(TILES))
def test_several_tiles(case: Case) -> None:
    check(COMPILED, case)


@pytest.mark.parametrize(
    "case", served([*forward.SHAPES, *forward.CHUNKS, *forward.EMPTY_ROWS, *forward.ROPES])
)
def test_shapes_and_ropes(case: Case) -> None:
    check(COMPILED, case)


@pytest.mark.parametrize("case", MORE_ROPES, ids=str)
def test_any_number_of_pairs(case: Case) -> None:
    check(COMPILED, case)


@pytest.mark.parametrize(
    "case", served([*forward.WINDOWS, *forward.PADDING, *forward.SCORES, *forward.LSE])
)
def test_masks_and_scores(case: Case) -> None:
    check(COMPILED, case)


@pytest.mark.parametrize(
    "case",
    served(
        [
            *of_sets.MIXED,
            *of_sets.packed(of_sets.PACKED),
            *of_sets.packed(of_sets.PACKED_CHUNKS),
            *of_sets.packed(of_sets.PACKED_PADDING),
        ]
    ),
)
def test_sets_and_packed_sequences(case: Case) -> None:
    check(COMPILED, case)


@pytest.mark.parametrize("leaf", "qkv")
def test_gradients_are_refused_before_anything_runs(
    leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(1, 9, dtype=bf16)
    tensors = [COMPILED.move(x) for x in case.tensors()]
    tensors["qkv".index(leaf)].requires_grad_()
    at, rope = positions_for(9, 128), case.rope()
    with torch.no_grad():
        assert not COMPILED.attend(*tensors, at, rope).requires_grad
    monkeypatch.setattr(cuda_attention, "extension", lambda: pytest.fail("ran"))
    message = (
        r"^backend: 'cuda' makes no gradients .* expected 'triton', 'composed', 'flash-attn-2'"
    )
    with pytest.raises(ValueError, match=message):
        COMPILED.attend(*tensors, at, rope)


def test_kv_heads_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the scratch has room for."""
    case = Case(1, 40, heads=6, kv_heads=3, dtype=bf16, return_lse=True)
    monkeypatch.setattr(cuda_attention, "_SCRATCH_BYTES", 2 * 40 * 32 * 2)
    check(COMPILED, case)


@pytest.fixture
def warp_order() -> Iterator[Any]:
    """Sets the order in which the emulator runs warps; on a GPU they run as they like."""
    order = (lambda _: None) if CUDA else cuda.extension().order_warps
    yield order
    order(0)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_depth_of_the_ring_in_any_order_of_warps(
    stages: int, warp_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Barriers and waits are where they must be: no bit depends on who runs first."""
    case = Case(1, 140, heads=1, kv_heads=1, dim=64, dtype=bf16)
    args = (*map(COMPILED.move, case.tensors()), torch.arange(140), case.rope())
    expected = COMPILED.attend(*args)
    monkeypatch.setattr(cuda_attention, "_STAGES", stages)
    for seed in (1, 2, 3):
        warp_order(seed)
        assert torch.equal(COMPILED.attend(*args), expected)


@pytest.mark.parametrize("offset", [1, 4])
def test_rows_that_do_not_begin_at_16_bytes(offset: int) -> None:
    """Are copied before: of q and v, whose rows the kernel copies 16 bytes at a time."""
    case = Case(2, 19, dim=40, dtype=bf16)
    wide = [torch.randn(2, 19, heads, 50).to(bf16) for heads in (4, 2, 2)]
    tensors = [x[..., offset : offset + 40] for x in wide]
    check(COMPILED, case, tensors)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions_of_both_dtypes(dtype: torch.dtype) -> None:
    case = Case(2, 19, dtype=fp16)
    tensors, rope, at = case.tensors(), case.rope(), positions_for(38, 128, dtype)
    rows = at.reshape(2, 19)
    wide = COMPILED.attend(*tensors, rows.long(), rope)
    assert torch.equal(COMPILED.attend(*tensors, rows, rope), wide)
    check(COMPILED, case, tensors)


def test_what_it_does_not_serve_it_refuses_by_name() -> None:
    q = torch.randn(1, 5, 2, 136, dtype=bf16, device=COMPILED.device)
    at, rope = torch.arange(5, device=COMPILED.device), Case(dim=128).rope()
    with pytest.raises(ValueError, match="'cuda' serves a head_dim from 8 to 128 in steps of 8"):
        COMPILED.attend(q, q, q, at, rope)
    q = q[..., :128]
    with pytest.raises(ValueError, match="'cuda' serves bfloat16 and float16"):
        COMPILED.attend(q.float(), q.float(), q.float(), at, rope)


def test_it_is_taken_where_triton_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(
        dtype: torch.dtype = bf16, dim: int = 128, needs: str = "masked", trains: bool = False
    ) -> str:
        return backends.choose_attention(None, "cuda", dtype, dim, needs, trains)

    there = {"triton": None, "cuda": None}
    monkeypatch.setattr(backends, "missing", lambda name: there.get(name))
    assert choose() == "triton"
    there["triton"] = "absent"
    assert choose() == "cuda"
    assert choose(needs="scored") == "cuda"
    assert choose(trains=True) == "composed"
    assert choose(needs="scored", trains=True) == "reference"
    assert choose(dim=80) == "cuda"
    assert choose(dim=256) == choose(dim=100) == choose(dtype=fp32) == "composed"
    assert choose(dim=256, needs="scored") == "reference"
    assert choose(needs="plain") == "composed"
    there["cuda"] = "absent"
    assert choose() == "composed"
