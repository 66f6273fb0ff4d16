"""The op of decoding as torch.library, torch.compile and CUDA graphs see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_truth import assert_lse_close
from decode_truth import (
    NATIVE,
    TRITON,
    Backend,
    Call,
    Case,
    assert_decoded,
    bf16,
    every_backend,
    every_case,
    fp16,
    fp32,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from longrope_kernels import decode
from longrope_kernels.backends import choose as backends
from longrope_kernels.calls import schema
from longrope_kernels.calls.records import DecodeCall, Keys, Scores, Selection

DECODE = torch.ops.longrope_kernels.decode.default
KERNELS = [NATIVE, TRITON]
every_kernel = pytest.mark.parametrize("backend", KERNELS, ids=str)
on_device = pytest.mark.parametrize(
    "backend",
    [Backend(name, "cuda", (bf16, fp16)) for name in ("triton", "reference")],
    ids=str,
)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function: Any, backend: Any = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def op_arguments(backend: Backend, case: Case) -> tuple[Any, ...]:
    """Canonical arguments of the op."""
    case = backend.nearest(case)
    given = {name: backend.move(x) for name, x in case.call().arguments.items()}
    q, tables = given["q"], given["factors"].tables(given["q"].device)
    keys = Keys(
        *(given.get(name) for name in ("k_cache", "v_cache", "key_positions", "kv_start")),
        lens=given["cache_lens"],
        **{name: given.get(name) for name in ("block_table", "k_scale", "v_scale")},
    )
    selection = Selection(given.get("lengths"), given.get("sets"))
    scores = Scores(True, case.scale or 0.25, case.window or 0, case.softcap or 0.0)
    call = DecodeCall(q, keys, tables, selection, scores)
    return (*schema.flatten(call), backend.backend)


CASES = [
    Case((9, 3), 2, 2, 1),
    Case((20,), 1, 2, 1, block=16, boundary=40, lengths=(50,), window=5, softcap=2.0),
    Case((9, 3), 3, 2, 1, block=8, sets=(1, 0), kv_start=(2, 0), positions="sinks"),
    Case((22, 9), 3, 2, 1, boundary=20),
    Case((22, 9), 3, 2, 1, boundary=20, lengths=((20, 21, 9), (1, 50, 20)), block=16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@every_kernel
def test_opcheck(backend: Backend, case: Case) -> None:
    torch.library.opcheck(DECODE, op_arguments(backend, case))


def test_opcheck_float8() -> None:
    """But for the schema: that check compares arguments by arithmetic that float8 has not."""
    case = Case((9,), 1, 2, 1, block=16, float8=True)
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(DECODE, op_arguments(TRITON, case), test_utils=utilities)


@every_kernel
def test_the_op_is_what_decode_calls(backend: Backend) -> None:
    case = backend.nearest(Case((20, 9), 2, block=16, scale=0.25, window=7))
    arguments = op_arguments(backend, case)
    call = schema.build(DecodeCall, arguments)
    given = (call.q, call.keys.k, call.keys.v, call.keys.lens, case.rope())
    more = {"block_table": call.keys.block_table, "softmax_scale": 0.25, "window": 7}
    wanted = backend.decode(*given, **more, return_lse=True)
    for got, one in zip(torch.ops.longrope_kernels.decode(*arguments), wanted, strict=True):
        assert torch.equal(got, one)


CHOICES = [
    ("cpu", fp32, fp32, 64, "native"),
    ("cpu", bf16, bf16, 64, "native"),
    ("cpu", fp16, fp16, 300, "native"),
    ("cpu", bf16, torch.float8_e4m3fn, 64, "reference"),
    ("cpu", torch.float64, torch.float64, 64, "reference"),
    ("cuda", bf16, bf16, 128, "triton"),
    ("cuda", fp16, torch.float8_e4m3fn, 256, "triton"),
    ("cuda", bf16, bf16, 257, "reference"),
    ("cuda", bf16, bf16, 8, "cuda"),
    ("cuda", fp32, fp32, 128, "reference"),
    ("xpu", bf16, bf16, 128, "reference"),
]


@pytest.mark.parametrize(("device", "dtype", "cache", "dim", "name"), CHOICES)
def test_choice(
    device: str,
    dtype: torch.dtype,
    cache: torch.dtype,
    dim: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "missing", lambda _: None)
    assert backends.choose_decode(None, device, dtype, cache, dim) == name
    monkeypatch.setattr(backends, "missing", lambda n: None if n == "reference" else f"no {n}")
    assert backends.choose_decode(None, device, dtype, cache, dim) == "reference"


def test_another_order_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two that serve a call is the faster one, only a measurement says."""
    monkeypatch.setattr(backends, "missing", lambda _: None)
    other = "cuda", "triton", "reference"
    monkeypatch.setitem(backends.DECODE_CHOICE, "cuda", other)
    assert backends.choose_decode(None, "cuda", bf16, bf16, 128) == "cuda"
    assert backends.choose_rotary(None, "cuda", is_float64=False) == "triton"
    monkeypatch.setitem(backends.ROTARY_CHOICE, "cuda", other)
    assert backends.choose_rotary(None, "cuda", is_float64=False) == "cuda"
    assert backends.choose_attention(None, "cuda", bf16, 128, "scored") == "triton"
    monkeypatch.setitem(backends.ATTENTION_CHOICE["cuda"], "scored", other)
    assert backends.choose_attention(None, "cuda", bf16, 128, "scored") == "cuda"
    assert backends.choose_attention(None, "cuda", bf16, 128, "masked") == "triton"


def tensors_of(call: Call, backend: Backend) -> tuple[list[str], list[torch.Tensor], Any]:
    """The tensors of a call by name, on the device, and the rest of it."""
    moved = {name: backend.move(x) for name, x in call.arguments.items()}
    names = [name for name, x in moved.items() if isinstance(x, torch.Tensor)]
    rest = {name: x for name, x in moved.items() if name not in names}
    rest["factors"] = rest["factors"].to(backend.device)
    return names, [moved[name] for name in names], rest


@every_case(
    [
        Case((9, 3), 2),
        Case((21, 20), block=16, boundary=20, dtype=bf16),
        Case((20, 9), 3, block=16, window=9, softcap=2.0, kv_start=(0, 4), positions="sinks"),
        Case((9, 0), sets=(1, 0), dtype=fp16, interleaved=True, pairs=9, boundary=40),
        Case((9, 3), float8=True, block=16, dtype=bf16),
    ]
)
def test_compiled_equals_eager(backend: Backend, case: Case) -> None:
    """One graph, and the output of eager, bit for bit."""
    call = case.call()
    names, tensors, rest = tensors_of(call, backend)

    def run(*given: torch.Tensor) -> Any:
        return backend.decode(**dict(zip(names, given, strict=True)), **rest, return_lse=True)

    outs = compiled(run)(*tensors)
    for got, wanted in zip(outs, run(*tensors), strict=True):
        assert torch.equal(got, wanted)
    assert_decoded(outs[0], call.expected().out)
    assert_lse_close(outs[1], call.expected().lse)


@pytest.mark.parametrize(
    ("block", "queries"),
    [(0, 3), (8, 1), *(pytest.param(*each, marks=pytest.mark.full) for each in ((0, 1), (8, 3)))],
)
@every_backend
def test_lengths_are_data(backend: Backend, block: int, queries: int) -> None:
    """Other lengths, over the boundary and back: the same graph."""
    call = backend.nearest(Case((20, 20), queries, 2, 1, block=block, boundary=10)).call()
    names, tensors, rest = tensors_of(call, backend)

    def run(*given: torch.Tensor) -> torch.Tensor:
        return backend.decode(**dict(zip(names, given, strict=True)), **rest)

    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(run, counter)
    for lens in ((10, 10), (11, 10), (1, 20), (0, 9)):
        tensors[names.index("cache_lens")] = backend.move(torch.tensor(lens, dtype=torch.int32))
        out = step(*tensors)
        expected = Call(**{**call.arguments, "cache_lens": torch.tensor(lens)}).expected()
        assert_decoded(out, expected.out)
    assert counter.frame_count == 1


@every_kernel
def test_sizes_do_not_recompile_each_time(backend: Backend) -> None:
    """Batch, queries, blocks, columns: one static graph, one dynamic, as for any size in torch."""
    rope = Case(boundary=20).rope().to(backend.device)
    names = ["q", "k_cache", "v_cache", "cache_lens", "block_table"]

    def run(*given: torch.Tensor) -> torch.Tensor:
        return backend.decode(**dict(zip(names, given, strict=True)), factors=rope, window=30)

    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(run, counter)
    for lens, queries in (((9, 4), 2), ((21, 9, 3), 3), ((2, 17, 3, 4), 4)):
        case = backend.nearest(Case(lens, queries, 2, 1, block=16, boundary=20, window=30))
        call = case.call()
        out = step(*(backend.move(call.arguments[name]) for name in names))
        assert_decoded(out, call.expected().out)
    assert counter.frame_count <= 2


@every_kernel
def test_any_size_at_once(backend: Backend) -> None:
    """With ``dynamic=True`` from the start."""
    rope = Case().rope().to(backend.device)

    def run(*given: torch.Tensor) -> Any:
        return backend.decode(*given, rope, return_lse=True)

    step = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for lens in ((20, 9), (3, 9, 4)):
        call = backend.nearest(Case(lens, len(lens), 2, 1)).call()
        names = ("q", "k_cache", "v_cache", "cache_lens")
        out, lse = step(*(backend.move(call.arguments[name]) for name in names))
        assert_decoded(out, call.expected().out)
        assert_lse_close(lse, call.expected().lse)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "transposed"])
@every_backend
def test_fake_tensors(backend: Backend, strided: bool) -> None:
    """Shapes, dtypes, strides and devices of the real call, with no values to check."""
    case = backend.nearest(Case((20, 9), 2, block=16, boundary=40, kv_start=(1, 2)))
    arguments = {name: backend.move(x) for name, x in case.call().arguments.items()}
    if strided:
        arguments["q"] = arguments["q"].transpose(1, 2).contiguous().transpose(1, 2)
    real = decode(**arguments, backend=backend.backend, return_lse=True)
    mode = FakeTensorMode()
    fakes = {
        name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }
    with mode:
        made = decode(**fakes, backend=backend.backend, return_lse=True)
    for fake, one in zip(made, real, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (one.shape, one.dtype, one.device)
        assert fake.stride() == one.stride()


def test_inductor() -> None:
    """The real code generator once, with a projection before it and one after."""
    call = Case((20, 41), block=16, boundary=40).call()
    names, tensors, rest = tensors_of(call, NATIVE)

    def run(q: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        more = dict(zip(names[1:], given, strict=True))
        return NATIVE.decode(q=q * 0.5, **more, **rest) * 2

    out = compiled(run, "inductor")(*tensors)
    halved = Call(**{**call.arguments, "q": call.q * 0.5}).expected().out
    assert_decoded(out / 2, halved)


def test_errors_survive_compilation() -> None:
    call = Case((20, 9)).call()
    given = {**call.arguments, "cache_lens": torch.tensor([20, 9, 3])}

    def run(**given: Any) -> Any:
        return decode(**given)

    with pytest.raises(Exception, match="cache_lens"):
        compiled(run)(**given)


DEVICE_CASES = [
    Case((20, 9), 2),
    Case((41, 40), block=16, boundary=40, window=9, kv_start=(0, 4), positions="sinks"),
    Case((20, 33), block=16, float8=True, softcap=2.0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", DEVICE_CASES, ids=str)
@on_device
def test_no_sync(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGROPE_CHECK", raising=False)
    names, tensors, rest = tensors_of(backend.nearest(case).call(), backend)
    given = dict(zip(names, tensors, strict=True))
    backend.decode(**given, **rest)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.decode(**given, **rest, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_device
def test_bad_block_ids_are_refused_in_the_checking_mode(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels never see them; without the mode nothing on a device is read."""
    monkeypatch.setenv("LONGROPE_CHECK", "1")
    names, tensors, rest = tensors_of(backend.nearest(Case((20, 33), block=16)).call(), backend)
    given = dict(zip(names, tensors, strict=True))
    backend.decode(**given, **rest)
    for block in (-1, len(given["k_cache"]), 2**31 - 1):
        table = given["block_table"].clone()
        table[1, 2] = block
        with pytest.raises(ValueError, match=rf"block_table.*{block} for block 2 of sequence 1"):
            backend.decode(**{**given, "block_table": table}, **rest)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("block", [0, 16, 256], ids=["dense", "block16", "block256"])
@on_device
def test_one_cuda_graph_serves_all_lengths(backend: Backend, block: int, queries: int) -> None:
    """Captured once at length 1; replayed up to the capacity, 4096 to 4097 included."""
    case = backend.nearest(Case((4200, 4200), queries, heads=8, dim=128, block=block))
    call = Case(**{**vars(case), "boundary": 4096}).call()
    names, tensors, rest = tensors_of(call, backend)
    given = dict(zip(names, tensors, strict=True))
    given["cache_lens"].fill_(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backend.decode(**given, **rest, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = backend.decode(**given, **rest, return_lse=True)
    for lens in ((1, 1), (15, 16), (17, 257), (4095, 1), (4096, 4097), (4097, 4096), (4200, 0)):
        given["q"].normal_()
        given["cache_lens"].copy_(torch.tensor(lens))
        graph.replay()
        for got, wanted in zip(outs, backend.decode(**given, **rest, return_lse=True), strict=True):
            assert torch.equal(got, wanted)
        host = {"q": given["q"].cpu(), "cache_lens": torch.tensor(lens)}
        expected = Call(**{**call.arguments, **host}).expected()
        assert_decoded(outs[0], expected.out)
        assert_lse_close(outs[1], expected.lse)
