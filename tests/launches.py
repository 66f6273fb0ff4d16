"""Launches without the interpreter and without a GPU: test_launches.py runs this in a process.

Here a kernel is "compiled" to an object that says which it is. Which of them Triton's own binder
takes for arguments, and which `run_launch` starts, must be one and the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parents[1])]

import pytest
import test_host as host_rows
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ropes import WrongResultError
from stand_in_driver import Driver, installed
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from longrope_kernels import (
    KVCache,
    PagedKVCache,
    Rope,
    apply_rotary,
    attention,
    decode,
    warmup,
)
from longrope_kernels.backends.triton import launch as launches
from longrope_kernels.backends.triton import private
from longrope_kernels.kernels import decode as decode_kernels
from longrope_kernels.kernels import rotary as rotary_kernels
from longrope_kernels.kernels.launch import Launch

bf16 = torch.bfloat16
TWO = Rope.longrope([1.0] * 16, [2.0] * 16, 4096, 8192)


def not_compiled(source: Any, target: Any, options: dict[str, Any]) -> CompiledKernel:
    """A kernel that remembers that it was started."""
    assert source.fn.cache_key  # notes which globals it uses
    COMPILED.append(source.name)
    kernel: Any = object.__new__(CompiledKernel)
    kernel.src, kernel.name = source, source.name
    kernel.module, kernel._module_pid, kernel.metadata_group = 1, None, {}
    ALIVE.append(kernel)  # Triton 3.8 unloads what is freed, by the driver of that time
    kernel.function, kernel.packed_metadata = 7, ("metadata of", id(kernel))

    note = triton.runtime.driver.active.launcher_cls(source, kernel)

    def start(*given: Any) -> None:
        (x, y, z, stream, function, metadata), args = given[:6], given[9:]
        assert (stream, function, metadata) == (0, 7, kernel.packed_metadata)
        STARTED.append((kernel, (x, y, z), args))
        note(*given)

    kernel._run = start
    return kernel  # type: ignore[no-any-return]


COMPILED: list[str] = []
ALIVE: list[CompiledKernel] = []
STARTED: list[tuple[CompiledKernel, tuple[int, ...], tuple[Any, ...]]] = []


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[Driver]:
    before = triton.compiler.compile
    triton.compiler.compile = not_compiled
    with installed() as there:
        yield there
    triton.compiler.compile = before


@pytest.fixture(autouse=True)
def _forget() -> None:
    launches._CHOSEN.clear()
    launches._READY.clear()
    STARTED.clear()
    COMPILED.clear()


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that went Triton's own way."""
    seen: list[str] = []
    run = JITFunction.run

    def watched(self: Any, *args: Any, **named: Any) -> Any:
        seen.append(self.__name__)
        return run(self, *args, **named)

    monkeypatch.setattr(JITFunction, "run", watched)
    return seen


def tensors(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def rotate(**named: Any) -> Any:
    q, k = tensors(1, 1, 4, 32), tensors(1, 1, 2, 32)
    return apply_rotary(q, k, torch.tensor([[3]]), TWO, backend="triton", **named)


def attend(slots: int = 8, **named: Any) -> Any:
    q, k, v = tensors(1, slots, 4, 32), tensors(1, slots, 2, 32), tensors(1, slots, 2, 32)
    at, lengths = torch.arange(slots), torch.tensor([8])
    return attention(q, k, v, at, TWO, lengths=lengths, backend="triton", **named)


def decode_one(capacity: int = 128, **named: Any) -> Any:
    q, k, v = tensors(1, 1, 4, 32), tensors(1, capacity, 2, 32), tensors(1, capacity, 2, 32)
    return decode(q, k, v, torch.tensor([3]), TWO, backend="triton", **named)


def new() -> dict[str, torch.Tensor]:
    return {"k_new": tensors(1, 1, 2, 32), "v_new": tensors(1, 1, 2, 32)}


# -------------------------------------------------------------------------------- how many of each

LENGTHS = {"lengths": torch.tensor([8])}
CALLS = {
    "rotary": (lambda: rotate(**LENGTHS), ["rotary_kernel"]),
    "rotary in place": (lambda: rotate(**LENGTHS, inplace=True), ["rotary_kernel"]),
    "decode": (decode_one, ["decode_kernel"]),
    "decode and append": (lambda: decode_one(**new()), ["append_kernel", "decode_kernel"]),
    "decode in splits": (lambda: decode_one(4096), ["decode_kernel"]),
    "attention, k rotated before": (lambda: attend(400), ["rotary_kernel", "attention_kernel"]),
    "attention, few queries": (attend, ["attention_kernel"]),
}


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


def runs(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """What a call gives `run`: a plan, and arguments of it."""
    found: list[tuple[Any, ...]] = []
    run = launches.run
    modules = [import_module(f"longrope_kernels.backends.triton.{name}") for name in PARTS]
    for module in modules:
        module.run = lambda *given: found.append(given)
    try:
        call()
    finally:
        for module in modules:
            module.run = run
    return found


def plans() -> dict[str, Launch]:
    """A launch of each kernel, taken from a call."""
    found = [plan(*given) for call, _ in CALLS.values() for plan, *given in runs(call)]
    return {plan.kernel.__name__: plan for plan in found}


PARTS = ("rotary", "append", "decode", "attention")
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


# ----------------------------------------------------------------- contacts, of longrope_kernels...
# ...backends.triton.private: with one of these Triton starts all itself.


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str], name: str
) -> None:
    rotate(**LENGTHS)
    with monkeypatch.context() as patch:
        hook = getattr(knobs.runtime, name)
        patch.setattr(hook, "calls", [lambda metadata: None])
        rotate(**LENGTHS)
    assert len(by_triton) == 2
    rotate(**LENGTHS)
    assert len(by_triton) == 2


def test_hooks_of_a_kernel_are_called(by_triton: list[str]) -> None:
    seen: list[Any] = []
    kernel = rotary_kernels.rotary_kernel
    rotate(**LENGTHS)
    kernel.add_pre_run_hook(lambda *args, **named: seen.append(args))
    try:
        rotate(**LENGTHS)
    finally:
        kernel.pre_run_hooks.clear()
    assert len(seen) == 1
    assert len(by_triton) == 2


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "consan"),
        (rotary_kernels.rotary_kernel, "debug", True),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_compiles_otherwise_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str], where: Any, name: str, value: Any
) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(where, name, value)
    rotate(**LENGTHS)
    assert len(by_triton) == 2
    assert STARTED[1][0] is not STARTED[0][0]


def test_a_stage_that_somebody_adds_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"))
    rotate(**LENGTHS)
    assert len(by_triton) == 2


def test_a_global_that_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_one()
    monkeypatch.setitem(decode_kernels.decode_kernel.__globals__, "LN2", None)
    with pytest.raises(RuntimeError, match="LN2 has changed"):
        decode_one()


def test_other_releases_start_all_themselves(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    monkeypatch.setattr(private, "USED", False)
    for _ in range(3):
        rotate(**LENGTHS)
    assert len(by_triton) == 3


def test_this_release_was_tried() -> None:
    assert private.USED, f"Triton {triton.__version__} is none of {private.TRIED}"


def test_another_device_is_another_kernel(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(Driver, "get_current_device", lambda self: -2)
    rotate(**LENGTHS)
    assert len(by_triton) == 2


def test_a_stream_is_asked_for_at_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(Driver, "get_current_stream", lambda self, device: 5)
    with pytest.raises(AssertionError):  # of `start`, which expects stream 0
        rotate(**LENGTHS)


# ------------------------------------------------------------------------------------------ warmup

SIZES = (4, 2, 32)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def cold() -> None:
    """As in a process in which no kernel was compiled."""
    for kernel in {plan.kernel for plan in plans().values()}:
        kernel.device_caches.clear()
    launches._CHOSEN.clear()


CACHES: dict[str, tuple[dict[str, Any], Any]] = {
    "dense": ({}, lambda: KVCache(TWO, 3, 4096, 2, 32, policy="switch")),
    "paged": (
        {"block_size": 16},
        lambda: PagedKVCache(TWO, 3, 9, 16, 2, 32, max_length=4096, policy="switch"),
    ),
    "float8": (
        {"cache_dtype": FLOAT8, "policy": "pin"},
        lambda: KVCache(TWO, 3, 4096, 2, 32, policy="pin", dtype=FLOAT8),
    ),
    "float8, scales": (
        {"cache_dtype": FLOAT8, "policy": "pin"},
        lambda: KVCache(
            TWO, 3, 4096, 2, 32, policy="pin", dtype=FLOAT8,
            k_scale=torch.full((2,), 0.5), v_scale=torch.full((2,), 0.5),
        ),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("name", CACHES)
def test_steps_after_it_compile_nothing(name: str, by_triton: list[str]) -> None:
    named, make = CACHES[name]
    warmup(
        TWO, *SIZES, device="cpu", batch=3, tokens=(1, 4), capacity=4096, backend="triton", **named
    )
    compiled = len(COMPILED)
    assert compiled
    by_triton.clear()
    cache = make()
    for seq in (1, 4, 1):
        cache.extend(seq)
        q, k = tensors(3, seq, 4, 32), tensors(3, seq, 2, 32)
        lengths = torch.tensor([1, 2, 3]) if cache.sets is None else None
        at = torch.arange(3 * seq).view(3, seq)
        chosen = {"lengths": lengths, "sets": cache.sets, "backend": "triton"}
        apply_rotary(q, k, at, TWO, **chosen, inplace=True)
        cache.decode(q, k_new=k, v_new=k, backend="triton")
        cache.decode(q, backend="triton")
    assert len(COMPILED) == compiled
    assert by_triton == []


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("prompt", [8, 100, 512])
def test_prompts_after_it_compile_nothing(prompt: int, by_triton: list[str]) -> None:
    warmup(TWO, *SIZES, device="cpu", batch=2, prompts=prompt, window=64, backend="triton")
    compiled = len(COMPILED)
    by_triton.clear()
    q, k = tensors(2, prompt, 4, 32), tensors(2, prompt, 2, 32)
    for at in (torch.arange(prompt), torch.arange(2 * prompt).view(2, prompt)):
        lengths = torch.tensor([5000, 3])
        apply_rotary(q, k, at, TWO, lengths=lengths, backend="triton")
        attention(q, k, k, at, TWO, lengths=lengths, window=64, backend="triton")
    assert len(COMPILED) == compiled
    assert by_triton == []
