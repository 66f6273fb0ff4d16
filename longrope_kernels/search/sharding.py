"""Fine-tuning over processes that share the weights (FSDP2), and checkpoints that all write.

accelerate's own FSDP2 serves no CPUs, where this is tested: torch's `fully_shard` does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .ranks import is_shared, rank_count


def share_weights(module: nn.Module, device: str) -> None:
    """Shard weights, gradients and what an optimiser makes of them over all processes, in place.

    Layers are whole while they run, one after another; what is around them (embedding, norm, head)
    from the forward to the end of the backward. Gradients are averaged over all processes.

    Args:
        module: the root, which is what a training step calls.
        device: its type; weights on another one are moved there shard by shard.

    Raises:
        ValueError: there are no layers that could be sharded one by one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [x for x in module.modules() if isinstance(x, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "model: expected decoder layers of transformers' GradientCheckpointingLayer where "
            "processes share the weights, got none; --no-shard"
        )
    everyone = init_device_mesh(device, (rank_count(),))
    for layer in layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(module, mesh=everyone)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on rank 0, and nothing elsewhere, on the CPU; every process calls it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    first: dict[nn.Parameter, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if whole and first.setdefault(value, name) != name:  # tied, and gathered twice
            whole[name] = whole[first[value]]
    return whole


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process writes its part of weights and optimiser."""
    with _quiet():
        save_parts(_state(model, optimizer), checkpoint_id=folder, no_dist=not is_shared())


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What `save` wrote, sharded as before or not."""
    state = _state(model, optimizer)
    with _quiet():
        load_parts(state, checkpoint_id=folder, no_dist=not is_shared())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's note that a process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, of_optimizer = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": of_optimizer}
