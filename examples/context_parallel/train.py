"""Train a model of which all processes share the weights, and some of them each sequence.

    torchrun --nproc-per-node 4 examples/context_parallel/train.py --context 2

FSDP2 (torch's ``fully_shard``) shards weights, gradients and the optimiser's state over all
processes; with ``--context 2`` pairs of processes share a sequence, each of them computing half of
its tokens, and the pairs have sequences of their own. ``--context 1`` is FSDP alone. The losses
and gradient norms printed are the same for any number of processes.

On GPUs, with NCCL, each process takes that of its local rank.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from longrope_kernels import FactorSet, Rope
from longrope_kernels.integrations.transformers import enable

ORIGINAL, LENGTH, BATCH, STEPS = 64, 256, 2, 3  # tokens, tokens, sequences of a step, steps
PERIOD = 16  # of a text: a model that looks 15 tokens back knows what comes


def tiny_model() -> Any:
    """A random Llama over bytes; a user loads one by ``from_pretrained``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ORIGINAL,
    )
    return LlamaForCausalLM(config)


def rope() -> Rope:
    """For four times the length: a short set, and a long one from beyond it."""
    short = FactorSet((1.0,) * 8, max_length=ORIGINAL)
    return Rope((short, FactorSet(tuple(4.0 ** (i / 7) for i in range(8)), attention_factor=1.1)))


def batches(share: int, shares: int) -> Any:
    """The rows of each step that a group of processes has: (rows, LENGTH) int64."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        whole = torch.randint(0, 256, (BATCH, PERIOD), generator=generator)
        yield whole.repeat(1, LENGTH // PERIOD)[share::shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1, help="processes that share a sequence")
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    size = dist.get_world_size()
    # One rank after another shares a sequence: within a machine, where links are fast.
    mesh = init_device_mesh(
        device, (size // given.context, given.context), mesh_dim_names=("data", "context")
    )
    model = tiny_model().to(device)
    # A group of one would be served as well; without one the model is as in one process.
    enable(model, rope=rope(), group=mesh["context"] if given.context > 1 else None)
    sharded(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    model.train()
    for tokens in batches(mesh["data"].get_local_rank(), size // given.context):
        # Whole sequences on every process of a pair; its own tokens are computed.
        tokens = tokens.to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / size  # each group has the loss of its sequences
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"loss {mean.item():.4f}, gradient norm {norm.item():.4f}")
    dist.destroy_process_group()


def sharded(model: Any, device: str) -> Any:
    """FSDP2 over all processes: gradients are averaged over data and context alike."""
    everyone = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    return fully_shard(model, mesh=everyone)


if __name__ == "__main__":
    main()
