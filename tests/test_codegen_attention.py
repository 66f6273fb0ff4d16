"""What the compiler makes of the attention kernels, for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
from codegen_pages import Row, assert_all, assert_current, compiled, counts_hold, spills

pytestmark = [pytest.mark.slow, pytest.mark.full]

REGISTERS = 65536  # of a multiprocessor
# Bytes a program may have: 8.0's tiles serve 8.6, 8.9 and 12.x too, which have the least.
SHARED = {**dict.fromkeys((80, 86, 89, 120), 99 * 1024), **dict.fromkeys((90, 100), 227 * 1024)}
MATRIX = {80: "hmma", 86: "hmma", 89: "hmma", 90: "hgmma", 120: "hmma"}
TUNED = (80, 90)
SERVED = tuple(MATRIX)  # The tiles of 9.0 serve 10.0 too, where they are only compiled.


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled("codegen_attention.py", tmp_path_factory)


@pytest.fixture(scope="module")
def rows(output: dict[str, Any]) -> list[Row]:
    return list(output["rows"])


@pytest.mark.counts
def test_the_page_is_of_these_kernels(output: dict[str, Any]) -> None:
    assert_current(output["page"], "attention.md")


def test_every_head_dim_is_compiled_for_each_architecture(rows: list[Row]) -> None:
    for kernel in ("prepass", "registers", "dq", "delta"):
        served = {(row["arch"], row["dim"]) for row in rows if row["kernel"] == kernel}
        expected = {(arch, dim) for arch in TUNED for dim in (64, 80, 96, 128, 256)}
        if kernel != "delta":
            expected |= {(arch, dim) for arch in TUNED for dim in (72, 120)} | {(100, 128)}
            expected |= {(arch, dim) for arch in (86, 89, 120) for dim in (64, 96, 128, 256)}
        assert served == expected
    of_keys = {(row["arch"], row["dim"]) for row in rows if row["kernel"] in ("dk", "dk_dv")}
    assert of_keys == {(row["arch"], row["dim"]) for row in rows if row["kernel"] == "dq"}


def test_nothing_spills(rows: list[Row]) -> None:
    # Nobody calls the kernels without rotation: they are there for comparison.
    shipped = [row for row in rows if row["arch"] in SERVED and row["pairs"] != 0]
    allowed = {("prepass", 80, 64, False, False), ("dk", 90, 128, True, True)}  # Triton 3.7
    if counts_hold():  # 3.6
        allowed = {("dk", 86, 96, True, False), ("dk", 89, 96, True, False)}
    names = ("kernel", "arch", "dim", "causal", "packed")
    assert_all(shipped, lambda row: not spills(row, tuple(row[n] for n in names) in allowed))


def test_the_matrix_units_do_the_products(rows: list[Row]) -> None:
    products = [row for row in rows if row["kernel"] != "delta"]
    assert_all(products, lambda row: row["tile_matrix"] > 0)
    served = [row for row in products if row["arch"] in SERVED]
    assert_all(served, lambda row: row[MATRIX[row["arch"]]] > 0)
    assert_all(products, lambda row: row["arch"] not in (90, 100) or row["hmma"] == 0)


def test_a_program_fits_a_multiprocessor(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["registers"] * row["warps"] * 32 <= REGISTERS)
    assert_all(rows, lambda row: row["shared"] <= SHARED[row["arch"]])


def test_products_of_prefill_do_not_wait_for_each_other(rows: list[Row]) -> None:
    """On 9.0, of a tile: one wait for the scores of each operand, and that for the values.

    ptxas puts one behind every matrix instruction where it can't tell who writes accumulators.
    Uneven heads have more operands, of fewer instructions each.
    """
    shipped = [row for row in rows if row["arch"] == 90 and row["pairs"] != 0]
    shipped = [row for row in shipped if row["dim"] % 16 == 0]
    prefill = [row for row in shipped if row["kernel"] == "prepass"]
    assert_all(prefill, lambda row: row["tile_waits"] < row["tile_matrix"] / 2)
    plain = [row for row in prefill if row["tile"] == [128, 128] and row["stages"] == 3]
    assert {row["dim"] for row in plain} >= {64, 80, 96, 128}
    usual = [row for row in plain if not (row["interleaved"] or row["window"] or row["padded"])]
    assert_all(
        [row for row in usual if not row["packed"] and row["pairs"] is None],
        lambda row: row["tile_waits"] == (1 if row["dim"] in (64, 128) else 2),
    )


def test_no_dimension_is_padded(rows: list[Row]) -> None:
    """Matrix work of a tile grows with head_dim, not with the power of two above it."""
    work = {
        row["dim"]: row["tile_matrix"]
        for row in rows
        if row["arch"] == 80 and row["kernel"] == "prepass" and row["causal"]
        if row["tile"][1] == 64 and row["pairs"] is None
        if not (row["interleaved"] or row["window"] or row["softcap"] or row["packed"])
    }
    assert work[96] * 128 == work[128] * 96
    assert work[80] * 128 == work[128] * 80


def test_the_prepass_leaves_one_exponential_a_score(rows: list[Row]) -> None:
    """No sine, no cosine and no square root in the loop: exp2 of the scores and of the rows."""
    plain = [row for row in rows if row["kernel"] == "prepass" and not row["softcap"]]
    for row in plain:
        block_m, block_n = row["tile"]
        # A warp takes 16 rows at least; where there are too few, warps share the rows.
        threads = min(32 * row["warps"], 2 * block_m)
        assert row["tile_mufu"] <= block_m * block_n // threads + 8 * block_m // threads + 8, row


def with_and_without_rotation(rows: list[Row], *kernels: str) -> list[tuple[Row, Row]]:
    """The plain call of each kernel, and the same kernel without rotation."""
    names = ("arch", "dim", "kernel")
    plain = {
        tuple(row[name] for name in names): row
        for row in reversed(rows)  # the plain call comes before its variants
        if row["kernel"] in kernels and row["pairs"] is None
    }
    without = [row for row in rows if row["kernel"] in kernels and row["pairs"] == 0]
    return [(plain[tuple(row[name] for name in names)], row) for row in without]


def test_with_a_prepass_rotation_costs_nothing_in_the_loop(rows: list[Row]) -> None:
    """q is rotated before the loop over keys, and k before the kernel.

    What is left are the pieces a head is read in, two of 64 dimensions for one of 128, which moves
    addresses and waits: from 5 % fewer instructions to as many.
    """
    compared = with_and_without_rotation(rows, "prepass")
    assert len(compared) == 10
    for row, without in compared:
        assert row["tile"] == without["tile"]
        assert row["tile_matrix"] == without["tile_matrix"], (row, without)
        assert row["tile_mufu"] == without["tile_mufu"], (row, without)
        assert row["tile_instructions"] <= 1.02 * without["tile_instructions"], (row, without)


def test_rotation_takes_no_special_function(rows: list[Row]) -> None:
    """Cosine and sine are polynomials, in the loop of "registers" too."""
    compared = with_and_without_rotation(rows, "registers", "dq", "dk", "dk_dv")
    assert len(compared) == 30
    for row, without in compared:
        assert row["tile_mufu"] == without["tile_mufu"], (row, without)


def test_no_register_of_a_product_is_touched_before_the_wait_for_it(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["touched_too_early"] == [])


def test_products_have_all_columns_of_their_layout(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["short_products"] == 0)
