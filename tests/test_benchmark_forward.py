"""benchmarks/forward.py: both forwards give the same losses, and their times are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmark_modules import forward


def test_a_small_one_tells_ratios_and_shares_as_one_more_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "forward.json"
    given = ["--length", "48", "--layers", "1", "--rounds", "2", "--last", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["forward", *given])
    forward.main()
    forward.main()
    rows = json.loads(out.read_text())
    assert len(rows) == 2
    for row in rows:
        assert (row["layers"], row["tokens"], row["scored"]) == (1, 48, 8)
        assert len(row["ratios"]) == 2
        for shares in row["shares"].values():
            assert 0.5 < sum(shares.values()) < 1.001


def test_losses_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward.plain_losses
    monkeypatch.setattr(forward, "plain_losses", lambda *given: right(*given) + 0.01)
    with pytest.raises(RuntimeError, match="losses: expected those of transformers"):
        forward.both(1, 24, 8)
