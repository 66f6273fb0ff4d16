"""apply_rotary against its peers: forward, in place, backward.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the sizes are
small, and it is a check that everything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock import CLOCK
from measure import measure
from ropes import DEVICE, allowed_error, assert_right
from rotations import Inputs, copy, make_inputs, missing, rotation
from table import Row, Table, median_of

from longrope_kernels import backends

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
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "rotation of q (1, S, 32, 128) and k (1, S, 8, 128), medians",
    "GB/s",
    1e9,
    "of copy",
    "x eager",
    "of copy: median ratio to a clone (in place: copy_) timed before each round",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 1.0


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
        run, arguments = ceiling.run, tuple
    else:
        run, arguments = _prepared(direction, name, inputs)
    found = measure(
        benchmark, run, arguments, ceiling, inputs.traffic, bool(full_size), SECONDS_A_ROW
    )
    if found is None:
        return
    # Eager has no form in place: its forward stands for it.
    eager = benchmark.group.replace("in place", "forward")
    row = Row(
        benchmark.group,
        name,
        found.median,
        inputs.traffic,
        found.fraction,
        found.median
        if name == "transformers eager"
        else median_of(ROWS, eager, "transformers eager"),
    )
    ROWS.append(row)
    benchmark.extra_info.update(
        work="rotary",
        kind=direction,
        tokens=tokens,
        bytes=row.amount,
        gb_per_s=1e-9 * row.amount / row.median,
        copy=copy_name,
        copy_seconds=found.ceiling_seconds,
        copy_fraction=row.fraction,
        speedup_over_transformers_eager=row.speedup,
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
    allowed = allowed_error(inputs.dtype, inputs.tokens, name in backends.BACKENDS)
    for what, result, right in zip("qk", results, truth, strict=True):
        assert_right(name, what, result, right, allowed)
