"""What searches with and without the coarse fitness found and took: reports/search_coarse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from report_files import markdown, read

FULL = "full length"
WAYS = {
    FULL: FULL,
    "full length, 4 parents": "full length, 4 parents in place of 16",
    "coarse first": "behind a prefix, an eighth in full",
    "coarse first, a quarter": "a quarter (`--coarse-share 0.25`)",
    "coarse first, a sixteenth": "a sixteenth (`--coarse-share 0.0625`)",
    "windows first": "by windows, an eighth in full",
    "windows first, a sixteenth": "by windows, a sixteenth",
}


def coarse(length: int) -> str:
    """A row for each way, with a number for each seed; shares are of the full length's sums."""
    searches = read("reports/search_coarse/coarse.json")["searches"]
    found: dict[str, list[dict[str, Any]]] = {}
    for one in searches.values():
        if one.get("length") == length:
            found.setdefault(one["way"], []).append(one)
    whole = {key: sum(one[key] for one in found[FULL]) for key in ("forwards", "processor_seconds")}

    def listed(ones: list[dict[str, Any]], key: str) -> str:
        numbers = ", ".join(f"{one[key]:.0f}" for one in ones)
        share = sum(one[key] for one in ones) / whole[key]
        return numbers if ones is found[FULL] else f"{numbers} ({share:.2f})"

    rows = [
        [
            label,
            ", ".join(f"{one['judged']:.2f}" for one in found[way]),
            *(listed(found[way], key) for key in whole),
        ]
        for way, label in WAYS.items()
        if way in found
    ]
    rows.append(["YaRN", f"{searches[f'YaRN at {length}']['judged']:.2f}", "", ""])
    return markdown(["", "judged", "forwards of the whole length", "processor seconds"], rows)


TABLES: dict[str, Callable[[], str]] = {
    f"coarse-{length}": partial(coarse, length) for length in (2048, 8192)
}
