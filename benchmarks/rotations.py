"""What rotates: the backends of this package, its peers and plain copies, and their inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
from measure import Ceiling
from ropes import DEVICE, K_HEADS, Q_HEADS, not_importable, rope, transformers_rotary

from longrope_kernels import apply_rotary, backends

HEAD_DIM = 128
ROPE = rope(HEAD_DIM)
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
        return transformers_rotary(HEAD_DIM).table(self.positions[None], self.dtype)


def missing(name: str) -> str | None:
    """Why an implementation cannot be timed here, or None."""
    if name in backends.BACKENDS:
        row = next(row for row in backends.table() if row["name"] == name)
        if row["missing"] is None and not {"any", DEVICE.type} & set(row["devices"]):
            return f"serves {', '.join(row['devices'])} only"
        return row["missing"]
    if name in PACKAGES and DEVICE.type != "cuda":
        return "needs a GPU"
    return not_importable(
        PACKAGES.get(name, "transformers" if name.startswith("transformers") else "torch")
    )


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
        rotate = transformers_rotary(HEAD_DIM).apply
    else:
        rotate = _compiled_transformers()

    def heads_first(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_out, k_out, *_ = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return heads_first


def copy(name: str, inputs: Inputs) -> Ceiling:
    """The copy that bounds a rotation: "clone" out of place, "copy_" in place."""
    q, k = inputs.q, inputs.k
    if name == "clone":
        return Ceiling(name, lambda: (q.clone(), k.clone()), inputs.traffic)
    into = torch.empty_like(q), torch.empty_like(k)
    return Ceiling(name, lambda: (into[0].copy_(q), into[1].copy_(k)), inputs.traffic)


@lru_cache(maxsize=1)
def _compiled_transformers() -> Any:
    return torch.compile(transformers_rotary(HEAD_DIM).apply, dynamic=False)
