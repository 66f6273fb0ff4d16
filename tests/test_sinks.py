"""Sinks, a logit of each head that joins the sum of the softmax and has no value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attention_cases
import decode_truth
import pytest
import torch
from attention_cases import COMPOSED, REFERENCE, Case, check_grads
from attention_truth import bf16, fp16, fp64
from cases import factors

from longrope_kernels import attention, decode
from longrope_kernels.backends import choose

# What meets the softmax's sum: masks, packed sequences, groups, sets in one batch, no key at all.
CASES = [
    Case(sinks=True, return_lse=True),
    Case(sinks=True),
    Case(2, 35, 0, 8, 2, 80, 16, sinks=True, dtype=bf16, layout="bhsd", interleaved=True),
    Case(1, 70, sinks=True, window=17, dim=64, kv_heads=1, dtype=bf16),
    Case(2, 7, 40, 4, 4, sinks=True, dtype=fp16, scale=0.3),
    Case(2, 20, 9, sinks=True, dtype=bf16, return_lse=True),
    Case(2, 20, 9, sinks=True, layout="bhsd"),
    Case(2, 9, 20, sinks=True, causal=False, window=3),
    Case(sinks=True, softcap=1.5, dtype=fp16, return_lse=True),
    Case(sinks=True, layout="thd", counts=(7, 0, 12), heads=3, kv_heads=1),
    Case(3, sinks=True, kv_start=(0, 19, 4), dtype=bf16),
    Case(2, 5, 0, sinks=True, sets=(1, 0), n_hat=0),
    Case(2, 5, 0, sinks=True, lengths=(4096, 4097), dtype=bf16),
]
# Of as many heads as it takes for their gradients to show what rounding does.
TRAINED = [replace(case, heads=8, kv_heads=1) for case in CASES if case.queries < 40]
DECODED = [
    decode_truth.Case(sinks=True),
    decode_truth.Case((70, 3), sinks=True, block=16, dtype=bf16),
    decode_truth.Case((0, 2), sinks=True, kv_start=(0, 1), dtype=fp16),
    decode_truth.Case((33, 9), 3, sinks=True, window=5, softcap=2.0),
    decode_truth.Case((41, 40), 2, 3, 1, sinks=True, boundary=40, kv_start=(0, 4), dtype=bf16),
    decode_truth.Case((40, 17), sinks=True, float8=True, interleaved=True, heads=2, kv_heads=1),
    decode_truth.Case((30, 20), 18, 2, 1, sinks=True),
    decode_truth.Case((9, 3), 12, sinks=True, positions="any"),
]


@attention_cases.every_case(CASES)
def test_attention(backend: attention_cases.Backend, case: Case) -> None:
    attention_cases.check(backend, case)


@attention_cases.every_case(TRAINED)
def test_gradients(backend: attention_cases.Backend, case: Case) -> None:
    check_grads(backend, case)


@decode_truth.every_case(DECODED)
def test_decode(backend: decode_truth.Backend, case: decode_truth.Case) -> None:
    if backend is decode_truth.COMPILED:
        with pytest.raises(ValueError, match=r"^backend: 'cuda' serves no sinks; expected"):
            backend.decode(**case.call().arguments)
    else:
        decode_truth.check(backend, case.call())


@pytest.mark.parametrize("dtype", [bf16, fp16, fp64], ids=str)
@attention_cases.every_forward
def test_any_dtype(backend: attention_cases.Backend, dtype: torch.dtype) -> None:
    case = backend.nearest(Case(1, 5, heads=2, kv_heads=1))
    tensors, (positions, sinks) = case.tensors(), (torch.arange(5), torch.tensor([0.5, -1.25]))
    args = (*tensors, positions, case.rope())
    assert torch.equal(
        backend.attend(*args, sinks=sinks.to(dtype)), backend.attend(*args, sinks=sinks)
    )


@attention_cases.every_forward
def test_a_sink_is_not_rounded_to_the_dtype_of_q(backend: attention_cases.Backend) -> None:
    case = Case(1, 1, heads=2, kv_heads=1, dtype=bf16)
    _, k, v = case.tensors()
    q, sinks = torch.zeros(1, 1, 2, case.dim, dtype=bf16), torch.tensor([9.7, 5.3])
    out = backend.attend(q, k, v, torch.arange(1), case.rope(), sinks=sinks)
    expected = v.double() / (1 + sinks.double().exp()[:, None])
    assert torch.allclose(out.double(), expected, rtol=2**-7, atol=0)


@attention_cases.every_forward
def test_far_off(backend: attention_cases.Backend) -> None:
    """-inf is none at all; a large one leaves nothing."""
    case = backend.nearest(Case(1, 5, heads=2, kv_heads=1))
    args = (*case.tensors(), torch.arange(5), case.rope())
    out = backend.attend(*args, sinks=torch.tensor([-torch.inf, 200.0]))
    assert torch.allclose(out[:, :, 0], backend.attend(*args)[:, :, 0], rtol=1e-2, atol=1e-5)
    assert not out[:, :, 1].any()


@pytest.mark.parametrize("scale", [0.25, 2.0**-17])
def test_composed_in_float16(scale: float) -> None:
    """Whose largest number is 65504: a sink beyond it leaves nothing, as in the reference."""
    case = Case(1, 5, heads=2, kv_heads=1, dtype=torch.float16)
    args, sinks = (*case.tensors(), torch.arange(5), case.rope()), torch.tensor([5e4, torch.inf])
    given = {"sinks": sinks, "softmax_scale": scale, "backend": "composed"}
    assert not attention(*args, **given).any()


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_second_derivatives_of_the_reference(case: Case) -> None:
    case = replace(case, dtype=fp64, queries=3, heads=2, kv_heads=1, batch=1, dim=4)
    tensors = [x.requires_grad_() for x in case.tensors()]
    sinks = torch.randn(2, dtype=fp64).requires_grad_()

    def attend(*given: torch.Tensor) -> Any:
        return attention(*given[:3], torch.arange(3), case.rope(), sinks=given[3])

    assert torch.autograd.gradgradcheck(attend, (*tensors, sinks))


def test_gradients_of_the_sinks_alone() -> None:
    for backend in attention_cases.BACKENDS:
        case = backend.nearest(Case(1, 5, heads=2, kv_heads=1))
        sinks = torch.zeros(2, requires_grad=True)
        args = (*case.tensors(), torch.arange(5), case.rope())
        backend.attend(*args, sinks=sinks).float().sum().backward()
        assert sinks.grad is not None
        assert sinks.grad.all()


def _given(**more: Any) -> dict[str, Any]:
    x = torch.randn(1, 3, 4, 8)
    return {"q": x, "k": x[:, :, :2], "v": x[:, :, :2], "positions": torch.arange(3), **more}


def _cached(**more: Any) -> dict[str, Any]:
    x = torch.randn(1, 3, 4, 8)
    caches = {"k_cache": x[:, :, :2], "v_cache": x[:, :, :2]}
    return {"q": x, **caches, "cache_lens": torch.tensor([3]), **more}


@pytest.mark.parametrize(("call", "given"), [(attention, _given), (decode, _cached)])
@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (torch.zeros(2), ValueError, r"^sinks: expected shape \(4,\), .* got \(2,\)$"),
        (torch.zeros(1, 4), ValueError, r"^sinks: expected shape \(4,\), .* got \(1, 4\)$"),
        (torch.zeros(4).long(), TypeError, r"^sinks: expected float32, .* got torch.int64$"),
        ([0.0] * 4, TypeError, r"^sinks: expected a tensor, got list$"),
        (
            torch.zeros(8)[::2],
            ValueError,
            r"^sinks: expected a unit stride, got 2; pass sinks.cont",
        ),
        (torch.zeros(4, device="meta"), ValueError, r"^sinks: expected the device of q, cpu"),
    ],
    ids=["short", "matrix", "index", "list", "strided", "device"],
)
def test_what_is_no_sink(
    call: Any, given: Any, sinks: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**given(sinks=sinks), factors=factors(4), n_hat=0)


@pytest.mark.parametrize("backend", choose.WITHOUT_SINKS)
def test_backends_without_them(backend: str) -> None:
    given = _given(sinks=torch.zeros(4), factors=factors(4), n_hat=0, backend=backend)
    with pytest.raises(ValueError, match=rf"^sinks: backend '{backend}' does not serve them; exp"):
        attention(**given)


def test_decode_has_no_gradient_of_them() -> None:
    sinks = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"^sinks: decode has no gradient"):
        decode(**_cached(sinks=sinks), factors=factors(4), n_hat=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("capability", [8, 9])
def test_who_is_chosen(device: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that serves them, of all that could be there."""
    monkeypatch.setattr(choose, "missing_products", lambda *of: None)
    monkeypatch.setattr(choose, "_module", lambda name: pytest.fail("a library was asked"))
    for needs in ("masked", "padded", "scored"):
        of = None, device, bf16, 64, needs, False, capability
        name = choose.choose_attention(*of, sinks=True)
        assert name not in choose.WITHOUT_SINKS
        assert (name == "triton") == (device == "cuda")
    name = choose.choose_decode(None, device, bf16, bf16, 64, sinks=True)
    assert name == ("triton" if device == "cuda" else "native")


def test_composed_without_a_mask_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there was none, torch may take its fastest kernel beside sinks too."""
    seen = []

    def attends(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return plain(*args, **kwargs)

    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attends)
    attention_cases.check(COMPOSED, Case(sinks=True))
    assert seen == [(None, True)]


def test_compiled() -> None:
    for backend in (REFERENCE, COMPOSED):
        case = backend.nearest(Case(1, 5, sinks=True))
        args = (*case.tensors(), torch.arange(5), case.rope())
        sinks = case.arguments()["sinks"]
        compiled = torch.compile(backend.attend, fullgraph=True)
        out = compiled(*args, sinks=sinks)
        assert torch.allclose(out, backend.attend(*args, sinks=sinks), atol=1e-5)


@pytest.mark.parametrize("sink", [torch.inf, torch.finfo(torch.float32).max, 1e30])
def test_a_sink_beyond_all_scores_takes_everything(sink: float) -> None:
    q = torch.randn(1, 5, 2, 16)
    sinks = torch.tensor([0.0, sink])
    given = q, q, q, torch.arange(5), [1.0] * 8, 0
    expected = attention(*given, sinks=sinks, backend="reference")
    cached = q, q, q, torch.tensor([5]), [1.0] * 8, 0
    for out in (
        attention(*given, sinks=sinks, backend="native"),
        decode(*cached, sinks=sinks, backend="native"),
    ):
        assert not out[:, :, 1].any()
        torch.testing.assert_close(out, expected)
