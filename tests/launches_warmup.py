"""What `warmup` compiled need not be compiled again; test_launches.py runs this, as launches.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launching import COMPILED, TWO, plans, tensors

from longrope_kernels import KVCache, PagedKVCache, apply_rotary, attention, warmup
from longrope_kernels.backends.triton import launch as launches

SIZES = (4, 2, 32)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def cold() -> None:
    """As in a process in which no kernel was compiled."""
    for kernel in {plan.kernel for plan in plans().values()}:
        kernel.device_caches.clear()
    launches._CHOSEN.clear()


CACHES: dict[str, tuple[dict[str, Any], Any]] = {
    "dense": ({}, lambda: KVCache(TWO, 3, 4096, 2, 32, policy="switch")),
    "paged": (
        {"block_size": 16},
        lambda: PagedKVCache(TWO, 3, 9, 16, 2, 32, max_length=4096, policy="switch"),
    ),
    "float8": (
        {"cache_dtype": FLOAT8, "policy": "pin"},
        lambda: KVCache(TWO, 3, 4096, 2, 32, policy="pin", dtype=FLOAT8),
    ),
    "float8, scales": (
        {"cache_dtype": FLOAT8, "policy": "pin"},
        lambda: KVCache(
            TWO, 3, 4096, 2, 32, policy="pin", dtype=FLOAT8,
            k_scale=torch.full((2,), 0.5), v_scale=torch.full((2,), 0.5),
        ),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("name", CACHES)
def test_steps_after_it_compile_nothing(name: str, by_triton: list[str]) -> None:
    named, make = CACHES[name]
    warmup(
        TWO, *SIZES, device="cpu", batch=3, tokens=(1, 4), capacity=4096, backend="triton", **named
    )
    compiled = len(COMPILED)
    assert compiled
    by_triton.clear()
    cache = make()
    for seq in (1, 4, 1):
        cache.extend(seq)
        q, k = tensors(3, seq, 4, 32), tensors(3, seq, 2, 32)
        lengths = torch.tensor([1, 2, 3]) if cache.sets is None else None
        at = torch.arange(3 * seq).view(3, seq)
        chosen = {"lengths": lengths, "sets": cache.sets, "backend": "triton"}
        apply_rotary(q, k, at, TWO, **chosen, inplace=True)
        cache.decode(q, k_new=k, v_new=k, backend="triton")
        cache.decode(q, backend="triton")
    assert len(COMPILED) == compiled
    assert by_triton == []


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("prompt", [8, 100, 512])
def test_prompts_after_it_compile_nothing(prompt: int, by_triton: list[str]) -> None:
    warmup(TWO, *SIZES, device="cpu", batch=2, prompts=prompt, window=64, backend="triton")
    compiled = len(COMPILED)
    by_triton.clear()
    q, k = tensors(2, prompt, 4, 32), tensors(2, prompt, 2, 32)
    for at in (torch.arange(prompt), torch.arange(2 * prompt).view(2, prompt)):
        lengths = torch.tensor([5000, 3])
        apply_rotary(q, k, at, TWO, lengths=lengths, backend="triton")
        attention(q, k, k, at, TWO, lengths=lengths, window=64, backend="triton")
    assert len(COMPILED) == compiled
    assert by_triton == []
