"""A model's forward and the token at the switch, untouched and enabled.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option model and prompts
are small, and it is a check that everything runs.
"""

from __future__ import annotations

from typing import Any

import model_truth
import pytest
import speeds
import torch
from clock import CLOCK
from measure import Timed, matmul, measure
from models import (
    KINDS,
    NAMES,
    NEW,
    PEERS,
    SMALL_SWITCH,
    SWITCH,
    Step,
    amounts,
    ids,
    missing,
    serves,
    step,
)
from ropes import DEVICE, DTYPE, EXACT, FLOAT32, assert_right
from table import Row, Table, median_of

STEPS = [
    Step("forward", 128),
    Step("forward", SWITCH),
    Step(KINDS[1], SWITCH - 2),
    Step(KINDS[2], SWITCH),
    Step(KINDS[3], SWITCH - NEW // 2),
]
SMALL = 48  # tokens of a forward where nothing is measured
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
@pytest.mark.parametrize(
    ("at", "name"),
    [
        pytest.param(
            *(at, name),
            id=f"{at}-{name}",
            marks=pytest.mark.less_important(int(at.kind != "forward")),
        )
        for at in STEPS
        for name in NAMES
        if name not in NOT_TIMED and serves(name, at)
    ],
)
def test_model(benchmark: Any, request: pytest.FixtureRequest, at: Step, name: str) -> None:
    full_size = bool(request.config.getoption("benchmark_only"))
    if not full_size:
        small = SMALL if at.kind == "forward" else at.tokens - SWITCH + SMALL_SWITCH
        at = at._replace(tokens=small)
    benchmark.group = f"model, {at}"

    def prepare(name: str) -> Timed:
        run = step(name, at, full_size)
        check(name, at, run(), full_size)
        return Timed(run, tuple, matmul(), amounts(name, at, full_size)[1])

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
        **speeds.told(found, "matmul", *amounts(name, at, full_size)),
        speedup_over_transformers=ROWS[-1].speedup,
    )


def check(name: str, at: Step, found: torch.Tensor, full_size: bool) -> None:
    """Raises `WrongResultError` where logits, or the tokens of "generate", are wrong.

    Each new token must have the highest logit there is, or one that is as good.
    """
    if at.kind != "generate":
        tokens = ids(at.tokens + (at.kind != "forward"))
        right = model_truth.logits(name, tokens, tokens.shape[1] - 1, full_size)
        assert_right(name, "logits", found, right, allowed(name, at.tokens))
        return
    right = model_truth.logits(name, found[:, :-1], at.tokens - 1, full_size)
    chosen = right.gather(2, found[:, at.tokens :, None])
    # Both that token's logit and the highest may be off.
    assert_right(name, "tokens", chosen, right.amax(2, True), 2 * allowed(name, at.tokens))


def allowed(name: str, tokens: int) -> float:
    """The largest error, relative to the largest logit.

    Each of the two layers rounds some eight times to the dtype of the model, half an eps at most:
    together about two eps, and some logits are off by more. In float32 sums over up to 8192 numbers
    round as well, and transformers' float32 angles.
    """
    angles = FLOAT32 if name in PEERS else EXACT
    eps = torch.finfo(torch.float32).eps
    return 8 * torch.finfo(DTYPE).eps + (8192**0.5 + angles * tokens) * eps
