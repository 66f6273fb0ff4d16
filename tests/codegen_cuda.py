"""Compile a CUDA source of csrc/cuda for GPUs that are not there, and read what came out.

    python tests/codegen_cuda.py attention.cu              one JSON object a kernel, as a list
    python tests/codegen_cuda.py attention.cu --markdown   a page, of attention.cu that under
                                                           reports/codegen/

nvcc compiles with the package's own options, and every warning is an error; ptxas reports registers
and spills; the cuobjdump of triton's wheel prints the instructions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a")

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
Row = dict[str, Any]


def nvcc() -> str | None:
    """The compiler, where there is one."""
    for name in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def cuobjdump() -> str:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("no triton, whose wheel has cuobjdump")
    return str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")


def compile_source(name: str, arch: str, folder: Path) -> tuple[Path, str]:
    """The cubin of a source for an architecture, and what ptxas says of it."""
    cubin, compiler = folder / f"{name}.{arch}.cubin", nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc: put it on the PATH, or name it in CUDACXX")
    command = [compiler, "-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    command += ["-Werror=all-warnings", f"-arch=sm_{arch}", "-cubin", "-o", str(cubin)]
    result = subprocess.run([*command, str(SOURCES / name)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return cubin, result.stdout + result.stderr


def instructions_of(cubin: Path) -> dict[str, list[tuple[int, str, str]]]:
    """The instructions of each kernel: (address, name, operands)."""
    result = subprocess.run(
        [cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    functions = re.split(r"\n\s+Function : ", result.stdout)[1:]
    return {
        text.split("\n", 1)[0].strip(): [
            (int(at, 16), name, operands) for at, name, operands in INSTRUCTION.findall(text)
        ]
        for text in functions
    }


def loop_of(code: list[tuple[int, str, str]], name: str) -> list[str]:
    """The instructions of the shortest loop that holds all of those called ``name``."""
    places = [at for at, found, _ in code if found.startswith(name)]
    loops = []
    for at, found, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if found == "BRA" and target and places:
            begin = int(target[1], 16)
            if begin <= places[0] and places[-1] < at:
                loops.append((begin, at))
    if not loops:
        return []
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    return [found for at, found, _ in code if begin <= at <= end]


def rows_of(name: str, arch: str) -> list[Row]:
    """One row for each kernel of a source: what ptxas reports, and instructions by their name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, report = compile_source(name, arch, Path(folder))
        code = instructions_of(cubin)
    rows = []
    for found in REPORT.finditer(report):
        instructions = code[found["name"]]
        loop = loop_of(instructions, "HMMA")
        rows.append(
            {
                "kernel": found["name"],
                "arch": arch,
                "registers": int(found["registers"]),
                "stack": int(found["stack"]),
                "spilled": int(found["stores"]) + int(found["loads"]),
                "static_shared": int(found["shared"] or 0),
                "instructions": len(instructions),
                "of_kernel": Counter(called for _, called, _ in instructions),
                "loop": len(loop),
                "of_loop": Counter(loop),
            }
        )
    return rows


def count(counted: dict[str, int], prefix: str) -> int:
    """How many instructions begin with ``prefix``."""
    return sum(n for called, n in counted.items() if called.startswith(prefix))


def page(name: str, rows: list[Row]) -> str:
    """The rows of all kernels of a source as a page."""
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release ([\d.]+)", version.stdout)
    assert release, version.stdout
    return (
        f"# csrc/cuda/{name}, compiled by nvcc {release[1]}\n\n"
        f"Made by `python tests/codegen_cuda.py {name} --markdown`. Counts of the loop over tiles"
        " of keys include a softcap's, which a branch skips. Nothing here was timed.\n\n"
        f"{table(rows)}\n"
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| sm | kernel | registers | spilled bytes | static shared | loop | HMMA | LDSM | EX2 |"
        " instructions |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        loop = [count(row["of_loop"], name) for name in ("HMMA", "LDSM", "MUFU.EX2")]
        cells = [row["arch"], short(row["kernel"]), row["registers"], row["spilled"]]
        cells += [row["static_shared"], row["loop"], *loop, row["instructions"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def short(mangled: str) -> str:
    """A kernel's name, element type and numbers."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    types = re.findall(r"B?Float16", mangled)
    numbers = re.findall(r"Li(\d+)", mangled)
    return " ".join([name[1] if name else mangled, *types[:1], *numbers])


if __name__ == "__main__":
    every = [row for arch in ARCHITECTURES for row in rows_of(sys.argv[1], arch)]
    if "--markdown" in sys.argv:
        print(page(sys.argv[1], every), end="")
    else:
        print(json.dumps(every, indent=1))
