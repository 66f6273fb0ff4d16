"""The attention mask of an enabled model: a few numbers a sequence instead of a matrix.

transformers hands the padding mask to the mask function of the attention implementation, once for
each forward, and passes the result on to every layer. A tensor of four dimensions goes through all
of it untouched, also where ``generate()`` prepares masks for a static cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...calls.records import FEW_QUERIES
from ...calls.values import readable

# Parts of a mask that show a query what causal attention hides, or hide in chunks.
_MORE_THAN_CAUSAL = ("or_masks", "chunked", "bidirectional", "blockwise")
ANY_MASK = "enable(model, cache='rotated') takes any mask"


class _OfThread(threading.local):
    """Of the forward that is going on, from its mask to its first attention module."""

    slots = 0  # how many there are, where it is more than its own tokens


of_thread = _OfThread()


class Slots(NamedTuple):
    """Where the tokens of each sequence lie, as slots of a cache that dropped none: (B,) int64."""

    start: torch.Tensor  # of its first token: what is before is padding on the left
    end: torch.Tensor  # behind its last token
    filled: torch.Tensor  # behind what this forward puts there, padding on the right included
    dropped: torch.Tensor  # how many slots the cache has dropped (sliding windows)
    packed: torch.Tensor  # 1 where transformers found packed sequences in the positions

    def padding_in(self, last: torch.Tensor) -> torch.Tensor:
        """How much of the padding before them the positions count, by that of the last tokens.

        Positions that are slots, as transformers makes them where none are given, count it.
        """
        return torch.where(last == self.end - 1, self.start, 0)


def slots_of_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    mask_function: Callable[..., Any] | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """The `Slots` of a forward, as one tensor.

    Args:
        batch_size: sequences.
        q_length: queries of this forward.
        kv_length: slots of the cache, of which a static one may have filled some.
        q_offset: tokens that came before.
        kv_offset: tokens that the cache dropped.
        attention_mask: (batch, tokens) bool, False for padding, on the left or on the right.
        allow_is_causal_skip: False where transformers made a mask of its own (packed sequences).
        device: of the model.
        mask_function: of transformers, made of functions for each thing that hides a key.

    Returns:
        (batch, 1, 5, 1) int64, or None where all slots are filled by real tokens. More queries than
        keys, which no causal mask of transformers has.

    Raises:
        ValueError: a mask that is more than padding, or has not all tokens that came before.
    """
    if not torch.compiler.is_compiling():
        of_thread.slots = kv_length if kv_length > q_length else 0
    if mask_function is not None and not torch.compiler.is_compiling():
        for name in _parts(mask_function):
            if any(one in name for one in _MORE_THAN_CAUSAL):
                raise ValueError(
                    "attention_mask: expected causal attention with padding and windows, got "
                    f"{name} of the model's own; {ANY_MASK}"
                )
    # transformers looks for packed sequences where there is no cache: all keys are queries then.
    # It says False as well of a static cache's single token, and whatever it traces.
    packed = not allow_is_causal_skip and q_length == kv_length > 1
    packed = packed and not torch.compiler.is_compiling()
    filled = q_offset + q_length
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask: expected shape ({batch_size}, tokens), "
                f"got {tuple(attention_mask.shape)}"
            )
        known = isinstance(filled, int) or readable(filled)
        if known and not torch.compiler.is_compiling() and attention_mask.shape[1] < int(filled):
            raise ValueError(
                f"attention_mask: expected {int(filled)} tokens, those in the cache and the new "
                f"ones, got {attention_mask.shape[1]}"
            )
        attention_mask = _of_tokens_so_far(attention_mask[:, : kv_offset + kv_length], filled)
        # On a device this waits for it, as transformers' own masks do, but never for one token.
        if (readable(attention_mask) or _may_wait(q_length)) and bool(attention_mask.all()):
            attention_mask = None
    is_full = not isinstance(filled, torch.Tensor) and filled == kv_offset + kv_length
    if attention_mask is None and is_full and not packed:
        return None

    result = torch.zeros((batch_size, len(Slots._fields)), dtype=torch.int64, device=device)
    result[:, 1:3] = filled
    result[:, 3], result[:, 4] = kv_offset, int(packed)
    if attention_mask is not None:
        real = attention_mask.to(torch.uint8)
        width = real.shape[1]
        some = attention_mask.any(1)
        start = torch.where(some, real.argmax(1), filled)
        end = torch.where(some, width - real.flip(1).argmax(1), 0)
        if readable(attention_mask) and not torch.equal(real.sum(1), (end - start).clamp(min=0)):
            raise ValueError(
                "attention_mask: expected padding on the left or on the right, got a row with "
                f"padding between its tokens; {ANY_MASK}"
            )
        result[:, 0], result[:, 1] = start, end
    return result[:, None, :, None]


def _of_tokens_so_far(mask: torch.Tensor, filled: int | torch.Tensor) -> torch.Tensor:
    """Without what it says of tokens to come, as a mask of a static cache's whole length does."""
    if isinstance(filled, int):
        return mask[:, :filled]
    return mask & (torch.arange(mask.shape[1], device=mask.device) < filled)


def _parts(function: Callable[..., Any]) -> set[str]:
    """The names of the functions that a mask function of transformers is made of."""
    found = {function.__qualname__.partition(".")[0]} if hasattr(function, "__qualname__") else {""}
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for one in held if isinstance(held, tuple) else (held,):
            if callable(one):
                found |= _parts(one)
    return found


def is_slots(mask: torch.Tensor) -> bool:
    """Whether a mask is what `slots_of_mask` returns."""
    of_ours = (1, len(Slots._fields), 1)
    return mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[1:] == of_ours


def read_slots(mask: torch.Tensor, *, columns: bool = False) -> Slots:
    """What `slots_of_mask` wrote: each (B,), or (B, 1) as ``columns``."""
    return Slots(*(mask[:, 0] if columns else mask[:, 0, :, 0]).unbind(1))


def of_tokens(found: torch.Tensor, mask: torch.Tensor | None, queries: int) -> torch.Tensor:
    """What was found between queries, (1 or batch, queries - 1), padding left out."""
    if mask is None:
        return found
    slots = read_slots(mask, columns=True)
    slot = slots.filled - queries + torch.arange(1, queries, device=found.device)
    return found & (slot > slots.start) & (slot < slots.end)


def _may_wait(queries: int) -> bool:
    """`can_wait`, for many queries: `decode` serves few, and reads ``kv_start`` at no cost."""
    # In a graph of any number of queries, to compare it would be a guard.
    return not torch.compiler.is_compiling() and queries > FEW_QUERIES and can_wait()


def can_wait() -> bool:
    """Whether the host may read from a device now: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
