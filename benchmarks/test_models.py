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
from measure import Timed, matmul, measure
from models import DTYPE, KINDS, NAMES, NEW, PEERS, SWITCH, Step, missing, model, serves, step
from ropes import DEVICE, assert_right
from table import Row, Table, median_of

STEPS = [
    Step("forward", 128),
    Step("forward", SWITCH),
    Step(KINDS[1], SWITCH - 2),
    Step(KINDS[2], SWITCH),
    Step(KINDS[3], SWITCH - NEW // 2),
]
SMALL = 48
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    f"two layers of Phi-3-mini's geometry, batch of one, medians; generate: {NEW} tokens",
    "TFLOP/s",
    1e12,
    "of matmul",
    "x theirs",
    "FLOP: those of the weights; the token at the switch is the first that takes the long factors",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 1.0


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.less_important(1)
@pytest.mark.parametrize(
    ("at", "name"),
    [
        pytest.param(at, name, id=f"{at}-{name}")
        for at in STEPS
        for name in NAMES
        if name not in NOT_TIMED and serves(name, at)
    ],
)
def test_model(benchmark: Any, request: pytest.FixtureRequest, at: Step, name: str) -> None:
    full_size = bool(request.config.getoption("benchmark_only"))
    at = at if full_size else at._replace(tokens=SMALL)
    benchmark.group = f"model, {at}"

    def prepare(name: str) -> Timed:
        run = step(name, at, full_size)
        # What the layers' roundings make, and transformers' float32 angles.
        allowed = 64 * torch.finfo(DTYPE).eps + at.tokens * torch.finfo(torch.float32).eps
        switches = name == "enabled, switch"
        if at.kind == "generate":
            _check_generated(name, run(), at.tokens, full_size, allowed)
        elif not switches or at.kind != KINDS[2]:
            # At the switch the cached hidden states are those of the short factors: other logits.
            assert_right(name, "logits", run(), _truth(at, full_size), allowed)
        weights = sum(p.numel() for p in model(name, full_size).model.layers.parameters())
        again = at.kind in KINDS[2:] and not switches
        tokens = {"forward": at.tokens, "generate": at.tokens + NEW}.get(at.kind, 0 if again else 1)
        return Timed(run, tuple, matmul(), 2 * weights * (tokens + (at.tokens if again else 0)))

    found = measure(benchmark, request, prepare, PEERS, SECONDS_A_ROW, fewest=3)
    if found is None:
        return
    theirs = found.median if name == NAMES[0] else median_of(ROWS, benchmark.group, NAMES[0])
    ROWS.append(Row(benchmark.group, name, found.median, found.amount, found.fraction, theirs))
    benchmark.extra_info.update(
        work="model",
        kind=at.kind,
        tokens=at.tokens,
        device=DEVICE.type,
        flops=found.amount,
        tflop_per_s=1e-12 * found.amount / found.median,
        matmul_seconds=found.ceiling_seconds,
        matmul_fraction=found.fraction,
        peak_bytes=found.peak_bytes,
        speedup_over_transformers=ROWS[-1].speedup,
    )


@lru_cache(maxsize=1)
def _truth(at: Step, full_size: bool) -> torch.Tensor:
    """What the untouched model says."""
    return step(NAMES[0], at, full_size)().double()


def _check_generated(
    name: str, ids: torch.Tensor, prompt: int, full_size: bool, allowed: float
) -> None:
    """Each new token has the highest logit of the untouched model, or as good as that.

    Those made of more tokens than the switch by the long factors. Under "switch" they come from
    hidden states made under the short ones and are not compared.
    """
    untouched, last = model(NAMES[0], full_size), ids.shape[1] - 1
    parts = [(prompt, min(SWITCH, last))]
    if last > SWITCH and name != "enabled, switch":
        parts.append((SWITCH + 1, last))
    for first, end in parts:
        with torch.no_grad():
            made_of = untouched(ids[:, :end], logits_to_keep=end - first + 1, use_cache=False)
        logits = made_of.logits[0].double()
        chosen = logits.gather(1, ids[0, first : end + 1, None])
        assert_right(name, f"tokens {first} to {end}", chosen, logits.amax(1, True), allowed)
