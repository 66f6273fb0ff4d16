"""A rotary embedding as a value: factor sets, their tables, configs and files. No kernel here."""

from .factor_set import FactorSet
from .value import Rope

__all__ = ["FactorSet", "Rope"]
