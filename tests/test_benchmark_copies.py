"""benchmarks/: each call of a row takes the next of many copies of the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from benchmark_modules import (
    attention_rows,
    attentions,
    copies,
    decode_rows,
    decodes,
    forget_inputs,
    memory,
    parameters,
    ropes,
    rotary_rows,
    rotations,
)


def test_copies_exceed_the_cache_within_a_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies, "cache", 60)
    monkeypatch.setattr(copies, "available", lambda: 10**6)
    assert [copies.how_many(n) for n in (61, 60, 59, 20, 16, 1)] == [1, 2, 2, 4, 4, copies.MOST]
    monkeypatch.setattr(copies, "available", lambda: 100 * copies.SHARE)
    assert [copies.how_many(n) for n in (200, 50, 20)] == [1, 2, 4]
    monkeypatch.setattr(copies, "cache", 0)
    assert copies.how_many(1) == 1


OURS = "triton" if torch.cuda.is_available() else "native"


@pytest.mark.parametrize("direction", ["forward", "in place", "backward", "cache write"])
def test_rotations_of_copies(many_copies: None, direction: str) -> None:
    pool = rotations.make_copies(40, torch.bfloat16, parameters.LLAMA)
    _assert_taken(pool, lambda inputs: rotary_rows._prepared(direction, OURS, inputs))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention_of_copies(many_copies: None, direction: str) -> None:
    pool = attentions.make_copies(attentions.Shape(64, 64, True))
    _assert_taken(pool, lambda inputs: attention_rows._prepared(direction, "composed", inputs))


@pytest.mark.parametrize("name", [decodes.SDPA, OURS, f"{OURS}, paged"])
def test_decoding_of_copies(many_copies: None, name: str) -> None:
    pool = decodes.make_copies(decodes.Shape((70, 20), torch.bfloat16))
    _assert_taken(pool, lambda inputs: decode_rows._prepared(name, inputs))


@pytest.fixture
def many_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(copies, "how_many", lambda nbytes: 3)
    forget_inputs()
    yield
    forget_inputs()


def _assert_taken(pool: Any, prepare: Callable[[Any], copies.Prepared]) -> None:
    """Each call reads another copy, and they are the same numbers."""
    assert len({x.q.data_ptr() for x in pool.all}) == 3
    spoiled = pool.all[1]
    run, arguments = pool.in_turn(prepare)
    for x in vars(spoiled).values():
        for y in x if isinstance(x, (tuple, list)) else [x]:
            if isinstance(y, torch.Tensor) and y.is_floating_point():
                y.detach().fill_(torch.nan)
    nans = [any(bool(x.isnan().any()) for x in _outputs(run(*arguments()))) for _ in range(6)]
    assert nans == [True, False, False, True, False, False]


def _outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_rows_say_how_many_copies_there_are(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.json"
    chosen = "forward and S4096 and bfloat16 and reference and not Phi and not Qwen"
    options = ("-q", "--cache-mb=4", f"--benchmark-json={out}")
    assert forked.run("benchmarks/test_rotary.py", *options, "-k", chosen)[0] == 0
    rows = json.loads(out.read_text())["benchmarks"]
    # 128 tokens of 32 and 8 heads of 128, 2 bytes each.
    found = [row["extra_info"]["copies"] for row in rows]
    assert found == [4_000_000 // (128 * 40 * 128 * 2) + 1]


def test_memory_at_the_peak_is_seen() -> None:
    def run() -> None:
        x = torch.ones(2**24, device=ropes.DEVICE)
        x.clone().clone()

    peak = memory.peak_bytes(run)
    # Three tensors of 64 MiB, if the system tells.
    assert peak is None or 150 * 2**20 < peak < 300 * 2**20
