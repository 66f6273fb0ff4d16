"""What the compiler makes of the kernel that appends, for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
from codegen_pages import Row, assert_all, assert_current, compiled

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.counts]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled("codegen_append.py", tmp_path_factory)


@pytest.fixture(scope="module")
def rows(output: dict[str, Any]) -> list[Row]:
    return list(output["rows"])


def test_the_page_is_of_this_kernel(output: dict[str, Any]) -> None:
    assert_current(output["page"], "append.md")


def test_nothing_spills_and_nothing_goes_through_shared_memory(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["local"] == row["stack"] == row["shared"] == 0)


def test_half_of_the_warps_that_a_multiprocessor_takes_fit(rows: list[Row]) -> None:
    """32, of which each has two pieces of 16 bytes a thread in flight at least: 32 KB."""
    assert_all(rows, lambda row: row["registers"] <= 64)


def test_keys_and_values_are_loaded_in_pieces_of_16_bytes(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["loads"] == row["pieces"])


def test_so_are_they_stored_and_float8_in_what_is_left_of_them(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["narrow_stores"] == 0)
    for row in rows:
        if not row["float8"]:
            assert row["wide_stores"] == row["pieces"], row
