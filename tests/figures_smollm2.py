"""What a pretrained model is under each rope: reports/extend_smollm2."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable

from report_files import ROOT, markdown, read

from longrope_kernels.search.retrieval import Retrieved

sys.path.append(str(ROOT / "examples/extend_smollm2"))
from rows import BEST_YARN, NEEDLES, READJUSTED, SEARCH, UNIFORM, losses

PERPLEXITY = {
    "no scaling": "no scaling",
    "PI": "PI",
    f"{UNIFORM} 1.5": "every pair by 1.5",
    "NTK": "NTK-aware",
    "YaRN": "YaRN",
    BEST_YARN: BEST_YARN,
    SEARCH: "`longrope search`, {} judged",
    f"{SEARCH}, seed 1": "`--seed 1`, {} judged",
    f"{SEARCH}, seed 2": "`--seed 2`, {} judged",
    NEEDLES: "`--fitness needle --critical 0`, {} judged",
}
RETRIEVAL = {
    "no scaling": "no scaling",
    "PI": "PI",
    "NTK": "NTK-aware",
    "YaRN": "YaRN",
    BEST_YARN: BEST_YARN,
    SEARCH: "found by perplexity",
    READJUSTED: "the same, with its short sets",
    f"{SEARCH}, seed 1": "found by perplexity, `--seed 1`",
    f"{SEARCH}, seed 2": "found by perplexity, `--seed 2`",
    NEEDLES: "found by needles",
}
SEARCHES = {
    SEARCH: "search, seed 0",
    **{f"{SEARCH}, seed {seed}": f"search, seed {seed}" for seed in (1, 2)},
    NEEDLES: "search, by needles",
}


def perplexity() -> str:
    """Of all texts together; a cell that was not measured for each of them is empty."""
    content = read("reports/extend_smollm2/results.json")
    results, sizes, rows = content["results"], content["sizes"], losses(content)

    def cell(name: str, length: int) -> str:
        of_texts = rows[name].get(length, {})
        whole = of_texts.keys() == set(sizes["judged"])
        return f"{math.exp(statistics.fmean(of_texts.values())):.2f}" if whole else ""

    lines = []
    for name, label in PERPLEXITY.items():
        judged = results[SEARCHES[name]]["judged"] if name in SEARCHES else ""
        lines.append([label.format(judged), *(cell(name, n) for n in sizes["lengths"])])
    return markdown(["", *(f"{n} tokens" for n in sizes["lengths"])], lines)


def retrieval() -> str:
    """Found of all that were asked for, and the loss of the answers in nats per token."""
    content = read("reports/extend_smollm2/results.json")
    results, lengths = content["results"], content["sizes"]["lengths"]
    columns = [(kind, n) for kind in ("several keys", "one key") for n in lengths]

    def cell(name: str, kind: str, length: int) -> str:
        one = Retrieved.from_json(results[f"{name}, {length} tokens: {kind}"])
        found, asked = (sum(map(count, one.found)) for count in (sum, len))
        return f"{found} of {asked}; {one.measured.loss:.3f}"

    lines = [
        [label, *(cell(name, *column) for column in columns)] for name, label in RETRIEVAL.items()
    ]
    return markdown(["", *(f"{kind}, {n} tokens" for kind, n in columns)], lines)


TABLES: dict[str, Callable[[], str]] = {
    "smollm2-perplexity": perplexity,
    "smollm2-retrieval": retrieval,
}
