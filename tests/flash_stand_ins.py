"""Stand-ins for flash-attn 2, 3 and 4: their keyword arguments, on the CPU, in float64.

They keep to what the real ones demand and return: aligned rows, int32 borders, +inf or -inf where
nothing is seen, a window's side that is dropped where it is longer than the keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

bf16, fp16 = torch.bfloat16, torch.float16
Window = tuple[int | None, int | None]

_COMMON = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
_LONGEST = {"max_seqlen_q", "max_seqlen_k"}
# What each is asked by, and what of packed sequences it must be told besides their borders.
KEYWORDS: dict[str, tuple[set[str], set[str]]] = {
    "flash-attn-2": (_COMMON | {"return_attn_probs", "dropout_p", "alibi_slopes"}, _LONGEST),
    "flash-attn-3": (_COMMON | {"return_attn_probs", "num_splits", "pack_gqa"}, _LONGEST),
    "flash-attn-4": (_COMMON | {"return_lse", "num_splits", "pack_gqa", "score_mod"}, set()),
}


def stand_ins(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flash_attn_func and flash_attn_varlen_func of the library."""
    taken, needed = KEYWORDS[name]
    borders = {"cu_seqlens_q", "cu_seqlens_k"}
    nothing = torch.inf if name == "flash-attn-2" else -torch.inf

    def call(keywords: set[str], q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
        assert set(given) <= keywords, set(given) - keywords
        packed = borders <= keywords
        window = given.get("window_size", (None, None) if name == "flash-attn-4" else (-1, -1))
        if name == "flash-attn-2":  # a side longer than the keys is taken for none
            longest = given["max_seqlen_k"] if packed else k.shape[1]
            window = tuple(-1 if side >= longest else side for side in window)
        rest = (given["softmax_scale"], given["causal"], window, given.get("softcap", 0.0), nothing)
        if packed:
            assert needed | borders <= set(given)
            cu, cu_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
            out, lse = _packed(q, k, v, cu, cu_k, *rest)
        else:
            out, lse = _dense(q, k, v, *rest)
        if name == "flash-attn-4":  # always a pair
            return out, lse if given.get("return_lse") else None
        more = (None,) if name == "flash-attn-2" else ()
        return (out, lse, *more) if given.get("return_attn_probs") else out

    def dense(q: Any, k: Any, v: Any, **given: Any) -> Any:
        return call(taken, q, k, v, given)

    def varlen(q: Any, k: Any, v: Any, **given: Any) -> Any:
        return call(taken | needed | borders, q, k, v, given)

    for function, more in ((dense, set()), (varlen, needed | borders)):
        names = ("q", "k", "v", *sorted(taken | more))
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        function.__signature__ = signature  # type: ignore[attr-defined]
    return dense, varlen


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: Window,
    softcap: float,
    of_nothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence, (S, heads, D), as all three libraries document their masks."""
    groups = q.shape[1] // k.shape[1]
    x, y, z = (t.double().transpose(0, 1) for t in (q, k, v))
    scores = x @ y.repeat_interleave(groups, 0).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window[0], 0 if causal else window[1]
    slot = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if left is not None and left >= 0:
        seen &= j >= slot - left
    if right is not None and right >= 0:
        seen &= j <= slot + right
    alive = seen.any(-1)
    weights = scores.masked_fill(~seen, -torch.inf)[:, alive].softmax(-1)
    out = torch.zeros(x.shape, dtype=torch.float64)
    out[:, alive] = weights @ z.repeat_interleave(groups, 0)
    lse = scores.detach().masked_fill(~seen, -torch.inf).logsumexp(-1)
    lse = lse.masked_fill(~alive, of_nothing).float()
    return out.transpose(0, 1).to(q.dtype), lse


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    _demand(q, k, v)
    outs, lses = zip(*(_one(*one, *rest) for one in zip(q, k, v, strict=True)), strict=True)
    return torch.stack(outs), torch.stack(lses)


def _packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, cu_k: torch.Tensor, *rest
) -> Any:
    _demand(q, k, v)
    assert cu.dtype == cu_k.dtype == torch.int32
    assert cu.is_contiguous()
    assert cu_k.is_contiguous()
    sizes, sizes_k = cu.diff().tolist(), cu_k.diff().tolist()
    parts = zip(q.split(sizes), k.split(sizes_k), v.split(sizes_k), strict=True)
    outs, lses = zip(*(_one(*part, *rest) for part in parts), strict=True)
    return torch.cat(outs), torch.cat(lses, -1)


def _demand(*tensors: torch.Tensor) -> None:
    """What a load of 16 bytes needs."""
    for x in tensors:
        assert x.dtype in (bf16, fp16)
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(
            s % 8 == 0 and s for n, s in zip(x.shape, x.stride()[:-1], strict=False) if n > 1
        )
