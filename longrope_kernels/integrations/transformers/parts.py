"""What `enable` puts into one base model, and how it is taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, known
from .attention import NAME, Enabled, before_base
from .caches import before_attention
from .contacts import contact, install
from .probe import UnfitError, has_frequencies, probed
from .ropes import kinds, rope_of
from .rotary import ExactRotaryEmbedding
from .settings import Cache, Settings
from .spread import put_hooks


class Place(NamedTuple):
    """Where a rotary module hangs, replaced or not."""

    owner: Any
    name: str
    module: Any

    @property
    def original(self) -> Any:
        """The rotary module of transformers."""
        return self.module.original if self.is_replaced else self.module

    @property
    def is_replaced(self) -> bool:
        return isinstance(self.module, ExactRotaryEmbedding)


class Slot(NamedTuple):
    """A base model and its rotary modules."""

    base: Any
    places: tuple[Place, ...]
    architecture: Architecture

    @property
    def module(self) -> Any:
        """The first of the rotary modules."""
        return self.places[0].module

    @property
    def original(self) -> Any:
        """The first rotary module of transformers."""
        return self.places[0].original

    @property
    def is_replaced(self) -> bool:
        return self.places[0].is_replaced

    @property
    def attentions(self) -> list[Any]:
        return [m for m in self.base.modules() if isinstance(m, self.architecture.attention)]

    @property
    def kinds(self) -> dict[str, tuple[Place, str | None]]:
        """By the kind of layers: the rotary module, and the type of layers it is told."""
        found: dict[str, tuple[Place, str | None]] = {}
        configs: list[Any] = []
        for place in self.places:
            config = place.original.config
            if any(config is one for one in configs):
                continue
            configs.append(config)
            for kind in kinds(place.original):
                found[kind or self.kind_of(place)] = place, kind
        return found

    def own_ropes(self, length: int | None = None) -> dict[str, Any]:
        """What the config says, for each kind of layers; of type dynamic for a length."""
        interleaved = self.architecture.interleaved
        return {
            kind: rope_of(place.original, layer_type, interleaved, length)
            for kind, (place, layer_type) in self.kinds.items()
        }

    def kind_of(self, place: Place) -> str:
        """ "" for all layers, or the name of one of several rotary modules."""
        config = place.original.config
        alike = [p for p in self.places if p.original.config is config]
        if len(alike) == len(self.places):
            return ""
        return next(str(n) for n, m in self.base.named_modules() if m is alike[0].module)

    def check_layers(self, cache: Cache) -> None:
        """Refuse what others have put in the place of parts that this model's class makes.

        Raises:
            ValueError: a rotary module whose tables are changed; no attention that is known, or,
                where keys lie unrotated, one beside those that may rotate or attend otherwise.
        """
        for place in self.places:
            rotary = place.original
            if rotary._forward_hooks or not _runs_own_forward(rotary, (type(rotary),)):
                raise ValueError(
                    f"model: expected a {type(rotary).__name__} without hooks behind its forward "
                    "and with that of its class, got another, whose cosines and sines no enabled "
                    "model makes; give what it does as rope=, or in hooks before its forward"
                )
        names = " or ".join(cls.__name__ for cls in self.architecture.attention)
        if not self.attentions:
            raise ValueError(f"model: expected {names} in {type(self.base).__name__}, got none")
        other = next(self._others(), None) if cache == "unrotated" else None
        if other is not None:
            path, module = other
            raise ValueError(
                f"model: expected {names} and its own forward at {path}, got a "
                f"{type(module).__name__} that may rotate or attend otherwise; "
                "enable(model, cache='rotated')"
            )

    def _others(self) -> Iterator[tuple[str, nn.Module]]:
        """Where other layers have a known attention module: those with another forward, and others.

        Modules of the same file (hybrids have states there) and wrappers around one may be there.
        """
        known_ones: tuple[Any, ...] = self.architecture.attention
        owners = {
            (type(owner), name)
            for owner in self.base.modules()
            for name, child in owner.named_children()
            if isinstance(child, known_ones)
        }
        for path, module in self.base.named_modules():
            if isinstance(module, known_ones):
                if not _runs_own_forward(module, known_ones):
                    yield path, module
                continue
            if type(module).__module__.startswith("torch."):  # a list, whose names say nothing
                continue
            for name, child in module.named_children():
                same_place = (type(module), name) in owners
                same_file = type(child).__module__ == known_ones[0].__module__
                holds_one = any(isinstance(part, known_ones) for part in child.modules())
                if same_place and not same_file and not holds_one:
                    yield f"{path}.{name}".lstrip("."), child

    def put(self, settings: Settings) -> None:
        """Hand rotation, attention and caches over to this package."""
        base, former = self.base, None
        install(self.architecture)
        if settings.cache == "unrotated":
            former = base.config._attn_implementation
            contact(base, "set_attn_implementation")({"": NAME})  # not that of encoders in it
        replacements = []
        for place in self.places:
            replacement = ExactRotaryEmbedding(
                place.module, self.architecture, settings, self.kind_of(place)
            )
            replacements.append(replacement)
            # Who shares the config object may have been enabled before, and puts back what was.
            replacement.former_attention = None if former == NAME else former
            setattr(place.owner, place.name, replacement)
        enabled = Enabled(settings)
        base.longrope = enabled
        if not self.architecture.hands_on_window:
            enabled = enabled._replace(reads_window=True)
        first = self.attentions[0]
        for module in self.attentions:
            module.longrope = enabled
            if former is not None and module.config is not base.config:  # of a copied layer
                module.config._attn_implementation = NAME
            # Not only of the first: PEFT keeps the original beside the copy that it trains.
            if getattr(module, "layer_idx", None) == getattr(first, "layer_idx", None):
                module.register_forward_pre_hook(before_attention, with_kwargs=True)
        if settings.group is not None:
            replacements[0].hooks = put_hooks(base)
        if settings.cache == "unrotated":
            base.register_forward_pre_hook(before_base, with_kwargs=True)

    def use(self, settings: Settings) -> None:
        """Take other settings, in a slot that is replaced."""
        for place in self.places:
            place.module.use(settings)
        for part in (self.base, *self.attentions):
            part.longrope = part.longrope._replace(settings=settings)

    def take_back(self) -> None:
        """Undo `put`."""
        for place in self.places:
            setattr(place.owner, place.name, place.module.original)
        former = self.module.former_attention
        for part in (self.base, *self.attentions):
            vars(part).pop("longrope", None)  # a layer may have come later
            for key, hook in list(part._forward_pre_hooks.items()):
                if hook in (before_attention, before_base):
                    del part._forward_pre_hooks[key]
                    part._forward_pre_hooks_with_kwargs.pop(key, None)
            if former is not None and part.config is not self.base.config:
                part.config._attn_implementation = former
        for hook in self.module.hooks:
            hook.remove()
        if former is not None:
            self.base.set_attn_implementation({"": former})


def slots_of(model: nn.Module, *, probing: bool = False) -> list[Slot]:
    """All of a model: those that are enabled, or known by the list; with ``probing`` any.

    Raises:
        UnfitError: with ``probing``, where no base model can be enabled, and why.
    """
    found: list[Slot] = []
    reasons: list[UnfitError] = []
    for base in model.modules():
        if not isinstance(base, PreTrainedModel):
            continue
        places: list[Place] = []
        architecture: Architecture | None = None
        for place in _places(base):
            if place.is_replaced:
                one: Architecture | None = place.module.architecture
            else:
                one = known(type(place.module))
                if one is not None and not any(
                    isinstance(module, one.attention) for module in base.modules()
                ):
                    one = None  # layers of its own around a rotary module that is known
                if one is None and probing:
                    try:
                        one = probed(type(base), type(place.module), base.config)
                    except UnfitError as unfit:
                        reasons.append(unfit)
            if one is not None:
                places.append(place)
                architecture = one
        if architecture is not None:
            found.append(Slot(base, tuple(places), architecture))
    if not found and reasons:
        raise UnfitError("; ".join(dict.fromkeys(str(reason) for reason in reasons)))
    return found


def _places(base: nn.Module) -> Iterator[Place]:
    """Of a base model itself, not of the base models in it."""
    pending = [base]
    while pending:
        owner = pending.pop()
        for name, module in owner.named_children():
            if isinstance(module, ExactRotaryEmbedding) or has_frequencies(module):
                yield Place(owner, name, module)
            elif not isinstance(module, PreTrainedModel):
                pending.append(module)


def _runs_own_forward(module: nn.Module, classes: tuple[Any, ...]) -> bool:
    """Whether that of one of its classes, wrapped or not (accelerate's hooks, torch.compile)."""
    ours = {inspect.unwrap(cls.forward) for cls in classes if isinstance(module, cls)}
    found: Any = inspect.unwrap(module.forward)
    return getattr(found, "__func__", found) in ours
