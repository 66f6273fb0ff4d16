"""Gradients: by the truth, by the reference's autograd, twice, and with odd incoming gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import truth
from cases import (
    REFERENCE,
    Shape,
    Target,
    by_id,
    every_kernel,
    every_target,
    positions_for,
    two_sets,
)
from tolerance import assert_close
from torch.utils.checkpoint import checkpoint

bf16, fp16 = torch.bfloat16, torch.float16
SHAPES = [
    Shape(2, 19, 4, 2, 96, dtype=bf16),
    Shape(2, 18, 2, 1, 32, 12, layout="bhsd", interleaved=True),
    Shape(1, 63, 2, 1, 24, 5, layout="thd", dtype=fp16),
    Shape(1, 20, 3, 0, 64, layout="bhsd"),
    Shape(2, 18, 2, 2, 33, 7),
]


def leaves(
    target: Target, *tensors: torch.Tensor | None, requires_grad: Any = True
) -> list[torch.Tensor | None]:
    return [
        None if x is None else target.move(x.detach().clone()).requires_grad_(requires_grad)
        for x in tensors
    ]


@pytest.mark.parametrize("shape", by_id(SHAPES))
@every_target
def test_gradients_against_truth(target: Target, shape: Shape) -> None:
    rope, positions = shape.rope(), positions_for(shape.seq, 128)
    q, k = leaves(target, *shape.qk())
    outs = target.rotary(q, k, positions, rope, layout=shape.layout)
    inputs = [x for x in (q, k) if x is not None]
    outs = [x for x in outs if x is not None]
    grads_out = [target.move(torch.randn(x.shape).to(x.dtype)) for x in outs]
    grads = torch.autograd.grad(outs, inputs, grads_out)
    for name, x, grad_out, grad in zip("qk", inputs, grads_out, grads, strict=False):
        assert grad.shape == x.shape
        expected = truth.rotary(grad_out, positions, rope, layout=shape.layout, backward=True)
        assert_close(grad, expected, f"grad of {name}")
        rest = slice(rope.rotary_dim, None)
        assert torch.equal(grad[..., rest], grad_out[..., rest])


@every_target
def test_truth_of_gradients_is_what_autograd_says(target: Target) -> None:
    """The formula for the gradient above, and each backend's, against autograd of the formula."""
    shape = Shape(2, 18, 2, 1, 12, 4)
    rope, positions = shape.rope(), positions_for(18, 128)
    (q64,) = leaves(REFERENCE, shape.qk()[0].double())
    grad_out = torch.randn(q64.shape)
    of_token = truth.token_sets(rope, 2, 18)
    cos, sin = truth.cos_sin(rope, positions.expand(2, 18), of_token)
    (by_autograd,) = torch.autograd.grad(truth.rotate(q64, cos, sin, False), q64, grad_out.double())
    expected = truth.rotary(grad_out, positions, rope, backward=True)
    assert torch.allclose(expected.ref64, by_autograd, rtol=0, atol=1e-14)
    (q,) = leaves(target, q64.float())
    out, _ = target.rotary(q, None, positions, rope)
    (grad,) = torch.autograd.grad(out, q, target.move(grad_out))
    assert_close(grad, truth.Expected(by_autograd, expected.low))


@every_target
def test_gradients_with_mixed_sets(target: Target) -> None:
    shape = Shape(2, 18, 2, 1, 32)
    rope, positions = two_sets(16), positions_for(18, 7)
    lengths = torch.tensor([4096, 4097], dtype=torch.int32)
    q, k = leaves(target, *shape.qk())
    outs = target.rotary(q, k, positions, rope, lengths=lengths)
    grads_out = [target.move(torch.randn(x.shape)) for x in outs]
    grads = torch.autograd.grad(outs, [q, k], grads_out)
    for grad, grad_out in zip(grads, grads_out, strict=True):
        assert_close(grad, truth.rotary(grad_out, positions, rope, lengths=lengths, backward=True))


@every_target
def test_gradients_of_packed_sequences(target: Target) -> None:
    shape = Shape(1, 18, 2, 1, 32, layout="thd")
    rope, positions = two_sets(16), positions_for(18, 7)
    selection = {
        "sets": torch.tensor([1, 0, 0, 1], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 2, 2, 11, 18], dtype=torch.int32),
    }
    q, k = leaves(target, *shape.qk())
    outs = target.rotary(q, k, positions, rope, layout="thd", **selection)
    grads_out = [target.move(torch.randn(x.shape)) for x in outs]
    grads = torch.autograd.grad(outs, [q, k], grads_out)
    for grad, grad_out in zip(grads, grads_out, strict=True):
        expected = truth.rotary(grad_out, positions, rope, layout="thd", backward=True, **selection)
        assert_close(grad, expected)


@pytest.mark.parametrize("only", ["q", "k"])
@every_target
def test_only_one_requires_grad(target: Target, only: str) -> None:
    shape = Shape(1, 18, 2, 1, 32)
    rope, positions = shape.rope(), positions_for(18, 128)
    q, k = (target.move(x) for x in shape.qk())
    wanted = q if only == "q" else k
    wanted.requires_grad_()
    outs = target.rotary(q, k, positions, rope)
    out = outs[0 if only == "q" else 1]
    grad_out = torch.randn(out.shape)
    out.backward(target.move(grad_out))
    assert_close(wanted.grad, truth.rotary(grad_out, positions, rope, backward=True))
    assert (k if only == "q" else q).grad is None


@pytest.mark.parametrize("used", ["q", "k"])
@every_target
def test_only_one_output_is_used(target: Target, used: str) -> None:
    """The other gets no gradient or zeros, never what lay in memory."""
    shape = Shape(1, 18, 2, 1, 32)
    rope, positions = shape.rope(), positions_for(18, 128)
    q, k = leaves(target, *shape.qk())
    outs = dict(zip("qk", target.rotary(q, k, positions, rope), strict=True))
    grad_out = torch.randn(outs[used].shape)
    outs[used].backward(target.move(grad_out))
    inputs = {"q": q, "k": k}
    expected = truth.rotary(grad_out, positions, rope, backward=True)
    assert_close(inputs.pop(used).grad, expected)
    (other,) = inputs.values()
    assert other.grad is None or not other.grad.any()


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@every_target
def test_expanded_incoming_gradient(target: Target, layout: str) -> None:
    """out.sum().backward() hands over a gradient of strides 0."""
    shape = Shape(1, 18, 2, 1, 32, 12, layout=layout)
    rope, positions = shape.rope(), positions_for(18, 128)
    q, k = leaves(target, *shape.qk())
    outs = target.rotary(q, k, positions, rope, layout=layout)
    (outs[0].sum() + outs[1].sum()).backward()
    for x in (q, k):
        ones = torch.ones(x.shape)
        expected = truth.rotary(ones, positions, rope, layout=layout, backward=True)
        assert_close(x.grad, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@every_target
def test_partly_expanded_and_transposed_incoming_gradient(target: Target, axis: int) -> None:
    shape = Shape(2, 5, 3, 0, 16)
    rope, positions = shape.rope(), positions_for(5, 128)
    (q,) = leaves(target, shape.qk()[0])
    out, _ = target.rotary(q, None, positions, rope)
    sizes = [2, 5, 3, 16]
    sizes[axis] = 1
    expanded = torch.randn(sizes).expand(out.shape)
    transposed = torch.randn(16, 5, 3, 2).transpose(0, 3)  # its last stride is not 1
    for grad_out in (expanded, transposed):
        (grad,) = torch.autograd.grad(out, q, target.move(grad_out), retain_graph=True)
        assert_close(grad, truth.rotary(grad_out, positions, rope, backward=True))


@every_target
def test_gradient_reaches_packed_qkv(target: Target) -> None:
    """q and k are slices of one projection, as in the Phi-3 family; v's part gets none."""
    shape = Shape(2, 9, 4, 2, 16)
    rope, positions = shape.rope(), positions_for(9, 128)
    (qkv,) = leaves(target, torch.randn(2, 9, 8, 16))
    outs = target.rotary(qkv[:, :, :4], qkv[:, :, 4:6], positions, rope)
    grads_out = [torch.randn(x.shape) for x in outs]
    torch.autograd.backward(outs, [target.move(g) for g in grads_out])
    expected = [truth.rotary(g, positions, rope, backward=True) for g in grads_out]
    assert_close(qkv.grad[:, :, :4], expected[0])
    assert_close(qkv.grad[:, :, 4:6], expected[1])
    assert not qkv.grad[:, :, 6:].any()


@every_target
def test_double_backward(target: Target) -> None:
    """The gradient is linear in the incoming one; its gradient is the forward rotation."""
    shape = Shape(2, 18, 2, 1, 32, 12)
    rope, positions = shape.rope(), positions_for(18, 128)
    q, k = leaves(target, *shape.qk())
    outs = target.rotary(q, k, positions, rope)
    grads_out = leaves(target, *(torch.randn(x.shape) for x in outs))
    grads = torch.autograd.grad(outs, [q, k], grads_out, create_graph=True)
    weights = [torch.randn(x.shape) for x in grads]
    twice = torch.autograd.grad(grads, grads_out, [target.move(w) for w in weights])
    for weight, out in zip(weights, twice, strict=True):
        assert_close(out, truth.rotary(weight, positions, rope))


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_gradcheck_twice_in_the_reference(layout: str, interleaved: bool) -> None:
    shape = Shape(1, 3, 2, 1, 6, 2, layout, torch.float64, interleaved)
    rope, positions = shape.rope(n_hat=5), torch.tensor([4, 5, 1000])

    def rotary(q: torch.Tensor, k: torch.Tensor) -> Any:
        return REFERENCE.rotary(q, k, positions, rope, layout=layout)

    inputs = leaves(REFERENCE, *shape.qk())
    assert torch.autograd.gradcheck(rotary, inputs)
    assert torch.autograd.gradgradcheck(rotary, inputs)


@pytest.mark.parametrize("shape", by_id(SHAPES[:3]))
@every_kernel
def test_gradients_against_autograd_of_the_reference(target: Target, shape: Shape) -> None:
    """The reference in float64 is the truth, where its angles are exact enough."""
    rope = shape.rope()
    positions = torch.randint(-300, 131073, (shape.seq,))
    tensors, grads_out = shape.qk(), [torch.randn(x.shape).to(x.dtype) for x in shape.qk()]
    results = []
    for where, dtype in ((target, shape.dtype), (REFERENCE, torch.float64)):
        q, k = leaves(where, *(x.to(dtype) for x in tensors))
        outs = where.rotary(q, k, positions, rope, layout=shape.layout)
        results.append(
            torch.autograd.grad(outs, [q, k], [where.move(g.to(dtype)) for g in grads_out])
        )
    for grad, ref64, grad_out in zip(*results, grads_out, strict=True):
        low = truth.rotary(grad_out, positions, rope, layout=shape.layout, backward=True).low
        assert_close(grad, truth.Expected(ref64, low))


@every_target
def test_no_graph_without_need(target: Target) -> None:
    shape = Shape(1, 3, 2, 1, 16)
    q, k = (target.move(x) for x in shape.qk())
    assert not any(x.requires_grad for x in target.rotary(q, k, torch.arange(3), shape.rope()))
    q.requires_grad_()
    with torch.no_grad():
        out, _ = target.rotary(q, k, torch.arange(3), shape.rope())
    assert not out.requires_grad


@every_target
def test_k_without_grad_beside_q_with_grad(target: Target) -> None:
    """k without grad beside q with grad: backward through both is still right for q."""
    shape = Shape(1, 18, 2, 2, 16)
    rope, positions = shape.rope(), positions_for(18, 128)
    q, k = (target.move(x) for x in shape.qk())
    q.requires_grad_()
    q_out, k_out = target.rotary(q, k, positions, rope)
    (q_out * k_out).sum().backward()
    assert_close(q.grad, truth.rotary(k_out.detach(), positions, rope, backward=True))


@every_target
def test_activation_checkpointing(target: Target) -> None:
    """Activation checkpointing runs the forward twice; the gradient is the same."""
    shape = Shape(1, 18, 2, 1, 16)
    rope, positions = shape.rope(), target.move(positions_for(18, 128))
    grads = []
    tensors = shape.qk()
    for wrap in (False, True):
        q, k = leaves(target, *tensors)
        args = (q, k, positions, rope)
        outs = (
            checkpoint(target.rotary, *args, use_reentrant=False) if wrap else target.rotary(*args)
        )
        sum(x.square().sum() for x in outs).backward()
        grads.append((q.grad, k.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
