"""apply_rotary against its peers: forward, in place, backward.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the sizes are
small, and it is a check that everything runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock import CLOCK, seconds
from implementations import (
    DEVICE,
    Inputs,
    copy,
    make_inputs,
    missing,
    rotation,
    tolerance,
)
from table import Row, speedup

SIZES = [(4096, torch.float32), (4096, torch.bfloat16)]
if DEVICE.type == "cuda":
    SIZES.append((8192, torch.bfloat16))
SMALL = 128

# Eager comes first: later rows are told against it.
VARIANTS = {
    "forward": (
        "transformers eager",
        "transformers torch.compile",
        "flash-attn",
        "reference",
        "native",
        "triton",
        "clone",
    ),
    "in place": ("liger", "flash-attn", "native", "triton", "copy_"),
    "backward": (
        "transformers eager",
        "transformers torch.compile",
        "liger",
        "flash-attn",
        "reference",
        "native",
        "triton",
        "clone",
    ),
}
NAMES = list(dict.fromkeys(name for names in VARIANTS.values() for name in names))
ROWS: list[Row] = []  # for the table at the end

SECONDS_PER_ROW = 1.0
FEWEST, MOST = 5, 60


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.parametrize(
    ("tokens", "dtype", "direction", "name"),
    [
        pytest.param(
            tokens, dtype, direction, name, id=f"{direction}-S{tokens}-{str(dtype)[6:]}-{name}"
        )
        for tokens, dtype in SIZES
        for direction, names in VARIANTS.items()
        for name in names
        if missing(name) is None
    ],
)
def test_rotary(
    benchmark: Any,
    request: pytest.FixtureRequest,
    tokens: int,
    dtype: torch.dtype,
    direction: str,
    name: str,
) -> None:
    full_size = request.config.getoption("benchmark_only")
    tokens = tokens if full_size else SMALL
    size = f"S = {tokens}, {str(dtype).removeprefix('torch.')}"
    benchmark.group = f"{direction}, {size}"
    inputs = make_inputs(tokens, dtype)
    copy_name = "copy_" if direction == "in place" else "clone"
    ceiling = copy(copy_name, inputs)
    if name == copy_name:
        run, arguments = ceiling, tuple
    else:
        run, arguments = _prepared(direction, name, inputs)
    ceiling_times = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A copy before each round, since the speed of a shared machine changes by the second.
        ceiling_times.append(seconds(ceiling))
        ready = arguments()
        CLOCK.prepare()
        return ready, {}

    setup()
    estimate = seconds(lambda: run(*arguments()))
    rounds = min(MOST, max(FEWEST, round(SECONDS_PER_ROW / estimate))) if full_size else 3
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return

    data = benchmark.stats.stats.data
    copies = ceiling_times[-len(data) :]
    copy_fraction = statistics.median(c / t for c, t in zip(copies, data, strict=True))
    median = benchmark.stats.stats.median
    row = Row(size, direction, name, median, inputs.traffic, copy_fraction)
    ROWS.append(row)
    benchmark.extra_info.update(
        bytes=row.traffic,
        gb_per_s=row.gb_per_s,
        copy=copy_name,
        copy_seconds=statistics.median(copies),
        copy_fraction=row.copy_fraction,
        speedup_over_transformers_eager=speedup(row, ROWS),
    )


def _prepared(
    direction: str, name: str, inputs: Inputs
) -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    """What to time and the function that makes its arguments, after its result was checked."""
    inplace = direction == "in place"
    rotate = rotation(name, inputs, inplace)
    if direction != "backward":
        # Those in place rotate their inputs further and further; the norms stay.
        pair = (inputs.q.clone(), inputs.k.clone()) if inplace or name == "liger" else (
            inputs.q, inputs.k,
        )  # fmt: skip
        _check(rotate(*(x.clone() for x in pair)), inputs.rotated, name, inputs)
        return rotate, lambda: pair

    q, k = (x.clone().requires_grad_() for x in (inputs.q, inputs.k))
    grads = [x.clone() for x in inputs.grads]  # Liger writes into them

    def run(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, (q, k), grads)

    _check(run(rotate(q, k)), inputs.rotated_back, name, inputs)
    return run, lambda: (rotate(q, k),)


def _check(
    results: tuple[torch.Tensor, ...], truth: list[torch.Tensor], name: str, inputs: Inputs
) -> None:
    """A wrong result fails here instead of being timed."""
    allowed = tolerance(name, inputs)
    for what, result, right in zip("qk", results, truth, strict=True):
        assert result.shape == right.shape
        error = float((result.double() - right).abs().max() / right.abs().max())
        assert error <= allowed, f"{name}, {what}: error {error:.1e}, allowed {allowed:.1e}"
