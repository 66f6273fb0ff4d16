"""Where tensors lie, and whether strided views share memory, without touching the data."""

from __future__ import annotations

from itertools import combinations, product

import torch

from ..torch_private import innermost, transformed

try:
    from .._native import clearly_apart as clearly_apart
except ImportError:

    def clearly_apart(written: tuple[torch.Tensor, ...], read: tuple[torch.Tensor, ...], /) -> bool:
        """Whether one look says that tensors lie apart; without the extension none does."""
        return False


def device_type(x: torch.Tensor) -> str:
    """As ``x.device.type``, which takes longer than most checks of a call: it makes a string."""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements of x may lie at one address (an expanded tensor, say).

    Exact for views whose dimensions nest, which is every view that slicing, transposing and
    expanding make; a stranger one counts as overlapping. In a graph being traced, whose sizes may
    have no order, expanded ones alone.
    """
    if x.is_contiguous() or x.numel() == 0:
        return False
    dims = zip(x.stride(), x.shape, strict=True)
    if torch.compiler.is_compiling():
        return any(stride == 0 and size > 1 for stride, size in dims)
    extent = 1
    for stride, size in sorted(dims):
        if size > 1:
            if stride < extent:
                return True
            extent = stride * (size - 1) + extent
    return False


def check_apart(written: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> None:
    """What a call writes shares no element with itself, or with what else it writes or reads."""
    if torch.compiler.is_compiling():  # there are no addresses yet
        return
    for name, x in written.items():
        if x.is_neg():  # torch hands no op such memory to write
            raise ValueError(
                f"{name}: expected a tensor that can be written, got a view that negates what lies "
                f"in memory; pass {name}.resolve_neg()"
            )
    if transformed():
        written, read = ({n: innermost(x) for n, x in xs.items()} for xs in (written, read))
    if clearly_apart((*written.values(),), (*read.values(),)):
        return
    everything = written | read
    if not all(map(_has_address, everything.values())):
        return
    for name, x in written.items():
        if overlaps_itself(x):
            raise ValueError(
                f"{name}: elements share memory (shape {tuple(x.shape)}, strides {x.stride()}); "
                "expected a place for each"
            )
    pairs = [*product(read.items(), written.items()), *combinations(written.items(), 2)]
    for (name, x), (other, y) in pairs:
        if overlap(x, y):
            raise ValueError(f"{name}: overlaps {other} in memory; expected separate elements")


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x and y may share an element.

    Views of one packed QKV tensor do not: they interleave. For a stride m that all larger strides
    of both are multiples of, x lies in one interval of addresses modulo m and y in another; where
    these are disjoint for some m, so are x and y. Anything else whose address ranges meet counts
    as overlapping. Fake and meta tensors, and a graph being traced, have no addresses and never do.
    """
    if torch.compiler.is_compiling():
        return False
    x, y = innermost(x), innermost(y)
    if clearly_apart((x,), (y,)):
        return False
    if not (_has_address(x) and _has_address(y)) or x.numel() == 0 or y.numel() == 0:
        return False
    # In bytes, since two storages may lie over one buffer at any distance.
    start = [x.data_ptr(), y.data_ptr()]
    if x.is_contiguous() and y.is_contiguous():
        meet = start[0] < start[1] + y.nbytes and start[1] < start[0] + x.nbytes
        return meet and x.device == y.device
    if x.device != y.device:
        return False
    dims, sizes = [_dims(x), _dims(y)], [x.element_size(), y.element_size()]
    extent = [_extent(d, size) for d, size in zip(dims, sizes, strict=True)]
    if start[0] + extent[0] <= start[1] or start[1] + extent[1] <= start[0]:
        return False
    for modulus in {stride for d in dims for stride, _ in d if stride > 0}:
        inner = [[(stride, size) for stride, size in d if stride < modulus] for d in dims]
        outer = [stride for d in dims for stride, _ in d if stride >= modulus]
        if any(stride % modulus for stride in outer):
            continue
        inner_extent = [_extent(d, size) for d, size in zip(inner, sizes, strict=True)]
        gap = (start[1] - start[0]) % modulus
        if inner_extent[0] <= gap and gap + inner_extent[1] <= modulus:
            return False
    return True


def _has_address(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta


def _dims(x: torch.Tensor) -> list[tuple[int, int]]:
    """(stride in bytes, size) of the dimensions that have more than one index."""
    strides = [stride * x.element_size() for stride in x.stride()]
    return [(stride, size) for stride, size in zip(strides, x.shape, strict=True) if size > 1]


def _extent(dims: list[tuple[int, int]], element_size: int) -> int:
    return element_size + sum(stride * (size - 1) for stride, size in dims)
