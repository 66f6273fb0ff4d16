"""dq, dk and dv of `attention`, by the truth's autograd and by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import (
    REFERENCE,
    Backend,
    Case,
    backends_of_scores,
    check_grads,
    every_backend,
    every_case,
)
from attention_truth import Call, bf16, fp16, fp64
from cases import CUDA, positions_for, two_sets
from tolerance import assert_close
from torch.utils.checkpoint import checkpoint

from longrope_kernels import Rope

DENSE = [
    Case(2, 40, 0, 4, 2, 96, dtype=bf16),
    Case(2, 33, 0, 3, 1, 64, layout="bhsd"),
    Case(1, 70, 0, 2, 2, 128, layout="thd", dtype=fp16),
    Case(2, 18, 0, 6, 2, 80, 16, dtype=bf16, layout="bhsd", interleaved=True),
    Case(1, 65, 0, 4, 1, 64, 12, causal=False),
    Case(1, 20, 0, 2, 2, 33, 7, causal=False, dtype=fp16),
    Case(2, 7, 40, dim=64, dtype=bf16),
    Case(1, 31, 63, kv_heads=1, causal=False, layout="bhsd"),
    Case(2, 20, 9, layout="bhsd"),
    Case(2, 20, 9, causal=False, window=4, dtype=bf16),
    Case(1, 1, dtype=fp16),
    Case(1, 1, 30, dim=80),
    Case(n_hat=0, attention_factor=0.8, pairs=3, interleaved=True),
]
MASKED = [
    Case(window=1),
    Case(1, 70, window=17, dim=64, dtype=bf16),
    Case(window=6, causal=False, layout="bhsd", dtype=fp16),
    Case(2, 9, 40, window=12),
    Case(3, kv_start=(0, 5, 19), dtype=bf16),
    Case(3, kv_start=(18, 100, 4), causal=False, layout="bhsd"),
    Case(2, 9, 40, kv_start=(35, 3), window=12, dtype=fp16),
]
SETS = [
    Case(2, lengths=(4096, 4097), dim=64, dtype=bf16),
    Case(2, 9, 30, sets=(1, 0), pairs=9, layout="bhsd"),
    Case(counts=(5, 0, 13, 1), layout="thd"),
    Case(counts=(40, 9), window=5, dim=96, layout="thd", dtype=bf16),
    Case(counts=(3, 0, 5, 2), counts_k=(9, 4, 0, 2), layout="thd", dtype=fp16),
    Case(counts=(9, 1), counts_k=(2, 30), causal=False, layout="thd", sets=(0, 1)),
    Case(counts=(9, 6), kv_start=(4, 1), lengths=(5, 5000), layout="thd", dtype=bf16),
]
SCORES = [
    Case(scale=0.5, dtype=bf16),
    Case(softcap=0.7),
    Case(2, 20, 9, softcap=5.0, scale=2.0, dtype=bf16, layout="bhsd"),
    Case(return_lse=True),
    Case(return_lse=True, softcap=1.5, kv_start=(3, 19), causal=False, dtype=fp16),
    Case(counts=(9, 0, 4), counts_k=(3, 2, 9), layout="thd", return_lse=True, dtype=bf16),
    Case(2, 9, 20, window=4, lengths=(5, 5000), softcap=2.0, return_lse=True),
]


@every_case(DENSE)
def test_dense(backend: Backend, case: Case) -> None:
    check_grads(backend, case)


@every_case([*MASKED, *SETS])
def test_masks_and_sets(backend: Backend, case: Case) -> None:
    check_grads(backend, case)


@every_case(SCORES)
def test_scores_and_log_sum_exp(backend: Backend, case: Case) -> None:
    check_grads(backend, case)


EMPTY = [
    Case(1, 20, 9),
    Case(2, kv_start=(19, 25)),
    Case(1, kv_start=(40,), causal=False, layout="bhsd"),
    Case(counts=(9, 4), counts_k=(0, 2), layout="thd"),
    Case(1, 20, 9, return_lse=True),
]


@every_case(EMPTY)
def test_queries_without_keys_give_zero_gradients(backend: Backend, case: Case) -> None:
    """Exactly zero for the query, and no NaN into the keys, whatever gradient comes in."""
    arguments = case.arguments()
    positions = arguments.pop("positions")
    leaves = [backend.move(x).requires_grad_() for x in case.tensors()]
    outs = backend.attend(*leaves, positions, case.rope(), **arguments, return_lse=case.return_lse)
    dead = ~(outs[0] if case.return_lse else outs).detach().any(-1)
    assert dead.any()
    grads_out = [torch.full_like(x, 1e4) for x in (outs if case.return_lse else (outs,))]
    dq, dk, dv = torch.autograd.grad(outs, leaves, grads_out)
    assert not dq[dead].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    if dead.all():
        assert not dk.any()
        assert not dv.any()


@every_backend
def test_hidden_keys_get_exactly_nothing(backend: Backend) -> None:
    case = backend.nearest(Case(2, 12, 20, kv_start=(5, 0), window=6))
    _, dk, dv = check_grads(backend, case)
    for grad in (dk, dv):
        assert not grad[0, :5].any()
        assert not grad[1, :3].any()  # the first query has slot 8 and sees 3 to 8
        assert grad[0, 5:].any(-1).all()


@pytest.mark.parametrize("start", [2**31 - 1, 2**33 + 2])
@every_backend
def test_keys_that_start_past_all_slots_get_nothing(backend: Backend, start: int) -> None:
    q = torch.randn(1, 4, 2, 16).to(backend.dtypes[0]).to(backend.device).requires_grad_()
    kv_start = torch.tensor([start], dtype=torch.int32 if start < 2**31 else torch.int64)
    out = backend.attend(q, q, q, torch.arange(4), Rope.plain(16), kv_start=kv_start)
    out.backward(torch.randn_like(out))
    assert q.grad is not None
    assert not q.grad.any()


@every_case(
    [
        Case(0, 5),
        Case(2, 0, layout="bhsd", dtype=bf16),
        Case(counts=(0, 0), counts_k=(3, 2), layout="thd"),
        Case(2, 0, return_lse=True),
    ]
)
def test_gradients_of_nothing(backend: Backend, case: Case) -> None:
    for grad in check_grads(backend, case):
        assert not grad.any()


@pytest.mark.parametrize("only", ["q", "k", "v"])
@every_backend
def test_only_one_requires_grad(backend: Backend, only: str) -> None:
    case = backend.nearest(Case(2, 19))
    tensors, at = case.tensors(), positions_for(19, 128)
    leaves = {name: backend.move(x.clone()) for name, x in zip("qkv", tensors, strict=True)}
    leaves[only].requires_grad_()
    out = backend.attend(*leaves.values(), at, case.rope())
    grad_out = torch.randn(out.shape).to(out.dtype)
    out.backward(backend.move(grad_out))
    expected = Call(*tensors, at, case.rope()).expected_grads(grad_out)["qkv".index(only)]
    assert_close(leaves[only].grad, expected)
    assert all(x.grad is None for name, x in leaves.items() if name != only)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@every_backend
def test_strided_incoming_gradients(backend: Backend, layout: str) -> None:
    """Strides of 0 from sum(), and a last stride that is not 1."""
    case = backend.nearest(Case(2, 9, layout=layout))
    tensors, at = case.tensors(), positions_for(9, 128)
    leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
    out = backend.attend(*leaves, at, case.rope(), layout=layout)
    turned = torch.randn(out.shape[::-1]).to(out.dtype).permute(*reversed(range(out.dim())))
    one = torch.ones((), dtype=out.dtype).expand(out.shape)
    for grad_out in (one, torch.randn(out.shape[-1:]).to(out.dtype).expand(out.shape), turned):
        grads = torch.autograd.grad(out, leaves, backend.move(grad_out), retain_graph=True)
        wanted = Call(*tensors, at, case.rope(), layout=layout).expected_grads(grad_out)
        for name, grad, expected in zip("qkv", grads, wanted, strict=True):
            assert_close(grad, expected, f"grad of {name}")


@every_backend
def test_gradient_reaches_packed_qkv(backend: Backend) -> None:
    """q, k and v are slices of one projection, as in the Phi-3 family."""
    qkv = torch.randn(2, 19, 8, 32).to(backend.dtypes[0])
    leaf, at = backend.move(qkv.clone()).requires_grad_(), positions_for(19, 128)
    rope = Case().rope()
    out = backend.attend(*leaf.split([4, 2, 2], 2), at, rope)
    grad_out = torch.randn(out.shape).to(out.dtype)
    out.backward(backend.move(grad_out))
    wanted = Call(*qkv.split([4, 2, 2], 2), at, rope).expected_grads(grad_out)
    for grad, expected in zip(leaf.grad.split([4, 2, 2], 2), wanted, strict=True):
        assert_close(grad, expected)


@every_backend
def test_gradients_of_windows_that_slide_over_memory(backend: Backend) -> None:
    x = backend.move(torch.randn(3, 1, 40).to(backend.dtypes[0])).unfold(-1, 32, 1)[..., None, :]
    found = []
    for qkv in (x, x.contiguous()):
        leaves = [y.detach().requires_grad_() for y in qkv]
        out = backend.attend(*leaves, torch.arange(9), Case().rope())
        found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    torch.testing.assert_close(*found)


@every_backend
def test_one_tensor_as_k_and_v(backend: Backend) -> None:
    """Its gradient is the sum of both roles."""
    case = backend.nearest(Case(1, 19))
    (q, k, _), at = case.tensors(), positions_for(19, 128)
    leaf = backend.move(k.clone()).requires_grad_()
    out = backend.attend(q, leaf, leaf, at, case.rope())
    grad_out = torch.randn(out.shape).to(out.dtype)
    out.backward(backend.move(grad_out))
    _, dk, dv = Call(q, k, k, at, case.rope()).expected_grads(grad_out)
    pairs = zip(dk, dv, strict=True)
    both = type(dk)(*((a.double() + b.double()).to(a.dtype) for a, b in pairs))
    assert_close(leaf.grad, both)


@every_backend
def test_no_graph_without_need(backend: Backend) -> None:
    case = backend.nearest(Case(1, 5))
    tensors, at = case.tensors(), torch.arange(5)
    assert not backend.attend(*tensors, at, case.rope()).requires_grad
    leaves = [backend.move(x).requires_grad_() for x in tensors]
    assert backend.attend(*leaves, at, case.rope()).requires_grad
    with torch.no_grad():
        assert not backend.attend(*leaves, at, case.rope()).requires_grad


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@every_backend
def test_gradients_are_deterministic(backend: Backend, packed: bool) -> None:
    counts = (30, 0, 33) if packed else ()
    layout = "thd" if packed else "bshd"
    case = Case(1, 63, heads=2, kv_heads=1, counts=counts, layout=layout)
    case = backend.nearest(case)
    at, rope, arguments = case.arguments().pop("positions"), case.rope(), case.arguments()
    del arguments["positions"]
    leaves = [backend.move(x).requires_grad_() for x in case.tensors()]
    results = []
    for _ in range(3 if CUDA else 2):
        out = backend.attend(*leaves, at, rope, **arguments)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every_backend
def test_activation_checkpointing(backend: Backend, reentrant: bool) -> None:
    """The forward runs twice; output and gradients are the same bits."""
    case = backend.nearest(Case(2, 19, kv_start=(0, 4), window=7))
    tensors, at, rope = case.tensors(), positions_for(19, 7), two_sets(16)
    lengths, starts = torch.tensor([5, 5000]), torch.tensor(case.kv_start)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return backend.attend(q, k, v, at, rope, lengths=lengths, kv_start=starts, window=7)

    results = []
    for wrap in (False, True):
        leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
        out = checkpoint(attend, *leaves, use_reentrant=reentrant) if wrap else attend(*leaves)
        out.square().sum().backward()
        results.append((out, *(x.grad for x in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(x.any() for x in results[0])


GRADCHECK = [
    Case(1, 3, 4, 2, 1, 6, 2, interleaved=True, n_hat=5),
    Case(2, 4, 2, 2, 2, 4, softcap=0.9, layout="bhsd", return_lse=True),
    Case(1, 4, 0, 2, 1, 4, window=2, causal=False, kv_start=(3,), scale=0.7),
    Case(counts=(3, 0, 2), counts_k=(1, 1, 3), heads=2, kv_heads=1, dim=4, layout="thd",
         sets=(0, 1, 1), return_lse=True),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_finite_differences_in_the_reference(case: Case) -> None:
    """Once and twice differentiable; of lse where a key is seen."""
    case = Case(**{**vars(case), "dtype": fp64})
    tensors, arguments = case.tensors(), case.arguments()
    arguments.pop("positions")
    arguments.pop("key_positions", None)
    queries, keys = case.tokens()
    args = (torch.arange(3, 3 + queries), case.rope())
    arguments["key_positions"] = torch.arange(4, 4 + keys)

    def attend(*leaves: torch.Tensor) -> Any:
        outs = REFERENCE.attend(*leaves, *args, **arguments, return_lse=case.return_lse)
        if not case.return_lse:
            return outs
        return outs[0], outs[1].masked_fill(outs[1] == -torch.inf, 0.0)

    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


@backends_of_scores
def test_only_the_log_sum_exp_is_used(backend: Backend) -> None:
    """v gets no gradient or zeros, never what lay in memory."""
    case = backend.nearest(Case(2, 9, 14))
    tensors, arguments = case.tensors(), case.arguments()
    args = (arguments.pop("positions"), case.rope())
    leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
    out, lse = backend.attend(*leaves, *args, **arguments, return_lse=True)
    grad_lse = torch.randn(lse.shape)
    lse.backward(backend.move(grad_lse))
    expected = Call(*tensors, *args, **arguments).expected_grads(torch.zeros(out.shape), grad_lse)
    for name, leaf, wanted in zip("qk", leaves, expected, strict=False):
        assert_close(leaf.grad, wanted, f"grad of {name}")
    assert leaves[2].grad is None or not leaves[2].grad.any()
