"""Decoding by the Triton kernels: the scratch of the splits, and the launches."""

from __future__ import annotations

import torch

from ...calls.kinds import by_kind
from ...calls.masks import see_nothing
from ...calls.records import DecodeCall
from ...kernels import decode as kernels
from ...kernels.launch import as_bytes
from ...kernels.splits import Splits, counters_for
from . import device
from .launch import run

# What the interpreter stands for: enough that small tests see several splits.
_INTERPRETED_MULTIPROCESSORS = 16


def decode(call: DecodeCall, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Attend to the cache, into out (B, q_len, Hq, D) and lse (B, Hq, q_len) float32.

    q is bfloat16 or float16, the caches of that dtype or float8_e4m3fn. lse is contiguous, base e;
    a query that sees no key gets 0, and -inf or its sink. What is launched follows from shapes
    alone, so that one captured graph serves all lengths.
    """
    q = call.q
    arch = device.arch_of(q)
    keys = as_bytes(call.keys)
    if keys is not call.keys:  # to replace them takes longer than to look
        call = call._replace(keys=keys)
    sizes = _sizes_of(call, arch, device.multiprocessors_of(q, _INTERPRETED_MULTIPROCESSORS))
    if sizes is None:
        see_nothing(out, lse, call.sinks)
        return
    config, splits, counters = sizes
    scratch = None
    if splits.most > 1:
        shape = (splits.most, *lse.shape)
        partial = lse.new_empty(*shape, q.shape[3]), lse.new_empty(shape)
        scratch = *partial, counters_for(q, counters)
    run(kernels.plan, call, out, lse, scratch, arch, splits, config)


@by_kind
def _sizes_of(
    call: DecodeCall, arch: int, multiprocessors: int
) -> tuple[kernels.Config, Splits, int] | None:
    """Tiles, splits, and how many counters they need; None where there is no query or no key."""
    if call.q.numel() == 0 or call.keys.empty:
        return None
    config = kernels.config_of(call, arch)
    splits = kernels.splits_of(call, arch, multiprocessors, config)
    return config, splits, kernels.counters_of(call, config)
