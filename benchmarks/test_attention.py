"""Attention of a whole prompt, rotation included, against its peers: forward and backward.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the prompts are
short, and it is a check that everything runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import speeds
import torch
from attentions import (
    EAGER,
    NAMES,
    PEERS,
    Inputs,
    Shape,
    Truth,
    angles,
    implementation,
    make_copies,
    missing,
    serves,
)
from clock import CLOCK
from copies import Prepared
from measure import Timed, matmul, measure, require_memory
from parameters import PROMPTS
from profiles import longest_kernel
from ropes import DTYPE, allowed_error, assert_right
from table import Row, Table, median_of

SHAPES = [(rank, Shape.of(*call)) for rank, call in PROMPTS]
SMALL = 64
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "attention of q (1, S, 32, d), k and v (1, S, 8, d), or of the model named, medians",
    "TFLOP/s",
    1e12,
    "of matmul",
    "x eager",
    "of matmul: median ratio to a large matrix product timed before each round",
)
ROWS: list[Row] = []  # for the table at the end

LEFT_TO_TORCH = (EAGER, "composed")  # which kernel of its SDPA runs

SECONDS_A_ROW = 0.3


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.parametrize(
    ("shape", "direction", "name"),
    [
        pytest.param(
            *(shape, direction, name),
            id=f"{direction}-{shape}-{name}",
            marks=pytest.mark.less_important(rank),
        )
        for rank, shape in SHAPES
        for direction in ("forward", "backward")
        for name in NAMES
        if name not in NOT_TIMED and serves(name, shape, direction)
    ],
)
def test_attention(
    benchmark: Any, request: pytest.FixtureRequest, shape: Shape, direction: str, name: str
) -> None:
    small = not request.config.getoption("benchmark_only")
    if small:
        shape = shape._replace(tokens=SMALL, queries=min(shape.queries, SMALL // 2))
    benchmark.group = f"attention {direction}, {shape}"
    flops, traffic = shape.flops(direction), shape.traffic(direction)

    def prepare(name: str) -> Timed:
        require_memory(4 * traffic)  # copies and rotated copies of the inputs and the results
        copies = make_copies(shape)
        timed = copies.in_turn(lambda inputs: _prepared(direction, name, inputs))
        return Timed(*timed, matmul(), flops)

    found = measure(benchmark, request, prepare, PEERS, SECONDS_A_ROW)
    if found is None:
        return
    eager = found.median if name == EAGER else median_of(ROWS, benchmark.group, EAGER)
    row = Row(benchmark.group, name, found.median, flops, found.fraction, eager)
    ROWS.append(row)
    if name in LEFT_TO_TORCH and direction == "forward":
        inputs = make_copies(shape).all[0]
        attend = implementation(name, inputs)
        benchmark.extra_info["kernel"] = longest_kernel(
            lambda: attend(inputs.q, inputs.k, inputs.v)
        )
    benchmark.extra_info.update(
        work="attention",
        kind=f"{direction}, {str(shape).partition(', ')[2]}",
        tokens=shape.tokens,
        copies=len(make_copies(shape).all),
        **speeds.told(found, "matmul", traffic, flops),
        speedup_over_transformers_eager=row.speedup,
    )


def _prepared(direction: str, name: str, inputs: Inputs) -> Prepared:
    """What to time and the function that makes its arguments, after its result was checked."""
    attend = implementation(name, inputs)
    truth = inputs.truth(name)
    given = inputs.q, inputs.k, inputs.v
    if direction == "forward":
        _check_rows(name, "out", attend(*given), truth.out, inputs)
        return attend, lambda: given

    leaves = [x.detach().requires_grad_() for x in given]

    def run(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.d_out)

    grads = torch.autograd.grad(attend(*leaves), leaves, inputs.d_out_of_chunks)
    _check_gradients(name, grads, truth, inputs)
    return run, lambda: (attend(*leaves),)


def _check_gradients(
    name: str, grads: tuple[torch.Tensor, ...], truth: Truth, inputs: Inputs
) -> None:
    dq, dk, dv = grads
    _check_rows(name, "dq", dq, truth.dq, inputs)
    for what, grad, right in (("dk", dk, truth.dk), ("dv", dv, truth.dv)):
        assert_right(name, what, grad[:, :, inputs.kv_heads], right, _allowed(name, inputs))


def _check_rows(
    name: str,
    what: str,
    result: torch.Tensor,
    right: dict[tuple[int, int], torch.Tensor],
    inputs: Inputs,
) -> None:
    for (a, b), rows in right.items():
        got = result[:, a:b, inputs.q_heads]
        assert_right(name, f"{what} of rows {a} to {b}", got, rows, _allowed(name, inputs))


def _allowed(name: str, inputs: Inputs) -> float:
    """Those of a rotation, and of sums in float32: scores over dimensions, values over keys."""
    tokens, dim = inputs.shape.tokens, inputs.shape.dim
    sums = (dim**0.5 + tokens**0.5) * torch.finfo(torch.float32).eps
    return allowed_error(DTYPE, tokens, angles(name)) + sums
