"""Copies of the inputs of a group, which its calls take in turn: none finds its own in a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from measure import Ceiling
from memory import available

MOST = 8
SHARE = 32  # of the memory that is there, all copies take this part at most
# Bytes that all copies together exceed. On a CPU calls share one: the last-level cache may be that
# of a whole server, and a model's tensors lie in it as well.
cache = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0

Inputs = TypeVar("Inputs")
Prepared = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]  # as of `measure.Timed`


def how_many(nbytes: int) -> int:
    """Copies of ``nbytes`` that exceed the cache together; one where it does alone."""
    return max(1, min(cache // nbytes + 1, MOST, available() // (SHARE * nbytes)))


class Copies(Generic[Inputs]):
    """As many as are needed of what ``make`` makes, of which a call reads ``nbytes``."""

    def __init__(self, make: Callable[[], Inputs], nbytes: int) -> None:
        self.all = [make() for _ in range(how_many(nbytes))]
        self._taken = 0

    def in_turn(self, prepare: Callable[[Inputs], Prepared]) -> Prepared:
        """What ``prepare`` makes of each copy, as one row: each call takes the next copy."""
        prepared = [prepare(inputs) for inputs in self.all]
        if len(prepared) == 1:
            return prepared[0]

        def arguments() -> tuple[Any, ...]:
            run, of_run = prepared[self._next()]
            return run, *of_run()

        return _call, arguments

    def ceiling(self, make: Callable[[Inputs], Ceiling]) -> Ceiling:
        """The ceiling of such rows: it takes a copy in its turn, too."""
        ceilings = [make(inputs) for inputs in self.all]
        if len(ceilings) == 1:
            return ceilings[0]
        return ceilings[0]._replace(run=lambda: ceilings[self._next()].run())

    def _next(self) -> int:
        self._taken += 1
        return self._taken % len(self.all)


def _call(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)
