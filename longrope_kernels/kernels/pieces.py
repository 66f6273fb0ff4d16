"""A head's dimensions in pieces whose widths are powers of two, as the attention kernels hold them.

A scalar product does not care about the order of its terms, so a head of 96 dimensions is 64 and 32
of them, or four pieces 32, 32, 16, 16, and is never padded to 128. Two orders are in use:

- rotated pieces, of q and k: first the pairs, then the dimensions that are not rotated. In the half
  pairing the first and second dimensions of 2**n pairs are a piece each, so that a rotation
  combines two pieces element by element; eight pairs, which are too narrow for a matrix
  instruction, share one piece of 16 (firsts, then seconds), and with ``JOINED`` all do.
  Interleaved pairs lie as in memory.
- plain pieces, of v and the output: as in memory.

Tuples of tensors carry them; ``PAIRS``, ``DIM`` and ``PAIRING`` say which they are. PAIRING is
whether pairs are interleaved, a bool, or a number with ``JOINED`` or ``NARROW`` added to it.

Short names: see rotation.py.
"""

import triton
import triton.language as tl

from .rotation import _INTERPRETED, below_threshold, cos_sin, cos_sin_approx, narrow, phase, rotate

# ``PAIRS`` of plain pieces 32 wide at least: where a product has 16 rows, warps share its columns,
# and of 16 columns each of them would do all.
WIDE = tl.constexpr(-1)

# In ``PAIRING``: no piece is wider than 64. For float8, where a lane has 16 bytes of a row and
# stores them as 32: eight lanes that do so at once meet in no bank where a row has four of them.
NARROW = tl.constexpr(2)

# In ``PAIRING``: firsts and seconds of a chunk share a piece. On sm_90 each product whose first
# operand is in registers is waited for, so that fewer of them wait less.
JOINED = tl.constexpr(4)


@triton.constexpr_function
def _powers(n, least):
    """The powers of two that add up to n, rounded up to a multiple of the power ``least``."""
    n = -(-n // least) * least
    return [1 << bit for bit in reversed(range(n.bit_length())) if n >> bit & 1]


@triton.constexpr_function
def _widths(n, least, pairing):
    """Those of the pieces of n dimensions that are not rotated."""
    wide = n // 64 if pairing & NARROW.value else 0
    return [64] * wide + _powers(n - 64 * wide, least)


@triton.constexpr_function
def _chunks(pairs, pairing):
    """The widths of the chunks of pairs.

    At most 64, and 32 where pairs must be taken apart in registers, so that what belongs to a wide
    head need not be there all at once.
    """
    widest = 32 if pairing & 1 else 64
    return [widest] * (pairs // widest) + _powers(pairs % widest, 8)


@triton.constexpr_function
def _is_split(width, pairing):
    """Whether both dimensions of a chunk of pairs that lie apart in memory are in one piece."""
    return width == 8 or bool(pairing & JOINED.value)


@triton.constexpr_function
def _list_pieces(pairs, dim, pairing):
    """(start, width, limit, split) of each rotated piece, in order.

    Columns start, start + 1, ...; those from ``limit`` on do not exist. ``split``: the second half
    of the columns is the first one shifted by ``pairs``.
    """
    least = 32 if pairs == WIDE.value else 16
    pairs = max(pairs, 0)
    pieces, start = [], 0
    for width in _chunks(pairs, pairing):
        if pairing & 1:
            pieces.append((2 * start, 2 * width, 2 * pairs, False))
        elif _is_split(width, pairing):
            pieces.append((start, 2 * width, pairs, True))
        else:
            pieces.append((start, width, pairs, False))
            pieces.append((pairs + start, width, 2 * pairs, False))
        start += width
    start = 2 * pairs
    for width in _widths(dim - 2 * pairs, least, pairing):
        pieces.append((start, width, dim, False))
        start += width
    return pieces


@triton.constexpr_function
def count_pieces(pairs, dim, pairing):
    """How many rotated pieces a head has; with 0 pairs, how many plain ones."""
    return len(_list_pieces(pairs, dim, pairing))


@triton.constexpr_function
def _piece(pairs, dim, pairing, index, field):
    return _list_pieces(pairs, dim, pairing)[index][field]


@triton.constexpr_function
def _count_chunks(pairs, pairing):
    return len(_chunks(pairs, pairing))


@triton.constexpr_function
def _first_piece(pairing, index):
    """The first piece of a chunk; before it there is one for each chunk, or there are two."""
    return index if pairing & (1 | JOINED.value) else 2 * index


@triton.constexpr_function
def _chunk(pairs, pairing, index):
    """Where the pairs of a chunk begin, and how many there are."""
    widths = _chunks(pairs, pairing)
    return sum(widths[:index]), widths[index]


@triton.constexpr_function
def _chunk_start(pairs, pairing, index):
    return _chunk(pairs, pairing, index)[0]


@triton.constexpr_function
def _chunk_width(pairs, pairing, index):
    return _chunk(pairs, pairing, index)[1]


# ----------------------------------------------------------------------------- memory and matrices


@triton.constexpr_function
def _is_whole(pairs, dim, pairing, index):
    """Whether all columns of the piece exist."""
    start, width, limit, split = _list_pieces(pairs, dim, pairing)[index]
    return start + (width // 2 if split else width) <= limit


@triton.jit
def _columns(PAIRS: tl.constexpr, DIM: tl.constexpr, PAIRING: tl.constexpr, INDEX: tl.constexpr):
    """The columns of a piece, (1, width)."""
    START: tl.constexpr = _piece(PAIRS, DIM, PAIRING, INDEX, 0)
    WIDTH: tl.constexpr = _piece(PAIRS, DIM, PAIRING, INDEX, 1)
    o_d = tl.arange(0, WIDTH)[None, :]
    if _piece(PAIRS, DIM, PAIRING, INDEX, 3):
        o_d = o_d % (WIDTH // 2) + o_d // (WIDTH // 2) * PAIRS
    return START + o_d


@triton.jit
def _mask(
    exist, PAIRS: tl.constexpr, DIM: tl.constexpr, PAIRING: tl.constexpr, INDEX: tl.constexpr
):
    """Which elements of a piece that is not whole exist; exist: as in `load_pieces`."""
    START: tl.constexpr = _piece(PAIRS, DIM, PAIRING, INDEX, 0)
    WIDTH: tl.constexpr = _piece(PAIRS, DIM, PAIRING, INDEX, 1)
    o_d = tl.arange(0, WIDTH)[None, :]
    if _piece(PAIRS, DIM, PAIRING, INDEX, 3):
        o_d = o_d % (WIDTH // 2)
    mask = START + o_d < _piece(PAIRS, DIM, PAIRING, INDEX, 2)
    if exist is not None:
        mask = exist & mask
    return mask


@triton.jit
def _load_piece(
    rows,
    exist,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    INDEX: tl.constexpr,
):
    p = rows + _columns(PAIRS, DIM, PAIRING, INDEX)
    if not _is_whole(PAIRS, DIM, PAIRING, INDEX):
        x = tl.load(p, mask=_mask(exist, PAIRS, DIM, PAIRING, INDEX), other=0.0)
    elif exist is not None:
        x = tl.load(p, mask=exist, other=0.0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def load_pieces(rows, exist, PAIRS: tl.constexpr, DIM: tl.constexpr, PAIRING: tl.constexpr):
    """The pieces of rows at ``rows`` (BLOCK, 1); ``exist`` (BLOCK, 1) bool, or None: all do."""
    pieces = ()
    for i in tl.static_range(count_pieces(PAIRS, DIM, PAIRING)):
        pieces += (_load_piece(rows, exist, PAIRS, DIM, PAIRING, i),)
    return pieces


@triton.jit
def _store_piece(
    rows,
    exist,
    x,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    INDEX: tl.constexpr,
):
    p = rows + _columns(PAIRS, DIM, PAIRING, INDEX)
    x = narrow(x, rows.dtype.element_ty)
    if _is_whole(PAIRS, DIM, PAIRING, INDEX):
        tl.store(p, x, mask=exist)
    else:
        tl.store(p, x, mask=_mask(exist, PAIRS, DIM, PAIRING, INDEX))


@triton.jit
def store_pieces(
    rows, exist, pieces, PAIRS: tl.constexpr, DIM: tl.constexpr, PAIRING: tl.constexpr
):
    """Round float32 pieces to the dtype of ``rows`` (BLOCK, 1) and store the rows that exist."""
    for i in tl.static_range(count_pieces(PAIRS, DIM, PAIRING)):
        _store_piece(rows, exist, pieces[i], PAIRS, DIM, PAIRING, i)


@triton.jit
def _zero_piece(
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    INDEX: tl.constexpr,
):
    WIDTH: tl.constexpr = _piece(PAIRS, DIM, PAIRING, INDEX, 1)
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, PAIRS: tl.constexpr, DIM: tl.constexpr, PAIRING: tl.constexpr):
    """float32 accumulators."""
    pieces = ()
    for i in tl.static_range(count_pieces(PAIRS, DIM, PAIRING)):
        pieces += (_zero_piece(ROWS, PAIRS, DIM, PAIRING, i),)
    return pieces


@triton.jit
def scale_pieces(pieces, factor):
    """Every row multiplied by its own factor (BLOCK,), or all by one."""
    scaled = ()
    for i in tl.static_range(len(pieces)):
        scaled += (pieces[i] * factor,)
    return scaled


@triton.jit
def dot(x, y, acc):
    """The matrix product x @ y + acc in float32; acc None is 0.

    The interpreter would multiply the bits of bfloat16; products of 16-bit numbers are exact in
    float32.
    """
    if _INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    if acc is None:
        return tl.dot(x, y)
    return tl.dot(x, y, acc)


@triton.jit
def dot_rows(x, y, acc):
    """acc + the scalar products of rows: pieces (M, D) and (N, D) to (M, N) float32."""
    for i in tl.static_range(len(x)):
        acc = dot(x[i], tl.trans(y[i]), acc)
    return acc


@triton.jit
def add_dots(acc, x, y):
    """acc + x @ y for each piece of y (N, D), x (M, N)."""
    total = ()
    for i in tl.static_range(len(y)):
        total += (dot(x, y[i], acc[i]),)
    return total


# ---------------------------------------------------------------------------------------- rotation


@triton.jit
def token_rows(n, i_set, p_n_hat, p_attention_factor):
    """Whether tokens at positions ``n`` (int64) keep the original embedding, and their factor.

    Returns bool and float32 of the shape of n. i_set: the set of the sequence, a scalar.
    """
    original = below_threshold(n, tl.load(p_n_hat + i_set))
    a = tl.where(original, 1.0, tl.load(p_attention_factor + i_set).to(tl.float32))
    return original, a


@triton.jit
def _chunk_cos_sin(
    n,
    original,
    a,
    p_steps,
    PAIRS: tl.constexpr,
    PAIRING: tl.constexpr,
    CONJUGATE: tl.constexpr,
    C: tl.constexpr,
):
    """``a cos`` and ``a sin`` of the pairs of a chunk: (BLOCK, width) float32."""
    START: tl.constexpr = _chunk_start(PAIRS, PAIRING, C)
    WIDTH: tl.constexpr = _chunk_width(PAIRS, PAIRING, C)
    o_p = START + tl.arange(0, WIDTH)
    exists = o_p < PAIRS
    # Both rows of steps, and a choice for each token: a load for each token would cost more.
    below = tl.load(p_steps + o_p, mask=exists, other=0)
    above = tl.load(p_steps + PAIRS + o_p, mask=exists, other=0)
    step = tl.where(original[:, None], below[None, :], above[None, :])
    cos, sin = cos_sin(phase(n[:, None], step))
    return cos * a[:, None], sin * (-a if CONJUGATE else a)[:, None]


@triton.jit
def _unsplit(x):
    """(BLOCK, 2 width), firsts then seconds, to two (BLOCK, width)."""
    x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _resplit(x_i, x_j):
    x = tl.permute(tl.join(x_i, x_j), (0, 2, 1))
    return tl.reshape(x, (x.shape[0], 2 * x_i.shape[1]))


@triton.jit
def _rotate_chunk(pieces, cos, sin, PAIRING: tl.constexpr, C: tl.constexpr):
    """The rotated pieces of chunk C, one or two, float32."""
    WIDTH: tl.constexpr = cos.shape[1]
    FIRST: tl.constexpr = _first_piece(PAIRING, C)
    if PAIRING & 1:
        x = pieces[FIRST]
        x_i, x_j = tl.split(tl.reshape(x, (x.shape[0], WIDTH, 2)))
        y_i, y_j = rotate(x_i, x_j, cos, sin)
        turned = (tl.interleave(y_i, y_j),)
    elif _is_split(WIDTH, PAIRING):
        x_i, x_j = _unsplit(pieces[FIRST])
        y_i, y_j = rotate(x_i, x_j, cos, sin)
        turned = (_resplit(y_i, y_j),)
    else:
        turned = rotate(pieces[FIRST], pieces[FIRST + 1], cos, sin)
    return turned


@triton.jit
def rotate_pieces(
    pieces,
    n,
    original,
    a,
    p_steps,
    PAIRS: tl.constexpr,
    PAIRING: tl.constexpr,
    CONJUGATE: tl.constexpr,
):
    """Rotated pieces turned by the angles of their tokens, float32; the others as they are.

    n (int64), original, a: (BLOCK,), of `token_rows`. p_steps: (2, PAIRS) int64, of the set.
    """
    turned = ()
    for c in tl.static_range(_count_chunks(PAIRS, PAIRING)):
        cos, sin = _chunk_cos_sin(n, original, a, p_steps, PAIRS, PAIRING, CONJUGATE, c)
        turned += _rotate_chunk(pieces, cos, sin, PAIRING, c)
    for i in tl.static_range(len(turned), len(pieces)):
        turned += (pieces[i],)
    return turned


@triton.jit
def _load_chunk_of_steps(p_steps, PAIRS: tl.constexpr, PAIRING: tl.constexpr, C: tl.constexpr):
    o_p = _chunk_start(PAIRS, PAIRING, C) + tl.arange(0, _chunk_width(PAIRS, PAIRING, C))
    return tl.load(p_steps + o_p, mask=o_p < PAIRS, other=0)


@triton.jit
def load_steps(p_steps, PAIRS: tl.constexpr, PAIRING: tl.constexpr):
    """The steps of each chunk of pairs: a tuple of (width,) int64. p_steps: (PAIRS,) int64."""
    steps = ()
    for c in tl.static_range(_count_chunks(PAIRS, PAIRING)):
        steps += (_load_chunk_of_steps(p_steps, PAIRS, PAIRING, c),)
    return steps


@triton.jit
def turn_pieces(pieces, n, steps, original, below, a, PAIRING: tl.constexpr):
    """As `rotate_pieces`, with steps that are in registers and `cos_sin_approx`.

    n: (BLOCK,) int64. steps, below: of `load_steps`. original (BLOCK,): tokens that take ``below``
    instead; a (BLOCK,): the factor of each token; both None: no token does, and no factor.
    """
    turned = ()
    for c in tl.static_range(len(steps)):
        step = steps[c][None, :]
        if original is not None:
            step = tl.where(original[:, None], below[c][None, :], step)
        cos, sin = cos_sin_approx(phase(n[:, None], step))
        if a is not None:
            cos = cos * a[:, None]
            sin = sin * a[:, None]
        turned += _rotate_chunk(pieces, cos, sin, PAIRING, c)
    for i in tl.static_range(len(turned), len(pieces)):
        turned += (pieces[i],)
    return turned


@triton.jit
def narrow_pieces(pieces, dtype: tl.constexpr):
    """Pieces to ``dtype``, to nearest even; pieces of that dtype stay."""
    narrowed = ()
    for i in tl.static_range(len(pieces)):
        narrowed += (_narrow_piece(pieces[i], dtype),)
    return narrowed


@triton.jit
def _narrow_piece(x, dtype: tl.constexpr):
    if x.dtype != dtype:
        x = narrow(x.to(tl.float32), dtype)
    return x
