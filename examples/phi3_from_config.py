"""A Phi-3 from its config, and what happens where a text grows from 4096 to 4097 tokens.

Two small layers with Phi-3-mini's head size and published factors, random weights, no download.
transformers drops its cache at that token and prefills again, since its keys were rotated by the
short factors; an enabled model keeps its keys unrotated and goes on. Before transformers 5.20 the
untouched model prefills with the last token alone, and goes wrong. Run it:

    python examples/phi3_from_config.py
"""

import time

import torch
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer

from longrope_kernels.integrations.transformers import disable, enable
from longrope_kernels.rope.published import published_configs

PUBLISHED = published_configs()["phi-3-mini-128k"]
SWITCH = PUBLISHED["original_max_position_embeddings"]  # 4096 tokens, the last that are short
PROMPT, NEW = SWITCH - 5, 12


def build() -> Phi3ForCausalLM:
    rope = {**PUBLISHED["rope_scaling"], "rope_theta": PUBLISHED["rope_theta"]}
    rope["factor"] = PUBLISHED["max_position_embeddings"] / SWITCH
    config = Phi3Config(
        hidden_size=2 * PUBLISHED["head_dim"],
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=256,
        vocab_size=256,
        max_position_embeddings=PUBLISHED["max_position_embeddings"],
        original_max_position_embeddings=SWITCH,
        rope_parameters=rope,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.06,  # larger than usual, so that random attention is not uniform
    )
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).eval()


class Stopwatch(BaseStreamer):
    """`generate()` calls it with the prompt, and with every token as soon as it is there."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def run(
    model: Phi3ForCausalLM, prompt: torch.Tensor, use_cache: bool = True
) -> tuple[list[int], list[float]]:
    """The new tokens, and the seconds that each of them took."""
    watch = Stopwatch()
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        streamer=watch,
    )
    return out[0, PROMPT:].tolist(), [b - a for a, b in zip(watch.at, watch.at[1:], strict=False)]


def main() -> None:
    model = build()
    prompt = torch.randint(1, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    expected, _ = run(model, prompt, use_cache=False)
    results = {"untouched": run(model, prompt)}
    for cache in ("unrotated", "rotated"):
        results[f"enabled, {cache}"] = run(enable(model, cache=cache), prompt)
    disable(model)

    print(f"milliseconds for each token, by the tokens that were read ({PROMPT} is the prompt):\n")
    head = "".join(f"{PROMPT + i:>7}" for i in range(NEW))
    print(f"{'':18}{head}")
    for name, (_, seconds) in results.items():
        print(f"{name:18}" + "".join(f"{1e3 * s:7.0f}" for s in seconds))
    print()
    for name, (tokens, _) in results.items():
        same = next((i for i in range(NEW) if tokens[i] != expected[i]), NEW)
        print(f"{name:18} the first {same} of {NEW} tokens are those of a model without a cache")


if __name__ == "__main__":
    main()
