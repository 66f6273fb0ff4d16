"""What the compiler makes of the attention kernels, for GPUs that need not be there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Row = dict[str, Any]

REGISTERS = 65536  # of a multiprocessor
# Bytes a program may have: 8.0's tiles serve 8.6, 8.9 and 12.x too, which have the least.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
MATRIX = {80: "hmma", 90: "hgmma"}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    script = Path(__file__).with_name("codegen_attention.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


def assert_all(rows: list[Row], rule: Callable[[Row], bool]) -> None:
    offenders = [row for row in rows if not rule(row)]
    assert not offenders, "\n".join(map(str, offenders))


def test_every_head_dim_is_compiled_for_each_architecture(rows: list[Row]) -> None:
    for kernel in ("prepass", "registers", "dq", "delta"):
        served = {(row["arch"], row["dim"]) for row in rows if row["kernel"] == kernel}
        assert served == {(arch, dim) for arch in (80, 90) for dim in (64, 80, 96, 128, 256)}
    of_keys = {(row["arch"], row["dim"]) for row in rows if row["kernel"] in ("dk", "dk_dv")}
    assert len(of_keys) == 10


def test_nothing_spills(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["local"] == 0 and row["stack"] == 0)


def test_the_matrix_units_do_the_products(rows: list[Row]) -> None:
    products = [row for row in rows if row["kernel"] != "delta"]
    assert_all(products, lambda row: row[MATRIX[row["arch"]]] > 0 and row["tile_matrix"] > 0)
    assert_all(products, lambda row: row["arch"] == 80 or row["hmma"] == 0)


def test_a_program_fits_a_multiprocessor(rows: list[Row]) -> None:
    assert_all(rows, lambda row: row["registers"] * row["warps"] * 32 <= REGISTERS)
    assert_all(rows, lambda row: row["shared"] <= SHARED[row["arch"]])


def test_no_dimension_is_padded(rows: list[Row]) -> None:
    """Matrix work of a tile grows with head_dim, not with the power of two above it."""
    work = {
        row["dim"]: row["tile_matrix"]
        for row in rows
        if row["arch"] == 80 and row["kernel"] == "prepass" and row["causal"]
        if row["tile"] == [128, 64] and row["warps"] == 8 and row["pairs"] == 0
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
