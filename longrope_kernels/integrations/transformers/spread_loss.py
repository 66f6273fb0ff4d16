"""The loss of a model of which each rank computes some tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...distributed import shard
from ...distributed.ranks import Group, agree, ranks_of
from ...distributed.shards import Order
from ...distributed.sums import whole_sum
from .spread import digest

_NAME = "_loss_function"  # where the setter of ``loss_function`` puts it


def heads_of(model: nn.Module, bases: list[Any]) -> list[Any]:
    """The models with a head around base models, whose loss is to know of the ranks.

    Raises:
        ValueError: a head of which nobody knows what it does with some of the tokens.
    """
    heads = []
    for module in model.modules():
        parts = list(module.modules())[1:]
        around = any(part is base for part in parts for base in bases)
        if not around or not hasattr(module, "loss_function"):
            continue
        if getattr(module, "loss_type", None) != "ForCausalLM":
            raise ValueError(
                "model: expected a causal language model or its base model with group=, got "
                f"{type(module).__name__}"
            )
        heads.append(module)
    return heads


def put_loss(head: Any, group: Group, order: Order) -> None:
    """Give a model the `SpreadLoss`."""
    former = vars(head).get(_NAME)
    head.loss_function = SpreadLoss(group, order, former)


def take_loss(model: nn.Module) -> None:
    """Undo `put_loss` in all parts of a model."""
    for module in model.modules():
        loss = vars(module).get(_NAME)
        if isinstance(loss, SpreadLoss):
            if loss.former is None:
                delattr(module, _NAME)
            else:
                module.loss_function = loss.former


class SpreadLoss:
    """The loss of a causal language model of which each rank has the logits of its tokens.

    In place of ``loss_function``: labels are those of the whole. The value is that of the whole, on
    all ranks; the *mean* of the ranks' gradients, as DDP and FSDP make it, is that of one process.
    """

    def __init__(self, group: Group, order: Order, former: Any) -> None:
        self.group, self.order, self.former = group, order, former

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """As transformers' own; ``shift_labels`` are whole as well."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.device)
        ranks = ranks_of(self.group)
        agree(ranks, {"labels": digest("labels", shift_labels)}, logits.device)
        own = shard(shift_labels, self.group, -1, order=self.order)
        if own.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels: expected those of all tokens on each rank, got {tuple(labels.shape)} "
                f"where this rank has logits of {tuple(logits.shape[:-1])}"
            )
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, -2),
            own.flatten(),
            ignore_index=ignore_index,
            reduction="sum",
        )
        items = num_items_in_batch
        if items is None:
            items = (shift_labels != ignore_index).sum()
        return whole_sum(total / items, ranks)
