"""The coarse fitness where caches hold unrotated keys: the last tokens of each text alone.

What stands before them is read once, under a rope near the best (`Search.reference`), and its keys
and values serve all candidates after it: each rotates them by its own rope. So all distances and
all keys are there, and most of the work is not done again. What it leaves out is what a rope
changes in the hidden states of the text before. Such a loss orders candidates, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..rope.value import Rope
from .fitness import Documents, Window
from .model import Losses


class BehindPrefix(Documents):
    """The windows of another fitness, of which the tokens that count are read under each rope."""

    def __init__(self, losses: Losses, windows: Sequence[Sequence[Window]]) -> None:
        """Nothing is read yet.

        Args:
            losses: the model, whose caches hold unrotated keys (``losses.keeps``).
            windows: by document, of one sequence each from position 0 on.
        """
        super().__init__(losses, windows)
        self._reference: Rope | None = None
        self._read: dict[int, Any] = {}

    def under(self, reference: Rope) -> None:
        """Read texts under another rope from now on."""
        if reference != self._reference:
            self._reference, self._read = reference, {}

    def _sums(
        self, ropes: Sequence[Rope], running: list[int], windows: Sequence[Window]
    ) -> list[float]:
        totals = [0.0] * len(running)
        for window in windows:
            text, length = self._text(window), len(window.tokens)
            for at, which in enumerate(running):
                found = self.losses.behind(ropes[which], text, self._end(window), length=length)
                totals[at] += found.double()[window.mask].sum().item()
        return totals

    def _text(self, window: Window) -> Any:
        """Its keys and values; where a device has no room beside those of others, alone."""
        assert self._reference is not None
        key = id(window)
        if key not in self._read:
            length = len(window.tokens)
            before = window.tokens[: length - len(self._end(window))]
            try:
                self._read[key] = self.losses.read(self._reference, before, length=length)
            except torch.OutOfMemoryError:
                if not self._read:
                    raise
                self._read = {}
        # Not within the handler, whose traceback holds the tensors that were too many.
        return self._read[key] if key in self._read else self._text(window)

    @staticmethod
    def _end(window: Window) -> torch.Tensor:
        """The tokens that count, and the one before them."""
        return window.tokens[-window.last - 1 :]
