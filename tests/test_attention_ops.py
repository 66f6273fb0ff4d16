"""The ops of fused attention as torch.library, autograd and the choice of backends see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CUDA, two_sets

from longrope_kernels import attention
from longrope_kernels.backends import choose as backends
from longrope_kernels.calls import schema
from longrope_kernels.calls.records import AttentionCall, Keys, Scores, Selection

ops = torch.ops.longrope_kernels
DEVICE = "cuda" if CUDA else "cpu"


QKV = ("q", "keys_k", "keys_v")


def op_arguments(packed: bool, k_rotation: str | None = None) -> tuple[Any, ...]:
    """Canonical arguments of the op: 2 rows of 5 tokens, or 2 packed sequences of 3 and 7."""
    shape = (1, 10) if packed else (2, 5)
    q, k, v = (torch.randn(*shape, h, 16, device=DEVICE).bfloat16() for h in (2, 1, 1))
    positions = torch.arange(shape[1], device=DEVICE).expand(shape)
    cu_seqlens = torch.tensor([0, 3, 10], device=DEVICE) if packed else None
    start = None if packed else torch.tensor([0, 1], device=DEVICE)
    keys = Keys(k, v, positions, start, cu_seqlens)
    selection = Selection(torch.tensor([5, 5000], device=DEVICE), None, cu_seqlens)
    tables, scores = two_sets(8).tables(q.device), Scores(True, 0.25, 3)
    call = AttentionCall(q, positions, keys, tables, selection, scores)
    return (*schema.flatten(call), k_rotation, "triton")


TENSORS = [[name for name, _ in schema.fields(AttentionCall)].index(x) for x in QKV]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_opcheck_forward(packed: bool, gradient: bool) -> None:
    arguments = op_arguments(packed)
    if gradient:
        for i in TENSORS:
            arguments[i].requires_grad_()
    torch.library.opcheck(ops.attention.default, arguments)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_opcheck_backward(packed: bool) -> None:
    arguments = op_arguments(packed)
    out, lse = ops.attention(*arguments)
    gradients = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(ops.attention_backward.default, (*gradients, out, lse, *arguments))


def test_a_second_backward_is_refused() -> None:
    arguments = op_arguments(False)
    q = arguments[0].requires_grad_()
    out, _ = ops.attention(*arguments)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.float().sum().backward()


def test_only_the_lse_has_a_gradient() -> None:
    arguments = op_arguments(False)
    q = arguments[0].requires_grad_()
    _, lse = ops.attention(*arguments)
    (dq,) = torch.autograd.grad(lse[lse.isfinite()].sum(), q)
    assert dq.isfinite().all()
    assert dq.abs().max() > 0


@pytest.mark.parametrize("k_rotation", ["prepass", "registers"])
def test_rotations_of_k_agree(k_rotation: str) -> None:
    arguments = op_arguments(False)
    named = list(op_arguments(False, k_rotation=k_rotation))
    out, lse = ops.attention(*arguments)
    for i in TENSORS:
        named[i] = arguments[i]
    same, same_lse = ops.attention(*named)
    torch.testing.assert_close(same, out, rtol=0, atol=2**-7)
    torch.testing.assert_close(same_lse, lse, rtol=0, atol=1e-2)


CHOICES = [
    ("cpu", torch.float32, "plain", "composed"),
    ("cpu", torch.bfloat16, "masked", "composed"),
    ("cpu", torch.bfloat16, "scored", "reference"),
    ("cpu", torch.float64, "plain", "reference"),
    ("cuda", torch.bfloat16, "plain", "composed"),
    ("cuda", torch.bfloat16, "masked", "triton"),
    ("cuda", torch.float16, "scored", "triton"),
    ("cuda", torch.float32, "masked", "composed"),
    ("cuda", torch.float32, "scored", "reference"),
    ("xpu", torch.bfloat16, "scored", "reference"),
    *(("cuda", torch.bfloat16, needs, "composed") for needs in ("chunk", "wide")),
    ("cuda", torch.bfloat16, "padded", "triton"),
    *(("cpu", torch.bfloat16, needs, "composed") for needs in ("chunk", "wide", "padded")),
]
# By major compute capability: with FlashAttention-4, and without. 256 is the head_dim of "wide".
BY_CAPABILITY = [
    (9, "plain", "composed", "composed"),
    (9, "chunk", "flash-attn-4", "triton"),
    (9, "wide", "flash-attn-4", "composed"),
    (9, "masked", "flash-attn-4", "triton"),
    (9, "padded", "triton", "triton"),
    (9, "scored", "triton", "triton"),
    *((major, "chunk", "composed", "composed") for major in (8, 10, 12)),
    *((major, "wide", "composed", "composed") for major in (8, 10, 12)),
    *((major, "masked", "triton", "triton") for major in (8, 10, 12)),
]


@pytest.mark.parametrize(("device", "dtype", "needs", "name"), CHOICES)
def test_choice(device: str, dtype: torch.dtype, needs: str, name: str) -> None:
    assert backends.choose_attention(None, device, dtype, 128, needs) == name


@pytest.mark.parametrize("device", ["xpu", "mps", "meta"])
def test_devices_without_a_row_are_not_served_by_the_cpu(device: str) -> None:
    """They take the row of the CPU, whose kernels read its own memory."""
    chosen = backends.choose_attention(None, device, torch.float32, 64, "scored", own=True)
    assert chosen == "reference"


@pytest.mark.parametrize("trains", [False, True], ids=["", "trains"])
@pytest.mark.parametrize(("major", "needs", "name", "without"), BY_CAPABILITY)
def test_choice_by_capability(
    major: int, needs: str, name: str, without: str, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent: set[str] = set()
    monkeypatch.setattr(
        backends, "missing", lambda name: "not installed" if name in absent else None
    )
    dim = 256 if needs == "wide" else 128

    def choose(dtype: torch.dtype = torch.bfloat16, **rest: Any) -> str:
        return backends.choose_attention(
            None, "cuda", dtype, dim, needs, trains, capability=major, **rest
        )

    assert choose() == name
    if needs != "chunk":  # which no graph tells from "plain"
        assert choose(libraries=False) == without
    assert choose(torch.float32) == ("reference" if needs == "scored" else "composed")
    absent.add("flash-attn-4")
    assert choose() == without


def test_choice_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ["triton"]
    monkeypatch.setattr(
        backends, "missing", lambda name: "not installed" if name in absent else None
    )
    choose = backends.choose_attention
    assert choose(None, "cuda", torch.bfloat16, 128, "masked") == "cuda"
    absent.append("cuda")
    assert choose(None, "cuda", torch.bfloat16, 128, "masked") == "composed"
    with pytest.raises(RuntimeError, match=r"^backend: 'triton' is not available: not installed"):
        choose("triton", "cuda", torch.bfloat16, 128, "plain")


def test_compiled_attention_equals_eager() -> None:
    q, k, v = (torch.randn(2, 7, h, 32, device=DEVICE).half() for h in (2, 1, 1))
    rope, positions = two_sets(16).to(DEVICE), torch.arange(7, device=DEVICE)
    lengths = torch.tensor([7, 4097], device=DEVICE)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(
            q,
            k,
            v,
            positions,
            rope,
            lengths=lengths,
            return_lse=True,
            softcap=9.0,
            backend="triton",
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for run in (call, compiled):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = run(*inputs)
        gradients = torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs)
        results.append((out, lse, *gradients))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
