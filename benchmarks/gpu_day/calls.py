"""What is done in each of the three calls, in order, and what a budget drops first."""

from __future__ import annotations

from .profiled import KERNELS
from .schedule import Step

SANITIZER = "compute-sanitizer"
TUNED = ("decode", "forward", "rotary", "backward")


def calls(small: bool) -> dict[int, list[Step]]:
    """The steps of each call.

    Args:
        small: a rehearsal without a GPU: a few of everything, at sizes for the interpreter.
    """
    return {1: first(small), 2: second(small), 3: third(small)}


def first(small: bool) -> list[Step]:
    """Does it run, is it right, how fast is it?

    What is compiled for the canaries serves later steps too. Correctness comes before speed but for
    the headlines, which one must have.
    """
    few = ("--only", "rotary", "decode graph", "--at-once", "2") if small else ()
    many = few or ("--at-once", "12")
    rows = ("--rows", "none") if small else ()
    tests = ("tests/test_triton_decode.py", "-k", "wave or once") if small else ()
    return [
        Step("facts", 9, 10, 30, _of("measured", "facts")),
        Step("build", 8, 40 if small else 60, 200, _of("measured", "build")),
        Step("canaries", 9, 80, 200, _of("canaries", *few)),
        Step("headlines", 7, 60, 90, _of("measured", "rows", *rows)),
        Step("device tests", 6, 60, 150, _of("measured", "tests", *tests)),
        Step("memcheck", 5, 60, 110, _of("canaries", "--tool", "memcheck", *many), SANITIZER),
        Step("compile", 3, 40, 90, _of("compiles", "--count", "2" if small else "80")),
        Step("racecheck", 2, 40, 80, _of("canaries", "--tool", "racecheck", *many), SANITIZER),
    ]


def second(small: bool) -> list[Step]:
    """The report; the tests ran in the first call. Every minute more measures more rows."""
    least = 120 if small else 200
    return [
        Step("facts", 8, 10, 30, _of("measured", "facts")),
        Step("build", 8, 10 if small else 60, 200, _of("measured", "build")),
        Step(
            *("report", 9, least, least if small else 500, _of("measured", "report")),
            files={f"report/{name}": name for name in ("report.md", "results.json")},
        ),
    ]


def third(small: bool) -> list[Step]:
    """What could be faster, and why it is as fast as it is."""
    tiny = ("--small",) if small else ()
    profiles = [
        Step(
            f"profile {name}",
            8 - i,
            25,
            60,
            ("-m", "benchmarks.gpu_day.profiled", name, *tiny),
            "ncu",
            # Its clock control would change the card's clocks.
            ("ncu", "--clock-control", "none", "--set", "full", "--kernel-name", kernel, "-c", "3"),
        )
        for i, (name, kernel) in enumerate(KERNELS.items())
    ]
    tunings = [_tune(kernel, 5 - i, small) for i, kernel in enumerate(TUNED)]
    rows = ("--rows", "none") if small else ()
    return [
        Step("facts", 9, 10, 30, _of("measured", "facts")),
        Step("build", 9, 10 if small else 60, 200, _of("measured", "build")),
        *profiles,
        Step("generate", 7, 30, 80, _of("generate")),
        Step("ptxas", 6, 50, 100, _of("measured", "ptxas", *rows)),
        *tunings,
    ]


def _tune(kernel: str, importance: int, small: bool) -> Step:
    sizes = ("--head-dim", "128", "64", "96")
    if small:
        sizes = ("--head-dim", "16", "--seq", "32")
    budget = "5" if small else "{seconds}"
    command = ("-m", "benchmarks.tune", "--kernel", kernel, *sizes, "--budget", budget)
    return Step(f"tune {kernel}", importance, 30 if small else 60, 90, command)


def _of(module: str, *arguments: str) -> tuple[str, ...]:
    where = ("--into", "{into}", "--seconds", "{seconds}")
    program = f"benchmarks.gpu_day.{module}"
    # Positional words first; what argparse leaves over goes to pytest.
    split = 1 if module == "measured" else 0
    return ("-m", program, *arguments[:split], *where, *arguments[split:])
