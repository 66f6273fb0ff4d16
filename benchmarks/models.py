"""Two layers of Phi-3-mini's geometry, untouched and enabled, as a step of each kind runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from measure import require_time_to_compile
from ropes import DEVICE, not_importable

SWITCH = 4096  # tokens up to which the short factors serve
KINDS = ("forward", "token below the switch", "token at the switch", "generate")
NEW = 16  # tokens that "generate" makes, on both sides of the switch
COMPILED = "transformers torch.compile"  # of "forward" alone
NAMES = ("transformers", COMPILED, "enabled, recompute", "enabled, switch")
PEERS = NAMES[:2]
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Step(NamedTuple):
    """One call of the model: a forward of ``tokens``, or one token with so many in the cache.

    Or ``generate()`` after a prompt of so many.
    """

    kind: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.tokens} tokens"


def serves(name: str, at: Step) -> bool:
    """The policies differ at the switch alone; only a forward is compiled, whose shape stays."""
    if name == COMPILED:
        return at.kind == "forward"
    return at.kind in KINDS[2:] or name != "enabled, recompute"


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
        sizes["num_key_value_heads"] = 4
    config = phi3_config("phi-3-mini-128k", num_hidden_layers=2, vocab_size=512, **sizes)
    torch.manual_seed(0)
    made = Phi3ForCausalLM._from_config(config, dtype=DTYPE).to(DEVICE).eval()
    return made if name == NAMES[0] else enable(made, policy=name.split(", ")[1])


def step(name: str, at: Step, full_size: bool) -> Callable[[], torch.Tensor]:
    """A function of no arguments: the logits of the last token, or all tokens of "generate"."""
    from transformers import DynamicCache

    if name == COMPILED:
        require_time_to_compile()
    of = model(name, full_size)
    ids = torch.arange(at.tokens + 1, device=DEVICE)[None] % 500 + 3

    def forward(tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with torch.no_grad():
            out = of(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        return out.logits  # type: ignore[no-any-return]

    if at.kind == "forward":
        return lambda: forward(ids[:, : at.tokens])
    if at.kind == "generate":
        prompt = ids[:, : at.tokens]
        counts = {"min_new_tokens": NEW, "max_new_tokens": NEW}
        given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
        return lambda: of.generate(prompt, **given, **counts)
    # What generate() does: past the switch transformers drops the cache and runs all tokens again.
    again = at.kind == KINDS[2] and name != "enabled, switch"
    cache = DynamicCache(config=of.config)
    forward(ids[:, : at.tokens], cache)

    def token() -> torch.Tensor:
        if again:
            return forward(ids, DynamicCache(config=of.config))
        logits = forward(ids[:, -1:], cache)
        cache.crop(-1)
        return logits

    return token
