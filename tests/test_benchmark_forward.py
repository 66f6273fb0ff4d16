"""benchmarks/forward.py: both forwards give the same losses, and their times are told."""

from __future__ import annotations

import sys

import pytest
from benchmark_modules import forward


def test_a_small_one_prints_a_ratio_and_two_profiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--length", "48", "--layers", "1", "--rounds", "2", "--last", "8"]
    monkeypatch.setattr(sys, "argv", ["forward", *given])
    forward.main()
    shown = capsys.readouterr().out
    assert shown.startswith(f"1 layers, 48 tokens, 8 scored, {forward.DEVICE.type}: transformers ")
    assert shown.count("share of its time by operation") == 2
    for part in shown.split("\n\n")[1:]:
        shares = [float(line.split("%")[0]) for line in part.splitlines()[1:]]
        assert shares == sorted(shares, reverse=True)
        assert 50 < sum(shares) < 100.1


def test_losses_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward.plain_losses
    monkeypatch.setattr(forward, "plain_losses", lambda *given: right(*given) + 0.01)
    with pytest.raises(RuntimeError, match="losses: expected those of transformers"):
        forward.both(1, 24, 8)
