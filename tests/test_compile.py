"""torch.compile(fullgraph=True): no graph break, few recompilations, the same bits as eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    CUDA,
    NATIVE,
    REFERENCE,
    TARGETS,
    Shape,
    Target,
    every_target,
    factors,
    positions_for,
    two_sets,
)
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from longrope_kernels import Rope, apply_rotary, rerotate_

# A graph of the reference is torch's own; that of a kernel is one op, whichever kernel it starts.
GRAPHS = [
    param
    if CUDA or param.values[0] in (REFERENCE, NATIVE)
    else pytest.param(*param.values, id=param.id, marks=(*param.marks, pytest.mark.full))
    for param in TARGETS
]
every_graph = pytest.mark.parametrize("target", GRAPHS)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function: Any, backend: Any = "aot_eager", **kwargs: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def equal(got: Any, wanted: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@every_target
def test_one_set(target: Target, layout: str) -> None:
    shape = Shape(1, 18, 2, 1, 32, 12, layout=layout, dtype=torch.bfloat16)
    rope = shape.rope().to(target.device)
    q, k, positions = (target.move(x) for x in (*shape.qk(), positions_for(18, 128)))

    def call(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> Any:
        return target.rotary(q, k, positions, rope, layout=layout)

    wanted = call(q, k, positions)
    got = compiled(call)(q, k, positions)
    assert equal(got, wanted)
    assert [x.stride() for x in got] == [x.stride() for x in wanted]


@every_graph
def test_several_sets_by_lengths(target: Target) -> None:
    """The lengths are data: another mixture of sets runs the same graph."""
    shape = Shape(2, 5, 2, 1, 32)
    rope = two_sets(16).to(target.device)
    q, k, positions = (target.move(x) for x in (*shape.qk(), positions_for(5, 7)))

    def call(*args: torch.Tensor) -> Any:
        return target.rotary(*args[:3], rope, lengths=args[3])

    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(call, counter)
    for lengths in ([5, 5000], [5000, 5], [4096, 4097]):
        lengths = target.move(torch.tensor(lengths))
        assert equal(run(q, k, positions, lengths), call(q, k, positions, lengths))
    assert counter.frame_count == 1


@every_graph
def test_packed_sequences(target: Target) -> None:
    shape = Shape(1, 9, 2, 1, 32, layout="thd")
    rope = two_sets(16).to(target.device)
    q, k, positions = (target.move(x) for x in (*shape.qk(), positions_for(9, 7)))
    sets = target.move(torch.tensor([1, 0, 1], dtype=torch.int32))
    bounds = target.move(torch.tensor([0, 4, 4, 9], dtype=torch.int32))

    def call(q: torch.Tensor, k: torch.Tensor) -> Any:
        return target.rotary(q, k, positions, rope, layout="thd", sets=sets, cu_seqlens=bounds)

    assert equal(compiled(call)(q, k), call(q, k))


@pytest.mark.parametrize("kind", ["list", "tensor"])
@every_graph
def test_raw_factors(target: Target, kind: str) -> None:
    shape = Shape(1, 18, 2, 1, 32)
    q, k, positions = (target.move(x) for x in (*shape.qk(), positions_for(18, 128)))
    values: Any = list(factors(16))
    if kind == "tensor":
        values = torch.tensor(values, dtype=torch.float64)

    def call(q: torch.Tensor, k: torch.Tensor) -> Any:
        kwargs = {"attention_factor": 1.5, "backend": target.backend}
        return apply_rotary(q, k, positions, values, 128, **kwargs)

    assert equal(compiled(call)(q, k), call(q, k))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@every_graph
def test_in_place(target: Target, layout: str) -> None:
    shape = Shape(1, 18, 2, 1, 32, layout=layout)
    rope = shape.rope().to(target.device)
    q, k, positions = (target.move(x) for x in (*shape.qk(), positions_for(18, 128)))
    wanted = target.rotary(q, k, positions, rope, layout=layout)

    def call(q: torch.Tensor, k: torch.Tensor) -> Any:
        return target.rotary(q, k, positions, rope, layout=layout, inplace=True)

    outs = compiled(call)(q, k)
    assert equal((q, k), wanted)
    assert equal(outs, wanted)


@pytest.mark.parametrize("dynamic", [None, True])
@every_graph
def test_in_place_on_views_of_packed_qkv(target: Target, dynamic: bool | None) -> None:
    rope, other = (Rope.plain(16, base=base).to(target.device) for base in (1e4, 5e5))

    def call(qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.split([4, 2, 2], 2)
        target.rotary(q, k, positions, rope, inplace=True)
        rerotate_(k, positions, rope, other, backend=target.backend)
        return v.sum() + q.sum()

    run = compiled(call, dynamic=dynamic)
    for seq in (5, 7, 8):
        qkv, positions = (target.move(x) for x in (torch.randn(2, seq, 8, 16), torch.arange(seq)))
        eager = qkv.clone()
        wanted = call(eager, positions)
        assert torch.equal(run(qkv, positions), wanted)
        assert torch.equal(qkv, eager)


def test_in_place_on_expanded_memory_is_refused() -> None:
    def call(q: torch.Tensor) -> Any:
        return NATIVE.rotary(q.expand(2, -1, -1, -1), None, positions, rope, inplace=True)

    rope, positions = Rope.plain(16), torch.arange(5)
    for dynamic in (False, True):
        # torch 2.11 quotes the pieces of the message.
        with pytest.raises(Exception, match=r"elements of .*share memory"):
            compiled(call, dynamic=dynamic)(torch.randn(1, 5, 2, 16))


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@every_graph
def test_gradients(target: Target, inplace: bool) -> None:
    shape = Shape(2, 9, 2, 1, 32, 12)
    rope = two_sets(12).to(target.device)
    tensors, positions = shape.qk(), target.move(positions_for(9, 7))
    lengths = target.move(torch.tensor([5, 5000]))

    def call(q: torch.Tensor, k: torch.Tensor) -> Any:
        outs = target.rotary(q * 2, k * 2, positions, rope, lengths=lengths, inplace=inplace)
        return sum((x * x.detach().sin()).sum() for x in outs)

    results = []
    for function in (call, compiled(call)):
        q, k = (target.move(x.clone()).requires_grad_() for x in tensors)
        function(q, k).backward()
        results.append((q.grad, k.grad))
    assert equal(*results)
    assert results[0][0].any()


@every_graph
def test_sequence_lengths_do_not_recompile_each_time(target: Target) -> None:
    """One static graph, one dynamic: what torch does for any change of a size."""
    rope = two_sets(8).to(target.device)

    def call(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, n: torch.Tensor) -> Any:
        return target.rotary(q, k, positions, rope, lengths=n)

    counter = CompileCounter()
    run = compiled(call, counter)
    for seq in (5, 6, 9, 17, 33):
        tensors = (*Shape(2, seq, 2, 1, 16).qk(), torch.arange(seq), torch.tensor([5, 5000]))
        run(*(target.move(x) for x in tensors))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("batches", [(5, 3, 4), (2, 3, 4)], ids=["any", "as-many-as-sets"])
@every_graph
def test_dynamic_shapes_equal_eager(target: Target, batches: tuple[int, int, int]) -> None:
    """One graph for all; a batch of two and a Rope of two sets are no reason for another."""
    # No two sizes of a call are equal: torch would take equal ones for one symbol.
    sizes = [(7, 9, 6, 16), (19, 7, 2, 16), (11, 10, 5, 16)]
    shapes = [Shape(batch, *rest) for batch, rest in zip(batches, sizes, strict=True)]
    rope = two_sets(8).to(target.device)

    def call(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, n: torch.Tensor) -> Any:
        return target.rotary(q, k, positions, rope, lengths=n)

    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(call, counter, dynamic=True)
    graphs = []
    for shape in shapes:
        lengths = torch.tensor([5000, 5, 4096, 4097, 1][: shape.batch])
        tensors = (*shape.qk(), positions_for(shape.seq, 7), lengths)
        args = [target.move(x) for x in tensors]
        assert equal(run(*args), call(*args))
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * len(graphs), "a later shape made another graph"


@every_graph
def test_decode_steps_do_not_recompile(target: Target) -> None:
    """One token a step at the next position, the length a tensor: one graph for all steps."""
    rope = two_sets(8).to(target.device)
    q, k = (target.move(x) for x in Shape(1, 1, 2, 1, 16).qk())

    def call(position: torch.Tensor, length: torch.Tensor) -> Any:
        return target.rotary(q, k, position, rope, lengths=length)

    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(call, counter)
    for n in (4094, 4095, 4096, 4097):
        args = [target.move(torch.tensor([x])) for x in (n, n + 1)]
        assert equal(run(*args), call(*args))
    assert counter.frame_count == 1


@every_graph
def test_equal_ropes_share_a_graph_and_others_do_not(target: Target) -> None:
    """A Rope is a constant of the graph; another value must never run the old constants."""
    shape = Shape(1, 5, 2, 1, 16)
    q, k = (target.move(x) for x in shape.qk())
    positions = target.move(torch.arange(5))

    def call(rope: Rope) -> Any:
        return target.rotary(q, k, positions, rope)

    run = compiled(call)
    for rope in (Rope.plain(16), Rope.plain(8), Rope.plain(16, base=5e5), shape.rope(n_hat=2)):
        assert equal(run(rope.to(target.device)), call(rope))


def test_errors_survive_compilation() -> None:
    q, rope = torch.randn(1, 5, 2, 16), Rope.plain(16)

    def call(q: torch.Tensor) -> Any:
        return NATIVE.rotary(q, None, torch.arange(4), rope)

    with pytest.raises(Exception, match="positions"):
        compiled(call)(q)


def test_inductor() -> None:
    """The real code generator once, with a neighbour on each side that it could fuse."""
    shape = Shape(2, 9, 2, 1, 32, dtype=torch.bfloat16)
    rope, (q, k) = two_sets(16), shape.qk()
    positions, lengths = positions_for(9, 7), torch.tensor([5, 5000])

    def call(q: torch.Tensor, k: torch.Tensor) -> Any:
        outs = NATIVE.rotary(
            q.transpose(1, 2), k.transpose(1, 2), positions, rope, layout="bhsd", lengths=lengths
        )
        return [x.transpose(1, 2) for x in outs]

    assert equal(compiled(call, "inductor")(q, k), call(q, k))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["attention_factor", "base"])
def test_numbers_that_are_arguments_of_the_graph(name: str, dynamic: bool | None) -> None:
    q, at, raw = torch.randn(1, 5, 2, 16), torch.arange(5), factors(8)

    def call(q: torch.Tensor, value: float) -> torch.Tensor:
        return apply_rotary(q, None, at, raw, 0, **{name: value})[0]

    run = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value in (1.5, 2.0, 7.25):
        torch.testing.assert_close(run(q, value), call(q, value))


def test_checkpoints_in_a_graph_of_any_length() -> None:
    """Numbers that a call leaves out are no arguments of the graph: checkpoints read none."""
    rope, at = Rope.plain(16), torch.arange(5)

    def rotate(q: torch.Tensor) -> torch.Tensor:
        return apply_rotary(q, None, at, rope)[0]

    def call(q: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q = checkpoint(rotate, q, use_reentrant=False)
        return q

    q, grad = torch.randn(1, 5, 2, 16, requires_grad=True), torch.randn(1, 5, 2, 16)
    outs = compiled(call, dynamic=True)(q), rotate(rotate(q))
    grads = [torch.autograd.grad(out, q, grad)[0] for out in outs]
    assert torch.equal(*outs)
    assert torch.equal(*grads)
