"""A model of one's own: a decoder with LongRoPE, a cache of unrotated keys, and generation.

Prompts of different lengths are prefilled packed, without padding, by `attention`; then each row of
the batch decodes from a `KVCache` under the factor set of its own length. One row is long from the
start, one stays short, and one crosses while it generates. Run it:

    python examples/own_model.py
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from longrope_kernels import KVCache, Rope, attention


@dataclass(frozen=True)
class Sizes:
    vocab: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


# 64 tokens are short, 65 are long. Factors of one's own come from a search, or from a config.
ROPE = Rope.longrope(
    short_factor=[1.0] * 16,
    long_factor=[1.0 + i / 4 for i in range(16)],
    original_max_position_embeddings=64,
    max_position_embeddings=512,
)


class Layer(nn.Module):
    def __init__(self, s: Sizes, index: int) -> None:
        super().__init__()
        self.s, self.index = s, index
        self.before_attention, self.before_mlp = nn.RMSNorm(s.hidden), nn.RMSNorm(s.hidden)
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.out = nn.Linear(s.hidden, s.hidden, bias=False)
        self.up = nn.Linear(s.hidden, 8 * s.hidden, bias=False)
        self.down = nn.Linear(4 * s.hidden, s.hidden, bias=False)

    def forward(self, x, cache, packed):
        """x: (tokens, hidden) of a packed prefill, or (batch, 1, hidden) of a step."""
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (-1, self.s.head_dim))
        q, k, v = qkv.split([self.s.heads, self.s.kv_heads, self.s.kv_heads], dim=-2)
        if cache is not None:
            cache.write(k, v, self.index)  # unrotated
        if packed is not None:
            positions, lengths, borders = packed
            rest = {"lengths": lengths, "cu_seqlens": borders, "layout": "thd"}
            attended = attention(q, k, v, positions, ROPE, **rest)
        else:
            attended = cache.decode(q, self.index)
        x = x + self.out(attended.flatten(-2))
        gate, up = self.up(self.before_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.layers = nn.ModuleList(Layer(s, i) for i in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)

    def forward(self, tokens, cache=None, packed=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cache, packed)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, prompts: list[torch.Tensor], new: int) -> list[list[int]]:
        """Greedy. prompts: a (tokens,) tensor for each row; no padding anywhere."""
        counts = [len(p) for p in prompts]
        s, capacity = self.s, max(counts) + new
        cache = KVCache(
            ROPE, len(prompts), capacity, s.kv_heads, s.head_dim, layers=s.layers,
            dtype=self.embed.weight.dtype, policy="switch",
        )  # fmt: skip
        lengths = torch.tensor(counts)
        borders = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        positions = torch.cat([torch.arange(n) for n in counts])
        cache.extend(counts)
        logits = self(torch.cat(prompts), cache, (positions, lengths, borders))
        tokens = logits[borders[1:] - 1].argmax(-1)
        made = [tokens]
        for _ in range(new - 1):
            cache.extend(1)
            tokens = self(tokens[:, None], cache)[:, 0].argmax(-1)
            made.append(tokens)
        return torch.stack(made, 1).tolist()


def main() -> None:
    torch.manual_seed(0)
    model = Model(Sizes()).eval()
    prompts = [torch.randint(0, 256, (n,)) for n in (100, 20, 56)]
    together = model.generate(prompts, new=16)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate([prompt], new=16)[0]
        sets = [ROPE.set_index(len(prompt) + n) for n in (0, 15)]
        first, last = (("short", "long")[i] for i in sets)
        print(f"{len(prompt):>3} tokens, {first} set, at the end {last}: {row}")
        print(f"{'':4}alone the same tokens: {alone == row}")


if __name__ == "__main__":
    main()
