"""The golden angles with their steps, for the C++ test of csrc/rotation.h, which has no `Rope`.

    python tests/golden_phases.py > tests/data/golden_phases.txt

A line is position, step, cosine and sine.
"""

from __future__ import annotations

import json
from pathlib import Path

from longrope_kernels import FactorSet, Rope

DATA = Path(__file__).parent / "data"
LABELS = (
    "plain RoPE, base 10000, head 128",
    "Phi-3-mini-128k long factors, n_hat 128",
    "LongRoPE LLaMA2 2048k from 256k, n_hat 64",
)


def lines() -> list[str]:
    cases = json.loads((DATA / "golden_angles.json").read_text("utf-8"))["cases"]
    made = []
    for case in cases:
        if case["label"] not in LABELS:
            continue
        rope = Rope(FactorSet(tuple(case["factors"]), case["n_hat"]), base=case["base"])
        original, scaled = rope.tables("cpu").steps[0].tolist()
        for position, pair, cos, sin in case["rows"]:
            below = case["n_hat"] > 0 and position < case["n_hat"]
            step = (original if below else scaled)[pair] % 2**64
            made.append(f"{position} {step} {cos!r} {sin!r}")
    return made


if __name__ == "__main__":
    print("\n".join(lines()))
