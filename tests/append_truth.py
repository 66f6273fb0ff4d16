"""The truth of `append`: token by token, byte by byte, into a copy of the memory.

float8 comes from a list of the numbers that it has, not from torch's conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import COMPILED, DTYPE_NAMES, NATIVE, REFERENCE, TRITON, Target
from decode_truth import GARBAGE_BLOCKS, Backend, Call, assert_decoded, fp8, fp64, nans, same

from longrope_kernels import append, decode

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = [REFERENCE, NATIVE, TRITON, COMPILED]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)

# The numbers of e4m3fn from 0 to 448, by their codes.
NUMBERS = torch.tensor(
    [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)]
)[:127].double()


def float8_codes(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The nearest number of e4m3fn to each of x (..., heads, dim), the even code of two: uint8."""
    x = x.float() if scale is None else x.float() / scale[:, None]
    size = x.double().abs().clamp(max=448.0)
    above = torch.searchsorted(NUMBERS, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = NUMBERS[above] - size, size - NUMBERS[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = torch.where(x.isnan(), 0x7F, code)
    return (code + 128 * x.signbit()).to(torch.uint8)


@dataclass(frozen=True)
class Case:
    """One call by numbers. ``lens`` count the new tokens; ``block`` 0 is a dense cache.

    mapping: a ``slot_mapping`` in place of lengths, with dropped tokens; "packed" for tokens in one
    row. source: how k and v lie, "dense", "fused" (one projection of q, k and v), "bhsd". storage:
    "apart", "one" (k and v of a block side by side, as vLLM has them), "odd" (rows that begin
    between pieces of 16 bytes), "wide" (strides of nothing).
    """

    lens: tuple[int, ...] = (9, 17, 1)
    new: int = 1
    heads: int = 2
    dim: int = 32
    block: int = 0
    dtype: torch.dtype = bf16
    float8: bool = False
    scales: bool = True
    mapping: str = ""
    source: str = "dense"
    storage: str = "apart"
    index: torch.dtype = torch.int32

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.lens)) or "none", f"n{self.new}", f"H{self.heads}"]
        parts += [f"D{self.dim}", DTYPE_NAMES[self.dtype]]
        parts += [f"block{self.block}"] if self.block else []
        parts += ["float8"] if self.float8 else []
        parts += [] if self.scales else ["unscaled"]
        parts += [f"mapping{self.mapping}"] if self.mapping else []
        parts += [x for x in (self.source, self.storage) if x not in ("dense", "apart")]
        return "-".join(parts + (["int64"] if self.index == torch.int64 else []))

    def _new(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch, new, heads, dim = len(self.lens), self.new, self.heads, self.dim
        if self.source == "fused":
            x = torch.randn(batch, new, 3 * heads + 1, dim).to(self.dtype)
            return x[:, :, heads : 2 * heads], x[:, :, 2 * heads : 3 * heads]
        if self.source == "bhsd":
            k, v = (torch.randn(batch, heads, new, dim).to(self.dtype) for _ in "kv")
            return k.transpose(1, 2), v.transpose(1, 2)
        k, v = (3.0 * torch.randn(batch, new, heads, dim).to(self.dtype) for _ in "kv")
        return k, v

    def _caches(self, rows: int, slots: int) -> list[torch.Tensor]:
        dtype = fp8 if self.float8 else self.dtype
        heads, dim = self.heads, self.dim
        if self.storage == "one":
            both = same(nans((rows, 2, slots, heads, dim), dtype))
            return [both[:, i].view(dtype) for i in (0, 1)]
        if self.storage == "odd":
            return [
                same(nans((rows, slots, heads, dim + 3), dtype))[..., 1:-2].view(dtype)
                for _ in "kv"
            ]
        if self.storage == "wide":
            made = [same(nans((rows + 1, heads + 1, slots + 2, 2 * dim), dtype)) for _ in "kv"]
            return [x[1:, 1:, 1:-1, :dim].transpose(1, 2).view(dtype) for x in made]
        return [nans((rows, slots, heads, dim), dtype) for _ in "kv"]

    def arguments(self) -> dict[str, Any]:
        """All arguments; nothing is where no key is, blocks are in no order."""
        k, v = self._new()
        batch, longest = len(self.lens), max(self.lens, default=0)
        lens = torch.tensor(self.lens, dtype=self.index)
        made: dict[str, Any] = {"k": k, "v": v}
        rows, slots = batch, longest + 3
        if self.block:
            columns = -(-longest // self.block) + 1
            rows, slots = batch * columns + 2, self.block
            order = torch.randperm(rows).tolist()
            table = [order[b * columns : (b + 1) * columns] for b in range(batch)]
            for b, length in enumerate(self.lens):
                for j in range(columns):  # entries of other slots are not read
                    if not length - self.new < (j + 1) * self.block or j * self.block >= length:
                        table[b][j] = GARBAGE_BLOCKS[(b + j) % len(GARBAGE_BLOCKS)]
        made["k_cache"], made["v_cache"] = self._caches(rows, slots)
        if self.mapping:
            mapping = torch.randperm(rows * slots)[: batch * self.new].view(batch, self.new)
            mapping = mapping.to(self.index)
            mapping[torch.rand(mapping.shape) < 0.3] = -1
            if self.mapping == "packed":
                mapping, made["k"], made["v"] = (x.flatten(0, 1) for x in (mapping, k, v))
            made["slot_mapping"] = mapping
        else:
            made["cache_lens"] = lens
            if self.block:
                made["block_table"] = torch.tensor(table, dtype=torch.int32).view(batch, -1)
        if self.float8 and self.scales:
            made["k_scale"] = 0.01 + torch.rand(self.heads)
            made["v_scale"] = 0.01 + torch.rand(self.heads)
        return made


def expected(given: dict[str, Any]) -> list[torch.Tensor]:
    """The bytes of all memory of k_cache and of v_cache after `append`."""
    result = []
    for name in ("k", "v"):
        cache, x = given[f"{name}_cache"], given[name]
        memory = same(cache).untyped_storage()
        whole = torch.empty(0, dtype=same(cache).dtype).set_(memory).clone()
        result.append(whole)
    for i, name in enumerate(("k", "v")):
        cache, x = same(given[f"{name}_cache"]), given[name]
        one = result[0] if _share(given) else result[i]
        into = one.as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for token, (row, slot) in places(given).items():
            new = x[token]
            if given["k_cache"].dtype == fp8:
                new = float8_codes(new, given.get(f"{name}_scale"))
            into[row, slot] = new
    return [result[0], result[0] if _share(given) else result[1]]


def _share(given: dict[str, Any]) -> bool:
    k, v = (given[name].untyped_storage().data_ptr() for name in ("k_cache", "v_cache"))
    return bool(k == v)


def places(given: dict[str, Any]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Where each token goes, by its index in k: a row or block of the cache, and a slot."""
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    size, leading = given["k_cache"].shape[1], given["k"].shape[:-2]
    for token in torch.cartesian_prod(*map(torch.arange, leading)).view(-1, len(leading)).tolist():
        if "slot_mapping" in given:
            address = int(given["slot_mapping"][tuple(token)])
            if address >= 0:
                found[tuple(token)] = divmod(address, size)
            continue
        b, t = token
        slot = int(given["cache_lens"][b]) - leading[1] + t
        if slot >= 0:
            found[b, t] = (b, slot)
            if "block_table" in given:
                found[b, t] = (int(given["block_table"][b, slot // size]), slot % size)
    return found


def memory(x: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage of x, on the host."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).cpu()


def check(backend: Target, given: dict[str, Any]) -> None:
    """Append, and compare every byte that could have changed."""
    wanted = [x.view(torch.uint8) for x in expected(given)]
    moved = {name: backend.move(x) for name, x in given.items()}
    if _share(given):  # on a device, too
        x = given["v_cache"]
        storage = torch.empty(0, dtype=x.dtype, device=moved["k_cache"].device)
        storage.set_(moved["k_cache"].untyped_storage())
        moved["v_cache"] = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    assert append(**moved, backend=backend.backend) is None
    for name, bytes_ in zip(("k_cache", "v_cache"), wanted, strict=True):
        assert torch.equal(memory(moved[name]), bytes_), name


def without_newest(call: Call, new: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The arguments, less the last keys of each sequence, which come as (batch, new, ...).

    Their slots hold NaN.
    """
    given = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in call.arguments.items()}
    k_cache, v_cache = given["k_cache"], given["v_cache"]
    shape = (len(call.sequences), new, *k_cache.shape[2:])
    taken = [torch.zeros(shape, dtype=torch.float32) for _ in "kv"]
    size, table = k_cache.shape[1], given.get("block_table")
    for b, length in enumerate(given["cache_lens"].tolist()):
        for t in range(new):
            j = length - new + t
            if j < 0:
                continue
            at = (b, j) if table is None else (int(table[b, j // size]), j % size)
            for x, one, scale in zip(
                taken, (k_cache, v_cache), ("k_scale", "v_scale"), strict=True
            ):
                factor = given[scale][:, None] if scale in given else 1.0
                x[b, t] = one[at].float() * factor
                same(one)[at] = 0x7F if one.dtype == fp8 else torch.nan
    dtype = fp32 if k_cache.dtype == fp8 else k_cache.dtype
    return given, taken[0].to(dtype), taken[1].to(dtype)


def check_decode(backend: Backend, call: Call, new: int) -> None:
    """Append the newest keys of each sequence and attend, at once; all bytes as in the call."""
    given, k_new, v_new = without_newest(call, new)
    moved = {name: backend.move(x) for name, x in given.items()}
    out = decode(
        **moved,
        k_new=backend.move(k_new),
        v_new=backend.move(v_new),
        backend=backend.backend,
    )
    assert_decoded(out, call.expected().out)
    for name in ("k_cache", "v_cache"):  # a quotient of a product is the number again
        assert torch.equal(memory(moved[name]), memory(call.arguments[name]))


__all__ = [
    "BACKENDS",
    "Case",
    "check",
    "check_decode",
    "every_backend",
    "fp8",
    "fp64",
    "without_newest",
]
