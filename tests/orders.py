"""Sums in any order: a product in one of many, the errors that orders make, and the worst of them.

What tolerance.py says of one sum is carried here from scores and softmax to each element.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import truth
from tolerance import variance_of_sum


def product(a: torch.Tensor, b: torch.Tensor, order: int) -> torch.Tensor:
    """``a @ b.mT``, summed in one of many orders; 0 is the order in memory."""
    if order == 0:
        return a @ b.mT
    shuffled = torch.randperm(a.shape[-1], generator=torch.Generator().manual_seed(order))
    return a[..., shuffled] @ b[..., shuffled].mT


def errors_of_sums(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square errors that the order of sums in ``dtype`` makes in out and lse.

    q (..., D) holds the scale, scores (..., keys) are capped, and -inf where no key is seen. A
    score sums D products; an error ``e_j`` of it moves out by ``p_j (v_j - out) e_j`` and lse by
    ``p_j e_j``. Numerator and denominator sum as many terms as there are keys.
    """
    seen = scores > -torch.inf
    p = torch.softmax(scores, -1)
    out, n = p @ values, seen.sum(-1, keepdim=True)
    dots = q @ keys.mT
    of_scores = variance_of_sum(q.shape[-1], dots, q**2 @ (keys**2).mT, dtype)
    if softcap is not None:
        of_scores = of_scores * (1 - (scores.masked_fill(~seen, 0.0) / softcap) ** 2) ** 2
    moved = p**2 * of_scores
    squares = (p**2).sum(-1, keepdim=True)
    of_total = variance_of_sum(n, torch.ones_like(squares), squares, dtype)
    of_out = variance_of_sum(n, out, p**2 @ values**2, dtype) + out**2 * of_total
    spread = moved @ values**2 - 2 * out * (moved @ values) + out**2 * moved.sum(-1, keepdim=True)
    of_lse = of_total[..., 0] + moved.sum(-1)
    # Exact zeros may come out just below.
    return (of_out + spread).clamp(min=0.0).sqrt(), of_lse.clamp(min=0.0).sqrt()


def errors_of_slopes(
    d_out: torch.Tensor,
    out: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Variance that the order of sums in ``dtype`` makes in the gradients of scores.

    They are ``p_j (d_out . v_j - d_out . out)``, two sums of D products: where a query sees one
    key, or equal values, the difference is 0 but for their errors. d_out and out (..., D).
    """
    p, dim = torch.softmax(scores, -1), d_out.shape[-1]
    of_products = variance_of_sum(dim, d_out @ values.mT, d_out**2 @ (values**2).mT, dtype)
    squares = (d_out * out).square().sum(-1, keepdim=True)
    delta = (d_out * out).sum(-1, keepdim=True)
    variance = p**2 * (of_products + variance_of_sum(dim, delta, squares, dtype))
    if softcap is not None:
        seen = scores > -torch.inf
        variance *= (1 - (scores.masked_fill(~seen, 0.0) / softcap) ** 2) ** 2
    return variance


def worst(
    ref64: torch.Tensor, lows: Iterable[torch.Tensor], sums: torch.Tensor | None = None
) -> truth.Expected:
    """A kernel may sum in any order: element by element, that of all which errs most."""
    lows = list(lows)
    errors = torch.stack([(low.double() - ref64).abs().nan_to_num(0.0) for low in lows])
    most = errors.argmax(0, keepdim=True)
    low = torch.stack(lows).gather(0, most)[0]
    return truth.Expected(ref64, low, torch.zeros_like(ref64) if sums is None else sums)
