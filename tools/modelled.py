"""What the compiled kernels would take on an A100 and an H100, by a model: reports/modelled/.

    python tools/modelled.py           names the pages that are out of date
    python tools/modelled.py --write   writes them

The counts come from reports/codegen/, the calls are those of benchmarks/, the peaks are public. As
soon as a report under reports/ was made on one of these GPUs, the pages say how far off the model
was there. A modelled time is no measurement: no other page takes a number from here.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "reports" / "modelled"
MB = 1e-6
US = 1e6

# ----------------------------------------------------------------------------------------- devices

SCHEDULERS = 4  # of a multiprocessor; each issues an instruction of a warp in a cycle
SPECIAL = 16  # results of the special function units of a multiprocessor in a cycle
REGISTERS = 65536  # of a multiprocessor
MOST_WARPS = 64  # on a multiprocessor
RESERVED_SHARED = 1024  # bytes of each program, by the system


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU. clock in Hz, bandwidth in bytes/s, matrix in bfloat16 FLOP/s, dense."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float
    matrix: float
    shared: int  # bytes of a multiprocessor
    source: str

    @property
    def issue(self) -> float:
        """Instructions of warps in a second."""
        return self.multiprocessors * SCHEDULERS * self.clock

    @property
    def special(self) -> float:
        """Results of the special function units in a second."""
        return self.multiprocessors * SPECIAL * self.clock


_HOPPER = "NVIDIA H100 Tensor Core GPU architecture white paper"
A100 = Device(
    *("A100", 80, 108, 1.41e9, 2.039e12, 312e12, 164 * 1024),
    "NVIDIA A100 80GB (SXM) data sheet; NVIDIA A100 Tensor Core GPU architecture white paper",
)
# The clock is the one at which the peak of the matrix units holds: 4096 FLOP in a cycle each.
H100 = Device(
    *("H100", 90, 132, 1.83e9, 3.35e12, 989.4e12, 228 * 1024),
    f"NVIDIA H100 (SXM) data sheet; {_HOPPER}",
)
H200 = Device(
    *("H200", 90, 132, 1.83e9, 4.8e12, 989.4e12, 228 * 1024),
    f"NVIDIA H200 (SXM) data sheet; {_HOPPER}",
)
SHOWN = (A100, H100)
DEVICES = (A100, H100, H200)  # where the model can be held against a report

# ------------------------------------------------------------------------------------------ tables

Counts = dict[str, str]


@cache
def table(name: str) -> list[Counts]:
    """The first table of reports/codegen/NAME.md: cells by the names of their columns."""
    page = (ROOT / "reports" / "codegen" / f"{name}.md").read_text("utf-8")
    head, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.split("\n\n")[1].splitlines()  # after the line that says who made it
    )
    return [dict(zip(head, row, strict=True)) for row in body]


def find(name: str, **cells: object) -> Counts:
    """The row with these cells; spaces in names of columns are written as _.

    Raises:
        LookupError: there is none, or several that differ.
    """
    wanted = {key.replace("_", " "): str(value) for key, value in cells.items()}
    found = [row for row in table(name) if all(row[k] == v for k, v in wanted.items())]
    if not found or any(row != found[0] for row in found):
        raise LookupError(f"reports/codegen/{name}.md: {len(found)} rows with {wanted}")
    return found[0]


def tile_of(counts: Counts) -> tuple[int, int]:
    first, _, second = counts["tile"].partition(" x ")
    return int(first), int(second)


# ------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Work:
    """What one launch does: bytes to and from memory, FLOP of the matrix units, instructions of
    warps, results of the special function units; and the row of the compiler's table."""

    kernel: str
    bytes: int
    flops: int = 0
    instructions: int = 0
    special: int = 0
    counts: Counts | None = None

    def seconds(self, device: Device) -> dict[str, float]:
        """What each unit takes alone, at its peak."""
        return {
            "memory": self.bytes / device.bandwidth,
            "matrix": self.flops / device.matrix,
            "issue": self.instructions / device.issue,
            "special": self.special / device.special,
        }


@dataclass(frozen=True)
class Call:
    """A row of the benchmarks, ``group`` and ``name`` as there: launches, one after another."""

    work: str
    group: str
    name: str
    launches: tuple[Work, ...]

    def seconds(self, device: Device) -> float:
        """The model: of each launch, the time of the unit that takes longest."""
        return sum(max(launch.seconds(device).values()) for launch in self.launches)

    def apart(self, device: Device) -> float:
        """The same where nothing overlaps with anything."""
        return sum(sum(launch.seconds(device).values()) for launch in self.launches)


# ------------------------------------------------------------------------------------------- calls

Q_HEADS, K_HEADS, DIM = 32, 8, 128
ROTATION_WARPS = 4  # of a program of the standalone rotation, where there are tokens enough
ITEMSIZE = {"bfloat16": 2, "float32": 4}


def rotations(arch: int) -> Iterator[Call]:
    """Every instruction is counted for each group of heads: more than run."""
    # In place and out of place are the same program where all dimensions are rotated.
    kinds = {"forward": "half, forward", "in place": "half, forward", "backward": "half, backward"}
    for tokens, dtype in ((4096, "float32"), (4096, "bfloat16"), (8192, "bfloat16")):
        for kind, variant in kinds.items():
            of = {"model": "Llama-3 8B", "dtype": dtype, "sm": arch}
            try:
                counts = find("rotary", **of, variant=variant)
            except LookupError:
                counts = find("rotary", **of, variant=f"{variant}, in place")
            block_t, block_h = tile_of(counts)
            groups = -(-Q_HEADS // block_h) + -(-K_HEADS // block_h)
            warps = ROTATION_WARPS * groups * -(-tokens // block_t)
            yield Call(
                "rotation",
                f"{kind}, S = {tokens}, {dtype}",
                "triton",
                (
                    Work(
                        *("rotation", 2 * (Q_HEADS + K_HEADS) * DIM * tokens * ITEMSIZE[dtype], 0),
                        *(warps * int(counts["instructions"]), 32 * warps * int(counts["mufu"])),
                        counts,
                    ),
                ),
            )


# tokens, dim, causal
PROMPTS = (
    *((tokens, 128, causal) for tokens in (2048, 8192, 32768) for causal in (True, False)),
    (131072, 128, True),
    *((8192, dim, causal) for dim in (64, 96) for causal in (True, False)),
    *((32768, dim, True) for dim in (64, 96)),
)
# Matrix products of a tile.
PRODUCTS = {"prepass": 2, "registers": 2, "dq": 3, "dk": 3, "dv": 2, "dk_dv": 4}


def tiles(tokens: int, block_m: int, block_n: int, causal: bool, by_keys: bool) -> int:
    """Tiles of one head that hold a score which counts."""
    rows, columns = -(-tokens // block_m), -(-tokens // block_n)
    if not causal:
        return rows * columns
    if by_keys:
        return sum(rows - j * block_n // block_m for j in range(columns))
    return sum(-(-min(tokens, (i + 1) * block_m) // block_n) for i in range(rows))


def products(kernel: str, arch: int, tokens: int, dim: int, causal: bool, moved: int) -> Work:
    """A kernel with matrix products; ``moved``: bytes, each input once and each output once."""
    counts = find("attention", sm=arch, kernel=kernel, head_dim=dim, variant="")
    block_m, block_n = tile_of(counts)
    visits = Q_HEADS * tiles(tokens, block_m, block_n, causal, kernel.startswith(("dk", "dv")))
    warps = visits * int(counts["warps"])
    return Work(
        *(kernel, moved, visits * PRODUCTS[kernel] * 2 * block_m * block_n * dim),
        *(warps * int(counts["tile instructions"]), 32 * warps * int(counts["tile mufu"])),
        counts,
    )


def attentions(arch: int) -> Iterator[Call]:
    apart = {  # the head_dims with a kernel for dk and one for dv
        int(row["head dim"])
        for row in table("attention")
        if (row["sm"], row["kernel"]) == (str(arch), "dv")
    }
    for tokens, dim, causal in PROMPTS:
        group = f"S = {tokens}, d = {dim}, {'causal' if causal else 'full'}"
        q, k = (2 * heads * dim * tokens for heads in (Q_HEADS, K_HEADS))
        of = (arch, tokens, dim, causal)
        inputs = q + 2 * k
        turned_k = Work("rotation of k", 2 * k)
        yield Call(
            *("prefill", f"attention forward, {group}", "triton prepass"),
            (turned_k, products("prepass", *of, inputs + q)),
        )
        yield Call(
            *("prefill", f"attention forward, {group}", "triton registers"),
            (products("registers", *of, inputs + q),),
        )
        by_keys = ("dk", "dv") if dim in apart else ("dk_dv",)
        outputs = 2 * k // len(by_keys)
        yield Call(
            *("backward", f"attention backward, {group}", "triton prepass"),
            (
                Work("delta", 2 * q),
                Work("rotation of q and k", 2 * (q + k)),
                *(products(kernel, *of, inputs + q + outputs) for kernel in by_keys),
                products("dq", *of, inputs + 2 * q),
            ),
        )


# Lengths of the sequences of a batch; each kind of cache: its variant in the table.
BATCHES = ((131072,), (4096,) * 32, (8192,), (300, 4096, 4097, 32768) * 4)
CACHES = {
    "triton": ("", 2),
    "triton, paged": ("blocks of 16", 2),
    "triton, paged float8": ("blocks of 16, float8", 1),
    "triton, rotated keys": ("rotated keys", 2),
}


def decodes(arch: int) -> Iterator[Call]:
    for lengths in BATCHES:
        count, longest, keys = len(lengths), max(lengths), sum(lengths)
        batch = f"{count} x {longest}" if len(set(lengths)) == 1 else f"{count} to {longest}"
        for name, (variant, itemsize) in CACHES.items():
            counts = find("decode", sm=arch, head_dim=DIM, variant=variant)
            rows, block_n = tile_of(counts)
            visits = K_HEADS * sum(-(-length // block_n) for length in lengths)
            warps = visits * int(counts["warps"])
            launch = Work(
                *("decode", 2 * K_HEADS * DIM * keys * itemsize + 4 * count * Q_HEADS * DIM),
                visits * 4 * rows * block_n * DIM,
                *(warps * int(counts["tile instructions"]), 32 * warps * int(counts["tile mufu"])),
                counts,
            )
            yield Call("decode", f"decode, {batch} keys, bfloat16", name, (launch,))


def calls(arch: int) -> list[Call]:
    """Every call that is modelled, for the kernels compiled for ``arch``."""
    return [*rotations(arch), *attentions(arch), *decodes(arch)]


# ------------------------------------------------------------------------------------------- error


def errors(reports: Path) -> Iterator[tuple[str, str, list[float]]]:
    """(report, work, measured over modelled) of every report of a GPU that the model knows."""
    for file in sorted(reports.glob("*/*/results.json")):
        report = json.loads(file.read_text("utf-8"))
        gpu = report.get("machine", {}).get("gpu")
        device = next((d for d in DEVICES if gpu and d.name in gpu["name"]), None)
        if device is None:
            continue
        measured = {(row["group"], row["name"]): row["median"] for row in report["rows"]}
        ratios: dict[str, list[float]] = {}
        for call in calls(device.arch):
            if (call.group, call.name) in measured:
                ratio = measured[call.group, call.name] / call.seconds(device)
                ratios.setdefault(call.work, []).append(ratio)
        for work, of_work in ratios.items():
            yield file.parent.relative_to(reports).as_posix(), work, of_work


# -------------------------------------------------------------------------------------------- page


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + " --- |" * len(head))
    return lines


def resident_warps(device: Device, counts: Counts, warps: int) -> int:
    """Warps that fit a multiprocessor, by registers and shared memory."""
    registers = -(-int(counts["registers"]) // 8) * 8 * 32 * warps
    shared = int(counts.get("shared", 0)) + RESERVED_SHARED
    return warps * min(REGISTERS // registers, device.shared // shared, MOST_WARPS // warps)


def _compiled(device: Device, of_work: list[Call]) -> list[str]:
    """The rows of the compiler's tables that the calls rest on, each once."""
    rows: dict[tuple[object, ...], None] = {}
    for launch in (launch for call in of_work for launch in call.launches):
        counts = launch.counts
        if counts is None:
            continue
        warps = int(counts.get("warps", ROTATION_WARPS))
        what = counts.get("variant") or launch.kernel
        of_tile = (counts.get(f"tile {x}", "-") for x in ("instructions", "matrix", "mufu"))
        cells = (
            counts.get("kernel", what),
            counts.get("dtype", "bfloat16"),
            counts.get("head dim", counts.get("dim")),
            *(counts["tile"], warps, counts["registers"], counts.get("shared", "-")),
            f"{resident_warps(device, counts, warps)} of {MOST_WARPS}",
            *(counts["instructions"], *of_tile),
        )
        rows[cells] = None
    head = ("kernel", "dtype", "head dim", "tile", "warps", "registers", "shared", "resident warps")
    of_program = ("instructions", "of a tile", "matrix of a tile", "MUFU of a tile")
    return markdown((*head, *of_program), rows)


def _times(device: Device, of_work: list[Call]) -> list[str]:
    head = ("call", "name", "MB", "GFLOP", "instructions, millions", "MUFU, millions")
    times = ("memory", "matrix", "issue", "special")
    rows = []
    for call in of_work:
        total = {unit: sum(x.seconds(device)[unit] for x in call.launches) for unit in times}
        longest = max(call.launches, key=lambda x: max(x.seconds(device).values()))
        of_longest = longest.seconds(device)
        bound = max(of_longest, key=of_longest.__getitem__)
        rows.append(
            (
                *(call.group.replace("attention ", ""), call.name),
                f"{MB * sum(x.bytes for x in call.launches):.2f}",
                f"{1e-9 * sum(x.flops for x in call.launches):.2f}",
                f"{1e-6 * sum(x.instructions for x in call.launches):.2f}",
                f"{1e-6 * sum(x.special for x in call.launches):.2f}",
                *(f"{US * total[unit]:.2f}" for unit in times),
                bound if len(call.launches) == 1 else f"{bound} ({longest.kernel})",
                f"{US * call.seconds(device):.2f}",
                f"{US * call.apart(device):.2f}",
            )
        )
    units = (f"{unit}, us" for unit in times)
    return markdown((*head, *units, "bound by", "modelled, us", "nothing overlaps, us"), rows)


TITLES = {
    "rotation": "The rotation: q (1, S, 32, 128), k (1, S, 8, 128)",
    "prefill": "Prefill, rotation included: q (1, S, 32, d), k and v (1, S, 8, d), bfloat16",
    "backward": "Its backward",
    "decode": "Decoding: a query of 32 heads, a cache of 8 heads of 128",
}
MODEL = """\
**Nothing on this page was measured.** The times are those of a model. They are no claim about the
speed of these kernels, and no other page takes a number from here. Made by
`python tools/modelled.py --write`.

## The model

A launch takes the longest of four times, each at the peak of its unit, and the launches of a call
follow one another:

- memory: the bytes that it must move, each input read once and each output written once;
- matrix: the FLOP of every tile that holds a score which counts, hidden halves included;
- issue: the instructions of the loop over tiles, times the tiles, times the warps. Of the
  rotation: every instruction of the program once for each group of heads, which is more than run;
- special: the results of the special function units (MUFU) of the same loop, 32 of each.

Instructions, MUFU, registers and shared memory are those that Triton's compiler made of the
kernels offline (`reports/codegen/`). "Nothing overlaps" adds the four up instead. What the model
leaves out: latencies, launches, the ends of a loop, masks, a last wave that is not full, caches
that keep less than assumed, clocks below the boost, and the combination of splits in decoding. So
the modelled time is what a perfect schedule could reach, not what to expect, and even the sum is
no upper bound.
"""


def page(device: Device, reports: Path = ROOT / "reports") -> str:
    """The page of one GPU, as Markdown."""
    lines = [f"# {device.name}: modelled, not measured", "", MODEL, "## The peaks", ""]
    lines += markdown(
        ("", "peak"),
        (
            ("memory", f"{1e-9 * device.bandwidth:.0f} GB/s"),
            ("matrix products, bfloat16, dense", f"{1e-12 * device.matrix:.1f} TFLOP/s"),
            ("multiprocessors", device.multiprocessors),
            ("clock", f"{1e-9 * device.clock:.2f} GHz"),
            ("instructions of warps, a cycle and multiprocessor", SCHEDULERS),
            ("MUFU results, a cycle and multiprocessor", SPECIAL),
        ),
    )
    lines += [
        "",
        f"Sources: {device.source}; the last two lines: CUDA C++ Programming Guide, compute "
        f"capability {device.arch / 10}.",
        *("", "## The error of the model", ""),
    ]
    found = list(errors(reports))
    if found:
        lines += ["Measured over modelled time, of the calls that a report has:", ""]
        lines += markdown(
            ("report", "work", "calls", "median", "least", "most"),
            (
                (report, work, len(x), *(f"{f(x):.2f}" for f in (statistics.median, min, max)))
                for report, work, x in found
            ),
        )
    else:
        lines += ["No GPU has been measured: the error is unknown."]
    for work, title in TITLES.items():
        of_work = [call for call in calls(device.arch) if call.work == work]
        lines += ["", f"## {title}", "", *_compiled(device, of_work), ""]
        lines += _times(device, of_work)
    return "\n".join(lines) + "\n"


def main() -> None:
    for device in SHOWN:
        path = PAGES / f"{device.name.lower()}.md"
        text = page(device)
        if path.exists() and path.read_text("utf-8") == text:
            continue
        print(path.relative_to(ROOT))
        if "--write" in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
