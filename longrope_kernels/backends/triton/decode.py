"""Decoding by the Triton kernels: the scratch of the splits, and the launches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from ...calls.records import DecodeCall
from ...kernels import decode as kernels
from . import device
from .launch import run_launch

# What the interpreter stands for: enough that small tests see several splits.
_INTERPRETED_MULTIPROCESSORS = 16
# By device and stream, and in the interpreter by thread.
_counters: dict[tuple[object, int], torch.Tensor] = {}
_as_in_a_graph = ContextVar("_as_in_a_graph", default=False)


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
    scratch = None
    if splits.most > 1:
        shape = (splits.most, *lse.shape)
        scratch = lse.new_empty(*shape, q.shape[3]), lse.new_empty(shape)
    with device.on_device(q):
        counters = None
        if scratch is not None:
            counters = counters_for(q, kernels.counters_of(call, config))
        for launch in kernels.plan(call, out, lse, scratch, arch, splits, config, counters):
            run_launch(launch)


@contextlib.contextmanager
def as_in_a_graph() -> Iterator[None]:
    """Within, calls launch what they launch while a CUDA graph is captured."""
    token = _as_in_a_graph.set(True)
    try:
        yield
    finally:
        _as_in_a_graph.reset(token)


def counters_for(q: torch.Tensor, count: int) -> torch.Tensor | None:
    """``count`` zeros for the kernel to count in, which leaves zeros; None in a CUDA graph.

    Kernels of one stream follow one another and may share them; two streams may not, nor two
    graphs, whose replays nobody can order from here: a graph has the second launch instead, which
    costs its replay no time of the host.
    """
    if _as_in_a_graph.get():
        return None
    if not q.is_cuda:
        place: tuple[object, int] = (q.device, threading.get_ident())
    elif torch.cuda.is_current_stream_capturing():
        return None
    else:
        place = (q.device, torch.cuda.current_stream(q.device).cuda_stream)
    counters = _counters.get(place)
    if counters is None or len(counters) < count:
        with torch.inference_mode(False):
            size = 1 << (count - 1).bit_length()
            counters = torch.zeros(size, dtype=torch.int32, device=q.device)
        _counters[place] = counters
    return counters
