"""The claims of LongRoPE's papers, each with what the experiment says of it."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rows import BEST_YARN, LONGER, N_HAT, NEEDLES, READJUSTED, SEARCH, UNIFORM, losses

from longrope_kernels.search.fitness import standard_error

sys.path.append(str(Path(__file__).parents[1] / "extend_tiny"))
from page import answers, markdown

TINY = Path(__file__).parents[2] / "reports/extend_tiny/results.json"


def claims(content: Mapping[str, Any]) -> str:
    """What the papers say, as the difference of two losses over the same texts."""
    rows, sizes = losses(content), content["sizes"]
    target, original, shortest = sizes["target"], sizes["original"], min(sizes["lengths"])

    def of(name: str, length: int) -> dict[str, float]:
        return rows.get(name, {}).get(length, {})

    def seeds(length: int) -> dict[str, float]:
        """Of the searches of all seeds that were measured, by text."""
        names = [SEARCH, *(f"{SEARCH}, seed {seed}" for seed in sizes["seeds"][1:])]
        found = [row for name in names if (row := of(name, length))]
        texts = set.intersection(*map(set, found)) if found else set()
        return {text: statistics.fmean(row[text] for row in found) for text in sorted(texts)}

    def best(prefix: str, *others: str) -> tuple[str, dict[str, float]]:
        """The row whose mean is lowest."""
        names = [name for name in rows if name.startswith(prefix) or name in others]
        chosen = min(names, key=lambda n: statistics.fmean(of(n, target).values()), default="")
        return chosen, of(chosen, target)

    def told(kind: str, name: str) -> dict[str, float]:
        found = content["results"].get(f"{name}, {target} tokens: {kind}")
        sums = {} if found is None else dict(zip(sizes["judged"], found["sums"], strict=False))
        return {text: total / found["counts"][at] for at, (text, total) in enumerate(sums.items())}

    uniform, of_uniform = best(UNIFORM, "PI")
    threshold, of_threshold = best(N_HAT)
    lines = [
        ("non-uniform lambda beats uniform", f"{target} tokens", uniform, of_uniform,
         f"{SEARCH}, all seeds", seeds(target)),
        ("a search beats YaRN with its best attention factor", f"{target} tokens", BEST_YARN,
         of(BEST_YARN, target), f"{SEARCH}, all seeds", seeds(target)),
        ("a longer search does so too", f"{target} tokens", BEST_YARN, of(BEST_YARN, target),
         LONGER, of(LONGER, target)),
        ("n_hat helps without tuning", f"{target} tokens", f"{N_HAT} 0", of(f"{N_HAT} 0", target),
         threshold, {} if threshold == f"{N_HAT} 0" else of_threshold),
        ("the searched set holds to the target", f"{original} and {target} tokens",
         f"no scaling, {original} tokens", of("no scaling", original),
         f"{SEARCH}, {target} tokens", seeds(target)),
        ("readjustment recovers the short lengths", f"{shortest} tokens", SEARCH,
         of(SEARCH, shortest), READJUSTED, of(READJUSTED, shortest)),
        ("needles find better retrieval than perplexity", f"{target} tokens, answers of one of "
         "several keys", SEARCH, told("several keys", SEARCH), NEEDLES,
         told("several keys", NEEDLES)),
    ]  # fmt: skip
    tiny = answers(json.loads(TINY.read_text("utf-8")))
    made = [
        [claim, where, without, with_, *_difference(a, b), tiny.get(claim, "")]
        for claim, where, without, a, with_, b in lines
        if a and b
    ]
    if not made:
        return ""
    head = ["claim", "at", "without", "with", "difference, nats per token", "answer", "tiny model"]
    return (
        "## The claims of the papers\n\n"
        + markdown(head, made)
        + "\n\nDifferences are of the losses of the same tokens, with minus without, and their "
        "standard errors over the texts; one of two errors or less decides nothing. The tiny "
        "model is that of reports/extend_tiny."
    )


def _difference(without: Mapping[str, float], with_: Mapping[str, float]) -> tuple[str, str]:
    """With its standard error over the texts of both, and what more than two of these say."""
    each = [with_[text] - without[text] for text in without if text in with_]
    mean, error = statistics.fmean(each), standard_error(each, [1] * len(each))
    if math.isnan(error):
        return f"{mean:+.4f}", "one text alone says nothing"
    if abs(mean) <= 2 * error:
        return f"{mean:+.4f} \u00b1 {error:.4f}", "not decided"
    return f"{mean:+.4f} \u00b1 {error:.4f}", "yes" if mean < 0 else "no, the reverse"
