"""Attention on a device: nothing waits, graphs replay, prompts are long, gradients repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import PREPASS, REGISTERS, Backend, Case
from attention_truth import Call, assert_lse_close, bf16, fp16
from cases import positions_for, two_sets
from tolerance import assert_close

from longrope_kernels.backends import choose as backends

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
COMPOSED = Backend("composed", DEVICE, (bf16, fp16), of_scores=False)
FLASH = [
    Backend(name, DEVICE, (bf16, fp16), smallest_dim=8)
    for name in backends.FLASH_BACKENDS
    if backends.missing(name) is None
]
OURS = [COMPOSED, PREPASS, REGISTERS]
on_device = pytest.mark.parametrize("backend", [*OURS, *FLASH], ids=str)
fused = pytest.mark.parametrize("backend", [PREPASS, REGISTERS], ids=str)


def normal(*sizes: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.randn(sizes, dtype=dtype, device=DEVICE)


def check_rows(
    backend: Backend,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    begins: tuple[int, ...],
    **features: Any,
) -> None:
    """A whole prompt; 16 of its queries at each of ``begins`` against the truth."""
    q, k, v = (normal(1, tokens, n, dim) for n in (heads[0], heads[1], heads[1]))
    positions, lengths = torch.arange(tokens), torch.tensor([tokens])
    rope = two_sets(dim // 2)
    out = backend.attend(q, k, v, positions, rope, lengths=lengths, **features)
    for begin in begins:
        rows = slice(begin, begin + 16)
        # As a chunk of the prompt: its last query stands at the last key it sees.
        expected = Call(
            q[:, rows],
            k[:, : rows.stop],
            v[:, : rows.stop],
            positions[rows],
            rope,
            key_positions=positions[: rows.stop],
            lengths=lengths,
            **features,
        ).expected()
        assert_close(out[:, rows], expected.out, f"rows from {begin}")


# ------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("layout", ["bshd", "thd"])
@on_device
def test_no_sync(backend: Backend, layout: str) -> None:
    """Forward and backward, packed or not, with the set of each sequence chosen on the device."""
    case = Case(2, 40, counts=(13, 27) if layout == "thd" else (), layout=layout, dtype=bf16)
    leaves = [backend.move(x).requires_grad_() for x in case.tensors()]
    grad_out = torch.randn_like(leaves[0])
    arguments = {name: backend.move(x) for name, x in case.arguments().items()}
    positions, lengths = arguments.pop("positions"), torch.tensor([5, 5000], device=DEVICE)
    rope = two_sets(16).to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = backend.attend(*leaves, positions, rope, lengths=lengths, window=9, **arguments)
        torch.autograd.grad(out, leaves, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@on_device
def test_cuda_graph(backend: Backend, gradient: bool) -> None:
    """Captured once; replayed with other data, and a sequence that has become long."""
    case = Case(2, 40, dim=64, dtype=bf16)
    leaves = [backend.move(x).requires_grad_(gradient) for x in case.tensors()]
    positions = backend.move(positions_for(40, 7))
    lengths = torch.tensor([4096, 4096], device=DEVICE)
    rope = two_sets(32).to(DEVICE)
    grad_out = torch.randn_like(leaves[0])

    def run() -> list[torch.Tensor]:
        out = backend.attend(*leaves, positions, rope, lengths=lengths)
        return [out, *(torch.autograd.grad(out, leaves, grad_out) if gradient else ())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before = run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    graph.replay()
    assert torch.equal(outs[0], before[0])

    with torch.no_grad():
        for x in leaves:
            x.normal_()
    positions += 1
    lengths[1] = 4097
    graph.replay()
    at, of_set = positions.cpu(), lengths.cpu()
    truth = Call(*leaves, at, rope, lengths=of_set)
    assert_close(outs[0], truth.expected().out)
    if gradient:
        expected = truth.expected_grads(grad_out.cpu())
        for name, grad, wanted in zip("qkv", outs[1:], expected, strict=True):
            assert_close(grad, wanted, f"grad of {name}")


@pytest.mark.parametrize("case", [Case(2, 40, dim=96), Case(2, 9, 40, window=5)], ids=str)
@pytest.mark.parametrize("backend", OURS, ids=str)
def test_inductor(backend: Backend, case: Case) -> None:
    """torch.compile with the code generator for CUDA: the truth, forward and backward."""
    case = backend.nearest(case)
    tensors, arguments = case.tensors(), case.arguments()
    positions, rope = arguments.pop("positions"), case.rope().to(DEVICE)
    moved = {name: backend.move(x) for name, x in arguments.items()}
    at = backend.move(positions)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return backend.attend(q, k, v, at, rope, **moved)

    leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True)(*leaves)
    reference = Call(*tensors, positions, rope, **arguments)
    assert_close(out, reference.expected().out)
    grad_out = torch.randn(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, backend.move(grad_out))
    for name, grad, wanted in zip("qkv", grads, reference.expected_grads(grad_out), strict=True):
        assert_close(grad, wanted, f"grad of {name}")


# ------------------------------------------------------------------------------------ long prompts


@pytest.mark.parametrize("tokens", [4096, 4097])
@on_device
def test_a_prompt_takes_the_set_of_its_length(backend: Backend, tokens: int) -> None:
    check_rows(backend, tokens, (4, 2), 96, (0, 2040, tokens - 16))


@pytest.mark.parametrize("dim", [64, 96, 128])
@on_device
def test_128k_tokens(backend: Backend, dim: int) -> None:
    check_rows(backend, 2**17, (2, 1), dim, (0, 65_530, 2**17 - 16))


@pytest.mark.xdist_group("memory")
@pytest.mark.slow
@on_device
def test_2m_tokens(backend: Backend) -> None:
    """One head."""
    check_rows(backend, 2**21, (1, 1), 64, (0, 2**21 - 16))


@pytest.mark.xdist_group("memory")
@fused
def test_offsets_past_31_bits(backend: Backend) -> None:
    """Keys and values of 2**31 elements each; the last head, behind a window, and its log-sum-exp.

    Without the window the truth would take minutes.
    """
    tokens, heads, window = 2**21, 17, 1000
    q = normal(1, 32, heads, 64)
    k, v = normal(1, tokens, heads, 64), normal(1, tokens, heads, 64)
    rope, lengths, at = two_sets(32), torch.tensor([tokens]), torch.arange(tokens)
    features = {"lengths": lengths, "window": window}
    out, lse = backend.attend(
        q, k, v, at[-32:], rope, key_positions=at, return_lse=True, **features
    )
    seen = slice(tokens - window - 32, tokens)
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        expected = Call(
            q[:, :, one],
            k[:, seen, one],
            v[:, seen, one],
            at[-32:],
            rope,
            key_positions=at[seen],
            **features,
        ).expected()
        assert_close(out[:, :, one], expected.out, f"head {head}")
        assert_lse_close(lse[:, one], expected.lse)


@pytest.mark.xdist_group("memory")
@fused
def test_many_rows_of_queries(backend: Backend) -> None:
    """q and out of more than 2**31 elements, few keys: the last rows of the last head."""
    tokens, heads = 2**19, 33
    q, k, v = normal(1, tokens, heads, 128), normal(1, 64, 1, 128), normal(1, 64, 1, 128)
    rope, at = two_sets(64), torch.arange(tokens)
    features = {"lengths": torch.tensor([tokens]), "causal": False}
    out = backend.attend(q, k, v, at, rope, key_positions=at[:64], **features)
    for rows in (slice(0, 16), slice(tokens - 16, tokens)):
        few = q[:, rows, -1:]
        expected = Call(few, k, v, at[rows], rope, key_positions=at[:64], **features).expected()
        assert_close(out[:, rows, -1:], expected.out)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("window", [None, 100], ids=["", "window"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@fused
def test_gradients_are_the_same_twice(backend: Backend, dim: int, window: int | None) -> None:
    """Bitwise: no atomics, on a grid larger than the device."""
    leaves = [normal(2, 1000, n, dim).requires_grad_() for n in (16, 4, 4)]
    rope, positions = two_sets(dim // 2), torch.arange(1000)
    lengths = torch.tensor([1000, 5000])
    grad_out = normal(2, 1000, 16, dim)

    def gradients() -> tuple[torch.Tensor, ...]:
        out = backend.attend(*leaves, positions, rope, lengths=lengths, window=window)
        return torch.autograd.grad(out, leaves, grad_out)

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@on_device
def test_gradients_of_a_prompt_of_some_thousand_tokens(backend: Backend) -> None:
    """Many tiles of queries and keys, ragged at the end."""
    case = Case(1, 2085, heads=4, kv_heads=2, dim=128, dtype=bf16)
    tensors, rope = case.tensors(), two_sets(64)
    positions, lengths = torch.arange(2085), torch.tensor([2085])
    leaves = [backend.move(x).requires_grad_() for x in tensors]
    out = backend.attend(*leaves, positions, rope, lengths=lengths)
    grad_out = torch.randn(out.shape).to(bf16)
    grads = torch.autograd.grad(out, leaves, backend.move(grad_out))
    expected = Call(*tensors, positions, rope, lengths=lengths).expected_grads(grad_out)
    for name, grad, wanted in zip("qkv", grads, expected, strict=True):
        assert_close(grad, wanted, f"grad of {name}")
