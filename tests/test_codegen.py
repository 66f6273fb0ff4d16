"""What the compiler makes of the Triton kernels, for GPUs that need not be there (codegen.py)."""

from __future__ import annotations

from typing import Any

import pytest
from codegen_pages import Row, assert_all, assert_current, compiled

pytestmark = [pytest.mark.slow, pytest.mark.full]

# Three programs of 128 threads share the 65536 registers of a multiprocessor; with 8 loads of
# 16 bytes a thread that is 48 KB in flight, where an H200 wants about 40.
MAX_REGISTERS = 168
# Positions, n_hat, attention factor, lengths, sets: for each thread, not for each head.
MAX_NARROW_LOADS = 8
# The search in cu_seqlens and what it finds, for each of up to four tokens.
MAX_NARROW_LOADS_PACKED = 16


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled("codegen.py", tmp_path_factory)


@pytest.fixture(scope="module")
def rows(output: dict[str, Any]) -> list[Row]:
    return list(output["rows"])


@pytest.mark.counts
def test_the_page_is_of_these_kernels(output: dict[str, Any]) -> None:
    assert_current(output["page"], "rotary.md")


def test_every_variant_is_compiled_for_each_architecture(rows: list[Row]) -> None:
    assert {row["arch"] for row in rows} == {80, 90, 100}
    variants = ("model", "dtype", "interleaved", "backward", "inplace")
    for_hopper = {tuple(row[name] for name in variants) for row in rows if row["arch"] == 90}
    assert len(for_hopper) >= 3 * 2 * 2 * 2 * 2


def test_nothing_spills(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["local"] == 0 and row["stack"] == 0)


def test_registers_leave_enough_warps(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["registers"] <= MAX_REGISTERS)


def test_q_and_k_move_in_pieces_of_16_bytes(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["loads"] >= row["expected_loads"])
    assert_all(rows, lambda row: row["stores"] == row["expected_stores"])
    assert_all(rows, lambda row: row["narrow_stores"] == 0)


def test_tables_cost_few_loads(rows: list[Row]) -> None:
    def limit(row: Row) -> int:
        return MAX_NARROW_LOADS_PACKED if row["select"] == "packed" else MAX_NARROW_LOADS

    assert_all(rows, lambda row: row["narrow_loads"] <= limit(row))


def test_the_fast_sine_is_not_used(rows: list[Row]) -> None:
    """One MUFU, the reciprocal of the integer division that finds the batch row."""
    assert_all(rows, lambda row: row["mufu"] == 1)


def test_backward_is_no_dearer_than_forward(rows: list[Row]) -> None:
    """It is the same kernel; the negated sine is one instruction a token."""
    names = ("model", "dtype", "interleaved", "inplace", "arch", "layout", "select", "seq")
    forward = {tuple(row[n] for n in names): row for row in rows if not row["backward"]}
    pairs = [
        (row, forward[key])
        for row in rows
        if row["backward"] and (key := tuple(row[n] for n in names)) in forward
    ]
    assert len(pairs) >= 24
    for back, forth in pairs:
        assert back["instructions"] <= forth["instructions"] + 8, (back, forth)
        assert back["registers"] <= forth["registers"] + 4, (back, forth)
