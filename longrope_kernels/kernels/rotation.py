"""Building blocks of every Triton kernel here: factor set, phase, cosine and sine, rotation.

An angle is a fixed-point fraction of a turn. ``steps[set, 2, P]`` holds 2**-64 turns per token
(int64); the product with a position wraps around modulo one turn, which is the range reduction,
and exact. The top 32 bits of it, as int32, are the phase.

Names in the kernels. A tensor comes as one argument, a tuple (pointer, strides in elements):
``q[0]`` is where q lies, ``q[1]`` its first stride. Capitals are known to the compiler.

    p_   a pointer, or a block of them        n         a position, int64
    b_   a block of a tensor, in registers    j, slot   where a key, a query lies in its sequence
    i_   an index of a program: i_b row of    a         the attention factor of a token
         the batch, i_h head, i_hk KV head,   x_i, x_j  the two dimensions of pairs
         i_t query, i_set factor set          s, z      scores; p is exp2 of them
    o_   offsets within a tile or a tensor    M, N      axes of queries and keys: BLOCK_M, o_m
    m0   the first query of a tile (j0, n0    cu, cu_k  where packed sequences begin in q, in k
         key, s0 split)                       lse       the log-sum-exp of the scores
"""

import os

import triton
import triton.language as tl

# The interpreter truncates float32 to bfloat16 where the hardware rounds to nearest.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Radians per unit of a phase that was shifted left by two: 2 pi / 2**34.
_RADIANS = tl.constexpr(3.6572951981048216e-10)

# Radians per unit of a phase: 2 pi / 2**32.
_RADIANS_OF_PHASE = tl.constexpr(1.4629180792671596e-09)

# Minimax fits on [-pi/4, pi/4] in z = x * x (Remez): sin x = x + x z (S0 + z (S1 + z S2)) to 2e-9
# and cos x = 1 - z/2 + z z (C0 + z (C1 + z C2)) to 1e-10, before the rounding of float32.
_S0 = tl.constexpr(-0.166666506645)
_S1 = tl.constexpr(8.33197839359e-3)
_S2 = tl.constexpr(-1.949560194e-4)
_C0 = tl.constexpr(4.16666468605e-2)
_C1 = tl.constexpr(-1.38873672129e-3)
_C2 = tl.constexpr(2.44384155378e-5)


@triton.jit
def set_of_length(length, p_max_length, SETS: tl.constexpr):
    """The first factor set whose ``max_length`` is not below ``length``, else the last.

    length: int32 or int64, any shape. p_max_length: (SETS,) int64, ascending. Returns int32.
    """
    index = 0
    for i in tl.static_range(SETS - 1):
        index += (length > tl.load(p_max_length + i)).to(tl.int32)
    return index


@triton.jit
def clamp_set(index, SETS: tl.constexpr):
    """A pinned set (int32, any shape) within [0, SETS - 1]."""
    return tl.minimum(tl.maximum(index, 0), SETS - 1)


@triton.jit
def sequence_of_token(token, p_cu_seqlens, stride, sequences, search_step):
    """The packed sequence of each token; tokens past the end belong to the last one.

    token: int64, a block. p_cu_seqlens: (sequences + 1,) int32 or int64, ascending, with a stride
    in elements. search_step: the largest power of two below ``sequences``, 0 for one sequence.
    Returns int64: how many of cu_seqlens[1:sequences] are at most ``token``.
    """
    index = tl.zeros_like(token)
    while search_step > 0:
        candidate = index + search_step
        inside = candidate < sequences
        begin = tl.load(p_cu_seqlens + candidate * stride, mask=inside, other=0)
        index = tl.where(inside & (begin <= token), candidate, index)
        search_step = search_step >> 1
    return index


@triton.jit
def below_threshold(n, n_hat):
    """Whether tokens at positions ``n`` keep the original embedding (n_hat 0: none does)."""
    return (n_hat > 0) & (n < n_hat)


@triton.jit
def phase(n, step):
    """The phase of position ``n`` (int64) at ``step`` (int64): int32, 2**-32 turns."""
    return ((n * step) >> 32).to(tl.int32)


@triton.jit
def cos_sin(u):
    """Cosine and sine (float32, within 1.1e-7) of a phase ``u`` (int32, 2**-32 turns).

    The phase makes the reduction to [-pi/4, pi/4] exact: the top three bits, rounded, are the
    quadrant, and the low 30 bits, read as signed, the remainder. This is 20 instructions on sm_90,
    four more with `phase`. MUFU's sin.approx would take about 6 and cost an error of 2**-20.5;
    where one pair serves all heads of a token, memory hides the difference.
    """
    quadrant = ((u >> 29) + 1) >> 1
    x = (u << 2).to(tl.float32) * _RADIANS
    z = x * x
    s = x + x * z * (_S0 + z * (_S1 + z * _S2))
    c = 1.0 + z * (-0.5 + z * (_C0 + z * (_C1 + z * _C2)))
    odd = (quadrant & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    # Quadrants 1 and 2 (mod 4) have a negative cosine, 2 and 3 a negative sine: flip sign bits.
    cos = (cos.to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)).to(
        tl.float32, bitcast=True
    )
    sin = (sin.to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)).to(tl.float32, bitcast=True)
    return cos, sin


@triton.jit
def cos_sin_approx(u):
    """Cosine and sine of a phase by the hardware's approximation: within 2**-20 in [-pi, pi).

    6 instructions where `cos_sin` takes 20: for keys that one program rotates for itself, where
    nothing shares a pair and the result is rounded to 16 bits. The interpreter takes `cos_sin`.
    """
    if _INTERPRETED:
        cos, sin = cos_sin(u)
    else:
        cos, sin = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $2; sin.approx.f32 $1, $2;",
            "=f,=f,f",
            [u.to(tl.float32) * _RADIANS_OF_PHASE],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return cos, sin


@triton.jit
def rotate(x_i, x_j, cos, sin):
    """A pair of dimensions turned by an angle, in float32; shapes broadcast."""
    x_i = x_i.to(tl.float32)
    x_j = x_j.to(tl.float32)
    return x_i * cos - x_j * sin, x_i * sin + x_j * cos


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even, in the interpreter too."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        # Without the low bits: the interpreter mistakes a subnormal, 0 rounded up, for another.
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
