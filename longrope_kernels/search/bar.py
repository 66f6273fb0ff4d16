"""The bar of a search on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from .base import Search

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {per_minute}{postfix}]"


class SearchBar(tqdm):  # type: ignore[misc]
    """Candidates judged so far, of all; the time left, and the best beside the best formula."""

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        super().__init__(desc=name, bar_format=_FORMAT, dynamic_ncols=True, disable=quiet)
        self._of: Search | None = None

    @property
    def format_dict(self) -> Mapping[str, Any]:
        """What the format is filled with, and candidates a minute of this run."""
        found: dict[str, Any] = dict(super().format_dict)
        seconds, done = found["elapsed"], found["n"] - found["initial"]
        found["rate"] = done / seconds if done and seconds else None
        found["per_minute"] = f"{60 * found['rate']:.1f} a minute" if found["rate"] else "..."
        return found

    def show(self, search: Search) -> None:
        """The state of a search; of another one than before the bar begins anew."""
        if self.disable:
            return
        if search is not self._of:
            self._of = search
            self.reset(search.total + search.formulas)
            self.n = self.initial = search.judged  # what an earlier run has done has no rate
        self.total = max(search.total + search.formulas, search.judged)
        self.update(search.judged - self.n)
        self.set_postfix_str(so_far(search))


def so_far(search: Search) -> str:
    """The best candidate beside the best formula, and how well windows rank candidates."""
    parts = []
    if search.best is not None:
        parts.append(f"best {search.best.fitness:.4g}")
    known = {name: one.fitness for name, one in search.compared.items() if one.rank[0] == 0}
    if known:
        name = min(known, key=lambda one: known[one])
        parts.append(f"{name} {known[name]:.4g}")
    if search.stage == "formulas" or search.sieve is None:
        return ", ".join(parts)
    parts.append(f"{search.evaluated} at the full length")
    if search.correlation is not None:
        parts.append(f"rank correlation {search.correlation:.2f}")
    return ", ".join(parts if search.sifts else [*parts, "coarse switched off"])
