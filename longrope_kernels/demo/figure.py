"""The figure: error against position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Colours that also differ in lightness (Okabe and Ito); the backends lie on one line, so their
# markers differ in size as well.
_STYLES = {
    "transformers": {"color": "#D55E00", "marker": "s", "markersize": 5},
    "reference": {"color": "#56B4E9", "marker": "o", "markersize": 9},
    "native": {"color": "#0072B2", "marker": "^", "markersize": 6},
    "triton": {"color": "#009E73", "marker": "x", "markersize": 5},
}

_TICKS = {2**8: "256", 2**12: "4k", 2**17: "128k", 2**21: "2M", 2**26: "64M", 2**31: "2G"}


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the rows of `errors_at` for many positions, log-log, into a PNG.

    Args:
        rows: as `errors_at` returns them.
        title: of the whole figure.
        path: of the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharex=True, layout="constrained")
    figure.suptitle(title, fontsize=13)
    for name, style in _STYLES.items():
        mine = [row for row in rows if row["method"] == name]
        if not mine:
            continue
        label = "transformers (float32 angles)" if name == "transformers" else f"{name} backend"
        x = [row["position"] for row in mine]
        for axes, key in ((left, "angle_error"), (right, "float32_error")):
            axes.loglog(x, [row[key] for row in mine], label=label, linewidth=1.3, **style)

    rounding = [row["bfloat16_error"] for row in rows if row["method"] == "rounding"]
    level = sum(rounding) / len(rounding)
    right.axhline(level, color="black", linestyle="--", linewidth=1)
    right.annotate(
        f"rounding to bfloat16, {level:.1e}",
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
    )
    left.set(title="Angle", ylabel="largest error over tokens and pairs (rad)")
    right.set(title="Rotated q and k, float32", ylabel="relative error (norm over norm)")
    for axes in (left, right):
        axes.set_xlabel("position of the last token")
        axes.set_xticks(list(_TICKS), list(_TICKS.values()))
        axes.minorticks_off()
        axes.grid(True, which="major", alpha=0.3)
        axes.axvline(4096, color="grey", linestyle=":", linewidth=1)
        axes.annotate(
            "long set", (4096, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
            textcoords="offset points", color="grey",
        )  # fmt: skip
    left.legend(loc="upper left", bbox_to_anchor=(0, 0.94))
    figure.savefig(path, dpi=150)
    plt.close(figure)
