"""The model to extend: a small Llama over bytes, trained from scratch at a short context."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from text import Corpus, Windows
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 256
    steps: int = 2000
    rows: int = 32
    rate: float = 2e-3
    seed: int = 0


def build(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=recipe.hidden,
            intermediate_size=8 * recipe.hidden // 3 // 16 * 16,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    recipe: Recipe,
    corpus: Corpus,
    folder: Path,
    *,
    every: int = 100,
    until: int | None = None,
    say: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """The trained model; a run that was stopped goes on from the last ``every`` steps.

    ``until``: a step to end at, before the last of the recipe.
    """
    model = build(recipe).to(DEVICE)
    windows = Windows(corpus, recipe.context, recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    path, identity = folder / "base.pt", {**asdict(recipe), "text": corpus.digest}
    start, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["identity"] != identity:
            raise RuntimeError(f"{path} is of {state['identity']}; expected {identity}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        windows.generator.set_state(state["windows"])
        start, seconds = state["step"], state["seconds"]
    model.train()
    losses: list[float] = []
    began = time.perf_counter()
    end = recipe.steps if until is None else until
    for step in range(start, end):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(step, recipe.steps)
        tokens = windows.batch(recipe.rows).to(DEVICE)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == end:
            spent = seconds + time.perf_counter() - began
            perplexity = math.exp(sum(losses) / len(losses))
            say(f"step {step + 1}: perplexity {perplexity:.3f}, {spent:.0f} s")
            losses = []
            state = {
                "identity": identity,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "windows": windows.generator.get_state(),
                "step": step + 1,
                "seconds": spent,
            }
            torch.save(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
    return model.eval()


def _schedule(step: int, steps: int) -> float:
    """Warm up over a twentieth of the steps, then a cosine to a tenth of the rate."""
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))
