"""What rows of benchmarks/ tell beside their times, and how a report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from benchmark_modules import decode_rows, decodes, measure, parameters, rotations, speeds
from report import page, results
from report.results import Row

MACHINE = {"cpu": "a processor", "threads": 2, "commit": "0123456789ab", "torch": "2.13.0"}


@pytest.mark.parametrize("ceiling", ["read", "clone", "matmul"])
def test_a_row_names_its_ceiling(monkeypatch: pytest.MonkeyPatch, ceiling: str) -> None:
    monkeypatch.setattr(speeds, "REACHED", {"copy": 4.0, "matmul": 8.0})
    found = measure.Measured(10, 2.0, 1.5, 0.75, 3)
    told = speeds.told(found, ceiling, 4, 8)
    kind = "matmul" if ceiling == "matmul" else "copy"
    assert told == {
        "bytes": 4,
        "flops": 8,
        "gb_per_s": 2e-9,
        "of_copy": 0.5,
        "tflop_per_s": 4e-12,
        "of_matmul": 0.5,
        "ceiling": ceiling,
        f"{kind}_seconds": 1.5,
        f"{kind}_fraction": 0.75,
        "peak_bytes": 3,
    }
    # The ceilings were not timed; nothing is computed.
    monkeypatch.setattr(speeds, "REACHED", {})
    told = speeds.told(found, ceiling, 4, None)
    assert told["gb_per_s"] == 2e-9
    assert not {"of_copy", "tflop_per_s", "of_matmul"} & set(told)


TOLD = {"bytes", "flops", "gb_per_s", "tflop_per_s", "of_copy", "of_matmul", "ceiling"}
TOLD |= {"peak_bytes"}
WORKS = {"rotary", "decode", "attention", "model"}
# A row of each work; a sum of both sets where a copy has no FLOP.
CHOSEN = (
    "ceiling or"
    " (forward and S4096-bfloat16 and (clone or reference) and not Phi and not Qwen) or"
    " (test_decode and 4096 and float32 and SDPA) or"
    " (forward and 256 and full and composed) or"
    " (test_model and forward and 128 and not compile)"
)


def test_all_rows_tell_both_speeds_and_both_shares(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.json"
    options = ("-q", "-k", CHOSEN, f"--benchmark-json={out}")
    assert forked.run("benchmarks", *options)[0] == 0
    rows = [
        Row.of(row["group"], row["params"]["name"], row["stats"]["data"], row["extra_info"])
        for row in json.loads(out.read_text())["benchmarks"]
    ]
    ceilings = {row.name: row for row in rows if row.group == results.CEILINGS}
    copy, matmul = (ceilings[name].info for name in ("copy", "matmul"))
    assert (copy["of_copy"], matmul["of_matmul"]) == (1.0, 1.0)
    assert not {"of_matmul", "tflop_per_s"} & set(copy)
    others = [row for row in rows if row.group != results.CEILINGS]
    assert {row.info["work"] for row in others} == WORKS
    for row in others:
        told = TOLD - {"tflop_per_s", "of_matmul"} if row.name in rotations.COPIES else TOLD
        assert told == TOLD & set(row.info), row
        assert row.info["gb_per_s"] == pytest.approx(1e-9 * row.info["bytes"] / row.median)
        assert row.info["of_copy"] == pytest.approx(row.info["gb_per_s"] / copy["gb_per_s"])
        if row.name not in rotations.COPIES:
            assert row.info["of_matmul"] == pytest.approx(
                row.info["tflop_per_s"] / matmul["tflop_per_s"]
            )
    named = {row.info["work"]: row.info["ceiling"] for row in others}
    assert named == {
        "rotary": "clone",
        "decode": decodes.CEILING,
        "attention": "matmul",
        "model": "matmul",
    }


def test_rows_that_rotate_are_told_against_rotated_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = decodes.Shape((100, 50), parameters.bf16)
    times = {"triton, rotated keys, paged": 2.0, "triton, paged": 2.1, "triton": 3.0}

    def found(benchmark: Any, request: Any, *rest: Any) -> Any:
        return measure.Measured(10, times[request.name], 1.0, 0.5, None)

    monkeypatch.setattr(decode_rows, "measure", found)
    monkeypatch.setattr(decode_rows, "ROWS", [])
    told = {}
    for name in times:
        request = SimpleNamespace(name=name, config=SimpleNamespace(getoption=lambda option: True))
        benchmark = SimpleNamespace(extra_info={})
        decode_rows.test_decode(benchmark, request, shape, name)
        told[name] = benchmark.extra_info["time_over_rotated_keys"]
    assert told["triton, paged"] == pytest.approx(1.05)
    # There is none to tell them against.
    assert told["triton"] is told["triton, rotated keys, paged"] is None


def _report(**changes: Any) -> dict[str, Any]:
    default = {"machine": MACHINE, "date": "2026-01-02", "tests": None, "not_measured": {}}
    return {**default, **changes}


def _row(name: str, seconds: float, group: str, **info: Any) -> Row:
    return Row(group, name, seconds, seconds, seconds, 10, info)


def test_the_page_names_the_limit_of_each_row() -> None:
    rows = [
        _row("copy", 1.0, results.CEILINGS, gb_per_s=9.23),
        _row("matmul", 1.0, results.CEILINGS, tflop_per_s=0.0612),
        _row(
            *("ours", 2e-6, "decode"),
            **{"gb_per_s": 15.0, "of_copy": 0.5, "tflop_per_s": 0.01, "of_matmul": 0.25},
            ceiling="read",
            copy_fraction=0.4,
            time_over_rotated_keys=1.042,
        ),
    ]
    lines = page.render(_report(), rows).splitlines()
    assert "- copy: 9.23 GB/s" in lines
    assert "- matmul: 0.0612 TFLOP/s" in lines
    head, ours = (
        next(line for line in lines if line.startswith(f"| {name}")) for name in ("name", "ours")
    )
    names, cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, ours))
    assert dict(zip(names, cells, strict=True)) == {
        **{"name": "ours", "us": "2.0", "p20": "2.0", "p80": "2.0"},
        **{"GB/s": "15", "of copy": "0.50", "TFLOP/s": "0.01", "of matmul": "0.25"},
        **{"of limit": "0.40", "limit": "read", "time / rotated": "1.042", "x ours": "1.00"},
    }


@pytest.mark.parametrize(("speed", "shown"), [(4213.4, "4213"), (99.96, "100"), (1e-4, "0.0001")])
def test_speeds_have_three_digits(speed: float, shown: str) -> None:
    assert page._significant(speed) == shown
    assert page._significant(None) == "-"


def test_rows_of_older_reports_are_shown() -> None:
    """They tell neither the ceiling's name nor both shares."""
    old = _row("ours", 2e-6, "decode", gb_per_s=15.0, copy_fraction=0.4)
    lines = page.render(_report(), [old]).splitlines()
    assert "| name |  us | p20 | p80 | GB/s | of limit | x ours |" in lines
    assert "| ours | 2.0 | 2.0 | 2.0 |   15 |     0.40 |   1.00 |" in lines
