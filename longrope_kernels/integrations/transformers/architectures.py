"""The models of transformers that `enable` knows: where their rotation and attention are.

None is written by hand: ``data/architectures.json`` is what `probe` found and a run proved
(``tools/architectures.py``), with the version of transformers that it ran on. A model that is not
in it, or another version, is probed when it is enabled.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import transformers

from ..families import proven

ROTATED_ALONE = "is served with cache='rotated' alone"


@dataclass(frozen=True)
class Architecture:
    """What `probe` finds out about the decoders of one modelling file.

    Its layers pass what the rotary module returns to a function of their file, and, where keys may
    lie unrotated, ``position_ids`` to their attention function.
    """

    rotary: type
    attention: tuple[type, ...]
    function: str  # apply_rotary_pos_emb, or one beside it
    interleaved: bool  # pairs are dimensions (2i, 2i + 1)
    hands_on_window: bool = True  # whether layers tell their attention function the sliding window
    unrotated: str = ""  # why keys can't lie unrotated in a cache; "" where they can

    @property
    def module(self) -> ModuleType:
        """Where the layers look for the function that rotates."""
        return importlib.import_module(self.attention[0].__module__)

    @property
    def name(self) -> str:
        """Of the family: ``llama`` of ``transformers.models.llama.modeling_llama``."""
        return self.rotary.__module__.rpartition(".modeling_")[2]


def known(rotary: type) -> Architecture | None:
    """The architecture whose rotary class this is, where a run has proved it on this version.

    A subclass may rotate by another formula.
    """
    if minor(transformers.__version__) != proven()["transformers"]:
        return None
    path = path_of(rotary)
    return _load(path) if path in _by_rotary() else None


@cache
def _by_rotary() -> dict[str, dict[str, Any]]:
    return {entry["rotary"]: entry for entry in proven()["families"].values()}


@cache
def _load(path: str) -> Architecture:
    entry = _by_rotary()[path]
    return Architecture(
        class_at(path),
        tuple(class_at(path) for path in entry["attention"]),
        entry["function"],
        entry["interleaved"],
        entry["hands_on_window"],
        entry["unrotated"],
    )


def path_of(cls: type) -> str:
    """``module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_at(path: str) -> type:
    """What `path_of` names."""
    module, _, name = path.rpartition(".")
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def minor(version: str) -> str:
    """``5.24`` of ``5.24.0``."""
    return ".".join(version.split(".")[:2])
