"""What `longrope tune` searches: the entries of the tables, and candidates for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# The launches of each kernel; "dk_dv" is in the place of "dk" and "dv".
KERNELS = {
    "forward-prepass": ("prepass",),
    "forward-registers": ("registers",),
    "backward": ("dk_dv", "dk", "dv", "dq"),
}
_BY_KEYS = ("dk_dv", "dk", "dv")


@dataclass(frozen=True)
class Task:
    """What is tuned: the kernels (of `KERNELS`) for each head_dim, on one sequence.

    Attributes:
        causal: the masks that are timed.
        seq: keys, and queries but for "forward-registers", which has few.
        heads, kv_heads: of q, and of k and v.
        dtype: bfloat16 or float16.
        budget: seconds for everything.
    """

    head_dims: tuple[int, ...] = (64, 80, 96, 128, 256)
    kernels: tuple[str, ...] = tuple(KERNELS)
    causal: tuple[bool, ...] = (False, True)
    seq: int = 8192
    heads: int = 32
    kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16
    budget: float = 600.0


class Entry(NamedTuple):
    """A place in a table: a launch for a head_dim, and the masks (causal or not) it serves."""

    dim: int
    launch: str
    causal: tuple[bool, ...]


def entries(task: Task) -> list[Entry]:
    """What there is to tune. The table has an entry for each mask only for "prepass"."""
    found = []
    for dim in task.head_dims:
        for kernel in task.kernels:
            for launch in KERNELS[kernel]:
                masks = [(c,) for c in task.causal] if launch == "prepass" else [task.causal]
                found += [Entry(dim, launch, mask) for mask in masks]
    return found


def least_shared(launch: str, config: Any, dim: int, itemsize: int, arch: int) -> int:
    """Bytes of shared memory that a program needs at least.

    Two tensors come in tiles through a pipeline, which holds a tile less than it has stages; those
    of 9.0 and 10.x read the tensors that stay from shared memory too.
    """
    coming, staying = config.block_n, config.block_m
    if launch in _BY_KEYS:
        coming, staying = staying, coming
    count = 1 if launch in ("prepass", "registers", "dv") else 2
    count *= 90 <= arch < 120
    tiles = 2 * (config.stages - 1) if config.stages > 1 else 1
    return int(tiles * coming + count * staying) * dim * itemsize


def _fits_registers(launch: str, config: Any, dim: int, arch: int) -> bool:
    """Whether the accumulators and one product fit; 10.x keeps them in a memory of their own."""
    rows = config.block_n if launch in _BY_KEYS else config.block_m
    accumulators = rows * dim * (2 if launch == "dk_dv" else 1)
    product = config.block_m * config.block_n
    return arch // 10 == 10 or accumulators + product <= 255 * 32 * config.warps


def list_candidates(entry: Entry, arch: int, shared: int, itemsize: int) -> list[Any]:
    """The configurations that may fit.

    Args:
        entry: whose candidates.
        arch: compute capability, 90 for 9.0.
        shared: bytes of shared memory that a program may have.
        itemsize: of the inputs, in bytes.
    """
    from ..kernels.attention_tiles import Config

    # The tiles that stay, and those that come.
    staying: tuple[int, ...] = (64, 128) if entry.dim <= 128 else (32, 64, 128)
    coming: tuple[int, ...] = (16, 32, 64, 128)
    by_keys = entry.launch in _BY_KEYS
    rows, columns = (coming, staying) if by_keys else (staying, coming)
    all_of_them = (
        Config(block_m, block_n, warps, stages)
        for block_m in rows
        for block_n in columns
        for warps in (4, 8)
        for stages in ((1, 2, 3) if by_keys else (2, 3, 4))
    )
    return [
        config
        for config in all_of_them
        if least_shared(entry.launch, config, entry.dim, itemsize, arch) <= shared
        and _fits_registers(entry.launch, config, entry.dim, arch)
    ]
