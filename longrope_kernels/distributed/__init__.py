"""Context parallelism: one sequence over many ranks, on torch.distributed alone."""

from .attention import attention
from .schedule import Schedule, choose_schedule
from .shards import shard, unshard

__all__ = ["Schedule", "attention", "choose_schedule", "shard", "unshard"]
