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
    not, "masked" ones also have a window, left padding or packed sequences, and "scored" ones
    softcap or the log-sum-exp.
    """
    import torch

    from . import __version__, backends

    typer.echo(f"longrope_kernels {__version__}")
    typer.echo(f"python           {platform.python_version()}")
    typer.echo(f"torch            {torch.__version__}")
    cpu = torch.backends.cpu.get_cpu_capability()
    typer.echo(f"cpu              {platform.machine()}, {cpu}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        typer.echo(f"cuda:{index:<11} {torch.cuda.get_device_name(index)}")
    if not torch.cuda.device_count():
        typer.echo("cuda             no device")

    for title, width, rows in (
        ("backends", 10, backends.table()),
        ("backends of attention alone", 12, backends.attention_table()),
    ):
        typer.echo(f"\n{title}")
        for row in rows:
            devices = ", ".join(row["devices"])
            state = "ready" if row["missing"] is None else f"missing: {row['missing']}"
            typer.echo(f"  {row['name']:<{width}} {devices:<5} {state}")

    typer.echo("\nbackend=None takes the first of these that is ready (float64: reference)")
    for device, names in backends.ROTARY_CHOICE.items():
        typer.echo(f"  apply_rotary  {device:<5} {' > '.join(names)}")
    for device, names in backends.DECODE_CHOICE.items():
        typer.echo(f"  decode        {device:<5} {' > '.join(names)}")
    for device, asks in backends.ATTENTION_CHOICE.items():
        for kind, names in asks.items():
            typer.echo(f"  attention     {device:<5} {kind:<7} {' > '.join(names)}")


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
    from .demo import run

    if not run(out, quick=quick)["generate"]["equal"]:
        raise typer.Exit(1)


@app.command()
def tune(
    head_dim: Annotated[
        list[int], typer.Option(help="Repeat for several; 16 to 256, a multiple of 16.")
    ] = [64, 80, 96, 128, 256],  # noqa: B006  Typer reads the default and copies it
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="forward-prepass, forward-registers, backward; all by default."),
    ] = None,
    seq: Annotated[int, typer.Option(min=1, help="Tokens.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Of q.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Of k and v; divides --heads.")] = 8,
    causal: Annotated[
        bool | None, typer.Option("--causal/--no-causal", help="One mask; both by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    budget: Annotated[float, typer.Option(min=0, help="Seconds for everything.")] = 600.0,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for every timing, written at the end.")
    ] = None,
) -> None:
    """Search the fastest tiles of the attention kernels on this GPU.

    Candidates that do not fit or spill are dropped, those that compute something else than the
    present table are reported, the rest is timed with a cold L2 cache. Prints the tables as Python
    source, for CONFIGS in kernels/attention.py and kernels/attention_backward.py; progress goes to
    stderr.
    """
    import torch

    from .tuning import device, search, table
    from .tuning.entries import KERNELS, Task

    for name, value, served in (
        *(("--head-dim", dim, range(16, 257, 16)) for dim in head_dim),
        *(("--kernel", name, tuple(KERNELS)) for name in kernel or ()),
        ("--dtype", dtype, ("bfloat16", "float16")),
    ):
        if value not in served:
            raise typer.BadParameter(f"{name}: expected one of {list(served)}, got {value!r}")
    if heads % kv_heads:
        raise typer.BadParameter(f"--kv-heads: expected a divisor of {heads}, got {kv_heads}")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out: there is no folder {out.parent}")
    missing = device.missing()
    if missing is not None:
        typer.echo(f"longrope tune: {missing}", err=True)
        raise typer.Exit(1)
    task = Task(
        tuple(sorted(set(head_dim))),
        tuple(name for name in KERNELS if not kernel or name in kernel),
        (False, True) if causal is None else (causal,),
        *(seq, heads, kv_heads),
        *(getattr(torch, dtype), budget),
    )
    machine = device.CudaMachine()
    outcomes = search.tune(task, machine, say=lambda line: typer.echo(line, err=True))
    if out is not None:
        table.write(out, table.report(task, machine, outcomes))
    typer.echo(table.source(outcomes, machine.arch), nl=False)


@app.command()
def report(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write into [reports/<device>/<date>/]; where it has a report, its name "
            "with -2, -3 and so on."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=1, help="Seconds for build, tests and benchmarks together.")
    ] = 420,
    tests: Annotated[
        bool, typer.Option("--tests/--no-tests", help="Run the tests before the benchmarks.")
    ] = True,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Compare two reports and run nothing."),
    ] = None,
) -> None:
    """Run the tests and benchmarks here, and write a report.

    The report is report.md, results.json and plots. It needs a checkout. Each function is checked
    before it is timed; the limits of the machine (a copy, a matrix product) are measured in the
    same run. When the budget ends, the least important rows are left out and named. Fails, once
    all is written, where a test or a benchmark failed. With --compare, print what changed between
    two reports.
    """
    from . import report as reports
    from .report.compare import compare as compared

    try:
        if compare is not None:
            typer.echo(compared(*compare))
            return
        _require("report", "pytest", "pytest_benchmark")
        chosen = ("tests",) if tests else None
        made = reports.make(out, budget, tests=chosen, benchmarks=("benchmarks",))
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"longrope report: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"\nwritten: {made.folder}/report.md")
    if made.failed:
        typer.echo(f"longrope report: {made.failed} failed, which the page lists", err=True)
        raise typer.Exit(1)


search_commands.register(app)


def _require(extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(
            f"longrope {extra} needs {', '.join(missing)}: pip install 'longrope-kernels[{extra}]'",
            err=True,
        )
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
