"""The tables of a rope on one device, which backends read in place of cosines and sines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import phase
from .factor_set import FactorSet

# The bound of a set that has none. Lengths are at most 2**31, so no sequence passes it.
UNBOUNDED = 2**62


class Tables(NamedTuple):
    """``S`` sets of ``P`` pairs on one device, some kilobytes.

    Row 0 of the second dimension of ``steps``, which kernels read, and of ``inv_freq``, which only
    the reference reads, serves tokens below ``n_hat``, row 1 all others. No pairs: q and k are
    rotated already.
    """

    steps: torch.Tensor  # (S, 2, P) int64, 2**-64 turns per token
    n_hat: torch.Tensor  # (S,) int64
    attention_factor: torch.Tensor  # (S,) float64; float32 where the device has no float64
    max_length: torch.Tensor  # (S,) int64
    inv_freq: torch.Tensor  # (S, 2, P), radians per token, of the same dtype
    interleaved: bool  # pairs are dimensions (2i, 2i + 1) instead of (i, i + P)

    @property
    def sets(self) -> int:
        """S, the number of factor sets."""
        return self.steps.shape[0]

    @property
    def pairs(self) -> int:
        """P, the number of rotated pairs."""
        return self.steps.shape[2]

    def convert(self, to: Callable[[torch.Tensor], torch.Tensor]) -> Tables:
        """The same with each of its tensors replaced."""
        return Tables(
            to(self.steps),
            to(self.n_hat),
            to(self.attention_factor),
            to(self.max_length),
            to(self.inv_freq),
            self.interleaved,
        )

    def to(self, device: torch.device) -> Tables:
        """The same on ``device``."""
        wide = has_float64(device)

        def move(table: torch.Tensor) -> torch.Tensor:
            narrowed = table.is_floating_point() and not wide
            return (table.to(torch.float32) if narrowed else table).to(device)

        return self.convert(move)


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can be on the device: not on Apple's GPUs and some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def make_tables(sets: Sequence[FactorSet], base: float, interleaved: bool) -> Tables:
    """The tables on the host, in extended precision.

    Args:
        sets: with ascending ``max_length`` and the same number of factors each.
        base: ``b`` of the frequencies ``b**(-i / P)`` of P pairs.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    host = torch.device("cpu")
    inv_freq, steps = [], []
    original = phase.frequencies(base, (1.0,) * len(sets[0].factors))
    for factor_set in sets:
        rows = (original, phase.frequencies(base, factor_set.factors))
        inv_freq.append([[float(f) for f in row] for row in rows])
        steps.append([[phase.fixed_point_step(f) for f in row] for row in rows])
    bounds = [UNBOUNDED if s.max_length is None else s.max_length for s in sets]
    factors = [s.attention_factor for s in sets]
    return Tables(
        torch.tensor(steps, dtype=torch.int64, device=host),
        torch.tensor([s.n_hat for s in sets], dtype=torch.int64, device=host),
        torch.tensor(factors, dtype=torch.float64, device=host),
        torch.tensor(bounds, dtype=torch.int64, device=host),
        torch.tensor(inv_freq, dtype=torch.float64, device=host),
        interleaved,
    )


def no_pairs(device: torch.device) -> Tables:
    """One set that turns nothing."""
    none = torch.zeros((1, 2, 0), dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    return Tables(none, zero, one, zero + UNBOUNDED, none.double(), False)


def sets_of_lengths(lengths: torch.Tensor, max_length: torch.Tensor) -> torch.Tensor:
    """The first set that serves each length, else the last: int64 of its shape, on the device.

    Args:
        lengths: any shape, int32 or int64.
        max_length: (S,), of `Tables`.
    """
    too_long = lengths.long()[..., None] > max_length
    return too_long.sum(-1).clamp(max=max_length.shape[0] - 1)
