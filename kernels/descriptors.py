"""Tiles of heads by the tensor memory accelerator (TMA), through descriptors made in the kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .pieces import _piece, count_pieces

# What a descriptor asks of addresses and strides, in bytes.
_ALIGNMENT = 16


# ----------------------------------------------------------------------------------------- launch


def reachable(x: torch.Tensor) -> bool:
    """Whether a descriptor can hold x (B, S, H, D)."""
    sizes, strides = x.shape[:3], x.stride()[:3]
    least = _ALIGNMENT // x.element_size()
    return x.data_ptr() % _ALIGNMENT == 0 and all(
        size == 1 or (stride > 0 and stride % least == 0)
        for size, stride in zip(sizes, strides, strict=True)
    )


def row_of_head(q: torch.Tensor) -> tuple[int, int, int] | None:
    """q (B, S, H, D) as a matrix with a row for each token stride: the rows from one batch row to
    the next, the rows and the columns from one head to the next; None if it is none.
    """
    (batch, seq, heads, dim), (of_batch, of_token, of_head, _) = q.shape, q.stride()
    of_token = of_token if seq > 1 else dim
    of_batch, of_head = (of_batch if batch > 1 else 0), (of_head if heads > 1 else 0)
    rows, columns = (0, of_head) if of_head < of_token else (of_head // of_token, 0)
    place = (of_batch // of_token, rows, columns)
    last = (batch - 1) * place[0] + (heads - 1) * rows + seq
    exact = of_batch == place[0] * of_token and of_head == rows * of_token + columns
    return place if exact and max(last, heads * columns + dim) < 2**31 else None


def described_args(x: torch.Tensor) -> tuple[object, ...]:
    """As `tensor_args`, with strides that a descriptor takes where they do not matter."""
    pairs = zip(x.shape[:3], x.stride()[:3], strict=True)
    return (x, *(stride if size > 1 else x.shape[3] for size, stride in pairs))


# ----------------------------------------------------------------------------------------- device


@triton.jit
def _describe_piece(
    x,
    shape,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    WIDTH: tl.constexpr = _piece(PAIRS, DIM, INTERLEAVED, INDEX, 1)
    if len(x) == 2:
        made = tl.make_tensor_descriptor(x[0], shape, [x[1].to(tl.int64), 1], [BLOCK, WIDTH])
    else:
        made = tl.make_tensor_descriptor(
            x[0],
            shape,
            [x[1].to(tl.int64), x[3].to(tl.int64), x[2].to(tl.int64), 1],
            [1, 1, BLOCK, WIDTH],
        )
    return made


@triton.jit
def describe(
    x,
    shape,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A descriptor for each piece of tiles of x.

    x: (pointer, row stride) of a matrix, or (pointer, batch, token, head stride); shape: of the
    matrix, or (batch, heads, tokens, DIM).
    """
    made = ()
    for i in tl.static_range(count_pieces(PAIRS, DIM, INTERLEAVED)):
        made += (_describe_piece(x, shape, PAIRS, DIM, INTERLEAVED, BLOCK, i),)
    return made


@triton.jit
def _load_piece(
    x,
    at,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    START: tl.constexpr = _piece(PAIRS, DIM, INTERLEAVED, INDEX, 0)
    WIDTH: tl.constexpr = _piece(PAIRS, DIM, INTERLEAVED, INDEX, 1)
    if len(at) == 2:
        piece = x[INDEX].load([at[0], at[1] + START])
    else:
        piece = x[INDEX].load([at[0], at[1], at[2], START]).reshape((BLOCK, WIDTH))
    return piece


@triton.jit
def load_described(
    x,
    at,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The pieces of BLOCK tokens from ``at`` on; x: of `describe`.

    at: (row, column) of a matrix, where tokens past the last one are others, or (batch row, head,
    token), where they are zeros.
    """
    pieces = ()
    for i in tl.static_range(len(x)):
        pieces += (_load_piece(x, at, PAIRS, DIM, INTERLEAVED, BLOCK, i),)
    return pieces
