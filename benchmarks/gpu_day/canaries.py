"""Each kernel once, in a process of its own, held to the truth that the tests have.

    python -m benchmarks.gpu_day.canaries --into FILE    all, and what mends a failing one
    python -m benchmarks.gpu_day.canaries --name decode  one, here

A failing one runs again with each ptxas there is, without ptxas's optimisation, and with one stage
of the software pipeline: which of them mends it says whose fault it is. ``--tool memcheck`` has
compute-sanitizer watch instead.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .many import Small, each
from .schedule import write

LIMIT = 40.0  # seconds of one
SANITIZED = 120.0  # of one that compute-sanitizer watches
RIGHT = "right"  # the last word of one whose result is
FOUND = 9  # its exit status where it found something


class Canary(NamedTuple):
    """``run`` raises where the result is wrong; whether Triton's kernel multiplies by wgmma."""

    run: Callable[[], Any]
    wgmma: bool = False


def all_of_them() -> dict[str, Canary]:
    """Every kernel, several tiles of each kind; the imports take seconds."""
    from append_truth import Case as Append
    from attention_cases import COMPOSED, PREPASS, REGISTERS, Case
    from attention_cases import Backend as AttentionBackend
    from attention_truth import bf16, fp16
    from cases import COMPILED, CUDA, TRITON, Shape
    from decode_truth import COMPILED as COMPILED_DECODE
    from decode_truth import TRITON as TRITON_DECODE
    from decode_truth import Case as Decode

    place = "cuda" if CUDA else "cpu"
    cuda = AttentionBackend("cuda", place, (bf16, fp16), smallest_dim=16)
    composed = AttentionBackend("composed", place, COMPOSED.dtypes, of_scores=False)
    heads = {"heads": 2, "kv_heads": 1, "dtype": bf16}
    prompt = Case(1, 200, dim=128, **heads)
    trained = prompt if CUDA else Case(1, 40, dim=64, **heads)  # the interpreter is slow
    plain = Shape(2, 63, 4, 2, 128, dtype=bf16)
    interleaved = Shape(1, 40, 2, 1, 80, 16, interleaved=True)
    short = Decode((40, 90), 1, 8, 2, 128, dtype=bf16)
    step = Decode((300, 901), 1, 8, 2, 128, boundary=900, n_hat=200, dtype=bf16) if CUDA else short
    part, paged = functools.partial, {"heads": 2, "dim": 128, "block": 16}
    return {
        "rotary": Canary(part(_rotary, TRITON, plain)),
        "rotary interleaved": Canary(part(_rotary, TRITON, interleaved)),
        "rotary in place": Canary(part(_rotary, TRITON, plain, inplace=True)),
        "rotary backward": Canary(part(_rotary, TRITON, plain, backward=True)),
        "rotary graph": Canary(part(_graph, part(_rotary_step, TRITON, plain))),
        "rotary cuda": Canary(part(_rotary, COMPILED, plain)),
        "prefill 64": Canary(part(_attend, PREPASS, Case(1, 200, dim=64, **heads)), True),
        "prefill 96": Canary(part(_attend, PREPASS, Case(1, 200, dim=96, **heads)), True),
        "prefill 128": Canary(part(_attend, PREPASS, prompt), True),
        "prefill 256": Canary(part(_attend, PREPASS, Case(1, 140, dim=256, **heads)), True),
        "prefill registers": Canary(
            part(_attend, REGISTERS, Case(1, 60, 300, dim=128, **heads)), True
        ),
        "prefill window": Canary(
            part(_attend, PREPASS, Case(2, 150, dim=80, window=90, kv_start=(0, 60), **heads)), True
        ),
        "prefill packed": Canary(
            part(_attend, PREPASS, Case(dim=64, layout="thd", counts=(140, 1, 60), **heads)), True
        ),
        "prefill cuda": Canary(part(_attend, cuda, Case(1, 130, dim=64, **heads))),
        "prefill composed": Canary(part(_attend, composed, prompt), True),
        "dq": Canary(part(_gradient, PREPASS, trained, "q"), True),
        "dk": Canary(part(_gradient, PREPASS, trained, "k"), True),
        "dv": Canary(part(_gradient, PREPASS, trained, "v"), True),
        "decode": Canary(part(_decode, TRITON_DECODE, step)),
        "decode paged": Canary(
            part(_decode, TRITON_DECODE, Decode((130, 500), 4, 4, 1, 96, block=16, dtype=bf16))
        ),
        "decode float8": Canary(
            part(
                _decode,
                TRITON_DECODE,
                Decode((333,), 1, 4, 1, 128, block=32, dtype=bf16, float8=True, n_hat=150),
            )
        ),
        "decode drafts": Canary(
            part(_decode, TRITON_DECODE, Decode((190,), 16, 8, 1, 64, dtype=fp16, window=100))
        ),
        "decode graph": Canary(part(_graph, part(_decode_step, TRITON_DECODE, short))),
        "decode cuda": Canary(part(_decode, COMPILED_DECODE, short)),
        "append": Canary(part(_append, TRITON, Append((33, 70), 20, source="fused", **paged))),
        "append float8": Canary(
            part(_append, TRITON, Append((33, 70), 20, float8=True, mapping="packed", **paged))
        ),
        "append graph": Canary(
            part(_graph, part(_append_step, TRITON, Append((9, 40), 3, **paged)))
        ),
        "append cuda": Canary(part(_append, COMPILED, Append((33, 70), 20, float8=True, **paged))),
        "decode append": Canary(part(_decode, TRITON_DECODE, step, new=1)),
        "decode append graph": Canary(part(_graph, part(_decode_step, TRITON_DECODE, step, new=1))),
        "decode append cuda": Canary(part(_decode, COMPILED_DECODE, short, new=1)),
    }


def _rotary_call(target: Any, shape: Any) -> Any:
    """Inputs, the call of them, and what must come out: q and k of a sequence in each set."""
    import torch
    import truth
    from cases import positions_for, two_sets

    rope = two_sets(shape.rotated_pairs, interleaved=shape.interleaved)
    q, k = shape.qk()
    positions, lengths = positions_for(shape.seq, 7), torch.tensor([5, 5000][-shape.batch :])

    def right(x: Any, **how: Any) -> Any:
        return truth.rotary(x, positions, rope, lengths=lengths, **how)

    arguments = [target.move(x) for x in (positions, rope.to(target.device))]
    rest = {"lengths": target.move(lengths)}
    return [q, k], lambda q, k, **how: target.rotary(q, k, *arguments, **rest, **how), right


def _rotary(target: Any, shape: Any, inplace: bool = False, backward: bool = False) -> None:
    import torch
    from tolerance import assert_close

    tensors, call, right = _rotary_call(target, shape)
    moved = [target.move(x.clone()).requires_grad_(backward) for x in tensors]
    outs = call(*moved, inplace=inplace)
    if backward:
        tensors = [torch.randn(x.shape).to(x.dtype) for x in tensors]
        outs = torch.autograd.grad(outs, moved, [target.move(x) for x in tensors])
    for name, out, x in zip("qk", outs, tensors, strict=True):
        assert_close(out, right(x, backward=backward), name)


def _attend(backend: Any, case: Any) -> None:
    from attention_cases import check

    check(backend, case)


def _gradient(backend: Any, case: Any, of: str) -> None:
    """One of dq, dk and dv."""
    import torch
    from attention_truth import Call
    from tolerance import assert_close

    tensors, arguments = case.tensors(), case.arguments()
    positions, rope = arguments.pop("positions"), case.rope()
    leaves = [backend.move(x.clone()).requires_grad_() for x in tensors]
    out = backend.attend(*leaves, positions, rope, **arguments)
    d_out = torch.randn(out.shape).to(out.dtype)
    i = "qkv".index(of)
    grad = torch.autograd.grad(out, leaves, backend.move(d_out))[i]
    expected = Call(*tensors, positions, rope, **arguments).expected_grads(d_out)
    assert_close(grad, expected[i], f"d{of}")


def _append(target: Any, case: Any) -> None:
    from append_truth import check

    check(target, case.arguments())


def _decode(backend: Any, case: Any, new: int = 0) -> None:
    """``new``: of each sequence so many keys are appended by the same call."""
    from append_truth import check_decode
    from decode_truth import check

    if new:
        check_decode(backend, case.call(), new)
    else:
        check(backend, case.call())


# Steps for a graph: inputs, the call of them, and what raises where a result of it is wrong.


def _rotary_step(target: Any, shape: Any) -> Any:
    from tolerance import assert_close

    tensors, call, right = _rotary_call(target, shape)

    def hold(outs: Any) -> None:
        for name, out, x in zip("qk", outs, tensors, strict=True):
            assert_close(out, right(x), name)

    return tensors, call, hold


def _append_step(target: Any, case: Any) -> Any:
    """A replay begins with the caches as they were before the first call."""
    import torch
    from append_truth import expected
    from decode_truth import bits, same

    from longrope_kernels import append

    given = case.arguments()
    wanted = [bits(same(x)) for x in expected(given)]
    tensors = [given.pop("k"), given.pop("v")]
    given = {name: target.move(x) for name, x in given.items()}
    restore = _restoring(given)

    def call(k: Any, v: Any) -> Any:
        restore()
        append(k, v, **given, backend=target.backend)
        return [same(given[name]).clone() for name in ("k_cache", "v_cache")]

    def hold(outs: Any) -> None:
        for name, out, right in zip(("k_cache", "v_cache"), outs, wanted, strict=True):
            assert torch.equal(bits(out), right), name

    return tensors, call, hold


def _decode_step(backend: Any, case: Any, new: int = 0) -> Any:
    from append_truth import without_newest
    from decode_truth import assert_decoded

    of_case = case.call()
    given, k_new, v_new = without_newest(of_case, new)
    tensors = [given.pop("q"), *((k_new, v_new) if new else ())]
    given = {name: backend.move(x) for name, x in given.items()}
    restore = _restoring(given)

    def call(q: Any, *appended: Any) -> Any:
        restore()
        return backend.decode(q, **given, **dict(zip(("k_new", "v_new"), appended, strict=False)))

    return tensors, call, lambda out: assert_decoded(out, of_case.expected().out)


def _restoring(given: dict[str, Any]) -> Callable[[], None]:
    """What writes into the caches what they hold now."""
    from decode_truth import same

    caches = [same(given[name]) for name in ("k_cache", "v_cache")]
    pairs = [(x, x.clone()) for x in caches]

    def restore() -> None:
        for x, held in pairs:
            x.copy_(held)

    return restore


def _graph(made: Callable[[], Any]) -> None:
    """Captured, its inputs poisoned and filled again, replayed; without a GPU called twice."""
    import torch

    tensors, call, hold = made()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = [x.to(device, copy=True) for x in tensors]
    outs = call(*held)
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = call(*held)
    for x, of in zip(held, tensors, strict=True):
        x.fill_(torch.nan)
        x.copy_(of)
    if device == "cuda":
        graph.replay()
        torch.cuda.synchronize()
    else:
        outs = call(*held)
    hold(outs)


# ------------------------------------------------------------------------------------- processes


def assemblers() -> dict[str, str]:
    """The ptxas there are: Triton's, nvcc's, a wheel's, and the one that LONGROPE_PTXAS names."""
    import triton
    from codegen_cuda import nvcc

    compiler = nvcc()
    places = {
        "Triton's": Path(triton.__file__).parent / "backends/nvidia/bin/ptxas",
        "nvcc's": compiler and Path(compiler).resolve().parent / "ptxas",
        "a wheel's": next(
            (path for base in sys.path for path in Path(base).glob("nvidia/cu*/bin/ptxas")), None
        ),
        "LONGROPE_PTXAS": os.environ.get("LONGROPE_PTXAS"),
    }
    return {name: str(path) for name, path in places.items() if path and Path(path).exists()}


def variants(found: dict[str, str]) -> Iterator[tuple[str, dict[str, str], tuple[str, ...]]]:
    """What a failing canary is tried with: its name, environment and options."""
    for name, path in found.items():
        yield f"ptxas: {name}", {"TRITON_PTXAS_PATH": path}, ()
    yield "without optimisation", {"DISABLE_PTXAS_OPT": "1"}, ()
    yield "one stage", {}, ("--one-stage",)


def one_stage() -> None:
    """All launches of Triton from now on."""
    from longrope_kernels.kernels.launch import Launch

    make, at = Launch.__new__, Launch._fields.index("stages")

    def make_of_one(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(cls, *args, **kwargs)
        return tuple.__new__(cls, (*made[:at], 1, *made[at + 1 :]))

    setattr(Launch, "__new__", make_of_one)  # noqa: B010


def _command(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.gpu_day.canaries", "--name", name, *options)


def fly(names: Sequence[str], into: Path, seconds: float, at_once: int) -> int:
    """All of them, then what mends those that failed; how many failed."""
    end, folder = time.monotonic() + seconds, into.with_suffix(".logs")
    many = [Small({"canary": name}, _command(name), last=RIGHT) for name in names]
    failed = []
    for told in each(many, folder, LIMIT, at_once, end):
        write(into, told)
        if told["outcome"] != "passed":
            failed.append(told["canary"])
    again = []
    for name in failed:
        for variant, environment, options in variants(assemblers()):
            cache = folder / f"cache-{len(again)}"  # where no other has left its machine code
            environment = {**environment, "TRITON_CACHE_DIR": str(cache)}
            told = {"canary": name, "again": variant}
            again.append(Small(told, _command(name, *options), environment, RIGHT))
    for told in each(again, folder / "again", LIMIT, at_once, end):
        write(into, told)
    return len(failed)


def watch(tool: str, names: Sequence[str], into: Path, seconds: float, at_once: int) -> int:
    """Each of them under compute-sanitizer; how many failed."""
    end = time.monotonic() + seconds
    sanitizer = ("compute-sanitizer", "--tool", tool, f"--error-exitcode={FOUND}")
    # A block of the caching allocator is wider than the tensor in it.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    many = [Small({"canary": x}, (*sanitizer, *_command(x)), environment) for x in names]
    failed = 0
    for told in each(many, into.with_suffix(".logs"), SANITIZED, at_once, end):
        write(into, told)
        failed += told["outcome"] != "passed"
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day.canaries")
    parser.add_argument("--name", help="run this one, here")
    parser.add_argument("--one-stage", action="store_true", help="of the software pipeline")
    parser.add_argument("--only", nargs="+", help="these, not all")
    parser.add_argument("--tool", choices=("memcheck", "racecheck"), help="of compute-sanitizer")
    parser.add_argument("--into", type=Path, help="where a line is written of each")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--at-once", type=int, default=8)
    chosen = parser.parse_args(arguments)
    if chosen.name is None and chosen.into is None:
        parser.error("--into: expected a file, got none")
    prepare()
    canaries = all_of_them()
    if chosen.name is not None:
        if chosen.name not in canaries:
            parser.error(f"--name: expected one of {', '.join(canaries)}, got {chosen.name!r}")
        if chosen.one_stage:
            one_stage()
        if "cuda" in chosen.name and os.environ.get("LONGROPE_CUDA_EMULATE"):
            import emulated

            emulated.build()
        canaries[chosen.name].run()
        print(RIGHT)
        return 0
    names = chosen.only or list(canaries)
    rest = (chosen.into, chosen.seconds, chosen.at_once)
    if chosen.tool is None:
        return int(fly(names, *rest) > 0)
    # A graph is captured in memory of the caching allocator, which memcheck does without.
    names = [name for name in names if "graph" not in name]
    if chosen.tool == "racecheck":  # it does not follow the asynchronous products
        names = [name for name in names if not canaries[name].wgmma]
    return int(watch(chosen.tool, names, *rest) > 0)


def prepare() -> None:
    """Memory that nobody wrote is NaN; without a GPU the interpreter and the emulator run."""
    import torch

    if not torch.cuda.is_available():
        os.environ |= {"TRITON_INTERPRET": "1", "LONGROPE_CUDA_EMULATE": "1"}
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    raise SystemExit(main())
