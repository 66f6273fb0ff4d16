"""`PagedKVCache`: unrotated keys and values in blocks that rows take as they grow, and share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends.reference import as_bytes
from ..rope.value import Rope
from .base import Cache
from .rows import CacheFullError, Policy, check_count

BLOCK_SIZES = (16, 32, 64, 128, 256)

_HOST = torch.device("cpu")


class PagedKVCache(Cache):
    """A cache of unrotated keys and values in blocks, as vLLM and FlashInfer lay them out.

    Each layer is (blocks, block_size, kv_heads, dim) and ``block_table`` (batch, max_blocks) int32
    says which blocks a row has. `fork` copies nothing: rows share blocks, and a row that grows
    inside a shared one gets its own copy of it first. For the policies see `KVCache`.

    Args:
        rope: what `decode` rotates by.
        batch: how many rows there are; a row is one sequence.
        blocks: of all rows together, in each layer.
        block_size: tokens a block: 16, 32, 64, 128 or 256.
        kv_heads: of k and v.
        head_dim: of k and v; at least the rope's ``rotary_dim``.
        layers: each with its storage; lengths and blocks are common to all.
        max_length: how many tokens a row may have; what all blocks hold by default. It sets the
            width of ``block_table``.
        dtype: float32, bfloat16, float16, float64, or float8_e4m3fn, to which `write` quantises.
        device: of the storage.
        policy: "switch", "pin" or "recompute"; may be left out for a `Rope` of one set.
        k_scale: (kv_heads,) or (layers, kv_heads) float32 above 0, for float8: keys are divided
            by it as they are written, and multiplied as they are read. 1 by default.
        v_scale: like k_scale, of the values.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    block_table: torch.Tensor

    def __init__(
        self,
        rope: Rope,
        batch: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        layers: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        policy: Policy | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        if check_count("block_size", block_size, 1) not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size: expected one of {sizes}, got {block_size!r}")
        self.blocks, self.block_size = check_count("blocks", blocks, 1), block_size
        slots = blocks * block_size
        most = min(slots, 2**31 - 1)
        self.max_length = check_count("max_length", most if max_length is None else max_length, 1)
        rest = (kv_heads, head_dim, layers, dtype, device, policy, k_scale, v_scale)
        super().__init__(rope, batch, slots, self.max_length, *rest)
        with torch.inference_mode(False):
            shape = (batch, self._blocks_of(self.max_length))
            self._table = torch.zeros(shape, dtype=torch.int32, device=_HOST)
            self.block_table = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._users = [0] * blocks  # how many rows have each block
        self._free = list(range(blocks))[::-1]

    @property
    def free_blocks(self) -> int:
        """How many blocks no row has."""
        return len(self._free)

    def _blocks_of(self, length: int) -> int:
        return -(-length // self.block_size)

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.blocks, self.block_size, self.kv_heads, self.head_dim)

    def _addresses(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        blocks = self._table[rows, slots // self.block_size].long()
        return blocks * self.block_size + slots % self.block_size

    def _reserve(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Take blocks for the new tokens, and copies of shared blocks that they would go into."""
        places: list[tuple[int, int]] = []  # (row, index in its row of the table) without a block
        copied: dict[int, int] = {}  # how many rows leave each shared block
        sources: list[int | None] = []  # the block each place is a copy of
        for row, count in zip(rows, counts, strict=True):
            length = self._rows.lengths[row]
            first, last = self._blocks_of(length), self._blocks_of(length + count)
            if count and length % self.block_size:
                block = int(self._table[row, first - 1])
                if self._users[block] - copied.get(block, 0) > 1:
                    copied[block] = copied.get(block, 0) + 1
                    places.append((row, first - 1))
                    sources.append(block)
            places += [(row, index) for index in range(first, last)]
            sources += [None] * (last - first)
        if len(places) > len(self._free):
            raise CacheFullError(
                f"counts: expected tokens for at most {len(self._free)} more blocks of "
                f"{self.block_size}, got {list(counts)} for rows {list(rows)}, which need "
                f"{len(places)}",
                len(places),
                len(self._free),
            )
        if not places:
            return
        taken = [self._free.pop() for _ in places]
        for block in taken:
            self._users[block] = 1
        for block, count in copied.items():
            self._users[block] -= count
        pairs = [(old, new) for old, new in zip(sources, taken, strict=True) if old is not None]
        self._copy_blocks(pairs)
        self._assign(places, taken)

    def _release(self, row: int, length: int) -> None:
        kept, had = self._blocks_of(length), self._blocks_of(self._rows.lengths[row])
        for block in self._table[row, kept:had].tolist():
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)

    def _share(self, source: int, target: int) -> None:
        count = self._blocks_of(self._rows.lengths[source])
        for block in self._table[source, :count].tolist():
            self._users[block] += 1
        for table in (self._table, self.block_table):
            table[target, :count].copy_(table[source, :count])

    def _assign(self, places: list[tuple[int, int]], blocks: list[int]) -> None:
        """Enter blocks into the table, on the host and on the device."""
        entries = [(*place, block) for place, block in zip(places, blocks, strict=True)]
        rows, index, ids = torch.tensor(entries, dtype=torch.int32, device=_HOST).unbind(1)
        self._table[rows, index] = ids
        rows, index, ids = self._upload(torch.stack((rows, index, ids))).unbind(0)
        self.block_table.index_put_((rows, index), ids)

    def _copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks to others, (from, to), in all layers."""
        if not pairs:
            return
        old, new = self._upload(torch.tensor(pairs, device=_HOST).t().contiguous()).unbind(0)
        for layer in range(self.layers):
            for x in (as_bytes(self.k(layer)), as_bytes(self.v(layer))):
                x.index_copy_(0, new, x.index_select(0, old))
