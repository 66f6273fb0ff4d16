"""What only the native backend has: instruction sets, 16-bit conversions, tails and threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from longrope_kernels import FactorSet, Rope, apply_rotary
from longrope_kernels.backends import native
from longrope_kernels.calls.records import RotaryCall, Selection

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope,
    instruction_set: str,
    inplace: bool = False,
) -> torch.Tensor:
    """x (B, S, H, D) by one instruction set, as both q and k would be."""
    out = x if inplace else torch.full_like(x, torch.nan)
    no_k = x[:, :, :0]
    call = RotaryCall(x, no_k, positions, rope.tables(x.device), Selection())
    native.rotary(call, out, no_k, instruction_set)
    return out


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Each one that this processor runs; without the extension the file fails to import."""
    return str(request.param)


def test_baseline_is_always_built() -> None:
    assert native.instruction_sets()[-1] == "baseline"


def test_unknown_instruction_set_is_named() -> None:
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="instruction_set: this processor or build has no mmx"):
        rotate(x, torch.zeros(1, 1, dtype=torch.int64), Rope.plain(8), "mmx")


# One pair, a tail alone, whole vectors of every width, and whole vectors with a tail.
@pytest.mark.parametrize("pairs", [1, 7, 8, 16, 23, 40, 64])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree_with_the_formula(
    instruction_set: str, dtype: torch.dtype, interleaved: bool, pairs: int
) -> None:
    rope = Rope((FactorSet((1.5,) * pairs, 3, 1.2),), interleaved=interleaved)
    x = torch.randn(2, 18, 3, 2 * pairs + 5).to(dtype)
    positions = torch.tensor([0, 1, 2, 3, 4, -5, 4097, 131072, 2**31 - 1] * 4).view(2, 18)
    exact, _ = apply_rotary(x.double(), None, positions, rope, backend="reference")
    reference, _ = apply_rotary(x, None, positions, rope, backend="reference")
    own_error = (reference.double() - exact).abs().max()
    for inplace in (False, True):
        out = rotate(x.clone(), positions, rope, instruction_set, inplace)
        error = (out.double() - exact).abs().max()
        assert error <= 2 * own_error + torch.finfo(torch.float32).eps, (inplace, float(error))
        assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("scale", [1.0, 1.001, 0.3, 1e-3, 300.0])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_converted_and_rounded_exactly(
    instruction_set: str, dtype: torch.dtype, interleaved: bool, scale: float
) -> None:
    """At position 0 the rotation is a multiplication by a; every value, subnormal and infinite."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.zeros(1, 1, 1024, 128, dtype=dtype)
    first = slice(0, 128, 2) if interleaved else slice(0, 64)
    x[..., first] = values.view(1, 1, 1024, 64)
    rope = Rope((FactorSet((1.0,) * 64, 0, scale),), interleaved=interleaved)
    out = rotate(x, torch.zeros(1, 1, dtype=torch.int64), rope, instruction_set)
    expected = (values.float() * torch.tensor(scale)).to(dtype)
    got = out[..., first].reshape(-1)
    finite = values.isfinite()
    assert torch.equal(got[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert torch.equal(got[~finite].isnan(), expected[~finite].isnan())


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads through /proc")
def test_threads_follow_torch_and_small_calls_have_one() -> None:
    """A fresh process: threads stay once started, so each call that may have more gets one more."""
    code = """
import os, torch
import longrope_kernels as lk
rope = lk.Rope.plain(128)
CALLS = (
    lambda k, lens: lk.apply_rotary(k, None, torch.arange(lens[0]), rope, backend='native'),
    lambda k, lens: lk.append(k, k, k_cache, v_cache, lens, backend='native'),
    lambda k, lens: lk.decode(k[:, :1], k_cache, v_cache, lens, rope, backend='native'),
)
torch.set_num_threads(1)
k_cache, v_cache = torch.ones(2, 1, 512, 8, 128)
for tokens, threads in ((512, (1, 1, 1)), (1, (2, 2, 2)), (512, (2, 3, 4))):
    for call, count in zip(CALLS, threads):
        torch.set_num_threads(1)
        k, lens = torch.ones(1, tokens, 8, 128), torch.tensor([tokens])
        torch.set_num_threads(count)
        before = len(os.listdir("/proc/self/task"))
        call(k, lens)
        print(len(os.listdir("/proc/self/task")) - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0"] * 6 + ["1"] * 3


def test_a_torch_that_lends_no_tensors_is_named() -> None:
    """By DLPack's C exchange API; nothing else needs the extension."""
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import longrope_kernels as lk
from longrope_kernels.backends import native
print(native.missing())
x = torch.ones(1, 2, 1, 8)
print(lk.apply_rotary(x, None, torch.zeros(2, dtype=torch.int64), lk.Rope.plain(8))[0].sum())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, total = out.stdout.splitlines()
    assert "this torch has no C exchange API of DLPack 1, as torch 2.10 has" in reason
    assert total == "tensor(16.)"
