"""Run the compiled decode kernels without a GPU, and count what they ask of the memories.

    python tests/codegen_traffic.py              JSON: an object for each kernel, and the page
    python tests/codegen_traffic.py --markdown   the page, reports/codegen/traffic.md

For 1024 keys of one KV head in one split: combining several is another matter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from codegen import compile_all, print_all, table

KEYS = 1024
GROUPS = 4


@dataclass(frozen=True)
class Case:
    """One query of four heads. block_size: 0 is a dense cache."""

    arch: int
    dim: int
    block_size: int = 0
    float8: bool = False
    interleaved: bool = False

    @property
    def cache_bytes(self) -> int:
        return 2 * KEYS * self.dim * (1 if self.float8 else 2)


VARIANTS = (
    {"dim": 64},
    {"dim": 128},
    {"dim": 256},
    {"dim": 128, "interleaved": True},
    {"dim": 128, "block_size": 16},
    {"dim": 64, "block_size": 16, "float8": True},
    {"dim": 96, "block_size": 16, "float8": True},
    {"dim": 128, "block_size": 16, "float8": True},
    {"dim": 256, "block_size": 16, "float8": True},
    {"dim": 128, "block_size": 16, "float8": True, "interleaved": True},
)


def cases() -> Iterator[Case]:
    yield from (Case(arch, **variant) for arch in (80, 90) for variant in VARIANTS)


def count(case: Case, folder: Path) -> dict[str, Any]:
    """Run and count."""
    os.environ["LONGROPE_PTX"] = str(case.arch)
    from ptx.install import install
    from ptx.traffic import CountingMachine

    from longrope_kernels import FactorSet, Rope, decode
    from longrope_kernels.kernels import decode as kernels
    from longrope_kernels.kernels.splits import Splits

    device = install(case.arch, CountingMachine)
    kernels.splits_of = lambda *_: Splits(1, 1, 1)
    torch.manual_seed(0)
    factors = FactorSet([1.0 + i / 64 for i in range(case.dim // 2)])
    rope = Rope(factors, interleaved=case.interleaved)
    dtype = torch.float8_e4m3fn if case.float8 else torch.bfloat16
    blocks = KEYS // (case.block_size or KEYS)
    k, v = (torch.randn(blocks, KEYS // blocks, 1, case.dim).to(dtype) for _ in "kv")
    table = torch.randperm(blocks)[None].int() if case.block_size else None
    q = torch.randn(1, 1, GROUPS, case.dim).bfloat16()
    lens = torch.tensor([KEYS], dtype=torch.int32)
    decode(q, k, v, lens, rope, block_table=table, backend="triton")
    compiled = device.compiled.values()
    machine = next(x.machine for x in compiled if x.metadata["name"] == "decode_kernel")
    assert isinstance(machine, CountingMachine)
    shared = machine.total("shared")
    return {
        **asdict(case),
        "distinct": machine.distinct("read") / case.cache_bytes,
        "moved": machine.total("global").sectors * 32 / case.cache_bytes,
        "turns": shared.turns / KEYS,
        "least_turns": shared.least / KEYS,
        "instructions": float(machine.executed.sum() / 4 / KEYS),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    head = (
        *("sm", "head_dim", "variant", "sectors read, of the cache", "sectors moved, of the cache"),
        *("turns of the banks a key", "without conflicts", "instructions a key and scheduler"),
    )
    lines = []
    for row in rows:
        variant = ["interleaved"] if row["interleaved"] else []
        variant += [f"blocks of {row['block_size']}"] if row["block_size"] else []
        variant += ["float8"] if row["float8"] else []
        names = ("distinct", "moved", "turns", "least_turns", "instructions")
        cells = (row["arch"], row["dim"], ", ".join(variant), *(f"{row[n]:.2f}" for n in names))
        lines.append(cells)
    return table(head, lines)


def main() -> None:
    rows = compile_all(count, cases())
    print_all(rows, markdown(rows))


if __name__ == "__main__":
    main()
