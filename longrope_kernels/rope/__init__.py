"""A rotary embedding as a value: factor sets, their tables, configs and files. No kernel here."""

from .value import FactorSet, Rope

__all__ = ["FactorSet", "Rope"]
