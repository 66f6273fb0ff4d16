"""What rotations were timed at, beside copies and transformers, and how exact they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from report_files import markdown, read

CPU = "reports/cpu-2-cores/2026-11-22"
Rows = dict[tuple[str, str, str], dict[str, Any]]
# pytest benchmarks/test_rotary.py --benchmark-only --benchmark-json=reports/.../clone.json \
#   -k "forward-S4096 and (clone or native) and not Phi and not Qwen"
CLONE = "reports/cpu-2-cores/2026-11-29/clone.json"


@cache
def rotary_rows(path: str = f"{CPU}/benchmarks.json") -> Rows:
    """(direction, dtype, name) to the benchmark of 4096 tokens."""
    return {
        (
            benchmark["params"]["direction"],
            benchmark["group"].split(", ")[-1],
            benchmark["params"]["name"],
        ): benchmark
        for benchmark in read(path)["benchmarks"]
    }


def ms(direction: str, dtype: str, name: str, of: Rows | None = None) -> str:
    return f"{1e3 * (of or rotary_rows())[direction, dtype, name]['stats']['median']:.1f}"


def of_copy(direction: str, dtype: str, name: str = "native") -> str:
    return f"{rotary_rows()[direction, dtype, name]['extra_info']['copy_fraction']:.2f}"


def of_eager(direction: str, dtype: str, name: str = "native") -> str:
    info = rotary_rows()[direction, dtype, name]["extra_info"]
    return f"{info['speedup_over_transformers_eager']:.1f}x"


DTYPES = ("float32", "bfloat16")


def angle_errors() -> str:
    positions = (4095, 131071, 1048575, 2097151)
    errors = {(e["method"], e["position"]): e for e in read(f"{CPU}/demo.json")["errors"]}
    rows = [
        [title, *(f"{errors[method, n]['angle_error']:.1e}" for n in positions)]
        for title, method in (("transformers", "transformers"), ("`native`", "native"))
    ]
    return markdown(["angle error (rad) up to position", *(f"{n:,}" for n in positions)], rows)


def rotary_short() -> str:
    names = ("transformers eager", "transformers torch.compile", "clone", "native")
    in_place = ("native", "copy_")
    head = ["forward, ms", "transformers eager", "torch.compile of it", "a `clone` of q and k"]
    head += ["`native`", "`native`, in place", "`copy_`"]
    rows = [
        [
            dtype,
            *(ms("forward", dtype, name) for name in names),
            *(ms("in place", dtype, name) for name in in_place),
        ]
        for dtype in DTYPES
    ]
    return markdown(head, rows)


def rotary_forward() -> str:
    names = ("transformers eager", "transformers torch.compile", "clone", "native")
    rows = [
        [
            f"{direction}, {dtype}",
            *(ms(direction, dtype, name) for name in names),
            of_eager(direction, dtype),
            of_copy(direction, dtype),
        ]
        for direction in ("forward", "backward")
        for dtype in DTYPES
    ]
    head = ["", "eager", "torch.compile", "`clone`", "`native`", "of eager", "of `clone`"]
    return markdown(head, rows)


def rotary_inplace() -> str:
    rows = [
        [
            dtype,
            *(ms("in place", dtype, name) for name in ("copy_", "native")),
            of_eager("in place", dtype),
            of_copy("in place", dtype),
        ]
        for dtype in DTYPES
    ]
    return markdown(
        ["in place", "`copy_`", "`native`", "of eager (its forward)", "of `copy_`"], rows
    )


def huge_pages() -> Iterator[tuple[str, str]]:
    path = "reports/cpu-2-cores/2026-11-23/huge_pages.json"
    pages = read(path)

    def span(name: str, way: str) -> str:
        return " to ".join(f"{edge(pages[name][way]):.1f}" for edge in (min, max))

    with_them, without, clone = (
        " and ".join(f"{span(dtype, way)}{unit}" for dtype, unit in zip(DTYPES, units, strict=True))
        for way, units in (
            ("with_huge_pages", (" ms in float32", " in bfloat16")),
            ("without", ("", "")),
            ("clone", ("", "")),
        )
    )
    yield (
        "docs/performance.md",
        f"A rotation takes {with_them} with the advice, {without} without, where `clone` takes "
        f"{clone} (`{path}`",
    )


TABLES: dict[str, Callable[[], str]] = {
    "angle-errors": angle_errors,
    "rotary-short": rotary_short,
    "rotary-forward": rotary_forward,
    "rotary-inplace": rotary_inplace,
}


def sentences() -> Iterator[tuple[str, str]]:
    """(page, text) of those with numbers."""
    yield from huge_pages()
    same = rotary_rows(CLONE)
    clone, native = (
        [ms("forward", dtype, name, same) for dtype in DTYPES]
        for name in ("clone in huge pages", "native")
    )
    yield (
        "docs/performance.md",
        f"a `clone` into huge pages takes {clone[0]} ms in float32 and {clone[1]} in bfloat16, "
        f"`native` {native[0]} and {native[1]} (`{CLONE}`)",
    )
    times = {
        row["variant"]: f"{row['ms']:.2f}"
        for row in read(f"{CPU}/demo.json")["times"]["rows"]
        if row["dtype"] == "bfloat16"
    }
    yield (
        "docs/performance.md",
        f"`clone` took {times['clone']} ms, `native` {times['native']} and `native` in place "
        f"{times['native, in place']} (`demo.json` beside that file)",
    )
