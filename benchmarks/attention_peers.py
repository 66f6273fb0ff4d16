"""What else attends: torch's SDPA, transformers' rotation before it, FlashInfer, flash-attn.

Each is a function of q, k and v, (1, tokens, heads, dim), to time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from measure import require_time_to_compile
from parameters import Geometry
from ropes import DEVICE, transformers_rotary
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from without_rotation import unrotated

from longrope_kernels.backends import choose as backends

SDPA = {
    "SDPA flash, no rotation": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN, no rotation": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient, no rotation": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math, no rotation": SDPBackend.MATH,
}
# cuDNN's causal mask of torch begins at the first key: a chunk gets queries ahead of its own.
PADDED = "SDPA cuDNN, padded queries, no rotation"
SDPA[PADDED] = SDPBackend.CUDNN_ATTENTION
# What is left of the rotation's cost where the kernel that attends rotates q: forward only.
K_ALONE = "SDPA cuDNN, k rotated alone"
SDPA[K_ALONE] = SDPBackend.CUDNN_ATTENTION
OF_CHUNKS = ("SDPA flash, no rotation", PADDED)  # of those, who serves them
ON_CPU = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
EAGER = "transformers eager, SDPA"
COMPILED = "transformers torch.compile, SDPA"  # both as one function
# transformers' rotation before a flash-attn library: stock RoPE, to tell what fusing saves.
STOCK = {f"transformers eager, {name}": name for name in backends.FLASH_BACKENDS}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def stock(
    name: str, geometry: Geometry, causal: bool, cos: torch.Tensor, sin: torch.Tensor
) -> Attention:
    """transformers' rotation, then torch's SDPA or a flash-attn library."""
    if name == COMPILED:
        require_time_to_compile()
    of_call = compiled if name == COMPILED else _eager
    attend = of_call(geometry, causal, STOCK.get(name))
    return lambda q, k, v: attend(q, k, v, cos, sin)


def _eager(geometry: Geometry, causal: bool, library: str | None) -> Callable[..., torch.Tensor]:
    rotate = transformers_rotary(geometry).apply

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotate(q, k, cos, sin)
        if library:
            return _flash_attn(library, *(x.transpose(1, 2) for x in (q, k, v)), causal)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


@lru_cache(maxsize=1)
def compiled(geometry: Geometry, causal: bool, library: str | None) -> Any:
    return torch.compile(_eager(geometry, causal, library), dynamic=False)


def _flash_attn(
    library: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    from longrope_kernels.backends import flash_attention

    return flash_attention.attend(library, unrotated(q, k, v, causal), False)[0]


def flashinfer_fused(causal: bool) -> Attention:
    """Its prefill of one sequence with the rotation fused; the base is 10000, as ours."""
    import flashinfer

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = flashinfer.single_prefill_with_kv_cache(
            *(q[0], k[0], v[0]),
            causal=causal,
            kv_layout="NHD",
            pos_encoding_mode="ROPE_LLAMA",
            rope_theta=10000.0,
        )
        return out[None]

    return attend


def sdpa(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    """torch's SDPA by one of its kernels; the efficient one wants a KV head for each query head.

    Causal, the last query stands at the last key.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if SDPA[name] == SDPBackend.EFFICIENT_ATTENTION:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    ahead, mask = k.shape[2] - q.shape[2], None
    if causal and ahead and name == PADDED:
        q = F.pad(q, (0, 0, ahead, 0))
    elif causal and ahead:
        causal, mask = False, causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(SDPA[name]):
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out[:, :, ahead if name == PADDED else 0 :].transpose(1, 2)


def sdpa_refuses(name: str) -> str | None:
    if DEVICE.type != "cuda" and SDPA[name] not in ON_CPU:
        return "needs a GPU"
    x: Any = torch.zeros(1, 64, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    try:
        sdpa(name, x, x, x, True)
    except RuntimeError as error:
        return str(error)
    return None
