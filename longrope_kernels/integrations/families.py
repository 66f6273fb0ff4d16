"""The list of decoders of transformers that `enable` serves, as ``tools/architectures.py`` left it.

It needs no transformers: the command line and the documentation show it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

CHECKS = ("forward", "padding", "cache", "training", "generate")


@cache
def proven() -> dict[str, Any]:
    """The data file.

    ``transformers`` is major.minor of what it ran on; ``families`` has where rotation and attention
    are, and the checks passed with each cache; ``others`` the reason.
    """
    folder = resources.files("longrope_kernels") / "data"
    found: dict[str, Any] = json.loads((folder / "architectures.json").read_text("utf-8"))
    return found


def counts() -> tuple[int, int]:
    """Families with rotated keys, and those of them with unrotated ones too."""
    families = proven()["families"].values()
    return len(families), sum(not entry["unrotated"] for entry in families)


def interleaved(model_type: str | None) -> bool:
    """Whether the pairs of a family are (2i, 2i + 1), which no config says; False for others."""
    return any(
        entry["interleaved"]
        for name, entry in proven()["families"].items()
        if model_type in (name, entry["type"])
    )


def rows() -> list[list[str]]:
    """Of each family: its name, the pairs, what passed with unrotated keys and with rotated ones.

    A check that the untouched model can't do either is left out.
    """
    lines = []
    for name, entry in proven()["families"].items():
        pairs = "interleaved" if entry["interleaved"] else "half"
        passed = [_passed(entry.get(f"{kind}_checks")) for kind in ("unrotated", "rotated")]
        lines.append([name, pairs, *passed])
    return lines


def _passed(checks: list[str] | None) -> str:
    if checks is None:
        return "-"
    missing = [name for name in CHECKS if name not in checks]
    return "all" if not missing else f"all but {', '.join(missing)}"
