"""Where the tensors of `decode` lie: slices, one tensor for two, strides of 0, shared blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_truth import (
    Backend,
    Call,
    Case,
    bf16,
    check,
    every_backend,
    every_case,
    fp16,
    nans,
    same,
)


def inside(x: torch.Tensor, *more: int) -> torch.Tensor:
    """x as a slice of a larger tensor, NaN around it, none of its strides those of its sizes."""
    large = nans(tuple(n + 2 * m for n, m in zip(x.shape, more, strict=True)), x.dtype)
    view = large[tuple(slice(m, m + n) for n, m in zip(x.shape, more, strict=True))]
    same(view).copy_(same(x))
    return view


STRIDED = [
    Case((3, 9), 2, dtype=bf16),
    Case((20, 9), 3, dtype=fp16, block=16),
    Case((9, 4), dim=80, pairs=20),
    Case((20, 9), 2, dtype=bf16, block=16, float8=True),
]


@every_case(STRIDED)
def test_slices_of_larger_tensors(backend: Backend, case: Case) -> None:
    """Every tensor but the scales: strides that no copy makes right first."""
    given = dict(case.call().arguments)
    given["q"] = inside(given["q"], 1, 2, 1, 8)
    given["k_cache"] = inside(given["k_cache"], 1, 1, 2, 16)
    given["v_cache"] = inside(given["v_cache"], 0, 3, 1, 24)
    given["cache_lens"] = torch.stack((given["cache_lens"], -given["cache_lens"]), 1)[:, 0]
    if "block_table" in given:
        table = given["block_table"]
        given["block_table"] = torch.stack((-table.T, table.T), -1)[..., 1].T
    check(backend, Call(**given))


@every_case(STRIDED)
def test_keys_and_values_in_one_tensor(backend: Backend, case: Case) -> None:
    """(..., 2 * kv_heads, dim), as a fused projection makes it."""
    given = dict(case.call().arguments)
    k, v = given["k_cache"], given["v_cache"]
    both, heads = torch.cat((same(k), same(v)), 2).view(k.dtype), k.shape[2]
    check(backend, Call(**{**given, "k_cache": both[:, :, :heads], "v_cache": both[:, :, heads:]}))


@every_case(STRIDED)
def test_heads_before_slots(backend: Backend, case: Case) -> None:
    """(batch, kv_heads, capacity, dim) in memory, and q of (batch, heads, q_len, dim)."""
    given = dict(case.call().arguments)
    for name in ("q", "k_cache", "v_cache"):
        x = same(given[name]).transpose(1, 2).contiguous()
        given[name] = x.view(given[name].dtype).transpose(1, 2)
    check(backend, Call(**given))


@every_backend
def test_expanded_heads_batch_and_indices(backend: Backend) -> None:
    """Strides of 0: one head of keys seen as two, one cache seen by all sequences."""
    case = backend.nearest(Case((9, 9), 2, positions="sinks"))
    given = dict(case.call().arguments)
    for name in ("k_cache", "v_cache"):
        given[name] = given[name][:1, :, :1].expand(2, -1, 2, -1)
    given["key_positions"] = given["key_positions"][:1].expand(2, -1)
    given["cache_lens"] = given["cache_lens"][:1].expand(2)
    check(backend, Call(**given))


@every_backend
def test_queries_that_slide_over_memory(backend: Backend) -> None:
    """The stride of tokens is 1, as that of dimensions, and the output has its own memory."""
    case = backend.nearest(Case((17,), 3, 1, 1))
    given = dict(case.call().arguments)
    given["q"] = torch.randn(1, 34).to(case.dtype).unfold(-1, 32, 1)[:, :, None]
    check(backend, Call(**given))


@every_case([Case((17, 20), 2, block=16, dtype=bf16), Case((40, 40, 40), block=8)])
def test_blocks_shared_between_sequences(backend: Backend, case: Case) -> None:
    """A common prefix lies in memory once."""
    given = dict(case.call().arguments)
    given["block_table"][1:, 0] = given["block_table"][0, 0]
    check(backend, Call(**given))
    for name in ("block_table", "cache_lens"):
        given[name] = given[name][:1].expand_as(given[name])
    check(backend, Call(**given))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@every_backend
def test_index_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    """int32 and int64 serve alike for lengths of all kinds, kv_start and positions; mixed too."""
    case = Case((20, 9), 2, block=16, kv_start=(2, 4), lengths=(50, 3), boundary=40)
    case = backend.nearest(replace(case, positions="sinks", index=dtype))
    call = case.call()
    check(backend, call)
    other = torch.int64 if dtype == torch.int32 else torch.int32
    check(backend, Call(**{**call.arguments, "cache_lens": call.arguments["cache_lens"].to(other)}))
