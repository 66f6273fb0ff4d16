"""benchmarks/spread.py: what it measures is right, and its parts run small."""

from __future__ import annotations

import pytest
import torch
from benchmark_modules import spread

SMALL = spread.Sizes(64, 16, 300, 128, (0, 31), 1, 64, 1, 2)


def test_processes_hold_the_same_keys_as_one() -> None:
    k, v = spread.cached(SMALL, 0, SMALL.keys)
    assert not torch.equal(k[0, 0], k[0, SMALL.period])  # shifted
    assert torch.equal(v[:, : -SMALL.period], k[:, SMALL.period :])
    for whole, part in zip((k, v), spread.cached(SMALL, 150, SMALL.keys), strict=True):
        assert torch.equal(part, whole[:, 150:])


@pytest.mark.parametrize("name", ["decode", "memory", "ring"])
@pytest.mark.full
def test_parts_run(name: str) -> None:
    functions = {"decode": spread.long_decode, "memory": spread.memory}
    functions["ring"] = spread.ring_beside_threads
    rows = functions[name](SMALL)
    for row in rows:
        if name == "decode":
            assert row["error"] < 2 * row["rounding"] + 1e-3
        if name == "memory":
            assert len(row["bytes"]) == row["processes"]
    assert {row["processes"] for row in rows} >= {1, 2}


def test_host_work_without_attention_is_the_less() -> None:
    everything, own = spread.host(SMALL)
    assert 0 < own["microseconds"] < everything["microseconds"]
