"""The head of a model of which each rank computes some tokens: its loss, and what it may keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...distributed import shard
from ...distributed.ranks import Group, agree, ranks_of, telling
from ...distributed.shards import Order
from ...distributed.sums import whole_sum
from .spread import INPUTS, by_name, caches_in, digest, is_step

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
    """Give a model the `SpreadLoss`, and refuse what its head would do with some of the tokens."""
    former = vars(head).get(_NAME)
    head.loss_function = SpreadLoss(group, order, former)
    hook = head.register_forward_pre_hook(head.loss_function.before_head, with_kwargs=True)
    head.loss_function.hook = hook


def take_loss(model: nn.Module) -> None:
    """Undo `put_loss` in all parts of a model."""
    for module in model.modules():
        loss = vars(module).get(_NAME)
        if isinstance(loss, SpreadLoss):
            loss.hook.remove()
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
        self.hook: Any = None

    def before_head(self, head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse ``logits_to_keep`` where it would keep other tokens on each rank.

        Raises:
            ValueError: it is not all, or of a prompt in a cache the last, which all ranks have.
        """
        given = by_name(head, args, kwargs)
        kept = given.get("logits_to_keep", 0)
        caches = caches_in(given)
        inputs = [given[name] for name in INPUTS if given.get(name) is not None]
        if not inputs or is_step(caches, inputs[0].shape[1]):
            return
        served = (0, 1) if caches else (0,)
        if not isinstance(kept, int) or kept not in served:
            shown = kept if isinstance(kept, int) else f"a {type(kept).__name__}"
            with telling(ranks_of(self.group), inputs[0]):
                raise ValueError(
                    f"logits_to_keep: expected {' or '.join(map(str, served))} with group=, where "
                    "each rank has the logits of its own tokens, and of a prompt in a cache those "
                    f"of the last, got {shown}"
                )

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
