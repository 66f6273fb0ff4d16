"""Attention composed of our rotation, made before, and a flash-attn library, called by name.

The three libraries share one idea of a mask, which is ours: the last query stands at the last key,
and a window counts the keys on either side of a query. They differ in how they are imported, in
keyword arguments, and in what they give a query that sees no key.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ..masks import Mask, sequence_of_token

_ALL = frozenset(range(8, 257, 8))
_TO_128 = frozenset(range(8, 129, 8))


@dataclass(frozen=True)
class Served:
    """Head dimensions on one major compute capability: forward, with gradients, and with both
    gradients and softcap; and whether gradients can be deterministic."""

    forward: frozenset[int] = _ALL
    backward: frozenset[int] = _ALL
    softcap_backward: frozenset[int] = _ALL
    deterministic: bool = True


_NONE: frozenset[int] = frozenset()
_BLACKWELL = Served(_TO_128 | {256}, _TO_128 | {256}, _TO_128)


@dataclass(frozen=True)
class Library:
    """How one library is found and called, and what it serves.

    Attributes:
        module: where its two functions are.
        get: how to get it.
        lse: the keyword that asks for the log-sum-exp; versions without it always return it.
        longest: whether packed sequences come with the length of the longest.
        head_dims: on some device.
        version: whose source ``on`` was read from.
        on: by major compute capability; None leaves the device to the library.
    """

    module: str
    get: str
    lse: str = "return_attn_probs"
    longest: bool = True
    head_dims: range = range(8, 257, 8)
    version: str = ""
    on: Mapping[int, Served] | None = None


LIBRARIES = {
    "flash-attn-2": Library("flash_attn.flash_attn_interface", "pip install 'flash-attn>=2.7'"),
    "flash-attn-3": Library(
        "flash_attn_interface",
        "build the folder hopper of https://github.com/Dao-AILab/flash-attention",
    ),
    "flash-attn-4": Library(
        "flash_attn.cute",
        "pip install flash-attn-4",
        lse="return_lse",
        longest=False,
        version="4.0.0b36",
        on={
            8: Served(_TO_128, _NONE, _NONE),
            9: Served(),
            10: _BLACKWELL,
            11: _BLACKWELL,
            12: Served(_TO_128, _TO_128, _NONE, deterministic=False),
        },
    ),
}


@cache
def functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flash_attn_func and flash_attn_varlen_func of the library."""
    module = importlib.import_module(LIBRARIES[name].module)
    return module.flash_attn_func, module.flash_attn_varlen_func


def missing(name: str) -> str | None:
    """Why the library cannot run in this process and how to get it, or None where it can."""
    try:
        functions(name)
    except Exception as error:  # one built for another torch fails in its own ways
        return f"{error}; {LIBRARIES[name].get}"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def attend(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    softmax_scale: float,
    softcap: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention of rotated q and k.

    Args:
        name: a key of `LIBRARIES`.
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, D) bfloat16 or float16; Hq a multiple
            of Hk.
        mask: which keys a query sees.
        softmax_scale, softcap: as in `longrope_kernels.attention`.
        return_lse: whether to return the log-sum-exp, which carries no gradient here.

    Returns:
        out (B, Sq, Hq, D) of the dtype of q, and the log-sum-exp of the scores, base e,
        (B, Hq, Sq) float32, or None. A query that sees no key gets 0 and -inf.

    Raises:
        ValueError: what the library does not serve.
    """
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if return_lse and trains:
        raise ValueError(
            f"return_lse: backend {name!r} serves no gradient of the log-sum-exp; expected "
            "'triton' or 'reference', or torch.no_grad()"
        )
    major = _capability(q.device)
    if major is not None:
        check_device(name, major, q.shape[-1], softcap is not None, trains)
    queries, keys = q.shape[1], k.shape[1]
    given = keywords(name, mask, queries, keys, softmax_scale, softcap)
    blind = 0 if mask.cu_seqlens is not None else _blind_queries(mask, queries, keys)
    if blind == queries or not q.numel() or not keys:
        # Nothing is seen. The empty sums keep the gradients.
        out = torch.zeros_like(q) + sum(x[..., :0].sum() for x in (q, k, v))
        return out, q.new_full(_lse_shape(q), -torch.inf, dtype=torch.float32)

    dense, packed = functions(name)
    call = dense if mask.cu_seqlens is None else packed
    if return_lse and LIBRARIES[name].lse in inspect.signature(call).parameters:
        given[LIBRARIES[name].lse] = True
    q, k, v = (_aligned(x) for x in (q[:, blind:], k, v))
    if mask.cu_seqlens is not None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
    result = call(q, k, v, **given)
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    if not return_lse:
        lse = None

    if mask.cu_seqlens is None:
        out = F.pad(out, (0, 0, 0, 0, blind, 0)) if blind else out
        lse = F.pad(lse, (blind, 0), value=-torch.inf) if blind and lse is not None else lse
        return out, lse
    if mask.cu_seqlens_k is not mask.cu_seqlens:
        hidden = _blind_tokens(mask, queries)
        out = out.masked_fill(hidden[:, None, None], 0)
        lse = None if lse is None else lse.masked_fill(hidden, -torch.inf)
    return out.unsqueeze(0), None if lse is None else lse.unsqueeze(0)


def check_device(name: str, major: int, head_dim: int, softcap: bool, trains: bool) -> None:
    """Refuse what the library does not serve on GPUs of this major compute capability."""
    library = LIBRARIES[name]
    if library.on is None:
        return
    served = library.on.get(major, Served(_NONE, _NONE, _NONE))
    dims, how = served.forward, ""
    if trains:
        dims, how = served.backward, " with gradients"
    if trains and softcap:
        dims, how = served.softcap_backward, " with gradients and softcap"
    lacks = None if head_dim in dims else f"head_dim {sorted(dims)}{how}, got {head_dim}"
    if trains and torch.are_deterministic_algorithms_enabled() and not served.deterministic:
        lacks = lacks or "no deterministic gradients"
    if lacks is not None:
        raise ValueError(
            f"backend: {name!r} ({library.version}) serves on compute capability {major} {lacks}; "
            "expected 'triton', 'composed' or 'reference'"
        )


def _capability(device: torch.device) -> int | None:
    """The major compute capability, None of what is no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def keywords(
    name: str,
    mask: Mask,
    queries: int,
    keys: int,
    softmax_scale: float,
    softcap: float | None,
) -> dict[str, Any]:
    """The keyword arguments with which the library's function does what the mask says.

    Args:
        name: a key of `LIBRARIES`.
        mask: which keys a query sees.
        queries, keys: tokens of a row of q and of k.
        softmax_scale, softcap: as in `longrope_kernels.attention`.

    Raises:
        ValueError: what the library does not serve.
    """
    library = LIBRARIES[name]
    if mask.kv_start is not None:
        raise ValueError(
            f"kv_start: backend {name!r} serves no left padding; expected 'triton', 'composed' or "
            "'reference', or packed sequences (cu_seqlens)"
        )
    given: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": mask.causal}
    if softcap is not None:
        given["softcap"] = softcap
    longest = max(queries, keys)
    if mask.window is not None and mask.window < longest:
        if mask.cu_seqlens is None and not mask.causal and keys < mask.window:
            # flash-attn 2 takes a side that is longer than the keys for no window at all.
            raise ValueError(
                f"window: backend {name!r}, not causal, serves none longer than the {keys} keys "
                f"where there are more queries, got {mask.window}; expected 'triton', 'composed' "
                "or 'reference'"
            )
        given["window_size"] = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    if torch.are_deterministic_algorithms_enabled():
        given["deterministic"] = True
    if mask.cu_seqlens is not None and mask.cu_seqlens_k is not None:
        given["cu_seqlens_q"] = mask.cu_seqlens.int().contiguous()
        given["cu_seqlens_k"] = mask.cu_seqlens_k.int().contiguous()
        if library.longest:
            # Reading the borders would wait for the device; no sequence is longer than all tokens.
            given["max_seqlen_q"] = given["max_seqlen_k"] = longest
    return given


def _blind_queries(mask: Mask, queries: int, keys: int) -> int:
    """How many queries, the first ones, see no key in a dense batch."""
    if not keys:
        return queries
    if not mask.causal and mask.window is None:
        return 0
    ahead = 0 if mask.causal or mask.window is None else mask.window - 1
    return max(0, queries - keys - ahead)


def _blind_tokens(mask: Mask, tokens: int) -> torch.Tensor:
    """Which queries of packed sequences see no key: (tokens,) bool."""
    assert mask.cu_seqlens is not None
    assert mask.cu_seqlens_k is not None
    sequence = sequence_of_token(mask.cu_seqlens, tokens)
    keys = mask.cu_seqlens_k.diff()[sequence]
    if not mask.causal and mask.window is None:
        return keys == 0
    place = torch.arange(tokens, device=keys.device) - mask.cu_seqlens[sequence]
    slot = place + keys - mask.cu_seqlens.diff()[sequence]
    ahead = 0 if mask.causal or mask.window is None else mask.window - 1
    return (slot + ahead < 0) | (keys == 0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows do not lie 16 bytes apart, which the libraries' loads want."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    odd = x.storage_offset() % 8 or any(step % 8 or step == 0 for step in steps)
    return x.contiguous() if odd or x.stride(-1) != 1 else x


def _lse_shape(q: torch.Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]
