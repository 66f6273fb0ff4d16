"""The scalings of RoPE as factors: plain float64 arithmetic, no tensors and no `Rope`.

All take ``pairs``, the number ``P`` of rotated pairs, and give one ``lambda_i`` per pair, relative
to the original base: the frequency of pair ``i`` becomes ``base**(-i / P) / lambda_i``. Arguments
are named as in the ``rope_parameters`` of transformers, whose formulas these are; the sources:

- linear: position interpolation, arXiv 2306.15595;
- NTK-aware and dynamic NTK: larger bases, here written as factors of the original one;
- YaRN: arXiv 2309.00071;
- llama3: the Llama 3.1 release;
- LongRoPE2: arXiv 2502.20082.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

# A pair that does not turn at all would need an infinite factor. With this one its fixed-point
# step is 0 (for any base above 1), and its float64 angle below 1e-20 rad at every position below
# 2**31. It is in the range of a float32.
UNROTATED = 1e30
LARGEST = sys.float_info.max  # not infinity, which integers beyond float64 are below


def linear_factors(pairs: int, factor: float) -> tuple[float, ...]:
    """``lambda_i = factor`` for all pairs."""
    check_positive("factor", factor)
    return (float(factor),) * pairs


def ntk_factors(pairs: int, factor: float) -> tuple[float, ...]:
    """``lambda_i = factor**(i / (P - 1))``: from 1 for the fastest pair to ``factor``.

    The usual form multiplies the base by ``factor**(R / (R - 2))``, ``R = 2P``; the frequencies
    are the same.
    """
    check_positive("factor", factor)
    if pairs < 2:
        raise ValueError(f"rotary_dim: expected at least 4 for an NTK scaling, got {2 * pairs}")
    return tuple(float(factor) ** (i / (pairs - 1)) for i in range(pairs))


def dynamic_ntk_factors(
    pairs: int, factor: float, max_position_embeddings: int, length: int
) -> tuple[float, ...]:
    """`ntk_factors` of ``factor * length / max_position_embeddings - (factor - 1)``.

    All 1 up to ``max_position_embeddings`` tokens.
    """
    check_positive("factor", factor)
    check_positive("max_position_embeddings", max_position_embeddings)
    check_positive("length", length)
    if length <= max_position_embeddings:
        return ntk_factors(pairs, 1.0)
    return ntk_factors(pairs, factor * length / max_position_embeddings - (factor - 1))


def yarn_factors(
    pairs: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """1 for pairs that turn often, ``factor`` for slow ones, a ramp of frequencies between.

    The ramp goes from the pair that makes ``beta_fast`` turns in
    ``original_max_position_embeddings`` tokens to the one that makes ``beta_slow``; ``truncate``
    moves its ends to whole pairs, outwards.
    """
    original = original_max_position_embeddings
    check_positive("factor", factor)
    check_positive("original_max_position_embeddings", original)
    check_positive("beta_fast", beta_fast)
    check_positive("beta_slow", beta_slow)
    if beta_fast < beta_slow:
        raise ValueError(
            f"beta_fast: expected at least beta_slow = {beta_slow} turns, got {beta_fast}"
        )
    _check_base_above_1(base)

    low, high = (_pair_of_turns(turns, pairs, base, original) for turns in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is 2 P - 1 and not P - 1: so it is in YaRN's code and in transformers.
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    ramps = (min(max((i - low) / (high - low), 0.0), 1.0) for i in range(pairs))
    return tuple(_mixed(factor, ramp) for ramp in ramps)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """``m(1) = 0.1 ln(factor) + 1``, or ``m(mscale) / m(mscale_all_dim)`` where both are given.

    ``m(c) = 0.1 c ln(factor) + 1``, and 1 where ``factor <= 1``. As in transformers, an
    ``mscale`` of 0 counts as not given.
    """

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def llama3_factors(
    pairs: int,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[float, ...]:
    """By turns ``t`` in ``original_max_position_embeddings`` tokens: ``factor`` where slow.

    ``factor`` where ``t < low_freq_factor``, 1 where ``t > high_freq_factor``, and between them
    frequencies that go linearly with ``t`` from the one to the other.
    """
    original = original_max_position_embeddings
    check_positive("factor", factor)
    check_positive("low_freq_factor", low_freq_factor)
    check_positive("original_max_position_embeddings", original)
    check_positive("high_freq_factor", high_freq_factor)
    if high_freq_factor <= low_freq_factor:
        raise ValueError(
            f"high_freq_factor: expected more than low_freq_factor = {low_freq_factor} turns, "
            f"got {high_freq_factor}"
        )
    turns = (original * base ** (-i / pairs) / (2 * math.pi) for i in range(pairs))
    span = high_freq_factor - low_freq_factor
    kept = (min(max((t - low_freq_factor) / span, 0.0), 1.0) for t in turns)
    return tuple(_mixed(factor, 1 - share) for share in kept)


def proportional_factors(
    pairs: int, partial_rotary_factor: float, factor: float = 1.0
) -> tuple[float, ...]:
    """``factor`` for that share of the pairs, rounded down; the others are `UNROTATED`."""
    share = partial_rotary_factor
    check_positive("factor", factor)
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"partial_rotary_factor: expected a number, got {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"partial_rotary_factor: expected a share from 0 to 1, got {share}")
    rotated = int(share * pairs)
    return (float(factor),) * rotated + (UNROTATED,) * (pairs - rotated)


def longrope2_factors(
    pairs: int, critical_pair: int, factors_above: float | Sequence[float]
) -> tuple[float, ...]:
    """NTK below the critical pair, given factors from there on.

    ``lambda_i = lambda_c**(i / c)`` for ``i < c``, ``c`` the critical pair: a larger base that
    meets the given factors where they begin. So the sets published with LongRoPE2 are made.

    Args:
        pairs: ``P``.
        critical_pair: ``c``, from 1 to P - 1.
        factors_above: ``lambda`` of the P - c pairs from ``c`` on, or one number for all of them.
    """
    if not isinstance(critical_pair, int) or isinstance(critical_pair, bool):
        raise TypeError(f"critical_pair: expected a whole number, got {critical_pair!r}")
    if not 0 < critical_pair < pairs:
        raise ValueError(f"critical_pair: expected 1 to {pairs - 1}, got {critical_pair}")
    if isinstance(factors_above, int | float):
        factors_above = (factors_above,) * (pairs - critical_pair)
    try:
        above = tuple(float(value) for value in factors_above)
    except (TypeError, ValueError):
        raise TypeError(f"factors_above: expected numbers, got {factors_above!r}") from None
    if len(above) != pairs - critical_pair:
        raise ValueError(
            f"factors_above: expected {pairs - critical_pair} numbers, for the pairs from "
            f"{critical_pair} to {pairs - 1}, got {len(above)}"
        )
    check_positive("factors_above", above[0])
    return (*(above[0] ** (i / critical_pair) for i in range(critical_pair)), *above)


def critical_pair(pairs: int, base: float, original_max_position_embeddings: int) -> int:
    """The first pair that makes no full turn in ``original_max_position_embeddings`` tokens.

    ``ceil(P ln(L / (2 pi)) / ln base)``: the theory's critical dimension (over two), ``P`` where
    all pairs make one. LongRoPE2 finds the real one lower: 33 rather than 35 for Llama 3.
    """
    check_positive("original_max_position_embeddings", original_max_position_embeddings)
    _check_base_above_1(base)
    pair = math.ceil(_pair_of_turns(1.0, pairs, base, original_max_position_embeddings))
    return min(max(pair, 0), pairs)


def extension_attention_factor(max_length: float, original_length: float) -> float:
    """``sqrt(1 + ln s / ln original_length)`` with ``s = max_length / original_length``.

    LongRoPE's temperature; 1 where nothing is extended.
    """
    ratio = max_length / original_length
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original_length))


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < value < LARGEST:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def _check_base_above_1(base: float) -> None:
    check_positive("base", base)
    if base <= 1:
        raise ValueError(f"base: expected a number above 1 for this scaling, got {base}")


def _pair_of_turns(turns: float, pairs: int, base: float, length: float) -> float:
    """The pair, as a fraction, that makes ``turns`` full turns in ``length`` tokens."""
    return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(base)


def _mixed(factor: float, share: float) -> float:
    """The factor whose frequency is ``share`` scaled by ``factor`` and ``1 - share`` original.

    In this form it is exactly ``factor`` for a share of 1 and exactly 1 for 0.
    """
    return factor / (share + factor * (1 - share))
