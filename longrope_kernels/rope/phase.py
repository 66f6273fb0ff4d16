"""Rotation frequencies as 64-bit fixed-point steps: the phase accumulator's host side.

An angle is kept in turns as a 64-bit fraction. With ``step = round(2**64 * f / (2 pi))`` for a
frequency ``f`` in radians per token, the phase of token ``n`` is ``n * step mod 2**64``: integer
wraparound is the range reduction, and it is exact. The rounding of ``step`` moves the angle of a
position below 2**31 by at most 2**31 * 2**-65 turns, 4e-10 rad.

``theta_i = base**(-2i / R)`` and ``lambda_i`` are the paper's (arXiv 2402.13753, equation 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from math import pi

import torch

# 60 digits: enough for the 19 of the integer part of 2**64 / (2 pi) with 40 to spare.
_DIGITS = 60
_TWO_PI = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def frequencies(base: float, factors: Sequence[float]) -> list[Decimal]:
    """``theta_i / lambda_i`` for each pair, in radians per token, to more than 50 digits.

    Args:
        base: ``b`` in ``theta_i = b**(-2i / R)``.
        factors: ``lambda_i``, one per pair, so ``R = 2 * len(factors)``.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        ratio = Decimal(base) ** (Decimal(-1) / Decimal(len(factors)))
        result, theta = [], Decimal(1)
        for factor in factors:
            result.append(theta / Decimal(factor))
            theta *= ratio
    return result


def fixed_point_step(frequency: Decimal) -> int:
    """``round(2**64 * frequency / (2 pi)) mod 2**64`` as the int64 with the same bits."""
    with localcontext() as context:
        context.prec = _DIGITS
        step = int((frequency * 2**64 / _TWO_PI).to_integral_value()) % 2**64
    return step - 2**64 if step >= 2**63 else step


def frequencies_on_device(base: float, factors: torch.Tensor) -> torch.Tensor:
    """`frequencies` in float64 on the device of ``factors``, without a sync.

    Args:
        base: as above.
        factors: (P,), any floating dtype.

    Returns:
        (P,) float64, radians per token, each within 3 units in the last place.
    """
    pairs = factors.shape[0]
    index = torch.arange(pairs, dtype=torch.float64, device=factors.device)
    return torch.pow(base, index * (-1.0 / pairs)) / factors.to(torch.float64)


def fixed_point_steps_on_device(frequency: torch.Tensor) -> torch.Tensor:
    """`fixed_point_step` of each element, without a sync.

    Args:
        frequency: float64, radians per token.

    Returns:
        int64 of the same shape, relative error about 2**-52 (the input's own).
    """
    turns = frequency * (0.5 / pi)
    turns = turns - torch.floor(turns)
    # Two halves of 32 bits, since a float64 above 2**63 has no int64; scaling by 2**32 is exact.
    high = torch.floor(turns * 2.0**32)
    low = torch.round((turns * 2.0**32 - high) * 2.0**32)
    return (high.to(torch.int64) << 32) + low.to(torch.int64)
