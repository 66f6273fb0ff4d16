"""Which keys a query sees: by slots, the places of tokens in their sequences, never by positions.

Query i of Sq queries against Sk keys has slot ``i + Sk - Sq``, so that the last query stands at the
last key; key j has slot j. Causal is ``j <= s``, a window w ``s - j < w`` (not causal:
``|s - j| < w``), and a start hides the slots below it (left padding).
"""

from __future__ import annotations

import torch


def visible(
    sizes: tuple[int, int, int],
    causal: bool,
    window: int,
    start: torch.Tensor | None,
    borders: torch.Tensor | None,
    borders_k: torch.Tensor | None,
    lens: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Which keys each query sees, of a dense batch or of packed sequences (a batch of one).

    Args:
        sizes: B, Sq, Sk.
        causal: a query sees no key behind it.
        window: in slots; 0 for none.
        start: (sequences,), the first slot that is seen.
        borders: (sequences + 1,), where packed sequences of queries begin.
        borders_k: the same of keys; both or neither.
        lens: (B,), how many of the keys are there; the last query stands at the last of them.
        device: of the result.

    Returns:
        (B, Sq, Sk) bool.
    """
    batch, queries, keys = sizes
    slot, of_query = _slots(batch, queries, borders, device)
    key, of_key = _slots(batch, keys, borders_k, device)
    if lens is not None:
        slot = slot + lens[:, None] - queries
    elif borders is None or borders_k is None:
        slot = slot + keys - queries
    else:
        slot = slot + (borders_k.diff() - borders.diff())[of_query]
    distance = slot[:, :, None] - key[:, None, :]
    seen = of_query[:, :, None] == of_key[:, None, :]
    if causal:
        seen = seen & (distance >= 0)
    if window:
        seen = seen & ((distance if causal else distance.abs()) < window)
    if lens is not None:
        seen = seen & (key < lens[:, None])[:, None, :]
    if start is not None:
        seen = seen & (key >= start[of_key])[:, None, :]
    return seen


def see_nothing(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Fill what attention gives where no query sees a key: 0, and -inf or the sinks (Hq,) alone.

    out: (B, Sq, Hq, D); lse: (B, Hq, Sq).
    """
    out.zero_()
    if sinks is None:
        lse.fill_(-torch.inf)
    else:
        lse.copy_(sinks[:, None])


def sequence_of_token(borders: torch.Tensor, tokens: int) -> torch.Tensor:
    """The packed sequence of each of ``tokens`` tokens; those past the end belong to the last.

    borders: (sequences + 1,) int32 or int64, ascending from 0. Returns (tokens,) int64.
    """
    index = torch.arange(tokens, device=borders.device, dtype=borders.dtype)
    sequence = torch.searchsorted(borders[1:].contiguous(), index, right=True)
    return sequence.clamp(max=borders.shape[0] - 2)


def _slots(
    batch: int, tokens: int, borders: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each token in its sequence, and the sequence: two (batch, tokens) int64."""
    place = torch.arange(tokens, device=device).expand(batch, tokens)
    if borders is None:
        return place, torch.arange(batch, device=device)[:, None].expand(batch, tokens)
    sequence = sequence_of_token(borders, tokens).expand(batch, tokens)
    return place - borders[sequence], sequence
