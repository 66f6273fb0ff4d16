"""Do strided views share memory? Decided from shapes and strides, without touching the data."""

from __future__ import annotations

import torch


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements of x may lie at one address (an expanded tensor, say).

    Exact for views whose dimensions nest, which is every view that slicing, transposing and
    expanding make; a stranger one counts as overlapping.
    """
    if x.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent = stride * (size - 1) + extent
    return False


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x and y (of one dtype) may share an element.

    Views of one packed QKV tensor do not: they interleave. In units of elements, for a stride m
    that divides all larger strides of both, x lies in one interval of addresses modulo m and y in
    another; where these are disjoint for some m, so are x and y. Anything else whose address
    ranges meet counts as overlapping.
    """
    if x.numel() == 0 or y.numel() == 0 or x.device != y.device:
        return False
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    dims = [_dims(x), _dims(y)]
    start = [x.storage_offset(), y.storage_offset()]
    extent = [_extent(d) for d in dims]
    if start[0] + extent[0] <= start[1] or start[1] + extent[1] <= start[0]:
        return False
    for modulus in {stride for d in dims for stride, _ in d if stride > 0}:
        inner = [[(stride, size) for stride, size in d if stride < modulus] for d in dims]
        outer = [stride for d in dims for stride, _ in d if stride >= modulus]
        if any(stride % modulus for stride in outer):
            continue
        inner_extent = [_extent(d) for d in inner]
        gap = (start[1] - start[0]) % modulus
        if inner_extent[0] <= gap and gap + inner_extent[1] <= modulus:
            return False
    return True


def _dims(x: torch.Tensor) -> list[tuple[int, int]]:
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _extent(dims: list[tuple[int, int]]) -> int:
    return 1 + sum(stride * (size - 1) for stride, size in dims)
