"""What nvcc makes of csrc/cuda/attention.cu, for GPUs that need not be there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from codegen_cuda import ARCHITECTURES, count, page, rows_of, short
from codegen_pages import assert_current

pytestmark = [pytest.mark.nvcc, pytest.mark.slow, pytest.mark.full]

KEYS = {64: 96, 96: 64, 128: 64}  # of a tile, by head dim; a warp takes 32 queries of it
# Bytes that a block may have where a multiprocessor has room for two of them: of the 164 KB of 8.0
# and the 228 KB of 9.0, less one that the system keeps of each.
SHARED = {"80": 81 * 1024, "90a": 113 * 1024}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """A row for each kernel of each architecture, with its head dim."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda arch: rows_of("attention.cu", arch), ARCHITECTURES)
        rows = [row for of_arch in found for row in of_arch]
    for row in rows:
        row["dim"] = int(short(row["kernel"]).split()[-1])
    return rows


def test_the_page_is_of_this_kernel(rows: list[dict[str, Any]]) -> None:
    assert_current(page("attention.cu", rows), "cuda_attention.md")


def test_both_dtypes_and_every_head_dim_are_compiled(rows: list[dict[str, Any]]) -> None:
    names = {(row["arch"], short(row["kernel"])) for row in rows}
    kinds = {f"attention_kernel {dtype} {dim}" for dtype in ("Float16", "BFloat16") for dim in KEYS}
    assert names == {(arch, kind) for arch in ARCHITECTURES for kind in kinds}
    assert len(rows) == len(names)


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spilled"] or row["stack"]] == []
    assert [row for row in rows if count(row["of_kernel"], "STL")] == []


def test_two_blocks_fit_a_multiprocessor(rows: list[dict[str, Any]]) -> None:
    """By registers (of 65536), and by shared memory with the shallowest ring, of two tiles."""
    for row in rows:
        assert 2 * 128 * row["registers"] <= 65536, row
        ring = 2 * KEYS[row["dim"]]
        shared = 2 * row["dim"] * (128 + ring) + row["static_shared"]
        assert shared <= SHARED[row["arch"]], row


def test_the_loop_has_the_matrix_instructions_of_one_tile(rows: list[dict[str, Any]]) -> None:
    """Once in the program, whatever is masked: two products of 32 queries by a tile of keys."""
    for row in rows:
        dim, keys = row["dim"], KEYS[row["dim"]]
        products = 2 * 32 * keys * dim // (16 * 8 * 16)
        assert count(row["of_loop"], "HMMA.16816.F32") == products, row
        assert count(row["of_kernel"], "HMMA") == products, row
        # Four matrices at a time: queries, keys and values, each once.
        loads = (32 * dim + 2 * keys * dim) // (4 * 8 * 8)
        assert count(row["of_loop"], "LDSM.16.M") == loads, row


def test_a_score_takes_one_exponential(rows: list[dict[str, Any]]) -> None:
    """And a row one more. A softcap, behind a branch, takes another and a reciprocal."""
    for row in rows:
        scores = KEYS[row["dim"]]  # of a thread: 32 queries by these keys, by 32 lanes
        assert count(row["of_loop"], "MUFU.EX2") == 2 * scores + 4, row
        assert count(row["of_loop"], "MUFU.RCP") == scores, row
        assert count(row["of_loop"], "MUFU") == 3 * scores + 4, row


def test_tiles_are_copied_past_registers(rows: list[dict[str, Any]]) -> None:
    """In the loop: a tile of keys and one of values, 16 bytes at a time, by 128 threads."""
    for row in rows:
        of_tile = KEYS[row["dim"]] * row["dim"] * 2 // (16 * 128)
        assert count(row["of_loop"], "LDGSTS.E.BYPASS.128") == 2 * of_tile, row
        assert count(row["of_loop"], "LDG.") == 0, row
