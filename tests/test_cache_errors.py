"""Misuse: the right exception, naming the argument, what came and what is expected; no change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_cases import (
    DIM,
    KV_HEADS,
    ROPE,
    Cache,
    Maker,
    assert_same_state,
    bf16,
    dense,
    every_cache,
    fp8,
    fp64,
    state,
    tokens,
)

from longrope_kernels import KVCache, PagedKVCache, Rope

Call = Callable[[Cache], object]


def bad(
    name: str, error: type[Exception], says: str, call: Call, before: Call = lambda _: None
) -> Any:
    return pytest.param(error, says, before, call, id=name)


def extend(count: int) -> Call:
    return lambda cache: cache.extend(count)


def write(*shape: int, v: tuple[int, ...] | None = None, **kwargs: Any) -> Call:
    return lambda cache: cache.write(
        torch.randn(shape, dtype=fp64), torch.randn(v or shape, dtype=fp64), **kwargs
    )


def one(**kwargs: Any) -> Call:
    return lambda cache: cache.append(*tokens(3, 1), **kwargs)


HEADS = (KV_HEADS, DIM)
STEPS = [
    bad("count-negative", ValueError, r"counts: expected from 0.*got -1", lambda c: c.extend(-1)),
    bad("q-rows", ValueError, r"q: expected 3 rows.*\(2, 1", lambda c: c.decode(tokens(2, 1)[0])),
    bad("count-bool", TypeError, r"counts: .*got True", lambda c: c.extend(True)),
    bad("count-float", TypeError, r"counts: .*got 1\.0", lambda c: c.extend([1.0, 1, 1])),
    bad("count-tensor", TypeError, "counts: .*tensor", lambda c: c.extend(torch.tensor([1, 1, 1]))),
    bad("counts-few", ValueError, r"counts: .*3 rows, got \[1, 1\]", lambda c: c.extend([1, 1])),
    bad("counts-rows", ValueError, r"counts: .*1 rows, got", lambda c: c.extend([1, 1], [0])),
    bad("row-unknown", ValueError, "rows: expected from 0 to 2, got 3", lambda c: c.extend(1, [3])),
    bad("row-negative", ValueError, "rows: .*got -1", lambda c: c.extend(1, [-1])),
    bad("row-int", TypeError, "rows: expected a sequence.*got 1", lambda c: c.extend(1, 1)),
    bad("row-bool", TypeError, "rows: .*got True", lambda c: c.extend(1, [True])),
    bad("rows-twice", ValueError, r"rows: .*once, got \[1, 1\]", lambda c: c.extend(1, [1, 1])),
    bad("append-row-unknown", ValueError, "rows: .*got 3", one(rows=[0, 1, 3])),
    bad("append-count", ValueError, r"k: expected 3 rows of 2 tokens", one(counts=2)),
    bad("append-rows", ValueError, r"k: expected 2 rows of 1 tokens", one(rows=[0, 2])),
    bad(
        "append-packed",
        ValueError,
        r"counts: .*packed.*None",
        lambda c: c.append(*tokens(3)),
    ),
    bad(
        "append-packed-sum",
        ValueError,
        r"k: expected 4 tokens.*got shape \(3, 2, 12\)",
        lambda c: c.append(*tokens(3), [1, 1, 2]),
    ),
]
ROWS = [
    bad(
        "truncate-longer", ValueError, "length: .*most 5.*row 0, got 6", lambda c: c.truncate(0, 6)
    ),
    bad("truncate-negative", ValueError, "length: .*got -1", lambda c: c.truncate(0, -1)),
    bad("truncate-float", TypeError, "length: .*got 1.5", lambda c: c.truncate(0, 1.5)),
    bad("truncate-unknown", ValueError, "row: expected.*got 7", lambda c: c.truncate(7, 0)),
    bad("free-unknown", ValueError, "row: expected from 0 to 2, got -1", lambda c: c.free(-1)),
    bad("fork-itself", ValueError, "target: .*got 2 for both", lambda c: c.fork(2, 2)),
    bad("fork-full", ValueError, "target: .*row 1 of 3 tokens", lambda c: c.fork(0, 1)),
    bad("fork-unknown", ValueError, "source: .*got 3", lambda c: c.fork(3, 2)),
    bad("fork-to-unknown", ValueError, "target: .*got 3", lambda c: c.fork(0, 3)),
    bad("pin-full", ValueError, "row: .*empty.*row 0 of 5", lambda c: c.pin(0, length=5)),
    bad("pin-unknown", ValueError, "row: .*got 3", lambda c: c.pin(3, length=5)),
    bad("pin-nothing", ValueError, "length: .*either", lambda c: c.pin(2)),
    bad("pin-both", ValueError, "length: .*either", lambda c: c.pin(2, length=5, set_index=0)),
    bad("pin-set", ValueError, "set_index: .*0 to 2, got 3", lambda c: c.pin(2, set_index=3)),
    bad("pin-length", ValueError, "length: .*got 0", lambda c: c.pin(2, length=0)),
    bad("pin-too-long", ValueError, "length: .*got 1000000", lambda c: c.pin(2, length=10**6)),
    bad("gather-unknown", ValueError, "row: .*got 3", lambda c: c.gather(3)),
    bad("layer-unknown", ValueError, "layer: .*0 to 0, got 1", lambda c: c.k(1)),
    bad("decode-layer", ValueError, "layer: .*got -1", lambda c: c.decode(torch.ones(1), -1)),
]
WRITES = [
    bad("nothing-extended", RuntimeError, "k: expected an extend", write(3, 1, *HEADS)),
    bad("too-many", ValueError, "k: expected 3 rows of 1", write(3, 2, *HEADS), extend(1)),
    bad("too-few", ValueError, "k: expected 3 rows of 2", write(3, 1, *HEADS), extend(2)),
    bad("rows", ValueError, r"k: .*got shape \(2, 1", write(2, 1, *HEADS), extend(1)),
    bad("packed", ValueError, "k: expected 6 tokens", write(5, *HEADS), extend(2)),
    bad("rank", ValueError, "k: expected shape", write(KV_HEADS, DIM), extend(1)),
    bad("heads", ValueError, r"k: .*\(tokens, 2, 12\)", write(3, 1, 1, DIM), extend(1)),
    bad("dim", ValueError, r"k: .*got \(3, 1, 2, 8\)", write(3, 1, 2, 8), extend(1)),
    bad("v", ValueError, "v: .*shape of k", write(3, 1, *HEADS, v=(3, *HEADS)), extend(1)),
    bad("layer", ValueError, "layer: .*0 to 0, got 1", write(3, 1, *HEADS, layer=1), extend(1)),
    bad(
        "dtype",
        TypeError,
        "k: expected float64, got torch.bfloat16",
        lambda c: c.write(*tokens(3, 1, dtype=bf16)),
        extend(1),
    ),
    bad(
        "v-dtype",
        TypeError,
        "v: expected float64, got torch.bfloat16",
        lambda c: c.write(tokens(3, 1)[0], tokens(3, 1, dtype=bf16)[1]),
        extend(1),
    ),
    bad(
        "device",
        ValueError,
        "k: expected the device of the cache, cpu, got meta",
        lambda c: c.write(*(x.to("meta") for x in tokens(3, 1))),
        extend(1),
    ),
    bad("list", TypeError, "k: expected a tensor", lambda c: c.write([1.0], [1.0]), extend(1)),
]


MISUSE = [*STEPS, *ROWS, *WRITES]


def assert_refused(make: Maker, error: type[Exception], says: str, first: Call, call: Call) -> None:
    cache = make(policy="pin")
    cache.append(*tokens(8), (5, 3, 0))
    cache.truncate(1, 2)
    cache.append(*tokens(1), [1], rows=[1])
    cache.fork(0, 2)
    cache.free(2)
    first(cache)
    before = state(cache)
    with pytest.raises(error, match=says):
        call(cache)
    assert_same_state(cache, before)


@pytest.mark.parametrize(("error", "says", "first", "call"), MISUSE)
def test_misuse_changes_nothing(error: type[Exception], says: str, first: Call, call: Call) -> None:
    assert_refused(dense, error, says, first, call)


@every_cache
def test_every_cache_refuses_alike(make: Maker) -> None:
    for case in MISUSE:
        assert_refused(make, *case.values)


@every_cache
def test_append_of_its_own_keys(make: Maker) -> None:
    """Found before there is room for them."""
    cache = make(policy="pin")
    cache.append(*tokens(3, 4))
    before = state(cache)
    k, v = (x.flatten(0, -3)[:3, None] for x in (cache.k(), cache.v()))
    with pytest.raises(ValueError, match="k: overlaps k_cache in memory"):
        cache.append(k, v)
    assert_same_state(cache, before)


@every_cache
def test_append_is_for_one_layer(make: Maker) -> None:
    with pytest.raises(ValueError, match="layers: expected 1 for append, got 2"):
        make(policy="switch", layers=2).append(*tokens(3, 1))


@every_cache
@pytest.mark.parametrize("end", ["truncate", "free", "fork", "pin", "reset"])
def test_what_comes_between_ends_a_step(make: Maker, end: str) -> None:
    """Rows that have changed since could not take the tokens."""
    cache = make(policy="pin")
    cache.extend((2, 1, 0))
    {
        "truncate": lambda: cache.truncate(0, 1),
        "free": lambda: cache.free(1),
        "fork": lambda: cache.fork(0, 2),
        "pin": lambda: cache.pin(2, length=5),
        "reset": lambda: cache.reset(),
    }[end]()
    assert bool((cache._newest == -1).all())
    with pytest.raises(RuntimeError, match="k: expected an extend"):
        cache.write(*tokens(3, 2))


def test_switch_cannot_pin() -> None:
    cache = KVCache(ROPE, 1, 4, KV_HEADS, DIM, policy="switch")
    with pytest.raises(ValueError, match=r"policy: expected 'pin' or 'recompute'.*'switch'"):
        cache.pin(0, length=3)


def test_recompute_pins_by_length() -> None:
    cache = KVCache(ROPE, 1, 4, KV_HEADS, DIM, policy="recompute")
    with pytest.raises(ValueError, match="set_index: expected length"):
        cache.pin(0, set_index=0)


BOTH = [
    ({"rope": None}, TypeError, "rope: expected a Rope, got NoneType"),
    ({"policy": None}, ValueError, "policy: .*switch, pin, recompute.*3 factor sets, got None"),
    ({"policy": "free"}, ValueError, "policy: .*got 'free'"),
    ({"rope": Rope.plain(DIM), "policy": "free"}, ValueError, "policy: .*got 'free'"),
    ({"batch": 0}, ValueError, "batch: expected from 1 .*got 0"),
    ({"kv_heads": 0}, ValueError, "kv_heads: .*got 0"),
    ({"head_dim": 4}, ValueError, "head_dim: expected from 6 .*got 4"),
    ({"layers": 0}, ValueError, "layers: .*got 0"),
    ({"layers": 1.0}, TypeError, r"layers: .*got 1\.0"),
    ({"dtype": torch.int8}, TypeError, "dtype: .*got torch.int8"),
    ({"dtype": "float32"}, TypeError, "dtype: expected float32.*got 'float32'"),
    ({"device": "gpu"}, ValueError, "device: expected one that is here, got 'gpu': "),
    ({"device": 1.5}, ValueError, "device: .*got 1.5"),
    ({"dtype": torch.float8_e5m2}, TypeError, "dtype: .*got torch.float8_e5m2"),
    ({"k_scale": torch.ones(2)}, ValueError, "k_scale: .*float8_e4m3fn only, got"),
    ({"dtype": fp8, "k_scale": 1.0}, TypeError, "k_scale: expected a tensor"),
    ({"dtype": fp8, "v_scale": torch.ones(3)}, ValueError, r"v_scale: .*\(2,\) or \(1, 2\), got"),
    ({"dtype": fp8, "v_scale": torch.zeros(2)}, ValueError, "v_scale: .*above 0"),
    ({"dtype": fp8, "k_scale": torch.ones(2).half()}, TypeError, "k_scale: expected float32"),
]
DENSE = [({"capacity": 0}, ValueError, "capacity: .*got 0")]
PAGED = [
    ({"blocks": 0}, ValueError, "blocks: .*got 0"),
    ({"block_size": 16.0}, TypeError, "block_size: expected a whole number, got 16.0"),
    ({"block_size": 17}, ValueError, "block_size: expected one of 16, 32, 64, 128, 256, got 17"),
    ({"max_length": 0}, ValueError, "max_length: .*got 0"),
]


def assert_not_made(
    cls: type[Cache], change: dict[str, Any], error: type[Exception], says: str
) -> None:
    size = {"capacity": 4} if cls is KVCache else {"blocks": 2, "block_size": 16}
    good = {"rope": ROPE, "batch": 2, **size, "kv_heads": 2, "head_dim": 12, "policy": "pin"}
    cls(**good)
    with pytest.raises(error, match=says):
        cls(**{**good, **change})


@pytest.mark.parametrize(("change", "error", "says"), [*BOTH, *DENSE])
def test_bad_caches(change: dict[str, Any], error: type[Exception], says: str) -> None:
    assert_not_made(KVCache, change, error, says)


def test_bad_paged_caches() -> None:
    for case in (*BOTH, *PAGED):
        assert_not_made(PagedKVCache, *case)
