"""`export`: the factors of a `Rope` into an existing GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...rope.factor_files import to_arrays
from ...rope.factor_set import is_int
from ...rope.value import Rope
from .gguf_file import GgufFile, check_free

# Whose loader reads both lists of factors, as the engine was asked; Mistral's files say llama.
ARCHITECTURES = ("llama", "phi3")
_TENSORS = ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight")
STEP = 256  # llama.cpp rounds contexts up to multiples of it
# Metadata of a scaling, which the new one takes the place of.
_SCALING, _LINEAR = "rope.scaling.", "rope.scale_linear"


@dataclass(frozen=True)
class Exported:
    """What a file says now.

    Attributes:
        path: of the file.
        rope: of two sets, which may be equal, its factors rounded to float32.
        length: ``context_length``, in tokens.
    """

    path: Path
    rope: Rope
    length: int

    @property
    def original(self) -> int:
        """The bound of the short set, in tokens."""
        bound = self.rope.sets[0].max_length
        assert bound is not None
        return bound

    @property
    def short_context(self) -> int:
        """The longest context, in tokens, that llama.cpp takes the short set for; 0 for none."""
        return self.original // STEP * STEP

    @property
    def long_context(self) -> int:
        """The longest context, in tokens, that llama.cpp takes the long set for; 0 for none."""
        return self.length if -(-self.length // STEP) * STEP > self.original else 0


def export(
    rope: Rope,
    source: Path,
    target: Path,
    *,
    length: int | None,
    original: int | None = None,
    replace_factors: bool = False,
) -> Exported:
    """Write a copy of a GGUF file whose model is rotated by ``rope`` in llama.cpp.

    Tensors of weights are copied as they are, of any quantisation, and so is all metadata but that
    of the rope. llama.cpp takes the short set where it was started with a context up to
    ``original``, and the long one else, whatever the length of a sequence.

    Args:
        rope: of one set, which then serves both, or two; without a threshold, and of the base and
            the number of pairs that the file says.
        source: a whole GGUF file of an architecture of `ARCHITECTURES`.
        target: the file to write, whole or not at all; may be ``source``.
        length: in tokens, the new ``context_length``; None is refused, after all else.
        original: in tokens, the bound of the short set; a rope of two sets knows it. Of one set
            None is the file's ``context_length``.
        replace_factors: write over factors or another scaling that the file has, and over a
            ``target`` that is there.

    Raises:
        FileNotFoundError: there is no ``source``.
        FileExistsError: there is a ``target`` already.
        ValueError: naming what the format or the loader can't say, or what in the file contradicts
            the rope. Nothing is written then.
    """
    _check_sayable(rope)
    file = GgufFile(source)
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source}: expected an architecture whose loader in llama.cpp reads factors, "
            f"{' or '.join(ARCHITECTURES)}, got {architecture!r}; it would refuse the file or "
            "rotate without them"
        )
    _check_shape(file, rope)
    present = _scaled_by(file)
    if present and not replace_factors:
        raise ValueError(
            f"{source}: expected a file without factors, got {', '.join(present)}; --replace "
            "(replace_factors=True) writes others in their place"
        )
    check_free(target, replace_factors)
    rope = _of_two_sets(rope, original or int(file[f"{architecture}.context_length"]))
    short, long = rope.sets
    assert short.max_length is not None
    most = 2**32 - 1  # written as uint32
    if length is None or not is_int(length) or not short.max_length <= length <= most:
        raise ValueError(
            f"length: expected at least the {short.max_length} tokens of the short set, a whole "
            f"number up to {most}, got {length!r}"
        )
    arrays = {name: np.asarray(x) for name, x in to_arrays(rope, numpy=True).items()}
    file.copy(
        target,
        {
            f"{architecture}.context_length": length,
            f"{architecture}.{_SCALING}type": "longrope",
            f"{architecture}.{_SCALING}original_context_length": short.max_length,
            f"{architecture}.{_SCALING}attn_factor": float(long.attention_factor),
        },
        {name: arrays[name] for name in _TENSORS if name in arrays},
        without=(*_TENSORS, *_scalings(file)),
        over=replace_factors,
    )
    return Exported(target, rope, length)


def _check_sayable(rope: Rope) -> None:
    """The format has two lists, one attention factor and no threshold."""
    if len(rope.sets) > 2:
        raise ValueError(
            "rope: expected one or two sets, which is all that GGUF can say, got "
            f"{len(rope.sets)}; longrope readjust with one --length finds two, and "
            "Rope(rope.sets[-2:], rope.base) has the last ones"
        )
    thresholds = [one.n_hat for one in rope.sets]
    if any(thresholds):
        raise ValueError(
            f"rope: expected n_hat = 0, since GGUF has no field for a threshold, got {thresholds}; "
            "longrope search --n-hat 0 finds factors without one"
        )
    attentions = [float(one.attention_factor) for one in rope.sets]
    if len(set(attentions)) > 1:
        raise ValueError(
            "rope: expected one attention factor, since GGUF has no field for another of the "
            f"short set, got {attentions}; longrope readjust --attention {attentions[-1]:g} finds "
            "factors for that one"
        )
    if rope.interleaved:
        raise ValueError(
            "rope: expected interleaved = False, as models of these architectures are in "
            "transformers, got True"
        )
    to_arrays(rope)  # whether they are in float32's range


def _check_shape(file: GgufFile, rope: Rope) -> None:
    name = f"{file.architecture}.rope."
    pairs = int(file[f"{name}dimension_count"]) // 2
    if pairs != rope.pairs:
        raise ValueError(
            f"{file.path}: expected {2 * rope.pairs} as {name}dimension_count, the rotary "
            f"dimensions of the rope, got {2 * pairs}; is it the same model?"
        )
    base = float(file.get(f"{name}freq_base", 10000.0))
    if np.float32(base) != np.float32(rope.base):
        raise ValueError(
            f"{file.path}: expected {rope.base} as {name}freq_base, the base of the rope, got "
            f"{base}; is it the same model?"
        )


def _scalings(file: GgufFile) -> list[str]:
    """Names of all metadata that is about the scaling of the rope."""
    prefixes = tuple(f"{file.architecture}.{name}" for name in (_SCALING, _LINEAR))
    return [name for name in file.names if name.startswith(prefixes)]


def _scaled_by(file: GgufFile) -> list[str]:
    """Names of what scales the rope in the file as it is."""
    found = [name for name in _TENSORS if name in file.tensors]
    idle = (None, "none", 1.0)
    names = (f"{_SCALING}type", f"{_SCALING}factor", _LINEAR)
    told = {name: file.get(f"{file.architecture}.{name}") for name in names}
    return found + [f"{file.architecture}.{n} = {v}" for n, v in told.items() if v not in idle]


def _of_two_sets(rope: Rope, original: int) -> Rope:
    """One set stands in both lists, as in a config of type longrope; factors in float32."""
    short, long = rope.sets[0], rope.sets[-1]
    if len(rope.sets) == 1:
        short = replace(long, max_length=original)
    sets = (short, replace(long, max_length=None))
    rounded = (
        replace(one, factors=tuple(map(float, np.asarray(one.factors, np.float32)))) for one in sets
    )
    return Rope(tuple(rounded), rope.base)
