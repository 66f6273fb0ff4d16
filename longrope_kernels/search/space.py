"""`SearchSpace`: which factors, thresholds and attention factors a search may propose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any

from ..rope import FactorSet, Rope, formulas
from ..rope.factor_set import is_int
from . import moves
from .candidate import Candidate

# The thresholds LongRoPE searches (arXiv 2402.13753).
PAPER_N_HATS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
# Factors lie on a grid of 1/100.
GRID = 100

# Above a range of 1.25 the paper's grid ends.
_RANGE = 1.25


def critical_dimension(dim: int, base: float, original_length: int) -> int:
    """``2 ceil(dim / 2 * log_base(original_length / (2 pi)))``: the theory's critical dimension.

    The pairs from half of it on never make a full turn in the original length, so training has
    not shown all of their angles. The formula is that of arXiv 2310.05209, from which LongRoPE2
    (arXiv 2502.20082) starts; it finds the real one lower (66 for Llama 3, where this gives 70).

    Args:
        dim: R, the number of rotated dimensions.
        base: of the embedding, above 1.
        original_length: in tokens, what the model was trained for.
    """
    return 2 * formulas.critical_pair(dim // 2, base, original_length)


@dataclass(frozen=True)
class SearchSpace:
    """The candidates of one stage of an extension, on a grid of 1/100.

    As in the paper ``lambda_i`` goes from 1 to ``1.25 ratio``, and does not fall from one pair to
    the next.

    Attributes:
        dim: R, the number of rotated dimensions of a head; ``P = R / 2`` pairs.
        base: of the original embedding.
        original_length: in tokens, what the model was trained for.
        target_length: in tokens, what this stage extends to.
        ratio: s, by how much this stage extends; None for ``target_length / original_length``.
        stage: the rope this stage starts from, which candidates multiply (`Rope.compose`): of
            several sets the one that serves ``target_length``. Needs ``ratio``.
        n_hats: the thresholds, ascending; None for those of the paper below ``target_length``.
        monotone: ``lambda_i <= lambda_{i+1}``.
        attention: the attention factor: a number, "searched" (a gene as others are), or None for
            ``sqrt(1 + ln(target / original) / ln original)``.
        attention_range: where it is searched, in steps of 0.01.
        critical: LongRoPE2's restriction: the first pair that is searched, from 1 to P - 1. Those
            from it on lie in ``[ratio, 2 ratio]``, monotone; the ones below take the factors of
            the NTK scaling that meets it, ``lambda_c**(i / c)``. Half of `critical_dimension`, or
            lower. Not together with ``stage``: those factors are of the whole extension.
        upper: the largest ``lambda``, in place of ``1.25 ratio``; a readjustment for short lengths
            lowers it.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).

    Raises:
        ValueError, TypeError: naming the attribute that is out of range.
    """

    dim: int
    base: float
    original_length: int
    target_length: int
    ratio: float | None = None
    stage: Rope | None = None
    n_hats: tuple[int, ...] | None = None
    monotone: bool = True
    attention: float | str | None = None
    attention_range: tuple[float, float] = (1.0, 1.5)
    critical: int | None = None
    upper: float | None = None
    interleaved: bool = False
    # What the attributes come to where they are None.
    _ratio: float = field(default=1.0, init=False, repr=False, compare=False)
    _n_hats: tuple[int, ...] = field(default=(0,), init=False, repr=False, compare=False)
    _fixed_attention: float = field(default=1.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_whole("dim", self.dim, 4)
        if self.dim % 2:
            raise ValueError(f"dim: expected an even number, got {self.dim}")
        formulas.check_positive("base", self.base)
        if self.base <= 1:
            raise ValueError(f"base: expected a number above 1, got {self.base}")
        check_whole("original_length", self.original_length, 2)
        check_whole("target_length", self.target_length, 1)
        resolved = {
            "base": float(self.base),
            "_ratio": self._resolve_ratio(),
            "_n_hats": self._resolve_n_hats(),
            "_fixed_attention": self._resolve_attention(),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        self._check_critical()
        if self.upper is not None:
            formulas.check_positive("upper", self.upper)
        low, high = self.bounds
        if high < low:
            raise ValueError(
                f"upper: expected at least {low / GRID}, where the range begins, got {high / GRID}"
            )

    @property
    def pairs(self) -> int:
        """``P``, the number of rotated pairs."""
        return self.dim // 2

    @property
    def genes(self) -> int:
        """The number of factors a candidate has."""
        return self.pairs - (self.critical or 0)

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest factor, in hundredths."""
        ratio, critical = self._ratio, self.critical is not None
        low = math.ceil(GRID * ratio - 1e-9) if critical else GRID
        upper = self.upper if self.upper is not None else ratio * (2 if critical else _RANGE)
        return low, math.floor(GRID * upper + 1e-9)

    @property
    def thresholds(self) -> tuple[int, ...]:
        """The thresholds that are searched: ``n_hats``, or the paper's."""
        return self._n_hats

    @property
    def attention_bounds(self) -> tuple[int, int] | None:
        """The smallest and the largest attention factor in hundredths; None where it is fixed."""
        if self.attention != "searched":
            return None
        return round(GRID * self.attention_range[0]), round(GRID * self.attention_range[1])

    def rope(self, candidate: Candidate, max_length: int | None = None) -> Rope:
        """The embedding a candidate stands for, composed with ``stage``: one set.

        Args:
            candidate: of this space.
            max_length: of the set, as in `FactorSet`.

        Raises:
            ValueError: the candidate has another number of factors, or lacks what is searched.
        """
        if len(candidate.factors) != self.genes:
            raise ValueError(
                f"candidate: expected {self.genes} factors, got {len(candidate.factors)}"
            )
        factors = tuple(value / GRID for value in candidate.factors)
        if self.critical is not None:
            factors = formulas.longrope2_factors(self.pairs, self.critical, factors)
        attention = self._fixed_attention
        if self.attention == "searched":
            if candidate.attention is None:
                raise ValueError("candidate: expected an attention factor, which is searched here")
            attention = candidate.attention / GRID
        one = FactorSet(factors, candidate.n_hat, attention, max_length)
        rope = Rope((one,), self.base, self.interleaved)
        return rope if self.stage is None else self._stage_set(self.stage).compose(rope)

    def nearest(
        self, factors: Sequence[float], n_hat: int = 0, attention: float | None = None
    ) -> Candidate:
        """The candidate on the grid for factors of this stage, moved into the range.

        Args:
            factors: ``lambda`` of all P pairs, relative to ``stage``; those below ``critical`` are
                not read.
            n_hat: the largest threshold of the space that is not above it, else its smallest.
            attention: None for what `attention` is by default.

        Raises:
            ValueError: another number of factors, or one that is not a number.
        """
        if len(factors) != self.pairs or not all(math.isfinite(value) for value in factors):
            raise ValueError(f"factors: expected {self.pairs} finite numbers, got {factors!r}")
        low, high = self.bounds
        values = [min(max(round(GRID * value), low), high) for value in factors]
        values = values[self.critical or 0 :]
        if self.monotone:
            values = moves.raised(values)
        allowed = [value for value in self._n_hats if value <= n_hat]
        hundredths = None
        if self.attention_bounds is not None:
            wanted = self._fixed_attention if attention is None else attention
            least, most = self.attention_bounds
            hundredths = min(max(round(GRID * wanted), least), most)
        return Candidate(tuple(values), allowed[-1] if allowed else self._n_hats[0], hundredths)

    def starts(self) -> list[Candidate]:
        """PI, NTK and YaRN for this stage's ratio, on the grid and in range, each once.

        Where the attention factor is searched, each comes with YaRN's, the paper's and 1: first
        YaRN with its own and the others with the paper's. ``origin`` of each is its own name.
        Under ``critical`` "NTK" is the one that gives the critical pair ``ratio``.
        """
        ratio, pairs = self._ratio, self.pairs
        ntk = formulas.ntk_factors(pairs, ratio)
        if self.critical is not None:
            ntk = tuple(ratio ** (i / self.critical) for i in range(pairs))
        yarn = formulas.yarn_factors(pairs, self.base, ratio, self.original_length)
        total = max(1.0, self.target_length / self.original_length)
        of_yarn, of_paper = formulas.yarn_attention_factor(total), self._fixed_attention
        plain = formulas.linear_factors(pairs, ratio)
        first = [("PI", plain, of_paper), ("NTK", ntk, of_paper), ("YaRN", yarn, of_yarn)]
        others = [(*one[:2], x) for x in (of_paper, of_yarn, 1.0) for one in reversed(first)]
        found = (
            replace(self.nearest(factors, attention=attention), origin=name)
            for name, factors, attention in first + others
        )
        return list(dict.fromkeys(found))

    def start_of(self, candidate: Candidate) -> Candidate | None:
        """The formula that ``candidate`` descends from, with its own attention factor."""
        return next((one for one in self._starts if one.origin == candidate.origin), None)

    @cached_property
    def _starts(self) -> list[Candidate]:
        return self.starts()

    def _nearer(self, factors: list[int], a: Candidate, b: Candidate) -> str:
        """Of the formulas two parents descend from, the one whose factors are nearer."""

        def distance(parent: Candidate) -> float:
            start = self.start_of(parent)
            if start is None:
                return math.inf
            pairs = zip(factors, start.factors, strict=True)
            return math.fsum(math.log(x / y) ** 2 for x, y in pairs)

        return a.origin if a.origin == b.origin or distance(a) <= distance(b) else b.origin

    def allows(self, candidate: Candidate) -> bool:
        """Whether it lies on the grid, in range, in order, with a threshold of the set."""
        low, high = self.bounds
        factors = candidate.factors
        fixed = self.attention_bounds is None
        return (
            len(factors) == self.genes
            and all(low <= value <= high for value in factors)
            and (not self.monotone or all(a <= b for a, b in pairwise(factors)))
            and candidate.n_hat in self._n_hats
            and (candidate.attention is None) == fixed
            and (fixed or self._attention_allowed(candidate.attention))
        )

    def random(self, rng: Random) -> Candidate:
        """Any candidate: factors evenly distributed by their logarithm, sorted under monotone."""
        low, high = self.bounds
        logs = (rng.uniform(math.log(low), math.log(high)) for _ in range(self.genes))
        factors = [min(max(round(math.exp(value)), low), high) for value in logs]
        if self.monotone:
            factors.sort()
        attention = None
        if self.attention_bounds is not None:
            attention = rng.randint(*self.attention_bounds)
        return Candidate(tuple(factors), rng.choice(self._n_hats), attention)

    def mutate(
        self, candidate: Candidate, rng: Random, probability: float = 0.3, kind: str = "mixed"
    ) -> Candidate:
        """A neighbour of ``candidate``; it may be the candidate itself.

        ``n_hat`` and a searched attention factor change with ``probability`` each.

        Args:
            candidate: of this space.
            rng: of all random choices.
            probability: p, of each gene.
            kind: "paper": each factor is drawn again with ``probability``, evenly from what its
                neighbours leave it. "mixed" does that in a part of the cases, and moves many
                pairs together in the others (`moves.mutate_factors` says how).
        """
        factors = moves.mutate_factors(
            list(candidate.factors), self.bounds, self.monotone, rng, probability, kind
        )
        n_hat, attention = candidate.n_hat, candidate.attention
        if rng.random() < probability:
            n_hat = rng.choice(self._n_hats)
        if self.attention_bounds is not None and attention is not None:
            attention = moves.mutate_value(attention, self.attention_bounds, rng, probability, kind)
        return Candidate(tuple(factors), n_hat, attention, candidate.origin)

    def crossover(self, a: Candidate, b: Candidate, rng: Random, kind: str = "mixed") -> Candidate:
        """A child of two candidates of this space; it may be one of them.

        Its ``origin`` is that of the parents' whose factors are nearer to its own.

        Args:
            a: a parent.
            b: the other.
            rng: of all random choices.
            kind: "paper": each gene is that of one parent, and under ``monotone`` that of the
                other where the order would break. "mixed" does that in a part of the cases, and
                else takes one parent's fast pairs and the other's slow ones, or goes between both.
        """
        factors = moves.cross_factors(list(a.factors), list(b.factors), self.monotone, rng, kind)
        n_hat = rng.choice((a, b)).n_hat
        attention, origin = rng.choice((a, b)).attention, self._nearer(factors, a, b)
        return Candidate(tuple(factors), n_hat, attention, origin)

    def describe(self) -> dict[str, Any]:
        """All that decides what is proposed and what it means, as JSON values."""
        stage = None
        if self.stage is not None:
            (one,) = self._stage_set(self.stage).sets
            stage = list(one.factors)
        return {
            "dim": self.dim,
            "base": self.base,
            "original_length": self.original_length,
            "target_length": self.target_length,
            "ratio": self._ratio,
            "stage": stage,
            "n_hats": list(self._n_hats),
            "monotone": self.monotone,
            "attention": self.attention if self.attention == "searched" else self._fixed_attention,
            "attention_range": list(self.attention_bounds or ()),
            "critical": self.critical,
            "bounds": list(self.bounds),
            "interleaved": self.interleaved,
        }

    def _stage_set(self, stage: Rope) -> Rope:
        """The set of the base stage that serves the target length, alone."""
        one = stage.sets[stage.set_index(self.target_length)]
        return Rope((FactorSet(one.factors),), stage.base, stage.interleaved)

    def _attention_allowed(self, attention: int | None) -> bool:
        bounds = self.attention_bounds
        return bounds is not None and attention is not None and bounds[0] <= attention <= bounds[1]

    def _resolve_ratio(self) -> float:
        if self.stage is not None:
            if not isinstance(self.stage, Rope):
                raise TypeError(f"stage: expected a Rope or None, got {self.stage!r}")
            for name, wanted in (
                ("rotary_dim", self.dim),
                ("base", self.base),
                ("interleaved", self.interleaved),
            ):
                if getattr(self.stage, name) != wanted:
                    raise ValueError(
                        f"stage: expected {name} = {wanted} as in this space, got "
                        f"{getattr(self.stage, name)}"
                    )
            if self.ratio is None:
                raise ValueError("ratio: expected by how much this stage extends the given one")
        ratio = self.target_length / self.original_length if self.ratio is None else self.ratio
        formulas.check_positive("ratio", ratio)
        if ratio < 1:
            raise ValueError(f"ratio: expected at least 1, got {ratio}; give ratio=1 to shorten")
        return float(ratio)

    def _resolve_n_hats(self) -> tuple[int, ...]:
        if self.n_hats is None:
            return tuple(value for value in PAPER_N_HATS if value < self.target_length)
        values = tuple(self.n_hats)
        object.__setattr__(self, "n_hats", values)
        for value in values:
            check_whole("n_hats", value, 0)
        if not values or list(values) != sorted(set(values)):
            raise ValueError(f"n_hats: expected ascending thresholds, got {values}")
        if values[-1] >= self.target_length:
            raise ValueError(
                f"n_hats: expected positions below target_length = {self.target_length}, got "
                f"{values[-1]}"
            )
        return values

    def _resolve_attention(self) -> float:
        """The fixed one; where it is searched, the paper's, from which the search starts."""
        low, high = self.attention_range
        formulas.check_positive("attention_range", low)
        formulas.check_positive("attention_range", high)
        if not 0 < round(GRID * low) <= round(GRID * high):
            raise ValueError(f"attention_range: expected low <= high, got {self.attention_range}")
        object.__setattr__(self, "attention_range", (float(low), float(high)))
        if self.attention is None or self.attention == "searched":
            return formulas.extension_attention_factor(self.target_length, self.original_length)
        if isinstance(self.attention, str):
            raise ValueError(
                f'attention: expected a number, "searched" or None, got {self.attention!r}'
            )
        formulas.check_positive("attention", self.attention)
        return float(self.attention)

    def _check_critical(self) -> None:
        if self.critical is None:
            return
        check_whole("critical", self.critical, 1)
        if self.critical >= self.pairs:
            raise ValueError(f"critical: expected 1 to {self.pairs - 1}, got {self.critical}")
        if self.stage is not None:
            raise ValueError("critical: expected no stage: its factors are of the whole extension")
        if not self.monotone:
            raise ValueError("critical: expected monotone=True; LongRoPE2 searches no other")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is a whole number and not below ``least``."""
    if not is_int(value):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
