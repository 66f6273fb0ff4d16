"""`rerotate_`: turns rotated keys in place to where another rope puts them."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..backends import choose
from ..calls import arguments, values
from ..calls.records import RotaryCall, Selection
from ..rope.tables import UNBOUNDED, Tables
from ..rope.value import Rope
from ..torch_private import is_plain, made_to_stay
from .factors import like
from .rotary import check_writable, no_heads, rotate_


def rerotate_(
    k_cache: torch.Tensor,
    positions: torch.Tensor,
    old: Rope,
    new: Rope,
    *,
    old_sets: torch.Tensor | None = None,
    new_sets: torch.Tensor | None = None,
    layout: arguments.Layout = "bshd",
    backend: str | None = None,
) -> torch.Tensor:
    """Turn rotated keys from one embedding to another, in place.

    For caches that hold rotated keys, and other people's attention kernels: at the crossing from a
    short to a long factor set, cached keys turn by the difference of two angles (exact at any
    position, as in `apply_rotary`) and are multiplied by the ratio of the attention factors. One
    rotation and one rounding for each key; where the thresholds of the two sets differ, keys past
    both are rounded twice. A cache of unrotated keys needs none of this: see `decode`.

    Args:
        k_cache: (batch, seq, kv_heads, dim), or as ``layout`` says; float32, bfloat16 or float16,
            and float64 in the reference backend. A paged cache is (blocks, block_size, kv_heads,
            dim), each block a batch entry.
        positions: (seq,) or (batch, seq), int32 or int64, at which the keys were rotated.
        old: what the keys were rotated by; a `Rope` with the pairs and pairing of ``new``.
        new: what they shall be rotated by.
        old_sets: (batch,) int32, the set of ``old`` for each batch entry; needed where it has
            several.
        new_sets: (batch,) int32, the same of ``new``.
        layout: "bshd", "bhsd" or "thd"; "thd" is one sequence.
        backend: one that `apply_rotary` knows, or None for the fastest that can serve.

    Returns:
        k_cache.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
        RuntimeError: the named backend is not available.
    """
    arguments.check_tensor("k_cache", k_cache)
    for name, rope in (("old", old), ("new", new)):
        if not isinstance(rope, Rope):
            raise TypeError(f"{name}: expected a Rope, got {type(rope).__name__}")
    if (old.pairs, old.interleaved) != (new.pairs, new.interleaved):
        raise ValueError(
            f"new: expected {old.pairs} pairs and interleaved={old.interleaved} as in old, got "
            f"{new.pairs} and {new.interleaved}"
        )
    arguments.check_heads("k_cache", k_cache, layout, new.rotary_dim)
    k = arguments.as_bshd(k_cache, layout)
    batch, seq = k.shape[:2]
    arguments.check_positions("positions", positions, batch, seq, k)
    positions = arguments.as_rows(positions, batch, seq)
    old_index = _check_sets("old_sets", old_sets, len(old.sets), batch, k)
    new_index = _check_sets("new_sets", new_sets, len(new.sets), batch, k)
    sets = new_index
    if old_index is not None:
        sets = old_index * len(new.sets) + (0 if new_index is None else new_index)
    name = choose.choose_rotary(backend, k.device.type, k.dtype == torch.float64)
    check_writable("k_cache", k_cache)
    for tables in _turns(old, new, k):
        rotate_(RotaryCall(no_heads(k), k, positions, tables, Selection(sets=sets)), name)
    return k_cache


def _check_sets(
    name: str, sets: torch.Tensor | None, count: int, batch: int, k: torch.Tensor
) -> torch.Tensor | None:
    """The sets within their bounds, or None where there is but one."""
    if sets is not None:
        arguments.check_per_sequence(name, sets, batch, k)
        if sets.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {sets.dtype}")
        values.check_sets(name, count, sets)
    if count == 1:
        return None
    if sets is None:
        raise ValueError(
            f"{name}: expected shape ({batch},) with a Rope of {count} factor sets, got None"
        )
    return sets.clamp(0, count - 1)


def _turns(old: Rope, new: Rope, k: torch.Tensor) -> tuple[Tables, ...]:
    if torch.compiler.is_compiling() or not is_plain(k):
        return _make_turns(old, new, k)
    return _kept_turns(old, new, k.device)


@lru_cache(maxsize=64)
def _kept_turns(old: Rope, new: Rope, device: torch.device) -> tuple[Tables, ...]:
    with made_to_stay():
        return _make_turns(old, new, torch.empty(0, device=device))


def _make_turns(old: Rope, new: Rope, x: torch.Tensor) -> tuple[Tables, ...]:
    """The rotations from each set of ``old`` to each of ``new``: one for each pair, or two.

    Between their thresholds one set keeps the original embedding and the other does not, so tokens
    turn by one of three angles: the first table has those below the upper threshold, the second
    what is left for tokens above it. Set ``i * len(new.sets) + j`` leads from set i to set j.
    """
    host = torch.device("cpu")
    of_old, of_new = (like(rope.tables(host), x) for rope in (old, new))
    found = []
    for upper in (False, True):
        rows: dict[str, list[torch.Tensor]] = {"inv_freq": [], "steps": []}
        n_hats, ratios = [], []
        for i, a in enumerate(old.sets):
            for j, b in enumerate(new.sets):
                # Which row of each set serves tokens below, between and above the thresholds.
                between = int(a.n_hat <= b.n_hat), int(b.n_hat <= a.n_hat)
                below, above = (between, (1, 1)) if upper else ((0, 0), between)
                for name, kept in rows.items():
                    one, other = getattr(of_old, name)[i], getattr(of_new, name)[j]
                    turns = [other[k[1]] - one[k[0]] for k in (below, above)]  # steps wrap around
                    if upper:
                        turns = [torch.zeros_like(turns[0]), turns[1] - turns[0]]
                    kept.append(torch.stack(turns))
                scales = [
                    (b.attention_factor if k[1] else 1.0) / (a.attention_factor if k[0] else 1.0)
                    for k in (below, above)
                ]
                ratios.append(scales[1] / scales[0] if upper else scales[1])
                n_hats.append(max(a.n_hat, b.n_hat) if upper else min(a.n_hat, b.n_hat))
        tables = Tables(
            torch.stack(rows["steps"]),
            torch.tensor(n_hats, device=host),
            torch.tensor(ratios, dtype=torch.float64, device=host),
            torch.full((len(n_hats),), UNBOUNDED, device=host),
            torch.stack(rows["inv_freq"]),
            old.interleaved,
        )
        found.append(tables.to(x.device))
    thresholds = {(a.n_hat, b.n_hat) for a in old.sets for b in new.sets}
    return tuple(found) if any(x != y for x, y in thresholds) else (found[0],)
