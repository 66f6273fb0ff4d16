"""The rows of a KV cache as the host knows them: lengths, factor sets, policy. No tensor here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..rope.factor_set import is_int
from ..rope.value import Rope

Policy = Literal["switch", "pin", "recompute"]
POLICIES = ("switch", "pin", "recompute")


class CacheFullError(RuntimeError):
    """There is no room for the tokens of a call, which changed nothing.

    Attributes:
        needed: how many blocks the call needs; where ``row`` is not None, how many slots of it.
        free: how many of them are free.
        row: the row that has no more slots, or None where the cache has no more blocks.
    """

    def __init__(self, message: str, needed: int, free: int, row: int | None = None) -> None:
        super().__init__(message)
        self.needed, self.free, self.row = needed, free, row


class PrefillAgain(RuntimeError):  # noqa: N818 (no failure: the policy at work)
    """Rows would go on under another factor set, under "recompute"; the call changed nothing.

    Free them and prefill all their tokens, the new ones included.

    Attributes:
        rows: those rows.
    """

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows


class Rows:
    """Lengths and factor sets of the rows of a cache, and the tokens that came last.

    Attributes:
        lengths: in tokens.
        sets: the set a row stays on; None for an empty row, and where lengths choose.
        step: rows and counts of the last growth, until anything else changes.
    """

    def __init__(self, rope: Rope, batch: int, limit: int, policy: Policy | None) -> None:
        """limit: how many tokens a row may have."""
        if not isinstance(rope, Rope):
            raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
        if policy not in POLICIES and (policy is not None or len(rope.sets) > 1):
            raise ValueError(
                f"policy: expected one of {', '.join(POLICIES)} with a Rope of {len(rope.sets)} "
                f"factor sets, got {policy!r}"
            )
        self.rope, self.policy, self.limit = rope, policy, limit
        self.keeps_sets = len(rope.sets) > 1 and policy in ("pin", "recompute")
        self.batch = check_count("batch", batch, 1)
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        self.lengths = [0] * self.batch
        self.sets: list[int | None] = [None] * self.batch
        # A prompt that comes in chunks has one set up to this length.
        self._goals = [0] * self.batch
        self.step: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def check_row(self, name: str, row: int) -> None:
        check_count(name, row, 0, self.batch - 1)

    def check_step(
        self, counts: int | Sequence[int], rows: Sequence[int] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(rows, counts), one for one."""
        if rows is None:
            rows = range(self.batch)
        else:
            rows = _listed("rows", rows)
            for row in rows:
                self.check_row("rows", row)
            if len(set(rows)) != len(rows):
                raise ValueError(f"rows: expected each row once, got {rows}")
        if is_int(counts):
            counts = [counts] * len(rows)
        counts = _listed("counts", counts)
        if len(counts) != len(rows):
            raise ValueError(f"counts: expected one for each of {len(rows)} rows, got {counts}")
        for count in counts:
            check_count("counts", count, 0)
        return tuple(rows), tuple(counts)

    def check_growth(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Raise `PrefillAgain` or `CacheFullError` where rows may not have so many more tokens."""
        crossing = []
        for row, count in zip(rows, counts, strict=True):
            length = self.lengths[row]
            if length + count > self.limit:
                free = self.limit - length
                raise CacheFullError(
                    f"counts: expected at most {free} tokens for row {row}, which has {length} of "
                    f"at most {self.limit}, got {count}",
                    count,
                    free,
                    row,
                )
            due = self.rope.set_index(max(length + count, self._goals[row]))
            if count and self.sets[row] not in (None, due):
                crossing.append(row)
        if crossing and self.policy == "recompute":
            raise PrefillAgain(
                f"counts: rows {crossing} would go on under another factor set than that of their "
                "keys; expected them freed and prefilled again, the new tokens included",
                tuple(crossing),
            )

    def grow(self, rows: tuple[int, ...], counts: tuple[int, ...]) -> None:
        """Add tokens, as `check_growth` allowed; the first ones choose the set of their row."""
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
            if self.keeps_sets and count and self.sets[row] is None:
                self.sets[row] = self.rope.set_index(self.lengths[row])
        self.step = rows, counts

    def check_length(self, row: int, length: int) -> None:
        """``length`` is one that `cut` takes."""
        self.check_row("row", row)
        check_count("length", length, 0)
        if length > self.lengths[row]:
            raise ValueError(
                f"length: expected at most {self.lengths[row]}, the tokens of row {row}, "
                f"got {length}"
            )

    def cut(self, row: int, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.lengths[row], self._goals[row], self.step = length, 0, None
        if length == 0:
            self.sets[row] = None

    def check_fork(self, source: int, target: int) -> None:
        """``target`` may take over what ``source`` has."""
        self.check_row("source", source)
        self.check_row("target", target)
        if source == target:
            raise ValueError(f"target: expected another row than source, got {target} for both")
        if self.lengths[target]:
            raise ValueError(
                f"target: expected an empty row, got row {target} of {self.lengths[target]} tokens"
            )

    def copy(self, source: int, target: int) -> None:
        """Give target the length and the set of source."""
        self.lengths[target], self.sets[target] = self.lengths[source], self.sets[source]
        self._goals[target], self.step = self._goals[source], None

    def pin(self, row: int, length: int | None, set_index: int | None) -> None:
        """Choose the set of an empty row, by its later length or by its index."""
        self.check_row("row", row)
        if self.policy == "switch" and len(self.rope.sets) > 1:
            raise ValueError("policy: expected 'pin' or 'recompute' to pin a row, got 'switch'")
        if self.lengths[row]:
            raise ValueError(
                f"row: expected an empty row, got row {row} of {self.lengths[row]} tokens"
            )
        if (length is None) == (set_index is None):
            raise ValueError(
                f"length: expected either length or set_index, got {length} and {set_index}"
            )
        if length is not None:
            set_index = self.rope.set_index(check_count("length", length, 1, self.limit))
        elif self.policy == "recompute":
            raise ValueError(
                f"set_index: expected length in its place under 'recompute', got {set_index}"
            )
        else:
            check_count("set_index", set_index, 0, len(self.rope.sets) - 1)
        self.sets[row], self._goals[row], self.step = set_index, length or 0, None


def check_count(name: str, value: object, least: int, most: int = 2**31 - 1) -> int:
    """``value`` is a whole number from ``least`` to ``most``."""
    if not is_int(value):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected from {least} to {most}, got {value}")
    return value


def _listed(name: str, values: object) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of whole numbers, got {values!r}")
    return list(values)
