"""A model's forward and the token at the switch, untouched and enabled.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option model and prompts
are small, and it is a check that everything runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from clock import CLOCK
from measure import matmul, measure
from models import DTYPE, KINDS, NAMES, SWITCH, Step, missing, model, step
from ropes import DEVICE, assert_right
from table import Row, Table, median_of

STEPS = [
    Step("forward", 128),
    Step("forward", SWITCH),
    Step(KINDS[1], SWITCH - 2),
    Step(KINDS[2], SWITCH),
]
SMALL = 48
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "two layers of Phi-3-mini's geometry, batch of one, medians",
    "TFLOP/s",
    1e12,
    "of matmul",
    "x theirs",
    "FLOP: those of the weights; the token at the switch is the first that takes the long factors",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 1.0


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.less_important
@pytest.mark.parametrize(
    ("at", "name"),
    [
        pytest.param(at, name, id=f"{at}-{name}")
        for at in STEPS
        for name in NAMES
        # The policies differ at the switch alone.
        if name not in NOT_TIMED and (at.kind == KINDS[2] or name != "enabled, recompute")
    ],
)
def test_model(benchmark: Any, request: pytest.FixtureRequest, at: Step, name: str) -> None:
    full_size = bool(request.config.getoption("benchmark_only"))
    at = at if full_size else at._replace(tokens=SMALL)
    benchmark.group = f"model, {at}"
    run = step(name, at, full_size)
    if name != "enabled, switch" or at.kind != KINDS[2]:
        # At the switch the cached hidden states are those of the short factors: other logits.
        right = _truth(at, full_size)
        # What the layers' roundings make, and transformers' float32 angles.
        allowed = 64 * torch.finfo(DTYPE).eps + at.tokens * torch.finfo(torch.float32).eps
        assert_right(name, "logits", run(), right, allowed)
    weights = sum(p.numel() for p in model(name, full_size).model.layers.parameters())
    again = at.kind == KINDS[2] and name != "enabled, switch"
    tokens = at.tokens if at.kind == "forward" or again else 1
    flops = 2 * weights * tokens
    found = measure(benchmark, run, tuple, matmul(), flops, full_size, SECONDS_A_ROW, fewest=3)
    if found is None:
        return
    theirs = found.median if name == NAMES[0] else median_of(ROWS, benchmark.group, NAMES[0])
    ROWS.append(Row(benchmark.group, name, found.median, flops, found.fraction, theirs))
    benchmark.extra_info.update(
        work="model",
        kind=at.kind,
        tokens=at.tokens,
        device=DEVICE.type,
        flops=flops,
        tflop_per_s=1e-12 * flops / found.median,
        speedup_over_transformers=ROWS[-1].speedup,
    )


@lru_cache(maxsize=1)
def _truth(at: Step, full_size: bool) -> torch.Tensor:
    """What the untouched model says."""
    return step(NAMES[0], at, full_size)().double()
