"""generate() of an enabled model across the switch of its factors: step by step, and as a graph.

    python -m benchmarks.gpu_day.generate --into FILE

The graph is the one that transformers makes of a static cache on a GPU; both make the same tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .schedule import write

PROMPT, NEW = 20, 40  # tokens; the switch lies between


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day.generate")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="what the step has; it is not needed here")
    chosen = parser.parse_args(arguments)
    import torch
    from model_cases import SWITCH, family_model, tokens

    from longrope_kernels.integrations.transformers import enable

    assert PROMPT < SWITCH < PROMPT + NEW
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = enable(family_model("phi3").to(device))
    ids = tokens(2, PROMPT).to(device)

    def generated(**how: Any) -> tuple[torch.Tensor, float]:
        """The tokens, and the seconds of one of the second run."""
        for _ in range(2):
            begin = time.perf_counter()
            out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **how)
            out = out.cpu()
        return out, (time.perf_counter() - begin) / NEW

    stepped, of_steps = generated()
    write(chosen.into, {"what": "generate, step by step", "seconds a token": of_steps})
    how: dict[str, Any] = {"cache_implementation": "static"}
    if device == "cpu":
        how["disable_compile"] = True
    replayed, of_graph = generated(**how)
    same = torch.equal(stepped, replayed)
    what = (
        "generate, as a graph" if device == "cuda" else "generate, a static cache without a graph"
    )
    why = "" if same else "it makes other tokens"
    told = {"what": what, "seconds a token": of_graph, "outcome": "passed" if same else "failed"}
    write(chosen.into, {**told, "why": why})
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
