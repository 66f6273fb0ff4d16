"""apply_rotary against its peers: forward, in place, backward, and into a cache.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the sizes are
small, and it is a check that everything runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import speeds
import torch
from clock import CLOCK
from copies import Prepared
from measure import Timed, measure, require_memory
from parameters import ROTATIONS, Geometry
from ropes import allowed_error, assert_right
from rotations import (
    COPIES,
    EAGER,
    PEERS,
    VARIANTS,
    Inputs,
    Tensors,
    angles,
    cache_write,
    copy,
    make_copies,
    missing,
    rotation,
    serves,
)
from table import Row, Table, median_of

SMALL = 128
NAMES = list(dict.fromkeys(name for names in VARIANTS.values() for name in names))
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "rotation of q (1, S, 32, 128) and k (1, S, 8, 128), or of the model named, medians",
    "GB/s",
    1e9,
    "of copy",
    "x eager",
    "of copy: median ratio to a clone (in place, into a cache: copy_) timed before each round",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 1.0


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.parametrize(
    ("tokens", "dtype", "geometry", "direction", "name"),
    [
        pytest.param(
            *(*size, direction, name),
            id=f"{direction}-S{size[0]}-{str(size[1])[6:]}{size[2].suffix}-{name}",
            marks=pytest.mark.less_important(rank),
        )
        for rank, size in ROTATIONS
        for direction, names in VARIANTS.items()
        for name in names
        if name not in NOT_TIMED and serves(name, direction, size[2])
    ],
)
def test_rotary(
    benchmark: Any,
    request: pytest.FixtureRequest,
    tokens: int,
    dtype: torch.dtype,
    geometry: Geometry,
    direction: str,
    name: str,
) -> None:
    tokens = tokens if request.config.getoption("benchmark_only") else SMALL
    size = f"S = {tokens}, {str(dtype).removeprefix('torch.')}{geometry.suffix}"
    benchmark.group = f"{direction}, {size}"
    copy_name = "clone" if direction in ("forward", "backward") else "copy_"
    itemsize = dtype.itemsize * tokens * geometry.dim

    def prepare(name: str) -> Timed:
        # Inputs, results and what the ceiling writes; gradients and their graph.
        heads = geometry.q_heads + 2 * geometry.k_heads
        require_memory((7 if direction == "backward" else 4) * heads * itemsize)
        copies = make_copies(tokens, dtype, geometry)
        ceiling = copies.ceiling(lambda inputs: copy(copy_name, direction, inputs))
        if name in COPIES:
            copying = copies.ceiling(lambda inputs: copy(name, direction, inputs))
            return Timed(copying.run, tuple, ceiling, copying.amount)
        timed = copies.in_turn(lambda inputs: _prepared(direction, name, inputs))
        return Timed(*timed, ceiling, ceiling.amount)

    found = measure(benchmark, request, prepare, PEERS, SECONDS_A_ROW)
    if found is None:
        return
    # Eager has no form in place: its forward stands for it.
    eager = benchmark.group.replace("in place", "forward")
    copies = make_copies(tokens, dtype, geometry).all
    traffic = copies[0].traffic(direction)
    # Two products and a sum for each of two results of a pair.
    flops = 3 * tokens * (geometry.q_heads + geometry.k_heads) * geometry.rotated
    row = Row(
        benchmark.group,
        name,
        found.median,
        traffic,
        found.fraction,
        found.median if name == EAGER else median_of(ROWS, eager, EAGER),
    )
    ROWS.append(row)
    benchmark.extra_info.update(
        work="rotary",
        kind=f"{direction}, {str(dtype)[6:]}{geometry.suffix}",
        tokens=tokens,
        copies=len(copies),
        **speeds.told(found, copy_name, traffic, None if name in COPIES else flops),
        speedup_over_transformers_eager=row.speedup,
    )


def _prepared(direction: str, name: str, inputs: Inputs) -> Prepared:
    """What to time and the function that makes its arguments, after its result was checked."""
    if direction == "cache write":
        return _prepared_cache_write(name, inputs)
    rotate = rotation(name, inputs, direction == "in place")
    if direction != "backward":
        _check(rotate(inputs.q.clone(), inputs.k.clone()), inputs.rotated(name), name, inputs)
        return rotate, lambda: inputs.scratch if direction == "in place" else (inputs.q, inputs.k)

    def run(outputs: Tensors, grads: Tensors = inputs.grads_scratch) -> Tensors:
        return torch.autograd.grad(outputs, inputs.leaves, grads)

    grads = tuple(x.clone() for x in inputs.grads)
    _check(run(rotate(*inputs.leaves), grads), inputs.rotated_back(name), name, inputs)
    return run, lambda: (rotate(*inputs.leaves),)


def _prepared_cache_write(name: str, inputs: Inputs) -> Prepared:
    write = cache_write(name, inputs)
    given = inputs.q, inputs.k, inputs.v
    for cache in inputs.caches:
        cache.zero_()
    *rotated, cache_v = write(*given)
    _check(tuple(rotated), inputs.rotated(name), name, inputs)
    assert_right(name, "v", cache_v, inputs.v, 0.0)
    return write, lambda: given


def _check(results: Tensors, truth: list[torch.Tensor], name: str, inputs: Inputs) -> None:
    allowed = allowed_error(inputs.dtype, inputs.tokens, angles(name))
    for what, result, right in zip("qk", results, truth, strict=True):
        assert_right(name, what, result[:, inputs.checked], right, allowed)
