"""What a pretrained model is under each rope: reports/extend_smollm2."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from report_files import markdown, read

BEST_YARN, NEEDLES = "YaRN, best attention factor", "LongRoPE2's search"
PERPLEXITY = {
    "no scaling": "no scaling",
    "PI": "PI",
    "uniform lambda 1.5": "every pair by 1.5",
    "NTK": "NTK-aware",
    "YaRN": "YaRN",
    BEST_YARN: BEST_YARN,
    "LongRoPE": "`longrope search`, {} judged",
    NEEDLES: "`--fitness needle --critical 0`, {} judged",
}
RETRIEVAL = {
    "YaRN": "YaRN",
    BEST_YARN: BEST_YARN,
    "LongRoPE": "found by perplexity",
    "LongRoPE, readjusted": "the same, with its short sets",
    NEEDLES: "found by needles",
}
SEARCHES = {"LongRoPE": "search, seed 0", NEEDLES: "search, by needles"}


def content() -> tuple[dict[str, Any], dict[str, Any]]:
    found = read("reports/extend_smollm2/results.json")
    return found["results"], found["sizes"]


def perplexity() -> str:
    """Of all texts together; a cell that was not measured for each of them is empty."""
    results, sizes = content()

    def cell(name: str, length: int) -> str:
        keys = [f"{name}, {length} tokens, {text}" for text in sizes["judged"]]
        if not all(key in results for key in keys):
            return ""
        return f"{math.exp(statistics.fmean(results[key] for key in keys)):.2f}"

    rows = []
    for name, label in PERPLEXITY.items():
        judged = results[SEARCHES[name]]["judged"] if name in SEARCHES else ""
        rows.append([label.format(judged), *(cell(name, n) for n in sizes["lengths"])])
    return markdown(["", *(f"{n} tokens" for n in sizes["lengths"])], rows)


def retrieval() -> str:
    """Found of all that were asked for, and the loss of the answers in nats per token."""
    results, sizes = content()
    columns = [(kind, n) for kind in ("several keys", "one key") for n in sizes["lengths"]]

    def cell(name: str, kind: str, length: int) -> str:
        one = results[f"{name}, {length} tokens: {kind}"]
        found = [answer for text in one["found"] for answer in text]
        return f"{sum(found)} of {len(found)}; {sum(one['sums']) / sum(one['counts']):.3f}"

    rows = [
        [label, *(cell(name, *column) for column in columns)] for name, label in RETRIEVAL.items()
    ]
    return markdown(["", *(f"{kind}, {n} tokens" for kind, n in columns)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "smollm2-perplexity": perplexity,
    "smollm2-retrieval": retrieval,
}
