"""How many splits the keys of a sequence get, from shapes alone; for every decoding on a GPU."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import NamedTuple

import torch

# A sequence longer than the mean of its batch may have so many times the splits of the mean.
_SPREAD = 4
# What a further split costs, its start and its part in the combination, as a part of the time that
# one split alone would take.
_SPLIT_COST = 1 / 512
# By device and stream, and on the CPU by thread.
_counters: dict[tuple[object, int], torch.Tensor] = {}


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


def counters_for(q: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` int32 zeros, or more, for the kernel to count in, which leaves zeros.

    Kernels of one stream follow one another and share them; two streams may not, nor two graphs,
    whose replays nobody can order from here: a call in a graph has its own, zeroed by the graph.
    """
    if not q.is_cuda:
        place: tuple[object, int] = (q.device, threading.get_ident())
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=q.device)
    else:
        place = (q.device, torch.cuda.current_stream(q.device).cuda_stream)
    counters = _counters.get(place)
    if counters is None or len(counters) < count:
        with torch.inference_mode(False):
            size = 1 << (count - 1).bit_length()
            counters = torch.zeros(size, dtype=torch.int32, device=q.device)
        _counters[place] = counters
    return counters
