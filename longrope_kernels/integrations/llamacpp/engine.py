"""`check`: llama.cpp itself, by the package xllamacpp, asked about an exported file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...rope.value import Rope
from .exporting import STEP, Exported

_TOKENS, _LIKELIEST = 384, 20


@dataclass(frozen=True)
class Answer:
    """How far llama.cpp, started with a context, is from this package.

    Attributes:
        context: in tokens.
        set: "short" or "long", which it should take.
        own: the mean difference of log-probabilities under that set.
        other: under the other set; where both are equal, without scaling.
    """

    context: int
    set: str
    own: float
    other: float

    @property
    def agrees(self) -> bool:
        """Whether it takes the set it should."""
        return self.own < self.other


def check(exported: Exported) -> list[Answer]:
    """Ask llama.cpp for the likeliest tokens after a prompt, in a short and in a long context.

    The same is asked of the model in transformers, its weights dequantised to float32, under each
    set. Weights that stay quantised in llama.cpp are computed otherwise there, so that a few
    hundredths remain.

    Args:
        exported: of `export`.

    Returns:
        One answer for each set; none for the short one where its bound is below the shortest
        context that llama.cpp makes.

    Raises:
        ImportError: xllamacpp, or transformers, is not installed.
        ValueError: transformers can't read the file.
    """
    base = exported.rope.base
    short, long = (Rope((replace(one, max_length=None),), base) for one in exported.rope.sets)
    other = {"short": long, "long": short}
    if short == long:
        other = dict.fromkeys(other, Rope.plain(long.rotary_dim, base=long.base))
    below = exported.short_context
    asked = [("short", short, below)] if below else []
    asked.append(("long", long, below + STEP))
    model = _model(exported.path)
    prompt = _prompt(min(_TOKENS, below or STEP) - 1, model.config.vocab_size)
    answers = []
    for name, rope, context in asked:
        told = log_probabilities(exported.path, context, prompt, _LIKELIEST)
        own, others = (_difference(model, one, prompt, told) for one in (rope, other[name]))
        answers.append(Answer(context, name, own, others))
    return answers


def log_probabilities(
    path: Path, context: int, prompt: Sequence[int], count: int
) -> dict[int, float]:
    """What llama.cpp says of the likeliest tokens after a prompt.

    Args:
        path: of a GGUF file.
        context: in tokens, what the engine is started with.
        prompt: token ids.
        count: how many tokens.

    Returns:
        Log-probabilities by token id.
    """
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    settings = CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel = context, 1
    settings.n_gpu_layers, settings.warmup, settings.fit_params = 0, False, False
    settings.cache_type_k = settings.cache_type_v = ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # in float16
    settings.verbosity = 0
    asked: dict[str, Any] = {"prompt": list(prompt), "n_predict": 1, "n_probs": count}
    # There is an answer where a token is generated that ends a character; what is asked about are
    # the logits before that choice.
    asked |= {"temperature": 0, "grammar": "root ::= [ -~]+", "cache_prompt": False}
    answer = Server(settings).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    (told,) = answer["choices"][0]["logprobs"]["content"]
    return {int(one["id"]): float(one["logprob"]) for one in told["top_logprobs"]}


def _model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from ..transformers import enable

    given = {"gguf_file": path.name, "dtype": torch.float32, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, **given)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{path}: transformers can't read it: {error}") from None
    return enable(model.eval())


def _prompt(tokens: int, vocabulary: int) -> list[int]:
    """The same on every machine, and of many different tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary // 100, vocabulary, (tokens,), generator=generator).tolist()


@torch.no_grad()
def _difference(model: Any, rope: Rope, prompt: Sequence[int], told: Mapping[int, float]) -> float:
    from ..transformers import set_rope

    set_rope(model, rope)
    logits = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    ours = logits.log_softmax(-1)
    return sum(abs(float(ours[token]) - value) for token, value in told.items()) / len(told)
