"""Laws of the rotation, and shapes nobody wrote down."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import truth
from cases import CUDA, DTYPE_NAMES, Shape, Target, every_target, factors, two_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    pairs = draw(st.integers(1, 20))
    heads = draw(st.integers(1, 5))
    return Shape(
        draw(st.integers(0, 3)),
        draw(st.integers(0, 21)),
        heads,
        draw(st.integers(0, heads)),
        2 * pairs + draw(st.sampled_from([0, 0, 1, 6])),
        pairs,
        draw(st.sampled_from(["bshd", "bhsd", "thd"])),
        draw(st.sampled_from([d for d in DTYPE_NAMES if d != torch.float64])),
        draw(st.booleans()),
    )


any_position = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-3, 140), st.integers(4090, 4100)
)


@settings(max_examples=40)
@given(shapes(), st.data())
@every_target
def test_any_shape(target: Target, shape: Shape, data: st.DataObject) -> None:
    """Any shape, any positions, any threshold, forward and backward."""
    n_hat = data.draw(st.sampled_from([0, 1, 128, 4096]))
    rope = shape.rope(n_hat, data.draw(st.sampled_from([1.0, 1.19])))
    count = shape.batch * shape.seq if shape.layout == "thd" else shape.seq
    values = data.draw(st.lists(any_position, min_size=count, max_size=count))
    positions = torch.tensor(values, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    tensors = [x if x is None else target.move(x).requires_grad_() for x in shape.qk()]
    outs = target.rotary(*tensors, positions, rope, layout=shape.layout)
    for x, out in zip(tensors, outs, strict=True):
        if x is None:
            assert out is None
            continue
        assert_close(out, truth.rotary(x, positions, rope, layout=shape.layout))
        grad_out = torch.randn(out.shape).to(out.dtype)
        (grad,) = torch.autograd.grad(out, x, target.move(grad_out), retain_graph=True)
        expected = truth.rotary(grad_out, positions, rope, layout=shape.layout, backward=True)
        assert_close(grad, expected)


@settings(max_examples=20)
@given(st.data())
@every_target
def test_any_packing(target: Target, data: st.DataObject) -> None:
    """Any counts of tokens, zero included, and any sets."""
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    lengths = data.draw(
        st.lists(
            st.sampled_from([0, 5, 4096, 4097, 10**6]),
            min_size=len(counts),
            max_size=len(counts),
        )
    )
    shape = Shape(1, sum(counts), 2, 1, 16, 6, layout="thd")
    rope = two_sets(6)
    positions = torch.cat([torch.arange(n) for n in counts])
    selection = {
        "lengths": torch.tensor(lengths),
        "cu_seqlens": torch.tensor([0, *counts]).cumsum(0),
    }
    q, k = shape.qk()
    for x, out in zip(
        (q, k), target.rotary(q, k, positions, rope, layout="thd", **selection), strict=True
    ):
        assert_close(out, truth.rotary(x, positions, rope, layout="thd", **selection))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("shift", [1, 4096, 131072, 2**21, 2**31 - 200, -(2**30)])
@every_target
def test_dot_products_depend_on_the_distance_only(
    target: Target, shift: int, interleaved: bool
) -> None:
    """<R_m q, R_n k> for all m, n of a window is the same wherever the window lies (n_hat = 0).

    Each side is off by its inputs' rotation errors, 1e-6 of each vector's length as promised.
    """
    rope = Rope(FactorSet(factors(32), 0, 1.19), interleaved=interleaved)
    q, k = Shape(1, 16, 1, 1, 64).qk()
    window = torch.arange(16) * 11

    def scores(positions: torch.Tensor) -> torch.Tensor:
        rotated = [x.cpu().double()[0, :, 0] for x in target.rotary(q, k, positions, rope)]
        return rotated[0] @ rotated[1].T

    lengths = 1.19**2 * q[0, :, 0].norm(dim=-1)[:, None] * k[0, :, 0].norm(dim=-1)[None]
    error = (scores(window + shift) - scores(window)).abs()
    assert (error <= 4e-6 * lengths).all()


@every_target
def test_position_0_is_the_identity_up_to_a(target: Target) -> None:
    """Exactly: cos 0 is 1 and sin 0 is 0, and a power of two loses nothing."""
    shape = Shape(2, 3, 2, 1, 32)
    q, k = shape.qk()
    for n_hat, a, scale in ((0, 1.0, 1.0), (0, 2.0, 2.0), (5, 2.0, 1.0)):
        rope = Rope(FactorSet(factors(16), n_hat, a))
        outs = target.rotary(q, k, torch.zeros(3, dtype=torch.int32), rope)
        for x, out in zip((q, k), outs, strict=True):
            assert torch.equal(out.cpu(), scale * x)


@every_target
def test_backwards_undoes_forwards(target: Target) -> None:
    """Rotation by -n after rotation by n is the identity, to two roundings (1e-6 each way)."""
    q, _ = Shape(1, 18, 2, 0, 64).qk()
    rope, positions = Rope.plain(64), 2**20 + torch.arange(18) * 997
    there, _ = target.rotary(q, None, positions, rope)
    back, _ = target.rotary(there, None, -positions, rope)
    assert (back.cpu() - q).abs().max() <= 4e-6 * q.abs().max()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@every_target
def test_a_batch_equals_its_sequences_one_by_one(target: Target, layout: str) -> None:
    """Bitwise: neither the batch nor a neighbour's set may touch a sequence."""
    shape = Shape(4, 19, 3, 1, 48, dtype=torch.bfloat16, layout=layout)
    rope, (q, k) = two_sets(24), shape.qk()
    positions = torch.randint(-100, 2**31 - 1, (4, 19))
    lengths = torch.tensor([5, 5000, 4097, 4096])
    batch = target.rotary(q, k, positions, rope, layout=layout, lengths=lengths)
    for i in range(4):
        part = slice(i, i + 1)
        alone = target.rotary(
            q[part], k[part], positions[part], rope, layout=layout, lengths=lengths[part]
        )
        assert all(torch.equal(x[part], y) for x, y in zip(batch, alone, strict=True))


@every_target
def test_packing_and_layout_do_not_change_a_bit(target: Target) -> None:
    shape = Shape(3, 11, 2, 1, 32)
    rope, (q, k) = two_sets(16), shape.qk()
    positions = torch.randint(-100, 2**31 - 1, (3, 11))
    lengths = torch.tensor([5, 5000, 4097])
    wanted = target.rotary(q, k, positions, rope, lengths=lengths)
    turned = target.rotary(
        q.transpose(1, 2), k.transpose(1, 2), positions, rope, layout="bhsd", lengths=lengths
    )
    packed = target.rotary(
        q.flatten(0, 1),
        k.flatten(0, 1),
        positions.flatten(),
        rope,
        layout="thd",
        lengths=lengths,
        cu_seqlens=torch.tensor([0, 11, 22, 33]),
    )
    for i, out in enumerate(wanted):
        assert torch.equal(turned[i].transpose(1, 2), out)
        assert torch.equal(packed[i].view(out.shape), out)


@every_target
def test_a_chunked_prefill_equals_a_whole_one(target: Target) -> None:
    """Bitwise, with the length of the whole prompt: what lies in one call must not matter."""
    shape = Shape(1, 150, 1, 1, 32)
    rope, (q, k) = two_sets(16), shape.qk()
    positions, lengths = 4000 + torch.arange(150), torch.tensor([4150])
    whole = target.rotary(q, k, positions, rope, lengths=lengths)
    bounds = [0, 1, 64, 77, 150]
    chunks = [
        target.rotary(q[:, a:b], k[:, a:b], positions[a:b], rope, lengths=lengths)
        for a, b in pairwise(bounds)
    ]
    for i, out in enumerate(whole):
        got = torch.cat([chunk[i] for chunk in chunks], 1).cpu().double()
        expected = truth.rotary((q, k)[i], positions, rope, lengths=lengths)
        assert_close(out, expected)
        assert_close(got.to(out.dtype), expected)


@every_target
def test_norms_are_kept(target: Target) -> None:
    q, _ = Shape(1, 18, 2, 0, 64).qk()
    positions = torch.randint(0, 2**31 - 1, (18,))
    out, _ = target.rotary(q, None, positions, Rope.plain(64))
    ratio = out.cpu().double().norm(dim=-1) / q.double().norm(dim=-1)
    assert (ratio - 1).abs().max() <= (2e-6 if CUDA else 1e-6)
