"""The command line, ``longrope``. Each command imports what it needs when it runs."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from .search import cli as search_commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="LongRoPE (arXiv 2402.13753): rotary position embedding, exact at any position.",
    epilog="Python: longrope_kernels.apply_rotary(q, k, positions, factors, n_hat) or (..., rope).",
)


def main() -> None:
    """The entry point of ``longrope``."""
    app()


@app.command()
def info(
    models: Annotated[
        bool, typer.Option("--models", help="The decoders of transformers that enable serves.")
    ] = False,
) -> None:
    """Show versions, devices and backends, and which serves a call.

    A backend that is missing says why and how to get it. Of attention, "plain" calls are causal or
    not, "chunk" ones causal with fewer queries than keys, "wide" ones of a head_dim above 128;
    "masked" ones also have a window, packed sequences or sinks, "padded" ones left padding, and
    "scored" ones softcap or the log-sum-exp. "cuda 9" is compute capability 9.
    """
    if models:
        _show_models()
        return
    import torch

    from . import __version__
    from .backends import choose as backends

    typer.echo(f"longrope_kernels {__version__}")
    typer.echo(f"python           {platform.python_version()}")
    typer.echo(f"torch            {torch.__version__}")
    cpu = torch.backends.cpu.get_cpu_capability()
    typer.echo(f"cpu              {platform.machine()}, {cpu}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        typer.echo(f"cuda:{index:<11} {torch.cuda.get_device_name(index)}")
    if not torch.cuda.device_count():
        typer.echo("cuda             no device")

    ptxas = backends.part("triton", "device").ptxas()
    if ptxas is not None:
        typer.echo(f"triton's ptxas   {ptxas}")

    for title, width, rows in (
        ("backends", 10, backends.table()),
        ("backends of attention alone", 12, backends.attention_table()),
    ):
        typer.echo(f"\n{title}")
        for row in rows:
            devices = ", ".join(row["devices"])
            state = "ready"
            if row["missing"] is not None:
                state = f"missing: {row['missing']}"
            elif row["missing_products"] is not None:
                state = f"ready for the rotation and append alone: {row['missing_products']}"
            typer.echo(f"  {row['name']:<{width}} {devices:<5} {state}")

    typer.echo("\nbackend=None takes the first of these that is ready (float64: reference)")
    for device, names in backends.ROTARY_CHOICE.items():
        typer.echo(f"  apply_rotary  {device:<5} {' > '.join(names)}")
    for device, names in backends.DECODE_CHOICE.items():
        typer.echo(f"  decode        {device:<5} {' > '.join(names)}")
    for device, needs in backends.ATTENTION_CHOICE.items():
        for kind, names in needs.items():
            typer.echo(f"  attention     {device:<7} {kind:<7} {' > '.join(names)}")


def _show_models() -> None:
    from .integrations import families

    rotated, unrotated = families.counts()
    typer.echo(
        f"Tried with transformers {families.proven()['transformers']}: {rotated} families with "
        f"cache='rotated', {unrotated} of them with cache='unrotated'\n"
    )
    typer.echo(f"  {'family':<24} {'pairs':<12} {'unrotated':<24} rotated")
    for name, pairs, *passed in families.rows():
        typer.echo(f"  {name:<24} {pairs:<12} {passed[0]:<24} {passed[1]}")
    typer.echo("\nwith cache='rotated' alone, and why")
    for name, entry in families.proven()["families"].items():
        if entry["unrotated"]:
            typer.echo(f"  {name:<24} {entry['unrotated']}")
    typer.echo("\nnot served, and why")
    for name, reason in families.proven()["others"].items():
        typer.echo(f"  {name:<24} {reason}")


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False, help="Folder for results.json and error.png; made if needed."
        ),
    ] = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: does everything run? (half a minute)")
    ] = False,
) -> None:
    """Compare a small Phi-3 with and without the kernels.

    Prints whether the model agrees, the error against float64 at positions to 2M, and the time
    beside transformers and a plain copy, all measured here and now; writes them as results.json,
    and the error against position as error.png. Under three minutes on two CPU cores. Fails
    where the model generates other tokens with the kernels than without.
    """
    _require("demo", "transformers", "matplotlib")
    from .demo.run import run

    if not run(out, quick=quick)["generate"]["equal"]:
        raise typer.Exit(1)


@app.command("serve-check")
def serve_check(
    model: Annotated[Path, typer.Argument(help="Folder of the model: config.json and weights.")],
    dtype: Annotated[
        str, typer.Option(help="Of weights and activations: float32, bfloat16, float16.")
    ] = "float32",
) -> None:
    """Compare vLLM without and with this package's plugin to transformers, on your model.

    Asks each for the log-probabilities of a short prompt and of one that is longer than the first
    factor set, and of a few new tokens; prints how far they are from transformers', and what to
    start the server with. Loads the model three times, one after the other, offline.
    """
    _require("vllm", "vllm", "transformers", command="serve-check")
    from .integrations.vllm.check import check, command_line

    try:
        rope, rows = check(model, dtype)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"longrope serve-check: {error}", err=True)
        raise typer.Exit(1) from error
    sets = [s.max_length or "more" for s in rope.sets]
    typer.echo(f"{model}, {dtype}: factor sets for up to {', '.join(map(str, sets))} tokens\n")
    typer.echo("difference of log-probabilities to transformers, largest and mean")
    for row in rows:
        typer.echo(f"  {row.tokens:>7} tokens  {row.server:<15}  {row.most:8.1e}  {row.mean:8.1e}")
    typer.echo(f"\nserve it by\n  {command_line(model)}")


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="Of a search, or of a model: longrope.json, config.json.")
    ],
    gguf: Annotated[Path, typer.Option(help="The model for llama.cpp, of any quantisation.")],
    out: Annotated[Path, typer.Option(help="The file to write, whole or not at all.")],
    length: Annotated[
        int | None, typer.Option(help="Tokens it is for then. [default: the folder's config]")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over factors, and over a file, that are there.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Ask llama.cpp whether it takes them (xllamacpp).")
    ] = False,
) -> None:
    """Put the factors of a folder into a GGUF file for llama.cpp.

    \b
    longrope export search-32k --gguf model-Q4_K_M.gguf --out extended.gguf

    Weights are copied as they are. What GGUF can't say is refused by name: a threshold, more than
    two sets, attention factors that differ. Prints the command lines of the two servers: llama.cpp
    chooses the set by the context it was started with, not by the length of a sequence.
    """
    _require("gguf", "gguf", command="export")
    if check:
        _require("gguf", "transformers", "accelerate", command="export --check")
        if importlib.util.find_spec("xllamacpp") is None:
            typer.echo("longrope export --check needs xllamacpp: pip install xllamacpp", err=True)
            raise typer.Exit(1)
    from .integrations.llamacpp import export as write
    from .rope import Rope
    from .search.source import CONFIG, open_source

    try:
        source = open_source(folder) if (folder / CONFIG).is_file() else None
        done = write(
            Rope.load(folder) if source is None else source.rope,
            gguf,
            out,
            length=source.trained if length is None and source is not None else length,
            original=None if source is None else source.original,
            replace_factors=replace,
        )
    except (ValueError, OSError) as error:
        typer.echo(f"longrope export: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"written: {out}, for {done.length} tokens")
    typer.echo("llama.cpp takes one set for all sequences, by the context it was started with:")
    none = {
        "short": f"in no context, since they are multiples of 256 and it ends at {done.original}",
        "long": f"in no context of up to {done.length} tokens: they take the short set",
    }
    for set_of, context in (("short", done.short_context), ("long", done.long_context)):
        command = f"llama-server -m {out} -c {context} -np 1"
        typer.echo(f"  {set_of:<5} {command if context else none[set_of]}")
    if check:
        _check_export(done)


def _check_export(done: Any) -> None:
    """Print what the engine says; fails where it takes another set."""
    from .integrations.llamacpp import check

    typer.echo("mean difference of log-probabilities to transformers, under this set and another")
    answers = check(done)
    for one in answers:
        typer.echo(f"  -c {one.context:<7} {one.set:<5} {one.own:8.1e} {one.other:8.1e}")
    if not all(one.agrees for one in answers):
        typer.echo("longrope export --check: llama.cpp takes another set than it should", err=True)
        raise typer.Exit(1)


search_commands.register(app)


def _require(extra: str, *packages: str, command: str | None = None) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(
            f"longrope {command or extra} needs {', '.join(missing)}: "
            f"pip install 'longrope-kernels[{extra}]'",
            err=True,
        )
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
