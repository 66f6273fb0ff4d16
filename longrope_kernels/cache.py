"""`KVCache`: unrotated keys and values, with a stretch of memory for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cache_base import Cache
from .cache_rows import Policy, check_count
from .rope import Rope


class KVCache(Cache):
    """A cache of unrotated keys and values with a fixed stretch of memory for each row.

    Keys lie unrotated, so the factor set of a row can still change. What happens where a row grows
    into the next set of a `Rope` of several is never implied:

    - "switch": all its keys take the new set from the next step on. No work at all. Of several
      tokens in one step (drafts) each takes the set of the length up to it. Keys and
      values above the first layer still come from hidden states made under the old set, so the
      row is not in the state that a prefill of the same tokens would leave.
    - "pin": it stays on the set of its first tokens, or of `pin`, until it is freed. No work, and
      one set for all it ever computed; a row that began short runs on past the length its set
      is for.
    - "recompute": `extend` raises `PrefillAgain`; freed and prefilled again, the row is in
      exactly the state of a prefill. That costs one over all its tokens, at every crossing.

    A model step is one `extend`, then `write` and `decode` for each layer.

    Args:
        rope: what `decode` rotates by.
        batch: how many rows there are; a row is one sequence.
        capacity: how many tokens a row may have.
        kv_heads: of k and v.
        head_dim: of k and v; at least the rope's ``rotary_dim``.
        layers: each with its storage; lengths are common to all.
        dtype: float32, bfloat16, float16, float64, or float8_e4m3fn, to which `write` quantises.
        device: of the storage.
        policy: "switch", "pin" or "recompute"; may be left out for a `Rope` of one set.
        k_scale: (kv_heads,) or (layers, kv_heads) float32 above 0, for float8: keys are divided
            by it as they are written, and multiplied as they are read. 1 by default.
        v_scale: like k_scale, of the values.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        rope: Rope,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        policy: Policy | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        self.capacity = check_count("capacity", capacity, 1)
        slots = check_count("batch", batch, 1) * capacity
        rest = (kv_heads, head_dim, layers, dtype, device, policy, k_scale, v_scale)
        super().__init__(rope, batch, slots, capacity, *rest)

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.batch, self.capacity, self.kv_heads, self.head_dim)

    def _addresses(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return rows * self.capacity + slots

    def _share(self, source: int, target: int) -> None:
        length = self._rows.lengths[source]
        for layer in range(self.layers):
            for x in (self.k(layer), self.v(layer)):
                x[target, :length].copy_(x[source, :length])

    def _reserve(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Nothing: each row has all its slots already."""

    def _release(self, row: int, length: int) -> None:
        """Nothing: they stay with the row."""
