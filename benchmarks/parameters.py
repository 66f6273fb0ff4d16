"""Every call that is timed, in one table: whose heads, how many tokens, how important.

Of rank 0 are the rows that a report must have; a budget drops the highest rank first. Lengths go
from 1k to 2M tokens where the memory of the machine allows it, and a row's time: a prompt of 2M
tokens is a minute of matrix products for each round, so prompts end at 128k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

bf16, fp32 = torch.bfloat16, torch.float32
GPU = torch.cuda.is_available()


class Geometry(NamedTuple):
    """The heads of a model: of q, of k and v, their dimensions, and those that are rotated."""

    name: str
    q_heads: int
    k_heads: int
    dim: int
    rotated: int

    @property
    def suffix(self) -> str:
        """What tells its rows from those of the usual geometry, which is not named."""
        return "" if self == LLAMA else f", {self.name}"


LLAMA = Geometry("Llama-3-8B", 32, 8, 128, 128)
PHI3 = Geometry("Phi-3-mini", 32, 32, 96, 96)
PHI4 = Geometry("Phi-4-mini", 24, 8, 128, 96)
QWEN3 = Geometry("Qwen3-32B", 64, 8, 128, 128)
OTHERS = (PHI3, PHI4, QWEN3)


def of_dim(dim: int) -> Geometry:
    """The heads of Llama-3-8B with another head_dim."""
    return LLAMA._replace(dim=dim, rotated=dim)


class Prompt(NamedTuple):
    """Attention of a whole prompt, or of its last ``queries``, a chunk, where they are not 0."""

    tokens: int
    dim: int
    causal: bool
    queries: int = 0


Ranked = list[tuple[int, tuple[object, ...]]]

# (tokens, dtype, geometry)
if GPU:
    ROTATIONS: Ranked = [
        *((0, (*size, LLAMA)) for size in ((4096, fp32), (4096, bf16), (8192, bf16))),
        *((1, (8192, bf16, geometry)) for geometry in OTHERS),
        *((2, (tokens, bf16, LLAMA)) for tokens in (1024, 32768, 131072, 2**21)),
    ]
else:
    ROTATIONS = [
        *((0, (4096, dtype, LLAMA)) for dtype in (fp32, bf16)),
        *((1, (4096, bf16, geometry)) for geometry in OTHERS),
        *((2, (tokens, bf16, LLAMA)) for tokens in (1024, 32768, 131072)),
    ]

# (prompt, geometry of another model or None). The first is for the reference, whose scores lie in
# memory.
LONGEST_REFERENCE = 256
_REFERENCE = (0, (Prompt(LONGEST_REFERENCE, 96, True), None))
_LENGTHS = (1024, 2048, 8192, 32768, 131072)
if GPU:
    _MAIN = [
        *(
            Prompt(tokens, 128, causal)
            for tokens in (2048, 8192, 32768)
            for causal in (True, False)
        ),
        *(Prompt(8192, dim, causal) for dim in (64, 96) for causal in (True, False)),
        *(Prompt(32768, dim, True) for dim in (64, 96)),
        Prompt(131072, 128, True),
    ]
    PROMPTS: Ranked = [
        _REFERENCE,
        *((0, (prompt, None)) for prompt in _MAIN),
        *((1, (Prompt(8192, geometry.dim, True), geometry)) for geometry in OTHERS),
        *(
            (1, (Prompt(*size), None))
            for size in ((8192, 128, True, 4096), (32768, 128, True, 2048))
        ),
        (1, (Prompt(8192, 256, True), None)),
        *(
            (3, (Prompt(tokens, dim, causal), None))
            for tokens in _LENGTHS
            for dim in (64, 96, 128)
            for causal in (True, False)
            if Prompt(tokens, dim, causal) not in _MAIN
        ),
    ]
else:
    PROMPTS = [
        _REFERENCE,
        *((0, (prompt, None)) for prompt in (Prompt(512, 128, True), Prompt(256, 128, False))),
        *((2, (Prompt(256, geometry.dim, True), geometry)) for geometry in OTHERS),
        (2, (Prompt(512, 128, True, 128), None)),
        (3, (Prompt(1024, 128, True), None)),
    ]

# What torch.compile is asked for, which takes up to a minute for each shape.
COMPILED_PROMPTS = (Prompt(8192 if GPU else 512, 128, True),)

# (lengths of the sequences, dtype, geometry). The batch of four lengths has them on both sides of
# the switch.
if GPU:
    STEPS: Ranked = [
        *((0, (lens, bf16, LLAMA)) for lens in ((131072,), (4096,) * 32, (8192,))),
        (0, ((300, 4096, 4097, 32768) * 4, bf16, LLAMA)),
        *((1, ((32768,), bf16, geometry)) for geometry in OTHERS),
        (1, ((32768,), bf16, LLAMA, 512)),  # a chunk of a prompt
        *((2, ((tokens,), bf16, LLAMA)) for tokens in (1024, 2**20, 2**21)),
    ]
else:
    STEPS = [
        *((0, ((n,), dtype, LLAMA)) for n in (4096, 32768) for dtype in (bf16, fp32)),
        (0, ((300, 4096, 4097, 8000), bf16, LLAMA)),
        *((1, ((2048,), dtype, LLAMA, 512)) for dtype in (bf16, fp32)),  # chunks of a prompt
        (1, ((8192,), fp32, LLAMA, 128)),
        *((2, ((4096,), bf16, geometry)) for geometry in OTHERS),
        *((2, ((tokens,), bf16, LLAMA)) for tokens in (1024, 131072)),
    ]
