"""Context parallelism: one sequence over many ranks, on torch.distributed alone."""

from .attention import attention
from .cache import SpreadCache
from .decode import decode
from .schedule import Schedule, choose_schedule
from .shards import shard, unshard

__all__ = [
    "Schedule",
    "SpreadCache",
    "attention",
    "choose_schedule",
    "decode",
    "shard",
    "unshard",
]
