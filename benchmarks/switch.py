"""At the switch from the short to the long factors: an enabled model beside transformers' own.

    python benchmarks/switch.py --out switch.json

Two layers of Phi-3-mini's geometry with random weights, on a GPU where there is one. Three tables:

- crossing: ``generate()`` of 64 tokens, of which the 33rd is made of 4097 tokens, the first that
  are long: the time of that token over the median of its neighbours, and how many tokens are those
  of the untouched model without a cache. With one it makes them too from transformers 5.20 on;
  before, it goes on from the last token alone where it drops its cache.
- batch: a row of 300 tokens beside one of 4200, padded on the left: how far the last logits of
  each are from those of the same row alone, as the norm of the difference over that of the logits.
- forward: the whole model over 128 tokens and over 4096, untouched and enabled in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report.facts import describe
from transformers import Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer

from longrope_kernels.demo.peers import phi3_config
from longrope_kernels.integrations.transformers import disable, enable

ROOT = Path(__file__).parents[1]
NEIGHBOURS = 8  # tokens on each side of the crossing that its time is compared with
UNTOUCHED = "transformers"
CACHES = {"switch": "unrotated", "rotated": "rotated"}  # by what happens at the crossing


@dataclass(frozen=True)
class Sizes:
    """``switch`` is the length of the longest short sequence, in tokens."""

    switch: int = 4096
    new: int = 64
    runs: int = 3  # of generate()
    rows: tuple[int, int] = (300, 4200)
    forwards: tuple[int, int] = (128, 4096)
    rounds: tuple[int, int] = (41, 5)  # of each forward
    heads: int = 32
    intermediate: int = 8192
    layers: int = 2
    vocab: int = 256


QUICK = Sizes(64, 24, 2, (12, 80), (16, 64), (3, 3), 2, 64)


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    hidden = 96 * sizes.heads
    config = phi3_config(
        "phi-3-mini-128k",
        hidden_size=hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocab,
        original_max_position_embeddings=sizes.switch,
        max_position_embeddings=32 * sizes.switch,
        # 0.02 at full width; scores of a narrow model spread as far, so that rotation matters.
        initializer_range=0.02 * (3072 / hidden) ** 0.5,
    )
    torch.manual_seed(0)
    # As from_pretrained(dtype=...) does; .to(dtype) would round transformers' frequencies as well.
    return Phi3ForCausalLM._from_config(config, dtype=dtype).to(device).eval()


def tokens(count: int, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(1, model.config.vocab_size, (1, count), generator=generator)
    return ids.to(model.device)


@contextlib.contextmanager
def enabled(model: Any, name: str) -> Iterator[Any]:
    """The model, enabled with the cache of that name, or as it is."""
    yield model if name == UNTOUCHED else enable(model, cache=CACHES[name])
    disable(model)


# --------------------------------------------------------------------------------------- crossing


class Stopwatch(BaseStreamer):
    """``generate()`` puts the prompt, then each token once it is on the host."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def crossing(model: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """For each way the milliseconds of every token, the prefill's first: medians of some runs."""
    prompt = tokens(sizes.switch + 1 - sizes.new // 2, model)
    at = sizes.new // 2  # of the token that is made of switch + 1 tokens
    rows = []
    for name in (UNTOUCHED, *CACHES):
        runs = []
        with enabled(model, name):
            generate(model, prompt[:, :8], 2)
            for _ in range(sizes.runs):
                watch = Stopwatch()
                made = generate(model, prompt, sizes.new, watch)
                runs.append([1e3 * (b - a) for a, b in zip(watch.at, watch.at[1:], strict=False)])
        ms = [statistics.median(times) for times in zip(*runs, strict=True)]
        around = ms[max(1, at - NEIGHBOURS) : at] + ms[at + 1 : at + 1 + NEIGHBOURS]
        rows.append(
            {
                "name": name,
                "crossing_ms": ms[at],
                "neighbour_ms": statistics.median(around),
                "ratio": ms[at] / statistics.median(around),
                "same_tokens": same_tokens(model, prompt, made, sizes),
                "tokens_ms": ms,
            }
        )
    return rows


def generate(model: Any, prompt: torch.Tensor, new: int, watch: Any = None) -> list[int]:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        streamer=watch,
    )
    return out[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def same_tokens(model: Any, prompt: torch.Tensor, made: list[int], sizes: Sizes) -> int:
    """How many tokens come before the first that the untouched model would not make of the rest.

    Those made of more than ``sizes.switch`` tokens by the long factors, without a cache.
    """
    ids = torch.cat((prompt, torch.tensor([made], device=prompt.device)), 1)
    count, last = prompt.shape[1], ids.shape[1] - 1
    best: list[int] = []
    for first, end in ((count, sizes.switch), (sizes.switch + 1, last)):
        out = model(ids[:, :end], use_cache=False, logits_to_keep=end - first + 1)
        best += out.logits[0].argmax(-1).tolist()
    other = [i for i, (a, b) in enumerate(zip(made, best, strict=True)) if a != b]
    return min(other, default=sizes.new)


# ------------------------------------------------------------------------------------------ batch


@torch.no_grad()
def batch(model: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """For each row and way the relative error of the last logits beside the other row."""
    parts = [tokens(count, model) for count in sizes.rows]
    width = max(sizes.rows)
    padded = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in parts])
    mask = torch.stack([torch.arange(width) >= width - count for count in sizes.rows]).long()
    mask = mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = []
    for name in (UNTOUCHED, "enabled"):
        with enabled(model, name if name == UNTOUCHED else "switch"):
            rest = {"attention_mask": mask, "position_ids": positions}
            together = last_logits(model, padded, **rest)
            for row, part in enumerate(parts):
                alone = last_logits(model, part)[0]
                error = (together[row] - alone).norm() / alone.norm()
                rows.append({"name": name, "tokens": part.shape[1], "relative_error": float(error)})
    return rows


def last_logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """(batch, vocab) float64."""
    out = model(ids, use_cache=False, logits_to_keep=1, **kwargs)
    return out.logits[:, -1].double()  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------- forward


@torch.no_grad()
def forward(model: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """The median time of a forward, both ways in turns, and the median of their ratios."""
    # Two models on the same weights: nothing is put in or taken out between the rounds.
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    models = {UNTOUCHED: model, "switch": enable(twin)}
    rows = []
    for count, rounds in zip(sizes.forwards, sizes.rounds, strict=True):
        ids = tokens(count, model)
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name, one in models.items():
                seconds = timed(partial(one, ids, use_cache=False))
                if turn:  # the first one warms up
                    times[name].append(seconds)
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        rows.append(
            {
                "tokens": count,
                "untouched_ms": 1e3 * statistics.median(times[UNTOUCHED]),
                "enabled_ms": 1e3 * statistics.median(times["switch"]),
                "ratio": statistics.median(ratios),
            }
        )
    return rows


def timed(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    del result
    return seconds


# ----------------------------------------------------------------------------------------- output


def show(results: dict[str, Any]) -> None:
    print(f"\n{'generate()':14}{'crossing, ms':>14}{'neighbours, ms':>16}{'ratio':>8}  same tokens")
    for row in results["crossing"]:
        print(
            f"{row['name']:14}{row['crossing_ms']:14.1f}{row['neighbour_ms']:16.1f}"
            f"{row['ratio']:8.2f}  {row['same_tokens']}"
        )
    print(f"\n{'mixed batch':14}{'tokens':>8}{'relative error':>16}")
    for row in results["batch"]:
        print(f"{row['name']:14}{row['tokens']:8}{row['relative_error']:16.1e}")
    print(f"\n{'forward':8}{'untouched, ms':>15}{'enabled, ms':>13}{'ratio':>8}")
    for row in results["forward"]:
        print(
            f"{row['tokens']:<8}{row['untouched_ms']:15.1f}{row['enabled_ms']:13.1f}"
            f"{row['ratio']:8.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="small sizes; times say nothing then")
    chosen = parser.parse_args()
    sizes = QUICK if chosen.quick else Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(sizes, device, getattr(torch, chosen.dtype))
    results = {
        "machine": describe(ROOT),
        "dtype": chosen.dtype,
        "sizes": asdict(sizes),
        "crossing": crossing(model, sizes),
        "batch": batch(model, sizes),
        "forward": forward(model, sizes),
    }
    show(results)
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
