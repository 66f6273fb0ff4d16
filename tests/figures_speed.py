"""What decoding, the switch, serving, searches and ranks took on CPUs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from report_files import markdown, read

# ----------------------------------------------------------------------------------------- decoding

SDPA = "SDPA, rotated keys"
DECODE = "reports/cpu-2-cores/2026-11-23/decode.json"


def decode_rows(path: str = DECODE) -> dict[str, dict[str, dict[str, Any]]]:
    """By group and name."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in read(path)["benchmarks"]:
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
        if not {SDPA, *DECODED} <= of.keys():
            continue  # the budget cut it off
        times = (of[name]["stats"]["median"] for name in (SDPA, *DECODED))
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


def chunks() -> str:
    """Some queries a sequence, beside SDPA over keys that were rotated before."""
    rows = [
        [group, *(f"{1e3 * of[name]['stats']['median']:.0f}" for name in (SDPA, "native"))]
        for group, of in decode_rows("reports/cpu-2-cores/2026-11-30/chunks.json").items()
    ]
    return markdown(["", "SDPA, ms", "`native`, ms"], rows)


# --------------------------------------------------------------------------------------- the switch

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


# ------------------------------------------------------------------------------------------ serving

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


# ------------------------------------------------------------------------ searches, ranks, the host


def forwards() -> Iterator[tuple[str, dict[str, Any]]]:
    """(processor, row) of what benchmarks/forward.py measured."""
    for processor, name in (("Intel Xeon", "forward"), ("AMD EPYC", "forward_amd")):
        for row in read(f"reports/cpu-2-cores/2026-11-29/{name}.json"):
            yield processor, row


def search_forward() -> str:
    """A candidate's forward beside transformers' own: the median, and how far rounds are apart."""
    table = [
        [
            processor,
            row.get("dtype", "float32"),
            f"{row['tokens']:,}",
            f"{row['scored']:,}",
            f"{row['transformers_s']:.2f}",
            f"{statistics.median(row['ratios']):.3f}",
            f"{min(row['ratios']):.3f} to {max(row['ratios']):.3f}",
            str(len(row["ratios"])),
        ]
        for processor, row in forwards()
    ]
    head = [
        "processor",
        "dtype",
        "tokens",
        "scored",
        "transformers, s",
        "ours, of that",
        "lowest to highest",
        "rounds",
    ]
    return markdown(head, table)


PROFILED = {
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "longrope_kernels::attention",
    ),
    "products of matrices": ("aten::mm",),
    "softmax of the logits": ("aten::_log_softmax",),
}


def search_profile() -> str:
    """Where those forwards spend their time, in percent."""
    table = []
    for processor, row in forwards():
        for who, shares in row["shares"].items():
            parts = [sum(shares.get(op, 0.0) for op in ops) for ops in PROFILED.values()]
            cells = (f"{100 * part:.0f}" for part in (*parts, 1 - sum(parts)))
            of = [processor, row.get("dtype", "float32"), f"{row['tokens']:,}", who]
            table.append([*of, *cells])
    head = ["processor", "dtype", "tokens", "", *(f"{name}, %" for name in PROFILED), "all else, %"]
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


def bfloat16_products() -> str:
    """Attention's seconds are its share of a forward's; the first row is of the kernel before."""
    before, after = read("reports/cpu-2-cores/2026-11-30/forward_amd.json")
    forwards = [statistics.median(row["ratios"]) for row in (before, after)]
    was, now = (
        forward * row["transformers_s"] * row["shares"]["ours"]["longrope_kernels::attention"]
        for forward, row in zip(forwards, (before, after), strict=True)
    )
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    of_torch = after["transformers_s"] * after["shares"]["transformers"][name]
    return (
        f"attention is {was / now:.1f} times as fast as by the kernel before, and "
        f"{of_torch / now:.1f} times as torch's; the whole forward takes {forwards[1]:.2f} of "
        f"transformers' time on that processor, where it took {forwards[0]:.2f}"
    )


TABLES: dict[str, Callable[[], str]] = {
    "decode-cpu": decode_cpu,
    "chunks": chunks,
    "switch-crossing": switch_crossing,
    "switch-batch": switch_batch,
    "switch-forward": switch_forward,
    "serving": serving,
    "serving-long": serving_long,
    "spread-memory": spread_memory,
    "search-forward": search_forward,
    "search-profile": search_profile,
}


def sentences() -> Iterator[tuple[str, str]]:
    """(page, text) of those with numbers."""
    yield from spread_times()
    yield "docs/performance.md", host_time()
    yield "docs/performance.md", bfloat16_products()
    yield "docs/performance.md", decode_goals()
