"""What is made under a mode of torch, or by many threads at once, and used later and elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import truth
from cases import NATIVE, REFERENCE, Target, factors, two_sets
from tolerance import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from longrope_kernels import (
    FactorSet,
    KVCache,
    Rope,
    apply_rotary,
    attention,
    decode,
    rerotate_,
)

AT = torch.arange(100_000, 100_006)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
every_mode = pytest.mark.parametrize("name", MODES)


def own(name: str, kind: int) -> tuple[float, ...]:
    """Factors that no other test has, which would have filled the caches."""
    return factors(8, 1.0 + 1e-3 * (1 + list(MODES).index(name)) + 0.1 * kind)


@every_mode
def test_raw_factors_first_used_under_a_mode(name: str) -> None:
    values = own(name, 1)
    for given in (values, list(values)):
        with MODES[name]():
            apply_rotary(torch.randn(1, 6, 2, 16), None, torch.arange(6), given, 0)
    q = torch.randn(1, 6, 2, 16).requires_grad_()
    out, _ = apply_rotary(q, None, AT, values, 0)
    assert_close(out.detach(), truth.rotary(q.detach(), AT, Rope(FactorSet(values))))
    out.sum().backward()


@every_mode
def test_a_rope_made_and_used_under_a_mode(name: str) -> None:
    values = own(name, 2)
    with MODES[name]():
        rope = Rope(FactorSet(values))
        x = torch.randn(1, 6, 2, 16, dtype=torch.float32)
        apply_rotary(x, x, torch.arange(6), rope)
        attention(x, x, x, torch.arange(6), rope)
    q = torch.randn(1, 6, 2, 16).requires_grad_()
    out, _ = apply_rotary(q, None, AT, rope)
    assert_close(out.detach(), truth.rotary(q.detach(), AT, rope))
    (out.sum() + attention(q, q, q, AT, rope).sum()).backward()


@every_mode
def test_a_decode_first_done_under_a_mode(name: str) -> None:
    values = own(name, 3)
    x, lens = torch.randn(1, 6, 2, 16), torch.tensor([6])
    wanted = decode(x, x, x, lens, Rope(FactorSet(values)), backend="reference")
    with MODES[name]():
        y = torch.zeros(1, 6, 2, 16, dtype=torch.float32)
        decode(y, y, y, torch.full((1,), 6), values, 0)
    torch.testing.assert_close(decode(x, x, x, lens, values, 0), wanted)


@every_mode
def test_keys_first_rerotated_under_a_mode(name: str) -> None:
    old, new = Rope(FactorSet(own(name, 4))), Rope(FactorSet(own(name, 5)))
    with MODES[name]():
        keys = torch.zeros(1, 6, 2, 16, dtype=torch.float32)
        rerotate_(keys, torch.arange(6), old, new)
    k = torch.randn(1, 6, 2, 16).requires_grad_()
    keys, _ = apply_rotary(k, None, AT, old)
    rerotate_(keys, AT, old, new)
    wanted = truth.rotary(k, AT, new).ref64
    torch.testing.assert_close(keys.double(), wanted, rtol=0, atol=2e-6)
    keys.sum().backward()


@pytest.mark.parametrize("check", ["0", "1"])
def test_meta_tensors(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone, in the checking mode too: nothing has values or shares memory."""
    monkeypatch.setenv("LONGROPE_CHECK", check)
    with torch.device("meta"):
        q, k, v = (torch.empty(2, 5, heads, 16) for heads in (4, 2, 2))
        lens, at = torch.full((2,), 5), torch.arange(5)
    rope = two_sets(8)
    apply_rotary(q, k, at, rope, lengths=lens, inplace=True)
    out, lse = attention(q, k, v, at, rope, lengths=lens, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 5)
    cache = KVCache(rope, 2, 8, 2, 16, dtype=torch.float32, device="meta", policy="switch")
    cache.append(k, v)
    decoded = cache.decode(q)
    assert decoded.shape == q.shape
    assert all(x.is_meta for x in (out, lse, decoded))


# Triton's interpreter is of one thread: it patches Triton while a kernel runs.
@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=str)
def test_threads_that_share_a_rope(target: Target) -> None:
    """Eight of them use it first at the same time, in several dtypes; some by raw factors."""
    for turn in range(4):
        rope = two_sets(8, base=10_000.0 + turn)
        barrier = Barrier(8)
        inputs = [
            (torch.randn(2, 6, 2, 16).to(dtype), torch.tensor([5, 5000]))
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32) * 2
        ]

        def work(
            i: int, rope: Rope = rope, barrier: Barrier = barrier, inputs: Any = inputs
        ) -> Any:
            q, lengths = inputs[i]
            barrier.wait()
            if i % 4 == 3:
                one = rope.sets[1]
                raw = (list(one.factors), one.n_hat)
                more = {"base": rope.base, "attention_factor": one.attention_factor}
                return target.rotary(q, None, AT, *raw, **more)[0]
            return target.rotary(q, None, AT, rope, lengths=lengths)[0]

        with ThreadPoolExecutor(8) as pool:
            outs = list(pool.map(work, range(8)))
        for i, (out, (q, lengths)) in enumerate(zip(outs, inputs, strict=True)):
            if i % 4 == 3:
                wanted = truth.rotary(q, AT, Rope(rope.sets[1], rope.base))
            else:
                wanted = truth.rotary(q, AT, rope, lengths=lengths)
            assert_close(out.cpu(), wanted)


def test_many_threads_in_the_native_kernels_at_once() -> None:
    rope, lens = two_sets(8), torch.tensor([40, 64])
    inputs = [torch.randn(2, 64, 2, 16) for _ in range(32)]

    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned, _ = apply_rotary(x, None, torch.arange(64), rope, lengths=lens, backend="native")
        out = decode(x[:, -2:], x, x, lens, rope, backend="native")
        assert isinstance(out, torch.Tensor)
        return turned, out

    wanted = [work(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, alone in zip(pool.map(work, inputs), wanted, strict=True):
                assert all(map(torch.equal, got, alone))
