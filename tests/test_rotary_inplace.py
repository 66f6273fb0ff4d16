"""inplace=True: the same numbers in the caller's memory, and refusals where that would be wrong."""

from __future__ import annotations

import pytest
import torch
import truth
from cases import (
    Shape,
    Target,
    by_id,
    every_cpu_target,
    every_kernel,
    every_target,
    positions_for,
    two_sets,
)
from tolerance import assert_close

from longrope_kernels import Rope

bf16 = torch.bfloat16
SHAPES = [
    Shape(2, 19, 4, 2, 96, dtype=bf16),
    Shape(2, 18, 2, 1, 32, 12, layout="bhsd", interleaved=True),
    Shape(1, 63, 2, 1, 33, 5, layout="thd", dtype=torch.float16),
    Shape(1, 20, 3, 0, 64),
    Shape(0, 4, 2, 1, 16),
]


@pytest.mark.parametrize("shape", by_id(SHAPES))
@every_target
def test_equals_out_of_place_and_returns_the_same_objects(target: Target, shape: Shape) -> None:
    rope, positions = shape.rope(), positions_for(shape.seq, 128)
    q, k = (target.move(x) for x in shape.qk())
    wanted = target.rotary(q, k, positions, rope, layout=shape.layout)
    outs = target.rotary(q, k, positions, rope, layout=shape.layout, inplace=True)
    assert outs[0] is q
    assert outs[1] is k
    for x, out in zip(outs, wanted, strict=True):
        assert x is None or torch.equal(x, out)


@every_target
def test_mixed_sets(target: Target) -> None:
    shape = Shape(2, 7, 2, 1, 32)
    q, k = (target.move(x) for x in shape.qk())
    args = (positions_for(7, 7), two_sets(16))
    lengths = torch.tensor([4096, 4097])
    wanted = target.rotary(q, k, *args, lengths=lengths)
    target.rotary(q, k, *args, lengths=lengths, inplace=True)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])


@pytest.mark.parametrize("kind", ["concatenated", "per-head", "bhsd"])
@every_target
def test_writes_only_q_and_k_of_a_packed_tensor(target: Target, kind: str) -> None:
    """v, and padding between the views, keep every bit."""
    if kind == "per-head":
        packed = target.move(torch.randn(2, 9, 4, 3, 16))
        q, k, rest = packed.unbind(3)
    else:
        packed = target.move(torch.randn(2, 9, 8, 16))
        q, k, rest = packed.split([4, 2, 2], 2)
    layout = "bshd"
    if kind == "bhsd":
        layout, q, k = "bhsd", q.transpose(1, 2), k.transpose(1, 2)
    before = rest.clone()
    rope, positions = Shape(2, 9, 4, 2, 16, 5).rope(), positions_for(9, 128)
    expected = [truth.rotary(x, positions, rope, layout=layout) for x in (q, k)]
    target.rotary(q, k, positions, rope, layout=layout, inplace=True)
    assert_close(q, expected[0], "q")
    assert_close(k, expected[1], "k")
    assert torch.equal(rest, before)


# --------------------------------------------------------------------------------- under autograd


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@every_target
def test_gradient_through_non_leaves(target: Target, layout: str) -> None:
    shape = Shape(1, 18, 2, 1, 32, 12, layout=layout)
    rope, positions = shape.rope(), positions_for(18, 128)
    leaf = [target.move(x).requires_grad_() for x in shape.qk()]
    q, k = (2 * x for x in leaf)
    outs = target.rotary(q, k, positions, rope, layout=layout, inplace=True)
    assert outs[0] is q
    assert outs[1] is k
    for x, y in zip(leaf, (q, k), strict=True):
        assert_close(y, truth.rotary(2 * x, positions, rope, layout=layout))
    grads_out = [torch.randn(x.shape) for x in outs]
    torch.autograd.backward(outs, [target.move(g) for g in grads_out])
    for x, g in zip(leaf, grads_out, strict=True):
        assert_close(x.grad, truth.rotary(2 * g, positions, rope, layout=layout, backward=True))


@pytest.mark.parametrize("kind", ["concatenated", "per-head"])
@every_target
def test_gradient_through_views_of_one_packed_tensor(target: Target, kind: str) -> None:
    """The base of the views must see both writes, and v must keep its own gradient."""
    size = (1, 9, 6, 16) if kind == "concatenated" else (1, 9, 2, 3, 16)
    leaf = target.move(torch.randn(size)).requires_grad_()
    packed = leaf * 1.0

    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        if kind == "concatenated":
            return [x[:, :, :2], x[:, :, 2:4], x[:, :, 4:]]
        return [x[..., 0, :], x[..., 1, :], x[..., 2, :]]

    q, k, _ = parts(packed)
    rope, positions = Shape(1, 9, 2, 2, 16).rope(), positions_for(9, 128)
    target.rotary(q, k, positions, rope, inplace=True)
    grad_out = torch.randn(size)
    packed.backward(target.move(grad_out))
    grads, grads_out = parts(leaf.grad), parts(grad_out)
    for i in range(2):
        assert_close(grads[i], truth.rotary(grads_out[i], positions, rope, backward=True))
    assert torch.equal(grads[2].cpu(), grads_out[2])


@pytest.mark.parametrize("only", ["q", "k"])
@every_target
def test_only_one_requires_grad(target: Target, only: str) -> None:
    shape = Shape(1, 9, 2, 2, 16)
    rope, positions = shape.rope(), positions_for(9, 128)
    q, k = (target.move(x) for x in shape.qk())
    expected = [truth.rotary(x, positions, rope) for x in (q, k)]
    leaf = (q if only == "q" else k).clone().requires_grad_()
    q, k = (leaf * 1, k) if only == "q" else (q, leaf * 1)
    outs = target.rotary(q, k, positions, rope, inplace=True)
    assert outs[0].requires_grad == (only == "q")
    assert outs[1].requires_grad == (only == "k")
    for x, wanted in zip(outs, expected, strict=True):
        assert_close(x, wanted)
    out = outs[0 if only == "q" else 1]
    grad_out = torch.randn(out.shape)
    out.backward(target.move(grad_out))
    assert_close(leaf.grad, truth.rotary(grad_out, positions, rope, backward=True))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad-on-q"])
@every_target
def test_overwriting_what_autograd_saved_raises(target: Target, requires_grad: bool) -> None:
    """The version counter moves, so that a stale saved tensor is an error and no wrong number."""
    shape = Shape(1, 5, 2, 2, 16)
    q, k = (target.move(x) for x in shape.qk())
    weight = torch.ones_like(q, requires_grad=True)
    if requires_grad:
        q = q.requires_grad_() * 1
    loss = (weight * q).sum()  # saves q
    versions = q._version, k._version
    target.rotary(q, k, positions_for(5, 128), shape.rope(), inplace=True)
    assert q._version > versions[0]
    assert k._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_target
def test_leaf_that_requires_grad_is_refused_and_kept(target: Target) -> None:
    shape = Shape(1, 5, 2, 2, 16)
    for name in ("q", "k"):
        q, k = (target.move(x) for x in shape.qk())
        (q if name == "q" else k).requires_grad_()
        before = q.detach().clone(), k.detach().clone()
        with pytest.raises(ValueError, match=rf"inplace.*\b{name}\b.*leaf"):
            target.rotary(q, k, torch.arange(5), shape.rope(), inplace=True)
        assert torch.equal(q, before[0])
        assert torch.equal(k, before[1])


REFUSED = {
    "unbind": lambda x: (x * 1).unbind(2)[0],
    "split": lambda x: (x * 1).flatten(2, 3).split(2, 2)[0],
    "chunk": lambda x: (x * 1).flatten(2, 3).chunk(3, 2)[1],
    "slice-of-unbind": lambda x: (x * 1).unbind(2)[2][:, :, :1],
    "view-of-leaf": lambda x: x[:, :, 0],
    "view-of-a-view-of-leaf": lambda x: x[:, :, 1][:, :, :1],
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["q", "k"])
@every_target
def test_what_autograd_would_refuse_is_refused_and_kept(
    target: Target, name: str, kind: str
) -> None:
    leaf = target.move(torch.randn(1, 5, 3, 2, 16)).requires_grad_()
    views = {"q": target.move(torch.randn(1, 5, 2, 16)).requires_grad_() * 1}
    views = {"k": views["q"] * 1, **views, name: REFUSED[kind](leaf)}
    before = [x.detach().clone() for x in (leaf, *views.values())]
    with pytest.raises(ValueError, match=rf"inplace: {name} is a view .*{name}\.clone\(\)"):
        target.rotary(*(views[n] for n in "qk"), torch.arange(5), Rope.plain(16), inplace=True)
    assert all(map(torch.equal, (leaf, *views.values()), before))
    with torch.no_grad():
        target.rotary(*(views[n] for n in "qk"), torch.arange(5), Rope.plain(16), inplace=True)


@every_kernel
def test_inference_tensor_beside_one_that_requires_grad(target: Target) -> None:
    x = torch.randn(1, 5, 2, 16)
    with torch.inference_mode():
        k = target.move(x * 1)
    q = target.move(x).requires_grad_() * 1
    target.rotary(q, k, torch.arange(5), Rope.plain(16), inplace=True)
    assert torch.equal(q, k)


@every_target
def test_leaf_under_no_grad_is_allowed(target: Target) -> None:
    """As with any in-place operation of torch: initialisation under no_grad is legitimate."""
    shape = Shape(1, 5, 2, 2, 16)
    q, k = (target.move(x) for x in shape.qk())
    expected = truth.rotary(q, torch.arange(5), shape.rope())
    q.requires_grad_()
    with torch.no_grad():
        out, _ = target.rotary(q, k, torch.arange(5), shape.rope(), inplace=True)
    assert out is q
    assert_close(q, expected)


@pytest.mark.parametrize("kind", ["expanded-batch", "expanded-heads", "same", "shifted"])
@every_target
def test_overlapping_memory_is_refused_and_kept(target: Target, kind: str) -> None:
    base = target.move(torch.randn(2, 5, 4, 16))
    q, k = {
        "expanded-batch": (base[:1, :, :2].expand(2, 5, 2, 16), base[:, :, 2:]),
        "expanded-heads": (base[:, :, :2], base[:, :, 2:3].expand(2, 5, 2, 16)),
        "same": (base, base),
        "shifted": (base[:, :, :3], base[:, :, 1:]),
    }[kind]
    before = base.clone()
    with pytest.raises(ValueError, match="inplace"):
        target.rotary(q, k, torch.arange(5), Shape(2, 5, 2, 2, 16).rope(), inplace=True)
    assert torch.equal(base, before)


@every_cpu_target
def test_overlap_of_two_storages_over_one_buffer_is_refused(target: Target) -> None:
    """Two arrays handed over from NumPy (or a DLPack peer) may share memory without a storage."""
    array = torch.randn(3 * 16 * 2).numpy()
    q = torch.from_numpy(array[:64]).view(1, 4, 1, 16)
    k = torch.from_numpy(array[32:]).view(1, 4, 1, 16)
    before = array.copy()
    with pytest.raises(ValueError, match="inplace"):
        target.rotary(q, k, torch.arange(4), Shape(1, 4, 1, 1, 16).rope(), inplace=True)
    assert (array == before).all()


@every_target
def test_inference_mode(target: Target) -> None:
    shape = Shape(1, 5, 2, 2, 16)
    expected = truth.rotary(shape.qk()[0], torch.arange(5), shape.rope())
    torch.manual_seed(0)
    with torch.inference_mode():
        q, k = (target.move(x) for x in shape.qk())
        out, _ = target.rotary(q, k, torch.arange(5), shape.rope())
        assert_close(out, expected)
        target.rotary(q, k, torch.arange(5), shape.rope(), inplace=True)
        assert_close(q, expected)
