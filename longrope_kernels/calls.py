"""What a call hands down from the public function to the kernels, in three tuples.

The schemas of torch.library know tensors and numbers alone: an op takes each of them by itself and
packs them once, for everything below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .masks import Mask


class Rotation(NamedTuple):
    """A `Rope` on one device, some kilobytes, and what chooses a factor set for each sequence.

    ``S`` sets of ``P`` pairs; no pairs: q and k are rotated already. Row 0 of the second dimension
    of ``steps``, which kernels read, and of ``inv_freq``, which only the reference reads and ops
    know nothing of, serves tokens below ``n_hat``, row 1 all others. With neither ``lengths`` nor
    ``sets`` every sequence takes the first set, but in `decode`, where lengths may be of queries
    and each query then takes the set of the tokens up to it.
    """

    steps: torch.Tensor  # (S, 2, P) int64, 2**-64 turns per token
    n_hat: torch.Tensor  # (S,) int64
    attention_factor: torch.Tensor  # (S,) float64
    max_length: torch.Tensor  # (S,) int64
    # (sequences,) int32 or int64, each chooses a set; in `decode` also (sequences, q_len)
    lengths: torch.Tensor | None = None
    sets: torch.Tensor | None = None  # (sequences,) int32, the sets themselves; they win
    interleaved: bool = False  # as in `Rope`
    inv_freq: torch.Tensor | None = None  # (S, 2, P) float64, radians per token

    @property
    def chooses(self) -> bool:
        """Whether sequences may take different sets. If not, their borders make no difference."""
        return self.lengths is not None or self.sets is not None

    def convert(self, to: Callable[[torch.Tensor], torch.Tensor]) -> Rotation:
        """The same with each of its tensors replaced."""
        return Rotation(*(to(x) if isinstance(x, torch.Tensor) else x for x in self))  # type: ignore[arg-type]


class Scoring(NamedTuple):
    """How queries score keys, with (B, Sq, Hq, D) of q and (B, Sk, Hk, D) of k.

    Packed sequences are those of ``mask``: then B = 1, and Sq and Sk count all tokens.
    """

    positions: torch.Tensor  # (B, Sq) int32 or int64, any strides
    key_positions: torch.Tensor  # (B, Sk) int32 or int64, any strides
    rotation: Rotation
    mask: Mask
    softmax_scale: float  # multiplies the scores
    softcap: float  # scores become softcap * tanh(score / softcap); 0.0 for none


class CacheTensors(NamedTuple):
    """A cache of unrotated keys, as decoding reads it, on the device of q (B, q_len, Hq, D).

    ``k`` and ``v`` have the dtype of q or float8_e4m3fn, a unit last stride and any others; Hq is a
    multiple of Hk. Indices are int32 or int64, but for the block table: by it, slot j of a sequence
    is row ``j % block_size`` of block ``block_table[sequence, j // block_size]``.
    """

    k: torch.Tensor  # (B, slots, Hk, D), or with a block table (blocks, block_size, Hk, D)
    v: torch.Tensor  # like k
    lens: torch.Tensor  # (B,), how many keys each sequence has
    block_table: torch.Tensor | None = None  # (B, max_blocks) int32
    key_positions: torch.Tensor | None = None  # (B, slots), of slot j; None: j - kv_start
    k_scale: torch.Tensor | None = None  # (Hk,) float32, multiplies a float8 cache
    v_scale: torch.Tensor | None = None  # (Hk,) float32
    kv_start: torch.Tensor | None = None  # (B,); keys at slots below it are hidden

    @property
    def capacity(self) -> int:
        """The slots of a sequence."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return self.k.shape[1] * blocks

    @property
    def empty(self) -> bool:
        """Whether no slot could hold a key."""
        return self.k.numel() == 0 or (
            self.block_table is not None and self.block_table.numel() == 0
        )
