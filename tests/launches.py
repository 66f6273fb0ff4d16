"""Launches without the interpreter and without a GPU: test_launches.py runs this in a process.

Which kernels Triton's own binder takes for arguments, and which `run_launch` starts, must be one
and the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_host as host_rows
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import CALLS, LENGTHS, STARTED, TWO, attend, bf16, plans, rotate, runs, tensors
from ropes import WrongResultError

from longrope_kernels import apply_rotary, decode
from longrope_kernels.backends.triton import launch as launches
from longrope_kernels.kernels.launch import Launch

# -------------------------------------------------------------------------------- how many of each


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_so_many_launches(name: str) -> None:
    call, expected = CALLS[name]
    for _ in range(3):
        STARTED.clear()
        call()
        assert [kernel.name for kernel, *_ in STARTED] == expected


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_goes_past_the_binder(name: str, by_triton: list[str]) -> None:
    call, expected = CALLS[name]
    call()
    first = list(STARTED)
    assert by_triton == expected
    call()
    assert by_triton == expected
    assert [(k, grid) for k, grid, _ in STARTED[len(first) :]] == [(k, g) for k, g, _ in first]


@pytest.mark.parametrize("name", host_rows.STANDING_IN)
def test_rows_of_host_time_start_what_they_say(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str], name: str
) -> None:
    timed = host_rows.prepared(name)
    STARTED.clear()
    by_triton.clear()
    timed.run(*timed.arguments())
    assert timed.amount == host_rows.CALLS
    started = [kernel.name for kernel, *_ in STARTED]
    assert started == host_rows.STANDING_IN[name] * host_rows.CALLS
    assert by_triton == []
    monkeypatch.setattr(launches.private, "start", lambda *_: None)
    with pytest.raises(WrongResultError, match=r"expected .* to start, got"):
        host_rows.prepared(name)


# ----------------------------------------------------------------------- the very kernel of Triton

# Views at every distance from an address that 16 divides.
MEMORY = torch.zeros(64, dtype=torch.int64)
DTYPES = (bf16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
POINTERS = st.builds(
    lambda dtype, start: MEMORY.view(torch.uint8)[start * dtype.itemsize :][:64].view(dtype),
    st.sampled_from(DTYPES),
    st.sampled_from((0, 1, 2, 4, 8, 16)),
)
NUMBERS = st.sampled_from(
    (0, 1, 2, 8, 15, 16, 17, 32, 48, -1, -16, 2**31 - 1, 2**31, 2**31 - 16, -(2**31), 2**33, 2**63)
)
OTHERS = st.sampled_from((None, True, False, 1.0, 0.5, 16.0, 0.0))


def changed(data: st.DataObject, x: Any) -> Any:
    """An argument, or another in its place, tuples leaf by leaf."""
    if type(x) is tuple:
        return tuple(changed(data, leaf) for leaf in x)
    if not data.draw(st.integers(0, 5)):
        return data.draw(st.one_of(POINTERS, NUMBERS, OTHERS))
    if isinstance(x, torch.Tensor) and not data.draw(st.integers(0, 2)):
        return data.draw(POINTERS)
    if type(x) is int and not data.draw(st.integers(0, 1)):
        return data.draw(NUMBERS)
    return x


KERNELS = ("rotary_kernel", "append_kernel", "decode_kernel", "attention_kernel")


@pytest.mark.parametrize("name", KERNELS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_the_kernel_is_the_one_that_triton_takes(name: str, data: st.DataObject) -> None:
    plan = plans()[name]
    others = [plan]
    for _ in range(data.draw(st.integers(1, 3))):
        constants = {
            n: data.draw(st.sampled_from((x, x, x + 1))) for n, x in plan.constants.items()
        }
        warps, stages = data.draw(st.sampled_from(((4, 1), (4, 2), (8, 2))))
        others.append(
            Launch(plan.kernel, plan.grid, changed(data, plan.args), constants, warps, stages)
        )
    for turn in data.draw(st.permutations(others * 2)):
        launches.run_launch(turn)
        started, _, args = STARTED[-1]
        assert args == (*turn.args, *turn.constants.values())
        options = {"num_warps": turn.warps, "num_stages": turn.stages}
        assert started is turn.kernel[turn.grid](*turn.args, **turn.constants, **options)


def at(x: torch.Tensor, start: int) -> torch.Tensor:
    """A copy of x, ``start`` elements from an address that 16 divides."""
    return tensors(x.numel() + start, dtype=x.dtype)[start:].view(x.shape)


def rotation(
    dtype: torch.dtype, seq: int, start: int, both: bool, sets: bool, inplace: bool, packed: bool
) -> None:
    q, k = (at(tensors(1, seq, heads, 32, dtype=dtype), start) for heads in (4, 2))
    which = torch.tensor([8] if not sets else [1], dtype=torch.int32)
    given: dict[str, Any] = {"sets" if sets else "lengths": which}
    if packed:
        q, k = q[0], k[0]
        given |= {"layout": "thd", "cu_seqlens": torch.tensor([0, seq])}
    apply_rotary(
        q, k if both else None, torch.arange(seq), TWO, **given, inplace=inplace, backend="triton"
    )


def attending(queries: int, capacity: int, dtype: torch.dtype, more: dict[str, Any]) -> None:
    q, one = tensors(2, queries, 4, 32, dtype=dtype), tensors(2, queries, 2, 32, dtype=dtype)
    cache = [tensors(2, capacity, 2, 32, dtype=dtype) for _ in range(2)]
    if more.get("float8"):
        cache, more = [x.to(torch.float8_e4m3fn) for x in cache], {}
    decode(q, *cache, torch.tensor([3, 4]), TWO, k_new=one, v_new=one, backend="triton", **more)


HALVES = st.sampled_from((bf16, torch.float16))
OF_DECODE: tuple[dict[str, Any], ...] = (
    *({}, {"window": 3}, {"window": 4}, {"softcap": 5.0}, {"softmax_scale": 0.5}, {"float8": True}),
    *({"kv_start": torch.zeros(2, dtype=torch.int64)}, {"lengths": torch.tensor([8, 9])}),
    *({"block_table": torch.zeros(2, n, dtype=torch.int32)} for n in (1, 2)),
)
VARIANTS = st.one_of(
    st.builds(
        lambda *given: lambda: rotation(*given),
        *(HALVES, st.sampled_from((1, 2, 64)), st.sampled_from((0, 1, 8))),
        *(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    ),
    st.builds(
        lambda *given: lambda: attending(*given),
        *(st.sampled_from((1, 2)), st.sampled_from((16, 1024)), HALVES, st.sampled_from(OF_DECODE)),
    ),
    st.builds(lambda slots: lambda: attend(slots), st.sampled_from((8, 9, 400))),
)


def same(x: Any, y: Any) -> bool:
    if isinstance(x, tuple):
        return isinstance(y, tuple) and len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, torch.Tensor):
        return x is y
    return type(x) is type(y) and bool(x == y)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(calls=st.lists(VARIANTS, min_size=2, max_size=4), data=st.data())
def test_a_kind_of_call_starts_what_its_plan_says(calls: list[Any], data: st.DataObject) -> None:
    turns = [turn for call in calls for turn in runs(call)]
    for plan, *arguments in data.draw(st.permutations(turns * 4)):
        launches.run(plan, *arguments)
        started, grid, args = STARTED[-1]
        launch = plan(*arguments)
        assert grid == (*launch.grid, 1, 1)[:3]
        assert same(args, (*launch.args, *launch.constants.values()))
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        assert started is launch.kernel[launch.grid](*launch.args, **launch.constants, **options)


def test_a_call_of_a_kind_that_came_twice_makes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    ((plan, *given),) = runs(lambda: rotate(**LENGTHS))
    seen: list[Any] = []

    def watched(*given: Any) -> Launch | None:
        seen.append(given)
        return plan(*given)  # type: ignore[no-any-return]

    for times in (1, 2, 2, 2):
        launches.run(watched, *given)
        assert len(seen) == times
    assert len(STARTED) == 4
    # Without the extension there are no kinds.
    monkeypatch.setattr("longrope_kernels.calls.kinds._kind_of", None)
    launches.run(watched, *given)
    assert len(seen) == 3


@pytest.mark.parametrize("name", KERNELS)
def test_constants_stand_in_the_order_of_the_kernel(name: str) -> None:
    plan = plans()[name]
    assert [*plan.constants] == plan.kernel.arg_names[len(plan.args) :]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MOST", 3)
    for seq in range(1, 9):
        q = tensors(1, seq, 4, 32)
        apply_rotary(q, None, torch.arange(seq), TWO, **LENGTHS, backend="triton")
        assert len(launches._CHOSEN) <= 3
        assert len(launches._READY) <= 3
