"""Ring or heads: which of the two sends less."""

from __future__ import annotations

from typing import NamedTuple

NAMES = ("auto", "ring", "ulysses")


class Schedule(NamedTuple):
    """How ranks share attention, and what each sends; ``print`` says it in a sentence."""

    name: str  # "ring" or "ulysses"
    ranks: int
    heads: int
    kv_heads: int

    @property
    def rows_sent(self) -> float:
        """Head rows that a rank sends for each token it has, forward: times head_dim, of a dtype.

        The ring sends k and v on to all others but one; an exchange of heads sends of q, k, v and
        the output all that it does not keep.
        """
        if self.name == "ring":
            return 2.0 * self.kv_heads * (self.ranks - 1)
        return 2.0 * (self.heads + self.kv_heads) * (self.ranks - 1) / self.ranks

    def __str__(self) -> str:
        what = f"{self.name} over {self.ranks} ranks: {self.rows_sent:g} head rows sent a token; "
        if self.kv_heads % self.ranks:
            return what + f"{self.kv_heads} KV heads are not divided by {self.ranks} ranks"
        other = self._replace(name="ulysses" if self.name == "ring" else "ring")
        return what + f"{other.name} sends {other.rows_sent:g}"


def choose_schedule(heads: int, kv_heads: int, ranks: int, schedule: str = "auto") -> Schedule:
    """The schedule of `attention` over so many ranks; "auto" takes the one that sends less.

    The ring hides what it sends behind the computing of the block that is there, an exchange of
    heads can not; at the same bytes the ring is taken.

    Args:
        heads: of q.
        kv_heads: of k and v.
        ranks: how many share a sequence.
        schedule: "auto", "ring", or "ulysses", which needs KV heads that the ranks divide.

    Raises:
        ValueError: naming the argument.
    """
    if schedule not in NAMES:
        raise ValueError(f"schedule: expected one of {', '.join(NAMES)}, got {schedule!r}")
    ring = Schedule("ring", ranks, heads, kv_heads)
    ulysses = ring._replace(name="ulysses")
    if kv_heads % ranks == 0:
        if schedule == "auto":
            return ulysses if ulysses.rows_sent < ring.rows_sent else ring
        return ulysses if schedule == "ulysses" else ring
    if schedule == "ulysses":
        raise ValueError(
            f"schedule: 'ulysses' needs KV heads that {ranks} ranks divide, got {kv_heads}; "
            "expected 'ring', or a mesh of two dimensions whose second one divides them"
        )
    return ring
