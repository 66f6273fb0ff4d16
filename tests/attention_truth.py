"""The truth of `attention`: plain loops in float64 over sequences and heads, masks slot by slot.

`Call` holds the arguments of one call. ``truth`` is the formula, which autograd follows; ``low``
the same in the steps of a fused kernel: exact angles; cos, sin, rotated q and k, probabilities,
gradients of scores and the output rounded to the input's dtype; sums in float32, in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import truth
from orders import errors_of_slopes, errors_of_sums, product, worst
from tolerance import assert_close, variance_of_sum

from longrope_kernels import Rope

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Pair = tuple[torch.Tensor, torch.Tensor]
# Float32 sums of as many tilings as it takes for few elements to show what rounding does.
ORDERS = range(4)


class Attended(NamedTuple):
    out: truth.Expected
    lse: truth.Expected


class Sequence(NamedTuple):
    """Where one sequence lies in q and k, and which keys each of its queries sees."""

    row: int
    q: slice
    k: slice
    mask: torch.Tensor  # (Sq, Sk) bool


def visible(queries: int, keys: int, causal: bool, window: int | None, start: int) -> torch.Tensor:
    """The slot rule: (queries, keys) bool."""
    slot = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)
    seen = (j >= start).expand(queries, keys)
    if causal:
        seen = seen & (j <= slot)
    if window is not None:
        distance = slot - j if causal else (slot - j).abs()
        seen = seen & (distance < window)
    return seen


def sink_last(scores: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Scores (..., keys) with one more, of a sink (...) that all queries see."""
    return torch.cat((scores, sink[..., None].expand(*scores.shape[:-1], 1)), -1)


def none_last(x: torch.Tensor) -> torch.Tensor:
    """Keys or values (..., keys, D) with one more, of zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, 1))


def _bshd(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x[None] if layout == "thd" else x.transpose(1, 2) if layout == "bhsd" else x


def from_bshd(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x.squeeze(0) if layout == "thd" else x.transpose(1, 2) if layout == "bhsd" else x


class Call:
    """The arguments of one call of `attention`, on the CPU."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        *,
        key_positions: torch.Tensor | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        softmax_scale: float | None = None,
        sinks: torch.Tensor | None = None,
        kv_start: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        sets: torch.Tensor | None = None,
        layout: str = "bshd",
        return_lse: bool = False,
    ) -> None:
        self.tensors = tuple(x.detach().cpu() for x in (q, k, v, sinks) if x is not None)
        self.layout, self.softcap, self.interleaved = layout, softcap, rope.interleaved
        self.scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        self.dtype = q.dtype
        self.sums = fp64 if q.dtype == fp64 else fp32
        batch, queries, self.heads, _ = _bshd(q, layout).shape
        keys, kv_heads = _bshd(k, layout).shape[1:3]
        self.group = self.heads // max(kv_heads, 1)

        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        key_positions = positions if key_positions is None else key_positions
        self.turns: list[Pair] = []
        for at, seq, borders in (
            (positions, queries, cu_seqlens),
            (key_positions, keys, cu_seqlens_k),
        ):
            at = (at[None] if at.dim() == 1 else at).expand(batch, seq)
            of_token = truth.token_sets(rope, batch, seq, lengths, sets, borders)
            self.turns.append(truth.cos_sin(rope, at, of_token))

        if cu_seqlens is None:
            spans = [(b, slice(0, queries), slice(0, keys)) for b in range(batch)]
        else:
            borders, borders_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
            spans = [
                (0, slice(borders[n], borders[n + 1]), slice(borders_k[n], borders_k[n + 1]))
                for n in range(len(borders) - 1)
            ]
        starts = [0] * len(spans) if kv_start is None else kv_start.tolist()
        self.sequences = [
            Sequence(
                row, sq, sk, visible(sq.stop - sq.start, sk.stop - sk.start, causal, window, start)
            )
            for (row, sq, sk), start in zip(spans, starts, strict=True)
        ]

    def _rotated(self, q: torch.Tensor, k: torch.Tensor) -> Pair:
        q, k = (
            truth.rotate(x, *turn, self.interleaved)
            for x, turn in zip((q, k), self.turns, strict=True)
        )
        return q, k

    def _with_sinks(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """q, k, v and sinks, which are -inf where there are none."""
        return (*tensors, torch.full((self.heads,), -torch.inf))[:4]

    def _capped(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def _layout(self, out: torch.Tensor, lse: torch.Tensor) -> Pair:
        return from_bshd(out, self.layout), lse[0] if self.layout == "thd" else lse

    def truth(self, *tensors: torch.Tensor) -> Pair:
        """out and lse of q, k, v and sinks in float64 (by default this call's), for autograd."""
        return self._truth(*tensors)[0]

    def _truth(self, *tensors: torch.Tensor) -> tuple[Pair, Pair]:
        """out and lse, and what the order of sums adds to each: see `errors_of_sums`."""
        *qkv, sinks = (x.double() for x in self._with_sinks(tensors or self.tensors))
        q, k, v = (_bshd(x, self.layout) for x in qkv)
        out = torch.zeros_like(q)
        lse = sinks[None, :, None].repeat(q.shape[0], 1, q.shape[1])
        out_sums, lse_sums = torch.zeros_like(out), torch.zeros_like(lse)
        q, k = self._rotated(q, k)
        for row, at, of_k, mask in self.sequences:
            alive = mask.any(-1)
            rows = torch.arange(at.start, at.stop)[alive]
            for h in range(self.heads):
                keys, values = (none_last(x[row, of_k, h // self.group]) for x in (k, v))
                scores = self._capped(self.scale * (q[row, rows, h] @ keys[:-1].T))
                scores = sink_last(scores.masked_fill(~mask[alive], -torch.inf), sinks[h])
                out[row, rows, h] = torch.softmax(scores, -1) @ values
                lse[row, h, rows] = torch.logsumexp(scores, -1)
                with torch.no_grad():
                    out_sums[row, rows, h], lse_sums[row, h, rows] = errors_of_sums(
                        self.scale * q[row, rows, h], keys, values, scores, self.softcap, self.sums
                    )
        return self._layout(out, lse), self._layout(out_sums, lse_sums)

    def truth_grads(
        self, grad_out: torch.Tensor, grad_lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        leaves = [x.double().requires_grad_() for x in self.tensors]
        out, lse = self.truth(*leaves)
        total = sum(x.sum() for x in leaves) * 0 + (out * grad_out.cpu().double()).sum()
        if grad_lse is not None:
            alive = lse > -torch.inf
            total = total + (lse[alive] * grad_lse.cpu().double()[alive]).sum()
        return torch.autograd.grad(total, leaves)

    def _scores(self, q: torch.Tensor, k: torch.Tensor, order: int) -> torch.Tensor:
        """In one of two tilings: the scale after the product, or before it."""
        if order % 2:
            return self._capped(product(self.scale * q, k, order))
        return self._capped(self.scale * product(q, k, order))

    def _low(
        self, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, order: int
    ) -> tuple[torch.Tensor, ...]:
        """out and lse, or the gradients of all tensors where an incoming gradient is given."""

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.to(self.dtype).to(self.sums)

        *qkv, sinks = self._with_sinks(self.tensors)
        q, k, v = (_bshd(x, self.layout) for x in qkv)
        sinks = sinks.to(self.sums)
        q, k = (x.to(self.sums) for x in self._rotated(q, k))
        out, dq, dk, dv = (torch.zeros_like(x, dtype=self.sums) for x in (q, q, k, v))
        d_sinks = torch.zeros_like(sinks)
        lse = torch.empty(q.shape[0], self.heads, q.shape[1], dtype=self.sums)
        d_out = out if grad_out is None else _bshd(grad_out.cpu(), self.layout).to(self.sums)
        d_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.cpu().view_as(lse)
        group_of = torch.arange(self.heads) // self.group
        for row, at, of_k, mask in self.sequences:
            # (heads, tokens, dim) each
            x, d_o = (t[row, at].transpose(0, 1) for t in (q, d_out))
            y, z = (t[row, of_k][:, group_of].transpose(0, 1).to(self.sums) for t in (k, v))
            z = none_last(z)
            hidden = self._scores(x, y, order).masked_fill(~mask, -torch.inf)
            scores = sink_last(hidden, sinks[:, None])
            top = scores.amax(-1, keepdim=True)
            dead = top == -torch.inf
            top = top.masked_fill(dead, 0.0)
            p = torch.exp(scores - top)
            total = p.sum(-1, keepdim=True)
            stored = top + torch.log(total)
            lse[row, :, at] = stored[..., 0]
            o = rounded(product(rounded(p), z.mT, order) / total.masked_fill(dead, 1.0))
            out[row, at] = o.transpose(0, 1)
            if grad_out is None:
                continue

            # The backward makes the probabilities again, in another tiling.
            scores = self._scores(x, y, order + 1)
            hidden = sink_last(scores.masked_fill(~mask, -torch.inf), sinks[:, None])
            p = torch.exp(hidden - stored.masked_fill(dead, 0.0))
            delta = product(d_o[..., None, :], o[..., None, :], order + 1)[..., 0]
            delta = delta - d_lse[row, :, at, None].to(self.sums)
            ds = p * (product(d_o, z, order) - delta)
            if self.softcap is not None:
                ds[..., :-1] *= 1 - (scores / self.softcap) ** 2
            ds = rounded(ds)
            d_sinks += ds[..., -1].sum(-1)
            ds, p = ds[..., :-1], p[..., :-1]
            dq[row, at] = self.scale * product(ds, y.mT, order).transpose(0, 1)
            dk[row, of_k] = self.scale * self._grouped(product(ds.mT, x.mT, order))
            dv[row, of_k] = self._grouped(product(rounded(p).mT, d_o.mT, order))
        if grad_out is None:
            return self._layout(out.to(self.dtype), lse)
        dq, dk, dv = (x.to(self.dtype) for x in (dq, dk, dv))
        dq, dk = (
            truth.rotate(x, cos, -sin, self.interleaved)
            for x, (cos, sin) in zip((dq, dk), self.turns, strict=True)
        )
        grads = (*(from_bshd(x, self.layout) for x in (dq, dk, dv)), d_sinks)
        return grads[: len(self.tensors)]

    def _gradient_sums(self, grad_out: torch.Tensor) -> list[torch.Tensor]:
        """What the order of sums adds to the gradients before they are rotated back."""
        *qkv, sinks = (x.double() for x in self._with_sinks(self.tensors))
        q, k, v = (_bshd(x, self.layout) for x in qkv)
        q, k = self._rotated(q, k)
        d_out = _bshd(grad_out.cpu().double(), self.layout)
        dq, dk, dv, d_sinks = (torch.zeros_like(x) for x in (q, k, v, sinks))
        for row, at, of_k, mask in self.sequences:
            alive = mask.any(-1)
            rows = torch.arange(at.start, at.stop)[alive]
            for h in range(self.heads):
                x, d_o = (t[row, rows, h] for t in (q, d_out))
                y, z = (t[row, of_k, h // self.group] for t in (k, v))
                scores = self._capped(self.scale * (x @ y.T)).masked_fill(~mask[alive], -torch.inf)
                z, scores = none_last(z), sink_last(scores, sinks[h])
                p = torch.softmax(scores, -1)
                out = p @ z
                slopes = errors_of_slopes(d_o, out, z, scores, self.softcap, self.sums)
                # Sinks are too few to show what it does that out, and each term, are rounded.
                terms = p[:, -1] * (d_o * out).sum(-1)
                squares = terms.square().sum()
                rounded = p[:, -1].square() @ (d_o * out).square().sum(-1) + squares
                d_sinks[h] += slopes[:, -1].sum() + (torch.finfo(self.dtype).eps / 2) ** 2 / 3 * (
                    rounded
                )
                d_sinks[h] += variance_of_sum(max(len(rows), 1), terms.sum(), squares, self.sums)
                slopes = slopes[:, :-1]
                dq[row, rows, h] += self.scale**2 * (slopes @ y**2)
                dk[row, of_k, h // self.group] += self.scale**2 * (slopes.mT @ x**2)
        dq, dk, dv, d_sinks = (x.clamp(min=0.0).sqrt() for x in (dq, dk, dv, d_sinks))
        sums = [*(from_bshd(x, self.layout) for x in (dq, dk, dv)), d_sinks]
        return sums[: len(self.tensors)]

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """(heads, Sk, dim) summed over the heads of a group: (Sk, kv_heads, dim)."""
        return x.unflatten(0, (-1, self.group)).sum(1).transpose(0, 1)

    def expected(self) -> Attended:
        """What `attention` must return."""
        lows = zip(*(self._low(None, None, order) for order in ORDERS), strict=True)
        exact, sums = self._truth()
        return Attended(*map(worst, exact, lows, sums))

    def expected_grads(
        self, grad_out: torch.Tensor, grad_lse: torch.Tensor | None = None
    ) -> list[truth.Expected]:
        """What the backward of `attention` must make of these gradients: dq, dk, dv, d_sinks."""
        lows = zip(*(self._low(grad_out, grad_lse, order) for order in ORDERS), strict=True)
        exact, sums = self.truth_grads(grad_out, grad_lse), self._gradient_sums(grad_out)
        return list(map(worst, exact, lows, sums))


def assert_lse_close(lse: torch.Tensor, expected: truth.Expected) -> None:
    """-inf exactly where no key is seen, close everywhere else."""
    seen = expected.ref64 > -torch.inf
    assert lse.shape == seen.shape
    assert torch.equal(lse.detach().cpu() == -torch.inf, ~seen)
    values = (lse.detach().cpu()[seen], *(x[seen] for x in expected))
    assert_close(values[0], truth.Expected(*values[1:]), "lse")
