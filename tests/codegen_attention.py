"""Compile the attention kernels for GPUs that are not there, and read what came out.

    python tests/codegen_attention.py              JSON: an object for each kernel, and the page
    python tests/codegen_attention.py --markdown   the page, reports/codegen/attention.md

As codegen.py does it: the launches come from the functions that the backend uses.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from codegen import INSTRUCTION, compile_all, compile_launch, print_all, table
from sass import touched_too_early

from longrope_kernels.calls.records import AttentionCall, Keys, Scores, Selection
from longrope_kernels.kernels import attention, attention_backward
from longrope_kernels.rope.tables import Tables


@dataclass(frozen=True)
class Case:
    """One kernel of a call: 32 heads of q, 8 of k, a sequence of 8192 tokens.

    pairs: those that are rotated; None: all there are, 0: the same kernel without rotation.
    """

    dim: int
    arch: int = 90
    kernel: str = "prepass"
    causal: bool = True
    pairs: int | None = None
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    packed: bool = False
    padded: bool = False
    sinks: bool = False
    dtype: str = "bfloat16"

    def launch(self) -> Any:
        """The launch of this kernel, for tensors without memory."""
        seq, pairs = 8192, self.dim // 2 if self.pairs is None else self.pairs

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def heads(count: int) -> torch.Tensor:
            return empty(1, seq, count, self.dim, dtype=getattr(torch, self.dtype))

        def rotated(count: int) -> torch.Tensor:
            return heads(count).view(1, count, seq, self.dim).transpose(1, 2)

        q, k, v, out = heads(32), heads(8), heads(8), heads(32)
        positions = empty(seq).expand(1, seq)
        tables = Tables(
            *(empty(2, 2, pairs), empty(2), empty(2, dtype=torch.float64), empty(2)),
            empty(2, 2, pairs, dtype=torch.float64),
            self.interleaved,
        )
        cu = empty(9, dtype=torch.int32) if self.packed else None
        kv_start = empty(1) if self.padded else None
        selection = Selection(empty(8 if self.packed else 1), None, cu)
        scores = Scores(self.causal, self.dim**-0.5, self.window, self.softcap)
        sinks = empty(32, dtype=getattr(torch, self.dtype)) if self.sinks else None

        def call(q: torch.Tensor, k: torch.Tensor) -> AttentionCall:
            keys = Keys(k, v, positions, kv_start, cu)
            return AttentionCall(q, positions, keys, tables, selection, scores, sinks)

        lse = empty(1, 32, seq, dtype=torch.float32)
        if self.kernel == "prepass":
            return attention.plan(call(q, rotated(8)), out, lse, True, self.arch)
        if self.kernel == "registers":
            return attention.plan(call(q, k), out, lse, False, self.arch)
        delta = torch.empty_like(lse)
        if self.kernel == "delta":
            return attention_backward.plan_delta(out, None, out, lse, delta)
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        launches = attention_backward.plan(
            call(rotated(32), rotated(8)), out, lse, delta, *gradients, self.arch
        )
        names = ("dk_dv", "dq") if len(launches) == 2 else ("dk", "dv", "dq")
        return dict(zip(names, launches, strict=True))[self.kernel]


DIMS = (64, 80, 96, 128, 256)
# Beside the plain call, for head_dim 128.
VARIANTS = {
    "prepass": (
        {"interleaved": True},
        {"pairs": 48},
        {"window": 1024},
        {"softcap": 50.0},
        {"packed": True},
        {"padded": True},
        {"sinks": True},
        {"dtype": "float16", "causal": False},
    ),
    "registers": ({"interleaved": True}, {"window": 1024}, {"packed": True}),
    "dk": ({"softcap": 50.0}, {"packed": True}),
    "dv": ({"softcap": 50.0}, {"packed": True}),
    "dq": ({"softcap": 50.0}, {"packed": True}),
}


# For the other head_dims: what takes most registers.
DEMANDING = {
    "prepass": ({"interleaved": True}, {"window": 1024, "softcap": 50.0, "packed": True}),
    "registers": ({"interleaved": True}, {"window": 1024, "packed": True}),
    "dk_dv": ({"interleaved": True}, {"softcap": 50.0, "packed": True}),
    "dk": ({"interleaved": True}, {"softcap": 50.0, "packed": True}),
    "dv": ({"softcap": 50.0, "packed": True},),
    "dq": ({"interleaved": True}, {"window": 1024, "softcap": 50.0, "packed": True}),
}
# Those that have smaller tiles than the plain call, or had to get them.
DEMANDING_80 = (
    Case(64, 80, "prepass", interleaved=True),
    Case(96, 80, "registers", window=1024, packed=True),
    Case(96, 80, "dk", softcap=50.0, packed=True),
    Case(256, 80, "dq", softcap=50.0),
)
# Of those that are no multiple of 16.
UNEVEN_DIMS = (72, 120)


def kernels_of(arch: int, dim: int) -> tuple[str, ...]:
    """The kernels with a loop that serve a head_dim."""
    split = attention_backward.choose_configs(arch, dim, 0.0).dv is not None
    return "prepass", "registers", "dq", *(("dk", "dv") if split else ("dk_dv",))


def cases() -> Iterator[Case]:
    """Every head_dim for each architecture, with rotation and without; variants; head_dim 128 for
    those that take the tiles of 8.0, and for sm_100; then others of those, and uneven ones.
    """
    for arch, dim in itertools.product((80, 90), DIMS):
        for kernel in kernels_of(arch, dim):
            yield Case(dim, arch, kernel)
            if kernel != "dv":  # which rotates nothing
                yield Case(dim, arch, kernel, pairs=0)
            if dim == 128:
                yield from (Case(dim, arch, kernel, **variant) for variant in VARIANTS[kernel])
            elif arch == 90:
                yield from (Case(dim, arch, kernel, **variant) for variant in DEMANDING[kernel])
            if dim != 128 and kernel == "prepass":
                yield Case(dim, arch, kernel, causal=False)
        yield Case(dim, arch, "delta")
    yield from DEMANDING_80
    for arch in (86, 89, 100, 120):
        for kernel in ("prepass", "registers", "dk", "dv", "dq"):
            yield Case(128, arch, kernel)
    for arch, dim in itertools.product((86, 89, 120), (64, 96, 256)):
        yield from (Case(dim, arch, kernel) for kernel in kernels_of(arch, dim))
        yield Case(dim, arch, window=1024, packed=True)
    for arch, dim in itertools.product((80, 90), UNEVEN_DIMS):
        yield from (Case(dim, arch, kernel) for kernel in kernels_of(arch, dim))
        yield Case(dim, arch, window=1024, softcap=50.0, packed=True)
        yield Case(dim, arch, "dq", packed=True)
    yield Case(256, padded=True)


def short_products(ttgir: str) -> int:
    """Matrix products of fewer columns than their layout has: Triton 3.6 takes wrong ones for them.

    A lane holds ``kWidth`` columns in a row; up to half as many as four lanes hold may be missing.
    """
    product = r"tt\.dot .*: tensor<\d+x(\d+)x\w+, #ttg\.dot_op<.*?kWidth = (\d+)"
    return sum(int(columns) < 4 * int(width) for columns, width in re.findall(product, ttgir))


def tile_loop(dump: str) -> list[str]:
    """The instructions of one tile: of the shortest loop with matrix instructions."""
    lines = []
    for line in dump.splitlines():
        place, name = re.search(r"/\*([0-9a-f]{4,})\*/", line), INSTRUCTION.search(line)
        if place and name and name[1] != "NOP":
            branch = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", line)
            lines.append((int(place[1], 16), name[1], int(branch[1], 16) if branch else None))
    loops = [
        [name for place, name, _ in lines if target <= place <= end]
        for end, _, target in lines
        if target is not None and target < end
    ]
    return min((x for x in loops if any("MMA" in name for name in x)), key=len, default=[])


def compile_case(case: Case, folder: Path) -> dict[str, Any]:
    """Compile and count."""
    launch = case.launch()
    compiled = compile_launch(launch, case.arch, folder)
    counts = compiled.counts()
    tile = tile_loop(compiled.sass)

    def number(*names: str) -> int:
        return sum(count for name, count in counts.items() if name.split(".")[0] in names)

    return {
        **asdict(case),
        "tile": [launch.constants["BLOCK_M"], launch.constants.get("BLOCK_N", 0)],
        "warps": compiled.warps,
        "stages": launch.stages,
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "local": number("LDL", "STL"),
        "instructions": counts.total(),
        "hgmma": number("HGMMA"),
        "hmma": number("HMMA"),
        "mufu": number("MUFU"),
        "short_products": short_products(compiled.ttgir),
        "touched_too_early": touched_too_early(compiled.sass),
        "tile_waits": tile.count("WARPGROUP.DEPBAR.LE"),
        "tile_instructions": len(tile),
        "tile_local": sum(name.split(".")[0] in ("LDL", "STL") for name in tile),
        "tile_matrix": sum("MMA" in name for name in tile),
        "tile_mufu": sum(name.startswith("MUFU") for name in tile),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    names = ("registers", "shared", "instructions", "local")
    of_tile = ("tile_instructions", "tile_matrix", "tile_mufu")
    head = ("sm", "kernel", "head_dim", "variant", "tile", "warps", "stages", *names, *of_tile)
    lines = []
    for row in rows:
        variant = [] if row["causal"] else ["not causal"]
        flags = ("interleaved", "window", "softcap", "packed", "padded", "sinks")
        variant += [name for name in flags if row[name]]
        variant += [f"{2 * row['pairs']} rotated"] if row["pairs"] else []
        variant += ["without rotation"] if row["pairs"] == 0 else []
        variant += ["float16"] if row["dtype"] == "float16" else []
        cells = (
            *(row["arch"], row["kernel"], row["dim"], ", ".join(variant)),
            *(" x ".join(map(str, row["tile"])), row["warps"], row["stages"]),
            *(row[name] for name in (*names, *of_tile)),
        )
        lines.append(cells)
    return table(head, lines)


def cost_of_rotation(rows: list[dict[str, Any]]) -> str:
    """A table of each kernel beside the same one without rotation."""
    of_case = {Case(**{x.name: row[x.name] for x in fields(Case)}): row for row in rows}
    names = ("tile_instructions", "tile_mufu", "instructions", "registers", "shared", "local")
    columns = [f"{name}{part}" for name in names[:2] for part in ("", ", without", ", more")]
    columns += [f"{name}{part}" for name in names[2:] for part in ("", ", without")]
    head = ("sm", "kernel", "head_dim", "tile", *columns)
    lines = []
    for case, without in of_case.items():
        if case.pairs != 0:
            continue
        row = of_case[replace(case, pairs=None)]
        cells = [case.arch, case.kernel, case.dim, " x ".join(map(str, row["tile"]))]
        for name in names:
            cells += [row[name], without[name]]
            cells += [row[name] - without[name]] if name in names[:2] else []
        lines.append(cells)
    return table(head, lines)


def main() -> None:
    rows = compile_all(compile_case, cases())
    print_all(rows, f"{markdown(rows)}\n\n## The cost of rotation\n\n{cost_of_rotation(rows)}")


if __name__ == "__main__":
    main()
