"""A vLLM server with the plugin in its modes beside vLLM alone: throughput, start-up and memory.

    python benchmarks/serving.py --out serving.json

In the environment of `make test-vllm`, on a CPU. Four layers with Phi-3-mini's published factors
and random weights; 24 requests of 20 to 1,500 tokens with 32 new ones each, sent at once, of which
some grow past the original length, 512. vLLM has one factor set for all of them. Each way is
started in processes of its own, in turns; the best of all runs counts. Beside the time of a load
stands that of the processor in it: on one thread (``--threads 1``) what others run meanwhile
changes the first a lot and the second little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ORIGINAL, NEW, REQUESTS = 512, 32, 24
LENGTHS = range(20, 1501)
WAYS: dict[str, dict[str, str]] = {
    "vLLM": {"VLLM_PLUGINS": ""},
    "rotated": {"VLLM_PLUGINS": "longrope", "LONGROPE_VLLM_MODE": "rotated"},
    "unrotated": {"VLLM_PLUGINS": "longrope", "LONGROPE_VLLM_MODE": "unrotated"},
}
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
DTYPES = ("float32", "bfloat16")


def save(folder: str) -> None:
    """The model, for vLLM to load."""
    import torch
    from transformers import Phi3ForCausalLM

    from longrope_kernels.demo.peers import phi3_config

    torch.manual_seed(0)
    config = phi3_config(
        "phi-3-mini-128k",
        hidden_size=768,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=4,
        intermediate_size=2048,
        vocab_size=4096,
        original_max_position_embeddings=ORIGINAL,
        max_position_embeddings=32 * ORIGINAL,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)


def prompts() -> list[list[int]]:
    """Of lengths that are spread over `LENGTHS`, in an order that mixes them."""
    last = REQUESTS - 1
    lengths = [
        LENGTHS[(row * 7 % REQUESTS) * (len(LENGTHS) - 1) // last] for row in range(REQUESTS)
    ]
    return [[3 + (row + 31 * i * i) % 4000 for i in range(n)] for row, n in enumerate(lengths)]


def serve(folder: str, dtype: str, runs: int) -> dict[str, float]:
    """One engine: seconds to its first answer, of the best load, and the most memory it had."""
    import resource

    import torch
    from vllm import LLM, SamplingParams

    from longrope_kernels.integrations.vllm.settings import SCHEDULER

    begun = time.perf_counter(), time.process_time()
    ours = {} if os.environ["VLLM_PLUGINS"] == "" else {"scheduler_cls": SCHEDULER}
    made = LLM(
        folder,
        dtype=dtype,
        max_model_len=4 * ORIGINAL,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **ours,
    )
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False)

    def load(asked: list[list[int]]) -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        made.generate([{"prompt_token_ids": one} for one in asked], params, use_tqdm=False)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    load([[3] * 20])
    start_up = time.perf_counter() - begun[0], time.process_time() - begun[1]
    seconds, of_processor = map(min, zip(*(load(prompts()) for _ in range(runs)), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "threads": torch.get_num_threads(),
        "start_up_s": start_up[0],
        "start_up_cpu_s": start_up[1],
        "load_s": seconds,
        "load_cpu_s": of_processor,
        "peak_bytes": peak,
    }


def measure(dtypes: Sequence[str], rounds: int, runs: int) -> list[dict[str, Any]]:
    """For each dtype and way the best of all rounds."""
    tokens = sum(map(len, prompts())) + REQUESTS * NEW
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        for dtype in dtypes:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, environment in WAYS.items():
                    found[way].append(_in_a_process(folder, dtype, runs, environment))
            best = {
                way: {k: min(x[k] for x in each) for k in each[0]} for way, each in found.items()
            }
            for way, row in best.items():
                rates = {
                    "tokens_per_s": tokens / row["load_s"],
                    "share": best["vLLM"]["load_s"] / row["load_s"],
                    "share_by_cpu_time": best["vLLM"]["load_cpu_s"] / row["load_cpu_s"],
                }
                rows.append({"dtype": dtype, "way": way, **rates, **row})
    return rows


def _in_a_process(
    folder: str, dtype: str, runs: int, environment: dict[str, str]
) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--serve", folder, dtype, str(runs)],
        env={**QUIET, **os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        *("dtype", "", "tokens/s", "of vLLM's", "of vLLM's by CPU time"),
        *("start-up, s", "peak memory, GiB"),
    )
    head = (f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|")
    lines = (
        f"| {row['dtype']} | {row['way']} | {row['tokens_per_s']:.0f} | {row['share']:.2f} | "
        f"{row['share_by_cpu_time']:.2f} | {row['start_up_s']:.1f} | "
        f"{row['peak_bytes'] / 2**30:.2f} |"
        for row in rows
    )
    return "\n".join((*head, *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the numbers, as JSON")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=2, help="engines of each way")
    parser.add_argument("--runs", type=int, default=3, help="loads of each engine")
    parser.add_argument("--threads", type=int, help="of each engine; all cores by default")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        folder, dtype, runs = given.serve
        print(json.dumps(serve(folder, dtype, int(runs))))
        return
    if given.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    rows = measure(given.dtypes, given.rounds, given.runs)
    print(table(rows))
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
