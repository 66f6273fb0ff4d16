"""What is timed: the backends of this package, its peers and plain copies, and their inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch

from longrope_kernels import Rope, apply_rotary, backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q_HEADS, K_HEADS, HEAD_DIM = 32, 8, 128
PACKAGES = {  # of the peers that need a GPU: the module that rotates
    "liger": "liger_kernel.ops.rope",
    "flash-attn": "flash_attn.layers.rotary",
}
Rotation = Callable[[torch.Tensor, torch.Tensor], Any]


@lru_cache(maxsize=1)
def make_inputs(tokens: int, dtype: torch.dtype) -> Inputs:
    """The inputs of all rows of one size, which follow one another."""
    return Inputs(tokens, dtype)


class Inputs:
    """q (1, tokens, 32, 128), k with 8 heads, their gradients, and the right results."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            x = torch.randn((1, tokens, heads, HEAD_DIM), generator=generator)
            return x.to(DEVICE, dtype)

        self.tokens, self.dtype = tokens, dtype
        self.q, self.k = normal(Q_HEADS), normal(K_HEADS)
        self.grads = normal(Q_HEADS), normal(K_HEADS)
        self.positions = torch.arange(tokens, device=DEVICE)
        self.lengths = torch.full((1,), tokens, device=DEVICE)

    @property
    def traffic(self) -> int:
        """Bytes: q and k read once and written once."""
        return 2 * (self.q.nbytes + self.k.nbytes)

    @cached_property
    def rotated(self) -> list[torch.Tensor]:
        """q and k, rotated in float64."""
        return self._rotated64((self.q, self.k), self.positions)

    @cached_property
    def rotated_back(self) -> list[torch.Tensor]:
        """The gradients of q and k in float64: rotated the other way."""
        return self._rotated64(self.grads, -self.positions)

    def _rotated64(
        self, pair: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor
    ) -> list[torch.Tensor]:
        q, k = (x.double() for x in pair)
        return list(apply_rotary(q, k, positions, ROPE, lengths=self.lengths, backend="reference"))

    @cached_property
    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' (cos, sin), each (1, tokens, 128). Peers get it for free."""
        return _transformers_rotary().table(self.positions[None], self.dtype)


def missing(name: str) -> str | None:
    """Why an implementation cannot be timed here, or None."""
    if name in backends.BACKENDS:
        row = next(row for row in backends.table() if row["name"] == name)
        if row["missing"] is None and not {"any", DEVICE.type} & set(row["devices"]):
            return f"serves {', '.join(row['devices'])} only"
        return row["missing"]
    if name in PACKAGES and DEVICE.type != "cuda":
        return "needs a GPU"
    try:
        importlib.import_module(
            PACKAGES.get(name, "transformers" if name.startswith("transformers") else "torch")
        )
    except ImportError as error:
        return str(error)
    return None


def rotation(name: str, inputs: Inputs, inplace: bool) -> Rotation:
    """The function of q and k, (1, tokens, heads, dim) each, to time."""
    if name in backends.BACKENDS:
        return lambda q, k: apply_rotary(
            q,
            k,
            inputs.positions,
            ROPE,
            lengths=inputs.lengths,
            inplace=inplace,
            backend=name,
        )
    cos, sin = inputs.table
    if name == "flash-attn":
        rotate = importlib.import_module(PACKAGES[name]).apply_rotary_emb
        # It takes the table without the second half, which repeats the first.
        cos, sin = (x[0, :, : HEAD_DIM // 2].contiguous() for x in (cos, sin))
        return lambda q, k: tuple(rotate(x, cos, sin, inplace=inplace) for x in (q, k))
    if name == "liger":  # always in place
        rotate = importlib.import_module(PACKAGES[name]).LigerRopeFunction.apply
    elif name == "transformers eager":
        rotate = _transformers_rotary().apply
    else:
        rotate = _compiled_transformers()

    def heads_first(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_out, k_out, *_ = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return heads_first


def copy(name: str, inputs: Inputs) -> Callable[[], Any]:
    """The copy that bounds a rotation: "clone" out of place, "copy_" in place."""
    q, k = inputs.q, inputs.k
    if name == "clone":
        return lambda: (q.clone(), k.clone())
    into = torch.empty_like(q), torch.empty_like(k)
    return lambda: (into[0].copy_(q), into[1].copy_(k))


def tolerance(name: str, inputs: Inputs) -> float:
    """The largest error allowed, relative to the largest value.

    Two roundings of the output's type for the result, two for the products of those that
    multiply in it; and for float32 angles what their rounding makes of the largest one.
    """
    rounding = 4 * torch.finfo(inputs.dtype).eps
    exact = name in backends.BACKENDS
    return rounding if exact else rounding + inputs.tokens * torch.finfo(torch.float32).eps


# A short and a long set, as a model has them; 1 as attention factor, so that rotating in place
# again and again keeps the norms.
_PAIRS = HEAD_DIM // 2
_SETS = {
    "short_factor": [1.0 + i / _PAIRS for i in range(_PAIRS)],
    "long_factor": [1.0 + i / 2 for i in range(_PAIRS)],
}
ROPE = Rope.longrope(**_SETS, original_max_position_embeddings=4096, attention_factor=1.0)


@lru_cache(maxsize=1)
def _transformers_rotary() -> Any:
    from longrope_kernels.demo.peers import TransformersRotary, phi3_config

    config = phi3_config(
        "phi-3-mini-128k",
        hidden_size=Q_HEADS * HEAD_DIM,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=K_HEADS,
        rope_scaling={"rope_type": "longrope", "attention_factor": 1.0, "factor": 32.0, **_SETS},
    )
    return TransformersRotary(config, DEVICE)


@lru_cache(maxsize=1)
def _compiled_transformers() -> Any:
    return torch.compile(_transformers_rotary().apply, dynamic=False)
