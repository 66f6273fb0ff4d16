"""The truth: DESIGN's formula in float64 with exact angles, written apart from the package.

Angles are kept in turns. With ``t`` the frequency in turns per token (mpmath, 60 digits) cut into
``h1 + h2 + h3``, ``h1`` a multiple of 2**-22 and ``h2`` of 2**-44, the products ``n * h1`` and
``n * h2`` are exact in float64 for ``|n| <= 2**31``, and so are their fractional parts; ``n * h3``
is below 2**-13. Each angle is right to about 1e-15 rad. No integer wraparound, no uint64 and no
code of the package is involved, except that a `Rope` says what to compute by its public fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mpmath
import torch

from longrope_kernels import Rope

# The order of the axes that makes each layout (batch, seq, heads, dim) and back.
_TO_BSHD = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}


@lru_cache(maxsize=64)
def _split_turns(base: float, factors: tuple[float, ...]) -> tuple[list[float], ...]:
    parts: tuple[list[float], ...] = ([], [], [])
    with mpmath.workdps(60):
        for i, factor in enumerate(factors):
            theta = mpmath.mpf(base) ** (-mpmath.mpf(2 * i) / (2 * len(factors)))
            turns = theta / mpmath.mpf(factor) / (2 * mpmath.pi)
            rest = turns - mpmath.floor(turns)
            for part, bits in zip(parts[:2], (22, 44), strict=True):
                head = mpmath.floor(rest * 2**bits) / 2**bits
                part.append(float(head))
                rest -= head
            parts[2].append(float(rest))
    return parts


def angles(base: float, factors: Sequence[float], positions: torch.Tensor) -> torch.Tensor:
    """``positions * base**(-2i/R) / factors[i]`` modulo 2 pi, in [-pi, pi]: (..., P) float64."""
    n = positions.double()[..., None]
    turns = torch.zeros((), dtype=torch.float64)
    for part in _split_turns(float(base), tuple(factors)):
        product = n * torch.tensor(part, dtype=torch.float64)
        turns = turns + (product - torch.floor(product))
    return 2 * torch.pi * (turns - torch.round(turns))


def set_of_length(rope: Rope, length: int) -> int:
    """The first set with ``length <= max_length``, else the last."""
    for index, factor_set in enumerate(rope.sets):
        if factor_set.max_length is None or length <= factor_set.max_length:
            return index
    return len(rope.sets) - 1


def token_sets(
    rope: Rope,
    batch: int,
    seq: int,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The factor set of each token: (batch, seq) int64."""
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if sets is not None:
        chosen = sets.tolist()
    elif lengths is not None:
        chosen = [set_of_length(rope, length) for length in lengths.tolist()]
    else:
        chosen = [0] * sequences
    if cu_seqlens is None:
        return torch.tensor([[index] * seq for index in chosen]).reshape(batch, seq)
    starts = cu_seqlens.tolist()
    row: list[int] = []
    for index, start, end in zip(chosen, starts[:-1], starts[1:], strict=True):
        row += [index] * (end - start)
    return torch.tensor([row], dtype=torch.int64).reshape(batch, seq)


def cos_sin(
    rope: Rope, positions: torch.Tensor, of_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``a cos`` and ``a sin`` of each token and pair: two (batch, seq, P) float64."""
    shape = (*positions.shape, rope.pairs)
    cos, sin = torch.full(shape, torch.nan).double(), torch.full(shape, torch.nan).double()
    for index, factor_set in enumerate(rope.sets):
        below = (positions < factor_set.n_hat) & (factor_set.n_hat > 0)
        original = angles(rope.base, [1.0] * rope.pairs, positions)
        scaled = angles(rope.base, factor_set.factors, positions)
        angle = torch.where(below[..., None], original, scaled)
        a = torch.ones(positions.shape, dtype=torch.float64)
        a = a.masked_fill(~below, factor_set.attention_factor)[..., None]
        mine = (of_token == index)[..., None]
        cos = torch.where(mine, a * torch.cos(angle), cos)
        sin = torch.where(mine, a * torch.sin(angle), sin)
    return cos, sin


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate x (batch, seq, heads, dim), each operation rounded to the dtype of x."""
    pairs = cos.shape[-1]
    i = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
    j = i + 1 if interleaved else i + pairs
    cos, sin = cos.to(x.dtype)[:, :, None, :], sin.to(x.dtype)[:, :, None, :]
    out = x.clone()
    out[..., i] = x[..., i] * cos - x[..., j] * sin
    out[..., j] = x[..., i] * sin + x[..., j] * cos
    return out


class Expected(NamedTuple):
    """``ref64``: the truth. ``low``: exact angles; cos, sin and products in the input's dtype.

    ``sums``: what the order of sums adds, root mean square of each element; 0 where nothing is
    summed, as in a rotation.
    """

    ref64: torch.Tensor
    low: torch.Tensor
    sums: torch.Tensor = torch.zeros((), dtype=torch.float64)


def rotary(
    x: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope,
    *,
    layout: str = "bshd",
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backward: bool = False,
) -> Expected:
    """What `apply_rotary` must make of x, or its backward of a gradient x, on the CPU."""
    x, positions = x.detach().cpu(), positions.cpu()
    x4 = x[None] if layout == "thd" else x.permute(_TO_BSHD[layout])
    batch, seq = x4.shape[:2]
    positions = (positions[None] if positions.dim() == 1 else positions).expand(batch, seq)
    of_token = token_sets(rope, batch, seq, lengths, sets, cu_seqlens)
    cos, sin = cos_sin(rope, positions, of_token)
    if backward:
        sin = -sin
    outs = [rotate(y, cos, sin, rope.interleaved) for y in (x4.double(), x4)]
    return Expected(*(y[0] if layout == "thd" else y.permute(_TO_BSHD[layout]) for y in outs))
