"""What a call costs on the host: one token, where the arithmetic is the smaller part.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option it is a check that
everything runs. On the CPU by the native backend, also where there is a GPU; and what the backend
"triton" takes of the host, by a stand-in for the driver (stand_in_driver.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock import THREAD
from measure import Timed, measure
from ropes import EXACT, WrongResultError, allowed_error, assert_right, rope
from table import Row, Table, median_of

from longrope_kernels import apply_rotary, attention, decode
from longrope_kernels.backends import native
from longrope_kernels.backends.triton import device as triton_device

CALLS = 100  # of a round: one alone is near what the clock can tell
HEADS, KV_HEADS, DIM = 32, 8, 96
CAPACITY, CACHED = 128, 16
POSITION = 77

ADD = "torch: q + k"  # what one operation of torch costs, to read the others by
FORWARD, INPLACE, DECODE = "apply_rotary", "apply_rotary in place", "decode"
# By backend "triton", which starts nothing, and the kernels that each would start.
STANDING_IN = {
    "triton, apply_rotary": ["rotary_kernel"],
    "triton, apply_rotary in place": ["rotary_kernel"],
    "triton, decode": ["decode_kernel"],
    "triton, decode and append": ["append_kernel", "decode_kernel"],
    "triton, attention": ["rotary_kernel", "attention_kernel"],
}
PROMPT = 512
NAMES = (ADD, FORWARD, INPLACE, DECODE, *STANDING_IN)
NOT_TIMED: dict[str, str] = {}
if reason := native.missing():
    NOT_TIMED = dict.fromkeys((FORWARD, INPLACE, DECODE), reason)
if importlib.util.find_spec("triton") is None:
    NOT_TIMED |= dict.fromkeys(STANDING_IN, "Triton is not installed")
elif triton_device.interpreting():
    NOT_TIMED |= dict.fromkeys(STANDING_IN, "Triton interprets kernels here, and compiles none")
TABLE = Table(
    f"host time: q and k (1, 1, {HEADS}, {DIM}), decode over {CACHED} keys, {CALLS} calls, medians",
    "calls/s",
    1,
    "",
    "x q + k",
    "calls/s of one thread, its own time; float32, native; triton: bfloat16, none starts",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 0.3

Call = Callable[[], Any]


@pytest.mark.benchmark(timer=THREAD.now, disable_gc=True)
@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"host-{name}") for name in NAMES if name not in NOT_TIMED]
)
def test_host(benchmark: Any, request: pytest.FixtureRequest, name: str) -> None:
    benchmark.group = f"host time, {CALLS} calls of one token"
    found = measure(benchmark, request, prepared, (), SECONDS_A_ROW, clock=THREAD)
    if found is None:
        return
    of_add = found.median if name == ADD else median_of(ROWS, benchmark.group, ADD)
    ROWS.append(Row(benchmark.group, name, found.median, found.amount, None, of_add))
    benchmark.extra_info.update(
        work="host",
        calls=CALLS,
        seconds_a_call=found.median / CALLS,
        peak_bytes=found.peak_bytes,
    )


def prepared(name: str) -> Timed:
    """The calls of a row, after the result of one was checked."""
    if name in STANDING_IN:
        return _standing_in(name)
    call, right = _calls()[name]
    if right is not None:
        result = call()
        first = result[0] if isinstance(result, tuple) else result
        assert_right(name, "q", first, right, allowed_error(torch.float32, POSITION, EXACT))

    def run() -> None:
        for _ in range(CALLS):
            call()

    return Timed(run, tuple, None, CALLS)


def _calls() -> dict[str, tuple[Call, torch.Tensor | None]]:
    """Each call, and what is right of its first result; its inputs are its own."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    q, k = normal(1, 1, HEADS, DIM), normal(1, 1, HEADS, DIM)
    cache = normal(1, CAPACITY, KV_HEADS, DIM), normal(1, CAPACITY, KV_HEADS, DIM)
    positions, lengths = torch.tensor([[POSITION]]), torch.tensor([POSITION + 1])
    lens, turn = torch.tensor([CACHED]), rope(DIM)
    into = q.clone(), k.clone()
    rotated, _ = apply_rotary(
        q.double(), k.double(), positions, turn, lengths=lengths, backend="reference"
    )
    attended = decode(q.double(), *(x.double() for x in cache), lens, turn, backend="reference")
    assert isinstance(attended, torch.Tensor)
    return {
        ADD: (lambda: q + k, None),
        FORWARD: (
            lambda: apply_rotary(q, k, positions, turn, lengths=lengths, backend="native"),
            rotated,
        ),
        # Further and further; the norms stay.
        INPLACE: (
            lambda: apply_rotary(
                *into, positions, turn, lengths=lengths, inplace=True, backend="native"
            ),
            rotated,
        ),
        DECODE: (lambda: decode(q, *cache, lens, turn, backend="native"), attended),
    }


def _standing_in(name: str) -> Timed:
    """The calls of a row of backend "triton", after the kernels that one starts were looked at."""
    from stand_in_driver import installed

    call = _triton_calls()[name]
    with installed() as driver:
        call()  # compiles
        driver.started.clear()
        call()
    started = [kernel.name for kernel in driver.started]
    if started != STANDING_IN[name]:
        raise WrongResultError(f"{name}: expected {STANDING_IN[name]} to start, got {started}")

    def run() -> None:
        with installed():
            for _ in range(CALLS):
                call()

    return Timed(run, tuple, None, CALLS)


def _triton_calls() -> dict[str, Call]:
    """As `_calls`, in a dtype that Triton's kernels serve; attention of a prompt."""

    def empty(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.bfloat16)

    def heads(seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = empty(1, seq, KV_HEADS, DIM), empty(1, seq, KV_HEADS, DIM)
        return empty(1, seq, HEADS, DIM), k, v

    one, cache, prompt = heads(1), heads(CAPACITY)[1:], heads(PROMPT)
    positions, lengths = torch.tensor([[POSITION]]), torch.tensor([POSITION + 1])
    lens, at, turn = torch.tensor([CACHED]), torch.arange(PROMPT), rope(DIM)

    def rotate(inplace: bool) -> Any:
        return apply_rotary(
            *one[:2], positions, turn, lengths=lengths, inplace=inplace, backend="triton"
        )

    forward, inplace, decoded, appended, attended = STANDING_IN
    new = {"k_new": one[1], "v_new": one[2]}
    return {
        forward: lambda: rotate(False),
        inplace: lambda: rotate(True),
        decoded: lambda: decode(one[0], *cache, lens, turn, backend="triton"),
        appended: lambda: decode(one[0], *cache, lens, turn, **new, backend="triton"),
        attended: lambda: attention(*prompt, at, turn, lengths=lengths, backend="triton"),
    }
