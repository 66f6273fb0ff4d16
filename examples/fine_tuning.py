"""Extend a model by a factor of four: LongRoPE factors, a short fine-tuning, and saving it.

A tiny Llama learns texts of 64 tokens, gets factors for 256, and is fine-tuned under them; short
texts keep the factors they were trained with. It is so small that it shows the steps and not what
an extension is worth. The data repeat a random piece of 16 tokens: a model that looks 15 tokens
back knows what comes. Run it:

    python examples/fine_tuning.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from longrope_kernels import FactorSet, Rope
from longrope_kernels.integrations.transformers import enable
from longrope_kernels.rope import scaling

SHORT, RATIO = 64, 4
LONG = RATIO * SHORT
PERIOD, VOCAB = 16, 32


def build() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        intermediate_size=128,
        vocab_size=VOCAB,
        max_position_embeddings=SHORT,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def extended_rope(head_dim: int) -> Rope:
    """Two sets: up to 64 tokens what the model knows, beyond it YaRN's factors for 256.

    Pairs that made four turns or more in 64 tokens keep their speed. (In a text of 64 tokens no
    pair makes YaRN's usual 32.) Factors found by a search go in the same place.
    """
    yarn = scaling.yarn(head_dim, RATIO, SHORT, beta_fast=4.0).sets[0]
    short = FactorSet((1.0,) * len(yarn.factors), max_length=SHORT)
    return Rope((short, yarn))


def batch(length: int, rows: int = 16) -> torch.Tensor:
    piece = torch.randint(0, VOCAB, (rows, PERIOD))
    return piece.repeat(1, -(-length // PERIOD))[:, :length]


def train(model: LlamaForCausalLM, length: int, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        ids = batch(length)
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def losses(model: LlamaForCausalLM) -> str:
    """The loss of short and of long texts, the same ones in every call."""
    model.eval()
    torch.manual_seed(1)
    short, long = (batch(length, 32) for length in (SHORT, LONG))
    return f"{model(short, labels=short).loss:8.3f}{model(long, labels=long).loss:8.3f}"


def main() -> None:
    disable_progress_bar()
    torch.manual_seed(0)
    model = build()
    print(f"loss at {SHORT} and {LONG} tokens")
    train(model, SHORT, steps=200, rate=3e-3)
    print(f"{f'trained on {SHORT} tokens':40}{losses(model)}")
    rope = extended_rope(model.config.head_dim)
    enable(model, rope=rope)
    print(f"{'enabled with factors for more':40}{losses(model)}")
    train(model, LONG, steps=30, rate=1e-3)
    print(f"{f'fine-tuned on {LONG} tokens':40}{losses(model)}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        rope.save(folder)  # longrope.json beside the weights; nothing else knows the new factors
        loaded = LlamaForCausalLM.from_pretrained(folder)
        enable(loaded, rope=Rope.load(folder))
    print(f"{'saved and loaded':40}{losses(loaded)}")


if __name__ == "__main__":
    main()
