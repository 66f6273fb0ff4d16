"""`warmup`: what it calls, and what it refuses; what is compiled after it: launches_warmup.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longrope_kernels import KVCache, Rope, warmup
from longrope_kernels.backends import choose

TWO = Rope.longrope([1.0] * 8, [2.0] * 8, 4096, 8192)
SIZES = (4, 2, 32)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls that come to a backend, and with what."""
    seen: list[tuple[str, Any]] = []
    part = choose.part

    class Watched:
        def __init__(self, backend: str, name: str) -> None:
            self.module = part(backend, name)

        def __getattr__(self, name: str) -> Any:
            function = getattr(self.module, name)
            if name not in ("rotary", "append", "decode"):
                return function

            def call(of: Any, *rest: Any) -> Any:
                seen.append((name, of))
                return function(of, *rest)

            return call

    monkeypatch.setattr(choose, "part", lambda backend, name: Watched(backend, name))
    return seen


def test_a_step_is_rotated_written_and_decoded(called: list[tuple[str, Any]]) -> None:
    named = {"dtype": torch.float32, "device": "cpu", "backend": "native"}
    assert warmup(TWO, *SIZES, **named, batch=3, tokens=(1, 4, 40), capacity=64) is None
    shapes = {(name, tuple(of[0].shape)) for name, of in called}
    heads = {"rotary": 4, "append": 2, "decode": 4}
    assert shapes == {(name, (3, n, heads[name], 32)) for name in heads for n in (1, 4, 40)}
    rotated = [of for name, of in called if name == "rotary"]
    assert all(of.selection.lengths is not None for of in rotated)
    assert {of.positions.stride(0) for of in rotated} == {0, 1, 4, 40}
    decoded = [of for name, of in called if name == "decode"]
    assert [of.q.shape[1] for of in decoded] == [1, 4, 40]
    assert all(of.keys.k.shape == (3, 64, 2, 32) for of in decoded)


def test_a_paged_cache_has_the_table_of_its_capacity(called: list[tuple[str, Any]]) -> None:
    named = {"dtype": torch.float32, "device": "cpu", "policy": "pin", "window": 9}
    warmup(TWO, *SIZES, **named, capacity=100, block_size=16)
    keys, scores = next((of.keys, of.scores) for name, of in called if name == "decode")
    assert keys.block_table.shape == (1, 7)
    assert keys.k.shape == (1, 16, 2, 32)
    assert scores.window == 9
    assert all(of.selection.sets is not None for name, of in called if name != "append")


def test_prompts_are_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope_kernels.cache import warmup as module

    seen: list[tuple[int, ...]] = []
    inner = module.attention
    monkeypatch.setattr(
        module,
        "attention",
        lambda q, *rest, **named: seen.append(q.shape) or inner(q, *rest, **named),
    )
    warmup(Rope.plain(32), *SIZES, dtype=torch.float32, device="cpu", prompts=[5, 16])
    assert set(seen) == {(1, 5, 4, 32), (1, 16, 4, 32)}


def test_float8_caches_are_tried_with_scales_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: list[bool] = []
    inner = KVCache.decode

    def decode(self: KVCache, q: torch.Tensor, **named: Any) -> Any:
        assert self.dtype == FLOAT8
        scaled.append(self._k_scale is not None)
        return inner(self, q, **named)

    monkeypatch.setattr(KVCache, "decode", decode)
    named = {"device": "cpu", "dtype": torch.bfloat16, "backend": "reference"}
    warmup(Rope.plain(32), *SIZES, **named, capacity=16, cache_dtype=FLOAT8)
    assert scaled == [False, True]


def test_the_rope_is_on_the_device_afterwards() -> None:
    rope = Rope.plain(32)
    warmup(rope, *SIZES, dtype=torch.float32, device="cpu")
    assert torch.device("cpu") in rope._tables


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no rope": ({"rope": [1.0]}, TypeError, "rope: expected a Rope, got list"),
    "heads": ({"heads": 0}, ValueError, "heads: expected from 1"),
    "kv_heads": ({"kv_heads": 3}, ValueError, "kv_heads: expected heads that divide the 4 of q"),
    "head_dim": ({"head_dim": 8}, ValueError, "head_dim: expected from 16"),
    "batch": ({"batch": True}, TypeError, "batch: expected a whole number, got True"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype: expected float32, bfloat16"),
    "cache_dtype": (
        {"cache_dtype": torch.float16, "capacity": 8},
        TypeError,
        "cache_dtype: expected torch.float32, float8_e4m3fn or None, got torch.float16",
    ),
    "no capacity": ({"block_size": 16}, ValueError, "capacity: expected beside block_size"),
    "capacity": ({"capacity": 0}, ValueError, "capacity: expected from 1"),
    "tokens": ({"tokens": 65, "capacity": 64}, ValueError, "tokens: expected from 1 to 64, got 65"),
    "no tokens": ({"tokens": (), "capacity": 4}, ValueError, "tokens: expected at least one"),
    "tokens as text": ({"tokens": "1"}, TypeError, "tokens: expected a number of tokens"),
    "prompts": ({"prompts": [4, 0]}, ValueError, "prompts: expected from 1"),
    "block_size": ({"block_size": 15, "capacity": 64}, ValueError, "block_size: expected one of"),
    "policy": ({"policy": "often", "capacity": 64}, ValueError, "policy: expected"),
    "policy without a cache": ({"policy": "often"}, ValueError, "policy: expected"),
    "window": ({"window": 0}, ValueError, "window: expected at least 1"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0"),
    "sinks": ({"sinks": torch.zeros(4)}, TypeError, "sinks: expected True or False, got Tensor"),
    "device": ({"device": "nowhere"}, ValueError, "device: expected one that is here"),
    "backend": ({"backend": "fast"}, ValueError, "backend: expected one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_before_any_call(
    monkeypatch: pytest.MonkeyPatch, called: list[tuple[str, Any]], name: str
) -> None:
    named, error, message = WRONG[name]
    right = {"rope": TWO, "heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": torch.float32}
    with pytest.raises(error, match=f"^{message}"):
        warmup(**{**right, "device": "cpu", **named})
    assert called == []


def test_it_is_refused_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope_kernels.cache import warmup as module

    monkeypatch.setattr(module, "check_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warmup: a CUDA graph is being captured"):
        warmup(TWO, *SIZES)
