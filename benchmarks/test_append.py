"""Writing new keys and values into a paged cache, next to index_put.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option it is a check that
everything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import speeds
import torch
from clock import CLOCK
from copies import Copies, Prepared
from measure import Ceiling, Timed, measure, require_memory
from parameters import GPU, LLAMA
from ropes import DEVICE, WrongResultError, backend_missing, normal
from table import Row, Table, median_of

from longrope_kernels import append
from longrope_kernels.backends import choose as backends

BLOCK, BLOCKS = 64, 256
FLOAT8 = torch.float8_e4m3fn
INDEX_PUT = "index_put"
KINDS: dict[str, torch.dtype] = {"": torch.bfloat16, ", float8": FLOAT8}
# (backend or None for index_put, dtype of the cache) by name.
ROWS_OF = {
    (INDEX_PUT if backend is None else backend) + kind: (backend, dtype)
    for kind, dtype in KINDS.items()
    for backend in (None, *backends.DECODE_DTYPES)
}
NOT_TIMED = {
    name: reason
    for name, (backend, _) in ROWS_OF.items()
    if backend is not None and (reason := backend_missing(backend))
}
# Tokens of one step of a batch, and of a prompt.
TOKENS = [(0, 32), (0, 8192 if GPU else 1024)]
TABLE = Table(
    "new keys and values of 8 heads of 128 into a paged cache, bfloat16, medians",
    "GB/s",
    1e9,
    "of copy",
    f"x {INDEX_PUT}",
    "of copy: median ratio to copying k and v, timed before each round; float8: to that cache",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 0.3


class Inputs(NamedTuple):
    """Keys and values of tokens, where they go, a cache of each dtype and what the copy writes."""

    k: torch.Tensor
    v: torch.Tensor
    mapping: torch.Tensor
    caches: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]
    scale: torch.Tensor
    into: tuple[torch.Tensor, torch.Tensor]


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        pytest.param(n, name, id=f"append-{n}-{name}", marks=pytest.mark.less_important(rank))
        for rank, n in TOKENS
        for name in ROWS_OF
        if name not in NOT_TIMED
    ],
)
def test_append(benchmark: Any, request: pytest.FixtureRequest, tokens: int, name: str) -> None:
    benchmark.group = f"append, {tokens} tokens"

    def prepare(name: str) -> Timed:
        require_memory(16 * BLOCK * BLOCKS * LLAMA.k_heads * LLAMA.dim)
        copies = make_copies(tokens)
        timed = copies.in_turn(lambda inputs: _prepared(name, inputs))
        return Timed(*timed, copies.ceiling(_copying), traffic(tokens, ROWS_OF[name][1]))

    found = measure(benchmark, request, prepare, (), SECONDS_A_ROW)
    if found is None:
        return
    peer = name.replace(str(ROWS_OF[name][0]), INDEX_PUT)
    of_peer = found.median if name == peer else median_of(ROWS, benchmark.group, peer)
    row = Row(benchmark.group, name, found.median, found.amount, found.fraction, of_peer)
    ROWS.append(row)
    benchmark.extra_info.update(
        work="append",
        kind=str(ROWS_OF[name][1])[6:],
        tokens=tokens,
        copies=len(make_copies(tokens).all),
        **speeds.told(found, "copy", found.amount, None),
        speedup_over_index_put=row.speedup,
    )


def traffic(tokens: int, stored: torch.dtype) -> int:
    """Bytes read and written once."""
    numbers = 2 * tokens * LLAMA.k_heads * LLAMA.dim
    return numbers * (torch.bfloat16.itemsize + stored.itemsize)


@lru_cache(maxsize=1)
def make_copies(tokens: int) -> Copies[Inputs]:
    """The inputs of all rows of one size, which follow one another."""

    def make() -> Inputs:
        shape = (tokens, LLAMA.k_heads, LLAMA.dim)
        k, v = (normal(*shape, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        generator = torch.Generator().manual_seed(2)
        mapping = torch.randperm(BLOCK * BLOCKS, generator=generator)[:tokens].to(DEVICE)
        caches = {}
        for dtype in KINDS.values():
            made = [torch.zeros(BLOCKS, BLOCK, *shape[1:], device=DEVICE) for _ in "kv"]
            caches[dtype] = made[0].to(dtype), made[1].to(dtype)
        scale = torch.full((LLAMA.k_heads,), 0.02, device=DEVICE)
        return Inputs(k, v, mapping, caches, scale, (torch.zeros_like(k), torch.zeros_like(v)))

    return Copies(make, traffic(tokens, torch.bfloat16))


def _copying(inputs: Inputs) -> Ceiling:
    pairs = list(zip(inputs.into, (inputs.k, inputs.v), strict=True))
    amount = traffic(len(inputs.k), torch.bfloat16)
    return Ceiling("copy", lambda: [a.copy_(b) for a, b in pairs], amount)


def _prepared(name: str, inputs: Inputs) -> Prepared:
    """What to time, after its result was checked; it takes no arguments."""
    run = _implementation(name, inputs)
    run()
    _, dtype = ROWS_OF[name]
    places = inputs.mapping // BLOCK, inputs.mapping % BLOCK
    for what, x, cache in zip("kv", (inputs.k, inputs.v), inputs.caches[dtype], strict=True):
        held = cache.view(torch.uint8 if dtype == FLOAT8 else dtype)[places].view(dtype)
        right = (x.float() / inputs.scale[:, None]).clamp(-448, 448) if dtype == FLOAT8 else x
        if not torch.equal(held.float(), right.to(dtype).float()):
            raise WrongResultError(f"{name}: {what} is not what was to be written")
        cache.zero_()
    return run, tuple


def _implementation(name: str, inputs: Inputs) -> Callable[[], Any]:
    backend, dtype = ROWS_OF[name]
    k_cache, v_cache = inputs.caches[dtype]
    if backend is not None:
        scales = {"k_scale": inputs.scale, "v_scale": inputs.scale} if dtype == FLOAT8 else {}
        given = (inputs.k, inputs.v, k_cache, v_cache)
        return lambda: append(*given, slot_mapping=inputs.mapping, **scales, backend=backend)
    bytes_ = torch.uint8 if dtype == FLOAT8 else dtype

    def run() -> None:
        for x, cache in ((inputs.k, k_cache), (inputs.v, v_cache)):
            if dtype == FLOAT8:
                x = (x.float() / inputs.scale[:, None]).clamp(-448, 448).to(dtype)
            places = inputs.mapping // BLOCK, inputs.mapping % BLOCK
            cache.view(bytes_).index_put_(places, x.view(bytes_))

    return run
