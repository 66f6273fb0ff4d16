"""Where tests run (`TARGETS`), on which ropes, and on which tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch

from longrope_kernels import FactorSet, Rope, apply_rotary

CUDA = torch.cuda.is_available()
_Case = TypeVar("_Case")


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    def rotary(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.call(apply_rotary, *args, **kwargs)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns on this backend, every tensor moved to the device first."""
        return function(
            *(self.move(a) for a in args),
            **{name: self.move(a) for name, a in kwargs.items()},
            backend=self.backend,
        )

    def move(self, x: Any) -> Any:
        """x on the device with the strides and offset it has: ``to`` would make it dense."""
        if not isinstance(x, torch.Tensor) or x.device.type == self.device:
            return x
        storage = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
        return storage.to(self.device).as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass(frozen=True)
class Attending(Target):
    """A target of attention or decoding, the dtypes of q it takes (its usual one first).

    ``slow`` are the interpreter and the emulator, a tenth of a second a tile: large cases get one
    KV head there.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    smallest_dim: int = 1
    slow: bool = False

    def nearest(self, case: _Case) -> _Case:
        """The case in a dtype, with a head_dim and of a size that the backend serves."""
        of: Any = case
        dtype = of.dtype if of.dtype in self.dtypes else self.dtypes[0]
        of = replace(of, dtype=dtype, dim=max(of.dim, self.smallest_dim))
        if self.slow and of.tiles > 4 and of.kv_heads > 1:
            of = replace(of, heads=of.heads // of.kv_heads, kv_heads=1)
        return of


REFERENCE = Target("reference", "cpu")
NATIVE = Target("native", "cpu")
# Without a GPU the interpreter runs the same kernels on CPU tensors.
TRITON = Target("triton", "cuda" if CUDA else "cpu")
# Without a GPU the emulator runs them.
COMPILED = Target("cuda", "cuda" if CUDA else "cpu")
REFERENCE_CUDA = pytest.param(
    Target("reference", "cuda"), marks=pytest.mark.gpu, id="reference-cuda"
)

KERNELS = [pytest.param(t, id=str(t)) for t in (NATIVE, TRITON, COMPILED)]
TARGETS = [pytest.param(REFERENCE, id="reference"), *KERNELS, REFERENCE_CUDA]
CPU_TARGETS = [p for p in TARGETS if p.values[0].device == "cpu"]
every_target = pytest.mark.parametrize("target", TARGETS)
every_cpu_target = pytest.mark.parametrize("target", CPU_TARGETS)
every_kernel = pytest.mark.parametrize("target", KERNELS)

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class Shape:
    """``kv_heads`` 0 is "no k"; ``pairs`` 0 is all of ``dim``."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    dim: int
    pairs: int = 0
    layout: str = "bshd"
    dtype: torch.dtype = torch.float32
    interleaved: bool = False

    def __str__(self) -> str:
        partial = f"-P{self.pairs}" if self.pairs else ""
        pairing = "-interleaved" if self.interleaved else ""
        return (
            f"B{self.batch}-T{self.seq}-H{self.heads}.{self.kv_heads}-D{self.dim}{partial}"
            f"-{self.layout}-{DTYPE_NAMES[self.dtype]}{pairing}"
        )

    @property
    def rotated_pairs(self) -> int:
        return self.pairs or self.dim // 2

    def tensor(self, heads: int) -> torch.Tensor:
        """A normal tensor of this layout, made in the dtype that the kernel gets."""
        sizes = {
            "bshd": (self.batch, self.seq, heads, self.dim),
            "bhsd": (self.batch, heads, self.seq, self.dim),
            "thd": (self.batch * self.seq, heads, self.dim),
        }
        return torch.randn(sizes[self.layout]).to(self.dtype)

    def qk(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.tensor(self.heads), self.tensor(self.kv_heads) if self.kv_heads else None

    def rope(self, n_hat: int = 128, attention_factor: float = 1.19) -> Rope:
        """One set of irregular factors, a threshold and an attention factor that is not 1."""
        one = FactorSet(factors(self.rotated_pairs), n_hat, attention_factor)
        return Rope((one,), interleaved=self.interleaved)


def by_id(values: list[Any]) -> list[Any]:
    return [pytest.param(value, id=str(value)) for value in values]


def factors(pairs: int, scale: float = 1.0) -> tuple[float, ...]:
    """Irregular factors that grow with the dimension, as published ones do; exact in no float32."""
    return tuple(scale * (1 + 0.1 * (i % 3) + 31 * (i / pairs) ** 2) for i in range(pairs))


def two_sets(pairs: int, **kwargs: Any) -> Rope:
    """Short up to 4096 tokens, long after; thresholds and attention factors differ."""
    return Rope(
        (
            FactorSet(factors(pairs, 1.25), 0, 1.05, 4096),
            FactorSet(factors(pairs, 2.0), 7, 1.19),
        ),
        **kwargs,
    )


def special_positions(n_hat: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The positions where mistakes live, out of order."""
    values = [2**31 - 1, 0, n_hat, 4097, -1, n_hat - 1, 2**21, 1, n_hat + 1, 4095, 131072, 4096]
    values += [-4097, 2**21 - 1, 2**24 + 1, 2**30 + 12345, 63, -(2**31)]
    return torch.tensor(values, dtype=dtype)


def positions_for(count: int, n_hat: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """``count`` unordered positions: the special ones first, then any below 2**31."""
    special = special_positions(n_hat, dtype)
    spread = 2 ** (torch.rand(count) * 31)
    random = spread.to(torch.int64).clamp(max=2**31 - 1).to(dtype)
    return torch.cat((special, random))[:count]
