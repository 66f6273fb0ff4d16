"""Golden angles through the public function: the rotation of a unit vector is (cos, sin).

The bounds are the ones the package promises: 1e-6 for a `Rope` and for factors on the host, at any
position; 2e-6 for factors on a device above position 2**24.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import truth
from cases import CUDA, TARGETS, Target, every_kernel, every_target, factors

from longrope_kernels import FactorSet, Rope, apply_rotary

CASES = json.loads((Path(__file__).parent / "data" / "golden_angles.json").read_text("utf-8"))[
    "cases"
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c["label"].replace(" ", "-"))
PROMISE = 1e-6


def golden_rope(case: dict[str, Any], interleaved: bool = False) -> Rope:
    one = FactorSet(tuple(case["factors"]), case["n_hat"])
    return Rope((one,), base=case["base"], interleaved=interleaved)


def unit_vectors(case: dict[str, Any], interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 1, D) with x_i = 1, and where (x_i', x_j') are: (rows, 2)."""
    pair = torch.tensor([row[1] for row in case["rows"]])
    i = 2 * pair if interleaved else pair
    j = i + 1 if interleaved else i + len(case["factors"])
    q = torch.nn.functional.one_hot(i, case["rotary_dim"]).float()[:, None, :]
    return q, torch.stack((i, j), 1)


def golden_error(
    target: Target, case: dict[str, Any], interleaved: bool, *args: Any, **kw: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest error over the case's rows: (rows,) float64, and their positions."""
    q, at = unit_vectors(case, interleaved)
    positions = torch.tensor([row[0] for row in case["rows"]])
    out, none = target.rotary(q, None, positions, *args, layout="thd", **kw)
    assert none is None
    got = out.cpu()[:, 0].gather(1, at).double()
    wanted = torch.tensor([row[2:] for row in case["rows"]], dtype=torch.float64)
    return (got - wanted).abs().amax(1), positions


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@every_case
@every_target
def test_rope(target: Target, case: dict[str, Any], interleaved: bool) -> None:
    error, _ = golden_error(target, case, interleaved, golden_rope(case, interleaved))
    assert error.max() <= PROMISE


@pytest.mark.parametrize("kind", ["list", "tensor"])
@every_case
@every_target
def test_float64_factors_on_the_host(target: Target, case: dict[str, Any], kind: str) -> None:
    q, at = unit_vectors(case, False)
    values = case["factors"]
    # Not moved to the device: these stay on the host.
    values = torch.tensor(values, dtype=torch.float64) if kind == "tensor" else values
    positions = torch.tensor([row[0] for row in case["rows"]])
    out, _ = apply_rotary(
        target.move(q),
        None,
        target.move(positions),
        values,
        case["n_hat"],
        base=case["base"],
        layout="thd",
        backend=target.backend,
    )
    wanted = torch.tensor([row[2:] for row in case["rows"]], dtype=torch.float64)
    assert (out.cpu()[:, 0].gather(1, at).double() - wanted).abs().max() <= PROMISE


@pytest.mark.gpu
@pytest.mark.parametrize("target", [p for p in TARGETS if CUDA and p.values[0].device == "cuda"])
@every_case
def test_float64_factors_on_the_device(target: Target, case: dict[str, Any]) -> None:
    values = torch.tensor(case["factors"], dtype=torch.float64)
    error, positions = golden_error(target, case, False, values, case["n_hat"], base=case["base"])
    far = positions.abs() > 2**24
    assert error[~far].max() <= PROMISE
    assert error[far].max() <= 2 * PROMISE


@every_target
def test_float32_factors_mean_their_float32_values(target: Target) -> None:
    pairs = 48
    exact = factors(pairs)
    rounded = torch.tensor(exact, dtype=torch.float32)
    q = torch.nn.functional.one_hot(torch.arange(pairs), 2 * pairs).float()[:, None, :]
    positions = torch.full((pairs,), 2**31 - 1)
    out, _ = target.rotary(q, None, positions, rounded, 0, layout="thd")
    got = torch.stack((out.cpu()[:, 0, :pairs].diagonal(), out.cpu()[:, 0, pairs:].diagonal()))

    def expected(values: Sequence[float]) -> torch.Tensor:
        angle = truth.angles(10000.0, values, positions).diagonal()
        return torch.stack((angle.cos(), angle.sin()))

    bound = PROMISE if target.device == "cpu" else 2 * PROMISE
    assert (got.double() - expected(rounded.tolist())).abs().max() <= bound
    # The factors as float64 differ by 6e-8: at 2**31 tokens that is another rotation altogether.
    assert (got.double() - expected(exact)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kernel
def test_angles_are_no_worse_for_low_precision_inputs(target: Target, dtype: torch.dtype) -> None:
    """Unit vectors: cos and sin, below 1, come out rounded to nearest, half of eps / 2 apart."""
    case = CASES[2]
    q, at = unit_vectors(case, False)
    positions = torch.tensor([row[0] for row in case["rows"]])
    out, _ = target.rotary(q.to(dtype), None, positions, golden_rope(case), layout="thd")
    got = out.cpu()[:, 0].gather(1, at).double()
    wanted = torch.tensor([row[2:] for row in case["rows"]], dtype=torch.float64)
    assert (got - wanted).abs().max() <= torch.finfo(dtype).eps / 4 + PROMISE
