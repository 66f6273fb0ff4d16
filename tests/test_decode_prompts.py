"""`decode` of a prompt or a chunk of one: more queries than a step has, against a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_truth import (
    COMPILED,
    NATIVE,
    REFERENCE,
    TRITON,
    Backend,
    Case,
    assert_decoded,
    bf16,
    check,
    fp16,
    fp32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_kernels import KVCache, PagedKVCache, decode
from longrope_kernels.calls.records import FEW_QUERIES

CASES = [
    Case((17,), 17),
    Case((40, 25), 25, block=16, dtype=bf16),
    Case((70, 33, 50), 33, 6, 2, block=16, boundary=40, dtype=fp16),
    Case((90, 40), 35, 2, 1, boundary=(30, 60), window=21, block=32),
    Case((61, 45), 20, interleaved=True, softcap=2.0, kv_start=(30, 3), dim=24, pairs=9),
    Case((50, 50), 50, 2, 2, positions="any", block=8, n_hat=20),
    Case((80,), 40, 4, 1, float8=True, block=16, window=3, dtype=bf16),
    Case((300,), 37, 4, 2, block=64, boundary=280, dtype=bf16),
    Case((10, 0, 30), 18, boundary=9, window=40),  # queries ahead of the first slot
    Case((64, 64), 32, sets=(1, 0), dim=64, block=64),
    Case((50, 60), 20, lengths=((40,) * 20, (30,) * 7 + (60,) * 13), boundary=45),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", [REFERENCE, NATIVE], ids=str)
def test_a_prompt(backend: Backend, case: Case) -> None:
    case = backend.nearest(replace(case, float8=case.float8 and backend.float8))
    check(backend, case.call())


# Of one KV head or two, a few tiles each.
SMALL = [
    Case((20,), 18, 2, 1, dtype=bf16),
    Case((40, 21), 20, 1, 1, block=16, boundary=30, dtype=bf16),
    Case((44,), 35, 2, 1, block=8, boundary=(20, 40), window=9, kv_start=(12,), dtype=fp16),
    Case((36,), 17, 2, 2, block=32, float8=True, softcap=2.0, dtype=bf16),
    Case((10, 25), 18, 1, 1, window=30, positions="any", interleaved=True, dtype=bf16),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_prompt_in_triton(case: Case) -> None:
    check(TRITON, replace(case, dim=32).call())


@st.composite
def any_prompt(draw: st.DrawFn) -> Case:
    queries = draw(st.integers(FEW_QUERIES + 1, 70))
    lens = tuple(draw(st.lists(st.integers(0, 90), min_size=1, max_size=2)))
    kv_heads = draw(st.sampled_from((1, 2)))
    return Case(
        lens,
        queries,
        kv_heads * draw(st.sampled_from((1, 3))),
        kv_heads,
        dim=draw(st.sampled_from((16, 24, 40))),
        block=draw(st.sampled_from((0, 8, 16, 128))),
        dtype=draw(st.sampled_from((fp32, bf16, fp16))),
        interleaved=draw(st.booleans()),
        window=draw(st.sampled_from((None, 1, 30, 200))),
        softcap=draw(st.sampled_from((None, 2.0))),
        kv_start=draw(st.sampled_from(((), tuple(n // 3 for n in lens)))),
        positions=draw(st.sampled_from(("", "any"))),
        boundary=draw(st.sampled_from((0, 33, (20, 60)))),
        n_hat=draw(st.sampled_from((0, 7, 50))),
    )


@settings(max_examples=25)
@given(any_prompt())
@pytest.mark.parametrize("backend", [REFERENCE, NATIVE], ids=str)
def test_any_prompt(backend: Backend, case: Case) -> None:
    torch.manual_seed(0)
    check(backend, backend.nearest(case).call())


def test_the_number_of_threads_changes_no_bit() -> None:
    call = Case((900, 300), 100, 8, 2, block=64, boundary=500, dim=64).call()
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(decode(**call.arguments, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("backend", [REFERENCE, NATIVE], ids=str)
@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_a_prompt_appended_and_attended_in_one_call(backend: Backend, kind: Any) -> None:
    """In chunks it gives what it gives whole: each query the set of its own length."""
    case = Case((53,), 53, 4, 2, boundary=30)
    call, rope = case.call(), case.rope()
    k, v = (call.arguments[name][:, :53] for name in ("k_cache", "v_cache"))
    expected, outs = call.expected(), []
    size = {"capacity": 64} if kind is KVCache else {"blocks": 4, "block_size": 16}
    cache = kind(rope, 1, **size, kv_heads=2, head_dim=32, dtype=fp32, policy="switch")
    for begin, end in ((0, 20), (20, 21), (21, 53)):
        cache.extend([end - begin])
        new = {"k_new": k[:, begin:end], "v_new": v[:, begin:end]}
        outs.append(cache.decode(call.q[:, begin:end], **new, backend=backend.backend))
    assert_decoded(torch.cat(outs, 1), expected.out)


def test_cuda_refuses_a_prompt_by_name() -> None:
    call = Case((40,), 17, dtype=bf16).call()
    with pytest.raises(ValueError, match="backend: 'cuda' serves up to 16 queries"):
        COMPILED.decode(**call.arguments)
    few = {**call.arguments, "q": call.q[:, :16]}
    COMPILED.decode(**few)
