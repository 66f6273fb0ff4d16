"""What `enable` puts into one base model, and how it is taken out again."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .architectures import Architecture, by_rotary_class
from .attention import NAME, Enabled
from .caches import before_attention
from .contacts import contact
from .rotary import ExactRotaryEmbedding
from .sequences import Memory
from .settings import Settings
from .spread import put_hooks


class Slot(NamedTuple):
    """Where a base model holds its rotary module, replaced or not."""

    base: Any
    name: str
    module: Any
    architecture: Architecture

    @property
    def original(self) -> Any:
        """The rotary module of transformers."""
        return self.module.original if self.is_replaced else self.module

    @property
    def is_replaced(self) -> bool:
        return isinstance(self.module, ExactRotaryEmbedding)

    @property
    def attentions(self) -> list[Any]:
        return [m for m in self.base.modules() if isinstance(m, self.architecture.attention)]

    def put(self, replacement: ExactRotaryEmbedding) -> None:
        """Hand rotation, attention and caches over to this package."""
        settings, base = replacement.settings, self.base
        if settings.cache == "unrotated":
            former = base.config._attn_implementation
            # Who shares the config object may have been enabled before, and puts back what was.
            replacement.former_attention = None if former == NAME else former
            contact(base, "set_attn_implementation")(NAME)
        setattr(base, self.name, replacement)
        enabled = Enabled(settings, Memory())
        base.longrope = enabled
        if not self.architecture.hands_on_window:
            enabled = enabled._replace(window=base.config.sliding_window)
        for module in self.attentions:
            module.longrope = enabled
        self.attentions[0].register_forward_pre_hook(before_attention, with_kwargs=True)
        if settings.group is not None:
            replacement.hooks = put_hooks(base)

    def use(self, settings: Settings) -> None:
        """Take other settings, in a slot that is replaced."""
        self.module.use(settings)
        for part in (self.base, *self.attentions):
            part.longrope = part.longrope._replace(settings=settings)

    def take_back(self) -> None:
        """Undo `put`."""
        setattr(self.base, self.name, self.module.original)
        for part in (self.base, *self.attentions):
            del part.longrope
        first = self.attentions[0]
        for key, hook in list(first._forward_pre_hooks.items()):
            if hook is before_attention:
                del first._forward_pre_hooks[key]
                first._forward_pre_hooks_with_kwargs.pop(key, None)
        for hook in self.module.hooks:
            hook.remove()
        if self.module.former_attention is not None:
            self.base.set_attn_implementation(self.module.former_attention)


def slots_of(model: nn.Module) -> list[Slot]:
    """All of a model."""
    found: list[Slot] = []
    for base in model.modules():
        if isinstance(base, ExactRotaryEmbedding):
            continue
        for name, module in base.named_children():
            if isinstance(module, ExactRotaryEmbedding):
                found.append(Slot(base, name, module, module.architecture))
            elif type(module) in by_rotary_class():
                found.append(Slot(base, name, module, by_rotary_class()[type(module)]))
    return found
