"""What `KVCache` and `PagedKVCache` share: storage of unrotated keys and values, and its upkeep.

The host knows lengths, sets and blocks, and copies them to the device without waiting for it. What
a CUDA graph reads stays where it is: storage, lengths, sets, block table, and the addresses of the
newest tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ..backends.reference import as_bytes
from ..calls import arguments
from ..calls.caches import FLOAT8
from ..calls.memory import check_apart
from ..calls.records import FEW_QUERIES, AppendCall, Keys
from ..ops.append import alike, choose_append, write
from ..ops.decode import decode
from ..rope.value import Rope, check_device
from .checks import check_new, check_scale, check_tokens
from .rows import Policy, Rows, check_count

_HOST = torch.device("cpu")


class Cache(ABC):
    """What a cache does whatever the address of a slot is.

    Attributes:
        rope, batch, kv_heads, head_dim, layers, dtype, device, policy: as given.
        lens: (batch,) int32 on the device, how many tokens each row has; always the same memory.
        block_table: (batch, max_blocks) int32, the blocks of each row in order; None if dense.
    """

    block_table: torch.Tensor | None = None

    def __init__(
        self,
        rope: Rope,
        batch: int,
        slots: int,
        limit: int,
        kv_heads: int,
        head_dim: int,
        layers: int,
        dtype: torch.dtype,
        device: torch.device | str,
        policy: Policy | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        """slots: of a layer. limit: how many tokens a row may have."""
        self._rows = Rows(rope, batch, limit, policy)
        self.rope, self.batch, self.policy = rope, batch, policy
        self.kv_heads = check_count("kv_heads", kv_heads, 1)
        self.head_dim = check_count("head_dim", head_dim, rope.rotary_dim)
        self.layers = check_count("layers", layers, 1)
        if dtype not in (*arguments.FLOAT_DTYPES, FLOAT8):
            raise TypeError(
                "dtype: expected float32, bfloat16, float16, float64 or float8_e4m3fn, got "
                f"{dtype!r}"
            )
        self.dtype, self.device = dtype, check_device(device)
        self._k_scale, self._v_scale = (
            check_scale(name, x, self.layers, self.kv_heads, dtype, self.device)
            for name, x in (("k_scale", k_scale), ("v_scale", v_scale))
        )
        self._addresses_of_step: dict[bool, torch.Tensor] = {}
        # What is made in inference mode can be written in no other.
        with torch.inference_mode(False):
            sizes = (slots, kv_heads, head_dim)
            self._k, self._v = (
                [torch.empty(sizes, dtype=dtype, device=self.device) for _ in range(layers)]
                for _ in range(2)
            )
            self._counters = torch.zeros((2, batch), dtype=torch.int32, device=self.device)
            self.lens = self._counters[0]
            # Where the last tokens of each row go; those of earlier steps nowhere.
            self._newest = torch.full((batch, FEW_QUERIES), -1, device=self.device)
        rope.to(self.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lens = self._counters[0]  # plain pickle makes tensors of their own of views

    # -------------------------------------------------------------------------------- upkeep

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each row has, as the host knows it."""
        return tuple(self._rows.lengths)

    @property
    def sets(self) -> torch.Tensor | None:
        """(batch,) int32 on the device: the factor set of each row; always the same memory.

        None where lengths choose: under "switch", and with a `Rope` of one set.
        """
        return self._counters[1] if self._rows.keeps_sets else None

    def extend(self, counts: int | Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Make room for new tokens, which `write` fills layer by layer.

        Args:
            counts: how many tokens each row gets: one number for all, or one for each.
            rows: which rows, in the order in which `write` gets them; all by default.

        Raises:
            CacheFullError: there is no room.
            PrefillAgain: under "recompute", rows would cross into another factor set.
            ValueError, TypeError: naming the argument. Whatever is raised, nothing has changed.
        """
        self._check_no_capture("extend")
        rows, counts = self._rows.check_step(counts, rows)
        self._rows.check_growth(rows, counts)
        self._reserve(rows, counts)
        self._rows.grow(rows, counts)
        self._push()

    def truncate(self, row: int, length: int) -> None:
        """Keep the first ``length`` tokens of a row, as after rejected drafts.

        Under "recompute", a row cut back across a boundary must be prefilled again as well.

        Args:
            row: which row.
            length: in tokens, at most what the row has; 0 is as `free`.
        """
        self._check_no_capture("truncate")
        self._rows.check_length(row, length)
        if length == self._rows.lengths[row] > 0:
            return
        self._release(row, length)
        self._rows.cut(row, length)
        self._push()

    def free(self, row: int) -> None:
        """Empty a row. Its next tokens choose its factor set anew."""
        self.truncate(row, 0)

    def reset(self) -> None:
        """Free all rows."""
        self._check_no_capture("reset")
        for row in range(self.batch):
            self._release(row, 0)
        self._rows.clear()
        self._push()

    def fork(self, source: int, target: int) -> None:
        """Give a row all tokens of another, and its factor set.

        `KVCache` copies them; `PagedKVCache` shares their blocks.

        Args:
            source: the row that has them.
            target: an empty row.
        """
        self._check_no_capture("fork")
        self._rows.check_fork(source, target)
        self._share(source, target)
        self._rows.copy(source, target)
        self._push()

    def pin(self, row: int, *, length: int | None = None, set_index: int | None = None) -> None:
        """Choose the factor set of an empty row before its first tokens come.

        A prompt prefilled in chunks needs one set for all of them: that of its full length.

        Args:
            row: an empty row; under "switch" none can be pinned.
            length: of the whole prompt, in tokens. Under "recompute" the row grows up to it.
            set_index: the set itself, in place of a length; not under "recompute".
        """
        self._check_no_capture("pin")
        self._rows.pin(row, length, set_index)
        self._push()

    # ---------------------------------------------------------------------------------- data

    @torch.no_grad()
    def write(self, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> None:
        """Put unrotated keys and values where the last `extend` made room for them.

        Args:
            k: (rows, q_len, kv_heads, dim), rows as in `extend` and q_len its largest count: a row
                with fewer new tokens has them last, and what stands before them is dropped. Or
                packed, (tokens, kv_heads, dim), row after row. Of the dtype of the cache; for
                a float8 cache and under autocast of any floating dtype, for the former divided by
                the scale, clamped to 448 and rounded to nearest.
            v: like k.
            layer: which layer.

        In a CUDA graph k is (batch, q_len, kv_heads, dim), q_len from 1 to 16: each replay writes
        the newest tokens of each row, of the `extend` before it, and nothing else.

        Raises:
            ValueError, TypeError: naming the argument; nothing has been written.
            RuntimeError: nothing was extended, or something else came between.
        """
        check_count("layer", layer, 0, self.layers - 1)
        k, v = check_new(k, v, self._k[0])
        mapping = self._address(k)
        if k.dim() == 3:
            k, v, mapping = k[None], v[None], mapping[None]
        k, v = self._apart(k, v, layer)
        cache = Keys(self.k(layer), self.v(layer), **self.scales(layer))
        call = AppendCall(*alike(k, v), cache, mapping)
        write(call, choose_append(None, call))

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        counts: int | Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """`extend` and `write` at once, for a cache of one layer.

        Args:
            k: (rows, q_len, kv_heads, dim), or packed (tokens, kv_heads, dim); see `write`.
            v: like k.
            counts: how many tokens each row gets; by default all of k. Needed where k is packed.
            rows: which rows, in the order of k; all by default.

        Raises:
            CacheFullError: there is no room.
            PrefillAgain: under "recompute", rows would cross into another factor set.
            ValueError, TypeError: naming the argument. Whatever is raised, nothing has changed.
        """
        if self.layers != 1:
            raise ValueError(
                f"layers: expected 1 for append, got {self.layers}; call extend once, and write "
                "for each layer"
            )
        new = check_new(k, v, self._k[0])
        if counts is None and k.dim() == 3:
            raise ValueError("counts: expected one for each row beside packed tokens, got None")
        rows, counts = self._rows.check_step(k.shape[1] if counts is None else counts, rows)
        check_tokens(k, rows, counts)
        self._apart(*new, 0)
        self.extend(counts, rows)
        self.write(k, v)

    def decode(
        self,
        q: torch.Tensor,
        layer: int = 0,
        *,
        k_new: torch.Tensor | None = None,
        v_new: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`longrope_kernels.decode` of q over a layer.

        Args:
            q: (batch, q_len, heads, dim), the queries of the newest q_len tokens of each row. Where
                rows keep no set, each query takes that of the row's length at its token.
            layer: which layer.
            k_new: (batch, new, kv_heads, dim), the unrotated keys of the last `extend`, to be
                written before as by `write`.
            v_new: like k_new.
            **kwargs: to `longrope_kernels.decode`; what the cache knows (caches, lengths, rope,
                block table, scales, and the sets of rows that stay on one) is given by it.

        Raises:
            ValueError, TypeError: as `longrope_kernels.decode` does; ``lengths`` or ``sets`` where
                rows keep a set.
        """
        own: dict[str, Any] = {
            "block_table": self.block_table,
            **self.scales(layer),
        }
        if arguments.check_tensor("q", q).shape[:1] != (self.batch,):
            raise ValueError(
                f"q: expected {self.batch} rows, as the cache has, got shape {tuple(q.shape)}"
            )
        if k_new is not None and v_new is not None:
            k_new, v_new = check_new(k_new, v_new, self._k[0], ("k_new", "v_new"))
            own |= {"slot_mapping": self._address(k_new, "k_new"), "k_new": k_new, "v_new": v_new}
        elif k_new is not v_new:
            raise ValueError("k_new, v_new: expected both or neither, got one of them")
        if self.sets is not None:
            for name in ("lengths", "sets"):
                if kwargs.pop(name, None) is not None:
                    raise ValueError(
                        f"{name}: expected none under policy {self.policy!r}, where each row keeps "
                        "its set, got some; call pin before the first tokens of a row come"
                    )
            own["sets"] = self.sets
        return decode(q, self.k(layer), self.v(layer), self.lens, self.rope, **own, **kwargs)

    def k(self, layer: int = 0) -> torch.Tensor:
        """The keys of a layer as `longrope_kernels.decode` takes them: a view."""
        check_count("layer", layer, 0, self.layers - 1)
        return self._shaped(self._k[layer])

    def v(self, layer: int = 0) -> torch.Tensor:
        """The values of a layer, like `k`."""
        check_count("layer", layer, 0, self.layers - 1)
        return self._shaped(self._v[layer])

    def scales(self, layer: int = 0) -> dict[str, torch.Tensor | None]:
        """``k_scale`` and ``v_scale`` of a layer as `longrope_kernels.decode` takes them."""
        check_count("layer", layer, 0, self.layers - 1)
        scales = {"k_scale": self._k_scale, "v_scale": self._v_scale}
        return {name: None if x is None else x[layer] for name, x in scales.items()}

    def gather(self, row: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of one row in order, for `longrope_kernels.attention`.

        Args:
            row: which row.
            layer: which layer.

        Returns:
            Two (length, kv_heads, dim), unrotated, of the dtype of the cache; those of a float8
            cache times its scales, float32.
        """
        self._rows.check_row("row", row)
        check_count("layer", layer, 0, self.layers - 1)
        address = self._upload(self._places(row, 0, self._rows.lengths[row]))
        k, v = (as_bytes(x[layer])[address].view(self.dtype) for x in (self._k, self._v))
        if self.dtype != FLOAT8:
            return k, v
        scales = self.scales(layer).values()
        k, v = (
            x.float() if scale is None else x.float() * scale[:, None]
            for x, scale in zip((k, v), scales, strict=True)
        )
        return k, v

    # -------------------------------------------------------------- where the two kinds differ

    @abstractmethod
    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        """All slots of a layer, (slots, kv_heads, dim), as `longrope_kernels.decode` takes them."""

    @abstractmethod
    def _addresses(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The addresses of slots of rows: int64 on the host, of the shapes that broadcast."""

    @abstractmethod
    def _share(self, source: int, target: int) -> None:
        """Let an empty row have the tokens of another."""

    @abstractmethod
    def _reserve(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Find room for more tokens, or raise; the rows are as they were before."""

    @abstractmethod
    def _release(self, row: int, length: int) -> None:
        """Give up what the tokens from ``length`` on had."""

    # ----------------------------------------------------------------------------- the device

    def _staged(self, x: torch.Tensor) -> torch.Tensor:
        """A host tensor from which the device copies without anyone waiting.

        New pinned memory each time: torch reuses it only after the copy, while a buffer of ours
        could hold the next step's numbers by then.
        """
        return x.pin_memory() if self.device.type == "cuda" else x

    def _upload(self, x: torch.Tensor) -> torch.Tensor:
        return self._staged(x).to(self.device, non_blocking=True)

    def _push(self) -> None:
        """Bring lengths, sets and the addresses of the newest tokens to the device."""
        rows = self._rows
        self._addresses_of_step.clear()
        sets = [index or 0 for index in rows.sets]
        counters = torch.tensor([rows.lengths, sets], dtype=torch.int32, device=_HOST)
        self._counters.copy_(self._staged(counters), non_blocking=True)
        new = [0] * self.batch
        for row, count in zip(*(rows.step or ((), ())), strict=True):
            new[row] = count
        newest = self._last_places(range(self.batch), new, FEW_QUERIES)
        self._newest.copy_(self._staged(newest), non_blocking=True)

    def _places(self, row: int, start: int, end: int) -> torch.Tensor:
        """The addresses of slots from ``start`` to before ``end``: int64 on the host."""
        slots = torch.arange(start, end, device=_HOST)
        return self._addresses(torch.tensor(row, device=_HOST), slots)

    def _last_places(self, rows: Sequence[int], new: Sequence[int], width: int) -> torch.Tensor:
        """The addresses of the last slots of rows, only ``new`` ones: (rows, width) on the host."""
        of_row = torch.tensor(
            [(row, self._rows.lengths[row], count) for row, count in zip(rows, new, strict=True)],
            dtype=torch.int64,
            device=_HOST,
        ).view(-1, 3, 1)
        from_end = torch.arange(-width, 0, device=_HOST)
        address = self._addresses(of_row[:, 0], (of_row[:, 1] + from_end).clamp(min=0))
        return torch.where(from_end >= -of_row[:, 2], address, -1)

    def _address(self, k: torch.Tensor, name: str = "k") -> torch.Tensor:
        """Where the tokens of k go: int64 on the device, of the leading shape of k."""
        if self._captures():
            if k.dim() != 4 or k.shape[0] != self.batch or not 1 <= k.shape[1] <= FEW_QUERIES:
                raise ValueError(
                    f"{name}: expected shape ({self.batch}, 1 to {FEW_QUERIES}, {self.kv_heads}, "
                    f"{self.head_dim}) in a CUDA graph, got {tuple(k.shape)}"
                )
            return self._newest[:, FEW_QUERIES - k.shape[1] :]
        if self._rows.step is None:
            raise RuntimeError(f"{name}: expected an extend just before the first write, got none")
        rows, counts = self._rows.step
        check_tokens(k, rows, counts, name)
        packed = k.dim() == 3
        if not packed and rows == tuple(range(self.batch)) and k.shape[1] <= FEW_QUERIES:
            return self._newest[:, FEW_QUERIES - k.shape[1] :]
        if packed not in self._addresses_of_step:  # the first layer; the others take the same
            if packed:
                lengths = self._rows.lengths
                parts = [
                    self._places(row, lengths[row] - count, lengths[row])
                    for row, count in zip(rows, counts, strict=True)
                ]
                address = torch.cat(parts) if parts else torch.arange(0, device=_HOST)
            else:
                address = self._last_places(rows, counts, k.shape[1])
            self._addresses_of_step[packed] = self._upload(address)
        return self._addresses_of_step[packed]

    def _apart(
        self, k: torch.Tensor, v: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens with a unit last stride, which lie apart from the caches of a layer."""
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        check_apart({"k_cache": self.k(layer), "v_cache": self.v(layer)}, {"k": k, "v": v})
        return k, v

    def _captures(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _check_no_capture(self, name: str) -> None:
        if self._captures():
            raise RuntimeError(
                f"{name}: expected outside of the CUDA graph, between its replays, got a call "
                "while it is being captured"
            )
