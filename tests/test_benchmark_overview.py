"""What the benchmark command shows: the group that is timed, one table, what was left out."""

from __future__ import annotations

import re

import forked
import pytest
import torch
from benchmark_modules import decode_rows, measure, model_rows, overview, rotary_rows
from table import Row


def test_the_fastest_of_ours_stands_beside_stock_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in overview.PARTS:
        monkeypatch.setattr(part.benchmark, "ROWS", [])
    assert overview.lines() == []
    rotary_rows.ROWS += [
        Row("forward, S = 8", "transformers eager", 4e-3, 1, 0.1, 4e-3),
        Row("forward, S = 8", "native", 2e-3, 1, 0.5, 4e-3),
        Row("forward, S = 8", "triton", 1e-3, 1, 0.9, 4e-3),
        Row("forward, S = 8", "clone", 1e-4, 1, 1.0, 4e-3),
        Row("backward, S = 8", "native", 1e-3, 1, 0.5, None),
    ]
    decode_rows.ROWS.append(Row("decode, 1 x 9 keys", "native, paged", 3e-6, 1, 0.25, None))
    names = [f"model, forward, {n} tokens" for n in range(overview.GROUPS + 1)]
    model_rows.ROWS += [Row(group, "enabled, switch", 1.0, 1, None, 1.5) for group in names]
    table = [re.split(r"  +", line.strip()) for line in overview.lines()]
    table = table[: table.index([""])]
    assert table[0] == ["by", "us", "stock us", "x stock", "of ceiling"]
    assert table[1] == ["rotation", "S = 8", "triton", "1000", "4000", "4.0", "0.90"]
    assert table[2] == ["decode", "1 x 9 keys", "native, paged", "3", "-", "-", "0.25"]
    assert [row[1] for row in table[3:]] == [f"{n} tokens" for n in range(overview.GROUPS)]
    assert table[3][2:] == ["enabled, switch", "1000000", "1500000", "1.5", "-"]


def test_what_was_left_out_is_two_lines() -> None:
    assert overview.left_out({}, {}, {}) == []
    dropped = {"rotary": {"forward": 3, "backward": 2}, "decode": {"1 x 9 keys": 1}}
    absent = {
        "liger": "liger_kernel is not installed",
        "FlashInfer": "flashinfer is not installed",
        "FlashInfer, paged": "flashinfer is not installed",
        "cuda": "serves cuda only",
    }
    reasons = {"decode, a": measure.SPENT, "decode, b": "out of memory"}
    assert overview.left_out(dropped, absent, reasons) == [
        "left out by the budget, 7 rows: rotary 5, decode 1, amid a group 1 (--budget 0 times all)",
        "not installed: flashinfer, liger_kernel; not for this machine: 1 others (-v names them)",
        "decode, b: out of memory",
    ]


DTYPE = "" if torch.cuda.is_available() else ", float32"
SMALL = f"S = 256, d = 96, causal{DTYPE}"
TEST = f"benchmarks/test_attention.py::test_attention[forward-{SMALL}-"
ROWS = [f"{TEST}{name}]" for name in ("transformers eager, SDPA", "composed")]


def test_a_measurement_ends_in_minutes_unless_told_otherwise() -> None:
    status, shown = forked.run(*ROWS, "--benchmark-only")
    assert status == 0, shown
    told = rf"^ *\d+ s  +(\d+) s left  attention: forward-{SMALL}$"
    (left,) = re.findall(told, shown, re.M)
    assert 200 <= int(left) <= 600
    row = rf"^prefill  {SMALL}  composed +\d+ +\d+ +[\d.]+ +[\d.]+$"
    assert re.search(row, shown, re.M), shown
    assert "Name (time in" not in shown
    _, verbose = forked.run(*ROWS, "--benchmark-only", "-v", "--budget=0")
    assert "Name (time in" in verbose
    assert " s left" not in verbose
    status, wrong = forked.run(*ROWS, "--budget=-1")
    assert status == 4
    assert "--budget: expected seconds, 0 for no end, got -1" in wrong
