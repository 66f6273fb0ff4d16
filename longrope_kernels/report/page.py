"""report.md: the page people read."""

from __future__ import annotations

from typing import Any

from . import notes
from .results import CEILINGS, Row, groups
from .text import significant, table


def render(report: dict[str, Any], rows: list[Row], plots: list[str]) -> str:
    """The page as Markdown; ``plots`` are file names beside it."""
    machine = report["machine"]
    where = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    lines = [f"# longrope_kernels on {where}", "", f"{report['date']}. All numbers are of one run."]
    lines += ["", "## Machine", "", *notes.machine_facts(machine), *_times(report)]
    lines += notes.failures(report)
    by_group = groups(rows)
    ceilings = by_group.pop(CEILINGS, [])
    if ceilings:
        lines += ["", "## Ceilings", "", "What this machine reached in the same run:", ""]
        lines += [f"- {row.name}: {_speed(row)}" for row in ceilings]
    if by_group:
        lines += [
            "",
            "## Measurements",
            "",
            "Medians in microseconds, with the times at 20 and 80 % of the rounds. GB/s and TFLOP/s"
            ' count what the work needs, not what an implementation moves. "of copy", "of matmul":'
            ' of the ceilings above. "of limit": of what bounds the work ("limit"), timed in turns'
            ' with the row: that matrix product, or the same tensors copied ("clone": into fresh'
            ' memory; "read": read alone). The rows of a group are timed in turns too, a round of'
            ' each. "peak MB": memory that a call takes beyond its inputs. "time / rotated": over'
            " that of the same kernel on keys that were rotated before.",
        ]
    for group, members in by_group.items():
        lines += ["", f"### {group}", "", *_group(members)]
    lines += [f"\n![{name.removesuffix('.png')}]({name})" for name in plots]
    lines += notes.not_measured(report)
    lines += ["", "## Tests", "", *_tests(report["tests"])]
    return "\n".join(lines) + "\n"


def _times(report: dict[str, Any]) -> list[str]:
    if "build" not in report:
        return []
    built, seconds = report["build"]["seconds"], report["seconds"]
    lines = ["", f"This took {seconds:.0f} s, of which {built:.0f} s to build what was not built."]
    if report["build"]["failed"]:
        lines += ["", f"The compiled backends could not be built: {report['build']['failed']}."]
    return lines


def _group(rows: list[Row]) -> list[str]:
    columns = ["name", "us", "p20", "p80", "GB/s", "of copy", "TFLOP/s", "of matmul"]
    columns += ["of limit", "limit", "peak MB", "time / rotated", f"x {rows[0].name}"]
    cells = []
    for row in rows:
        info = row.info
        cells.append(
            (
                row.name,
                *(f"{1e6 * time:.1f}" for time in (row.median, row.p20, row.p80)),
                _significant(info.get("gb_per_s")),
                _number(info.get("of_copy"), ".2f"),
                _significant(info.get("tflop_per_s")),
                _number(info.get("of_matmul"), ".2f"),
                _number(limit_fraction(row), ".2f"),
                info.get("ceiling", "-"),
                _number(_peak_megabytes(row), ".1f"),
                _number(info.get("time_over_rotated_keys"), ".3f"),
                f"{rows[0].median / row.median:.2f}",
            )
        )
    # Columns that say nothing in this group are left out.
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in cells)]
    return table([columns[i] for i in kept], [[row[i] for i in kept] for row in cells])


def limit_fraction(row: Row) -> float | None:
    """The row's speed over that of the copy, or of the matrix product where that bounds it."""
    fraction = row.info.get("matmul_fraction", row.info.get("copy_fraction"))
    return None if fraction is None else float(fraction)


def _peak_megabytes(row: Row) -> float | None:
    peak = row.info.get("peak_bytes")
    return None if peak is None else 1e-6 * float(peak)


def _speed(row: Row) -> str:
    speeds = [("tflop_per_s", "TFLOP/s"), ("gb_per_s", "GB/s")]
    known = [(row.info[key], unit) for key, unit in speeds if row.info.get(key)]
    return ", ".join(f"{significant(speed)} {unit}" for speed, unit in known)


def _significant(value: float | None) -> str:
    return "-" if value is None else significant(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _tests(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return ["Not run."]
    counts = ", ".join(f"{len(tests[kind])} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [f"{counts}{'' if tests['complete'] else '; cut short by the budget'}."]
    for kind in ("failed", "skipped"):
        lines += [f"- {kind}: `{name}`: {tests['reasons'].get(name, '')}" for name in tests[kind]]
    listed = "\n".join(tests["passed"])
    return [
        *lines,
        "",
        "<details><summary>Tests that passed</summary>",
        "",
        "```text",
        listed,
        "```",
        "",
        "</details>",
    ]
