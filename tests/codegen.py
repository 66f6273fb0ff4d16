"""Compile the Triton kernels for GPUs that are not there, and read what came out.

    python tests/codegen.py              JSON: an object for each kernel, and the page
    python tests/codegen.py --markdown   the page, reports/codegen/rotary.md

A process of its own: with TRITON_INTERPRET=1, as tests on a machine without a GPU set it, Triton
defines interpreted functions, which cannot be compiled. The launch comes from `plan`, which the
backend uses, and its arguments are specialised as Triton's own launcher would; tensors are on the
meta device, whose null pointers count as aligned, as those of the CUDA allocator are.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import native_specialize_impl

from longrope_kernels.calls.records import RotaryCall, Selection
from longrope_kernels.kernels import rotary
from longrope_kernels.kernels.launch import Launch
from longrope_kernels.rope.tables import Tables

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Case:
    """One call of the rotary kernel, as a model makes it."""

    model: str
    q_heads: int
    k_heads: int
    dim: int
    pairs: int
    dtype: str = "bfloat16"
    interleaved: bool = False
    backward: bool = False
    inplace: bool = False
    batch: int = 1
    seq: int = 8192
    layout: str = "bshd"
    select: str = "none"
    arch: int = 90

    def launch(self) -> Launch:
        """The launch of this call; ``select`` is none, lengths, sets or packed (with lengths)."""

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def heads(count: int) -> torch.Tensor:
            dtype = getattr(torch, self.dtype)
            if self.layout == "bhsd":
                return empty(self.batch, count, self.seq, self.dim, dtype=dtype).transpose(1, 2)
            return empty(self.batch, self.seq, count, self.dim, dtype=dtype)

        q, k = heads(self.q_heads), heads(self.k_heads)
        out = (q, k) if self.inplace else (torch.empty_like(q), torch.empty_like(k))
        sets = 1 if self.select == "none" else 2
        packed = self.select == "packed"
        sequences = 16 if packed else self.batch
        tables = Tables(
            empty(sets, 2, self.pairs),
            empty(sets),
            empty(sets, dtype=torch.float64),
            empty(sets),
            empty(sets, 2, self.pairs, dtype=torch.float64),
            self.interleaved,
        )
        selection = Selection(
            empty(sequences) if packed or self.select == "lengths" else None,
            empty(sequences, dtype=torch.int32) if self.select == "sets" else None,
            empty(sequences + 1, dtype=torch.int32) if packed else None,
        )
        positions = empty(self.seq).expand(self.batch, self.seq)
        call = RotaryCall(q, k, positions, tables, selection, self.backward)
        launch = rotary.plan(call, *out)
        assert launch is not None
        return launch


MODELS = (
    Case("Llama-3 8B", 32, 8, 128, 64),
    Case("Phi-3-mini", 32, 32, 96, 48),
    Case("Phi-4-mini", 24, 8, 128, 48),
)


def cases() -> Iterator[Case]:
    """Every variant for sm_90; the two that differ most for the others; then other calls."""
    for model, dtype, interleaved in itertools.product(
        MODELS, ("bfloat16", "float32"), (False, True)
    ):
        case = replace(model, dtype=dtype, interleaved=interleaved)
        for backward, inplace in itertools.product((False, True), repeat=2):
            yield replace(case, backward=backward, inplace=inplace)
        for arch in (80, 100):
            yield replace(case, arch=arch)
            yield replace(case, arch=arch, backward=True, inplace=True)
    llama = MODELS[0]
    yield replace(llama, dtype="float16")
    yield replace(llama, layout="bhsd")
    yield replace(llama, batch=64, seq=1, inplace=True)
    for select in ("lengths", "sets", "packed"):
        yield replace(llama, select=select)


def source(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget
) -> ASTSource:
    """What Triton's launcher would compile for these arguments."""
    backend = make_backend(target)
    values = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
    types, hints = [], []
    for parameter, value in zip(kernel.params, values, strict=True):
        if parameter.is_constexpr:
            kind, hint = "constexpr", None
        else:
            specialize = not parameter.do_not_specialize
            kind, hint = native_specialize_impl(type(backend), value, False, specialize, specialize)
        types.append(kind)
        hints.append(hint)
    constexprs = find_paths_if(types, lambda _, kind: kind == "constexpr")
    hinted = find_paths_if(hints, lambda _, hint: isinstance(hint, str))
    return ASTSource(
        kernel,
        dict(zip(kernel.arg_names, types, strict=True)),
        {path: get_iterable_path(values, path) for path in constexprs},
        {path: backend.parse_attr(get_iterable_path(hints, path)) for path in hinted},
    )


def wide_accesses(case: Case, constants: dict[str, int]) -> tuple[int, int]:
    """The 16-byte loads and stores of q and k in the program text, for a program of 128 threads.

    Loads stand twice: ahead of the loop for the first group, and in it for the next.
    """
    rotated = 2 * constants["BLOCK_P"]
    rows = constants["BLOCK_T"] * constants["BLOCK_H"]
    itemsize = getattr(torch, case.dtype).itemsize
    pieces = max(1, rows * rotated * itemsize // 16 // 128)
    rest = rows * constants["BLOCK_REST"] * itemsize // 16 // 128 if constants["REST"] else 0
    return 2 * pieces + rest, pieces + rest


class Compiled(NamedTuple):
    """A kernel in Triton's own language and in SASS, and what it takes of a multiprocessor."""

    ttgir: str
    sass: str
    registers: int
    stack: int
    shared: int
    warps: int

    def counts(self) -> Counter[str]:
        """How often each instruction stands in it."""
        counts = Counter(INSTRUCTION.findall(self.sass))
        del counts["NOP"]
        return counts


def compile_launch(launch: Launch, arch: int, folder: Path) -> Compiled:
    """What Triton and the ptxas that it takes make of a launch."""
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    text = source(launch.kernel, launch.args, launch.constants, target)
    compiled = triton.compile(text, target=target, options=options)
    cubin = folder / f"{os.getpid()}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "-sass", "-res-usage", cubin]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK"))
    metadata = compiled.metadata
    return Compiled(
        compiled.asm["ttgir"], dump, registers, stack, metadata.shared, metadata.num_warps
    )


def compile_case(case: Case, folder: Path) -> dict[str, Any]:
    """Compile and count."""
    launch = case.launch()
    compiled = compile_launch(launch, case.arch, folder)
    counts = compiled.counts()

    def number(*names: str, wide: bool | None = None) -> int:
        return sum(
            count
            for name, count in counts.items()
            if name.split(".")[0] in names and wide in (None, name.endswith(".128"))
        )

    loads, stores = wide_accesses(case, launch.constants)
    return {
        **asdict(case),
        "tokens": launch.constants["BLOCK_T"],
        "heads": launch.constants["BLOCK_H"],
        "warps": launch.warps,
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "local": number("LDL", "STL"),
        "instructions": counts.total(),
        "loads": number("LDG", wide=True),
        "expected_loads": loads,
        "narrow_loads": number("LDG", wide=False),
        "stores": number("STG", wide=True),
        "expected_stores": stores,
        "narrow_stores": number("STG", wide=False),
        "mufu": number("MUFU"),
    }


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """As Markdown; underscores of the head are spaces."""
    head = [name.replace("_", " ") for name in head]
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    names = ("registers", "instructions", "loads", "narrow_loads", "stores", "mufu", "local")
    head = ("model", "heads q/k", "dim", "R", "dtype", "variant", "sm", "tile", *names)
    lines = []
    for row in rows:
        variant = [
            "interleaved" if row["interleaved"] else "half",
            "backward" if row["backward"] else "forward",
        ]
        variant += ["in place"] if row["inplace"] else []
        variant += [
            row[key] for key, usual in (("layout", "bshd"), ("select", "none")) if row[key] != usual
        ]
        variant += [f"{row['batch']} x {row['seq']}"] if row["seq"] != 8192 else []
        cells = (
            row["model"],
            f"{row['q_heads']}/{row['k_heads']}",
            row["dim"],
            2 * row["pairs"],
            row["dtype"],
            ", ".join(variant),
            row["arch"],
            f"{row['tokens']} x {row['heads']}",
            *(row[name] for name in names),
        )
        lines.append(cells)
    return table(head, lines)


def compile_all(
    compile_case: Callable[[Any, Path], dict[str, Any]], cases: Iterable[Any]
) -> list[dict[str, Any]]:
    """A row for each case, by as many processes as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        os.environ["TRITON_CACHE_DIR"] = folder
        return list(pool.map(compile_case, *zip(*((c, Path(folder)) for c in cases), strict=True)))


def print_all(rows: list[dict[str, Any]], tables: str) -> None:
    """What the arguments of this script ask for."""
    command = f"python tests/{Path(sys.argv[0]).name} --markdown"
    compiler = f"Triton {triton.__version__}"
    page = f"Made by `{command}`, with {compiler}. Nothing here was timed.\n\n{tables}\n"
    if "--markdown" in sys.argv[1:]:
        print(page, end="")
    else:
        print(json.dumps({"rows": rows, "page": page}))


def main() -> None:
    rows = compile_all(compile_case, cases())
    print_all(rows, markdown(rows))


if __name__ == "__main__":
    main()
