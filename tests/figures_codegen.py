"""What compilers make of the kernels, from the pages under reports/codegen/."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from report_files import ROOT


def compiled(name: str) -> list[dict[str, str]]:
    """The first table of reports/codegen/NAME.md: cells by the names of their columns."""
    text = (ROOT / f"reports/codegen/{name}.md").read_text("utf-8")
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n\n")[1].splitlines()
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def of_tile(name: str, **cells: str) -> tuple[str, str]:
    """Tile and instructions of a kernel for head_dim 128 on 9.0."""
    wanted = {"sm": "90", "head dim": "128", "variant": "", **cells}
    row = next(r for r in compiled(name) if all(r[k] == v for k, v in wanted.items()))
    return row["tile"], row["tile instructions"]


def bounds_of_decoding() -> str:
    """What a key and its value take beside the bytes, from caches of 16 bits and of float8."""
    rows = {
        row["variant"]: [
            f"{float(row[name]):.0f}"
            for name in ("instructions a key and scheduler", "turns of the banks a key")
        ]
        for row in compiled("traffic")
        if (row["sm"], row["head dim"]) == ("90", "128")
    }
    (dense, turns), (blocks, _) = rows[""], rows["blocks of 16"]
    issued, taken = rows["blocks of 16, float8"]
    return (
        f"each scheduler issues {dense} to {blocks} instructions and the banks take {turns} turns. "
        f"float8 halves the bytes alone: 12 cycles beside {issued} instructions and {taken} turns"
    )


def conflicts_of_decoding() -> str:
    """Where lanes wait for one another at the banks: in one place, for one turn."""
    names = ("turns of the banks a key", "without conflicts")
    turns = {
        (row["sm"], row["head dim"], row["variant"]): [float(row[name]) for name in names]
        for row in compiled("traffic")
    }
    places = {key[:2] for key, (taken, least) in turns.items() if taken != least}
    ((sm, dim),) = places
    taken, least = turns[sm, dim, ""]
    assert round(taken - least, 2) == 1
    return f"but for one turn of {taken:.0f} a key at head_dim {dim} on sm_{sm}"


def rotation_cost() -> str:
    """The second table of the command that compiles the attention kernels."""
    text = (ROOT / "reports/codegen/attention.md").read_text("utf-8")
    return text.partition("## The cost of rotation\n\n")[2].strip()


def prepass_change() -> tuple[float, float]:
    """The fewest and the most instructions of a tile more than without rotation, relative."""
    head, _, *rows = (
        [c.strip() for c in x.strip("|").split("|")] for x in rotation_cost().splitlines()
    )
    of = [dict(zip(head, row, strict=True)) for row in rows]
    changes = [
        int(row["tile instructions, more"]) / int(row["tile instructions, without"])
        for row in of
        if row["kernel"] == "prepass"
    ]
    return min(changes), max(changes)


def cuda_attention() -> str:
    """The bfloat16 rows of the table that nvcc's compilation gives."""
    text = (ROOT / "reports/codegen/cuda_attention.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return "\n".join(lines[:2] + [line for line in lines if " BFloat16 " in line])


TABLES: dict[str, Callable[[], str]] = {
    "rotation-cost": rotation_cost,
    "cuda-attention": cuda_attention,
}


def sentences() -> Iterator[tuple[str, str]]:
    """(page, text) of those with numbers."""
    fewest, most = (f"{abs(round(100 * change))} %" for change in prepass_change())
    yield "docs/codegen.md", f"between {fewest} fewer and {most} more instructions"
    usual = {"model": "Llama-3 8B", "dtype": "bfloat16", "variant": "half, forward", "sm": "90"}
    of = next(r for r in compiled("rotary") if all(r[k] == v for k, v in usual.items()))
    yield (
        "docs/performance.md",
        f"the half pairing takes {of['registers']} registers and {of['instructions']} instructions",
    )
    tile, with_rotation = of_tile("attention", kernel="registers")
    _, without = of_tile("attention", kernel="registers", variant="without rotation")
    yield (
        "docs/performance.md",
        f"a tile of {tile} takes {with_rotation} instructions where k is rotated in the loop, and "
        f"{without} without rotation",
    )
    tile, rotating = of_tile("decode")
    _, rotated = of_tile("decode", variant="rotated keys")
    yield (
        "docs/performance.md",
        f"a tile of {tile.split(' x ')[1]} keys takes {rotating} instructions, and {rotated} on "
        "keys that were rotated before",
    )
    yield "docs/performance.md", conflicts_of_decoding()
    yield "docs/performance.md", bounds_of_decoding()
