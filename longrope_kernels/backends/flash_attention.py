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

from ..calls.masks import sequence_of_token
from ..calls.records import AttentionCall
from ..torch_private import requires_grad

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
    name: str, call: AttentionCall, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention of q and k, bfloat16 or float16, that are rotated already.

    Args:
        name: a key of `LIBRARIES`.
        call: what is attended to.
        return_lse: whether to return the log-sum-exp, which carries no gradient here.

    Returns:
        out (B, Sq, Hq, D) of the dtype of q, and the log-sum-exp of the scores, base e,
        (B, Hq, Sq) float32, or None. A query that sees no key gets 0 and -inf.

    Raises:
        ValueError: what the library does not serve.
    """
    q, k, v = call.q, call.keys.k, call.keys.v
    borders, borders_k = call.selection.borders, call.keys.borders
    trains = torch.is_grad_enabled() and any(map(requires_grad, (q, k, v)))
    if return_lse and trains:
        raise ValueError(
            f"return_lse: backend {name!r} serves no gradient of the log-sum-exp; expected "
            "'triton' or 'reference', or torch.no_grad()"
        )
    major = capability(q.device)
    if major is not None:
        check_device(name, major, q.shape[-1], call.scores.cap > 0, trains)
    queries, slots = q.shape[1], k.shape[1]
    given = keywords(name, call)
    blind = 0 if borders is not None else _blind_queries(call)
    if blind == queries or not q.numel() or not slots:
        # Nothing is seen. The empty sums keep the gradients.
        out = torch.zeros_like(q) + sum(x[..., :0].sum() for x in (q, k, v))
        shape = q.shape[0], q.shape[2], queries
        return out, q.new_full(shape, -torch.inf, dtype=torch.float32)

    dense, packed = functions(name)
    function = dense if borders is None else packed
    if return_lse and LIBRARIES[name].lse in inspect.signature(function).parameters:
        given[LIBRARIES[name].lse] = True
    q, k, v = (_aligned(x) for x in (q[:, blind:], k, v))
    if borders is not None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
    result = function(q, k, v, **given)
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    if not return_lse:
        lse = None

    if borders is None:
        out = F.pad(out, (0, 0, 0, 0, blind, 0)) if blind else out
        lse = F.pad(lse, (blind, 0), value=-torch.inf) if blind and lse is not None else lse
        return out, lse
    if borders_k is not borders:
        hidden = _blind_tokens(call)
        out = out.masked_fill(hidden[:, None, None], 0)
        lse = None if lse is None else lse.masked_fill(hidden, -torch.inf)
    return out.unsqueeze(0), None if lse is None else lse.unsqueeze(0)


def check_device(name: str, major: int, head_dim: int, softcap: bool, trains: bool) -> None:
    """Refuse what the library does not serve on GPUs of this major compute capability."""
    lacks = _lacks(name, major, head_dim, softcap, trains)
    if lacks is not None:
        raise ValueError(
            f"backend: {name!r} ({LIBRARIES[name].version}) serves on compute capability {major} "
            f"{lacks}; expected 'triton', 'composed' or 'reference'"
        )


def serves(name: str, major: int | None, head_dim: int, trains: bool) -> bool:
    """Whether it has this head_dim on GPUs of this major compute capability, without softcap."""
    return _lacks(name, major, head_dim, False, trains) is None


def _lacks(name: str, major: int | None, head_dim: int, softcap: bool, trains: bool) -> str | None:
    """What the library serves in place of what is asked for, or None where it serves it."""
    library = LIBRARIES[name]
    if library.on is None:
        return None
    nothing = Served(_NONE, _NONE, _NONE)
    served = nothing if major is None else library.on.get(major, nothing)
    dims, how = served.forward, ""
    if trains:
        dims, how = served.backward, " with gradients"
    if trains and softcap:
        dims, how = served.softcap_backward, " with gradients and softcap"
    lacks = None if head_dim in dims else f"head_dim {sorted(dims)}{how}, got {head_dim}"
    if trains and torch.are_deterministic_algorithms_enabled() and not served.deterministic:
        lacks = lacks or "no deterministic gradients"
    return lacks


@cache
def capability(device: torch.device) -> int | None:
    """The major compute capability, None of what is no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def keywords(name: str, call: AttentionCall) -> dict[str, Any]:
    """The keyword arguments with which the library's function does what the call says.

    Raises:
        ValueError: what the library does not serve.
    """
    library, (causal, scale, window, cap) = LIBRARIES[name], call.scores
    borders, borders_k = call.selection.borders, call.keys.borders
    queries, slots = call.q.shape[1], call.keys.k.shape[1]
    if call.keys.start is not None:
        raise ValueError(
            f"kv_start: backend {name!r} serves no left padding; expected 'triton', 'composed' or "
            "'reference', or packed sequences (cu_seqlens)"
        )
    given: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if cap:
        given["softcap"] = cap
    longest = max(queries, slots)
    if 0 < window < longest:
        if borders is None and not causal and slots < window:
            # flash-attn 2 takes a side that is longer than the keys for no window at all.
            raise ValueError(
                f"window: backend {name!r}, not causal, serves none longer than the {slots} keys "
                f"where there are more queries, got {window}; expected 'triton', 'composed' "
                "or 'reference'"
            )
        given["window_size"] = (window - 1, 0 if causal else window - 1)
    if torch.are_deterministic_algorithms_enabled():
        given["deterministic"] = True
    if borders is not None and borders_k is not None:
        given["cu_seqlens_q"] = borders.int().contiguous()
        given["cu_seqlens_k"] = borders_k.int().contiguous()
        if library.longest:
            # Reading the borders would wait for the device; no sequence is longer than all tokens.
            given["max_seqlen_q"] = given["max_seqlen_k"] = longest
    return given


def _blind_queries(call: AttentionCall) -> int:
    """How many queries, the first ones, see no key in a dense batch."""
    queries, slots = call.q.shape[1], call.keys.k.shape[1]
    if not slots:
        return queries
    if not call.scores.causal and not call.scores.window:
        return 0
    ahead = 0 if call.scores.causal else call.scores.window - 1
    return max(0, queries - slots - ahead)


def _blind_tokens(call: AttentionCall) -> torch.Tensor:
    """Which queries of packed sequences see no key: (tokens,) bool."""
    borders, borders_k = call.selection.borders, call.keys.borders
    assert borders is not None
    assert borders_k is not None
    tokens = call.q.shape[1]
    sequence = sequence_of_token(borders, tokens)
    slots = borders_k.diff()[sequence]
    if not call.scores.causal and not call.scores.window:
        return slots == 0
    place = torch.arange(tokens, device=slots.device) - borders[sequence]
    slot = place + slots - borders.diff()[sequence]
    ahead = 0 if call.scores.causal else call.scores.window - 1
    return (slot + ahead < 0) | (slots == 0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows do not lie 16 bytes apart, which the libraries' loads want."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    odd = x.storage_offset() % 8 or any(step % 8 or step == 0 for step in steps)
    return x.contiguous() if odd or x.stride(-1) != 1 else x
