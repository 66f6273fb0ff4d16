"""`FactorSet`, and what numbers it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from .formulas import LARGEST

# Radians per token. A float64 keeps 53 bits of a frequency and the farthest position takes 31 of
# them: up to 2**24 what is left still says to 2**31 * 2**-54 * 2**24 = 2 rad where the pair stands.
# Above it the low bits of a step are no angle, they are what was rounded.
FASTEST = 2.0**24
# A pair turns by at most 1 / lambda rad, for any base of 1 or more. There is no upper bound: large
# factors have a step of 0, and their pairs stand still.
LEAST_FACTOR = 1 / FASTEST


@dataclass(frozen=True)
class FactorSet:
    """One factor per pair of dimensions, and where they hold.

    Attributes:
        factors: ``lambda_i``, P finite numbers of 2**-24 or more; pair ``i`` turns by
            ``n * base**(-i / P) / lambda_i`` at position ``n``.
        n_hat: tokens at positions below it keep the original embedding, neither scaled nor
            multiplied by ``attention_factor``. 0 means no threshold.
        attention_factor: multiplies the rotated dimensions of q and k, at or above ``n_hat``.
        max_length: the longest sequence (in tokens) the set serves; None for no bound.

    Raises:
        ValueError, TypeError: naming the attribute that is out of range.
    """

    factors: tuple[float, ...]
    n_hat: int = 0
    attention_factor: float = 1.0
    max_length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", as_factors("factors", self.factors))
        check_n_hat(self.n_hat)
        check_attention_factor(self.attention_factor)
        if self.max_length is not None and (
            not is_int(self.max_length) or not 0 < self.max_length <= 2**31
        ):
            raise ValueError(
                "max_length: expected a whole number of tokens from 1 to 2**31, or None, "
                f"got {self.max_length!r}"
            )


def check_n_hat(n_hat: int) -> None:
    if not is_int(n_hat):
        raise TypeError(f"n_hat: expected a whole number of tokens, got {n_hat!r}")
    if not 0 <= n_hat < 2**31:
        raise ValueError(f"n_hat: expected a token position from 0 to 2**31 - 1, got {n_hat}")


def check_attention_factor(attention_factor: float) -> None:
    if not is_number(attention_factor):
        raise TypeError(f"attention_factor: expected a number, got {attention_factor!r}")
    if not 0 < attention_factor < LARGEST:
        raise ValueError(
            f"attention_factor: expected a finite number above 0, got {attention_factor}"
        )


def as_factors(name: str, values: Any) -> tuple[float, ...]:
    try:
        factors = floats(values)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a sequence of numbers, got {values!r}") from None
    except OverflowError as error:
        raise ValueError(f"{name}: expected finite numbers above 0, got {error}") from None
    if not factors:
        raise ValueError(f"{name}: expected at least one factor, got none")
    for i, factor in enumerate(factors):
        if not 0 < factor < math.inf:
            raise ValueError(f"{name}: expected finite numbers above 0, got {factor} for pair {i}")
        if factor < LEAST_FACTOR:
            raise ValueError(
                f"{name}: expected at least 2**-24, below which float64 does not say any more "
                f"where a pair stands at position 2**31, got {factor} for pair {i}"
            )
    return factors


def floats(values: Any) -> tuple[float, ...]:
    """The numbers of a sequence or tensor as float64, of whatever type they are.

    Raises:
        TypeError: it is no sequence, or something in it is no number; a string is none.
        OverflowError: an integer beyond all of float64.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().tolist()
    values = tuple(values)
    if any(isinstance(value, str | bytes | bool) for value in values):
        raise TypeError("expected numbers")
    return tuple(float(value) for value in values)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, or what stands for one in a graph; no bool, no string."""
    kinds = int | float | torch.SymInt | torch.SymFloat
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number; no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
