"""Two layers of Phi-3-mini's geometry, untouched and enabled, as a step of each kind runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from measure import NotMeasuredError, require_time_to_compile
from packaging.version import Version
from ropes import DEVICE, DTYPE, not_importable

SWITCH, SMALL_SWITCH = 4096, 64  # tokens up to which the short factors serve
KINDS = ("forward", "token below the switch", "token at the switch", "generate")
NEW = 16  # tokens that "generate" makes, on both sides of the switch
COMPILED = "transformers torch.compile"  # of "forward" alone
NAMES = ("transformers", COMPILED, "enabled, rotated", "enabled, switch")
PEERS, OURS = NAMES[:2], NAMES[2:]


class Step(NamedTuple):
    """One call of the model: a forward of ``tokens``, or one token with so many in the cache.

    Or ``generate()`` after a prompt of so many.
    """

    kind: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.tokens} tokens"


def serves(name: str, at: Step) -> bool:
    """The two caches differ at the switch alone; only a forward is compiled, whose shape stays."""
    if name == COMPILED:
        return at.kind == "forward"
    return at.kind in KINDS[2:] or name != "enabled, rotated"


def switch(full_size: bool) -> int:
    return SWITCH if full_size else SMALL_SWITCH


def switches(name: str) -> bool:
    """Whether keys and values that the short factors left serve after the switch, too."""
    return name == "enabled, switch"


def prefills_again(name: str, at: Step, full_size: bool) -> bool:
    """Whether the step runs all tokens once more where the factors change.

    That is what generate() does: past the switch transformers drops the cache.
    """
    longest = at.tokens + (NEW - 1 if at.kind == "generate" else 1)
    return at.kind in KINDS[2:] and longest > switch(full_size) and not switches(name)


def ids(count: int) -> torch.Tensor:
    """The text of all steps, (1, count)."""
    return torch.arange(count, device=DEVICE)[None] % 500 + 3


def missing(name: str) -> str | None:
    """Why it cannot run here, or None."""
    return not_importable("transformers")


@lru_cache(maxsize=len(NAMES))
def model(name: str, full_size: bool) -> Any:
    """The model with the same weights under each name; small ones where nothing is measured."""
    if name == COMPILED:
        return torch.compile(model(NAMES[0], full_size), dynamic=False)
    from transformers import Phi3ForCausalLM

    from longrope_kernels.demo.peers import phi3_config
    from longrope_kernels.integrations.transformers import enable

    sizes = {"hidden_size": 3072, "intermediate_size": 8192}
    if not full_size:
        sizes = {"hidden_size": 4 * 96, "intermediate_size": 64, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 4, "initializer_range": 0.02 * 8**0.5}
        sizes |= {"original_max_position_embeddings": SMALL_SWITCH}
        sizes |= {"max_position_embeddings": 32 * SMALL_SWITCH}
    config = phi3_config("phi-3-mini-128k", num_hidden_layers=2, vocab_size=512, **sizes)
    torch.manual_seed(0)
    made = Phi3ForCausalLM._from_config(config, dtype=DTYPE).to(DEVICE).eval()
    return (
        made
        if name == NAMES[0]
        else enable(made, cache="unrotated" if switches(name) else "rotated")
    )


def step(name: str, at: Step, full_size: bool) -> Callable[[], torch.Tensor]:
    """A function of no arguments: the logits of the last token, or all tokens of "generate"."""
    from transformers import DynamicCache

    if name == COMPILED:
        require_time_to_compile()
    of = model(name, full_size)
    again = prefills_again(name, at, full_size)
    prompt = ids(at.tokens)

    def forward(tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with torch.no_grad():
            out = of(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        return out.logits  # type: ignore[no-any-return]

    if at.kind == "forward":
        return lambda: forward(prompt)
    if at.kind == "generate":
        if name == NAMES[0] and again:
            _require_prefill_again()
        counts = {"min_new_tokens": NEW, "max_new_tokens": NEW}
        given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
        return lambda: of.generate(prompt, **given, **counts)
    text = ids(at.tokens + 1)
    cache = DynamicCache(config=of.config)
    forward(prompt, cache)

    def token() -> torch.Tensor:
        if again:
            return forward(text, DynamicCache(config=of.config))
        logits = forward(text[:, -1:], cache)
        cache.crop(-1)
        return logits

    return token


def forwards(name: str, at: Step, full_size: bool) -> list[tuple[int, int]]:
    """Of each forward of a step the tokens that it is given, and those that are cached before."""
    if at.kind == "forward":
        return [(at.tokens, 0)]
    again = prefills_again(name, at, full_size)
    if at.kind != "generate":
        return [(at.tokens + 1, 0) if again else (1, at.tokens)]
    # The first new token comes of the prompt, the last one is given to no forward.
    cached = range(at.tokens, at.tokens + NEW - 1)
    long = switch(full_size)
    return [(at.tokens, 0), *((n + 1, 0) if again and n == long else (1, n) for n in cached)]


def amounts(name: str, at: Step, full_size: bool) -> tuple[int, int]:
    """Bytes and FLOP of a step.

    In each forward the weights of the layers once, and twice as many FLOP for each token; cached
    keys and values are read, new ones written.
    """
    of = model(NAMES[0], full_size)
    weights = sum(p.numel() for p in of.model.layers.parameters())
    width = of.config.hidden_size // of.config.num_attention_heads * of.config.num_key_value_heads
    in_cache = 2 * of.config.num_hidden_layers * width if at.kind != "forward" else 0
    runs = forwards(name, at, full_size)
    numbers = sum(weights + in_cache * (new + cached) for new, cached in runs)
    return numbers * DTYPE.itemsize, 2 * weights * sum(new for new, _ in runs)


def _require_prefill_again() -> None:
    """Raises `NotMeasuredError` where ``generate()`` of transformers does less than that."""
    from transformers import __version__

    if Version(__version__) < Version("5.20"):
        raise NotMeasuredError(f"transformers {__version__} goes on from one token at the switch")
