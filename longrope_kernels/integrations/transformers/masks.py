"""The attention mask of an enabled model: three numbers a sequence instead of a matrix.

transformers hands the padding mask to the mask function of the attention implementation, once for
each forward, and passes the result on to every layer. A tensor of four dimensions goes through all
of it untouched, also where ``generate()`` prepares masks for a static cache.
"""

from __future__ import annotations

from typing import Any

import torch

from ...calls.values import readable
from ...ops.decode import MAX_QUERIES

ANY_MASK = "enable(model, cache='rotated') takes any mask"


def slots_of_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """``kv_start``, the end of the last real key, and how many slots are filled.

    Args:
        batch_size: sequences.
        q_length: queries of this forward.
        kv_length: slots of the cache, of which a static one may have filled some.
        q_offset: tokens that came before.
        kv_offset: tokens that the cache dropped.
        attention_mask: (batch, tokens) bool, False for padding, on the left or on the right.
        allow_is_causal_skip: False where transformers made a mask of its own (packed sequences).
        device: of the model.

    Returns:
        (batch, 1, 1, 3) int64, or None where all slots are filled by real tokens.

    Raises:
        ValueError: a mask that is more than padding.
    """
    # transformers looks for packed sequences where there is no cache: all keys are queries then.
    # It says False as well of a static cache's single token, and before 5.14 of its prefill.
    whole = q_length == kv_length > 1
    if not allow_is_causal_skip and whole and not torch.compiler.is_compiling():
        raise ValueError(
            "attention_mask: expected padding on the left or on the right, got position_ids of "
            f"packed sequences or a mask function of the caller's; {ANY_MASK}, and "
            "longrope_kernels.attention takes packed sequences by cu_seqlens"
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask: expected shape ({batch_size}, tokens), "
                f"got {tuple(attention_mask.shape)}"
            )
        # On a device this waits for it, as transformers' own masks do, but never for one token.
        if (readable(attention_mask) or _may_wait(q_length)) and bool(attention_mask.all()):
            attention_mask = None
    filled = q_offset + q_length - kv_offset
    is_full = not isinstance(filled, torch.Tensor) and filled == kv_length
    if attention_mask is None and is_full:
        return None

    result = torch.zeros((batch_size, 3), dtype=torch.int64, device=device)
    result[:, 1:] = filled
    if attention_mask is not None:
        real = attention_mask.to(torch.uint8)
        width = real.shape[1]
        some = attention_mask.any(1)
        start = torch.where(some, real.argmax(1), width)
        end = torch.where(some, width - real.flip(1).argmax(1), 0)
        if readable(attention_mask) and not torch.equal(real.sum(1), (end - start).clamp(min=0)):
            raise ValueError(
                "attention_mask: expected padding on the left or on the right, got a row with "
                f"padding between its tokens; {ANY_MASK}"
            )
        result[:, 0], result[:, 1] = start, end
    return result[:, None, None]


def is_slots(mask: torch.Tensor) -> bool:
    """Whether a mask is what `slots_of_mask` returns."""
    return mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[1:] == (1, 1, 3)


def _may_wait(q_length: int) -> bool:
    # `decode` serves up to so many queries, and reads ``kv_start`` at no cost.
    if torch.compiler.is_compiling() or q_length <= MAX_QUERIES:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
