"""What nvcc makes of csrc/cuda/*.cu, for GPUs that need not be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from codegen_cuda import ARCHITECTURES, compile_source, count, rows_of

pytestmark = [pytest.mark.nvcc, pytest.mark.slow, pytest.mark.full]

REGISTERS = 65536  # of a multiprocessor
# Blocks of a multiprocessor at once that csrc/cuda/decode_block.h counts on, by head_dim.
DECODE_BLOCKS = {64: 4, 128: 3, 256: 2}
DECODE_THREADS = 128
Row = dict[str, Any]


@pytest.fixture(scope="module")
def append() -> list[Row]:
    return [row for arch in ARCHITECTURES for row in rows_of("append.cu", arch)]


@pytest.fixture(scope="module")
def rotary() -> list[Row]:
    return [row for arch in ARCHITECTURES for row in rows_of("rotary.cu", arch)]


@pytest.fixture(scope="module")
def decode() -> list[Row]:
    """float16 is the same code but for its conversions."""
    return [row for arch in ARCHITECTURES for row in rows_of("decode_bfloat16.cu", arch)]


def test_every_variant_is_compiled_for_each_architecture(
    append: list[Row], rotary: list[Row], decode: list[Row]
) -> None:
    for arch in ARCHITECTURES:
        # Three types; to their own and to float8; in pieces and element by element.
        assert sum(row["arch"] == arch for row in append) == 12
        # Three types; halves, interleaved and element by element.
        assert sum(row["arch"] == arch for row in rotary) == 9
        # Three head_dims with caches of 16 and of 8 bits.
        assert sum(row["arch"] == arch for row in decode) == 6


def test_nothing_spills(append: list[Row], rotary: list[Row], decode: list[Row]) -> None:
    assert [row for row in (*append, *rotary, *decode) if row["stack"] or row["spilled"]] == []


def test_all_threads_of_a_multiprocessor_can_append(append: list[Row]) -> None:
    """2048, of which each has 16 bytes in flight: 32 KB."""
    for row in append:
        assert 2048 * allocated(row) <= REGISTERS, row["kernel"]


def test_rows_are_appended_in_pieces_of_16_bytes(append: list[Row]) -> None:
    for row in append:
        counts = row["of_kernel"]
        if "WidePiece" in row["kernel"]:
            assert count(counts, "LDG.E.NA.128") + count(counts, "LDG.E.128") == 1, row["kernel"]
            whole = count(counts, "STG.E.128") == 1
            assert whole or "Lb1" in row["kernel"], row["kernel"]


def test_five_blocks_of_the_rotation_fit_a_multiprocessor(rotary: list[Row]) -> None:
    """20 warps with eight loads of 16 bytes each in flight: 80 KB."""
    for row in rotary:
        assert 5 * 128 * allocated(row) <= REGISTERS, row["kernel"]


def test_so_many_blocks_of_decode_fit_a_multiprocessor(decode: list[Row]) -> None:
    for row in decode:
        dim = re.search(r"decode_kernel.*Li(\d+)E", row["kernel"])
        if dim is not None:
            threads = DECODE_BLOCKS[int(dim[1])] * DECODE_THREADS
            assert threads * allocated(row) <= REGISTERS, row["kernel"]


def allocated(row: Row) -> int:
    """Registers of a thread, which come in eights."""
    return -(-int(row["registers"]) // 8) * 8


def test_older_devices_are_refused_by_the_compiler(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"expected compute capability 8\.0 or newer"):
        compile_source("append.cu", "75", tmp_path)
