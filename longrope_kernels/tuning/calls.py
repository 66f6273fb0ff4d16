"""The calls that `longrope tune` times: their tensors, launches and right results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..calls.masks import Mask
from ..calls.records import Scoring
from ..rope.value import Rope
from .entries import Task

if TYPE_CHECKING:
    from .search import Machine

# Products of BLOCK_M x BLOCK_N x head_dim that a launch does for a tile.
PRODUCTS = {"prepass": 2, "registers": 2, "dk_dv": 4, "dk": 3, "dv": 2, "dq": 3}
# Units in the last place of its dtype that another order of sums may move a row, relative to the
# row and to the median row.
_UNITS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 16}


class Call(Protocol):
    """``outputs``: the tensors each launch fills. ``flops``: of one product for all tiles."""

    outputs: dict[str, tuple[torch.Tensor, ...]]
    flops: float

    def present(self, name: str) -> Any:
        """The `Config` of a launch in the table, None where the table has no such launch."""

    def launch(self, name: str, config: Any) -> Any: ...
    def expected(self, machine: Machine) -> dict[str, tuple[torch.Tensor, ...]]:
        """What the launches of the table put into ``outputs``."""


def make_call(dim: int, launch: str, causal: bool, task: Task, machine: Machine) -> Call:
    """The call that has this launch."""
    if launch in ("prepass", "registers"):
        return _Forward(dim, launch == "registers", causal, task, machine)
    return _Backward(dim, causal, task, machine)


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a row, as a multiple of what rounding may make; NaN if there is one
    in either.

    output, expected: (B, S, H, D) of a 16-bit dtype, or (B, H, S) float32, a row of one each.
    """
    if output.dim() == 3:
        output, expected = output.unsqueeze(3), expected.unsqueeze(3)
    x, y = output.float(), expected.float()
    size = torch.linalg.vector_norm(y, dim=3)
    allowed = _UNITS[output.dtype] * torch.finfo(output.dtype).eps * (size + size.median())
    return float((torch.linalg.vector_norm(x - y, dim=3) / allowed).max())


class _Inputs:
    """q and k as the kernels read them, (1, S, H, D), and how queries score keys."""

    def __init__(self, dim: int, queries: int, causal: bool, task: Task, machine: Machine) -> None:
        self.dim, self.causal, self.arch, self.device = dim, causal, machine.arch, machine.device
        self.dtype, self.keys, self.queries = task.dtype, task.seq, queries
        self.heads, self.kv_heads = task.heads, task.kv_heads
        positions = torch.arange(self.keys, device=self.device)[None]
        rotation = Rope.plain(dim).tables(self.device)
        of_queries = positions[:, self.keys - queries :]
        self.scoring = Scoring(of_queries, positions, rotation, Mask(causal), dim**-0.5, 0.0)
        pairs = queries * self.keys - (queries * (queries - 1) // 2 if causal else 0)
        self.flops = 2.0 * self.heads * dim * pairs

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        shape = (1, tokens, heads, self.dim)
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def scratch(self, tokens: int, heads: int) -> torch.Tensor:
        """Random numbers laid out as the pre-pass lays out what it rotates."""
        x = self.random(tokens, heads)
        return x.view(1, heads, tokens, self.dim).transpose(1, 2)

    def lse(self) -> torch.Tensor:
        return torch.empty(1, self.heads, self.queries, device=self.device)


class _Forward:
    def __init__(
        self, dim: int, in_registers: bool, causal: bool, task: Task, machine: Machine
    ) -> None:
        from ..kernels import attention

        queries = task.seq
        if in_registers:  # serves few queries: as many as it is chosen for at most
            queries = attention.PREPASS_QUERIES * task.kv_heads // task.heads
            queries = min(max(1, queries), task.seq)
        inputs = _Inputs(dim, queries, causal, task, machine)
        self._inputs, self._in_registers, self.flops = inputs, in_registers, inputs.flops
        self._q = inputs.random(queries, task.heads)
        make_k = inputs.random if in_registers else inputs.scratch
        self._k = make_k(task.seq, task.kv_heads)
        self._v = inputs.random(task.seq, task.kv_heads)
        self.outputs: dict[str, tuple[torch.Tensor, ...]] = {
            "registers" if in_registers else "prepass": (torch.empty_like(self._q), inputs.lse())
        }

    def present(self, name: str) -> Any:
        from ..kernels import attention

        inputs = self._inputs
        return attention.choose_config(inputs.arch, inputs.dim, inputs.causal, self._in_registers)

    def launch(self, name: str, config: Any) -> Any:
        from ..kernels import attention

        inputs = self._inputs
        tensors = (self._q, self._k, self._v, *self.outputs[name])
        rotated = not self._in_registers
        return attention.plan(*tensors, inputs.scoring, rotated, inputs.arch, config)

    def expected(self, machine: Machine) -> dict[str, tuple[torch.Tensor, ...]]:
        (name,) = self.outputs
        machine.run(self.launch(name, self.present(name)))
        return {name: tuple(output.clone() for output in self.outputs[name])}


class _Backward:
    def __init__(self, dim: int, causal: bool, task: Task, machine: Machine) -> None:
        from ..kernels import attention, attention_backward

        self._inputs = inputs = _Inputs(dim, task.seq, causal, task, machine)
        self.flops = inputs.flops
        self._q = inputs.scratch(task.seq, task.heads)
        self._k = inputs.scratch(task.seq, task.kv_heads)
        self._v = inputs.random(task.seq, task.kv_heads)
        self._d_out = inputs.random(task.seq, task.heads)
        dq = inputs.random(task.seq, task.heads)
        dk, dv = torch.empty_like(self._v), torch.empty_like(self._v)
        self.outputs: dict[str, tuple[torch.Tensor, ...]]
        self.outputs = {"dk_dv": (dk, dv), "dk": (dk,), "dv": (dv,), "dq": (dq,)}
        # The weights the gradients belong to. q and k count as rotated: no pairs are left.
        out, self._lse = torch.empty_like(self._d_out), inputs.lse()
        self._delta = torch.empty_like(self._lse)
        rotation = inputs.scoring.rotation
        scoring = inputs.scoring._replace(
            rotation=rotation._replace(steps=rotation.steps[:, :, :0])
        )
        tensors = (self._q, self._k, self._v, out, self._lse)
        machine.run(attention.plan(*tensors, scoring, True, inputs.arch))
        deltas = (self._d_out, None, out, self._lse, self._delta)
        machine.run(attention_backward.plan_delta(*deltas))

    def present(self, name: str) -> Any:
        from ..kernels import attention_backward

        configs = attention_backward.choose_configs(self._inputs.arch, self._inputs.dim)
        if name == "dk_dv":
            return configs.dk if configs.dv is None else None
        if name == "dk" and configs.dv is None:
            return None
        return getattr(configs, name)

    def _launches(self, configs: Any) -> list[Any]:
        from ..kernels import attention_backward

        inputs = self._inputs
        launches: list[Any] = attention_backward.plan(
            *(self._d_out, self._q, self._k, self._v, self._lse, self._delta),
            *(self.outputs["dq"][0], *self.outputs["dk_dv"]),
            *(inputs.scoring, inputs.arch, configs),
        )
        return launches

    def launch(self, name: str, config: Any) -> Any:
        from ..kernels import attention_backward

        of_values = None if name == "dk_dv" else config
        launches = self._launches(attention_backward.Configs(config, of_values, config))
        return launches[{"dk_dv": 0, "dk": 0, "dv": 1, "dq": -1}[name]]

    def expected(self, machine: Machine) -> dict[str, tuple[torch.Tensor, ...]]:
        for launch in self._launches(None):
            machine.run(launch)
        return {name: tuple(x.clone() for x in xs) for name, xs in self.outputs.items()}
