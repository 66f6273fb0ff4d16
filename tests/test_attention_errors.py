"""Bad input to `attention`: the argument by name, what came and what is expected.

Everything `apply_rotary` refuses is refused alike; the cases for q, k, positions, factors, numbers
and selections are its own. Each message once, by the front end; then all cases on every backend.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import BACKENDS, REFERENCE, Backend, Case, every_backend
from attention_truth import bf16, fp16, fp32, fp64
from cases import factors, two_sets
from test_errors import (
    FACTORS,
    NUMBERS,
    POSITIONS,
    QK,
    SELECTION,
    Arguments,
    Bad,
    assert_says,
    by_id,
    checked,
    message,
    replace,
    several,
)

from longrope_kernels import FactorSet, Rope, apply_rotary, attention
from longrope_kernels.backends import choose as backends
from longrope_kernels.calls import values

__all__ = ["checked"]  # the fixture
COMPOSED = next(backend for backend in BACKENDS if backend.backend == "composed")
ONES = torch.ones(2, dtype=torch.int32)
NAN, INF = float("nan"), float("inf")
# Another number of keys is no mistake here, as long as key_positions come with it.
ROTARY = [bad for bad in [*QK, *POSITIONS, *FACTORS, *NUMBERS, *SELECTION] if bad.id != "k-seq"]


def keys(**values: object) -> Arguments:
    """7 keys for the 5 queries."""
    more = {"k": torch.randn(2, 7, 2, 16), "v": torch.randn(2, 7, 2, 16)}
    return {**more, "key_positions": torch.arange(7), **values}


def packed(**values: object) -> Arguments:
    """Two packed sequences of 2 and 3 queries, 3 and 4 keys."""
    return {
        "q": torch.randn(5, 4, 16),
        "k": torch.randn(7, 2, 16),
        "v": torch.randn(7, 2, 16),
        "layout": "thd",
        "key_positions": torch.arange(7),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "cu_seqlens_k": torch.tensor([0, 3, 7]),
        **values,
    }


def bad(id: str, names: str, says: str = "", **values: object) -> Bad:
    """A ValueError; ``says``: what its message must hold, split at "|"."""
    return Bad(id, names, ValueError, replace(**values), tuple(says.split("|")) if says else ())


def bad_type(id: str, names: str, says: str = "", **values: object) -> Bad:
    """A TypeError."""
    return dataclasses.replace(bad(id, names, says, **values), error=TypeError)


def meta(*sizes: int) -> torch.Tensor:
    return torch.zeros(sizes, device="meta")


TENSORS = [
    bad_type("list", "v", "list|tensor", v=[1.0]),
    bad_type("none", "v", "NoneType|tensor", v=None),
    bad_type("none", "k", "NoneType|tensor", k=None),
    bad("rank", "v", "(2, 5, 32)|batch, seq, heads, dim", v=torch.randn(2, 5, 32)),
    bad_type("dtype", "v", "float16|float32", v=torch.randn(2, 5, 2, 16).half()),
    bad_type("int", "v", "int64|float32", v=torch.ones(2, 5, 2, 16).long()),
    bad("device", "v", "meta|device of", v=meta(2, 5, 2, 16)),
    bad("batch", "v", "(3, 5, 2, 16)|batch 2", v=torch.randn(3, 5, 2, 16)),
    bad("seq", "v", "(2, 6, 2, 16)|seq 5", v=torch.randn(2, 6, 2, 16)),
    bad("heads", "v", "(2, 5, 4, 16)|heads 2", v=torch.randn(2, 5, 4, 16)),
    bad("dim", "v", "(2, 5, 2, 32)|dim 16", v=torch.randn(2, 5, 2, 32)),
    bad("stride", "v", "unit stride|contiguous", v=torch.randn(2, 5, 2, 32)[..., ::2]),
    bad("thd", "v", "(6, 2, 16)|tokens 7", **packed(v=torch.randn(6, 2, 16))),
    *(
        bad(f"heads-{n}", "k", f"4|{n}", k=x, v=x)
        for n, x in ((n, torch.randn(2, 5, n, 16)) for n in (3, 8, 0))
    ),
]
SCORES = [
    bad("zero", "window", "0|at least 1", window=0),
    bad("negative", "window", "-3|at least 1", window=-3),
    bad_type("float", "window", "2.0", window=2.0),
    bad_type("bool", "window", "True", window=True),
    bad_type("pair", "window", "(3, 3)", window=(3, 3)),
    *(
        Bad(str(value), name, error, replace(**{name: value}), (str(value),))
        for name in ("softcap", "softmax_scale")
        for value, error in (
            (0.0, ValueError),
            (-1.0, ValueError),
            (NAN, ValueError),
            (INF, ValueError),
            (1e39, ValueError),
            (1e-46, ValueError),
            ("1", TypeError),
            (True, TypeError),
        )
    ),
    bad_type("number", "causal", "1|bool", causal=1),
    bad_type("string", "causal", "no|bool", causal="no"),
    bad_type("string", "return_lse", "no|bool", return_lse="no"),
    bad("unknown", "k_rotation", "loop|registers|prepass", k_rotation="loop"),
    bad("number", "k_rotation", "1|registers|prepass", k_rotation=1),
    bad("unknown", "backend", "cudnn|reference|composed", backend="cudnn"),
    bad("number", "backend", "3|reference", backend=3),
]
KEYS = [
    bad("none", "key_positions", "7|5|None", **keys(key_positions=None)),
    bad_type("list", "key_positions", "list", **keys(key_positions=[0] * 7)),
    bad_type("float", "key_positions", "float32|int64", **keys(key_positions=torch.rand(7))),
    bad("short", "key_positions", "(5,)|(7,)", **keys(key_positions=torch.arange(5))),
    bad("batch", "key_positions", "(3, 7)|(2, 7)", **keys(key_positions=torch.zeros(3, 7).long())),
    bad("device", "key_positions", "meta", **keys(key_positions=meta(7).long())),
    bad(
        "high",
        "key_positions",
        f"{2**31}|2**31 - 1",
        **keys(key_positions=torch.arange(2**31 - 6, 2**31 + 1)),
    ),
    bad("queries", "positions", "(7,)|(5,)", **keys(positions=torch.arange(7))),
    bad(
        "other-borders",
        "key_positions",
        "None",
        **packed(
            k=torch.randn(5, 2, 16),
            v=torch.randn(5, 2, 16),
            key_positions=None,
            cu_seqlens_k=torch.tensor([0, 3, 5]),
        ),
    ),
]
PADDING = [
    bad_type("list", "kv_start", "list", kv_start=[0, 1]),
    bad_type("float", "kv_start", "float32|int64", kv_start=torch.rand(2)),
    bad("shape", "kv_start", "(3,)|(2,)", kv_start=torch.zeros(3).int()),
    bad("2d", "kv_start", "(1, 2)|(2,)", kv_start=torch.zeros(1, 2).int()),
    bad("device", "kv_start", "meta", kv_start=meta(2).int()),
    bad("packed", "kv_start", "(1,)|(2,)", **packed(kv_start=torch.zeros(1).int())),
    bad("negative", "kv_start", "-1", kv_start=torch.tensor([0, -1])),
]


def borders(name: str, tokens: int) -> list[Bad]:
    """What neither cu_seqlens nor cu_seqlens_k may be."""
    last = {"cu_seqlens": [2, 5], "cu_seqlens_k": [3, 7]}[name]
    assert last[-1] == tokens

    def given(*values: int) -> Arguments:
        return packed(**{name: torch.tensor(values)})

    return [
        bad("end", name, f"{tokens}|{tokens - 1}", **given(0, 2, tokens - 1)),
        bad("past", name, f"{tokens}|{tokens + 1}", **given(0, 2, tokens + 1)),
        bad("start", name, "[1, 2", **given(1, 2, tokens)),
        bad("negative", name, "-2", **given(0, -2, tokens)),
        bad("descending", name, "ascending", **given(0, tokens + 2, tokens)),
        bad_type("float", name, "float32|int64", **packed(**{name: torch.rand(3)})),
        bad_type("list", name, "list", **packed(**{name: [0, *last]})),
        bad("2d", name, "(1, 3)|+ 1", **packed(**{name: torch.zeros(1, 3).int()})),
        bad("none", name, "(0,)|+ 1", **packed(**{name: torch.zeros(0).int()})),
        bad("device", name, "meta", **packed(**{name: meta(3).int()})),
    ]


BORDERS = [
    *borders("cu_seqlens", 5),
    *borders("cu_seqlens_k", 7),
    bad("layout", "cu_seqlens", "thd", cu_seqlens=torch.tensor([0, 2, 5])),
    bad("alone", "cu_seqlens", "cu_seqlens_k|None", **packed(cu_seqlens=None)),
    bad("count", "cu_seqlens_k", "2|(4,)", **packed(cu_seqlens_k=torch.tensor([0, 1, 3, 7]))),
    bad(
        "count-descending",
        "cu_seqlens",
        "ascending",
        **packed(cu_seqlens=torch.tensor([0, 4, 2, 5]), cu_seqlens_k=torch.tensor([0, 1, 3, 7])),
    ),
]
SETS = [
    Bad("packed", "lengths", ValueError, several(**packed()), ("sets", "2 factor sets", "(2,)")),
    Bad(
        "packed-shape",
        "lengths",
        ValueError,
        several(**packed(lengths=torch.tensor([1, 2, 3]))),
        ("(3,)", "(2,)"),
    ),
    Bad(
        "packed-high",
        "sets",
        ValueError,
        several(**packed(sets=torch.tensor([0, 2]).int())),
        ("2", "0 to 1"),
    ),
]


def good(backend: Backend) -> Arguments:
    return {
        "q": torch.randn(2, 5, 4, 16),
        "k": torch.randn(2, 5, 2, 16),
        "v": torch.randn(2, 5, 2, 16),
        "positions": torch.arange(5),
        "factors": Rope(FactorSet(factors(8))),
        "backend": backend.backend,
    }


CASES = [*TENSORS, *SCORES, *KEYS, *PADDING, *BORDERS, *SETS]


def assert_refused(backend: Backend, wrong: Bad) -> None:
    arguments = good(backend)
    made = wrong.change(arguments) or {}
    if made.get("layout") == "thd" and "k" in made and "v" not in made:
        made = {**made, "v": made["k"]}
    arguments.update(made)
    tensors = {name: arguments[name] for name in "qkv"}
    if all(
        isinstance(x, torch.Tensor) and x.dtype == fp32 and x.stride(-1) == 1
        for x in tensors.values()
    ):
        arguments.update({name: x.to(backend.dtypes[0]) for name, x in tensors.items()})
    moved = {
        name: x if isinstance(x, torch.Tensor) and x.is_meta else backend.move(x)
        for name, x in arguments.items()
    }
    assert_says(wrong, message(wrong, attention, moved))


@pytest.mark.parametrize("wrong", by_id(CASES))
def test_bad_input(wrong: Bad) -> None:
    assert_refused(REFERENCE, wrong)


@every_backend
def test_every_backend_refuses_alike(backend: Backend, checked: None) -> None:
    """What `apply_rotary` refuses, too."""
    for wrong in (*ROTARY, *CASES):
        assert_refused(backend, wrong)


@every_backend
def test_good_input_is_taken(backend: Backend) -> None:
    """What the bad cases are made from raises nothing."""
    for more in ({}, keys(), packed(), packed(factors=two_sets(8), lengths=torch.tensor([1, 9]))):
        arguments = {n: backend.move(x) for n, x in {**good(backend), **more}.items()}
        for name in "qkv":
            arguments[name] = arguments[name].to(backend.dtypes[0])
        assert attention(**arguments).shape == arguments["q"].shape


@pytest.mark.parametrize("trained", [False, True], ids=["plain", "trained"])
def test_values_are_read_once_where_the_rotation_is_a_call_of_its_own(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()

    def counting(check: Callable[..., None]) -> Callable[..., None]:
        def count(*arguments: Any) -> None:
            read[arguments[0] if isinstance(arguments[0], str) else "selection"] += 1
            check(*arguments)

        return count

    for name in ("_check_32_bits", "_check_selection"):
        monkeypatch.setattr(values, name, counting(getattr(values, name)))
    arguments = {
        **good(COMPOSED),
        **keys(),
        "factors": two_sets(8),
        "lengths": torch.tensor([7, 9]),
    }
    arguments["q"].requires_grad_(trained)
    attention(**arguments)
    assert read == {"positions": 1, "key_positions": 1, "selection": 1}
    read.clear()
    apply_rotary(*(arguments[name] for name in ("q", "q", "positions", "factors")), sets=ONES)
    assert read == {"positions": 1, "selection": 1}


@pytest.mark.parametrize("scores", [{"softcap": 2.0}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.of_scores], ids=str)
def test_what_a_named_backend_lacks_is_said(backend: Backend, scores: Arguments) -> None:
    """The message names the feature's argument and a backend that serves it."""
    (name,) = scores
    with pytest.raises(ValueError, match=rf"backend.*{backend}.*reference") as raised:
        attention(**{**good(backend), **scores})
    assert name in str(raised.value)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.k_rotation], ids=str)
def test_k_rotation_is_for_the_fused_kernel(backend: Backend) -> None:
    for name in ("registers", "prepass"):
        with pytest.raises(ValueError, match=r"k_rotation.*triton"):
            attention(**good(backend), k_rotation=name)


@pytest.mark.parametrize("dtype", [fp64, fp32, bf16, fp16], ids=str)
@every_backend
def test_dtypes_a_named_backend_lacks_are_said(backend: Backend, dtype: torch.dtype) -> None:
    tensors = {name: good(backend)[name].to(dtype) for name in "qkv"}
    if dtype in backend.dtypes:
        assert attention(**{**good(backend), **tensors}).dtype == dtype
        return
    with pytest.raises(ValueError, match=rf"backend.*{str(dtype)[6:]}.*reference"):
        attention(**{**good(backend), **tensors})


@pytest.mark.parametrize("name", ["sets", "cu_seqlens", "lengths", "kv_start"])
@every_backend
def test_one_set_still_checks_shapes_and_dtypes(backend: Backend, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        attention(**{**good(backend), name: torch.rand(2)})


def test_a_backend_that_is_not_there_raises_and_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: f"{name} needs a frobnicator")
    for backend in BACKENDS:
        if backend.backend in ("reference", "composed"):
            continue
        with pytest.raises(RuntimeError, match=f"backend.*{backend.backend}.*frobnicator"):
            attention(**good(backend))


def test_positional_arguments_of_the_documentation() -> None:
    """Six positional arguments, the rest by keyword."""
    case = Case(1, 3, dim=16)
    tensors = case.tensors()
    attention(*tensors, torch.arange(3), (1.0,) * 8, 0, causal=False)
    attention(*tensors, torch.arange(3), Rope.plain(16))
    with pytest.raises(TypeError):
        attention(*tensors, torch.arange(3), Rope.plain(16), None, True)
