"""The pictures of a report, five at most: a roofline, and speed against length for each work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .results import CEILINGS, Row
from .text import significant

MOST = 5


def draw(rows: list[Row], out: Path) -> list[str]:
    """Write PNGs into ``out``; returns their names. None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    names = ["roofline.png"] if _roofline(rows, out / "roofline.png") else []
    works = dict.fromkeys(str(row.info["work"]) for row in rows if "work" in row.info)
    for work in works:
        of_work = [row for row in rows if row.info.get("work") == work]
        if len(names) < MOST and _lengths(work, of_work, out / f"{work}.png"):
            names.append(f"{work}.png")
    return names


def _roofline(rows: list[Row], path: Path) -> bool:
    """Operations a second against operations a byte, under the two ceilings of this run."""
    ceilings = [row for row in rows if row.group == CEILINGS]
    copy = max((row.info.get("gb_per_s", 0.0) for row in ceilings), default=0.0)
    matmul = max((row.info.get("tflop_per_s", 0.0) for row in ceilings), default=0.0)
    points = [
        (row.info["flops"] / row.info["bytes"], row.info["flops"] / row.median, row)
        for row in rows
        if row.group != CEILINGS and row.info.get("flops") and row.info.get("bytes")
    ]
    if not (points and copy and matmul):
        return False
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    corner = 1e3 * matmul / copy
    reach = [min(min(x for x, _, _ in points), corner) / 4, max(x for x, _, _ in points) * 4]
    xs = sorted([reach[0], corner, max(reach[1], 2 * corner)])
    axes.plot(xs, [min(1e9 * copy * x, 1e12 * matmul) for x in xs], color="black")
    names = dict.fromkeys(row.name for _, _, row in points)
    for name in names:
        mine = [(x, y) for x, y, row in points if row.name == name]
        axes.scatter(*zip(*mine, strict=True), label=name, s=18)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP a byte (needed)", ylabel="FLOP/s",
        title=f"ceilings of this run: {significant(copy)} GB/s, {significant(matmul)} TFLOP/s",
    )  # fmt: skip
    axes.legend(fontsize=7)
    return _save(figure, path)


def _lengths(work: str, rows: list[Row], path: Path) -> bool:
    """Speed against tokens, one panel for each kind of call that was timed at two lengths."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.info.get("tokens"):
            kinds.setdefault(str(row.info.get("kind", work)), []).append(row)
    kinds = {
        kind: members
        for kind, members in kinds.items()
        if len({row.info["tokens"] for row in members}) > 1
    }
    if not kinds:
        return False
    import matplotlib.pyplot as plt

    columns = min(len(kinds), 3)
    lines = -(-len(kinds) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False)
    for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
        unit, key = _unit(members)
        for name in dict.fromkeys(row.name for row in members):
            mine = sorted(
                (row.info["tokens"], row.info[key]) for row in members if row.name == name
            )
            axes.plot(*zip(*mine, strict=True), marker="o", label=name)
        axes.set(xscale="log", xlabel="tokens", ylabel=unit, title=kind, ylim=(0, None))
        axes.legend(fontsize=7)
    for axes in grid.flat[len(kinds) :]:
        axes.set_axis_off()
    return _save(figure, path)


def _unit(rows: list[Row]) -> tuple[str, str]:
    """That of what bounds them."""
    if all("matmul_fraction" in row.info for row in rows):
        return "TFLOP/s", "tflop_per_s"
    return "GB/s", "gb_per_s"


def _save(figure, path: Path) -> bool:  # type: ignore[no-untyped-def]
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
