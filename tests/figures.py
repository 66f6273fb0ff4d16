"""Every measured number that README and docs show, made from the files under reports/.

    python tests/figures.py --write   puts the tables in again

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``. Numbers in sentences are
listed as the sentence with the numbers left out. test_figures.py holds the pages to both.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from longrope_kernels.integrations import families

ROOT = Path(__file__).parents[1]
CPU = "reports/cpu-2-cores/2026-11-22"


@cache
def read(path: str) -> Any:
    """A JSON file under reports/."""
    return json.loads((ROOT / path).read_text("utf-8"))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines).replace("|  |", "| |")


# ---------------------------------------------------------------------------------------- rotation


@cache
def rotary_rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(direction, dtype, name) to the benchmark of 4096 tokens."""
    return {
        (
            benchmark["params"]["direction"],
            benchmark["group"].split(", ")[-1],
            benchmark["params"]["name"],
        ): benchmark
        for benchmark in read(f"{CPU}/benchmarks.json")["benchmarks"]
    }


def ms(direction: str, dtype: str, name: str) -> str:
    return f"{1e3 * rotary_rows()[direction, dtype, name]['stats']['median']:.1f}"


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
    head = ["forward, ms", "transformers eager", "torch.compile of it"]
    head += ["a `clone` of q and k", "`native`", "`native`, in place", "`copy_`"]
    rows = [
        [
            dtype,
            *(ms("forward", dtype, name) for name in names),
            *(ms("in place", dtype, name) for name in ("native", "copy_")),
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


# -------------------------------------------------------------------------------------- decoding

DECODE = "reports/cpu-2-cores/2026-11-23/decode.json"


def decode_rows() -> dict[str, dict[str, dict[str, Any]]]:
    """By group and name."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in read(DECODE)["benchmarks"]:
        if benchmark["group"].startswith("decode, "):
            group = rows.setdefault(benchmark["group"].removeprefix("decode, "), {})
            group[benchmark["params"]["name"]] = benchmark
    return rows


def decode_goals() -> str:
    """How far the goals of decoding on a CPU are met: three times SDPA and 0.7 of reading."""
    groups = [f"1 x {n} keys, {dtype}" for n in (4096, 32768) for dtype in ("bfloat16", "float32")]
    dense, paged = (
        [decode_rows()[group][name]["extra_info"] for group in groups] for name in DECODED
    )

    def span(infos: list[dict[str, Any]], what: str, form: str) -> str:
        return " to ".join(f"{edge(info[what] for info in infos):{form}}" for edge in (min, max))

    sdpa, read = (partial(span, what=what) for what in ("speedup_over_sdpa", "copy_fraction"))
    return (
        f"In a dense cache of Llama-3's heads `native` is {sdpa(dense, form='.1f')} times as fast "
        f"as SDPA, and {sdpa(paged, form='.1f')} times in a paged one; it takes "
        f"{read(dense[:2], form='.2f')} of the bandwidth of reading at 4096 keys, "
        f"{read(dense[2:], form='.2f')} at 32768"
    )


def decode_cpu() -> str:
    lines = []
    for group, of in decode_rows().items():
        if not {"SDPA, rotated keys", *DECODED} <= of.keys():
            continue  # the budget cut it off
        times = (of[name]["stats"]["median"] for name in ("SDPA, rotated keys", *DECODED))
        infos = [of[name]["extra_info"] for name in DECODED]
        lines.append(
            [
                group,
                *(f"{1e3 * time:.2f}" for time in times),
                f"{infos[0]['speedup_over_sdpa']:.1f}x",
                f"{infos[0]['gb_per_s']:.1f}",
                *(f"{info['copy_fraction']:.2f}" for info in infos),
            ]
        )
    head = ["sequences x keys", "SDPA, ms", "`native`, ms", "paged, ms", "of SDPA", "GB/s"]
    return markdown([*head, "of reading", "of reading, paged"], lines)


DECODED = ("native", "native, paged")


# -------------------------------------------------------------------------------------- the switch

SWITCH = "reports/cpu-2-cores/2026-11-23/switch.json"
ENABLED = {"transformers": "untouched", "enabled": "enabled"}


def switch_crossing() -> str:
    lines = []
    for row in read(SWITCH)["crossing"]:
        if row["name"] not in ("transformers", "switch"):
            continue
        name = "untouched" if row["name"] == "transformers" else "enabled"
        times = (f"{row[key]:.0f}" for key in ("crossing_ms", "neighbour_ms"))
        lines.append([name, *times, f"{row['ratio']:.2f}", str(row["same_tokens"])])
    head = ["", "crossing token, ms", "its neighbours, ms", "ratio", "untouched tokens, of 64"]
    return markdown(head, lines)


def switch_batch() -> str:
    rows = read(SWITCH)["batch"]
    lines = [
        [label, *(f"{row['relative_error']:.1e}" for row in rows if row["name"] == name)]
        for name, label in ENABLED.items()
    ]
    counts = [row["tokens"] for row in rows if row["name"] == "enabled"]
    return markdown(["", *(f"the row of {count} tokens" for count in counts)], lines)


def switch_forward() -> str:
    lines = [
        [
            str(row["tokens"]),
            *(f"{row[key]:.0f}" for key in ("untouched_ms", "enabled_ms")),
            f"{row['ratio']:.2f}",
        ]
        for row in read(SWITCH)["forward"]
    ]
    return markdown(["tokens", "untouched, ms", "enabled, ms", "ratio, median of turns"], lines)


# --------------------------------------------------------------------------------- a small model


def of_extend_tiny(title: str) -> str:
    """A table of the page that examples/extend_tiny/run.py wrote, by the title before it."""
    text = (ROOT / "reports/extend_tiny/results.md").read_text("utf-8")
    table = text.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0].strip()
    if not table:
        raise ValueError(f"reports/extend_tiny/results.md: there is no table {title!r}")
    return table


EXTEND_TINY = {
    "tiny-at-length": "Without tuning, each made for the length",
    "tiny-recipe": "Extended by the whole recipe",
    "tiny-claims": "The claims of the paper",
    "tiny-searches": "Searches at 2048 bytes",
    "tiny-policies": "Where a sequence grows out of the short set",
}


# ----------------------------------------------------------------------------- who understands what


def understands() -> str:
    """What tools/understands.py was told: a row for each kind of rope, and for each sequence."""
    asked = read("reports/understands.json")
    rows = {
        "two sets and an attention factor: a sequence beyond the first": ("two sets", ("400",)),
        "the same: shorter ones beside it": ("two sets", ("60", "200")),
        "an attention factor for each set": ("an attention factor for each set", None),
        "a threshold `n_hat`": ("a threshold", None),
        "three sets": ("three sets", None),
    }

    def cell(told: dict[str, Any], lengths: tuple[str, ...] | None) -> str:
        if "refused" in told:
            return "refused"
        most = max(told[length] for length in lengths or told)
        return "yes" if most < 1e-2 else f"no, off by {most:.1f}"

    lines = [
        [row, *(cell(column[what], lengths) for column in asked.values())]
        for row, (what, lengths) in rows.items()
    ]
    return markdown(["", *(f"{name} ({c['version']})" for name, c in asked.items())], lines)


# ----------------------------------------------------------------------------------------- serving

SERVING = "reports/cpu-2-cores/2026-11-29"
MODES = ("rotated", "unrotated")


def serving() -> str:
    lines = [
        [
            row["dtype"],
            row["way"],
            f"{row['load_s']:.1f}",
            f"{row['share']:.2f}",
            f"{row['start_up_s']:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for row in read(f"{SERVING}/serving.json")
    ]
    head = ["", "", "the load, s", "throughput, of vLLM's", "start-up, s", "peak memory, GiB"]
    return markdown(head, lines)


def serving_long() -> str:
    """What `make test-vllm-long` measures, by mode."""
    found = read(f"{SERVING}/serving_checks.json")
    errors = found["a text of 12000 tokens"]["mean_error"]
    of_text = [*(f"{errors[mode]:.1e}" for mode in MODES), f"{errors['vLLM']:.1e}, vLLM alone"]
    lines = [["mean error in a text of 12,000 tokens", *of_text]]
    load = {mode: found[f"200 requests of 20 to 3000 tokens, {mode}"] for mode in MODES}
    for name, key in (
        ("200 requests: finished", "finished"),
        ("taken back", "cancelled"),
        ("prefilled again", "prefilled_again"),
    ):
        lines.append([name, *(str(load[mode][key]) for mode in MODES), ""])
    far = "largest_difference_to_the_run_alone"
    lines.append(["largest difference to a run alone", *(f"{load[m][far]:.1e}" for m in MODES), ""])
    for name in ("this.py", "abc.py", "argparse.py"):
        of_mode = [found[f"SmolLM2-135M, {name}, {mode}"] for mode in MODES]
        lines.append(
            [
                f"SmolLM2-135M, perplexity of `{name}`, {of_mode[0]['tokens']} tokens",
                *(f"{each['perplexity']:.5g}" for each in of_mode),
                f"{of_mode[0]['transformers']:.5g}, transformers",
            ]
        )
    return markdown(["", *MODES, "beside"], lines)


# ---------------------------------------------------------------------------------------- codegen


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


def compatibility() -> str:
    """Each environment that `make record` has put down."""
    columns = ("environment", "python", "torch", "triton", "transformers", "numpy", "system", "cpu")
    rows = [
        [*(row[name] or "none" for name in columns), str(row["passed"]), str(row["failed"])]
        for row in read("reports/compatibility.json")
    ]
    return markdown([*columns, "passed", "failed"], rows)


def search_forward() -> str:
    """A candidate's forward beside transformers' own: the median, and how far rounds are apart."""
    table = [
        [
            f"{row['tokens']:,}",
            f"{row['scored']:,}",
            f"{row['transformers_s']:.2f}",
            f"{statistics.median(row['ratios']):.3f}",
            f"{min(row['ratios']):.3f} to {max(row['ratios']):.3f}",
            str(len(row["ratios"])),
        ]
        for row in read("reports/cpu-2-cores/2026-11-29/forward.json")
    ]
    head = ["tokens", "scored", "transformers, s", "ours, of that", "lowest to highest", "rounds"]
    return markdown(head, table)


SPREAD = "reports/cpu-2-cores/2026-11-29/spread.json"


def spread_memory() -> str:
    """What a forward takes at its peak in each process, beyond what was there before."""
    rows = read(SPREAD)["memory"]
    one = max(rows[0]["bytes"])
    table = [
        [
            str(row["processes"]),
            ", ".join(f"{x / 1e6:.0f}" for x in row["bytes"]),
            f"{max(row['bytes']) / one:.2f}",
        ]
        for row in rows
    ]
    return markdown(["processes", "MB in each", "the most, of one process's"], table)


def models() -> str:
    """Of longrope_kernels/data/architectures.json, which tools/architectures.py writes."""
    return markdown(["family", "pairs", "unrotated cache", "rotated cache"], families.rows())


def rotated_alone() -> str:
    found = families.proven()["families"]
    rows = [[name, e["unrotated"]] for name, e in found.items() if e["unrotated"]]
    return markdown(["family", "why not unrotated"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "models-rotated-alone": rotated_alone,
    "compatibility": compatibility,
    "angle-errors": angle_errors,
    "rotary-short": rotary_short,
    "rotary-forward": rotary_forward,
    "rotary-inplace": rotary_inplace,
    "decode-cpu": decode_cpu,
    "switch-crossing": switch_crossing,
    "switch-batch": switch_batch,
    "switch-forward": switch_forward,
    "serving": serving,
    "serving-long": serving_long,
    "rotation-cost": rotation_cost,
    "cuda-attention": cuda_attention,
    "understands": understands,
    "spread-memory": spread_memory,
    "search-forward": search_forward,
    **{name: partial(of_extend_tiny, title) for name, title in EXTEND_TINY.items()},
}


# --------------------------------------------------------------------------------------- sentences


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


def host_time() -> str:
    """Medians of a hundred calls, as microseconds of one."""
    rows = read("reports/cpu-2-cores/2026-11-29/host.json")["benchmarks"]
    took = {row["name"].split("-")[-1][:-1]: row["stats"]["median"] * 1e4 for row in rows}
    return (
        f"one call of `apply_rotary` took {took['apply_rotary']:.1f} us, in place "
        f"{took['apply_rotary in place']:.1f}, `decode` over a short cache {took['decode']:.1f}; "
        f"by the Triton backend a rotation in place {took['triton, apply_rotary in place']:.1f}, a "
        f"`decode` that appends {took['triton, decode and append']:.1f}, `attention` "
        f"{took['triton, attention']:.1f}"
    )


def spread_times() -> Iterator[tuple[str, str]]:
    found = read(SPREAD)
    two, one = (
        statistics.mean(row["seconds"] for row in found["ring"] if row["processes"] == size)
        for size in (2, 1)
    )
    yield (
        "docs/distributed.md",
        f"{two:.2f} seconds on two processes, {one:.2f} seconds on one with two threads",
    )
    alone, pair = found["decode"]
    yield (
        "docs/distributed.md",
        f"A step by one process with two threads took {max(alone['seconds']):.2f} seconds beside "
        f"{max(alone['reading']):.2f} seconds for reading the keys and values, by two processes "
        f"{max(pair['seconds']):.2f} seconds beside {max(pair['reading']):.2f} seconds",
    )
    everything, own = (row["microseconds"] for row in found["host"])
    yield (
        "docs/distributed.md",
        f"{own:.0f} us of processor time, and {everything:.0f} us with torch's attention of its "
        "block",
    )


def sentences() -> Iterator[tuple[str, str]]:
    """(page, text) of every sentence with measured numbers outside the tables."""
    yield from huge_pages()
    yield from spread_times()
    yield "docs/performance.md", host_time()
    yield "docs/performance.md", decode_goals()
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
    yield "docs/performance.md", bounds_of_decoding()


# ------------------------------------------------------------------------------------------- pages

# What tests hold or a program is told, with the same units.
PROMISES = (
    "an entry changes only where that saves at least 1 % of the time",
    "holds it below 2 %",
    # Of data sheets, named there.
    "640 and 540 TFLOP/s of attention, forward and backward, about what others report",
    "900 GB/s both) | 450 GB/s",
    "400 Gb/s) | 50 GB/s",
    "computes 2.5 times as much",
)

BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n\n)(.*?)(\n\n<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for page in pages():
        text = page.read_text("utf-8")
        new = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[4], text)
        if new == text:
            continue
        print(page.relative_to(ROOT))
        if "--write" in sys.argv[1:]:
            page.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
