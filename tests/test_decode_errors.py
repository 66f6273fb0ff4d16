"""Bad input to `decode`: the argument by name, what came and what is expected.

Factors, numbers, selections and scores that `apply_rotary` and `attention` refuse are refused
alike. Each message once, by the front end; then all cases on every backend, where nothing may be
written.
"""

from __future__ import annotations

import pytest
import torch
from decode_truth import (
    BACKENDS,
    NATIVE,
    REFERENCE,
    TRITON,
    Backend,
    bf16,
    every_backend,
    fp8,
    fp16,
    fp32,
    fp64,
)
from test_attention_errors import SCORES, bad, bad_type
from test_errors import (
    FACTORS,
    NUMBERS,
    SELECTION,
    Arguments,
    Bad,
    assert_says,
    by_id,
    checked,
    message,
    several,
)

from longrope_kernels import FactorSet, Rope, decode
from longrope_kernels.backends import choose as backends

__all__ = ["checked"]  # the fixture
# No lengths are no mistake: a cache knows its own. Packed sequences are not served.
SHARED = [*FACTORS, *NUMBERS]
SHARED += [b for b in SELECTION if b.names != "cu_seqlens" and b.id not in ("none", "lengths")]
SHARED += [b for b in SCORES if b.names in ("window", "softcap", "softmax_scale", "return_lse")]


def meta(*sizes: int, dtype: torch.dtype = fp32) -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype, device="meta")


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def paged(**values: object) -> Arguments:
    """Two sequences of 5 and 20 keys in 6 blocks of 8 slots, and ``values`` over them."""
    made = {name: torch.randn(6, 8, 2, 16) for name in ("k_cache", "v_cache")}
    return {**made, "block_table": torch.tensor([[4, -1, 99], [0, 5, 1]]).int(), **values}


def of_blocks(*rows: list[int]) -> Arguments:
    return paged(block_table=torch.tensor(rows).int())


def float8(**values: object) -> Arguments:
    made = {name: torch.randn(2, 24, 2, 16).to(fp8) for name in ("k_cache", "v_cache")}
    return {**made, **values}


def both(*sizes: int) -> Arguments:
    return {"k_cache": torch.randn(sizes), "v_cache": torch.randn(sizes)}


QUERIES = [
    bad_type("list", "q", "list|tensor", q=[1.0]),
    bad_type("none", "q", "NoneType|tensor", q=None),
    bad("rank", "q", "(2, 3, 64)|batch, seq, heads, dim", q=torch.randn(2, 3, 64)),
    bad_type("int", "q", "int32|float32", q=torch.ones(2, 3, 4, 16).int()),
    bad_type("complex", "q", "complex64|float32", q=torch.ones(2, 3, 4, 16) * 1j),
    bad_type("float8", "q", "float8|float32", q=torch.ones(2, 3, 4, 16).to(fp8)),
    bad("dim-small", "q", "16|15", q=torch.randn(2, 3, 4, 15)),
    bad("stride", "q", "unit stride|contiguous", q=torch.randn(2, 3, 4, 32)[..., ::2]),
    bad("no-tokens", "q", "at least 1 token|0", q=torch.randn(2, 0, 4, 16)),
    bad("grad", "q", "grad|no_grad", q=torch.randn(2, 3, 4, 16, requires_grad=True)),
]


def caches(name: str) -> list[Bad]:
    """What neither k_cache nor v_cache may be."""

    def given(x: object) -> Arguments:
        return {name: x}

    strided = torch.randn(2, 24, 2, 32)[..., ::2]
    return [
        bad_type("list", name, "list|tensor", **given([1.0])),
        bad_type("none", name, "NoneType|tensor", **given(None)),
        bad("rank", name, "(2, 24, 32)|kv_heads", **given(torch.randn(2, 24, 32))),
        bad("dim", name, "(2, 24, 2, 32)|16", **given(torch.randn(2, 24, 2, 32))),
        bad_type("int", name, "int8|dtype of q", **given(torch.ones(2, 24, 2, 16).char())),
        bad_type("dtype", name, "float64|dtype of q", **given(torch.ones(2, 24, 2, 16).double())),
        bad_type(
            "e5m2",
            name,
            "float8_e5m2|float8_e4m3fn",
            **given(torch.ones(2, 24, 2, 16).to(torch.float8_e5m2)),
        ),
        bad("stride", name, "unit stride|strides", **given(strided)),
        bad("grad", name, "grad", **given(torch.randn(2, 24, 2, 16).requires_grad_())),
        bad(
            "paged-rank",
            name,
            "(6, 8, 32)|blocks, block_size, kv_heads",
            **paged(**given(torch.randn(6, 8, 32))),
        ),
    ]


CACHES = [
    *caches("k_cache"),
    *caches("v_cache"),
    bad("batch", "k_cache", "batch 2|(3, 24, 2, 16)|block_table", **both(3, 24, 2, 16)),
    *(bad(f"heads-{n}", "k_cache", f"4|{n}", **both(2, 24, n, 16)) for n in (3, 8, 0)),
    bad("heads", "v_cache", "(2, 24, 2, 16)|4", v_cache=torch.randn(2, 24, 4, 16)),
    bad("slots", "v_cache", "(2, 24, 2, 16)|30", v_cache=torch.randn(2, 30, 2, 16)),
    bad("blocks", "v_cache", "(6, 8, 2", **paged(v_cache=torch.randn(7, 8, 2, 16))),
    bad_type("float8", "v_cache", "float8", v_cache=torch.ones(2, 24, 2, 16).to(fp8)),
    bad_type("float8-k", "v_cache", "float8", k_cache=torch.ones(2, 24, 2, 16).to(fp8)),
]
LENGTHS = [
    bad_type("none", "cache_lens", "NoneType|tensor", cache_lens=None),
    bad_type("list", "cache_lens", "list|tensor", cache_lens=[5, 20]),
    bad_type("number", "cache_lens", "int|tensor", cache_lens=5),
    bad_type("float", "cache_lens", "float32|int64", cache_lens=torch.rand(2)),
    bad_type("int16", "cache_lens", "int16|int64", cache_lens=ints(5, 20).short()),
    bad("shape", "cache_lens", "(3,)|(2,)", cache_lens=ints(5, 20, 3)),
    bad("2d", "cache_lens", "(1, 2)|(2,)", cache_lens=ints(5, 20)[None]),
    bad("device", "cache_lens", "meta|q", cache_lens=meta(2, dtype=torch.int32)),
    bad("negative", "cache_lens", "-1|24|sequence 0", cache_lens=ints(-1, 20)),
    bad("high", "cache_lens", "25|24|sequence 1", cache_lens=ints(5, 25)),
    bad(
        "int64",
        "cache_lens",
        f"{2**40}|24|sequence 1",
        cache_lens=ints(5, 2**40, dtype=torch.int64),
    ),
    bad("paged", "cache_lens", "25|24", **paged(cache_lens=ints(5, 25))),
    bad("columns", "cache_lens", "20|16|sequence 1", **of_blocks([4, 0], [5, 1])),
    bad("key_positions", "cache_lens", "20|19|sequence 1", key_positions=torch.zeros(2, 19).int()),
    bad(
        "paged-key_positions",
        "cache_lens",
        "20|10",
        **paged(key_positions=torch.zeros(2, 10).long()),
    ),
]
BLOCKS = [
    bad_type("list", "block_table", "list|tensor", **paged(block_table=[[0], [1]])),
    bad_type("float", "block_table", "float32|int32", **paged(block_table=torch.rand(2, 3))),
    bad_type("int64", "block_table", "int64|int32", **paged(block_table=torch.ones(2, 3).long())),
    bad("rank", "block_table", "(2,)|(2, max_blocks)", **paged(block_table=ints(0, 1))),
    bad(
        "batch",
        "block_table",
        "(3, 3)|(2, max_blocks)",
        **paged(block_table=torch.zeros(3, 3).int()),
    ),
    bad(
        "device",
        "block_table",
        "meta|device of q",
        **paged(block_table=meta(2, 3, dtype=torch.int32)),
    ),
    bad(
        "negative",
        "block_table",
        "-1|0 to 5|block 0 of sequence 0",
        **of_blocks([-1, 0, 0], [0, 5, 1]),
    ),
    bad("high", "block_table", "6|0 to 5|block 1 of sequence 1", **of_blocks([4, 9, 9], [0, 6, 1])),
    bad(
        "last", "block_table", "99|0 to 5|block 2 of sequence 1", **of_blocks([4, 9, 9], [0, 5, 99])
    ),
    bad("huge", "block_table", f"{2**31 - 1}|0 to 5", **of_blocks([4, 9, 9], [2**31 - 1, 5, 1])),
]
SLOTS = [
    bad_type("list", "kv_start", "list", kv_start=[0, 1]),
    bad_type("float", "kv_start", "float32|int64", kv_start=torch.rand(2)),
    bad("shape", "kv_start", "(3,)|(2,)", kv_start=ints(0, 1, 2)),
    bad("2d", "kv_start", "(1, 2)|(2,)", kv_start=ints(0, 1)[None]),
    bad("device", "kv_start", "meta", kv_start=meta(2, dtype=torch.int32)),
    bad("negative", "kv_start", "-1|from 0", kv_start=ints(0, -1)),
    bad_type("list", "key_positions", "list", key_positions=[[0] * 24] * 2),
    bad_type("float", "key_positions", "float32|int64", key_positions=torch.rand(2, 24)),
    bad("1d", "key_positions", "(24,)|(2, slots)", key_positions=torch.arange(24)),
    bad("batch", "key_positions", "(3, 24)|2", key_positions=torch.zeros(3, 24).int()),
    bad(
        "device", "key_positions", "meta|device of q", key_positions=meta(2, 24, dtype=torch.int32)
    ),
    *(
        bad(name, "key_positions", f"{n}|2**31 - 1", key_positions=torch.full((2, 24), n))
        for name, n in (("high", 2**31), ("low", -(2**31) - 1))
    ),
]

# Lengths may be of queries, three here; sets may not.
OF_QUERIES = [
    Bad("more", "lengths", ValueError, several(lengths=ints(1, 2, 3, 4).expand(2, 4)), ("(2, 3)",)),
    Bad(
        "batch", "lengths", ValueError, several(lengths=torch.ones(3, 3).int()), ("(2,)", "(3, 3)")
    ),
    Bad("3d", "lengths", ValueError, several(lengths=torch.ones(2, 3, 1).int()), ("(2, 3, 1)",)),
    Bad("dtype", "lengths", TypeError, several(lengths=torch.rand(2, 3)), ("float32", "int64")),
    Bad("negative", "lengths", ValueError, several(lengths=ints(4, -5, 6).expand(2, 3)), ("-5",)),
    Bad("of-queries", "sets", ValueError, several(sets=torch.ones(2, 3).int()), ("(2,)", "(2, 3)")),
]


def scales(name: str) -> list[Bad]:
    def given(x: object) -> Arguments:
        return {name: x}

    return [
        bad("alone", name, "float8", **given(torch.ones(2))),
        bad_type("list", name, "list", **float8(**given([1.0, 2.0]))),
        bad_type("number", name, "float|tensor", **float8(**given(0.5))),
        bad_type("dtype", name, "float64|float32", **float8(**given(torch.ones(2).double()))),
        bad("shape", name, "(4,)|(2,)|KV head", **float8(**given(torch.ones(4)))),
        bad("scalar", name, "()|(2,)", **float8(**given(torch.ones(())))),
        bad("2d", name, "(1, 2)|(2,)", **float8(**given(torch.ones(1, 2)))),
        bad("device", name, "meta|device of q", **float8(**given(meta(2)))),
    ]


CHOICES = [
    bad("unknown", "backend", "cudnn|reference|native|triton", backend="cudnn"),
    bad("composed", "backend", "composed|reference|native", backend="composed"),
    bad("number", "backend", "3|reference", backend=3),
    bad("list", "backend", "[]|reference", backend=[]),
]
OWN = [
    *QUERIES,
    *OF_QUERIES,
    *CACHES,
    *LENGTHS,
    *BLOCKS,
    *SLOTS,
    *scales("k_scale"),
    *scales("v_scale"),
    *CHOICES,
]


def good(backend: Backend) -> Arguments:
    return {
        "q": torch.randn(2, 3, 4, 16),
        "k_cache": torch.randn(2, 24, 2, 16),
        "v_cache": torch.randn(2, 24, 2, 16),
        "cache_lens": ints(5, 20),
        "factors": Rope(FactorSet(tuple(1.0 + i for i in range(8)))),
        "backend": backend.backend,
    }


def served(backend: Backend, arguments: Arguments) -> Arguments:
    """q and float32 caches in the usual dtype of the backend, strides as given; on its device."""
    made = dict(arguments)
    for name in ("q", "k_cache", "v_cache"):
        x = arguments[name]
        if isinstance(x, torch.Tensor) and x.dtype == fp32:
            like = torch.empty_strided(
                x.shape, x.stride(), dtype=backend.dtypes[0], device=x.device
            )
            made[name] = like.copy_(x.detach()).requires_grad_(x.requires_grad)
    for name, x in made.items():
        if not (isinstance(x, torch.Tensor) and x.is_meta):
            made[name] = backend.move(x)
    return made


def assert_refused(backend: Backend, wrong: Bad) -> None:
    arguments = good(backend)
    arguments.update(wrong.change(arguments) or {})
    assert_says(wrong, message(wrong, decode, served(backend, arguments)))


@pytest.mark.parametrize("wrong", by_id(OWN))
def test_bad_input(wrong: Bad) -> None:
    assert_refused(REFERENCE, wrong)


@every_backend
def test_nothing_is_written(backend: Backend, checked: None) -> None:
    """By what `apply_rotary` and `attention` refuse neither."""
    for wrong in (*SHARED, *OWN):
        assert_refused(backend, wrong)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
@every_backend
def test_another_device(backend: Backend, name: str) -> None:
    arguments = served(backend, good(backend))
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=rf"{'k_cache' if name == 'q' else name}.*meta"):
        decode(**arguments)


@every_backend
def test_values_on_the_host_are_always_checked(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LONGROPE_CHECK", raising=False)
    if backend.device != "cpu":
        monkeypatch.setenv("LONGROPE_CHECK", "1")
    for names, values in (
        ("cache_lens", {"cache_lens": ints(5, 25)}),
        ("block_table", of_blocks([6, 0, 0], [0, 5, 1])),
        ("kv_start", {"kv_start": ints(-1, 0)}),
    ):
        with pytest.raises(ValueError, match=names):
            decode(**served(backend, {**good(backend), **values}))


@every_backend
def test_good_input_is_taken(backend: Backend) -> None:
    """What the bad cases are made from raises nothing, nor do the borders of what is allowed."""
    sizes = [{}, paged(), both(2, 20, 4, 16), both(2, 20, 1, 16)]
    sizes += [paged(block_table=torch.tensor([[5, -1, 9], [0, 5, 1]]).int())]
    sizes += [{"q": torch.randn(2, n, 4, 16)} for n in (1, 16)]
    sizes += [{"cache_lens": ints(0, 24)}, {"cache_lens": ints(0, 24, dtype=torch.int64)}]
    sizes += [{"key_positions": torch.full((2, 20), n)} for n in (2**31 - 1, -(2**31))]
    sizes += [{"kv_start": ints(0, 30)}, {"window": 1, "softcap": 0.5, "softmax_scale": 1}]
    if backend.float8:
        sizes += [float8(), float8(k_scale=torch.ones(2)), float8(v_scale=torch.ones(2))]
    for more in sizes:
        short = {"cache_lens": ints(0, 5), "q": torch.randn(2, 1, 4, 16)}
        arguments = served(backend, {**good(backend), **short, **more})
        assert decode(**arguments).shape == arguments["q"].shape


@every_backend
def test_gradients_are_refused_where_one_is_asked_for(backend: Backend) -> None:
    """Under no_grad a parameter is as good as any tensor."""
    arguments = served(backend, {**good(backend), "cache_lens": ints(2, 5)})
    for name in ("q", "k_cache", "v_cache"):
        given = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"{name}.*grad"):
            decode(**given)
    if backend.float8:
        stored = served(backend, {**good(backend), **float8(cache_lens=ints(2, 5))})
        for name in ("k_scale", "v_scale"):
            with pytest.raises(ValueError, match=rf"{name}.*grad"):
                decode(**stored, **{name: backend.move(torch.ones(2)).requires_grad_()})
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not decode(**given).requires_grad


@pytest.mark.parametrize("dtype", [fp64, fp32, bf16, fp16], ids=str)
@every_backend
def test_dtypes_a_named_backend_lacks_are_said(backend: Backend, dtype: torch.dtype) -> None:
    arguments = {n: backend.move(x) for n, x in good(backend).items()}
    arguments["cache_lens"] = backend.move(ints(2, 5))
    for name in ("q", "k_cache", "v_cache"):
        arguments[name] = arguments[name].to(dtype)
    if dtype in backend.dtypes:
        assert decode(**arguments).dtype == dtype
        return
    with pytest.raises(ValueError, match=rf"backend.*{str(dtype)[6:]}.*reference"):
        decode(**arguments)


def test_native_lacks_float8() -> None:
    with pytest.raises(ValueError, match=r"backend.*native.*float8.*reference"):
        decode(**served(NATIVE, {**good(NATIVE), **float8()}))


@pytest.mark.parametrize("dim", [8, 512])
def test_triton_lacks_head_dims(dim: int) -> None:
    arguments = {**good(TRITON), "q": torch.randn(2, 1, 2, dim), **both(2, 20, 1, dim)}
    arguments["factors"] = Rope.plain(8)
    with pytest.raises(ValueError, match=rf"backend.*triton.*16 to 256.*{dim}.*reference"):
        decode(**served(TRITON, arguments))
    for backend in (REFERENCE, NATIVE):
        out = decode(**served(backend, {**arguments, "backend": backend.backend}))
        assert out.shape == arguments["q"].shape


@pytest.mark.gpu
def test_native_serves_the_cpu() -> None:
    arguments = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in good(NATIVE).items()}
    with pytest.raises(ValueError, match=r"backend.*native.*cpu.*cuda"):
        decode(**arguments)


def test_a_backend_that_is_not_there_raises_and_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: f"{name} needs a frobnicator")
    for backend in BACKENDS:
        if backend is REFERENCE:
            continue
        with pytest.raises(RuntimeError, match=f"backend.*{backend.backend}.*frobnicator"):
            decode(**served(backend, good(backend)))


@pytest.mark.parametrize("name", ["sets", "lengths"])
@every_backend
def test_one_set_still_checks_shapes_and_dtypes(backend: Backend, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        decode(**served(backend, {**good(backend), name: torch.rand(2)}))


def test_positional_arguments_of_the_documentation() -> None:
    """Six positional arguments, the rest by keyword."""
    given = good(REFERENCE)
    args = [given[name] for name in ("q", "k_cache", "v_cache", "cache_lens")]
    decode(*args, (1.0,) * 8, 0, window=3)
    decode(*args, Rope.plain(16))
    with pytest.raises(TypeError):
        decode(*args, Rope.plain(16), None, None)
