"""Transforms of torch.func over the ops: as over the reference, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from longrope_kernels import Rope, append, apply_rotary, attention, decode, rerotate_

ROPE = Rope.longrope([1.0] * 6, [1.0 + i for i in range(6)], 4, 8, n_hat=2)
POSITIONS, LENGTHS = torch.arange(5), torch.tensor([5])
Op = Callable[..., Any]


def of_three(op: Op, **rest: Any) -> Op:
    """The op as a function of q (5, 2, 16), k and v (5, 1, 16) of one sequence."""
    given = {"positions": POSITIONS, "factors": ROPE, "lengths": LENGTHS, **rest}
    if op is attention:
        return lambda q, k, v: attention(q[None], k[None], v[None], **given)
    if rest.get("inplace"):
        return lambda q, k, _: apply_rotary(q[None] * 1, k[None] * 1, **given)
    return lambda q, k, _: apply_rotary(q[None], k[None], **given)


def cubes(f: Op) -> Op:
    return lambda *x: sum((y**3).sum() for y in tree_leaves(f(*x)))


def batch(seed: int = 1) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, heads, 16, generator=made) for heads in (2, 1, 1)]


def first(seed: int = 1) -> tuple[torch.Tensor, ...]:
    return tuple(x[0] for x in batch(seed))


def squares_of(f: Op) -> Op:
    return lambda *x: sum((g * g).sum() for g in grad(f, (0, 1))(*x))


def recorded_outside(f: Op) -> Any:
    leaves = [x.requires_grad_() for x in batch()]
    return torch.autograd.grad(vmap(cubes(f))(*leaves).sum(), leaves[:2])


TRANSFORMS: dict[str, Callable[[Op], Any]] = {
    "grad": lambda f: grad(cubes(f), (0, 1))(*first()),
    "grad of k": lambda f: grad(cubes(f), 1)(*first()),
    "vjp": lambda f: vjp(cubes(f), *first())[1](torch.tensor(2.0))[:2],
    "jacrev": lambda f: jacrev(f, (0, 1))(*first()),
    "jacfwd": lambda f: jacfwd(f, (0, 1))(*first()),
    "jvp": lambda f: jvp(f, first(), first(2)),
    "linearize": lambda f: linearize(f, *first())[1](*first(2)),
    "vmap": lambda f: vmap(f)(*batch()),
    "vmap of vmap": lambda f: vmap(vmap(f))(*(torch.stack((x, x + 1)) for x in batch())),
    "vmap of grad": lambda f: vmap(grad(cubes(f), (0, 1)))(*batch()),
    "grad of vmap": lambda f: grad(lambda *x: vmap(cubes(f))(*x).sum(), (0, 1))(*batch()),
    "jvp of vmap": lambda f: jvp(vmap(f), tuple(batch()), tuple(batch(2))),
    "vmap of jvp": lambda f: vmap(lambda *x: jvp(f, x[:3], x[3:]))(*batch(), *batch(2)),
    "jvp of grad": lambda f: jvp(grad(cubes(f), (0, 1)), first(), first(2)),
    "grad of jvp": lambda f: grad(lambda *x: jvp(cubes(f), x, first(2))[1], (0, 1))(*first()),
    "grad of grad": lambda f: grad(squares_of(cubes(f)), (0, 1))(*first()),
    "hessian": lambda f: hessian(cubes(f))(*first()),
    "vmap in autograd": recorded_outside,
    "functionalize": lambda f: functionalize(f)(*first()),
    "make_fx of grad": lambda f: make_fx(grad(cubes(f)))(*first())(*first(2)),
}
SERVED = {
    "rotary": (apply_rotary, {"backend": "native"}),
    "rotary in place": (apply_rotary, {"backend": "native", "inplace": True}),
    "attention": (attention, {}),
    "attention with softcap": (attention, {"softcap": 2.0}),
}


IN_PLACE = ("grad", "jvp", "vmap", "grad of vmap", "vmap in autograd", "functionalize")


@pytest.mark.parametrize(
    ("name", "transform"),
    [(name, t) for name in SERVED for t in (IN_PLACE if "place" in name else TRANSFORMS)],
)
def test_transforms_are_those_of_the_reference(name: str, transform: str) -> None:
    op, rest = SERVED[name]
    right = {**rest, "backend": "reference"}
    right.pop("inplace", None)
    expected = TRANSFORMS[transform](of_three(op, **right))
    found = TRANSFORMS[transform](of_three(op, **rest))
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6 * float(y.abs().max()))


def test_the_reference_is_what_finite_differences_say() -> None:
    """In float64, of gradients by torch.func and of theirs."""
    inputs = [x.double().requires_grad_() for x in first()]
    for op in (apply_rotary, attention):
        f = cubes(of_three(op, backend="reference"))
        assert torch.autograd.gradcheck(grad(f, (0, 1)), inputs)


@pytest.fixture
def no_level_left() -> Iterator[None]:
    """torch.compile leaves forward mode entered where it fails within."""
    yield
    if forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()
    eager_transforms.JVP_NESTING = 0


COMPILED: dict[str, Callable[[Op], Op]] = {
    "jvp": lambda f: lambda *x: jvp(f, x[:3], x[3:]),
    "grad": lambda f: lambda *x: grad(cubes(f), (0, 1))(*x[:3]),
    "grad of grad": lambda f: lambda *x: grad(squares_of(cubes(f)), (0, 1))(*x[:3]),
    "hessian": lambda f: lambda *x: hessian(cubes(f))(*x[:3]),
}


@pytest.mark.parametrize("transform", COMPILED.values(), ids=COMPILED)
@pytest.mark.usefixtures("no_level_left")
def test_a_rotation_transformed_in_a_graph(transform: Callable[[Op], Op]) -> None:
    torch.compiler.reset()
    expected = transform(of_three(apply_rotary, backend="reference"))(*first(), *first(2))
    compiled = torch.compile(
        transform(of_three(apply_rotary, backend="native")), backend="aot_eager", fullgraph=True
    )
    found = compiled(*first(), *first(2))
    for x, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, right, rtol=2e-5, atol=2e-6 * float(right.abs().max()))


def in_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = decode(q[None], k[None], v[None], LENGTHS, ROPE, backend="native")
    return found


REFUSED: dict[str, tuple[Op, Callable[[Op], Any]]] = {
    "attention, forward": (of_three(attention, backend="native"), TRANSFORMS["jvp"]),
    "attention, forward of vmap": (
        of_three(attention, backend="native"),
        TRANSFORMS["jvp of vmap"],
    ),
    "attention, backward": (of_three(attention, backend="native"), TRANSFORMS["grad"]),
    "attention, backward of vmap": (
        of_three(attention, backend="native"),
        TRANSFORMS["grad of vmap"],
    ),
    "attention, in autograd": (of_three(attention, backend="native"), recorded_outside),
    "decode, forward": (in_cache, TRANSFORMS["jvp of vmap"]),
    "decode, backward": (in_cache, TRANSFORMS["grad of vmap"]),
    "decode, in autograd": (in_cache, recorded_outside),
}


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in REFUSED),
        ("attention, forward", True),
        ("decode, backward", True),
    ],
)
@pytest.mark.usefixtures("no_level_left")
def test_what_has_no_derivative_is_refused(name: str, compiled: bool) -> None:
    """Never zeros in its place."""
    f, transform = REFUSED[name]
    torch.compiler.reset()
    if compiled:
        f = torch.compile(f, backend="aot_eager")
    wanted = "has no (gradient|forward-mode)|makes no gradients"
    with pytest.raises(Exception, match=wanted):
        transform(f)


@pytest.mark.parametrize("by", ["torch.func", "autograd"])
def test_a_second_derivative_of_fused_attention_is_refused(by: str) -> None:
    """Autograd was handed constants for the first one: the penalty below had no gradient."""
    q, k, v = (x.half() for x in first())
    attend = of_three(attention, backend="triton")
    if by == "torch.func":
        of_q = grad(lambda q, v: attend(q, k, v).float().sum())
        with pytest.raises(NotImplementedError, match=r"^backend: .*triton.* no second derivative"):
            grad(lambda v: of_q(q, v).float().square().sum())(v)
        return
    q.requires_grad_()
    (of_q,) = torch.autograd.grad(attend(q, k, v).float().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^backend: .* no second derivative"):
        of_q.float().square().sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "grad of vmap", "jacrev"])
def test_fused_attention(transform: str) -> None:
    def found(backend: str) -> Any:
        attend = of_three(attention, backend=backend)
        return TRANSFORMS[transform](lambda *x: attend(*(y.half() for y in x)).float())

    for x, y in zip(tree_leaves(found("triton")), tree_leaves(found("reference")), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=5e-3 * float(y.abs().max()))


AROUND = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "grad": lambda f, x: grad(lambda y: f(y).sum())(x),
    "functionalize": lambda f, x: functionalize(f)(x),
    "vmap": lambda f, x: vmap(lambda y: f(y[None]))(x),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_tables_first_made_within_serve_later_calls(around: Callable[..., Any]) -> None:
    """They were wrapped, and every later call with those factors failed, or read no memory."""
    q = torch.randn(2, 5, 2, 16)
    factors = [1.0 + float(torch.rand(())) for _ in range(8)]
    rotate = lambda x: apply_rotary(x, None, POSITIONS, factors, 2, backend="native")[0]  # noqa: E731
    around(rotate, q)
    right = apply_rotary(q, None, POSITIONS, factors, 2, backend="reference")[0]
    torch.testing.assert_close(rotate(q), right)


def test_turns_first_made_within_serve_later_calls() -> None:
    old = Rope.plain(16, base=float(1000 + torch.rand(())))
    turn = lambda x: rerotate_(x * 1, POSITIONS, old, Rope.plain(16))  # noqa: E731
    keys = torch.randn(2, 5, 2, 16)
    within = jvp(turn, (keys,), (keys,))
    for x in within:
        torch.testing.assert_close(x, turn(keys))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_vmap_of_positions_lengths_sets_and_factors(backend: str) -> None:
    q = torch.randn(3, 5, 2, 16)
    positions = torch.arange(5) + torch.tensor([[0], [1], [2]])
    lengths, sets = torch.tensor([3, 5, 9]), torch.tensor([0, 1, 0], dtype=torch.int32)
    factors = torch.rand(3, 8) + 1

    def rotate(x: torch.Tensor, n: torch.Tensor, by: Any, **chosen: Any) -> Any:
        n_hat = None if isinstance(by, Rope) else 0
        return apply_rotary(x[None], None, n, by, n_hat, **chosen, backend=backend)[0]

    calls: list[tuple[Op, tuple[torch.Tensor, ...]]] = [
        (lambda x, n, i: rotate(x, n, ROPE, lengths=i[None]), (q, positions, lengths)),
        (lambda x, i: rotate(x, POSITIONS, ROPE, lengths=i[None]), (q, lengths)),
        (lambda x, i: rotate(x, POSITIONS, ROPE, sets=i[None]), (q, sets)),
        (lambda x, by: rotate(x, POSITIONS, by), (q, factors)),
    ]
    for call, given in calls:
        expected = torch.stack([call(*(x[i] for x in given)) for i in range(3)])
        torch.testing.assert_close(vmap(call)(*given), expected, rtol=0, atol=0)


def test_in_place_within_sees_what_lies_over_one_another() -> None:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        packed = (x * 1)[None]
        apply_rotary(packed, packed, POSITIONS, ROPE, lengths=LENGTHS, inplace=True)
        return packed.sum()

    for around in (grad(rotate), functionalize(rotate)):
        with pytest.raises(ValueError, match="q and k overlap"):
            around(first()[0])


def test_append_within_is_refused_or_written() -> None:
    k, v, lens = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16), torch.tensor([1])
    caches = torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match="append has no gradient"):
        grad(lambda x: append(x, v, *caches, lens) or x.sum())(k)
    assert not caches[0].any()
