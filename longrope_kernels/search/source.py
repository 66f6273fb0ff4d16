"""A model folder of Hugging Face: what it is rotated by, its lengths, its weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..integrations import families
from ..rope import FactorSet, Rope, hf_config, scaling
from ..rope.files import SIDECAR
from ..rope.value import check_device
from .documents import Document
from .state import config_hash

CONFIG = "config.json"
EVALUATION = "evaluation.json"
# Of a config whose own field for it has the bound of a short set, which may be another, or none.
ORIGINAL_KEY = "longrope_original_length"
_TEXT = "text_config"  # of a multimodal config
_PHIMOE = "phimoe"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        folder: with config.json, weights, tokenizer, and a longrope.json where a config cannot
            hold the rope.
        config: the content of config.json.
        rope: what the model is rotated by.
        original: in tokens, what it was first trained for.
        trained: in tokens, what it serves now: more than ``original`` where it was extended, by the
            factor of type linear or YaRN too where ``max_position_embeddings`` leaves it out.
        read: the config of the language model as transformers reads it, with what its class adds.
    """

    folder: Path
    config: Mapping[str, Any]
    rope: Rope
    original: int
    trained: int
    read: Any = None

    @property
    def of_text(self) -> Mapping[str, Any]:
        """What the language model is made from: all of the config but in a multimodal one."""
        found = self.config.get(_TEXT)
        return found if isinstance(found, Mapping) else self.config

    @property
    def stage(self) -> Rope | None:
        """The set of the longest sequences, which a further extension starts from.

        None where the model is not scaled.
        """
        one = self.rope.sets[self.rope.set_index(self.trained)]
        if set(one.factors) == {1.0}:
            return None
        return Rope((FactorSet(one.factors),), self.rope.base, self.rope.interleaved)


def open_source(folder: Path, original: int | None = None) -> Source:
    """Read what is beside the weights.

    Args:
        folder: of a model, local.
        original: in tokens, in place of what the config says.

    Raises:
        ValueError: there is no such folder or config.json, its model has no rotary embedding that
            this package knows, or ``original`` is out of range.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: expected the folder of a model, with a {CONFIG}")
    try:
        config = read_json(path)
    except (ValueError, RecursionError) as error:  # of digits, characters and depth too
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {config!r}")
    text = _read_config(folder).get_text_config()
    try:
        if (folder / SIDECAR).is_file():
            rope = Rope.load(folder)
        else:
            rope = Rope.from_config(text, interleaved=families.interleaved(text.model_type))
        trained = getattr(text, "max_position_embeddings", None)
        if not isinstance(trained, int):
            raise ValueError(f"expected max_position_embeddings, a number, got {trained!r}")
        if original is None:
            original = hf_config.read_length(text, ORIGINAL_KEY)
            original = original or hf_config.original_length(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    if not 1 < original <= trained:
        raise ValueError(
            f"original length: expected 2 to {trained} tokens, the model's "
            f"max_position_embeddings, got {original}"
        )
    if not (folder / SIDECAR).is_file() and hf_config.rope_type(text) in ("linear", "yarn"):
        # Many such configs keep max_position_embeddings as it was before the factor.
        trained = max(trained, round(original * (hf_config.extension_ratio(text) or 1)))
    return Source(folder, config, rope, original, trained, text)


def load_model(folder: Path, device: str = "auto", dtype: str = "auto") -> Any:
    """The causal language model of a local folder, in a multimodal one where it has no other.

    Args:
        folder: as in `open_source`.
        device: "auto" is a GPU where there is one; under torchrun, that of this process.
        dtype: "auto" is that of the weights on a GPU, and float32 on a CPU.

    Raises:
        ValueError: an argument that is not served, or transformers' reason not to load it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    dtype = dtype_of(dtype, device)
    device, config = device_of(device), _read_config(folder)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    given: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        try:
            model, told = AutoModelForCausalLM.from_pretrained(folder, **given)
        except ValueError:
            if config.get_text_config() is config:
                raise
            model, told = AutoModelForImageTextToText.from_pretrained(folder, **given)
    except SafetensorError as error:
        raise ValueError(f"{folder}: expected whole weights: {error}") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # of other sizes: the last
        raise ValueError(f"{folder}: {error}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    missing = sorted(told["missing_keys"])
    if missing:  # which transformers fills with random numbers, and warns
        raise ValueError(
            f"{folder}: expected whole weights, got none for {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return model.to(device)


def device_of(device: str) -> str:
    """What "auto" of `load_model` is here; ValueError where another is not."""
    if device != "auto":
        check_device(device)
        return device
    return f"cuda:{_local_rank()}" if torch.cuda.is_available() else "cpu"


def dtype_of(dtype: str, device: str) -> str:
    """What "auto" of `load_model` is on that device, "auto" where the weights say it.

    Raises:
        ValueError: another dtype, or a device that is not here.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    on_cpu = torch.device(device_of(device)).type == "cpu"
    return "float32" if dtype == "auto" and on_cpu else dtype


def baselines(source: Source, length: int) -> dict[str, Rope]:
    """The formulas to compare with, each for extending the original length to ``length``.

    Args:
        source: the model.
        length: in tokens, more than ``source.original``.
    """
    dim, factor = source.rope.rotary_dim, length / source.original
    pairing = _pairing(source)
    return {
        "no scaling": Rope.plain(dim, **pairing),
        "PI": scaling.linear(dim, factor, **pairing),
        "NTK": scaling.ntk_aware(dim, factor, **pairing),
        "YaRN": scaling.yarn(dim, factor, source.original, **pairing),
    }


def dynamic_ntk(source: Source, length: int) -> Rope:
    """Its common use: no scaling up to the original length, then by the length alone."""
    dim = source.rope.rotary_dim
    return scaling.dynamic_ntk(dim, 1.0, source.original, length, **_pairing(source))


def _pairing(source: Source) -> dict[str, Any]:
    return {"base": source.rope.base, "interleaved": source.rope.interleaved}


def write_config(source: Source, rope: Rope, length: int, folder: Path) -> str | None:
    """Write ``rope`` as longrope.json, and the model's config.json with it where one can say it.

    Args:
        source: whose config is taken.
        rope: what to write.
        length: in tokens, the new ``max_position_embeddings``.
        folder: where to write.

    Returns:
        None, or why config.json does not have the rope; then there is none in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_rope(rope, folder)
    version = 5 if "rope_parameters" in source.of_text else 4
    name = "rope_parameters" if version == 5 else "rope_scaling"
    of_phimoe = source.of_text.get("model_type") == _PHIMOE
    if of_phimoe and len(rope.sets) == 1:
        (one,) = rope.sets  # twice, since its class reads no scaling but longrope
        rope = replace(rope, sets=(replace(one, max_length=source.original), one))
    dim = _head_dim(source.read)
    named = "head_dim" in source.of_text or dim != rope.rotary_dim
    if families.interleaved(source.of_text.get("model_type")):
        rope = replace(rope, interleaved=False)  # the model's code has it, and no config a field
    try:
        fields = rope.to_config(
            version=version,
            head_dim=dim if named else None,
            original_max_position_embeddings=source.original if len(rope.sets) == 1 else None,
            max_position_embeddings=length,
        )
        _check_scores(source.read)
        _keep_others(fields, name, source.read)
    except ValueError as error:
        (folder / CONFIG).unlink(missing_ok=True)
        return str(error)
    parameters = fields[name]
    if of_phimoe:
        _add_mscales(parameters, rope)
    if hasattr(source.read, "qk_rope_head_dim") and "long_factor" in (parameters or {}):
        parameters["factor"] = length / source.original  # that attention of older versions reads
    config = {k: v for k, v in source.of_text.items() if k not in _REPLACED}
    config |= {k: v for k, v in fields.items() if v is not None}
    if hf_config.original_length(config) != source.original:
        config[ORIGINAL_KEY] = source.original
    _write_of_text(source, config, folder)
    return None


def _check_scores(config: Any) -> None:
    """Latent attention is made with a scale by YaRN's parameters, beside the rotation's own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if hasattr(config, "qk_rope_head_dim") and parameters.get("mscale_all_dim"):
        raise ValueError(
            "the model scales its scores by mscale_all_dim of its type yarn, which transformers "
            "does by no other type; enable(model, rope=...) leaves the scale as it is"
        )


def _keep_others(fields: dict[str, Any], name: str, config: Any) -> None:
    """What no rope has, into its fields of that name: attention reads it there (Ministral 3's)."""
    old = getattr(config, "rope_parameters", None) or {}
    others = {
        key: value
        for key, value in old.items()
        if key not in hf_config.ROPE_FIELDS and not isinstance(value, Mapping)
    }
    if not others:
        return
    parameters = fields[name] = {**(fields[name] or {"type": "default"}), **others}
    length = "original_max_position_embeddings"  # which they may count by
    new = fields.get(length, old.get(length))
    if new != old.get(length):
        raise ValueError(
            f"the model has {', '.join(others)} beside {length} = {old.get(length)}, which it may "
            f"count by, and this rope has {new} there; enable(model, rope=...) leaves both as they "
            "are"
        )
    if new is not None:
        parameters[length] = new


def _add_mscales(parameters: dict[str, Any], rope: Rope) -> None:
    """What PhiMoE's class wants beside the factors, in place of one attention factor."""
    short, long = rope.sets
    parameters.pop("attention_factor", None)
    parameters["original_max_position_embeddings"] = short.max_length
    for name, one in (("short", short), ("long", long)):
        parameters[f"{name}_mscale"] = float(one.attention_factor)


def write_lengths(source: Source, length: int, folder: Path) -> None:
    """Write the config.json of the model with its old rope, and the lengths of another beside it.

    Args:
        source: whose config is taken.
        length: in tokens, the new ``max_position_embeddings``.
        folder: where to write.
    """
    lengths = {"max_position_embeddings": length, ORIGINAL_KEY: source.original}
    _write_of_text(source, {**source.of_text, **lengths}, folder)


def _write_of_text(source: Source, config: dict[str, Any], folder: Path) -> None:
    if source.of_text is not source.config:
        config = {**source.config, _TEXT: config}
    with _whole(folder / CONFIG) as draft:
        draft.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def save_rope(rope: Rope, folder: Path) -> None:
    """Write ``longrope.json``: it is the old or the new one at every moment."""
    with _whole(folder / SIDECAR) as draft:
        rope.save(draft)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file whole, as `save_rope`. What is not finite is written as a word."""
    with _whole(path) as draft:
        draft.write_text(json.dumps(_plain(content), indent=1) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that `write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A draft that takes a file's place at the end, or goes; an error names the file."""
    draft = path.with_name(path.name + ".new")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# Fields that would contradict the new ones.
_REPLACED = (
    *("rope_parameters", "rope_scaling", "rope_theta"),
    *(hf_config.N_HAT_KEY, ORIGINAL_KEY),
)


# Of a fingerprint: the values of a block are summed over its rows. It fits into a CPU's cache.
_BLOCK_SHAPE = 64, 1024
_BLOCK = math.prod(_BLOCK_SHAPE)


def identity(source: Source, model: Any) -> dict[str, str]:
    """What decides the losses of a model beside its rope, as JSON values.

    Config, weights, and the dtype that it computes in.
    """
    weights, dtype = fingerprint(model), str(model.dtype)
    return {"weights": weights, "dtype": dtype, "config": config_hash(source.config)}


def fingerprint(model: Any) -> str:
    """Which weights these are, by every bit of each; the same where they are in a wider dtype."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(f"{name} {tuple(value.shape)}".encode())
        for part in value.detach().flatten().split(_BLOCK * (1 if value.is_cpu else 64)):
            total.update(_sums(part).cpu().numpy().tobytes())
    return f"sums-{total.hexdigest()[:16]}"


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Of the bits of values, each of some that lie far from one another, by weights; int64, exact.

    Sums of integers are the same on every device, by any number of threads. The weights are odd, so
    that a change of one value always shows, and all different: so do rows that change places.
    """
    if values.is_floating_point():
        wide = values.dtype == torch.float64
        values = values.view(torch.int64) if wide else values.float().view(torch.int32)
    whole = torch.nn.functional.pad(values.long(), (0, -len(values) % _BLOCK))
    rows, _ = _BLOCK_SHAPE
    weights = torch.arange(1, 2 * rows, 2, device=whole.device)
    return (whole.view(-1, *_BLOCK_SHAPE) * weights[:, None]).sum(1)


def digest(documents: Sequence[Document]) -> str:
    """Which tokens these are."""
    total = hashlib.sha256()
    for document in documents:
        total.update(f"{len(document.tokens)} ".encode() + document.tokens.numpy().tobytes())
    return total.hexdigest()[:16]


def repeats(documents: Sequence[Document], training: Sequence[Document] = ()) -> Iterator[str]:
    """Lines on texts that are there twice, or are trained on as well as measured."""
    known: dict[str, str] = {}
    for document in documents:
        first = known.setdefault(digest([document]), document.name)
        if first != document.name:
            yield f"{document.name}: the same text as {first}, which counts twice"
    for document in training:
        measured = known.get(digest([document]))
        if measured is not None:
            yield f"{document.name}: a text to train on, which {measured} measures the model by"


def _read_config(folder: Path) -> Any:
    """The config of a folder, as transformers reads it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{folder}: {error}") from None


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
