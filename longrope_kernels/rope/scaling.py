"""Every scaling of RoPE as a `Rope`, and factors in files and arrays of other programs.

Arguments have the names of transformers' ``rope_parameters`` where they exist there. Factors are
relative to the original base, also where a method is usually written as another base: so a
threshold ``n_hat`` keeps the original embedding, and stages multiply (`Rope.compose`). What a
config says, `Rope.from_config` reads; `Rope.plain` and `Rope.longrope` make the other two kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import formulas
from .checks import FactorWarning, warn_about
from .factor_files import from_arrays, load_csv, save_csv, to_arrays
from .factor_set import FactorSet, is_int
from .value import Rope

__all__ = [
    "FactorWarning",
    "check",
    "critical_pair",
    "dynamic_ntk",
    "from_arrays",
    "linear",
    "llama3",
    "load_csv",
    "longrope2",
    "ntk_aware",
    "proportional",
    "save_csv",
    "to_arrays",
    "yarn",
]


def linear(
    rotary_dim: int,
    factor: float,
    *,
    n_hat: int = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """Position interpolation (arXiv 2306.15595): ``lambda_i = factor``.

    Args:
        rotary_dim: R, the number of rotated dimensions of a head.
        factor: the extension ratio s.
        n_hat: tokens below it keep the original embedding; 0 for no threshold.
        base: ``b`` of the frequencies ``b**(-i / P)`` of P pairs.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).

    Raises:
        ValueError, TypeError: naming the argument that is out of range; so in all of this module.
    """
    factors = formulas.linear_factors(_pairs(rotary_dim), factor)
    return Rope((FactorSet(factors, n_hat),), base, interleaved)


def ntk_aware(
    rotary_dim: int,
    factor: float,
    *,
    n_hat: int = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """NTK-aware scaling: ``lambda_i = factor**(i / (P - 1))``.

    These are the frequencies of the base ``base * factor**(R / (R - 2))``, relative to ``base``.

    Args:
        rotary_dim: R, at least 4.
        factor: of the slowest pair; the fastest keeps its frequency.
        n_hat: tokens below it keep the original embedding; 0 for no threshold.
        base: the original one.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    factors = formulas.ntk_factors(_pairs(rotary_dim), factor)
    return Rope((FactorSet(factors, n_hat),), base, interleaved)


def dynamic_ntk(
    rotary_dim: int,
    factor: float,
    max_position_embeddings: int,
    length: int,
    *,
    n_hat: int = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """NTK-aware scaling by the length of the sequence, exact for one length.

    The factor of `ntk_aware` is ``factor * length / max_position_embeddings - (factor - 1)``; up
    to ``max_position_embeddings`` tokens nothing is scaled. The set has ``max_length = length``:
    sets for several lengths, in one `Rope`, are a dynamic NTK in steps.

    Args:
        rotary_dim: R, at least 4.
        factor: of the config, not that of the length.
        max_position_embeddings: in tokens, what the model was trained for.
        length: in tokens, cached and new.
        n_hat: tokens below it keep the original embedding; 0 for no threshold.
        base: the original one.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    pairs = _pairs(rotary_dim)
    factors = formulas.dynamic_ntk_factors(pairs, factor, max_position_embeddings, length)
    bound = max(length, max_position_embeddings)
    return Rope((FactorSet(factors, n_hat, max_length=bound),), base, interleaved)


def yarn(
    rotary_dim: int,
    factor: float,
    original_max_position_embeddings: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    attention_factor: float | None = None,
    n_hat: int = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """YaRN (arXiv 2309.00071): fast pairs as they were, slow ones interpolated, a ramp between.

    Args:
        rotary_dim: R.
        factor: the extension ratio s.
        original_max_position_embeddings: in tokens, what the model was trained for.
        beta_fast: the ramp begins at the pair that makes so many turns in the original length.
        beta_slow: it ends at the pair that makes so many.
        truncate: the ends of the ramp are moved outwards to whole pairs.
        mscale: with ``mscale_all_dim`` the attention factor is ``m(mscale) / m(mscale_all_dim)``,
            ``m(c) = 0.1 c ln s + 1``; else it is ``m(1)``.
        mscale_all_dim: see ``mscale``.
        attention_factor: overrides that formula.
        n_hat: tokens below it keep the original embedding; 0 for no threshold.
        base: the original one, above 1.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    factors = formulas.yarn_factors(
        _pairs(rotary_dim),
        base,
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        truncate,
    )
    if attention_factor is None:
        attention_factor = formulas.yarn_attention_factor(factor, mscale, mscale_all_dim)
    return Rope((FactorSet(factors, n_hat, attention_factor),), base, interleaved)


def llama3(
    rotary_dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    *,
    n_hat: int = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """The scaling of Llama 3.1: by the turns a pair makes in the original length.

    Args:
        rotary_dim: R.
        factor: of pairs with fewer turns than ``low_freq_factor``.
        low_freq_factor: in turns.
        high_freq_factor: in turns; pairs with more keep their frequency.
        original_max_position_embeddings: in tokens.
        n_hat: tokens below it keep the original embedding; 0 for no threshold.
        base: the original one (Llama 3: 500000).
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    factors = formulas.llama3_factors(
        _pairs(rotary_dim),
        base,
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    )
    return Rope((FactorSet(factors, n_hat),), base, interleaved)


def proportional(
    head_dim: int,
    partial_rotary_factor: float,
    factor: float = 1.0,
    *,
    n_hat: int = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """The first share of a head's pairs by ``factor``; the others do not turn at all.

    Unlike partial rotary, frequencies and pairs are those of the whole head. A pair that does not
    turn has the factor 1e30: its fixed-point step is 0.

    Args:
        head_dim: D; here R = D.
        partial_rotary_factor: the share of pairs that turn, from 0 to 1.
        factor: of those.
        n_hat: as in `FactorSet`; below it all pairs turn, as in the original embedding.
        base: ``b`` of the frequencies ``b**(-i / P)`` of P pairs.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    pairs = _pairs(head_dim, "head_dim")
    factors = formulas.proportional_factors(pairs, partial_rotary_factor, factor)
    return Rope((FactorSet(factors, n_hat),), base, interleaved)


def longrope2(
    rotary_dim: int,
    factors_above: float | Sequence[float],
    original_max_position_embeddings: int,
    max_position_embeddings: int | None = None,
    *,
    critical_pair: int,
    attention_factor: float | tuple[float, float] | None = None,
    n_hat: int | tuple[int, int] = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """LongRoPE2 (arXiv 2502.20082): NTK below the critical dimension, searched factors above.

    The long set has ``lambda_i = lambda_c**(i / c)`` for ``i < c``, so that NTK meets the first
    of ``factors_above`` at the critical pair ``c``; the short set is the original embedding.

    Args:
        rotary_dim: R.
        factors_above: ``lambda`` of the pairs from ``c`` on, P - c numbers, or one for all.
        original_max_position_embeddings: as in `Rope.longrope`.
        max_position_embeddings: as in `Rope.longrope`.
        critical_pair: ``c``, from 1 to P - 1. The theory's is `critical_pair`; the real one,
            which a search finds, is lower.
        attention_factor: as in `Rope.longrope`.
        n_hat: as in `Rope.longrope`.
        base: the original one.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
    """
    pairs = _pairs(rotary_dim)
    return Rope.longrope(
        (1.0,) * pairs,
        formulas.longrope2_factors(pairs, critical_pair, factors_above),
        original_max_position_embeddings,
        max_position_embeddings,
        attention_factor=attention_factor,
        n_hat=n_hat,
        base=base,
        interleaved=interleaved,
    )


def critical_pair(
    rotary_dim: int, original_max_position_embeddings: int, *, base: float = 10000.0
) -> int:
    """The theory's critical dimension, over two: the first pair without a full turn.

    ``ceil(P ln(L / (2 pi)) / ln base)``, P where every pair makes a turn in the L tokens of
    training. LongRoPE2 finds the real one lower: 33 for Llama 3, where this gives 35.

    Args:
        rotary_dim: R.
        original_max_position_embeddings: L, in tokens.
        base: the original one.
    """
    return formulas.critical_pair(_pairs(rotary_dim), base, original_max_position_embeddings)


def check(rope: Rope, factor: float | None = None) -> None:
    """Warn where factors are valid and odd; the loaders of this package do it by themselves.

    Odd is: a set that is not monotone; a factor beyond ``1.25 * factor``, where LongRoPE's search
    ends; a set with a larger factor than that of the next, longer one. Some published sets are:
    the lists of `published_configs` are therefore not reported.

    Args:
        rope: whose sets to look at.
        factor: the extension ratio s; None leaves out what needs it.

    Warns:
        FactorWarning: for each of the three, with the pairs and values seen.
    """
    warn_about([s.factors for s in rope.sets], factor)


def _pairs(rotary_dim: int, name: str = "rotary_dim") -> int:
    if not is_int(rotary_dim):
        raise TypeError(f"{name}: expected a whole number, got {rotary_dim!r}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"{name}: expected an even number above 0, got {rotary_dim}")
    return rotary_dim // 2
