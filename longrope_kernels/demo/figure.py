"""The figure: error against position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_TICKS = {2**8: "256", 2**12: "4k", 2**17: "128k", 2**21: "2M", 2**26: "64M", 2**31: "2G"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the angle errors of `errors_at` at many positions, log-log, into a PNG."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    # The backends lie on one line: their markers differ in size.
    for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [(row["position"], row["angle_error"]) for row in rows if row["method"] == name]
        marker = {"marker": "soo^x"[i % 5], "markersize": 9 - 2 * (i % 3)}
        axes.loglog(*zip(*mine, strict=True), label=name, **marker)
    axes.axvline(4096, color="grey", linestyle=":", label="the long set from here on")
    axes.set_title("Rotary embedding with Phi-3-mini's factors, against float64")
    axes.set(xlabel="position of the last token", ylabel="largest angle error (rad)")
    axes.set_xticks(list(_TICKS), list(_TICKS.values()))
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
