"""The command line, ``longrope``. Each command imports what it needs when it runs."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Annotated

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
def info() -> None:
    """Show versions, devices and backends, and which serves a call.

    A backend that is missing says why and how to get it. Of attention, "plain" calls are causal or
    not, "chunk" ones causal with fewer queries than keys, "wide" ones of a head_dim above 128;
    "masked" ones also have a window or packed sequences, "padded" ones left padding, and "scored"
    ones softcap or the log-sum-exp. "cuda 9" is compute capability 9.
    """
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
                state = f"ready for the rotation alone: {row['missing_products']}"
            typer.echo(f"  {row['name']:<{width}} {devices:<5} {state}")

    typer.echo("\nbackend=None takes the first of these that is ready (float64: reference)")
    for device, names in backends.ROTARY_CHOICE.items():
        typer.echo(f"  apply_rotary  {device:<5} {' > '.join(names)}")
    for device, names in backends.DECODE_CHOICE.items():
        typer.echo(f"  decode        {device:<5} {' > '.join(names)}")
    for device, needs in backends.ATTENTION_CHOICE.items():
        for kind, names in needs.items():
            typer.echo(f"  attention     {device:<6} {kind:<7} {' > '.join(names)}")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for results.json and error.png; made if needed.")
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
