"""What ``longrope demo`` runs: a model with and without the kernels, errors, times, a figure."""

from .run import run

__all__ = ["run"]
