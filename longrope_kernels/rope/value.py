"""`Rope`: the factor sets of a LongRoPE embedding as one value. It calls no kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..torch_private import made_to_stay, static_in_graphs
from . import files, hf_config, hf_writer
from .checks import warn_about
from .factor_set import FASTEST, FactorSet, as_factors, is_int, is_number
from .formulas import LARGEST, extension_attention_factor
from .tables import UNBOUNDED, Tables, make_tables

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: factor sets by sequence length, base and pairing.

    A sequence of total length ``L`` (cached tokens and new ones) takes the first set with
    ``L <= max_length``, else the last. The value is frozen, compares and hashes by its numbers,
    and keeps its tables on every device that asked for them.

    Attributes:
        sets: with ascending ``max_length`` and the same number of factors each.
        base: ``b`` in ``theta_i = b**(-2i / R)``, ``R = 2 * pairs``.
        interleaved: pairs are dimensions ``(2i, 2i + 1)`` (GPT-J) rather than ``(i, i + P)``
            (GPT-NeoX, Llama, Phi).

    Raises:
        ValueError, TypeError: naming the attribute that is out of range.
    """

    sets: tuple[FactorSet, ...]
    base: float = 10000.0
    interleaved: bool = False
    _tables: dict[torch.device, Tables] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        sets = (self.sets,) if isinstance(self.sets, FactorSet) else tuple(self.sets)
        object.__setattr__(self, "sets", sets)
        check_base(self.base)
        object.__setattr__(self, "base", float(self.base))
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"interleaved: expected a bool, got {self.interleaved!r}")
        if not sets or not all(isinstance(s, FactorSet) for s in sets):
            raise TypeError(f"sets: expected one or more FactorSet, got {self.sets!r}")
        counts = [len(s.factors) for s in sets]
        if len(set(counts)) != 1:
            raise ValueError(f"sets: expected as many factors in each set, got {counts}")
        bounds = [UNBOUNDED if s.max_length is None else s.max_length for s in sets]
        if sorted(set(bounds)) != bounds:
            shown = [s.max_length for s in sets]
            raise ValueError(f"sets: expected ascending max_length (None last), got {shown}")
        for factor_set in sets:
            _check_frequencies(self.base, factor_set.factors)
        self.tables(_HOST)

    @classmethod
    def plain(cls, rotary_dim: int, *, base: float = 10000.0, interleaved: bool = False) -> Rope:
        """The original rotary embedding: every factor 1, no threshold.

        Args:
            rotary_dim: R, the number of rotated dimensions of a head; even.
            base: ``b`` of the frequencies ``b**(-i / P)`` of P pairs.
            interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
        """
        if not is_int(rotary_dim) or rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected an even number above 0, got {rotary_dim!r}")
        return cls((FactorSet((1.0,) * (rotary_dim // 2)),), base, interleaved)

    @classmethod
    def longrope(
        cls,
        short_factor: Sequence[float],
        long_factor: Sequence[float],
        original_max_position_embeddings: int,
        max_position_embeddings: int | None = None,
        *,
        attention_factor: float | tuple[float, float] | None = None,
        n_hat: int | tuple[int, int] = 0,
        base: float = 10000.0,
        interleaved: bool = False,
    ) -> Rope:
        """A short and a long set, as published for the Phi-3 family.

        Args:
            short_factor: ``lambda`` for sequences up to ``original_max_position_embeddings``.
            long_factor: ``lambda`` for all longer ones (4096 tokens are short, 4097 long).
            original_max_position_embeddings: in tokens.
            max_position_embeddings: in tokens; with it the attention factor of both sets is
                ``sqrt(1 + ln s / ln original)``, ``s`` the extension ratio, and 1 where
                ``s <= 1``. Needed unless ``attention_factor`` is given.
            attention_factor: overrides that formula; one for both sets, or (short, long).
            n_hat: threshold, see `FactorSet`; one for both sets, or (short, long).
            base: ``b`` of the frequencies ``b**(-i / P)`` of P pairs.
            interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
        """
        original = original_max_position_embeddings
        _check_length("original_max_position_embeddings", original, 2)
        if not is_int(original) or original > 2**31:
            raise ValueError(
                "original_max_position_embeddings: expected a whole number of tokens up to 2**31, "
                f"got {original}"
            )
        if max_position_embeddings is not None:
            _check_length("max_position_embeddings", max_position_embeddings, 1)
        if attention_factor is None:
            if max_position_embeddings is None:
                raise ValueError(
                    "max_position_embeddings: expected a number of tokens, or attention_factor "
                    "in its place; got neither"
                )
            attention_factor = extension_attention_factor(
                max_position_embeddings, original_max_position_embeddings
            )
        short_a, long_a = _pair("attention_factor", attention_factor)
        short_n, long_n = _pair("n_hat", n_hat)
        short = as_factors("short_factor", short_factor)
        long = as_factors("long_factor", long_factor)
        if len(short) != len(long):
            raise ValueError(
                f"long_factor: expected {len(short)} factors as in short_factor, got {len(long)}"
            )
        sets = (
            FactorSet(short, short_n, short_a, original_max_position_embeddings),
            FactorSet(long, long_n, long_a),
        )
        return cls(sets, base, interleaved)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        length: int | None = None,
        n_hat: int | tuple[int, int] | None = None,
        interleaved: bool = False,
    ) -> Rope:
        """The `Rope` of a Hugging Face config, of any type of transformers but axial.

        Types: default, linear, dynamic, yarn, llama3, proportional (one set each), longrope and
        its old names "su" and, in Phi-3's files of May 2024, "yarn" (two sets). An original length
        that the config does not have is found as in transformers: 4096 for Phi-3, else the maximum.

        Args:
            config: a config object or dict with ``rope_parameters`` (transformers 5) or
                ``rope_scaling`` (4).
            length: read for type dynamic alone: the sequence length in tokens, cached and new,
                its factors are made for; None for ``max_position_embeddings``, up to which
                nothing is scaled. The set's ``max_length`` says for which length they are.
            n_hat: as in `Rope.longrope`; None reads ``longrope_n_hat``, a key of this package on
                the config's top level (one number, or [short, long]), 0 where there is none.
            interleaved: as in `Rope`; a config has no field for it.

        Raises:
            ValueError, TypeError: naming the field or argument that is missing, out of range or
                of another type.

        Warns:
            FactorWarning: the lists of a longrope config are odd, as in `scaling.check`.
        """
        if n_hat is None:
            n_hat = hf_config.read_n_hat(config)
        if hf_config.rope_type(config) in hf_config.LONGROPE_TYPES:
            arguments = hf_config.read_longrope_config(config)
            rope = cls.longrope(**arguments, n_hat=n_hat, interleaved=interleaved)
            warn_about([s.factors for s in rope.sets], hf_config.extension_ratio(config))
            return rope
        if isinstance(n_hat, tuple | list):
            raise ValueError(f"n_hat: expected one value for a rope of one set, got {n_hat!r}")
        factor_set = FactorSet(**hf_config.read_set(config, length), n_hat=n_hat)
        return cls((factor_set,), hf_config.read_base(config), interleaved)

    @classmethod
    def load(cls, path: files.FilePath) -> Rope:
        """The `Rope` that `save` wrote, number for number.

        Args:
            path: the file, or a folder with a ``longrope.json``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming the file and what in it is not as `save` writes it.

        Warns:
            FactorWarning: the factors are odd, as in `scaling.check`.
        """
        content = files.read_sidecar(path)
        try:
            sets = tuple(FactorSet(**arguments) for arguments in content["sets"])
            rope = cls(sets, content["base"], content["interleaved"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        warn_about([s.factors for s in rope.sets], where=str(path))
        return rope

    def save(self, path: files.FilePath) -> None:
        """Write all of this rope as JSON: all sets, thresholds, base and pairing, exactly.

        Args:
            path: the file, or a folder, which gets a ``longrope.json``.
        """
        files.write_sidecar(path, self.sets, self.base, self.interleaved)

    def to_config(
        self,
        *,
        version: int = 5,
        head_dim: int | None = None,
        original_max_position_embeddings: int | None = None,
        max_position_embeddings: int | None = None,
    ) -> dict[str, Any]:
        """The fields of a Hugging Face config that say what this rope is, to merge into one.

        One set without scaling is written as type default, one of equal factors as linear, all
        else as longrope; one set then stands in both lists. `from_config` reads the same rope
        from it (two equal sets in that last case). A threshold goes to ``longrope_n_hat``, which
        transformers keeps and only this package reads. What would contradict these fields in the
        config they are merged into is among them as None.

        Args:
            version: of transformers: 5 writes ``rope_parameters``, 4 ``rope_scaling``.
            head_dim: D; with it ``head_dim`` and ``partial_rotary_factor`` are written.
            original_max_position_embeddings: in tokens; needed for one set that goes to type
                longrope. Two sets know it: the bound of the short one.
            max_position_embeddings: in tokens; written where given. Where it gives the attention
                factor by the formula of `longrope`, none is written (Phi-3 of transformers 4
                allows no field for it).

        Raises:
            ValueError: no type says exactly what this rope is, and why; `save` can keep it.
        """
        return hf_writer.write_config(
            self.sets,
            self.base,
            self.interleaved,
            version=version,
            head_dim=head_dim,
            original_max_position_embeddings=original_max_position_embeddings,
            max_position_embeddings=max_position_embeddings,
        )

    def compose(self, later: Rope) -> Rope:
        """This rope extended by a later stage, whose factors are relative to it: their product.

        Set by set; where one of the two has a single set, it goes with each set of the other.
        ``n_hat`` and ``attention_factor`` are those of the later stage, which was made for the
        final length; so is ``max_length``, unless the later stage has a single set. Below
        ``n_hat`` stands the original embedding, not that of the earlier stage.

        Args:
            later: as many pairs, the same base and pairing.

        Raises:
            ValueError: they do not fit each other.
            TypeError: ``later`` is not a `Rope`.
        """
        if not isinstance(later, Rope):
            raise TypeError(f"later: expected a Rope, got {type(later).__name__}")
        for name in ("pairs", "base", "interleaved"):
            wanted, got = getattr(self, name), getattr(later, name)
            if wanted != got:
                raise ValueError(f"later: expected {name} = {wanted} as here, got {got}")
        bounds, later_bounds = ([s.max_length for s in r.sets] for r in (self, later))
        if min(len(bounds), len(later_bounds)) > 1 and bounds != later_bounds:
            raise ValueError(
                f"later: expected one set, or sets with max_length {bounds}, got {later_bounds}"
            )
        if len(later_bounds) >= len(bounds):
            bounds = later_bounds
        first = self.sets if len(self.sets) > 1 else self.sets * len(bounds)
        second = later.sets if len(later.sets) > 1 else later.sets * len(bounds)
        sets = []
        for one, two, bound in zip(first, second, bounds, strict=True):
            factors = tuple(a * b for a, b in zip(one.factors, two.factors, strict=True))
            sets.append(FactorSet(factors, two.n_hat, two.attention_factor, bound))
        return Rope(tuple(sets), self.base, self.interleaved)

    @property
    def pairs(self) -> int:
        """``P``, the number of rotated pairs."""
        return len(self.sets[0].factors)

    @property
    def rotary_dim(self) -> int:
        """``R = 2P``, the number of rotated dimensions of a head."""
        return 2 * self.pairs

    def set_index(self, length: int) -> int:
        """The index of the set for a sequence of ``length`` tokens (cached and new)."""
        for index, factor_set in enumerate(self.sets):
            if factor_set.max_length is None or length <= factor_set.max_length:
                return index
        return len(self.sets) - 1

    def for_length(self, length: int) -> Rope:
        """This rope with one set, that of a sequence of ``length`` tokens, for any length.

        For whoever knows the final length: a prompt that is prefilled in chunks, a text that is
        about to be generated. It stays on one set where it would cross into another.

        Args:
            length: in tokens, cached and new ones.
        """
        _check_length("length", length, 1)
        chosen = replace(self.sets[self.set_index(length)], max_length=None)
        return Rope((chosen,), self.base, self.interleaved)

    def to(self, device: torch.device | str) -> Rope:
        """This rope, its tables made on ``device`` now, so that no later call copies them.

        Raises:
            ValueError: ``device`` is none that is here.
        """
        self.tables(check_device(device))
        return self

    def tables(self, device: torch.device) -> Tables:
        """What the backends read, on ``device``, no set chosen; copied there once and kept.

        A graph that is traced before `to` was called on that device copies them on each run:
        what is made inside a graph cannot be kept beyond it.

        Raises:
            RuntimeError: a CUDA graph is being captured, and there are none on the device yet.
        """
        tables = self._tables.get(device)
        if tables is not None:
            return tables
        if torch.compiler.is_compiling():
            return self._tables_on(device)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"factors: this Rope has no tables on {device} yet and a CUDA graph is being "
                f"captured; call rope.to({str(device)!r}) before the capture"
            )
        with made_to_stay():
            tables = self._tables_on(device)
        if type(tables.steps) is torch.Tensor:
            for table in tables[:-1]:
                static_in_graphs(table)
            self._tables[device] = tables
        return tables

    def _tables_on(self, device: torch.device) -> Tables:
        device = torch.device(device)  # a name does, too
        host = self._tables.get(_HOST) or make_tables(self.sets, self.base, self.interleaved)
        return host.to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rope, (self.sets, self.base, self.interleaved)


def check_base(base: float) -> None:
    if not is_number(base):
        raise TypeError(f"base: expected a number, got {base!r}")
    if not 0 < base < LARGEST:
        raise ValueError(f"base: expected a finite number above 0, got {base}")


def _check_frequencies(base: float, factors: tuple[float, ...]) -> None:
    """A base below 1 makes later pairs faster than the first, by up to ``1 / base``."""
    if base >= 1:
        return
    for i, factor in enumerate(factors):
        # In logarithms: neither the power nor the quotient need be in float64's range.
        if -i / len(factors) * math.log(base) - math.log(factor) > math.log(FASTEST):
            raise ValueError(
                f"base: expected a number by which no pair turns by more than 2**24 rad a token, "
                f"got {base}, with the factor {factor} of pair {i}"
            )


def check_device(device: torch.device | str) -> torch.device:
    """The device, with its index where it has one; ValueError where it is not here."""
    try:
        return torch.empty(0, device=device).device
    # torch raises AssertionError where it was built without CUDA.
    except (AssertionError, RuntimeError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is here, got {device!r}: {why}") from error


def _check_length(name: str, value: float, least: int) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number of tokens, got {value!r}")
    if not least <= value < LARGEST:
        raise ValueError(f"{name}: expected at least {least} tokens, got {value}")


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """(short, long) of a pair, or of one value for both."""
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected one value or (short, long), got {value!r}")
    return value[0], value[1]
