"""The truth of `decode`: plain loops in float64 over sequences, queries and heads.

`Call` holds the arguments of one call. What a sequence has is a dictionary from slot to key, value
and position, filled slot by slot from the cache: nothing else of the cache is looked at. ``truth``
is the formula; ``low`` the same in the steps of a fused kernel: exact angles; rotated q and k,
probabilities and the output rounded to the dtype of q, cos, sin and products too or not; cached
float8 numbers exact, their scales and all sums in float32, in any order.
`Case` makes such arguments, `BACKENDS` says who is asked for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import truth
from attention_truth import Attended, assert_lse_close, none_last, sink_last
from cases import CUDA, DTYPE_NAMES, Attending, factors, positions_for
from orders import errors_of_sums, product, worst
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope, decode

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
fp8 = torch.float8_e4m3fn
# One sequence has few elements: it takes as many orders of float32 sums, and as many of the
# roundings that a kernel may choose, to show what they do. See `Call.low`.
ORDERS = range(8)
# What unused slots and entries hold: no test may depend on it.
GARBAGE_BLOCKS = (-1, 2**31 - 1, -(2**31), 10**6)
SPARE_BLOCKS, SPARE_SLOTS = 2, 3
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Backend(Attending):
    """A backend, and whether it takes float8 caches. What is slow gets the small cases."""

    float8: bool = True

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(decode, *args, **kwargs)

    def serves(self, case: Case) -> bool:
        small = not self.slow or self.nearest(case).tiles <= 5
        return small and (self.float8 or not case.float8)


REFERENCE = Backend("reference", "cpu", (fp32, bf16, fp16, fp64))
NATIVE = Backend("native", "cpu", (fp32, bf16, fp16), float8=False)
# Without a GPU the interpreter runs the same kernels on CPU tensors.
TRITON = Backend(
    "triton",
    "cuda" if CUDA else "cpu",
    (bf16, fp16),
    smallest_dim=16,
    slow=not CUDA,
)
# Without a GPU the emulator runs them.
COMPILED = Backend("cuda", "cuda" if CUDA else "cpu", (bf16, fp16), slow=not CUDA)
BACKENDS = [REFERENCE, NATIVE, TRITON, COMPILED]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


class Key(NamedTuple):
    """What a slot holds: k and v (kv_heads, dim) as cached, and the position of the key."""

    k: torch.Tensor
    v: torch.Tensor
    position: int


class Sequence(NamedTuple):
    """The keys of one sequence by slot, the slot of its first query, the factor set of each."""

    keys: dict[int, Key]
    first: int
    kv_start: int
    chosen: tuple[int, ...]

    def seen(self, slot: int, window: int | None) -> list[int]:
        """The slots that a query at ``slot`` sees."""
        past = -1 if window is None else slot - window
        return [j for j in self.keys if past < j <= slot and j >= self.kv_start]


class Call:
    """The arguments of one call of `decode`, on the CPU."""

    def __init__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_lens: torch.Tensor,
        factors: Rope,
        *,
        block_table: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        sets: torch.Tensor | None = None,
        kv_start: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        given = dict(locals())
        self.arguments = {n: x for n, x in given.items() if n != "self" and x is not None}
        self.q, self.rope, self.window, self.softcap = q, factors, window, softcap
        self.scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        self.sums = fp64 if q.dtype == fp64 else fp32
        ones = torch.ones(k_cache.shape[2])
        self.k_scale = ones if k_scale is None else k_scale
        self.v_scale = ones if v_scale is None else v_scale
        self.group = q.shape[2] // max(k_cache.shape[2], 1)
        none = torch.full((q.shape[2],), -torch.inf)
        self.sinks = none if sinks is None else sinks
        self.made: dict[Any, tuple[torch.Tensor, ...]] = {}
        self.sequences = []
        block_size = k_cache.shape[1]
        for b, length in enumerate(cache_lens.tolist()):
            start = 0 if kv_start is None else int(kv_start[b])
            keys = {}
            for j in range(length):
                row, at = b, j
                if block_table is not None:
                    row, at = int(block_table[b, j // block_size]), j % block_size
                n = j - start if key_positions is None else int(key_positions[b, j])
                keys[j] = Key(k_cache[row, at], v_cache[row, at], n)
            first = length - q.shape[1]
            chosen = []
            for t in range(q.shape[1]):
                if sets is not None:
                    chosen.append(int(sets[b]))
                elif lengths is None:  # what the sequence had when it had this query and no other
                    chosen.append(truth.set_of_length(factors, max(first + t + 1 - start, 0)))
                else:
                    given_one = lengths[b] if lengths.dim() == 1 else lengths[b, t]
                    chosen.append(truth.set_of_length(factors, int(given_one)))
            self.sequences.append(Sequence(keys, first, start, tuple(chosen)))

    def _capped(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def _tensors(
        self, b: int, chosen: int, dtype: torch.dtype, rope: Rope
    ) -> tuple[torch.Tensor, ...]:
        """q and k of a sequence, rotated by one set, and v: (q_len, Hq, D), two (keys, Hk, D).

        Each operation is rounded to ``dtype``.
        """
        if (b, chosen, dtype, rope) in self.made:
            return self.made[b, chosen, dtype, rope]
        keys, first, _, _ = self.sequences[b]
        slots = range(first, first + self.q.shape[1])
        # A query before the first slot sees nothing, wherever it stands.
        of_queries = [keys[s].position if s in keys else 0 for s in slots]
        k, v = (torch.stack([key[i] for key in keys.values()]).to(dtype) for i in (0, 1))
        turned = []
        for x, at in ((self.q[b], of_queries), (k, [key.position for key in keys.values()])):
            n = torch.tensor([at], dtype=torch.int64)
            turn = truth.cos_sin(rope, n, torch.full_like(n, chosen))
            turned.append(truth.rotate(x.to(dtype)[None], *turn, rope.interleaved)[0])
        return self.made.setdefault((b, chosen, dtype, rope), (*turned, v))

    def _rounded(self, b: int, chosen: int, order: int) -> tuple[torch.Tensor, ...]:
        """``_tensors`` in the dtype of q, each operation of the rotation rounded or its result."""
        dtype = self.q.dtype
        if order // 2 % 2:
            q, k, v = self._tensors(b, chosen, fp64, held(self.rope, self.sums))
        else:
            q, k, v = self._tensors(b, chosen, dtype, self.rope)
        if order // 4:
            q = _LOG2_E * q.double()  # for exp2 in place of exp
        return tuple(x.to(dtype).to(self.sums) for x in (q, k, v))

    def _empty(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries get that see nothing: 0, and -inf or their sinks."""
        batch, queries, _, _ = self.q.shape
        out = torch.zeros(self.q.shape, dtype=dtype)
        return out, self.sinks.to(dtype)[None, :, None].repeat(batch, 1, queries)

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out (B, q_len, Hq, D) and lse (B, Hq, q_len), float64."""
        return self._truth()[:2]

    def _truth(self) -> tuple[torch.Tensor, ...]:
        """out and lse, and what the order of sums adds to each: see `errors_of_sums`."""
        out, lse = self._empty(fp64)
        out_sums, lse_sums = torch.zeros_like(out), torch.zeros_like(lse)
        for b, sequence in enumerate(self.sequences):
            if not sequence.keys:
                continue
            for t, chosen in enumerate(sequence.chosen):
                q, k, v = self._tensors(b, chosen, fp64, self.rope)
                seen = sequence.seen(sequence.first + t, self.window)
                for h in range(q.shape[1] if seen else 0):
                    g = h // self.group
                    factor = self.scale * self.k_scale[g].double()
                    scores = self._capped(factor * (k[seen, g] @ q[t, h]))
                    scores = sink_last(scores, self.sinks[h].double())
                    values = none_last(self.v_scale[g].double() * v[seen, g])
                    out[b, t, h] = torch.softmax(scores, 0) @ values
                    lse[b, h, t] = torch.logsumexp(scores, 0)
                    out_sums[b, t, h], lse_sums[b, h, t] = errors_of_sums(
                        *(factor * q[t, h], none_last(k[seen, g]), values, scores),
                        *(self.softcap, self.sums),
                    )
        return out, lse, out_sums, lse_sums

    def low(self, order: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``truth``, in the steps of a kernel: out of the dtype of q, lse of the sums.

        The bits of ``order`` choose the scale before or after the product, the roundings of the
        rotation, and a factor in q; all of it, the order of sums and the scale of probabilities.
        """
        out, lse = self._empty(self.sums)
        of_head = torch.arange(self.q.shape[2]) // self.group
        k_scale, v_scale = (
            x.to(self.sums)[of_head, None, None] for x in (self.k_scale, self.v_scale)
        )
        factor = self.scale / (_LOG2_E if order // 4 else 1.0) * k_scale
        for b, sequence in enumerate(self.sequences):
            if not sequence.keys:
                continue
            for chosen in set(sequence.chosen):
                rows = [t for t, one in enumerate(sequence.chosen) if one == chosen]
                # (heads, tokens, dim) each
                q, k, v = (x.transpose(0, 1) for x in self._rounded(b, chosen, order))
                q, k, v = q[:, rows], k[of_head], v[of_head]
                mask = torch.zeros(len(rows), k.shape[1], dtype=torch.bool)
                for row, t in enumerate(rows):
                    mask[row, sequence.seen(sequence.first + t, self.window)] = True
                before = order % 2
                scores = product(factor * q, k, order) if before else factor * product(q, k, order)
                scores = self._capped(scores).masked_fill(~mask, -torch.inf)
                scores = sink_last(scores, self.sinks.to(self.sums)[:, None])
                top = scores.amax(-1, keepdim=True)
                dead = top == -torch.inf
                # An online softmax rounds probabilities that are relative to another maximum.
                top = top.masked_fill(dead, 0.0) + order / 8
                p = torch.exp(scores - top)
                total = p.sum(-1, keepdim=True)
                lse[b][:, rows] = (top + torch.log(total))[..., 0]
                p = p.to(self.q.dtype).to(self.sums)
                o = v_scale * product(p, none_last(v).mT, order) / total.masked_fill(dead, 1.0)
                out[b, rows] = o.transpose(0, 1)
        return out.to(self.q.dtype), lse

    def expected(self) -> Attended:
        """What `decode` must return."""
        out, lse, *sums = self._truth()
        lows = zip(*(self.low(order) for order in ORDERS), strict=True)
        return Attended(*map(worst, (out, lse), lows, sums))


@lru_cache
def held(rope: Rope, dtype: torch.dtype) -> Rope:
    """A Rope with attention factors as a kernel holds them, rounded to the dtype of its sums."""
    rounded = [torch.tensor(s.attention_factor, dtype=fp64).to(dtype).item() for s in rope.sets]
    sets = (replace(s, attention_factor=a) for s, a in zip(rope.sets, rounded, strict=True))
    return replace(rope, sets=tuple(sets))


def assert_decoded(out: torch.Tensor, expected: truth.Expected) -> None:
    """Each sequence by itself: a short one's error would hide a long one's small output."""
    assert out.shape == expected.ref64.shape
    for b in range(out.shape[0]):
        one = truth.Expected(*(x[b] if x.dim() else x for x in expected))
        assert_close(out[b], one, f"out of sequence {b}")
    # A query that sees nothing gets exactly 0.
    assert not out.cpu()[~expected.ref64.any(-1)].any()


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy that compares equal to itself, NaN included."""
    return x.detach().cpu().flatten().clone().view(torch.uint8)


def check(backend: Backend, call: Call) -> torch.Tensor:
    """Decode and compare; nothing given may change, nothing returned may be memory of it."""
    arguments = {name: backend.move(x) for name, x in call.arguments.items()}
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [bits(x) for x in tensors]
    out, lse = backend.decode(**arguments, return_lse=True)
    expected = call.expected()
    assert_decoded(out, expected.out)
    assert lse.dtype == call.sums
    assert_lse_close(lse, expected.lse)
    assert all(torch.equal(bits(x), y) for x, y in zip(tensors, before, strict=True))
    memory = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
    assert out.untyped_storage().data_ptr() not in memory or not out.numel()
    return out


@dataclass(frozen=True)
class Case:
    """One call by numbers. ``block`` 0 is a dense cache; ``pairs`` 0 all of ``dim``.

    ``boundary`` (or ``sets``, one for each sequence) takes a Rope of two sets, the first up to so
    many tokens; two boundaries take one of three. Their thresholds differ. ``lengths`` are one for
    each sequence, or for each query. ``positions`` names what `key_positions` hold, see
    `renumbered`.
    """

    lens: tuple[int, ...] = (9, 17, 1)
    queries: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    pairs: int = 0
    block: int = 0
    dtype: torch.dtype = fp32
    float8: bool = False
    scales: bool = True
    interleaved: bool = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    kv_start: tuple[int, ...] = ()
    positions: str = ""
    boundary: int | tuple[int, int] = 0
    lengths: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()
    sets: tuple[int, ...] = ()
    n_hat: int = 7
    attention_factor: float = 1.19
    index: torch.dtype = torch.int32
    sinks: bool = False

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.lens)) or "none", f"q{self.queries}"]
        parts += [f"H{self.heads}.{self.kv_heads}", f"D{self.dim}"]
        parts += [f"P{self.pairs}"] if self.pairs else []
        parts += [f"block{self.block}"] if self.block else []
        parts += [DTYPE_NAMES[self.dtype]]
        parts += [n for n in ("float8", "interleaved", "sinks") if getattr(self, n)]
        names = ("window", "softcap", "scale", "kv_start", "boundary", "lengths", "sets")
        for name in (*names, "positions", "n_hat", "attention_factor", "index", "scales"):
            value = getattr(self, name)
            if value != getattr(Case, name):
                shown = "+".join(map(str, value)) if isinstance(value, tuple) else value
                parts.append(f"{name}{shown}".replace("torch.", ""))
        return "-".join(parts)

    @property
    def tiles(self) -> int:
        """How many tiles of 16 keys by 16 queries there are."""
        rows = -(-self.heads // self.kv_heads * self.queries // 16)
        return self.kv_heads * rows * sum(max(-(-n // 16), 1) for n in self.lens)

    def rope(self) -> Rope:
        pairs = self.pairs or self.dim // 2
        if not self.boundary and not self.sets:
            one = FactorSet(factors(pairs), self.n_hat, self.attention_factor)
            return Rope(one, interleaved=self.interleaved)
        first, *more = self.boundary if isinstance(self.boundary, tuple) else (self.boundary,)
        short = FactorSet(factors(pairs, 1.25), 0, 1.05, first or 4096)
        middle = (FactorSet(factors(pairs, 1.5), self.n_hat + 3, 1.11, one) for one in more)
        long = FactorSet(factors(pairs, 2.0), self.n_hat, self.attention_factor)
        return Rope((short, *middle, long), interleaved=self.interleaved)

    def _some(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes).to(fp8 if self.float8 else self.dtype)

    def caches(self) -> dict[str, torch.Tensor]:
        """k_cache, v_cache and block_table: NaN wherever no key is, blocks in no order."""
        longest = max(self.lens, default=0)
        sizes = (self.kv_heads, self.dim)
        if self.block:
            counts = [-(-length // self.block) for length in self.lens]
            order = torch.randperm(sum(counts) + SPARE_BLOCKS).tolist()
            tables = []
            for b, count in enumerate(counts):
                unused = -(-longest // self.block) + SPARE_BLOCKS - count
                garbage = [GARBAGE_BLOCKS[(b + i) % len(GARBAGE_BLOCKS)] for i in range(unused)]
                tables.append(order[:count] + garbage)
                order = order[count:]
            sizes = (sum(counts) + SPARE_BLOCKS, self.block, *sizes)
        else:
            sizes = (len(self.lens), longest + SPARE_SLOTS, *sizes)
        made = {}
        for name in ("k_cache", "v_cache"):
            cache = nans(sizes, fp8 if self.float8 else self.dtype)
            for b, length in enumerate(self.lens):
                values = self._some(length, *sizes[2:])
                for i, part in enumerate(same(values).split(self.block or longest + 1)):
                    row = tables[b][i] if self.block and length else b
                    same(cache)[row, : len(part)] = part
            made[name] = cache
        if self.block:
            shape = (len(self.lens), -(-longest // self.block) + SPARE_BLOCKS)
            made["block_table"] = torch.tensor(tables, dtype=torch.int32).reshape(shape)
        return made

    def call(self) -> Call:
        """All arguments; no defaults."""
        batch = len(self.lens)
        q = torch.randn(batch, self.queries, self.heads, self.dim).to(self.dtype)
        made: dict[str, Any] = self.caches()
        cache_lens = torch.tensor(self.lens, dtype=self.index)
        if self.float8 and self.scales:
            made["k_scale"] = 0.4 + torch.rand(self.kv_heads)
            made["v_scale"] = 0.4 + torch.rand(self.kv_heads)
        for name in ("kv_start", "lengths"):
            if getattr(self, name):
                made[name] = torch.tensor(getattr(self, name), dtype=self.index)
        if self.sets:
            made["sets"] = torch.tensor(self.sets, dtype=torch.int32)
        if self.positions:
            made["key_positions"] = renumbered(self.positions, self.lens, self.n_hat, self.index)
        for name in ("window", "softcap"):
            if getattr(self, name) is not None:
                made[name] = getattr(self, name)
        if self.scale is not None:
            made["softmax_scale"] = self.scale
        if self.sinks:
            made["sinks"] = 1.0 + 2.0 * torch.randn(self.heads)
        return Call(q, made.pop("k_cache"), made.pop("v_cache"), cache_lens, self.rope(), **made)


def same(x: torch.Tensor) -> torch.Tensor:
    """float8 as its bits, which torch can move about."""
    return x.view(torch.uint8) if x.dtype == fp8 else x


def nans(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """NaN in any dtype; that of float8_e4m3fn is 0x7f."""
    if dtype == fp8:
        return torch.full(sizes, 0x7F, dtype=torch.uint8).view(fp8)
    return torch.full(sizes, torch.nan, dtype=dtype)


def renumbered(kind: str, lens: tuple[int, ...], n_hat: int, dtype: torch.dtype) -> torch.Tensor:
    """key_positions (batch, slots), one slot more than used; garbage past each length.

    "sinks": 4 tokens stay, the rest moves up; "top": the last key stands at 2**31 - 1; "any": no
    order, of either sign.
    """
    slots = max(lens, default=0) + 1
    garbage = torch.iinfo(dtype).max
    made = torch.full((len(lens), slots), garbage, dtype=dtype)
    for b, length in enumerate(lens):
        j = torch.arange(length)
        if kind == "sinks":
            made[b, :length] = torch.where(j < 4, j, j + 1000)
        elif kind == "top":
            made[b, :length] = 2**31 - length + j
        else:
            made[b, :length] = positions_for(length, n_hat, dtype)
    return made


def every_case(cases: list[Case]) -> pytest.MarkDecorator:
    """``backend`` and ``case``: each case on each backend that serves it, in a dtype it takes."""
    pairs: dict[str, Any] = {}
    for backend in BACKENDS:
        for case in cases:
            if backend.serves(case):
                served = backend.nearest(case)
                pairs[f"{backend}-{served}"] = (backend, served)
    params = [pytest.param(*pair, id=name) for name, pair in pairs.items()]
    return pytest.mark.parametrize(("backend", "case"), params)
