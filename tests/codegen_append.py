"""Compile the kernel that appends for GPUs that are not there, and read what came out.

    python tests/codegen_append.py              JSON: an object for each kernel, and the page
    python tests/codegen_append.py --markdown   the page, reports/codegen/append.md

As codegen.py does it: the launch comes from the function that the backend uses.
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

from longrope_kernels.calls.records import AppendCall, Keys
from longrope_kernels.kernels import append


@dataclass(frozen=True)
class Case:
    """New tokens of 8 heads for a cache in blocks of 16; ``tokens`` 1 is of each of 32 sequences.

    by: "lens" of a dense cache, "table" or "mapping".
    """

    dim: int
    arch: int
    by: str = "table"
    float8: bool = False
    dtype: str = "bfloat16"
    tokens: int = 1

    def launch(self) -> Any:
        """The launch, for tensors without memory."""
        heads, dtype = 8, getattr(torch, self.dtype)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        batch = 32 if self.tokens == 1 else 1
        k = empty(batch, self.tokens, heads, self.dim, dtype=dtype)
        stored = torch.float8_e4m3fn if self.float8 else dtype
        k_cache, v_cache = (empty(4096, 16, heads, self.dim, dtype=stored) for _ in "kv")
        mapping = empty(batch, self.tokens, dtype=torch.int64) if self.by == "mapping" else None
        scale = empty(heads, dtype=torch.float32) if self.float8 else None
        table = empty(batch, 128) if self.by == "table" else None
        lens = None if mapping is not None else empty(batch)
        cache = Keys(k_cache, v_cache, lens=lens, block_table=table, k_scale=scale, v_scale=scale)
        return append.plan(AppendCall(k, k, cache, mapping))


def cases() -> Iterator[Case]:
    for arch, dim in itertools.product((80, 90), (64, 96, 128, 256)):
        yield Case(dim, arch)
        yield Case(dim, arch, "mapping")
        yield Case(dim, arch, "mapping", tokens=8192)
        yield Case(dim, arch, float8=True)
        if dim == 128:
            yield Case(dim, arch, "lens")
            yield Case(dim, arch, dtype="float32")
            yield Case(dim, arch, float8=True, dtype="float32")
            yield Case(dim, arch, "mapping", float8=True, tokens=8192)


def compile_case(case: Case, folder: Path) -> dict[str, Any]:
    """Compile and count."""
    launch = case.launch()
    compiled = compile_launch(launch, case.arch, folder)
    counts = compiled.counts()

    def number(name: str, *ends: str) -> int:
        return sum(
            n for found, n in counts.items() if found.startswith(name) and found.endswith(ends)
        )

    itemsize = getattr(torch, case.dtype).itemsize
    rows = launch.constants["BLOCK_R"] * launch.constants["BLOCK_D"]
    return {
        **asdict(case),
        "rows": launch.constants["BLOCK_R"],
        "warps": launch.warps,
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "local": number("LDL", "") + number("STL", ""),
        "instructions": counts.total(),
        # Of a thread, of k and of v, 16 bytes each.
        "pieces": 2 * rows * itemsize // 16 // (32 * launch.warps),
        "loads": number("LDG", ".128"),
        "wide_stores": number("STG", ".128"),
        "stores": number("STG", ".128", ".64", ".E"),
        "narrow_stores": number("STG", ".U8", ".U16"),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    names = ("registers", "shared", "instructions", "loads", "stores", "narrow_stores", "local")
    head = ("sm", "head_dim", "dtype", "variant", "rows", *names)
    lines = []
    for row in rows:
        variant = [{"lens": "dense", "table": "by block table", "mapping": "by mapping"}[row["by"]]]
        variant += ["to float8"] if row["float8"] else []
        variant += [f"{row['tokens']} tokens"] if row["tokens"] > 1 else []
        cells = (row["arch"], row["dim"], row["dtype"], ", ".join(variant), row["rows"])
        lines.append((*cells, *(row[name] for name in names)))
    return table(head, lines)


def main() -> None:
    rows = compile_all(compile_case, cases())
    print_all(rows, markdown(rows))


if __name__ == "__main__":
    main()
