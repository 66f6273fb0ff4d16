"""benchmarks/: rows are timed in turns and on copies, wrong ones fail, missing ones are named."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from benchmark_modules import (
    WrongResultError,
    attention_rows,
    attentions,
    clock,
    copies,
    decodes,
    host_rows,
    measure,
    parameters,
    profiles,
    ropes,
)
from torch.nn.attention import SDPBackend

from longrope_kernels.rope.published import published_configs

# ------------------------------------------------------------------------------------------- turns


class Group:
    """Rows of a group without pytest-benchmark: ``seconds`` of each call, by what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.log: list[str] = []
        self.seconds = seconds
        self.rounds: dict[str, list[float]] = {}
        self.seconds_a_row = 0.0
        session = SimpleNamespace(items=[])
        for name in (name for name in seconds if name != "ceiling"):
            spec = SimpleNamespace(params={"name": name, "size": 1})
            session.items.append(
                SimpleNamespace(callspec=spec, function="f", session=session, nodeid=f"t[{name}]")
            )
        self.items = {item.callspec.params["name"]: item for item in session.items}
        monkeypatch.setattr(measure, "_turns", None)
        monkeypatch.setattr(measure, "REASONS", {})
        monkeypatch.setattr(measure, "seconds", lambda run, clock: run())

    def call(self, name: str) -> float:
        self.log.append(name)
        return self.seconds[name]

    def prepare(self, name: str) -> Any:
        ceiling = measure.Ceiling("copy", lambda: self.call("ceiling"), 100)
        return measure.Timed(lambda: self.call(name), tuple, ceiling, 50)

    def measure(
        self, name: str, prepare: Callable[[str], Any] | None = None, *peers: str, full: bool = True
    ) -> Any:
        def pedantic(run: Callable[[], Any], rounds: int) -> None:
            edges = [(clock.CLOCK.now(), run(), clock.CLOCK.now()) for _ in range(rounds)]
            self.rounds[name] = [end - begin for begin, _, end in edges]

        benchmark = SimpleNamespace(disabled=False, group="group", pedantic=pedantic)
        config = SimpleNamespace(getoption=lambda option: full)
        request = SimpleNamespace(node=self.items[name], config=config)
        return measure.measure(
            benchmark, request, prepare or self.prepare, peers, self.seconds_a_row
        )


def test_rows_are_timed_in_turns_each_after_its_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})
    group.measure("a")
    # Of each row a call for its memory and one round to see how long it takes; then the rounds.
    assert group.log[:6] == ["a", "ceiling", "a", "b", "ceiling", "b"]
    rounds = group.log[6:]
    assert len(rounds) == 4 * measure.FEWEST
    assert rounds[::2] == ["ceiling"] * (2 * measure.FEWEST)
    passes = [tuple(rounds[i + 1 : i + 4 : 2]) for i in range(0, len(rounds), 4)]
    # Another begins each time.
    assert passes == [("a", "b") if i % 2 == 0 else ("b", "a") for i in range(measure.FEWEST)]
    # The other row of the group was timed with it.
    assert measure.is_timed(group.items["b"])
    calls = len(group.log)
    group.measure("b")
    assert len(group.log) == calls
    assert group.rounds == {"a": [1.0] * measure.FEWEST, "b": [2.0] * measure.FEWEST}


def test_rows_with_fewer_rounds_are_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})
    monkeypatch.setattr(measure._Turns, "_rounds", _rounds({"a": 12, "b": 3}))
    group.measure("a")
    rows = [name for name in group.log if name != "ceiling"]
    assert rows.count("a") == 12
    gaps = [i for i, name in enumerate(rows) if name == "b"]
    assert len(gaps) == 3
    assert max(b - a for a, b in itertools.pairwise(gaps)) <= 6


def _rounds(of: dict[str, int]) -> Callable[..., int]:
    def rounds(self: Any, name: str, row: Any) -> int:
        self.times[name], self.ceilings[name] = [], []
        self._amounts[name], self._peaks[name] = (row.amount, row.ceiling.amount), None
        self._one[name] = 0.0
        return of[name]

    return rounds


def test_the_clocks_of_the_gpu_are_asked_for_amid_the_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})
    monkeypatch.setattr(measure, "CLOCKS", [])
    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda"))

    class Asked:
        def __init__(self) -> None:
            group.log.append("asked")

        def answer(self) -> dict[str, str]:
            group.log.append("answer")
            return {"clocks.sm": "1980 MHz"}

    monkeypatch.setattr(measure, "Asked", Asked)
    group.measure("a")
    group.measure("b")
    # After the calls that prepare, two for each row and its ceiling, and the first pass.
    assert group.log.index("asked") == 6 + 4
    assert group.log[-1] == "answer"
    assert group.log.count("asked") == 1
    assert measure.CLOCKS == [{"clocks.sm": "1980 MHz"}]


def test_each_call_takes_the_next_copy_and_the_ceiling_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "how_many", lambda nbytes: 3)
    group = Group(monkeypatch, {"a": 1.0, "b": 1.0, "ceiling": 1.0})
    made = itertools.count()
    pool = copies.Copies(lambda: next(made), 100)
    calls = []

    def prepare(name: str) -> Any:
        ceiling = pool.ceiling(
            lambda at: measure.Ceiling("copy", lambda: calls.append(at) or 1.0, 100)
        )

        def of_copy(at: int) -> copies.Prepared:
            return (lambda given: calls.append(given) or 1.0), lambda: (at,)

        return measure.Timed(*pool.in_turn(of_copy), ceiling, 50)

    group.measure("a", prepare)
    assert len(calls) >= 4 * measure.FEWEST
    assert calls == [(i + 1) % 3 for i in range(len(calls))]


def test_what_is_found_is_told_by_the_ceiling_of_the_same_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch, {"a": 0.0, "ceiling": 0.0})
    times = iter([9.0, 9.0, 9.0, 1.0, 4.0, 2.0, 8.0, 3.0, 6.0])
    # Not counted: one for memory, one ceiling and one round.
    monkeypatch.setattr(group, "call", lambda name: next(times))
    found = group.measure("a", full=False)
    assert (found.ceiling_seconds, found.median, found.amount) == (2.0, 6.0, 50)
    # Half of the ceiling's amount, in four times, four times and twice its time of the round.
    assert found.fraction == 0.5 / 4


def test_a_wrong_row_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})

    def prepare(name: str) -> Any:
        if name == "b":
            raise WrongResultError("b, out: error 1, allowed 0")
        return group.prepare(name)

    assert group.measure("a", prepare, "b").median == 1.0
    with pytest.raises(WrongResultError, match="allowed 0"):
        group.measure("b", prepare, "b")  # a peer's wrong result is a failure too
    assert group.log.count("b") == 0


def test_a_peer_that_cannot_run_is_named_and_ours_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})

    def prepare(name: str) -> Any:
        raise RuntimeError(f"no kernel for {name}\nand more")

    with pytest.raises(pytest.skip.Exception):
        group.measure("b", prepare, "b")
    assert measure.REASONS == {"group, b": "RuntimeError: no kernel for b"}
    with pytest.raises(RuntimeError, match="no kernel for a"):
        group.measure("a", prepare, "b")


@pytest.mark.parametrize("peers", [(), ("b",)])
def test_a_row_that_raises_amid_the_rounds_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, peers: tuple[str, ...]
) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})
    call = group.call

    def raises(name: str) -> float:
        if name == "b" and group.log.count("b") == 4:
            raise RuntimeError("an illegal address")
        return call(name)

    monkeypatch.setattr(group, "call", raises)
    assert group.measure("a", None, *peers).median == 1.0
    assert group.rounds["a"] == [1.0] * measure.FEWEST
    assert gc.isenabled()
    with pytest.raises(pytest.skip.Exception if peers else RuntimeError, match="illegal address"):
        group.measure("b", None, *peers)
    assert group.log.count("b") == 4


def test_a_row_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "ceiling": 3.0})

    def prepare(name: str) -> Any:
        measure.require_memory(2**60)
        return group.prepare(name)

    with pytest.raises(pytest.skip.Exception):
        group.measure("a", prepare)
    assert measure.REASONS["group, a"].startswith("needs 1152921505 GB, ")
    measure.require_memory(1)


def test_a_backend_of_another_device_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, serves in (("cpu", "cuda"), ("cuda", "cpu")):
        row = {"name": "native", "missing": None, "devices": [serves]}
        monkeypatch.setattr(ropes, "DEVICE", torch.device(kind))
        monkeypatch.setattr(ropes.backends, "table", lambda row=row: [row])
        assert ropes.backend_missing("native") == f"serves {serves} only"
        assert decodes.missing.__wrapped__("native, paged") == f"serves {serves} only"


# --------------------------------------------------------------------------------------- the budget


class Budget(Group):
    """Calls advance the clock by their seconds, which ends with ``deadline``."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], deadline: float
    ) -> None:
        super().__init__(monkeypatch, seconds)
        self.now = 0.0
        time = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(measure, "time", time)
        monkeypatch.setattr(measure, "deadline", deadline)
        monkeypatch.setattr(measure, "_took", {})

    def call(self, name: str) -> float:
        self.now += self.seconds[name]
        return super().call(name)

    def timed(self, name: str) -> Any:
        """A skipped row fails the test."""
        try:
            return self.measure(name)
        except pytest.skip.Exception as skipped:
            pytest.fail(f"{name}: {skipped}")


# A call for the memory and a round after its ceiling, for "a" and "b".
PREPARED = 1.0 + 4.0 + 2.0 + 5.0
FEWEST = measure.FEWEST * (4.0 + 5.0)  # seconds of the fewest rounds of both


def test_a_row_whose_fewest_rounds_do_not_fit_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Budget(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0}, PREPARED + FEWEST - 1)
    assert group.timed("a").median == 1.0
    assert group.rounds["a"] == [1.0] * measure.FEWEST
    with pytest.raises(pytest.skip.Exception):
        group.measure("b")
    assert measure.REASONS == {"group, b": measure.SPENT}
    assert group.now == PREPARED + 4.0 * measure.FEWEST


def test_rounds_are_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wanted are 10 and 8 rounds, 35 s more than the fewest; the half of that is left.
    deadline = PREPARED + FEWEST + 17.5
    group = Budget(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0}, deadline)
    group.seconds_a_row = 40.0
    group.timed("a")
    group.timed("b")
    assert {name: len(times) for name, times in group.rounds.items()} == {"a": 7, "b": 6}
    assert group.now <= deadline


def test_a_row_is_not_prepared_where_the_rounds_of_others_take_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Budget(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0}, 5 + 4.0 * measure.FEWEST + 1)
    group.timed("a")
    assert group.log.count("a") == 2 + measure.FEWEST
    assert group.log.count("b") == 0
    assert measure.is_timed(group.items["b"])


def test_a_row_cut_off_before_its_fewest_rounds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Budget(monkeypatch, {"a": 1.0, "ceiling": 3.0}, 5 + 4.0 * measure.FEWEST)
    call = group.call

    def slower(name: str) -> float:
        group.seconds["a"] = 1.0 if len(group.log) < 6 else 30.0
        return call(name)

    monkeypatch.setattr(group, "call", slower)
    with pytest.raises(pytest.skip.Exception):
        group.measure("a")
    assert 2 < group.log.count("a") < 2 + measure.FEWEST
    assert measure.REASONS == {"group, a": measure.SPENT}


def test_a_group_is_not_begun_that_will_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Budget(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0}, 1000.0)
    first = group.items["a"]
    assert measure.fits(first, 500.0)  # two rows, of which nothing is known
    assert not measure.fits(first, 500.1)
    assert not measure.is_timed(first)
    group.timed("a")
    other = _of_size(group, tokens=10)
    for left, fits in ((PREPARED + FEWEST, True), (PREPARED + FEWEST - 1, False)):
        group.now = 1000.0 - left
        assert measure.fits(first, 500.1) is fits
        group.now = 1000.0 - 10 * left  # ten times the tokens
        assert measure.fits(other, 500.1) is fits
    monkeypatch.setattr(measure, "deadline", math.inf)
    assert measure.fits(other, 1e9)


def _of_size(group: Group, tokens: int) -> Any:
    """Such rows of as many tokens; the first of them."""
    session = SimpleNamespace(items=[])
    for name in group.items:
        spec = SimpleNamespace(params={"name": name, "tokens": tokens})
        session.items.append(SimpleNamespace(callspec=spec, function="f", session=session))
    return session.items[0]


# ---------------------------------------------------------------------------------------- the rows


def test_geometries_are_those_of_the_models() -> None:
    published = published_configs()
    for geometry, name in (
        (parameters.PHI3, "phi-3-mini-128k"),
        (parameters.PHI4, "phi-4-mini"),
    ):
        of = next(config for key, config in published.items() if key.startswith(name))
        dim = of["hidden_size"] // of["num_attention_heads"]
        assert (geometry.q_heads, geometry.k_heads, geometry.dim, geometry.rotated) == (
            *(of["num_attention_heads"], of["num_key_value_heads"], dim),
            int(dim * of["partial_rotary_factor"]),
        )


KINDS = ("ceilings", "rotary", "decode", "attention")


def test_the_least_important_rows_come_last() -> None:
    status, told = forked.run("benchmarks", "--collect-only", "-q", "--benchmark-only")
    assert status == 0
    rows = [line for line in told.splitlines() if "::" in line]
    assert all("test_ceilings" in row for row in rows[:2])
    other = [i for i, row in enumerate(rows) if any(x.name in row for x in parameters.OTHERS)]
    usual = [i for i, row in enumerate(rows) if "forward-S4096-bfloat16-clone" in row]
    longest = [i for i, row in enumerate(rows) if "S131072" in row]
    assert max(usual) < min(other) < max(other) < len(rows)
    assert max(usual) < min(longest)
    # And of the most important ones those of attention, which take longest.
    first = [next(i for i, x in enumerate(rows) if f"test_{name}.py" in x) for name in KINDS]
    assert first == sorted(first)
    assert max(usual) < first[KINDS.index("attention")]


# --------------------------------------------------------------------------------------- host time


@pytest.mark.parametrize("name", [n for n in host_rows.NAMES if n not in host_rows.STANDING_IN])
def test_rows_of_host_time_are_many_calls_of_one_token(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    timed = host_rows.prepared(name)
    assert timed.amount == host_rows.CALLS
    calls = []
    inner = host_rows.native.rotary, host_rows.native.decode

    def spy(index: int) -> Callable[..., None]:
        def call(of: Any, *out: torch.Tensor) -> None:
            calls.append(index)
            assert of.q.shape == (1, 1, host_rows.HEADS, host_rows.DIM)
            assert (index == 0 and out[0] is of.q) == (name == host_rows.INPLACE)
            inner[index](of, *out)

        return call

    monkeypatch.setattr(host_rows.native, "rotary", spy(0))
    monkeypatch.setattr(host_rows.native, "decode", spy(1))
    timed.run(*timed.arguments())
    expected = [] if name == host_rows.ADD else [int(name == host_rows.DECODE)] * host_rows.CALLS
    assert calls == expected


@pytest.mark.parametrize("name", [host_rows.FORWARD, host_rows.INPLACE, host_rows.DECODE])
def test_a_wrong_row_of_host_time_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    part = "decode" if name == host_rows.DECODE else "rotary"
    monkeypatch.setattr(host_rows.native, part, lambda *_: None)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    with pytest.raises(WrongResultError, match=f"{name}, q: error"):
        host_rows.prepared(name)


# ------------------------------------------------------------------------------- chunks of a prompt


@pytest.mark.parametrize("name", ["composed", "SDPA flash, no rotation"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_chunk_is_the_last_queries_of_a_prompt(direction: str, name: str) -> None:
    """Held to the truth by the check that every row passes; its work is that of what it sees."""
    shape = attentions.Shape(64, 32, True, queries=32)
    assert attentions.serves(name, shape, direction)
    assert not attentions.serves(attentions.EAGER, shape, direction)
    whole = attentions.Shape(64, 32, True)
    seen = sum(64 - 32 + i + 0.5 for i in range(32))  # half of its own key
    assert shape.flops("forward") == 4 * 32 * 32 * seen
    assert shape.flops("forward") < whole.flops("forward")
    dtype = "" if torch.cuda.is_available() else ", float32"
    assert str(shape) == f"S = last 32 of 64, d = 32, causal{dtype}"
    inputs = attentions.Inputs(shape)
    assert (inputs.q.shape[1], inputs.k.shape[1]) == (32, 64)
    run, arguments = attention_rows._prepared(direction, name, inputs)
    run(*arguments())


def test_padded_queries_are_a_chunk_by_the_mask_that_begins_at_the_first_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN wants a GPU; the formulation does not."""
    name = attentions.PADDED
    assert attentions.serves(name, attentions.Shape(64, 32, True, queries=32), "forward")
    assert not attentions.serves(name, attentions.Shape(64, 32, True), "forward")
    monkeypatch.setitem(attentions.SDPA, name, SDPBackend.MATH)
    inputs = attentions.Inputs(attentions.Shape(64, 32, True, queries=32))
    attention_rows._prepared("forward", name, inputs)


def test_keys_rotated_alone_are_held_to_that(monkeypatch: pytest.MonkeyPatch) -> None:
    name = attentions.K_ALONE
    shape = attentions.Shape(64, 32, True)
    assert attentions.serves(name, shape, "forward")
    assert not attentions.serves(name, shape, "backward")
    assert not attentions.serves(name, shape._replace(queries=32), "forward")
    monkeypatch.setitem(attentions.SDPA, name, SDPBackend.MATH)
    inputs = attentions.Inputs(shape)
    attention_rows._prepared("forward", name, inputs)
    inputs.turned_keys = inputs.unturned  # type: ignore[misc]
    with pytest.raises(WrongResultError, match=name):
        attention_rows._prepared("forward", name, inputs)
    inputs.turned_keys = inputs.turned  # type: ignore[misc]
    with pytest.raises(WrongResultError, match=name):
        attention_rows._prepared("forward", name, inputs)


def test_the_longest_kernel_is_told_by_all_of_its_calls() -> None:
    def event(name: str, us: float, device: str = "CUDA") -> Any:
        kind = getattr(torch.autograd.DeviceType, device)
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=span)

    events = [event("cudnn", 4), event("rotary", 3), event("rotary", 2), event("host", 99, "CPU")]
    assert profiles.longest(events) == "rotary"
    assert profiles.longest([]) is None
