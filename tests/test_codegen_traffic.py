"""What the compiled decode kernels ask of the memories, counted where no GPU need be."""

from __future__ import annotations

from typing import Any

import pytest
from codegen_pages import Row, assert_all, assert_current, compiled
from test_codegen_decode import CYCLES_A_BYTE

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.counts]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled("codegen_traffic.py", tmp_path_factory)


@pytest.fixture(scope="module")
def rows(output: dict[str, Any]) -> list[Row]:
    return list(output["rows"])


def test_the_page_is_of_these_kernels(output: dict[str, Any]) -> None:
    assert_current(output["page"], "traffic.md")


def test_the_cache_is_read_once_and_little_else(rows: list[Row]) -> None:
    """Of 96 dimensions in float8, some pieces are half a sector, which caches bring once."""
    assert_all(rows, lambda row: 1 <= row["distinct"] < 1.02)
    whole = [row for row in rows if not (row["float8"] and row["dim"] == 96)]
    assert_all(whole, lambda row: row["moved"] < 1.15)


def test_lanes_do_not_wait_for_one_another_at_the_banks(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["turns"] <= 1.03 * row["least_turns"])


def test_memory_bounds_decoding_and_not_the_banks(rows: list[Row]) -> None:
    """Of the turns that fit beside the bytes of a 16-bit cache, four fifths at most.

    float8 halves the bytes and not the turns: what it stores as 16 bits is stored once more.
    """
    of_16_bits = [row for row in rows if not row["float8"]]
    assert_all(
        of_16_bits,
        lambda row: row["turns"] <= 0.8 * 4 * row["dim"] * CYCLES_A_BYTE[row["arch"]],
    )
