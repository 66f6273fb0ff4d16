"""What the first day on a GPU should show, and what the rows that were measured say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# A row by (group, name): median in seconds, "info", and the file that it is in.
Rows = Mapping[tuple[str, str], Mapping[str, Any]]
PREFILL = "attention forward, S = 8192, d = 128, causal"
BATCH, LONG = "decode, 32 x 4096 keys, bfloat16", "decode, 1 x 131072 keys, bfloat16"
CUDNN, K_ALONE = "SDPA cuDNN, no rotation", "SDPA cuDNN, k rotated alone"
HOST_CALLS = 100  # of a row
HOST = f"host time, {HOST_CALLS} calls of one token"


class Goal(NamedTuple):
    """``of`` says how much it is by the rows, which have to be there; the goal is a bound on it."""

    what: str
    rows: tuple[tuple[str, str], ...]
    of: Callable[..., float]
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        sign, bound = ("at most", self.most) if self.least is None else ("at least", self.least)
        return f"{sign} {bound:g} {self.unit}".rstrip()

    def told(self, rows: Rows) -> tuple[str, str, str]:
        """What was measured, whether the goal is met, and the file; "not measured" and why."""
        absent = [" / ".join(key) for key in self.rows if key not in rows]
        if absent or not self.rows:
            return f"not measured: no row {', '.join(absent) or 'for it'}", "", ""
        found = [rows[key] for key in self.rows]
        try:
            value = self.of(*found)
        except KeyError as error:
            return f"not measured: {error} is not in the row", "", ""
        met = value <= self.most if self.most is not None else value >= (self.least or 0.0)
        files = ", ".join(dict.fromkeys(row["file"] for row in found))
        return f"{value:.4g} {self.unit}".rstrip(), "yes" if met else "no", files


def microseconds(row: Mapping[str, Any]) -> float:
    return 1e6 * float(row["median"])


def ratio(without: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    return float(without["median"]) / float(ours["median"])


def of_copy(row: Mapping[str, Any]) -> float:
    return float(row["info"]["copy_fraction"])


GOALS = (
    Goal(
        "decode of 32 x 4096 keys, 32/8 heads of 128, the rotation fused",
        *(((BATCH, "triton"),), microseconds, "us"),
        most=200,
    ),
    Goal("the same in CUDA C++", ((BATCH, "cuda"),), microseconds, "us", most=200),
    Goal("decode of 1 x 128k keys", ((LONG, "triton"),), of_copy, "of a copy", least=0.85),
    Goal(
        "rotation of 8192 tokens",
        *((("forward, S = 8192, bfloat16", "triton"),), of_copy, "of a copy"),
        least=0.9,
    ),
    Goal(
        "prefill of 8192 tokens, causal, d = 128, by what backend=None takes",
        ((PREFILL, CUDNN), (PREFILL, "composed")),
        ratio,
        "of cuDNN without rotation",
        least=0.96,
    ),
    # q is left as it is, as if the kernel that attends rotated it.
    Goal(
        "the same with a pre-pass of k alone",
        ((PREFILL, CUDNN), (PREFILL, K_ALONE)),
        ratio,
        "of cuDNN without rotation",
        least=0.99,
    ),
    Goal(
        "prefill of 8192 tokens by the Triton kernel",
        ((PREFILL, "triton prepass"),),
        lambda row: float(row["info"]["tflop_per_s"]),
        "TFLOP/s",
        least=450,
    ),
    Goal(
        "a decode step of 32 layers without a graph, on the host (the driver's own part apart)",
        ((HOST, "triton, apply_rotary in place"), (HOST, "triton, decode and append")),
        lambda *rows: 32e3 / HOST_CALLS * sum(float(row["median"]) for row in rows),
        "ms",
        most=2.5,
    ),
)
