"""What decodes: this package over each kind of cache, its kernel without rotation, and torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import decode_peers as peers
import torch
from copies import Copies
from measure import Ceiling
from parameters import LLAMA, Geometry
from ropes import DEVICE, EXACT, FAST, backend_missing, normal, not_importable, plain_rope, rope

from longrope_kernels import apply_rotary, decode
from longrope_kernels.backends import choose as backends
from longrope_kernels.backends import reference
from longrope_kernels.calls.records import DecodeCall, Keys, Scores, Selection
from longrope_kernels.rope.tables import no_pairs

BLOCK = 64
FLOAT8 = torch.float8_e4m3fn
KINDS = {"dense": "", "paged": ", paged", "float8": ", paged float8"}
# Ours: (backend, kind of cache). The mixed batches of `Shape` take a set each in all of them.
OURS = {
    name + suffix: (name, kind)
    for kind, suffix in KINDS.items()
    for name in backends.DECODE_DTYPES
    if (name, kind) != ("native", "float8")
}
# The same kernel on rotated keys, by the row that rotates them.
NO_ROTATION = {f"triton{suffix}": f"triton, rotated keys{suffix}" for suffix in KINDS.values()}
SDPA = "SDPA, rotated keys"
GATHERED = "SDPA, keys gathered and rotated, paged"
FLASHINFER = "FlashInfer, ROPE_LLAMA"
FLASHINFER_PAGED = "FlashInfer, rotated keys, paged"
_KIND_OF = {
    **{name: kind for name, (_, kind) in OURS.items()},
    **{name: OURS[of][1] for of, name in NO_ROTATION.items()},
    FLASHINFER_PAGED: "paged",
    GATHERED: "paged",
}
NAMES = (SDPA, GATHERED, *NO_ROTATION.values(), *OURS, FLASHINFER, FLASHINFER_PAGED)
PEERS = (SDPA, GATHERED, FLASHINFER, FLASHINFER_PAGED)
CEILING = "copy" if DEVICE.type == "cuda" else "read"


class Shape(NamedTuple):
    """One step: the last queries of each sequence against its keys, a chunk of a prompt if many."""

    lengths: tuple[int, ...]
    dtype: torch.dtype
    geometry: Geometry = LLAMA
    queries: int = 1

    def __str__(self) -> str:
        count, longest = len(self.lengths), max(self.lengths)
        batch = f"{count} x {longest}" if len(set(self.lengths)) == 1 else f"{count} to {longest}"
        chunk = f", {self.queries} queries" if self.queries > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{batch} keys{chunk}, {dtype}{self.geometry.suffix}"

    @property
    def keys(self) -> int:
        return sum(self.lengths)

    @property
    def flops(self) -> int:
        ahead = len(self.lengths) * self.queries * (self.queries - 1) // 2
        seen = self.queries * self.keys - ahead
        return 4 * self.geometry.q_heads * self.geometry.dim * seen

    def traffic(self, name: str) -> int:
        """Bytes of a row: keys and values read once, q and the output."""
        of = self.geometry
        itemsize = (FLOAT8 if kind_of(name) == "float8" else self.dtype).itemsize
        rows = len(self.lengths) * self.queries * of.q_heads
        queries = 2 * rows * of.dim * self.dtype.itemsize
        return 2 * of.k_heads * of.dim * self.keys * itemsize + queries


def kind_of(name: str) -> str:
    """The cache of a row."""
    return _KIND_OF.get(name, "dense")


@cache
def missing(name: str) -> str | None:
    """Why it cannot run here, or None."""
    if name in OURS:
        return backend_missing(OURS[name][0])
    if name in NO_ROTATION.values():
        return backend_missing("triton")
    if name in (FLASHINFER, FLASHINFER_PAGED):
        return not_importable("flashinfer") or (None if DEVICE.type == "cuda" else "needs a GPU")
    return None


@lru_cache(maxsize=1)
def make_copies(shape: Shape) -> Copies[Inputs]:
    """The inputs of all rows of one shape, which follow one another."""
    return Copies(lambda: Inputs(shape), shape.traffic(SDPA))


class Inputs:
    """Normal q, k and v; caches of each kind with the same keys, and what must come out."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        of = shape.geometry
        batch, capacity = len(shape.lengths), -(-max(shape.lengths) // BLOCK) * BLOCK
        self.q = normal(batch, shape.queries, of.q_heads, of.dim, dtype=shape.dtype, seed=0)
        self.k, self.v = (
            normal(batch, capacity, of.k_heads, of.dim, dtype=shape.dtype, seed=seed)
            for seed in (1, 2)
        )
        self.lens = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)
        self.rope = rope(of.rotated).to(DEVICE)
        order = torch.randperm(
            batch * capacity // BLOCK, generator=torch.Generator().manual_seed(3)
        )
        self.table = order.to(DEVICE).view(batch, -1).to(torch.int32)
        # The first and the last KV head, and the query heads that read them.
        groups = of.q_heads // of.k_heads
        self.kv_heads = [0, of.k_heads - 1]
        self.q_heads = [h * groups + g for h in self.kv_heads for g in range(groups)]

    @cached_property
    def truth(self) -> torch.Tensor:
        """The output of `q_heads` in float64."""
        return self._truth(self.rope)

    @cached_property
    def plain_truth(self) -> torch.Tensor:
        """The same by plain RoPE."""
        return self._truth(plain_rope(self.shape.geometry.rotated).to(DEVICE))

    @cached_property
    def truth_of_float8(self) -> torch.Tensor:
        """The same of a cache in float8: its rows do not answer for the rounding of their input."""
        return self._truth(self.rope, FLOAT8)

    @cached_property
    def truth_of_rotated_float8(self) -> torch.Tensor:
        """The same of a float8 cache of keys that were rotated before, so that nothing turns."""
        q, k = self.rotated
        keys = Keys(*self._checked(k, FLOAT8), lens=self.lens)
        return reference.decode(_unrotated(q[:, :, self.q_heads].double(), keys))[0]

    def truth_of(self, name: str) -> torch.Tensor:
        """What is right of a row."""
        if name == FLASHINFER:
            return self.plain_truth
        if kind_of(name) != "float8":
            return self.truth
        return self.truth_of_float8 if name in OURS else self.truth_of_rotated_float8

    def _truth(self, turn: Any, dtype: torch.dtype | None = None) -> Any:
        q = self.q[:, :, self.q_heads].double()
        keys = self._checked(self.k, dtype)
        return decode(q, *keys, self.lens, turn, lengths=self.lens, backend="reference")

    def _checked(self, k: torch.Tensor, dtype: torch.dtype | None) -> list[torch.Tensor]:
        """k and v of `kv_heads` in float64, rounded to ``dtype`` before."""
        return [x[:, :, self.kv_heads].to(dtype or x.dtype).double() for x in (k, self.v)]

    def cache(self, kind: str, k: torch.Tensor) -> Keys:
        """Keys k, as they are or `rotated`, and the values in a cache of a kind."""
        if kind == "dense":
            return Keys(k, self.v, lens=self.lens)
        pages = self.in_pages if k is self.k else (self.rotated_pages, self.in_pages[1])
        if kind == "float8":
            pages = tuple(x.to(FLOAT8) for x in pages)
        return Keys(*pages, lens=self.lens, block_table=self.table)

    @cached_property
    def in_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache in blocks."""
        return self.paged(self.k), self.paged(self.v)

    @cached_property
    def rotated_pages(self) -> torch.Tensor:
        """The rotated keys in blocks."""
        return self.paged(self.rotated[1])

    @cached_property
    def into(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the ceilings of all rows copy the cache to."""
        return torch.zeros_like(self.k), torch.zeros_like(self.v)

    def paged(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, capacity, ...) in blocks, where the table says."""
        pages = torch.empty_like(x).view(-1, BLOCK, *x.shape[2:])
        pages[self.table.flatten().long()] = x.view_as(pages)
        return pages

    @cached_property
    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k rotated, for those who do not rotate: q (batch, queries), k (batch, capacity)."""
        return self.turned_q(), self.turned_k(self.k)

    def turned_q(self) -> torch.Tensor:
        """q rotated, each sequence by the set of its length."""
        back = torch.arange(-self.shape.queries, 0, device=DEVICE)
        positions = self.lens.long()[:, None] + back
        return apply_rotary(self.q, None, positions, self.rope, lengths=self.lens)[0]

    def turned_k(self, k: torch.Tensor) -> torch.Tensor:
        """k (batch, slots, ...) rotated likewise, from the first slot on."""
        positions = torch.arange(k.shape[1], device=DEVICE)
        return apply_rotary(k, None, positions, self.rope, lengths=self.lens)[0]


def implementation(name: str, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A function of no arguments: the output (batch, queries, 32, 128)."""
    lengths = inputs.shape.lengths
    if name == SDPA:
        return peers.sdpa(*inputs.rotated, inputs.v, inputs.lens, lengths)
    if name == GATHERED:
        turned, pages = (inputs.turned_q, inputs.turned_k), inputs.in_pages
        sizes = inputs.shape.queries, max(lengths)
        return peers.gathered(*turned, *pages, inputs.table, inputs.lens, *sizes)
    if name in NO_ROTATION.values():
        return _without_rotation(inputs, kind_of(name))
    if name == FLASHINFER:
        return peers.flashinfer_fused(inputs.q, inputs.k, inputs.v, lengths[0])
    if name == FLASHINFER_PAGED:
        cache = inputs.cache("paged", inputs.rotated[1])
        return peers.flashinfer_paged(inputs.rotated[0][:, 0], cache, lengths)
    backend, kind = OURS[name]
    of = inputs.cache(kind, inputs.k)
    # A chunk takes one set, that of its prompt, as the keys that others rotate before.
    chosen = inputs.lens if inputs.shape.queries > 1 else None

    def run() -> Any:
        given = inputs.q, of.k, of.v, of.lens, inputs.rope
        return decode(*given, block_table=of.block_table, lengths=chosen, backend=backend)

    return run


def _unrotated(q: torch.Tensor, keys: Keys) -> DecodeCall:
    """A call that turns nothing."""
    return DecodeCall(q, keys, no_pairs(q.device), Selection(), Scores(True, q.shape[3] ** -0.5))


def _without_rotation(inputs: Inputs, kind: str) -> Callable[[], torch.Tensor]:
    """The same kernel, planned with no pairs, on rotated keys."""
    from longrope_kernels.backends.triton import decode as triton_decode

    q, k = inputs.rotated
    call = _unrotated(q, inputs.cache(kind, k))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)

    def run() -> torch.Tensor:
        out = torch.empty_like(q)
        triton_decode.decode(call, out, lse)
        return out

    return run


def serves(name: str, shape: Shape) -> bool:
    """Whether it has this call."""
    chunk = shape.queries > 1
    if name == GATHERED:
        return chunk
    if chunk and (name in (FLASHINFER, FLASHINFER_PAGED) or OURS.get(name, (None,))[0] == "cuda"):
        return False
    if name == FLASHINFER:
        whole = shape.geometry.rotated == shape.geometry.dim
        return len(shape.lengths) == 1 and whole and shape.dtype != torch.float32
    if name == FLASHINFER_PAGED:
        return shape.dtype != torch.float32
    of = "triton" if name in NO_ROTATION.values() else OURS.get(name, (None,))[0]
    return of is None or shape.dtype in backends.DECODE_DTYPES[of]


def allowed(name: str, inputs: Inputs) -> float:
    """The largest error, relative to the largest value of the truth of the same sequence.

    Two roundings of the result and two of what is rounded on the way, to the dtype of q; and what
    float32 angles and sums over so many keys make.
    """
    eps = torch.finfo(inputs.shape.dtype).eps
    longest = max(inputs.shape.lengths)
    angles = FAST if name == FLASHINFER else EXACT
    return 4 * eps + (longest**0.5 + angles * longest) * torch.finfo(torch.float32).eps


def reading(name: str, inputs: Inputs) -> Ceiling:
    """The cache of a row read and nothing else; on a GPU, a dense one copied."""
    kv = (inputs.k, inputs.v)
    amount = sum(x.numel() * x.element_size() for x in kv)
    if CEILING == "copy":
        into = inputs.into
        return Ceiling(
            CEILING, lambda: [a.copy_(b) for a, b in zip(into, kv, strict=True)], 2 * amount
        )
    # The very memory: of two caches, the processor's would hold the one that was read last.
    held = inputs.in_pages if kind_of(name) == "paged" else kv
    words = [x.view(torch.int32).flatten() for x in held]
    return Ceiling(CEILING, lambda: [x.max() for x in words], amount)
