"""What tune.py tunes: calls of each kernel, which any entry of its table makes a launch of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from longrope_kernels import Rope
from longrope_kernels.backends.triton import device
from longrope_kernels.backends.triton.launch import run_launch as run
from longrope_kernels.calls.records import (
    AttentionCall,
    DecodeCall,
    Keys,
    RotaryCall,
    Scores,
    Selection,
)
from longrope_kernels.kernels import attention, attention_backward, decode, rotary
from longrope_kernels.kernels.attention_backward import Configs
from longrope_kernels.kernels.launch import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


class Shape(NamedTuple):
    """One sequence: its tokens, and the heads of q, and of k and v."""

    seq: int
    heads: int
    kv_heads: int

    def random(self, heads: int, dim: int, tokens: int | None = None) -> torch.Tensor:
        """(1, tokens, heads, dim), the tokens of a head together, as the pre-pass lays them out."""
        shape = (1, heads, tokens or self.seq, dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)

    def tensors(self, dim: int, tokens: int | None = None) -> tuple[torch.Tensor, ...]:
        """q, k, v, and the output of the queries and their log-sum-exp, to be filled."""
        q = self.random(self.heads, dim, tokens)
        k, v = (self.random(self.kv_heads, dim) for _ in range(2))
        lse = q.new_empty(1, self.heads, q.shape[1], dtype=torch.float32)
        return q, k, v, torch.empty_like(q), lse


class Job(NamedTuple):
    """A place in a table: its present entry, the launch of any, and the tensors that this fills."""

    name: str
    present: Any
    launch: Callable[[Any], Launch]
    outputs: tuple[torch.Tensor, ...]


def attending(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0) -> AttentionCall:
    """The queries are the last tokens."""
    (queries, dim), tokens = (q.shape[1], q.shape[3]), k.shape[1]
    at = torch.arange(tokens, device=DEVICE)[None]
    tables, scores = Rope.plain(dim).tables(DEVICE), Scores(True, dim**-0.5, window)
    return AttentionCall(q, at[:, tokens - queries :], Keys(k, v, at), tables, Selection(), scores)


def forward(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """By pre-pass without and with a window, and in registers, which few queries take."""
    few = max(1, attention.PREPASS_QUERIES * shape.kv_heads // shape.heads)
    for name, window, queries in (
        ("prepass", 0, shape.seq),
        ("prepass, window", shape.seq // 2, shape.seq),
        ("registers", 0, min(few, shape.seq)),
    ):
        q, k, v, out, lse = shape.tensors(dim, queries)
        rotated = name != "registers"
        present = attention.choose_config(arch, dim, not rotated, window=window > 0)
        call = attending(q, k, v, window)
        launch = partial(attention.plan, call, out, lse, rotated, arch)
        yield Job(name, present, launch, (out, lse))


def backward(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """dk and dv in one kernel, each by itself, and dq."""
    q, k, v, out, lse = shape.tensors(dim)
    d_out, delta, call = shape.random(shape.heads, dim), torch.empty_like(lse), attending(q, k, v)
    run(attention.plan(call, out, lse, True, arch))
    run(attention_backward.plan_delta(d_out, None, out, lse, delta))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    plan = partial(attention_backward.plan, call, d_out, lse, delta, dq, dk, dv, arch)
    of_k, of_v, of_q = attention_backward.choose_configs(arch, dim)
    yield Job("dk_dv", of_k, lambda config: plan(Configs(config, None, config))[0], (dk, dv))
    for i, (name, present, filled) in enumerate(
        (("dk", of_k, dk), ("dv", of_v or of_k, dv), ("dq", of_q, dq))
    ):
        yield Job(name, present, lambda config, i=i: plan(Configs(*(config,) * 3))[i], (filled,))


def decoding(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """One query of each head, and as many as make more than 16 rows for a KV head."""
    groups = shape.heads // shape.kv_heads
    tables, scores = Rope.plain(dim).tables(DEVICE), Scores(True, dim**-0.5)
    for name, queries in (("up to 16 rows", 1), ("more rows", 16 // groups + 1)):
        q, k, v, out, lse = shape.tensors(dim, queries)
        keys = Keys(k, v, lens=torch.full((1,), shape.seq, device=DEVICE))
        call = DecodeCall(q, keys, tables, Selection(), scores)

        def launch(config: Any, call: Any = call, out: Any = out, lse: Any = lse) -> Launch:
            multiprocessors = device.multiprocessors_of(call.q, 16)
            splits = decode.splits_of(call, arch, multiprocessors, config)
            of_splits = (splits.most, *lse.shape)
            counters = lse.new_zeros(decode.counters_of(call, config), dtype=torch.int32)
            scratch = lse.new_empty(*of_splits, dim), lse.new_empty(of_splits), counters
            rest = (scratch if splits.most > 1 else None, arch, splits, config)
            return decode.plan(call, out, lse, *rest)

        present = decode.choose_config(arch, dim, queries * groups)
        yield Job(name, present, launch, (out, lse))


def rotating(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """q and k out of place."""
    q, k = shape.random(shape.heads, dim), shape.random(shape.kv_heads, dim)
    outputs = torch.empty_like(q), torch.empty_like(k)
    positions, tables = torch.arange(shape.seq, device=DEVICE)[None], Rope.plain(dim).tables(DEVICE)
    call = RotaryCall(q, k, positions, tables, Selection())
    most = max(shape.heads, shape.kv_heads)
    present = rotary.choose_tile(shape.seq, most, dim // 2, 0, q.dtype.itemsize, False)
    yield Job("half pairing", present, partial(rotary.plan, call, *outputs), outputs)


KERNELS = {
    "forward": (attention, forward),
    "backward": (attention_backward, backward),
    "decode": (decode, decoding),
    "rotary": (rotary, rotating),
}
