"""Which decoders of transformers `enable` serves: tried one by one, and written down.

    python tools/architectures.py            all of them: longrope_kernels/data/architectures.json
    python tools/architectures.py llama ...  some of them again

Each causal language model of the installed transformers is built tiny from its config class, with
random weights and in float64, probed (`longrope_kernels.integrations.transformers.probe`) and held
to the untouched model that is rotated by float64 cosines and sines: by the rope of its own config
and by a longrope of two sets, on both sides of the switch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import architectures, disable, enable
from longrope_kernels.integrations.transformers.architectures import minor, path_of
from longrope_kernels.integrations.transformers.contacts import MissingError
from longrope_kernels.integrations.transformers.parts import slots_of
from longrope_kernels.integrations.transformers.probe import (
    UnfitError,
    on_one_line,
    on_the_cpu,
    rotations,
    tiny,
)
from longrope_kernels.integrations.transformers.ropes import kinds, still

FILE = Path(__file__).parents[1] / "longrope_kernels" / "data" / "architectures.json"
SWITCH = 32  # tokens, where the short set of the longrope that is tried ends
CLOSE = 1e-5  # of the largest logit: what 5e-7 rad make of it, and no more
CLOSE_SINGLE = 1e-4  # the same in float32
TABLES = 2e-3  # the same, of the float32 tables of transformers
SECONDS = 60  # of a processor, for one model


class TrueRotary(torch.nn.Module):
    """Stands in for a rotary module: cosines and sines in float64, in the original's layout.

    The factor set is that of each sequence's length, or of the longest one, as with
    ``cache="rotated"``.
    """

    def __init__(self, original: Any, ropes: dict[str, Rope], kind: str, alone: bool) -> None:
        super().__init__()
        self.original, self.ropes, self.kind, self.alone = original, ropes, kind, alone
        # How the original lays out the cosines of pairs: once, twice in a row, or each twice.
        layer_type = [name for name in kinds(original) if name is not None][:1]
        cos, _ = original(torch.zeros(1, 1, 1), torch.tensor([[3]]), *layer_type)
        pairs = next(iter(ropes.values())).rotary_dim // 2
        self.layout = "once"
        if cos.shape[-1] == 2 * pairs:
            half = torch.allclose(cos[..., :pairs], cos[..., pairs:])
            self.layout = "half" if half else "each"

    def __getattr__(self, name: str) -> Any:
        """What some models read of the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        rope = self.ropes[self.kind if layer_type is None else layer_type]
        lengths = position_ids.amax(-1) + 1
        if not self.alone:
            lengths = lengths.max().expand_as(lengths)
        rows = []
        for positions, length in zip(position_ids, lengths.tolist(), strict=True):
            one = rope.sets[rope.set_index(length)]
            pair = torch.arange(len(one.factors), dtype=torch.float64)
            turns = rope.base ** (-pair / len(one.factors)) / torch.tensor(
                one.factors, dtype=torch.float64
            )
            angle = positions.double()[:, None] * turns
            rows.append(torch.stack((angle.cos(), angle.sin())) * one.attention_factor)
        both = torch.stack(rows, 1)
        if self.layout == "half":
            both = torch.cat((both, both), -1)
        elif self.layout == "each":
            both = both.repeat_interleave(2, -1)
        return tuple(both.to(x.dtype))


def with_truth(model: Any, ropes: dict[str, Rope], alone: bool) -> Callable[[], None]:
    """Put true rotations into an untouched model. Returns what takes them out again."""
    (slot,) = slots_of(model, probing=True)
    for place in slot.places:
        true = TrueRotary(place.module, ropes, slot.kind_of(place), alone)
        setattr(place.owner, place.name, true)

    def undo() -> None:
        for place in slot.places:
            setattr(place.owner, place.name, place.module)

    return undo


# ------------------------------------------------------------------------------------ what is tried


def tokens(batch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, 60, (batch, count), generator=generator)


def forward(model: Any, count: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, count), use_cache=False).logits


def padding(model: Any, count: int) -> torch.Tensor:
    """Rows of different lengths, padded on the left; logits of the real tokens."""
    ids, mask = tokens(2, count), torch.ones(2, count, dtype=torch.int64)
    ids[0, :7], mask[0, :7] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        return model(input_ids=ids, **given).logits[mask.bool()]


def cache(model: Any, count: int, names_positions: bool = False) -> torch.Tensor:
    """A prompt and steps behind it."""
    ids, parts, held = tokens(2, count), [], None
    sizes = [count - 4, 1, 1, 1, 1]
    places = torch.arange(count).expand(2, -1).split(sizes, 1)
    for part, positions in zip(ids.split(sizes, 1), places, strict=True):
        named = {"position_ids": positions} if names_positions else {}
        with torch.no_grad():
            out = model(input_ids=part, use_cache=True, **named, **(held or {}))
        held = {name: value for name, value in out.items() if hasattr(value, "get_seq_length")}
        parts.append(out.logits)
    return torch.cat(parts, 1)


def training(model: Any, count: int) -> torch.Tensor:
    """Gradients of all weights, one behind the other."""
    ids = tokens(2, count)
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    found = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
    return torch.cat(found)


def generate(model: Any, count: int) -> torch.Tensor:
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tokens(2, count - 5)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given).double()


CHECKS = (forward, padding, cache, training, generate)


def longrope(rope: Rope) -> Rope:
    """Of the pairs and the base of one, two sets far apart."""
    pairs = rope.rotary_dim // 2
    return Rope.longrope(
        [1.0 + 0.01 * i for i in range(pairs)],
        [1.5 + i for i in range(pairs)],
        SWITCH,
        32 * SWITCH,
        base=rope.base,
        interleaved=rope.interleaved,
    )


def differs(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max())


def prove(model: Any, kind: str) -> list[str]:
    """The names of the checks that an enabled model passes.

    Args:
        model: untouched, of a causal language model in float64.
        kind: of the cache.

    Raises:
        AssertionError: it differs from the truth, where, and by how much.
    """
    (slot,) = slots_of(model, probing=True)
    own = slot.own_ropes()
    two = {key: longrope(rope) for key, rope in own.items()}
    cases = (("its own rope", own, 24), ("longrope, short", two, 24), ("longrope, long", two, 44))
    check_tables(model, own)
    passed, finite64 = [], True
    for check in CHECKS:
        tried = False
        for name, ropes, count in cases:
            undo = with_truth(model, ropes, alone=kind == "unrotated")
            single, run = check is padding and not finite64, check
            try:
                if check is cache and kind == "rotated" and counts_anew(model.double(), count):
                    # Its own count puts a token behind the long set's keys at 0, under the short.
                    run = partial(cache, names_positions=True)
                expected = run(model.float() if single else model.double(), count)
                if check is padding and not bool(expected.isfinite().all()):
                    # Rows that see nothing are not numbers where float64 masks meet float32 sums.
                    single, finite64 = True, False
                    expected = check(model.float(), count)
            except Exception as error:  # what the untouched model can't do, nothing is held to
                print(f"    untouched, {check.__name__}: {on_one_line(error)}", file=sys.stderr)
                continue
            finally:
                undo()
            assert bool(expected.isfinite().all()), f"{check.__name__}: the truth is not finite"
            tried = True
            enable(model, rope=ropes, cache=kind)
            try:
                found = differs(run(model, count), expected)
            except Exception as error:
                raise AssertionError(f"{check.__name__}, {name}: {on_one_line(error)}") from error
            finally:
                disable(model).double()
            assert found <= (CLOSE_SINGLE if single else CLOSE), (
                f"{check.__name__}, {name}: logits differ by {found:.1e} of the largest"
            )
        if tried:
            passed.append(check.__name__)
    return passed


def counts_anew(model: Any, count: int) -> bool:
    """Whether an untouched model puts the tokens behind a cache elsewhere than behind it."""
    return differs(cache(model, count), cache(model, count, names_positions=True)) > CLOSE


def check_tables(model: Any, own: dict[str, Rope]) -> None:
    """The truth is what the untouched model does with its own tables, and rotation matters."""
    found = []
    for ropes in (own, {key: still(rope.rotary_dim) for key, rope in own.items()}):
        undo = with_truth(model, ropes, alone=False)
        try:
            found.append(forward(model, 24))
        finally:
            undo()
    table = differs(forward(model, 24), found[0])
    assert table <= TABLES, f"its own tables differ by {table:.1e} from what its config says"
    assert differs(found[1], found[0]) > 1e-2, "its logits do not show the rotation"


def told(error: Exception) -> str:
    """What an entry says of an error; not whose it is."""
    if isinstance(error, MissingError):
        family, _, what = error.what.partition(": ")
        return error.what if " " in family else what
    return str(error) if isinstance(error, AssertionError | ValueError) else on_one_line(error)


# ---------------------------------------------------------------------------------- all the models


STILL = "no module of it turns positions into cosines and sines, as its default config makes it"
NO_ROTATION = "its modelling file has no function that rotates by (q, k, cos, sin)"


def with_attention(config: Any) -> Any:
    """Some hybrids' default configs have no layer of attention among the first."""
    if config.model_type == "bamba":
        config.attn_layer_indices = [1]
    if config.model_type == "granitemoehybrid":
        config.layer_types = ["mamba", "attention"] * (config.num_hidden_layers // 2)
        config.position_embedding_type = "rope"
    if config.model_type == "recurrent_gemma":
        config.block_types = ["recurrent", "attention"]
    if config.model_type == "lfm2_moe":
        config.layer_types = ["conv", "full_attention"] * (config.num_hidden_layers // 2)
    return config


def class_of(model_type: str) -> tuple[Any, Any]:
    """A causal language model and its default config."""
    config = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    name = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        or (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    )
    cls = getattr(transformers, name if isinstance(name, str) else name[0])
    return cls, with_attention(config)


@mock.patch.object(architectures, "proven", mock.Mock(return_value={"transformers": "none"}))
def try_one(model_type: str) -> dict[str, Any]:
    """An entry of the data file, or ``reason``; nothing is taken from that file."""
    try:
        cls, config = class_of(model_type)
        if not rotations(sys.modules[cls.__module__]):
            return {"reason": NO_ROTATION}
        model = tiny(cls, config).double()
    except Exception as error:
        return {"reason": f"not tried: no tiny one of its default config ({on_one_line(error)})"}
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    try:
        slots = slots_of(model, probing=True)
        if not slots:
            return {"reason": STILL}
        (slot,) = slots
        architecture = slot.architecture
    except (UnfitError, ValueError) as error:
        return {"reason": str(error)}
    entry: dict[str, Any] = {
        "type": model_type,
        "rotary": path_of(architecture.rotary),
        "attention": [path_of(one) for one in architecture.attention],
        "function": architecture.function,
        "interleaved": architecture.interleaved,
        "hands_on_window": architecture.hands_on_window,
        "unrotated": architecture.unrotated,
    }
    for kind in ("rotated", "unrotated"):
        if kind == "unrotated" and entry["unrotated"]:
            break
        try:
            entry[f"{kind}_checks"] = prove(model, kind)
        except Exception as error:
            if kind == "rotated":
                return {"reason": told(error)}
            entry["unrotated"] = told(error)
    return entry


def work(model_type: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    torch.set_num_threads(1)
    with on_the_cpu(), torch.enable_grad():
        answers.put((model_type, try_one(model_type)))


def run(names: list[str]) -> dict[str, dict[str, Any]]:
    """Each in a process of its own, as many at a time as there are cores."""
    # What they all need is loaded before they part.
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1}
    small = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes))
    small.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=1)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    results: dict[str, dict[str, Any]] = {}
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            running[name] = context.Process(target=work, args=(name, answers))
            running[name].start()
        while not answers.empty():
            name, entry = answers.get()
            results[name] = entry
            shown = entry.get("reason") or f"{entry['unrotated'] or 'both caches'}"
            print(f"{len(results):3}/{len(names)} {name}: {shown}", flush=True)
        for name, process in list(running.items()):
            if not process.is_alive():
                process.join()
                del running[name]
                if name not in results and answers.empty():
                    results[name] = {"reason": f"no answer within {SECONDS} seconds of a processor"}
        time.sleep(0.02)
    return results


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    if unknown:
        sys.exit(f"{__doc__}\nexpected causal language models, got {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    version = minor(transformers.__version__)
    found = run(names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    content: dict[str, Any] = {"transformers": version, "families": {}, "others": {}}
    if names:
        content = json.loads(FILE.read_text("utf-8"))
        if content["transformers"] != version:
            sys.exit(f"{FILE.name} is of transformers {content['transformers']}: try all anew")
    families, others = content["families"], content["others"]
    for name, entry in found.items():
        others.pop(name, None)
        if "reason" in entry:
            others[name] = entry["reason"]
        else:
            family = entry["rotary"].rpartition(".modeling_")[2].partition(".")[0]
            # Of several names of one modelling file the first.
            if name <= families.get(family, entry)["type"]:
                families[family] = entry
    content = {
        "transformers": version,
        "families": dict(sorted(families.items())),
        "others": dict(sorted(others.items())),
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    unrotated = sum(not entry["unrotated"] for entry in families.values())
    print(f"{len(families)} families with rotated keys, {unrotated} with unrotated ones")


if __name__ == "__main__":
    main(sys.argv[1:])
