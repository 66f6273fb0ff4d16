"""`attention` by the native kernel: queries that stand at their own keys, which is decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Backend, Case, check
from attention_truth import bf16, fp16, fp32, fp64
from test_attention_forward import LSE, PADDING, ROPES, SCORES, SHAPES, WINDOWS

from longrope_kernels import attention
from longrope_kernels.backends import choose, native

NATIVE = Backend("native", "cpu", (fp32, bf16, fp16))
SETS = [
    Case(3, 70, lengths=(4095, 4097, 70), dtype=bf16),
    Case(2, 33, sets=(1, 0), layout="bhsd", return_lse=True),
]
SINKS = [Case(2, 40, sinks=True, dtype=bf16), Case(2, 40, sinks=True, window=7, return_lse=True)]
NOTHING = [Case(0, 5), Case(2, 0), Case(2, 0, return_lse=True, layout="bhsd")]
SERVED = [
    case
    for case in (*SHAPES, *WINDOWS, *PADDING, *SCORES, *LSE, *ROPES, *SETS, *SINKS, *NOTHING)
    if case.causal and not case.keys and not case.counts
]


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_against_the_truth(case: Case) -> None:
    check(NATIVE, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 130, 0, 4, 2, 64, window=50, dtype=bf16),
        Case(1, 97, 0, 3, 3, 48, 16, dtype=bf16),  # an odd number of vectors
        Case(1, 70, 0, 2, 1, 40, dtype=bf16, softcap=3.0, return_lse=True, interleaved=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", native.instruction_sets())
def test_each_instruction_set(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = native.decode
    monkeypatch.setattr(native, "decode", lambda *a: kernel(*a, name))
    check(NATIVE, case)


def arguments(case: Case) -> dict[str, Any]:
    tensors = dict(zip("qkv", case.tensors(), strict=True))
    return {**tensors, **case.arguments(), "factors": case.rope(), "backend": "native"}


@pytest.mark.parametrize(
    "case", [Case(causal=False), Case(2, 5, 9), Case(counts=(3, 4), layout="thd")], ids=str
)
def test_other_calls_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^backend: 'native' serves causal .* without key_pos"):
        attention(**arguments(case))


def test_gradients_and_float64_are_refused() -> None:
    given = arguments(Case(1, 9))
    with pytest.raises(ValueError, match=r"^backend: 'native' serves float32, bfloat16 and float"):
        attention(**arguments(Case(1, 9, dtype=fp64)))
    given["v"].requires_grad_()
    with pytest.raises(ValueError, match=r"^backend: 'native' makes no gradients"):
        attention(**given)
    with torch.no_grad():
        attention(**given)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For softcap and the log-sum-exp always, else where oneMKL is slow."""

    def choices(maker: str | None, **rest: Any) -> set[str]:
        return {
            choose.choose_attention(
                None, "cpu", bf16, 64, needs, **{"capability": maker, "own": True, **rest}
            )
            for needs in ("plain", "wide", "masked", "padded")
        }

    def scored(**rest: Any) -> str:
        return choose.choose_attention(None, "cpu", fp32, 64, "scored", **{"own": True, **rest})

    assert choices("AMD") == {"native"}
    assert choices(None) == choices("AMD", own=False) == choices("AMD", trains=True) == {"composed"}
    assert scored() == scored(sinks=True) == "native"
    assert scored(own=False) == scored(trains=True) == "reference"
    monkeypatch.setattr(choose, "missing", lambda name: "absent" if name == "native" else None)
    assert choices("AMD") == {"composed"}
    assert scored() == "reference"


def test_under_another_default_device() -> None:
    """The lengths it makes are where q is."""
    given = arguments(Case(1, 5))
    expected = attention(**given)
    with torch.device("meta"):
        found = attention(**given)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("maker", ["AMD", None])
def test_by_default(maker: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly and in a graph, whoever made the processor."""
    monkeypatch.setattr(choose, "capability_of", lambda device: maker)
    torch._dynamo.reset()
    for case in (Case(1, 20, window=6), Case(2, 20, softcap=3.0)):
        given = replace(case, dtype=bf16)
        named = arguments(given)
        expected = attention(**named)
        compiled = torch.compile(attention, fullgraph=True)
        for call in (attention, compiled):
            out = call(**{**named, "backend": None})
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-2)
