"""How many splits the keys of a sequence get, from shapes alone; for every decoding on a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# A sequence longer than the mean of its batch may have so many times the splits of the mean.
_SPREAD = 4
# What a further split costs, its start and its part in the combination, as a part of the time that
# one split alone would take.
_SPLIT_COST = 1 / 512


class Splits(NamedTuple):
    """Splits of a sequence of mean length, of any sequence at most, and tiles of one at least."""

    even: int
    most: int
    least_tiles: int


@lru_cache(maxsize=1024)
def choose_splits(
    units: int, batch: int, capacity: int, tile: int, places: int, least_tiles: int
) -> Splits:
    """Splits for ``units`` blocks if nothing were split, of ``places`` that run at once.

    capacity: keys that a sequence may have. tile: keys of a tile. The time of n splits is that of
    their waves, and a cost for each: with fewer units than places, one wave; else enough that the
    last wave, which is rarely full, is short.
    """
    bound = max(1, -(-capacity // (least_tiles * tile)))
    candidates = range(1, min(bound, max(8, places // units)) + 1)
    even = min(candidates, key=lambda n: -(-units * n // places) / n + n * _SPLIT_COST / places)
    most = even if batch == 1 else min(bound, _SPREAD * even)
    return Splits(even, most, least_tiles)
