"""Decoding by the Triton kernels: the scratch of the splits, and the launches."""

from __future__ import annotations

import torch

from ...calls.records import CacheTensors, Rotation
from .launch import arch_of, multiprocessors_of, on_device, run_launch

# What the interpreter stands for: enough that small tests see several splits.
_INTERPRETED_MULTIPROCESSORS = 16


def decode(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cache: CacheTensors,
    rotation: Rotation,
    softmax_scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attend to the cache, into out and lse; see `run_decode`.

    q is bfloat16 or float16, the caches of that dtype or float8_e4m3fn. What is launched follows
    from shapes alone, so that one captured graph serves all lengths.
    """
    from ...kernels import decode as kernels

    if out.numel() == 0:
        return
    if cache.empty:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    arch = arch_of(q)
    multiprocessors = multiprocessors_of(q, _INTERPRETED_MULTIPROCESSORS)
    config = kernels.config_of(q, cache, arch)
    splits = kernels.splits_of(q, cache, arch, multiprocessors, config)
    scratch = None
    if splits.most > 1:
        shape = (splits.most, *lse.shape)
        scratch = lse.new_empty(*shape, q.shape[3]), lse.new_empty(shape)
    with on_device(q):
        for launch in kernels.plan(
            q,
            out,
            lse,
            scratch,
            cache,
            rotation,
            softmax_scale,
            window,
            softcap,
            arch,
            splits,
            config,
        ):
            run_launch(launch)
