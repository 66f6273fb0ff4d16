"""torch.compile(fullgraph=True) of `attention`: no graph break, the output of eager; autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import COMPOSED, ONE_WAY, REFERENCE, Backend, Case, every_backend, every_case
from attention_truth import Call, bf16
from cases import positions_for, two_sets
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from longrope_kernels import Rope, attention

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function: Any, backend: Any = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


CASES = [
    Case(2, 19),
    Case(2, 9, 20, lengths=(5, 5000), layout="bhsd", dtype=bf16),
    Case(2, window=5, kv_start=(0, 4), dtype=bf16),
    Case(2, 9, causal=False, window=3, pairs=9),
    Case(2, 20, 9, layout="bhsd"),
    Case(1, 19, layout="thd"),
    Case(counts=(5, 0, 14), layout="thd"),
    Case(counts=(3, 5), counts_k=(9, 7), kv_start=(2, 0), sets=(1, 0), layout="thd", dtype=bf16),
    Case(2, softcap=2.0, return_lse=True),
]


@every_case(CASES)
def test_forward_and_gradients(backend: Backend, case: Case) -> None:
    """Against the truth, as eager is: a compiled graph may take another kernel for a mask."""
    tensors, arguments = case.tensors(), case.arguments()
    positions, rope = backend.move(arguments.pop("positions")), case.rope().to(backend.device)
    moved = {name: backend.move(x) for name, x in arguments.items()}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return backend.attend(q, k, v, positions, rope, **moved, return_lse=case.return_lse)

    leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
    outs = compiled(call)(*leaves)
    if case.return_lse:
        assert torch.equal(outs[1], call(*leaves)[1])
        outs = outs[0]
    reference = Call(*tensors, positions.cpu(), rope, **arguments)
    assert_close(outs, reference.expected().out)
    grad_out = torch.randn(outs.shape).to(outs.dtype)
    grads = torch.autograd.grad(outs, leaves, backend.move(grad_out))
    for name, grad, wanted in zip("qkv", grads, reference.expected_grads(grad_out), strict=True):
        assert_close(grad, wanted, f"grad of {name}")


@every_backend
def test_dense_equals_eager_bit_for_bit(backend: Backend) -> None:
    case = backend.nearest(Case(2, 19))
    rope, at = case.rope().to(backend.device), backend.move(positions_for(19, 128))
    tensors = [backend.move(x) for x in case.tensors()]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return backend.attend(q, k, v, at, rope)

    assert torch.equal(compiled(call)(*tensors), call(*tensors))


@every_backend
def test_lengths_and_borders_are_data(backend: Backend) -> None:
    """Other sets, other borders, other padding: the same graph."""
    case = backend.nearest(Case(counts=(5, 4, 10), layout="thd"))
    tensors, rope = case.tensors(), two_sets(16).to(backend.device)
    at = positions_for(19, 7)

    def call(*given: torch.Tensor) -> torch.Tensor:
        kwargs = dict(zip(("lengths", "cu_seqlens", "kv_start"), given[4:], strict=True))
        return backend.attend(*given[:4], rope, layout="thd", **kwargs)

    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(call, counter)
    for lengths, borders, starts in (
        ([5, 5000, 5], [0, 5, 9, 19], [0, 0, 0]),
        ([5000, 5, 4097], [0, 0, 19, 19], [1, 2, 3]),
    ):
        data = [torch.tensor(x) for x in (lengths, borders, starts)]
        out = run(*(backend.move(x) for x in (*tensors, at, *data)))
        kwargs = dict(zip(("lengths", "cu_seqlens", "kv_start"), data, strict=True))
        assert_close(out, Call(*tensors, at, rope, layout="thd", **kwargs).expected().out)
    assert counter.frame_count == 1


@every_backend
def test_sequence_lengths_do_not_recompile_each_time(backend: Backend) -> None:
    """One static graph, one dynamic: what torch does for any change of a size."""
    rope = two_sets(16).to(backend.device)

    def call(*given: torch.Tensor) -> torch.Tensor:
        return backend.attend(*given[:4], rope, lengths=given[4], window=4)

    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(call, counter)
    for seq in (5, 6, 9, 17, 33):
        tensors = backend.nearest(Case(2, seq)).tensors()
        at, lengths = torch.arange(seq), torch.tensor([5, 5000])
        out = run(*(backend.move(x) for x in (*tensors, at, lengths)))
        expected = Call(*tensors, at, rope, lengths=lengths, window=4).expected()
        assert_close(out, expected.out)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["composed", None])
def test_every_size_dynamic(backend: str | None) -> None:
    rope = two_sets(8)

    def run(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> Any:
        lengths = torch.full((q.shape[0],), 9)
        return attention(q, k, k, positions, rope, lengths=lengths, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, seq in ((2, 9), (3, 12)):
        q, k = torch.randn(batch, seq, 4, 16), torch.randn(batch, seq, 2, 16)
        positions = torch.arange(seq)
        torch.testing.assert_close(compiled(q, k, positions), run(q, k, positions))


def test_inductor() -> None:
    """The real code generator once, with projections of one tensor before it."""
    case = Case(2, 19, dtype=bf16)
    tensors, rope, at = case.tensors(), two_sets(16), positions_for(19, 7)
    lengths = torch.tensor([5, 5000])

    def call(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.split([4, 2, 2], 2))
        return COMPOSED.attend(q, k, v, at, rope, layout="bhsd", lengths=lengths).transpose(1, 2)

    leaf = torch.cat(tensors, 2).requires_grad_()
    out = compiled(call, "inductor")(leaf)
    reference = Call(*tensors, at, rope, lengths=lengths)
    assert_close(out, reference.expected().out)
    grad_out = torch.randn(out.shape).to(bf16)
    out.backward(grad_out)
    wanted = reference.expected_grads(grad_out)
    for grad, expected in zip(leaf.grad.split([4, 2, 2], 2), wanted, strict=True):
        assert_close(grad, expected)


# Not the reference compiled: its products are torch's own, and AOTAutograd traces their backward
# under the autocast that is around the graph, whatever was set inside.
EAGER_OR_COMPILED = [
    pytest.param(backend, compile_it, id=f"{backend}-{'compiled' if compile_it else 'eager'}")
    for backend in ONE_WAY
    for compile_it in (False, True)
    if not (compile_it and backend is REFERENCE)
]


@pytest.mark.parametrize(("backend", "compile_it"), EAGER_OR_COMPILED)
def test_autocast_casts_as_torch_does_for_its_own(backend: Backend, compile_it: bool) -> None:
    """q, k and v of any dtype are bf16 in there, and so is the output; gradients have their own."""
    case = Case(2, 19, dtype=torch.float32)
    tensors, arguments = case.tensors(), case.arguments()
    at, rope = arguments.pop("positions"), case.rope()
    given = [
        x.to(dtype) for x, dtype in zip(tensors, (torch.float32, bf16, torch.float16), strict=True)
    ]
    reference = Call(*(x.to(bf16) for x in given), at, rope, **arguments)
    call = compiled(backend.attend) if compile_it else backend.attend
    leaves = [backend.move(x.clone()).requires_grad_() for x in given]
    with torch.autocast(backend.device, dtype=bf16):
        out = call(*leaves, at, rope, **arguments)
    assert_close(out, reference.expected().out)
    grad_out = torch.randn(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, backend.move(grad_out))
    for name, grad, wanted in zip("qkv", grads, reference.expected_grads(grad_out), strict=True):
        assert_close(grad.to(bf16), wanted, f"grad of {name}")
    assert [x.dtype for x in grads] == [x.dtype for x in given]


def test_autocast_leaves_float64_and_other_devices_alone() -> None:
    q = torch.randn(1, 5, 2, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=bf16):
        assert attention(q, q, q, torch.arange(5), Rope.plain(16)).dtype == torch.float64
        with pytest.raises(TypeError, match="v: expected the dtype of k"):
            attention(q, q, q.float(), torch.arange(5), Rope.plain(16))
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        attention(q, q.float(), q, torch.arange(5), Rope.plain(16))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "window"])
def test_numbers_that_are_arguments_of_the_graph(name: str, dynamic: bool | None) -> None:
    """Symbolic under dynamic=True, and after the second value: no break, what eager gives."""
    q, k, v = Case(2, 19).tensors()
    rope = Case().rope()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, value: float) -> torch.Tensor:
        return attention(q, k, v, torch.arange(19), rope, **{name: value})

    run = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value in (2, 3, 5) if name == "window" else (0.25, 0.5, 1.75):
        torch.testing.assert_close(run(q, k, v, value), call(q, k, v, value))


def test_errors_survive_compilation() -> None:
    tensors, rope = Case(1, 5).tensors(), Case().rope()

    def call(*given: torch.Tensor) -> torch.Tensor:
        return attention(*given, torch.arange(4), rope)

    with pytest.raises(Exception, match="positions"):
        compiled(call)(*tensors)
