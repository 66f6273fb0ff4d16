"""report.md: the page people read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .results import CEILINGS, Row, groups

HOW = (
    "Medians in microseconds, with the times at 20 and 80 % of the rounds. GB/s and TFLOP/s count"
    ' what the work needs, not what an implementation moves. "of copy", "of matmul": of the'
    ' ceilings above. "of limit": of what bounds the work ("limit"), timed in turns with the row:'
    ' that matrix product, or the same tensors copied ("clone": into fresh memory; "read": read'
    " alone). The rows of a group are timed in turns too, a round of each."
    ' "kernel": the one of torch that takes longest, by its profiler. "peak MB": memory that'
    ' a call takes beyond its inputs. "time / rotated": over that of the same kernel on keys that'
    " were rotated before."
)


def render(report: dict[str, Any], rows: list[Row]) -> str:
    """The page as Markdown."""
    machine, by_group = report["machine"], groups(rows)
    ceilings = by_group.pop(CEILINGS, [])
    where = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    parts = {
        "Machine": [*_machine(machine), *_times(report)],
        "Failed": _failed(report),
        "Ceilings": [f"- {row.name}: {_speed(row)}" for row in ceilings],
        "Measurements": [HOW] if by_group else [],
    }
    for group, members in by_group.items():
        parts["Measurements"] += ["", f"### {group}", "", *_group(members)]
    parts |= {"Not measured": _not_measured(report), "Tests": _tests(report["tests"])}
    lines = [f"# longrope_kernels on {where}", "", f"{report['date']}. All numbers are of one run."]
    for title, part in parts.items():
        lines += ["", f"## {title}", "", *part] if part else []
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table that also reads well as text; numbers to the right."""
    head, *rows = ([cell.replace("|", "/") for cell in cells] for cells in (head, *rows))
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(x[:1] in "+-0123456789" for x in column[1:]) for column in columns]
    lines = []
    for cells in (head, *rows):
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    rules = ("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    lines.insert(1, f"| {' | '.join(rules)} |")
    return lines


def _machine(machine: dict[str, Any]) -> list[str]:
    facts = {name: value for name, value in machine.items() if not isinstance(value, dict)}
    facts |= {f"gpu {name}".replace("_", " "): x for name, x in machine.get("gpu", {}).items()}
    for name, seen in machine.get("clocks", {}).items():
        facts[f"gpu {name} during the benchmarks"] = (
            f"{seen['min']:g} to {seen['max']:g} {seen['unit']}".rstrip()
            + f", median {seen['median']:g}, of {seen['samples']} samples"
        )
    return table(("fact", "value"), [(name, str(value)) for name, value in facts.items()])


def _times(report: dict[str, Any]) -> list[str]:
    if "build" not in report:
        return []
    built, seconds = report["build"]["seconds"], report["seconds"]
    lines = ["", f"This took {seconds:.0f} s, of which {built:.0f} s to build what was not built."]
    if report["build"]["failed"]:
        lines += ["", f"The compiled backends could not be built: {report['build']['failed']}."]
    return lines


def _failed(report: dict[str, Any]) -> list[str]:
    lines = [f"- {name}: {reason}" for name, reason in report.get("failed", {}).items()]
    failed = len((report["tests"] or {}).get("failed", ()))
    return [*lines, f"- {_counted(failed, 'test')}, see Tests"] if failed else lines


def _group(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        info = row.info
        fraction = info.get("matmul_fraction", info.get("copy_fraction"))
        peak = info.get("peak_bytes")
        lines.append(
            {
                "name": row.name,
                "us": f"{1e6 * row.median:.1f}",
                "p20": f"{1e6 * row.p20:.1f}",
                "p80": f"{1e6 * row.p80:.1f}",
                "GB/s": _significant(info.get("gb_per_s")),
                "of copy": _number(info.get("of_copy"), ".2f"),
                "TFLOP/s": _significant(info.get("tflop_per_s")),
                "of matmul": _number(info.get("of_matmul"), ".2f"),
                "of limit": _number(fraction, ".2f"),
                "limit": info.get("ceiling", "-"),
                "peak MB": _number(None if peak is None else 1e-6 * peak, ".1f"),
                "time / rotated": _number(info.get("time_over_rotated_keys"), ".3f"),
                "kernel": (info.get("kernel") or "-")[:60],
                f"x {rows[0].name}": f"{rows[0].median / row.median:.2f}",
            }
        )
    # Columns that say nothing in this group are left out.
    kept = [name for name in lines[0] if any(line[name] != "-" for line in lines)]
    return table(kept, [[line[name] for name in kept] for line in lines])


def _not_measured(report: dict[str, Any]) -> list[str]:
    """Each reason once, and the groups that the budget dropped."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report["not_measured"].items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"- {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]
    dropped = report.get("dropped", {})
    if dropped:
        rows = sum(sum(groups.values()) for groups in dropped.values())
        lines.append(f"- Dropped by the budget, {_counted(rows, 'row')}:")
    for benchmark, of_groups in dropped.items():
        of_rows, total = _counted(sum(of_groups.values()), "row"), _counted(len(of_groups), "group")
        lines.append(f"  - {benchmark}, {of_rows} of {total}: {'; '.join(of_groups)}")
    return lines


def _tests(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return ["Not run."]
    counts = ", ".join(f"{len(tests[kind])} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [f"{counts}{'' if tests['complete'] else '; cut short by the budget'}."]
    for kind in ("failed", "skipped"):
        lines += [f"- {kind}: `{name}`: {tests['reasons'].get(name, '')}" for name in tests[kind]]
    lines += ["", "<details><summary>Tests that passed</summary>", ""]
    return [*lines, "```text", *tests["passed"], "```", "", "</details>"]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _speed(row: Row) -> str:
    speeds = [("tflop_per_s", "TFLOP/s"), ("gb_per_s", "GB/s")]
    known = [(row.info[key], unit) for key, unit in speeds if row.info.get(key)]
    return ", ".join(f"{_significant(speed)} {unit}" for speed, unit in known)


def _significant(value: float | None) -> str:
    """Three digits at least; 0.0612, 1.5, 4213."""
    return _number(value, ".3g" if value is None or abs(value) < 100 else ".0f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
