"""`SpreadCache`: a KV cache whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..cache.base import Cache
from ..cache.paged import PagedKVCache
from ..cache.rows import CacheFullError, check_count
from ..calls.arguments import check_tensor
from .decode import decode
from .ranks import Group, agree, ranks_of, telling
from .shards import Order, Spans, check_order, count, gathered, spans_of


class SpreadCache:
    """Unrotated keys and values of which each rank keeps some, in a cache of its own.

    All ranks make the same calls. A prompt comes as `shard` cut it, `extend` with its order; the
    tokens of a step go to the rank that has the most room. A model step is one `extend`, then
    `write` and `decode` for each layer.

    Attributes:
        cache: of this rank.
        key_slots: (batch, slots) int64 on the device, which slot of its row each key here has.
        total_lens: (batch,) int64 on the device, how many tokens each row has on all ranks.

    Args:
        cache: an empty `KVCache` or `PagedKVCache`, for the tokens of this rank; nobody else may
            change it. Its policy is "switch", or its `Rope` has one set.
        group: a process group, a `DeviceMesh` of one or two dimensions, or None for all processes.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: torch.distributed is not initialised, or a rank did not answer.
    """

    def __init__(self, cache: Cache, group: Group = None) -> None:
        if not isinstance(cache, Cache):
            raise TypeError(
                f"cache: expected a KVCache or a PagedKVCache, got {type(cache).__name__}"
            )
        if len(cache.rope.sets) > 1 and cache.policy != "switch":
            raise ValueError(f"policy: expected 'switch' for a spread cache, got {cache.policy!r}")
        if any(cache.lengths):
            raise ValueError(f"cache: expected an empty one, got rows of {cache.lengths} tokens")
        self.cache, self.group = cache, group
        self._ranks = ranks_of(group)
        shape = {"batch": cache.batch, "layers": cache.layers, "kv_heads": cache.kv_heads}
        agree(self._ranks, {**shape, "head_dim": cache.head_dim}, cache.device)
        self._totals = [0] * cache.batch
        self._new: dict[int, int] = {}  # rows that have new tokens here, and how many
        self._width = 0  # tokens of each row that `write` is given
        self._limit: int = getattr(cache, "capacity", 0) or getattr(cache, "max_length", 0)
        size = (cache.batch, self._limit)
        self.key_slots = torch.zeros(size, dtype=torch.int64, device=cache.device)
        self.total_lens = torch.zeros(cache.batch, dtype=torch.int64, device=cache.device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each row has on all ranks."""
        return tuple(self._totals)

    def extend(self, counts: int | Sequence[int], *, order: Order | None = None) -> None:
        """Make room for new tokens, which `write` fills layer by layer.

        Args:
            counts: how many tokens each row gets on all ranks together: one number for all, or
                without ``order`` one for each.
            order: the tokens are spread as `shard` does it; None: those of a row go to the rank
                with the most room for it.

        Raises:
            CacheFullError: on all ranks; nothing has changed. Of a `PagedKVCache` each row counts
                on an equal part of the free blocks.
            ValueError, TypeError: naming the argument, also where it is not the same on all ranks.
            RuntimeError: a rank did not answer.
        """
        cache, ranks = self.cache, self._ranks
        with telling(ranks, cache.device):
            if order is not None:
                check_order(order)
            if order is not None or isinstance(counts, int):
                counts = [check_count("counts", counts, 0)] * cache.batch
            wanted = [check_count("counts", number, 0) for number in counts]
            if len(wanted) != cache.batch:
                raise ValueError(
                    f"counts: expected one for each of {cache.batch} rows, got {wanted}"
                )
        agree(ranks, {"counts": wanted, "order": order}, cache.device)
        room = torch.tensor([self._room(row) for row in range(cache.batch)], device=cache.device)
        rooms = gathered(ranks.ring, gathered(ranks.heads, room[None])).tolist()
        news: list[list[int]] = []  # the new slots of each row here
        for row, number in enumerate(wanted):
            total, of_row = self._totals[row], [of_rank[row] for of_rank in rooms]
            spread: list[Spans]
            if order is None:
                owner = of_row.index(max(of_row))
                spread = [((0, number),) if i == owner else () for i in range(ranks.size)]
            else:
                spread = [spans_of(number, i, ranks.size, order) for i in range(ranks.size)]
            for rank, (spans, free) in enumerate(zip(spread, of_row, strict=True)):
                if (needed := count(spans)) > free:
                    raise CacheFullError(
                        f"counts: expected at most {free} tokens for row {row} on rank {rank}, got "
                        f"{needed}",
                        needed,
                        free,
                        row,
                    )
            news.append([total + i for span in spread[ranks.rank] for i in range(*span)])
        self._new = {row: len(new) for row, new in enumerate(news) if new}
        self._width = max(wanted if order is None else map(len, news), default=0)
        before = cache.lengths
        cache.extend(list(self._new.values()), list(self._new))
        for row in self._new:
            at = slice(before[row], before[row] + len(news[row]))
            self.key_slots[row, at] = torch.tensor(news[row], device=cache.device)
        self._totals = [total + number for total, number in zip(self._totals, wanted, strict=True)]
        self._push()

    def write(self, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> None:
        """Put keys and values where the last `extend` made room for them.

        Args:
            k: (batch, new, kv_heads, dim), unrotated: after an `extend` with an order the tokens of
                this rank, else all new ones, of which this rank keeps its own; a row with fewer has
                them last.
            v: like k.
            layer: which layer.

        Raises:
            ValueError, TypeError: naming the argument; nothing has been written.
        """
        shape = self.cache.batch, self._width, self.cache.kv_heads, self.cache.head_dim
        for name, x in (("k", k), ("v", v)):
            if tuple(check_tensor(name, x).shape) != shape:
                raise ValueError(
                    f"{name}: expected shape {shape}, of the tokens that `extend` made room for, "
                    f"got {tuple(x.shape)}"
                )
        if not self._new:
            return
        rows = torch.tensor(list(self._new), device=self.cache.device)
        most = max(self._new.values())
        k, v = (x[rows, x.shape[1] - most :] for x in (k, v))
        self.cache.write(k, v, layer)

    def decode(
        self, q: torch.Tensor, layer: int = 0, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`longrope_kernels.distributed.decode` of q over a layer.

        Args:
            q: (batch, q_len, heads, dim), the queries of the newest tokens, the same on all ranks.
            layer: which layer.
            **kwargs: to `longrope_kernels.distributed.decode`; what the cache knows is given by it.
        """
        cache = self.cache
        own: dict[str, Any] = {"key_slots": self.key_slots, "total_lens": self.total_lens}
        own |= {"block_table": cache.block_table, "group": self.group}
        own |= cache.scales(layer)
        k, v = cache.k(layer), cache.v(layer)
        return decode(q, k, v, cache.lens, cache.rope, **own, **kwargs)

    def truncate(self, row: int, length: int) -> None:
        """Keep the first ``length`` tokens of a row, as after rejected drafts; 0 empties it."""
        check_count("row", row, 0, self.cache.batch - 1)
        check_count("length", length, 0, self._totals[row])
        here = self.key_slots[row, : self.cache.lengths[row]]
        self.cache.truncate(row, int((here < length).sum()))
        self._totals[row], self._new, self._width = length, {}, 0
        self._push()

    def _push(self) -> None:
        self.total_lens.copy_(torch.tensor(self._totals))

    def _room(self, row: int) -> int:
        """How many tokens a row may get here, whatever the others get."""
        cache, length = self.cache, self.cache.lengths[row]
        free = self._limit - length
        if isinstance(cache, PagedKVCache):
            blocks = cache.free_blocks // cache.batch
            free = min(free, blocks * cache.block_size + -length % cache.block_size)
        return free
