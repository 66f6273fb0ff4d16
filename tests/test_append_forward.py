"""`append` writes what it should where it should, and no other byte; on every backend."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from append_truth import NUMBERS, Case, bf16, check, every_backend, fp8, fp16, fp32, fp64, memory
from cases import CUDA, REFERENCE, Target

from longrope_kernels import append

CASES = [
    Case(),
    Case((5,), 5, 1, 1, dtype=fp32),
    Case((3, 0, 9), 4, 2, 24),  # a slot below 0: not written
    Case((40, 33), 16, 3, 96, dtype=fp16, index=torch.int64),
    Case((63, 1000), 63, 1, 16),
    Case((9, 17, 1), 1, 8, 128, 16),
    Case((33, 2), 20, 2, 80, 16, dtype=fp32),  # over the border of a block
    Case((7, 30), 3, 2, 33, 12, dtype=fp16),  # no power of two
    Case((9, 5), 4, 2, 7),
    Case((9, 5), 4, 5, 300, dtype=fp32),
    Case((9, 17), 3, mapping="rows"),
    Case((9, 17), 3, 2, 48, 16, mapping="rows", index=torch.int64),
    Case((9, 17, 4), 5, 2, 64, mapping="packed", index=torch.int64),
    Case((9, 17), 2, source="fused"),
    Case((9, 17), 2, 4, 64, 8, source="bhsd"),
    Case((9, 17), 2, 2, 64, 8, storage="one", source="fused"),
    Case((9, 17), 2, 2, 64, storage="odd"),
    Case((9, 17), 2, 2, 64, storage="wide"),
    Case((9, 17), 2, 2, 64, 16, storage="wide", mapping="rows"),
    Case((), 1),
    Case((4, 4), 0),
    Case((4, 4), 2, 0),
]
FLOAT8 = [
    Case((9, 3), 2, 2, 64, float8=True),
    Case((9, 3), 4, 3, 96, 16, float8=True, dtype=fp16),
    Case((9, 3), 2, 2, 20, float8=True, dtype=fp32, scales=False),
    Case((9, 3), 2, 2, 7, 4, float8=True, storage="one"),
    Case((9, 3), 2, 2, 64, float8=True, source="fused", storage="odd"),
    Case((9, 3), 3, 2, 128, 16, float8=True, mapping="packed"),
]


@pytest.mark.parametrize("case", CASES + FLOAT8, ids=str)
@every_backend
def test_append(backend: Target, case: Case) -> None:
    check(backend, case.arguments())


def test_float64() -> None:
    check(REFERENCE, Case((9, 17), 2, dtype=fp64).arguments())
    check(REFERENCE, Case((9, 17), 2, dtype=fp64, float8=True).arguments())


# Every number of float8 and what lies in the middle of two, or next to that; beyond the largest,
# infinity, and the smallest there are.
MIDDLES = (NUMBERS[1:] + NUMBERS[:-1]) / 2
EDGES = torch.cat((NUMBERS, MIDDLES, torch.tensor([463.9, 464.0, 465.0, 1e30, torch.inf, 1e-40])))
EDGES = torch.cat([EDGES.float(), MIDDLES.float().nextafter(torch.tensor(torch.inf))])
EDGES = torch.cat([EDGES, MIDDLES.float().nextafter(torch.tensor(0.0))])
EDGES = torch.cat([EDGES, -EDGES])


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@every_backend
def test_float8_rounds_to_nearest_even(backend: Target, dtype: torch.dtype) -> None:
    x = torch.nn.functional.pad(EDGES, (0, -len(EDGES) % 16)).to(dtype).view(1, -1, 1, 16)
    lens = torch.tensor([x.shape[1]])
    caches = {f"{name}_cache": torch.zeros(x.shape, dtype=fp8) for name in "kv"}
    given: dict[str, Any] = {"k": x, "v": x.flip(1), **caches, "cache_lens": lens}
    check(backend, given)
    if dtype == fp32:  # a quotient that is rounded only once
        check(backend, {**given, "k_scale": torch.tensor([0.3]), "v_scale": torch.tensor([7.0])})


@every_backend
def test_float8_keeps_nan(backend: Target) -> None:
    x = torch.full((1, 2, 1, 16), torch.nan, dtype=bf16)
    caches = [torch.zeros(1, 2, 1, 16, dtype=fp8) for _ in "kv"]
    moved = [backend.move(y) for y in (x, x, *caches, torch.tensor([2]))]
    append(*moved, backend=backend.backend)
    assert all(moved[i].float().isnan().all() for i in (2, 3))


@every_backend
def test_keys_and_values_of_two_dtypes_in_float8(backend: Target) -> None:
    given = Case((9, 3), 2, float8=True).arguments()
    check(backend, {**given, "v": given["v"].half()})


@every_backend
def test_offsets_past_31_bits(backend: Target) -> None:
    """k and the caches begin far from where their last rows lie; memory is there when touched."""
    if CUDA and backend.device == "cuda":
        held = [torch.zeros(2**31 + 64, dtype=bf16, device="cuda") for _ in range(3)]
    else:
        maps = [mmap.mmap(-1, 2 * (2**31 + 64)) for _ in range(3)]
        held = [torch.frombuffer(x, dtype=bf16) for x in maps]
    sizes, strides = (2, 2, 1, 16), (2**31, 16, 16, 1)
    k, k_cache, v_cache = (x.as_strided(sizes, strides) for x in held)
    x = torch.randn(sizes).to(bf16).to(k.device)
    k.copy_(x)
    append(k, x, k_cache, v_cache, torch.tensor([2, 1], device=k.device), backend=backend.backend)
    for cache in (k_cache, v_cache):
        assert torch.equal(cache[0], x[0])
        assert torch.equal(cache[1, 0], x[1, 1])
        assert not cache[1, 1].any()
    mapping = torch.tensor([[-1, -1], [-1, 3]], device=k.device)
    append(k, x, k_cache, v_cache, slot_mapping=mapping, backend=backend.backend)
    for cache in (k_cache, v_cache):
        assert torch.equal(cache[1, 1], x[1, 1])


@every_backend
def test_all_tokens_dropped(backend: Target) -> None:
    for case in (Case((0, 0), 3), Case((0, 2), 3, block=8)):
        check(backend, case.arguments())
    given = Case((4, 4), 2, mapping="rows").arguments()
    given["slot_mapping"].fill_(-5)
    check(backend, given)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    """Of native, where there are tokens for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Target("native", "cpu"), Case((70, 900), 70, 4, 128, 32).arguments())
        check(Target("native", "cpu"), Case((70, 90), 64, 4, 128, 32, float8=True).arguments())
    finally:
        torch.set_num_threads(before)


@every_backend
def test_views_go_on_as_before(backend: Target) -> None:
    """A version is counted, so that autograd sees what it saved change."""
    given = {name: backend.move(x) for name, x in Case((3,), 1, dtype=fp32).arguments().items()}
    version = given["k_cache"]._version
    append(**given, backend=backend.backend)
    assert given["k_cache"]._version > version
    assert memory(given["v_cache"]).numel()
