"""Readjustment: factor sets for short lengths, which a model extended for long ones serves worse.

After fine-tuning under the factors for a long context, LongRoPE (arXiv 2402.13753) searches again
at the short lengths, with a lower bound on ``lambda``, and lets short sequences take that set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..rope import FactorSet, Rope
from .candidate import Candidate
from .documents import Document, Encode
from .find import Found, Progress, find
from .model import Losses
from .settings import Options
from .space import SearchSpace

BEFORE = "before"


@dataclass(frozen=True)
class ShortSpace(SearchSpace):
    """A space whose search also starts from the set that serves the short length until now.

    Attributes:
        present: that set's candidate, moved into the range.
    """

    present: Candidate | None = None

    def starts(self) -> list[Candidate]:
        """As in `SearchSpace`, and `present`."""
        found = super().starts()
        if self.present is not None:
            # Behind one of each formula, before these with other attention factors.
            found.insert(3, replace(self.present, origin=BEFORE))
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Readjusted:
    """The result of `readjust`.

    Attributes:
        rope: the one that was given, with the sets that were better at their lengths.
        found: the search at each length.
        before: the fitness at each length under the rope that was given.
    """

    rope: Rope
    found: dict[int, Found]
    before: dict[int, float]

    @property
    def taken(self) -> tuple[int, ...]:
        """The lengths that got a set of their own; elsewhere the search found no better one."""
        return tuple(n for n in self.found if self.found[n].best.fitness < self.before[n])


def highest(rope: Rope) -> float:
    """Where ``lambda`` ends by default: the root of the longest set's largest, 1.25 at least.

    The paper says only that it is lower than in the search for the long set. The root is the
    middle of that range in its logarithm.
    """
    return max(1.25, math.sqrt(max(rope.sets[-1].factors)))


def readjust(
    losses: Losses,
    documents: Sequence[Document],
    rope: Rope,
    lengths: Sequence[int],
    original: int,
    options: Options,
    folder: Path,
    *,
    upper: float | None = None,
    encode: Encode | None = None,
    context: dict[str, Any] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    sharing: int = 1,
) -> Readjusted:
    """Search a set for each short length, and put those that are better before the long ones.

    Args:
        losses: the model, fine-tuned for the long sets.
        documents: each of at least as many tokens as the longest of ``lengths``.
        rope: of the model; where no better set is found, its own stay.
        lengths: in tokens; a set serves sequences up to its length.
        original: in tokens, what the model was first trained for.
        options: how to search; where the attention factor is not given, it is that of the set
            that serves the length until now.
        folder: each search has a folder of its own in it.
        upper: the largest ``lambda``; None for `highest`.
        encode: as in `find`.
        context: as in `find`.
        progress: as in `find`.
        say: as in `find`.
        sharing: as in `find`.

    Raises:
        ValueError: the lengths do not ascend, or reach beyond the bound of the last set; as `find`.
    """
    bound = rope.sets[-1].max_length
    if not lengths or sorted(set(lengths)) != list(lengths) or lengths[0] < 2:
        raise ValueError(f"lengths: expected ascending numbers of tokens, got {list(lengths)}")
    if bound is not None and lengths[-1] >= bound:
        raise ValueError(f"lengths: expected below {bound}, where the last set ends: {lengths[-1]}")
    found: dict[int, Found] = {}
    for length in lengths:
        now = rope.sets[rope.set_index(length)]
        fixed = options.attention is None
        space = options.space(
            *(rope, original, length),
            ratio=max(1.0, length / original),
            upper=highest(rope) if upper is None else upper,
            critical=None,
            attention=float(now.attention_factor) if fixed else options.attention,
        )
        present = space.nearest(now.factors, now.n_hat, float(now.attention_factor))
        space = ShortSpace(**arguments_of(space), present=present)
        found[length] = find(
            losses,
            documents,
            space,
            options,
            folder / f"{length}",
            others={BEFORE: rope},
            encode=encode,
            context={**(context or {}), "before": as_json(rope)},
            progress=progress,
            say=say,
            sharing=sharing,
        )
    before = {length: one.others[BEFORE] for length, one in found.items()}
    result = Readjusted(rope, found, before)
    short = {n: found[n].rope.sets[0] if n in result.taken else None for n in lengths}
    return replace(result, rope=with_short_sets(rope, short))


def with_short_sets(rope: Rope, short: Mapping[int, FactorSet | None]) -> Rope:
    """``rope`` with sets of its own for sequences up to some lengths.

    short: by ascending length the set that serves what is beyond the length before, or None where
    that of ``rope`` stays.
    """
    sets: list[FactorSet] = []
    beyond = 0
    for length, own in short.items():
        if own is not None:
            sets.append(replace(own, max_length=length))
        else:
            sets += _between(rope, beyond, length)
        beyond = length
    sets += _between(rope, beyond, math.inf)
    # Of one set in two pieces, side by side, the second one goes further.
    kept = [
        one
        for at, one in enumerate(sets)
        if at + 1 == len(sets) or replace(one, max_length=sets[at + 1].max_length) != sets[at + 1]
    ]
    return Rope(tuple(kept), rope.base, rope.interleaved)


def _between(rope: Rope, beyond: int, longest: float) -> Iterator[FactorSet]:
    """The sets of sequences of more than ``beyond`` tokens, up to ``longest``."""
    for one in rope.sets:
        bound = one.max_length or math.inf
        if bound > beyond:
            bound = min(bound, longest)
            yield replace(one, max_length=int(bound) if math.isfinite(bound) else None)
            if bound == longest:
                return


def arguments_of(space: SearchSpace) -> dict[str, Any]:
    """What makes the same space again."""
    names = (name for name, field in space.__dataclass_fields__.items() if field.init)
    return {name: getattr(space, name) for name in names}


def as_json(rope: Rope) -> list[list[Any]]:
    """The numbers of a rope's sets."""
    return [[s.max_length, s.n_hat, s.attention_factor, list(s.factors)] for s in rope.sets]
