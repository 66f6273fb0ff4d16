"""Mutation and crossover of factors: lists of whole numbers in a range, in order or not.

"paper" is what LongRoPE (arXiv 2402.13753) describes: a factor is drawn again with a probability,
a child takes each factor from one parent. Under the monotone constraint a factor can only go where
its neighbours leave room, and there is none on the plateaus of PI and YaRN. So "mixed", this
package's own, also shakes all factors, and moves runs of pairs by small and by large steps, which
push what is in the way.
"""

from __future__ import annotations

import math
from random import Random

Bounds = tuple[int, int]

# The shares of "mixed" mutations: the paper's; all factors shaken; a run multiplied. In the rest
# the whole curve moves along the pairs.
_PAPER, _SHAKEN, _RUN = 0.4, 0.2, 0.3
# Smallest step of a logarithm, and the largest as a share of the range's.
_FINEST, _COARSEST = 0.004, 0.5


def mutate_factors(
    factors: list[int],
    bounds: Bounds,
    monotone: bool,
    rng: Random,
    probability: float,
    kind: str,
) -> list[int]:
    """Changed factors, in range and, where asked, in order.

    Args:
        factors: in hundredths, valid.
        bounds: the smallest and largest value.
        monotone: no factor is below the one before.
        rng: of all choices.
        probability: of each factor to be drawn again, in the paper's mutation.
        kind: "paper" or "mixed".
    """
    part = 0.0 if kind == "paper" else rng.random()
    if part < _PAPER:
        return _redraw(factors, bounds, monotone, rng, probability)
    if part < _PAPER + _SHAKEN:
        return _shake(factors, bounds, monotone, rng)
    if part < _PAPER + _SHAKEN + _RUN:
        return _scale_run(factors, bounds, monotone, rng)
    return _shift(factors, bounds, monotone, rng)


def mutate_value(value: int, bounds: Bounds, rng: Random, probability: float, kind: str) -> int:
    """A value changed with ``probability``: drawn again, or in half of "mixed" a small step."""
    if rng.random() >= probability:
        return value
    if kind == "mixed" and rng.random() < 0.5:
        return min(max(value + rng.choice((-3, -2, -1, 1, 2, 3)), bounds[0]), bounds[1])
    return rng.randint(*bounds)


def cross_factors(a: list[int], b: list[int], monotone: bool, rng: Random, kind: str) -> list[int]:
    """Factors of a child, in range and, where both parents are, in order.

    Args:
        a: factors of a parent, in hundredths.
        b: those of the other.
        monotone: as in `mutate_factors`.
        rng: of all choices.
        kind: "paper" or "mixed".
    """
    part = 0.0 if kind == "paper" else rng.random()
    if part < 1 / 3:
        return _choose_each(a, b, monotone, rng)
    if part < 2 / 3:
        cut = rng.randint(0, len(a))
        child = a[:cut] + b[cut:]
        return raised(child) if monotone else child
    share = rng.random()
    return [round(share * x + (1 - share) * y) for x, y in zip(a, b, strict=True)]


def raised(values: list[int]) -> list[int]:
    """Each value as large as the largest before it, at least."""
    result: list[int] = []
    for value in values:
        result.append(max(value, result[-1]) if result else value)
    return result


def _redraw(
    factors: list[int], bounds: Bounds, monotone: bool, rng: Random, probability: float
) -> list[int]:
    """The paper's: each with ``probability``, evenly from what its neighbours leave."""
    low, high = bounds
    result = list(factors)
    for i in range(len(result)):
        if rng.random() < probability:
            least = result[i - 1] if monotone and i > 0 else low
            most = result[i + 1] if monotone and i + 1 < len(result) else high
            result[i] = rng.randint(least, most)
    return result


def _shake(factors: list[int], bounds: Bounds, monotone: bool, rng: Random) -> list[int]:
    """All factors times random numbers near 1, how near is random too; put in order again."""
    low, high = bounds
    spread = math.exp(rng.uniform(math.log(_FINEST), math.log(_coarsest(bounds) / 4)))
    moved = (round(value * math.exp(rng.gauss(0.0, spread))) for value in factors)
    result = [min(max(value, low), high) for value in moved]
    return sorted(result) if monotone else result


def _scale_run(factors: list[int], bounds: Bounds, monotone: bool, rng: Random) -> list[int]:
    """A run of pairs times one number, less towards its ends; from one pair to the whole curve.

    The run's length and the step are even in their logarithms. Under the monotone constraint a
    step up raises the pairs above that are in its way, a step down lowers those below.
    """
    low, high = bounds
    width = math.exp(rng.uniform(math.log(0.7), math.log(max(len(factors), 1))))
    centre = rng.uniform(-0.5, len(factors) - 0.5)
    step = math.exp(rng.uniform(math.log(_FINEST), math.log(_coarsest(bounds))))
    up = rng.random() < 0.5
    result = list(factors)
    for i in range(len(result)):
        distance = min(abs(i - centre) / width, 1.0)
        part = step * (1 + math.cos(math.pi * distance)) / 2
        moved = round(result[i] * math.exp(part if up else -part))
        result[i] = min(max(moved, low), high)
    if not monotone:
        return result
    return raised(result) if up else _lowered(result)


def _shift(factors: list[int], bounds: Bounds, monotone: bool, rng: Random) -> list[int]:
    """The curve moved along the pairs by a part of one, or by several; its ends go on."""
    reach = math.exp(rng.uniform(math.log(0.05), math.log(max(len(factors) / 4, 0.1))))
    reach = reach if rng.random() < 0.5 else -reach
    last = len(factors) - 1
    result = []
    for i in range(len(factors)):
        place = min(max(i + reach, 0.0), float(last))
        left = min(int(place), last - 1) if last else 0
        share = place - left
        right = min(left + 1, last)
        value = factors[left] ** (1 - share) * factors[right] ** share
        result.append(min(max(round(value), bounds[0]), bounds[1]))
    return result


def _choose_each(a: list[int], b: list[int], monotone: bool, rng: Random) -> list[int]:
    """The paper's: each factor that of either parent; of the one that keeps the order, if only one.

    Of two values one always does: the parent the last one came from. To begin at either end
    keeps the child from drifting upwards.
    """
    pairs = list(zip(a, b, strict=True))
    if not monotone:
        return [rng.choice(pair) for pair in pairs]
    backwards = rng.random() < 0.5
    child: list[int] = []
    for pair in reversed(pairs) if backwards else pairs:
        value = rng.choice(pair)
        if child and (value > child[-1] if backwards else value < child[-1]):
            value = min(pair) if backwards else max(pair)
        child.append(value)
    return child[::-1] if backwards else child


def _coarsest(bounds: Bounds) -> float:
    return max(_COARSEST * math.log(bounds[1] / bounds[0]), 8 * _FINEST)


def _lowered(values: list[int]) -> list[int]:
    """Each value as small as the smallest after it, at most."""
    return [-value for value in raised([-value for value in reversed(values)])][::-1]
