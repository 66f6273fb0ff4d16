"""The suite's own tools: what they promise to catch, they catch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mpmath
import mutations
import pytest
import torch
import truth
from cases import CUDA, Shape, positions_for
from tolerance import assert_close, variance_of_sum
from truth import Expected

from longrope_kernels import Rope

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_angles.json").read_text("utf-8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_empty_memory_is_poisoned(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 5, dtype=dtype)
    made = [
        torch.empty(4, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(7),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
    ]
    for x in made:
        assert x.isnan().all()


@pytest.mark.parametrize("mutation", mutations.ALL, ids=lambda one: one.name.replace(" ", "-"))
def test_the_text_of_each_fault_is_in_its_file_once(mutation: mutations.Mutation) -> None:
    text = (mutations.ROOT / mutations.PACKAGE / mutation.file).read_text("utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old


def test_interpreter_is_on_without_a_gpu() -> None:
    assert CUDA or os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["label"].replace(" ", "-"))
def test_truth_agrees_with_golden_angles(case: dict) -> None:
    rows = case["rows"]
    positions = torch.tensor([row[0] for row in rows])
    pair = torch.tensor([row[1] for row in rows])
    scaled = truth.angles(case["base"], case["factors"], positions)
    original = truth.angles(case["base"], [1.0] * len(case["factors"]), positions)
    below = (positions < case["n_hat"]) & (case["n_hat"] > 0)
    angle = torch.where(below[:, None], original, scaled).gather(1, pair[:, None])[:, 0]
    wanted = torch.tensor([row[2:] for row in rows], dtype=torch.float64)
    assert (torch.stack((angle.cos(), angle.sin()), 1) - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("position", [2**31 - 1, -(2**31), 2**21 + 1, -12345])
def test_truth_agrees_with_mpmath(position: int) -> None:
    factors = [1.1, 0.3, 64.7]
    got = truth.angles(500000.0, factors, torch.tensor(position))
    with mpmath.workdps(50):
        for i, factor in enumerate(factors):
            angle = position * mpmath.mpf(500000) ** (-mpmath.mpf(i) / 3) / mpmath.mpf(factor)
            assert abs(float(mpmath.cos(angle)) - float(got[i].cos())) < 1e-14
            assert abs(float(mpmath.sin(angle)) - float(got[i].sin())) < 1e-14


def _float32_rotation(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """What most implementations compute: float32(position) * float32(frequency)."""
    pairs = rope.pairs
    scale = torch.tensor(rope.sets[0].factors, dtype=torch.float32)
    inv_freq = 1.0 / (scale * rope.base ** (torch.arange(pairs).float() / pairs))
    angle = positions.float()[None, :, None] * inv_freq
    return truth.rotate(x, angle.cos(), angle.sin(), rope.interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerance_catches_float32_angles_at_long_positions(dtype: torch.dtype) -> None:
    shape = Shape(1, 64, 2, 0, 96, dtype=dtype)
    rope, x = shape.rope(n_hat=0, attention_factor=1.0), shape.tensor(2)
    positions = 2**21 + torch.arange(64)
    with pytest.raises(AssertionError, match="worst element at"):
        assert_close(_float32_rotation(x, positions, rope), truth.rotary(x, positions, rope))


def test_tolerance_catches_one_wrong_element_and_says_where() -> None:
    shape = Shape(2, 5, 2, 0, 8)
    rope, x = shape.rope(), shape.tensor(2)
    expected = truth.rotary(x, positions_for(5, 128), rope)
    out = expected.low.clone()
    assert_close(out, expected)
    out[1, 3, 0, 6] = torch.nan
    with pytest.raises(AssertionError, match=r"worst element at \(1, 3, 0, 6\).*1 of 160"):
        assert_close(out, expected)


def test_tolerance_catches_noise_below_the_maximum() -> None:
    """Errors near the maximum everywhere: the root mean square is what is too large."""
    x = torch.randn(100_000)
    ref64 = x.double()
    low = ref64.clone()
    low[0] += 1e-3
    out = (ref64 + 1e-3).float()
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close(out, Expected(ref64, low.float()))


@pytest.mark.parametrize("n", [2, 33, 4097])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_order_of_a_sum_adds_what_the_rule_says(n: int, mean: float) -> None:
    """One by one, in float32, in 400 random orders: at most that much, and at least a third."""
    terms = torch.randn(400, n) + mean
    exact = terms.double().sum(1)
    out = terms[:, 0]
    for k in range(1, n):
        out = out + terms[:, k]
    error = (out.double() - exact).square().mean().sqrt()
    squares = terms.double().square().sum(1)
    predicted = variance_of_sum(n, exact, squares, torch.float32).mean().sqrt()
    assert predicted / 3 <= error <= predicted
