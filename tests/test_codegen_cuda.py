"""What nvcc makes of csrc/cuda, for GPUs that need not be there."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS = 65536  # of a multiprocessor
# Blocks of a multiprocessor at once that csrc/cuda/decode_kernel.h counts on, by head_dim.
DECODE_BLOCKS = {64: 4, 128: 3, 256: 2}
DECODE_THREADS = 128
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']*)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    spills: int  # bytes of stack, and stored and loaded there
    registers: int


def compiled(name: str, folder: Path) -> list[Kernel]:
    """The kernels of csrc/cuda/<name>.cu; a warning is an error."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", "-Xcompiler", "-Wall,-Wextra"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
    command += ["-c", str(CSRC / "cuda" / f"{name}.cu"), "-o", str(folder / f"{name}.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "warning" not in output.lower(), output
    return [
        Kernel(
            match["name"],
            match["arch"],
            sum(int(match[what]) for what in ("stack", "stores", "loads")),
            int(match["registers"]),
        )
        for match in KERNEL.finditer(output)
    ]


@pytest.fixture(scope="module")
def rotary(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return compiled("rotary", tmp_path_factory.mktemp("rotary"))


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """float16 is the same code but for its conversions."""
    return compiled("decode_bfloat16", tmp_path_factory.mktemp("decode"))


def test_every_variant_is_compiled_for_each_architecture(
    rotary: list[Kernel], decode: list[Kernel]
) -> None:
    for arch in ARCHITECTURES:
        # Three types; halves, interleaved and element by element.
        assert sum(kernel.arch == arch for kernel in rotary) == 9
        # Three head_dims with caches of 16 and of 8 bits, and the kernel that combines splits.
        assert sum(kernel.arch == arch for kernel in decode) == 7


def test_nothing_spills(rotary: list[Kernel], decode: list[Kernel]) -> None:
    offenders = [kernel for kernel in (*rotary, *decode) if kernel.spills]
    assert not offenders, offenders


def test_five_blocks_of_the_rotation_fit_a_multiprocessor(rotary: list[Kernel]) -> None:
    """20 warps with eight loads of 16 bytes each in flight: 80 KB."""
    assert all(5 * 128 * -(-kernel.registers // 8) * 8 <= REGISTERS for kernel in rotary)


def test_so_many_blocks_of_decode_fit_a_multiprocessor(decode: list[Kernel]) -> None:
    for kernel in decode:
        dim = re.search(r"decode_kernel.*Li(\d+)E", kernel.name)
        if dim is not None:
            threads = DECODE_BLOCKS[int(dim[1])] * DECODE_THREADS
            assert threads * -(-kernel.registers // 8) * 8 <= REGISTERS, kernel
