"""What the compiler makes of the decode kernels, for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
from codegen_pages import Row, assert_all, assert_current, compiled, spills

pytestmark = [pytest.mark.slow, pytest.mark.full]

REGISTERS = 65536  # of a multiprocessor
# Bytes that the programs of a multiprocessor share; 8.6, 8.9 and 12.x take 8.0's tiles, one program
# of each, and have 99 KB.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
LEAST_SHARED = 99 * 1024
RESERVED_SHARED = 1024  # of each program, by the system
# What each scheduler can issue while memory brings the key and the value of one head: a GPU's
# bandwidth (H200, A100) over its multiprocessors and clock, for 16-bit caches.
CYCLES_A_BYTE = {80: 108 * 1.41e9 / 2.04e12, 90: 132 * 1.755e9 / 4.8e12}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled("codegen_decode.py", tmp_path_factory)


@pytest.fixture(scope="module")
def rows(output: dict[str, Any]) -> list[Row]:
    return list(output["rows"])


@pytest.mark.counts
def test_the_page_is_of_these_kernels(output: dict[str, Any]) -> None:
    assert_current(output["page"], "decode.md")


def test_every_head_dim_is_compiled_for_each_architecture(rows: list[Row]) -> None:
    every = {(arch, dim) for arch in (80, 90) for dim in (64, 80, 96, 128, 256)}
    uneven = {(arch, dim) for arch in (80, 90) for dim in (72, 120)}
    for block_size, float8, rotate in ((0, False, True), (0, False, False), (16, True, True)):
        served = {
            (row["arch"], row["dim"])
            for row in rows
            if (row["block_size"], row["float8"], row["rotate"]) == (block_size, float8, rotate)
        }
        expected = every | (uneven if rotate else set())
        assert {(arch, dim) for arch, dim in served if arch in (80, 90)} == expected
        assert {arch for arch, _ in served} >= ({86, 89, 120} if rotate else set())


def test_nothing_spills(rows: list[Row]) -> None:
    """Not of the comparison on rotated keys, for which no tiles were chosen."""
    assert_all([row for row in rows if row["rotate"]], lambda row: not spills(row))


def test_so_many_programs_fit_a_multiprocessor(rows: list[Row]) -> None:
    def threads(row: Row) -> int:
        return int(row["warps"] * 32 * row["programs"])

    # Registers are given out in eights.
    assert_all(rows, lambda row: -(-row["registers"] // 8) * 8 * threads(row) <= REGISTERS)
    for row in rows:
        if row["arch"] in SHARED:
            assert (row["shared"] + RESERVED_SHARED) * row["programs"] <= SHARED[row["arch"]], row
    assert_all(rows, lambda row: row["arch"] == 90 or row["shared"] <= LEAST_SHARED)


def test_the_matrix_unit_does_the_products(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["tile_matrix"] > 0)


def test_no_register_of_a_product_is_touched_before_the_wait_for_it(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["touched_too_early"] == [])


def test_products_have_all_columns_of_their_layout(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["short_products"] == 0)


def test_keys_and_values_are_copied_past_the_registers_in_pieces_of_16_bytes(
    rows: list[Row],
) -> None:
    """As many as the bytes of a tile need, where each thread has 16 bytes of a piece at least."""
    for row in rows:
        itemsize, threads = 1 if row["float8"] else 2, 32 * row["warps"]
        of_piece = min(row["dim"] // 2, 64) * row["tile"][1] * itemsize // threads
        whole = row["dim"] & (row["dim"] - 1) == 0 and not row["pairs"]
        if whole and of_piece >= 16:
            needed = 2 * row["tile"][1] * row["dim"] * itemsize // 16 // threads
            assert row["tile_copies"] == needed, row
            assert row["positions"] or row["tile_narrow_copies"] == 0, row


def test_one_sine_and_one_cosine_a_key_and_pair_and_no_more(rows: list[Row]) -> None:
    """Next to the same kernel on rotated keys."""
    plain = {(row["arch"], row["dim"], row["float8"]): row for row in rows if not row["rotate"]}
    for row in rows:
        other = plain.get((row["arch"], row["dim"], row["float8"]))
        if not row["rotate"] or other is None or row["tile"] != other["tile"] or row["softcap"]:
            continue
        if row["dim"] & (row["dim"] - 1) == 0:
            pairs = row["pairs"] or row["dim"] // 2
            turns = 2 * row["tile"][1] * pairs // (32 * row["warps"])
            assert row["tile_mufu"] - other["tile_mufu"] == turns, row


def test_memory_bounds_decoding_and_not_what_is_issued(rows: list[Row]) -> None:
    """Of the instructions that fit beside the bytes of a 16-bit cache, three quarters at most.

    Positions of keys in any order cost a choice of two steps for each pair: nine tenths. Uneven
    heads, loaded in narrower pieces and masked, are bound by what is issued.
    """
    dense = [row for row in rows if not row["float8"] and row["queries"] == 1]
    for row in dense:
        if row["dim"] % 16 == 0 and row["arch"] in CYCLES_A_BYTE:
            cycles = 4 * row["dim"] * CYCLES_A_BYTE[row["arch"]]
            assert row["key_issue"] <= (0.9 if row["positions"] else 0.75) * cycles, row
