"""Compile the decode kernels for GPUs that are not there, and read what came out.

    python tests/codegen_decode.py              JSON: an object for each kernel, and the page
    python tests/codegen_decode.py --markdown   the page, reports/codegen/decode.md

As codegen.py does it: the launches come from the functions that the backend uses.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from codegen import compile_all, compile_launch, print_all, table
from codegen_attention import UNEVEN_DIMS, short_products, tile_loop
from sass import touched_too_early

from longrope_kernels.calls.records import DecodeCall, Keys, Scores, Selection
from longrope_kernels.kernels import decode
from longrope_kernels.rope.tables import Tables

CAPACITY = 131072
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 120: 170}


@dataclass(frozen=True)
class Case:
    """One call: 32 heads of q, 8 of k, one sequence in a cache of 131072 slots.

    rotate: False is the same kernel on rotated keys. block_size: 0 is a dense cache. pairs: those
    that are rotated; None: all there are.
    """

    dim: int
    arch: int = 90
    rotate: bool = True
    block_size: int = 0
    float8: bool = False
    queries: int = 1
    pairs: int | None = None
    interleaved: bool = False
    positions: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: str = "bfloat16"

    def launch(self) -> Any:
        """The launch of this kernel, for tensors without memory."""
        batch, heads, kv_heads = 1, 32, 8
        pairs = self.dim // 2 if self.pairs is None else self.pairs

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        dtype = getattr(torch, self.dtype)
        blocks = CAPACITY // self.block_size if self.block_size else batch
        shape = (blocks, self.block_size or CAPACITY, kv_heads, self.dim)
        k, v = (empty(*shape, dtype=torch.float8_e4m3fn if self.float8 else dtype) for _ in "kv")
        table = empty(batch, blocks, dtype=torch.int32) if self.block_size else None
        scale = empty(kv_heads, dtype=torch.float32) if self.float8 else None
        q = empty(batch, self.queries, heads, self.dim, dtype=dtype)
        lse = empty(batch, heads, self.queries, dtype=torch.float32)
        keys = Keys(
            *(k, v, empty(batch, CAPACITY) if self.positions else None),
            lens=empty(batch, dtype=torch.int32),
            block_table=table,
            k_scale=scale,
            v_scale=scale,
        )
        shape = (2, 2, pairs if self.rotate else 0)
        tables = Tables(
            *(empty(*shape), empty(2), empty(2, dtype=torch.float64), empty(2)),
            empty(*shape, dtype=torch.float64),
            self.interleaved,
        )
        scores = Scores(True, self.dim**-0.5, self.window, self.softcap)
        sinks = empty(heads, dtype=dtype) if self.sinks else None
        call = DecodeCall(q, keys, tables, Selection(), scores, sinks)
        splits = decode.splits_of(call, self.arch, MULTIPROCESSORS[self.arch])
        of_splits = empty(splits.most, *lse.shape, self.dim, dtype=torch.float32)
        scratch = (of_splits, of_splits[..., 0].contiguous(), empty(1024, dtype=torch.int32))
        return decode.plan(
            *(call, torch.empty_like(q), lse, scratch if splits.most > 1 else None),
            *(self.arch, splits),
        )


DIMS = (64, 80, 96, 128, 256)
# Beside the usual calls, for head_dim 128: of each architecture, and of 9.0.
VARIANTS = (
    {"block_size": 16},
    {"block_size": 16, "positions": True},
    {"queries": 16},
    {"queries": 512, "block_size": 16},
    {"queries": 32, "block_size": 16, "float8": True},
)
MORE_VARIANTS = (
    {"block_size": 64},
    {"rotate": False, "float8": True},
    {"pairs": 32, "float8": True},
    {"interleaved": True},
    {"window": 1024, "softcap": 50.0, "queries": 4},
    {"queries": 8, "dtype": "float16"},
    {"queries": 512, "block_size": 16, "sinks": True},
)


def cases() -> Iterator[Case]:
    """Every head_dim for each architecture, next to rotated keys; the variants for 128; others."""
    for arch, dim in itertools.product((80, 90), DIMS):
        yield Case(dim, arch)
        yield Case(dim, arch, rotate=False)
        yield Case(dim, arch, block_size=16, float8=True)
        if dim == 128:
            variants = VARIANTS + (MORE_VARIANTS if arch == 90 else ())
            yield from (Case(dim, arch, **variant) for variant in variants)
        elif dim in (96, 256):
            yield Case(dim, arch, queries=16)
            yield Case(dim, arch, queries=512, block_size=16)
    for arch in (86, 89, 120):
        yield Case(128, arch)
        yield Case(128, arch, block_size=16, float8=True)
    for arch, dim in itertools.product((80, 90), UNEVEN_DIMS):
        yield Case(dim, arch)
        yield Case(dim, arch, block_size=16, float8=True)


def compile_case(case: Case, folder: Path) -> dict[str, Any]:
    """Compile and count."""
    launch = case.launch()
    compiled = compile_launch(launch, case.arch, folder)
    counts = compiled.counts()
    tile = tile_loop(compiled.sass)
    config = decode.choose_config(case.arch, case.dim, 4 * case.queries)

    def of_tile(part: str) -> int:
        return sum(part in name.split(".")[0] for name in tile)

    return {
        **asdict(case),
        "tile": [launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]],
        "warps": launch.warps,
        "stages": launch.stages,
        "programs": config.programs,
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "local": sum(counts[name] for name in counts if name.split(".")[0] in ("LDL", "STL")),
        "instructions": counts.total(),
        "short_products": short_products(compiled.ttgir),
        "touched_too_early": touched_too_early(compiled.sass),
        "tile_instructions": len(tile),
        # Of each of the four schedulers of a multiprocessor.
        "key_issue": round(len(tile) * launch.warps / 4 / launch.constants["BLOCK_N"], 2),
        "tile_matrix": of_tile("MMA"),
        "tile_mufu": of_tile("MUFU"),
        "tile_copies": sum("LDGSTS" in name and name.endswith(".128") for name in tile),
        "tile_narrow_copies": sum("LDGSTS" in name and ".128" not in name for name in tile),
        "tile_loads": sum(name.startswith("LDG.") for name in tile),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    names = ("registers", "shared", "instructions", "local")
    of_tile = ("tile_instructions", "tile_matrix", "tile_mufu", "tile_copies", "tile_loads")
    head = ("sm", "head_dim", "variant", "tile", "warps", "stages", *names, *of_tile, "key_issue")
    lines = []
    for row in rows:
        variant = [] if row["rotate"] else ["rotated keys"]
        variant += [f"blocks of {row['block_size']}"] if row["block_size"] else []
        variant += ["float8"] if row["float8"] else []
        flags = ("interleaved", "positions", "window", "softcap", "sinks")
        variant += [name for name in flags if row[name]]
        variant += [f"{2 * row['pairs']} rotated"] if row["pairs"] else []
        variant += [f"{row['queries']} queries"] if row["queries"] > 1 else []
        variant += ["float16"] if row["dtype"] == "float16" else []
        cells = (
            *(row["arch"], row["dim"], ", ".join(variant)),
            *(" x ".join(map(str, row["tile"])), row["warps"], row["stages"]),
            *(row[name] for name in (*names, *of_tile, "key_issue")),
        )
        lines.append(cells)
    return table(head, lines)


def main() -> None:
    rows = compile_all(compile_case, cases())
    print_all(rows, markdown(rows))


if __name__ == "__main__":
    main()
