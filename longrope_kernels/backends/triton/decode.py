"""Decoding by the Triton kernels: the scratch of the splits, and the launches."""

from __future__ import annotations

import torch

from ...calls.records import DecodeCall
from ...kernels import decode as kernels
from ...kernels.splits import counters_for
from . import device
from .launch import run_launch

# What the interpreter stands for: enough that small tests see several splits.
_INTERPRETED_MULTIPROCESSORS = 16


def decode(call: DecodeCall, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Attend to the cache, into out (B, q_len, Hq, D) and lse (B, Hq, q_len) float32.

    q is bfloat16 or float16, the caches of that dtype or float8_e4m3fn. lse is contiguous, base e;
    a query that sees no key gets 0 and -inf. What is launched follows from shapes alone, so that
    one captured graph serves all lengths.
    """
    if out.numel() == 0:
        return
    if call.keys.empty:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    q = call.q
    arch = device.arch_of(q)
    multiprocessors = device.multiprocessors_of(q, _INTERPRETED_MULTIPROCESSORS)
    config = kernels.config_of(call, arch)
    splits = kernels.splits_of(call, arch, multiprocessors, config)
    with device.on_device(q):
        scratch = None
        if splits.most > 1:
            shape = (splits.most, *lse.shape)
            counters = counters_for(q, kernels.counters_of(call, config))
            scratch = lse.new_empty(*shape, q.shape[3]), lse.new_empty(shape), counters
        run_launch(kernels.plan(call, out, lse, scratch, arch, splits, config))
