"""The op of `append` as torch.library and torch.compile see it; appending and attending at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from append_truth import (
    Case,
    bf16,
    check,
    check_decode,
    every_backend,
    expected,
    fp8,
    fp16,
    fp32,
    memory,
    without_newest,
)
from cases import KERNELS, NATIVE, REFERENCE, TRITON, Target
from decode_truth import BACKENDS, Backend, assert_decoded, same
from decode_truth import Case as DecodeCase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from longrope_kernels import KVCache, PagedKVCache, Rope, append, decode
from longrope_kernels.calls import schema
from longrope_kernels.calls.records import AppendCall, Keys

APPEND = torch.ops.longrope_kernels.append.default
every_decoder = pytest.mark.parametrize("backend", BACKENDS, ids=str)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def op_arguments(backend: Target, case: Case) -> tuple[Any, ...]:
    given = {name: backend.move(x) for name, x in case.arguments().items()}
    cache = Keys(
        *(given["k_cache"], given["v_cache"]),
        lens=given.get("cache_lens"),
        **{name: given.get(name) for name in ("block_table", "k_scale", "v_scale")},
    )
    call = AppendCall(given["k"], given["v"], cache, given.get("slot_mapping"))
    return (*schema.flatten(call), backend.backend)


CASES = [
    Case((9, 3), 2, dtype=fp32),
    Case((20, 2), 3, block=16, source="fused"),
    Case((9, 17), 2, mapping="rows", dtype=fp16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", KERNELS)
def test_opcheck(target: Target, case: Case) -> None:
    torch.library.opcheck(APPEND, op_arguments(target, case))


@pytest.mark.parametrize("case", [*CASES, Case((9, 3), 2, float8=True)], ids=str)
@every_backend
def test_compiled_equals_eager(backend: Target, case: Case) -> None:
    """One graph, in which what is read afterwards is what was written."""
    given = {name: backend.move(x) for name, x in case.arguments().items()}
    wanted = [x.view(torch.uint8) for x in expected(case_on_host(given))]

    def run(**given: torch.Tensor) -> torch.Tensor:
        append(**given, backend=backend.backend)
        return same(given["k_cache"]) + 0

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(**given)
    for name, bytes_ in zip(("k_cache", "v_cache"), wanted, strict=True):
        assert torch.equal(memory(given[name]), bytes_)
    assert torch.equal(out.nan_to_num(), same(given["k_cache"]).nan_to_num())


def case_on_host(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() for name, x in given.items()}


@every_backend
def test_fake_tensors(backend: Target) -> None:
    given = {name: backend.move(x) for name, x in CASES[1].arguments().items()}
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) for name, x in given.items()}
        assert append(**fakes, backend=backend.backend) is None


@pytest.mark.parametrize("target", KERNELS)
def test_the_profiler_sees_the_op(target: Target) -> None:
    given = {name: target.move(x) for name, x in CASES[0].arguments().items()}
    with profile() as seen:
        append(**given, backend=target.backend)
    assert any(event.name == "longrope_kernels::append" for event in seen.events())


def test_autocast_casts_to_the_cache() -> None:
    given = Case((9, 3), 2, dtype=bf16).arguments()
    wanted = expected(given)
    given |= {name: given[name].float() for name in "kv"}
    with torch.autocast("cpu", torch.float16):
        append(**given)
    assert torch.equal(memory(given["k_cache"]), wanted[0].view(torch.uint8))
    float8 = Case((9, 3), 2, dtype=fp32, float8=True).arguments()
    with torch.autocast("cpu", torch.bfloat16):  # not rounded twice
        check(REFERENCE, float8)


# ------------------------------------------------------------------------------------ in `decode`

DECODES = [
    DecodeCase((9, 17, 2), 1),
    DecodeCase((20, 9), 3, block=16, boundary=19, dtype=bf16),
    DecodeCase((20, 9), 2, 2, 1, block=8, float8=True, dtype=fp16),
    DecodeCase((2, 12), 4, window=5, kv_start=(0, 3), positions="sinks"),
]


@pytest.mark.parametrize("case", DECODES, ids=str)
@pytest.mark.parametrize("new", [1, 3])
@every_decoder
def test_append_and_attend(backend: Backend, new: int, case: DecodeCase) -> None:
    """As many new keys as queries, or others."""
    if not backend.float8 and case.float8:
        case = replace(case, float8=False)
    check_decode(backend, backend.nearest(case).call(), new)


@every_decoder
def test_rows_with_fewer_new_keys(backend: Backend) -> None:
    """By a mapping: keys that are there already stay."""
    call = backend.nearest(DecodeCase((9, 17), 3, 2, 1)).call()
    given, k_new, v_new = without_newest(call, 3)
    keep = call.arguments["k_cache"][0, 6:8], call.arguments["v_cache"][0, 6:8]
    for name, kept in zip(("k_cache", "v_cache"), keep, strict=True):
        given[name][0, 6:8] = kept
    k_new[0, :2] = v_new[0, :2] = torch.nan
    slots = given["k_cache"].shape[1]
    mapping = torch.tensor([[-1, -1, 8], [slots + 14, slots + 15, slots + 16]])
    moved = {name: backend.move(x) for name, x in given.items()}
    new = {"k_new": k_new, "v_new": v_new, "slot_mapping": mapping}
    out = decode(**moved, **{n: backend.move(x) for n, x in new.items()}, backend=backend.backend)
    assert_decoded(out, call.expected().out)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("dtype", [fp32, fp8], ids=str)
def test_a_cache_appends_and_attends(dtype: torch.dtype, paged: bool) -> None:
    """As `write` and `decode` one after the other, rows that pause and packed rows too."""
    rope = Rope.plain(16)
    caches: list[Any] = []
    for _ in range(2):
        if paged:
            caches.append(PagedKVCache(rope, 3, 9, 16, 2, 16, layers=2, dtype=dtype))
        else:
            caches.append(KVCache(rope, 3, 40, 2, 16, layers=2, dtype=dtype))
    k, v = torch.randn(25, 2, 16), torch.randn(25, 2, 16)
    for cache in caches:
        cache.extend((17, 0, 8))
        for layer in range(2):
            cache.write(k, v, layer)
    for counts in ((1, 1, 1), (2, 0, 1), (0, 3, 0)):
        q, k, v = (torch.randn(3, max(counts), heads, 16) for heads in (4, 2, 2))
        for cache in caches:
            cache.extend(counts)
        for layer in (1, 0):
            caches[0].write(k, v, layer)
            wanted = caches[0].decode(q, layer)
            out = caches[1].decode(q, layer, k_new=k, v_new=v)
            assert torch.equal(out, wanted)
            for name in "kv":
                held = [same(getattr(cache, name)(layer)) for cache in caches]
                at = [cache.gather(0, layer)[0] for cache in caches]
                assert torch.equal(*at)
                assert held[0].shape == held[1].shape


def test_appending_and_attending_compile_into_one_graph() -> None:
    for backend in (NATIVE, TRITON):
        call = DecodeCase((20, 9), 2, 2, 1, block=16, dtype=bf16).call()
        given, k_new, v_new = without_newest(call, 2)
        names = [name for name, x in given.items() if isinstance(x, torch.Tensor)]
        rest = {name: x for name, x in given.items() if name not in names}

        def run(
            k_new: torch.Tensor, v_new: torch.Tensor, tensors: list[torch.Tensor], name: str
        ) -> Any:
            of = dict(zip(names, tensors, strict=True))  # noqa: B023
            return decode(**of, **rest, k_new=k_new, v_new=v_new, backend=name)  # noqa: B023

        moved = [backend.move(given[name]) for name in names]
        step = torch.compile(run, fullgraph=True, backend="aot_eager")
        out = step(backend.move(k_new), backend.move(v_new), moved, backend.backend)
        assert_decoded(out, call.expected().out)
        assert torch.equal(memory(moved[names.index("k_cache")]), memory(call.arguments["k_cache"]))
