"""Cases of `attention` by numbers, who is asked for them, and the comparison with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_truth import Call, assert_lse_close, bf16, fp16, fp32, fp64, from_bshd
from cases import CUDA, DTYPE_NAMES, Attending, Shape, positions_for, two_sets
from tolerance import assert_close

from longrope_kernels import Rope, attention


@dataclass(frozen=True)
class Backend(Attending):
    """A backend, and whether it has softcap and lse."""

    of_scores: bool = True
    k_rotation: str | None = None

    def __str__(self) -> str:
        return super().__str__() + (f"-{self.k_rotation}" if self.k_rotation else "")

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(attention, *args, **kwargs, k_rotation=self.k_rotation)


REFERENCE = Backend("reference", "cpu", (fp32, bf16, fp16, fp64))
COMPOSED = Backend("composed", "cpu", (fp32, bf16, fp16), of_scores=False)
# Without a GPU the interpreter runs the same kernels on CPU tensors.
PREPASS, REGISTERS = (
    Backend(
        "triton",
        "cuda" if CUDA else "cpu",
        (bf16, fp16),
        k_rotation=name,
        smallest_dim=16,
        slow=not CUDA,
    )
    for name in ("prepass", "registers")
)
BACKENDS = [REFERENCE, COMPOSED, PREPASS, REGISTERS]

every_forward = pytest.mark.parametrize("backend", BACKENDS, ids=str)
forwards_of_scores = pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b.of_scores], ids=str
)
# Where k is rotated changes the forward pass alone, and one way stands for both elsewhere.
ONE_WAY = [b for b in BACKENDS if b is not REGISTERS]
every_backend = pytest.mark.parametrize("backend", ONE_WAY, ids=str)
backends_of_scores = pytest.mark.parametrize(
    "backend", [b for b in ONE_WAY if b.of_scores], ids=str
)


@dataclass(frozen=True)
class Case:
    """One call by numbers. ``keys`` 0: as many as queries; ``pairs`` 0: all of ``dim``.

    ``counts`` (and ``counts_k``, else the same) pack sequences into ``layout`` "thd", in place of
    batch, queries and keys. ``lengths`` or ``sets``, one for each sequence, take `two_sets`.
    """

    batch: int = 2
    queries: int = 19
    keys: int = 0
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    pairs: int = 0
    layout: str = "bshd"
    dtype: torch.dtype = fp32
    interleaved: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    kv_start: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    counts_k: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    sets: tuple[int, ...] = ()
    n_hat: int = 128
    attention_factor: float = 1.19
    return_lse: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.batch}-T{self.queries}" + (f"x{self.keys}" if self.keys else "")
        if self.counts:
            sizes = "T" + "+".join(map(str, self.counts))
            sizes += "x" + "+".join(map(str, self.counts_k)) if self.counts_k else ""
        parts = [sizes, f"H{self.heads}.{self.kv_heads}", f"D{self.dim}"]
        parts += [f"P{self.pairs}"] if self.pairs else []
        parts += [self.layout, DTYPE_NAMES[self.dtype]]
        parts += [n for n in ("interleaved", "return_lse", "sinks") if getattr(self, n)]
        parts += [] if self.causal else ["full"]
        for name in ("window", "softcap", "scale", "kv_start", "lengths", "sets"):
            value = getattr(self, name)
            if value not in (None, ()):
                shown = "+".join(map(str, value)) if isinstance(value, tuple) else value
                parts.append(f"{name}{shown}")
        return "-".join(parts)

    @property
    def of_scores(self) -> bool:
        return self.softcap is not None or self.return_lse

    @property
    def tiles(self) -> int:
        """How many tiles of 32 queries there are, of all heads."""
        counts = self.counts or (self.queries,) * (1 if self.layout == "thd" else self.batch)
        return self.heads * sum(-(-count // 32) for count in counts)

    def rope(self) -> Rope:
        if self.lengths or self.sets:
            return two_sets(self.pairs or self.dim // 2, interleaved=self.interleaved)
        shape = Shape(1, 1, 1, 1, self.dim, self.pairs, interleaved=self.interleaved)
        return shape.rope(self.n_hat, self.attention_factor)

    def tokens(self) -> tuple[int, int]:
        """How many queries and keys a row holds."""
        if self.counts:
            return sum(self.counts), sum(self.counts_k or self.counts)
        return self.queries, self.keys or self.queries

    def tensors(self) -> list[torch.Tensor]:
        """Normal q, k and v, made in the dtype that the kernel gets."""
        queries, keys = self.tokens()
        batch = 1 if self.layout == "thd" else self.batch
        sizes = ((queries, self.heads), (keys, self.kv_heads), (keys, self.kv_heads))
        made = []
        for seq, heads in sizes:
            x = torch.randn(batch, seq, heads, self.dim).to(self.dtype)
            made.append(from_bshd(x, self.layout).contiguous())
        return made

    def arguments(self) -> dict[str, Any]:
        """All of `attention` but q, k, v and backend; no defaults. Positions are in no order."""
        queries, keys = self.tokens()
        positions = positions_for(queries + keys, self.n_hat or 128)
        made: dict[str, Any] = {"positions": positions[:queries], "layout": self.layout}
        if self.keys or self.counts_k:
            made["key_positions"] = positions[-keys:] if keys else positions[:0]
        for name, counts in (("cu_seqlens", self.counts), ("cu_seqlens_k", self.counts_k)):
            if counts:
                made[name] = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
        for name in ("kv_start", "lengths", "sets"):
            if getattr(self, name):
                made[name] = torch.tensor(getattr(self, name), dtype=torch.int32)
        for name in ("window", "softcap"):
            if getattr(self, name) is not None:
                made[name] = getattr(self, name)
        if self.scale is not None:
            made["softmax_scale"] = self.scale
        if not self.causal:
            made["causal"] = False
        if self.sinks:  # about as much as the keys have together, and more, and less
            made["sinks"] = 1.0 + 2.0 * torch.randn(self.heads)
        return made


def every_case(cases: list[Case], both_ways: bool = False) -> pytest.MarkDecorator:
    """``backend`` and ``case``: each case on each backend that serves it, in a dtype it takes.

    The two ways to rotate k take turns; the other one of a case runs where much does, see
    conftest.py.
    """
    params: dict[str, Any] = {}
    for backend in BACKENDS:
        for i, case in enumerate(cases):
            if case.of_scores > backend.of_scores:
                continue
            served = backend.nearest(case)
            name = f"{backend}-{served}"
            if backend is (REGISTERS, PREPASS)[i % 2] and not both_ways:
                more = pytest.param(backend, served, id=name, marks=pytest.mark.full)
                params.setdefault(name, more)
            else:
                params[name] = pytest.param(backend, served, id=name)
    return pytest.mark.parametrize(("backend", "case"), params.values())


def check(backend: Backend, case: Case, tensors: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Attend and compare; nothing given may change, nothing returned may be memory of it."""
    tensors, arguments = tensors or case.tensors(), case.arguments()
    positions = arguments.pop("positions")
    moved, before = [backend.move(x) for x in tensors], [x.clone() for x in tensors]
    args = (*moved, positions, case.rope())
    outs = backend.attend(*args, **arguments, return_lse=case.return_lse)
    expected = Call(*tensors, positions, case.rope(), **arguments).expected()
    out, lse = outs if case.return_lse else (outs, None)
    assert_close(out, expected.out)
    if lse is not None:
        assert_lse_close(lse, expected.lse)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(moved, before, strict=True))
    memory = {x.untyped_storage().data_ptr() for x in moved if x.numel()}
    assert out.untyped_storage().data_ptr() not in memory or not out.numel()
    return out


def check_grads(backend: Backend, case: Case) -> tuple[torch.Tensor, ...]:
    """All gradients against the truth for random incoming ones, of lse too if returned."""
    tensors, arguments = case.tensors(), case.arguments()
    positions = arguments.pop("positions")
    leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
    rope, given = case.rope(), dict(arguments)
    if case.sinks:
        given["sinks"] = backend.move(arguments["sinks"].clone()).requires_grad_()
        leaves.append(given["sinks"])
    outs = backend.attend(*leaves[:3], positions, rope, **given, return_lse=case.return_lse)
    outs = list(outs) if case.return_lse else [outs]
    grads_out = [torch.randn(x.shape).to(x.dtype) for x in outs]
    grads = torch.autograd.grad(outs, leaves, [backend.move(g) for g in grads_out])
    expected = Call(*tensors, positions, rope, **arguments).expected_grads(*grads_out)
    names = ("q", "k", "v", "sinks")[: len(leaves)]
    for name, grad, wanted in zip(names, grads, expected, strict=True):
        assert_close(grad, wanted, f"grad of {name}")
    return grads
