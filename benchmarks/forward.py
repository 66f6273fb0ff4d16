"""A candidate's forward beside one of transformers' untouched model, and where each spends time.

    python benchmarks/forward.py [--length 2048] [--last 1024] [--layers 4] [--rounds 7]
        [--dtype float32]

The model has the layers of SmolLM2-135M, random weights, and a head for the scored tokens alone.
The two take turns, so that other work on the machine meets both; on a CPU the processor's time is
counted, which other work changes least, and on a GPU wall time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report.facts import describe
from torch.profiler import ProfilerActivity, profile

from longrope_kernels.search.model import TransformersLosses

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Forward = Callable[[], torch.Tensor]


@torch.no_grad()
def plain_losses(model: Any, ids: torch.Tensor, last: int) -> torch.Tensor:
    """What `TransformersLosses` gives, by a model of transformers: (rows, last) on the host."""
    ids = ids.to(model.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -last - 1 : -1]
    logits = model.lm_head(hidden).float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, -last:].flatten(), reduction="none"
    )
    return losses.view(len(ids), last).cpu()


def model_of(layers: int, dtype: torch.dtype) -> Any:
    """Of SmolLM2-135M's sizes but for its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DEVICE, dtype).eval()


def both(
    layers: int, length: int, last: int, dtype: torch.dtype = torch.float32
) -> tuple[Forward, Forward]:
    """The forward of transformers and ours, of the same weights and tokens.

    Raises:
        RuntimeError: their losses differ.
    """
    theirs = model_of(layers, dtype)
    losses = TransformersLosses(copy.deepcopy(theirs))
    ids = torch.randint(0, 49152, (1, length), generator=torch.Generator().manual_seed(1))

    def plain() -> torch.Tensor:
        return plain_losses(theirs, ids, last)

    def ours() -> torch.Tensor:
        return losses(losses.rope, ids, last=last)

    off = (plain() - ours()).abs().max().item()
    if off > 1e-3 and dtype == torch.float32:  # others round where each pleases
        raise RuntimeError(f"losses: expected those of transformers, got {off:.1e} off")
    return plain, ours


def ratios(plain: Forward, ours: Forward, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of transformers', and ours over those, by round."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter

    def seconds(forward: Forward) -> float:
        begin = clock()
        forward()  # ends on the host
        return clock() - begin

    pairs = [(seconds(plain), seconds(ours)) for _ in range(rounds)]
    return [a for a, _ in pairs], [b / a for a, b in pairs]


def shares(forward: Forward, most: int = 8) -> list[tuple[str, float]]:
    """The operations that take longest, each by itself, and their share of all."""
    on_gpu = DEVICE.type == "cuda"
    kinds = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        forward()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {one.key: float(getattr(one, name)) for one in found.key_averages()}
    total = sum(times.values())
    longest = sorted(times, key=lambda key: -times[key])[:most]
    return [(key, times[key] / total) for key in longest]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--last", type=int, default=None, help="scored tokens; half by default")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="JSON that gets this as one more row")
    given = parser.parse_args()
    last = given.length // 2 if given.last is None else given.last
    forwards = both(given.layers, given.length, last, getattr(torch, given.dtype))
    seconds, of_plain = ratios(*forwards, given.rounds)
    row = {
        "machine": describe(Path(__file__).parents[1]),
        "dtype": given.dtype,
        "layers": given.layers,
        "tokens": given.length,
        "scored": last,
        "transformers_s": statistics.median(seconds),
        "ratios": of_plain,
        "shares": {
            name: dict(shares(forward))
            for name, forward in zip(("transformers", "ours"), forwards, strict=True)
        },
    }
    print(json.dumps(row, indent=2))
    if given.out is not None:
        rows = json.loads(given.out.read_text()) if given.out.exists() else []
        given.out.write_text(json.dumps([*rows, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
