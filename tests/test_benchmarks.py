"""benchmarks/: rows are timed in turns, wrong ones fail, missing ones are named, peers are asked
for what they document."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longrope_kernels import Rope, apply_rotary, attention
from longrope_kernels.published import published_configs

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import attentions
import clock
import decodes
import measure
import memory
import parameters
import rotations
from ropes import WrongResultError

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------- turns


class Group:
    """Rows of a group without pytest-benchmark: ``seconds`` of each call, by what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.log: list[str] = []
        self.seconds = seconds
        self.rounds: dict[str, list[float]] = {}
        session = SimpleNamespace(items=[])
        for name in (name for name in seconds if name != "ceiling"):
            spec = SimpleNamespace(params={"name": name, "size": 1})
            session.items.append(SimpleNamespace(callspec=spec, function="f", session=session))
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
        return measure.measure(benchmark, request, prepare or self.prepare, peers, 0.0)


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
        return of[name]

    return rounds


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


def test_a_row_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "ceiling": 3.0})

    def prepare(name: str) -> Any:
        measure.require_memory(2**60)
        return group.prepare(name)

    with pytest.raises(pytest.skip.Exception):
        group.measure("a", prepare)
    assert measure.REASONS["group, a"].startswith("needs 1152921505 GB, ")
    measure.require_memory(1)


def test_what_the_budget_cuts_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, {"a": 1.0, "b": 2.0, "ceiling": 3.0})
    now = iter([0, 1, 2, 3, 4, 99])  # before each row, then before each pass
    monotonic = SimpleNamespace(monotonic=lambda: next(now), perf_counter=time.perf_counter)
    monkeypatch.setattr(measure, "time", monotonic)
    monkeypatch.setattr(measure, "deadline", 3.5)
    assert group.measure("a").median == 1.0
    assert len(group.rounds["a"]) == 2  # of more that were wanted

    monkeypatch.setattr(measure, "_turns", None)
    now = iter([0, 4, 4])
    with pytest.raises(pytest.skip.Exception):
        group.measure("a")  # checked, and no round was left
    with pytest.raises(pytest.skip.Exception):
        group.measure("b")
    assert list(measure.REASONS.items()) == [(f"group, {name}", measure.SPENT) for name in "ab"]


def test_memory_at_the_peak_is_seen() -> None:
    def run() -> None:
        x = torch.ones(2**24)
        x.clone().clone()

    peak = memory.peak_bytes(run)
    # Three tensors of 64 MiB, if the system tells.
    assert peak is None or 150 * 2**20 < peak < 300 * 2**20


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


def test_the_least_important_rows_come_last() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    command += ["--benchmark-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # Not those of the pytest around this one: under xdist it would refuse to time.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    rows = [line for line in done.stdout.splitlines() if "::" in line]
    assert all("test_ceilings" in row for row in rows[:2])
    other = [i for i, row in enumerate(rows) if any(x.name in row for x in parameters.OTHERS)]
    usual = [i for i, row in enumerate(rows) if "forward-S4096-bfloat16-native" in row]
    longest = [i for i, row in enumerate(rows) if "S131072" in row]
    assert max(usual) < min(other) < max(other) < len(rows)
    assert max(usual) < min(longest)


# ------------------------------------------------------------------------------------------- peers
#
# What their documentation says they do, with their signatures, in float32 on the CPU: that our
# rows ask for the right thing. Nothing here is ever timed.


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def install(**modules: dict[str, Any]) -> None:
        for path, names in modules.items():
            path = path.replace("__", ".")
            parts = path.split(".")
            for i in range(1, len(parts)):
                parent = ".".join(parts[:i])
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            module = types.ModuleType(path)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, path, module)

    yield install
    rotations.make_inputs.cache_clear()
    attentions.make_inputs.cache_clear()
    decodes.make_inputs.cache_clear()


class Mask:
    """xformers' BlockDiagonalCausalWithOffsetPaddedKeysMask, what it is made of."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_padding: int,
        kv_seqlen: list[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Mask:
        mask = cls()
        mask.q, mask.padding, mask.kv = q_seqlen, kv_padding, kv_seqlen
        return mask


def rope_padded(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    attn_bias: Any,
    *,
    theta: float = 10000.0,
    adjacents: bool = True,
) -> torch.Tensor:
    (count,), (total,) = attn_bias.q, attn_bias.kv
    assert xq.shape[1] == xk.shape[1] == count
    assert cache_k.shape[1] == attn_bias.padding
    positions = torch.arange(total - count, total)
    rope = Rope.plain(xq.shape[3], base=theta, interleaved=adjacents)
    q, k = apply_rotary(xq, xk, positions, rope, backend="reference")
    cache_k[:, total - count : total] = k
    cache_v[:, total - count : total] = xv
    return q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_xformers_is_asked_for_a_cache_of_rotated_keys(
    on_cpu: Callable[..., None], dtype: torch.dtype
) -> None:
    on_cpu(
        xformers__ops={"rope_padded": rope_padded},
        xformers__ops__fmha__attn_bias={"BlockDiagonalCausalWithOffsetPaddedKeysMask": Mask},
    )
    inputs = rotations.make_inputs(40, dtype, parameters.LLAMA)
    test_rotary = import_module("test_rotary")
    run, arguments = test_rotary._prepared_cache_write(rotations.XFORMERS, inputs)
    q, k, v = run(*arguments())
    assert (q.shape, k.shape, v.shape) == (inputs.q.shape, inputs.k.shape, inputs.v.shape)


def test_a_wrong_cache_is_not_timed(on_cpu: Callable[..., None]) -> None:
    def forgets(*args: Any, **kwargs: Any) -> torch.Tensor:
        cache_v = args[4].clone()
        q = rope_padded(*args, **kwargs)
        args[4].copy_(cache_v)
        return q

    on_cpu(
        xformers__ops={"rope_padded": forgets},
        xformers__ops__fmha__attn_bias={"BlockDiagonalCausalWithOffsetPaddedKeysMask": Mask},
    )
    inputs = rotations.make_inputs(40, torch.bfloat16, parameters.LLAMA)
    with pytest.raises(WrongResultError, match="v: error"):
        import_module("test_rotary")._prepared_cache_write(rotations.XFORMERS, inputs)


def by_table(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """flashinfer.rope.apply_rope_with_cos_sin_cache."""
    assert cos_sin_cache.dtype == torch.float32
    assert is_neox
    rotated = cos_sin_cache.shape[1]
    cos, sin = (x[:, None] for x in cos_sin_cache[positions].chunk(2, -1))

    def rotate(flat: torch.Tensor) -> torch.Tensor:
        x = flat.view(flat.shape[0], -1, head_size).float()
        a, b, rest = x.split([rotated // 2, rotated // 2, head_size - rotated], -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
        return out.flatten(1).to(flat.dtype)

    return rotate(query), rotate(key)


def by_table_inplace(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any
) -> None:
    for x, y in zip((query, key), by_table(positions, query, key, *rest), strict=True):
        x.copy_(y)


@pytest.mark.parametrize("direction", ["forward", "in place"])
@pytest.mark.parametrize("geometry", [parameters.LLAMA, parameters.PHI4], ids=lambda g: g.name)
def test_flashinfer_is_asked_for_our_rotation(
    on_cpu: Callable[..., None], direction: str, geometry: Any
) -> None:
    names = {"apply_rope_with_cos_sin_cache": by_table}
    names["apply_rope_with_cos_sin_cache_inplace"] = by_table_inplace
    on_cpu(flashinfer__rope=names)
    inputs = rotations.make_inputs(40, torch.bfloat16, geometry)
    test_rotary = import_module("test_rotary")
    test_rotary._prepared(direction, "flashinfer", inputs)


def llama(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, theta: float
) -> torch.Tensor:
    """Attention of the last queries to all keys, rotated by plain RoPE."""
    positions = torch.arange(k.shape[0])
    return attention(  # type: ignore[return-value]
        *(x[None] for x in (q, k, v)),
        positions[-q.shape[0] :],
        Rope.plain(q.shape[2], base=theta),
        key_positions=positions,
        causal=causal,
        backend="reference",
    )[0]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    rope_theta: float | None = None,
) -> torch.Tensor:
    assert (kv_layout, pos_encoding_mode) == ("NHD", "ROPE_LLAMA")
    return llama(q, k, v, causal, rope_theta or 1e4)


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    *,
    rope_theta: float | None = None,
) -> torch.Tensor:
    assert (kv_layout, pos_encoding_mode) == ("NHD", "ROPE_LLAMA")
    return llama(q[None], k, v, True, rope_theta or 1e4)[0]


@pytest.mark.parametrize("causal", [True, False])
def test_flashinfer_is_asked_for_prefill_by_plain_rope(
    on_cpu: Callable[..., None], causal: bool
) -> None:
    on_cpu(flashinfer={"single_prefill_with_kv_cache": single_prefill_with_kv_cache})
    test_attention = import_module("test_attention")
    inputs = attentions.make_inputs(attentions.Shape(64, 64, causal))
    run, arguments = test_attention._prepared("forward", attentions.FLASHINFER, inputs)
    assert run(*arguments()).shape == inputs.q.shape
    with pytest.raises(WrongResultError):  # which is not the rotation of the other rows
        test_attention._check_rows("x", "out", run(*arguments()), inputs.turned.out, inputs)


def test_flashinfer_is_asked_for_decoding_by_plain_rope(on_cpu: Callable[..., None]) -> None:
    on_cpu(flashinfer={"single_decode_with_kv_cache": single_decode_with_kv_cache})
    inputs = decodes.make_inputs(decodes.Shape((70,), torch.bfloat16))
    out = decodes.implementation(decodes.FLASHINFER, inputs)()
    right = inputs.plain_truth
    assert out.shape == inputs.q.shape
    error = (out[:, :, inputs.q_heads].double() - right).abs().max() / right.abs().max()
    assert error <= decodes.allowed(decodes.FLASHINFER, inputs)
    assert not torch.allclose(right, inputs.truth, atol=1e-3)


@pytest.mark.parametrize("name", ["SDPA math, no rotation", "SDPA flash, no rotation"])
def test_kernels_of_sdpa_attend_without_rotation(name: str) -> None:
    inputs = attentions.make_inputs(attentions.Shape(64, 64, True))
    import_module("test_attention")._prepared("backward", name, inputs)
