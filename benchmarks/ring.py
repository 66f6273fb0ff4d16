"""A simulation of the ring's timeline: when what it sends hides behind what it computes.

    python -m benchmarks.ring [--ranks 8] [--heads 32] [--kv-heads 8] [--head-dim 128]

Nothing is measured here. Each rank has a processor and a link to the next, of data-sheet rates; it
sends on what it has as soon as the link is free and computes a block once it is there, in the order
of `longrope_kernels.distributed`. Printed are the fewest tokens a rank from which all sending
between the first block and the last is hidden, beside the formula of docs/distributed.md; the
way home of a backward's gradients comes after the last, and hides behind nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from longrope_kernels.distributed.shards import Order, Spans, spans_of

# bytes a second in one direction, of data sheets; operations a second of attention, see the page
LINKS = {"NVLink 4": 450e9, "InfiniBand NDR": 50e9}
FORWARD, BACKWARD = 640e12, 540e12


@dataclass(frozen=True)
class Ring:
    """Ranks with some tokens each, causal attention of one layer, and how fast things go."""

    tokens: int  # of a rank
    link: float
    speed: float
    backward: bool = False
    ranks: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    order: Order = "balanced"

    def spans(self, rank: int) -> Spans:
        return spans_of(self.tokens * self.ranks, rank, self.ranks, self.order)

    def computing(self, rank: int, step: int) -> float:
        """Seconds of a rank for the block of a step."""
        blocks = (self.spans(rank), self.spans((rank - step) % self.ranks))
        seen = sum(_area(q, k) for q in blocks[0] for k in blocks[1])
        products = 5 if self.backward else 2
        return products * 2 * self.heads * self.head_dim * seen / self.speed

    def sending(self, itemsize: int) -> float:
        """Seconds of a link for a block of two tensors."""
        return 2 * self.kv_heads * self.head_dim * itemsize * self.tokens / self.link

    def formula(self) -> float:
        """The tokens a rank from which sending is hidden."""
        rate = self.kv_heads / self.heads * self.speed / self.link
        return 0.4 * (self.itemsize + 4) * rate if self.backward else self.itemsize * rate

    def seconds(self) -> tuple[float, float]:
        """From the start to the end of the last block, and how much of it the slowest computes."""
        ranks = range(self.ranks)
        there = [[0.0] * self.ranks for _ in ranks]  # when a rank has the block of a step
        sums = [[0.0] * self.ranks for _ in ranks]  # and its gradients from the ranks before
        ends, link = [0.0] * self.ranks, [0.0] * self.ranks
        for step in ranks:
            last = step + 1 == self.ranks
            if not last:
                for rank in ranks:
                    link[rank] = max(link[rank], there[rank][step]) + self.sending(self.itemsize)
                    there[(rank + 1) % self.ranks][step + 1] = link[rank]
            for rank in ranks:
                begun = max(ends[rank], there[rank][step])
                ends[rank] = max(begun + self.computing(rank, step), sums[rank][step])
                if self.backward and not last:
                    link[rank] = max(link[rank], ends[rank]) + self.sending(4)
                    sums[(rank + 1) % self.ranks][step + 1] = link[rank]
        most = max(sum(self.computing(rank, step) for step in ranks) for rank in ranks)
        return max(ends), most


def _area(queries: tuple[int, int], keys: tuple[int, int]) -> float:
    """How many pairs a causal mask leaves of two stretches; half of one and itself."""
    (a, b), (c, d) = queries, keys
    if queries == keys:
        return (b - a) ** 2 / 2
    return float((b - a) * (d - c)) if d <= a else 0.0


def hidden_from(make: Callable[[int], Ring]) -> int:
    """The fewest tokens a rank, an even number, with which the ring waits for no link."""
    low, high = 0, 2
    while not _hidden(make(high)):
        low, high = high, 2 * high
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (low, middle) if _hidden(make(middle)) else (middle, high)
    return high


def _hidden(ring: Ring) -> bool:
    total, computed = ring.seconds()
    return total <= computed * (1 + 1e-9)


def rows(ranks: int, heads: int, kv_heads: int, head_dim: int) -> list[tuple[str, str, float, int]]:
    """Link, direction, the formula's tokens and the simulation's."""
    shape = {"ranks": ranks, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    found = []
    for name, link in LINKS.items():
        for what, speed, backward in (("forward", FORWARD, False), ("backward", BACKWARD, True)):
            rates: dict[str, Any] = {"link": link, "speed": speed, "backward": backward}
            make = partial(Ring, **rates, **shape)
            found.append((name, what, make(2).formula(), hidden_from(make)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("ranks", 8), ("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print("A simulation: tokens a rank from which the ring hides what it sends.")
    print(f"{'link':<16}{'direction':<11}{'formula':>9}{'simulated':>11}")
    for link, what, formula, simulated in rows(**vars(given)):
        print(f"{link:<16}{what:<11}{formula:>9.0f}{simulated:>11}")


if __name__ == "__main__":
    main()
