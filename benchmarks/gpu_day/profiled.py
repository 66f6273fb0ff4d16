"""Some calls of one kernel at the size of its headline row, for a profiler around this process.

ncu ... python -m benchmarks.gpu_day.profiled decode
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

CALLS = 3
# By what is profiled: which kernels ncu looks at, as its option --kernel-name takes it.
KERNELS = {"decode": "regex:decode", "prefill": "regex:attention", "rotary": "regex:rotary"}


def call_of(name: str, small: bool) -> Callable[[], Any]:
    """The call, of the inputs that the benchmarks make."""
    import torch

    if name == "decode":
        import decodes

        lengths = (4096,) * 32 if not small else (70, 20)
        return decodes.implementation(
            "triton", decodes.Inputs(decodes.Shape(lengths, torch.bfloat16))
        )
    if name == "prefill":
        import attentions

        inputs = attentions.Inputs(attentions.Shape(8192 if not small else 64, 128, True))
        attend = attentions.implementation("triton prepass", inputs)
        return lambda: attend(inputs.q, inputs.k, inputs.v)
    import rotations
    from parameters import LLAMA

    of_call = rotations.Inputs(8192 if not small else 64, torch.bfloat16, LLAMA)
    rotate = rotations.rotation("triton", of_call, inplace=False)
    return lambda: rotate(of_call.q, of_call.k)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day.profiled")
    parser.add_argument("name", choices=KERNELS)
    parser.add_argument("--small", action="store_true", help="sizes for the interpreter")
    chosen = parser.parse_args(arguments)
    call = call_of(chosen.name, chosen.small)
    for _ in range(CALLS):
        call()
    if not chosen.small:
        import torch

        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
