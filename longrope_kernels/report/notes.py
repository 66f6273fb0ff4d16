"""What the page says beside its numbers: the machine, what failed, and what was not measured."""

from __future__ import annotations

from typing import Any

from .text import table


def machine_facts(machine: dict[str, Any]) -> list[str]:
    """The table of the header."""
    facts = {name: value for name, value in machine.items() if not isinstance(value, dict)}
    for name, value in machine.get("gpu", {}).items():
        facts[f"gpu {name}".replace("_", " ")] = value
    facts |= _clocks(machine.get("clocks", {}))
    return table(("fact", "value"), [(name, str(value)) for name, value in facts.items()])


def _clocks(clocks: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Each with its time: before, during (with the spread of all samples) and after the run."""
    facts = {}
    names = dict.fromkeys(name for of_a_time in clocks.values() for name in of_a_time)
    for name in names:
        for when in ("before", "after"):
            if name in clocks.get(when, {}):
                facts[f"gpu {name} {when} the run"] = clocks[when][name]
        if name in clocks.get("during", {}):
            seen = clocks["during"][name]
            facts[f"gpu {name} during the benchmarks"] = (
                f"{seen['min']:g} to {seen['max']:g} {seen['unit']}".rstrip()
                + f", median {seen['median']:g}, of {seen['samples']} samples"
            )
    return facts


def failures(report: dict[str, Any]) -> list[str]:
    """A section, or nothing where nothing failed."""
    lines = [f"- {name}: {reason}" for name, reason in report.get("failed", {}).items()]
    failed = len((report["tests"] or {}).get("failed", ()))
    if failed:
        lines.append(f"- {failed} {'test' if failed == 1 else 'tests'}, see Tests")
    return ["", "## Failed", "", *lines] if lines else []


def not_measured(report: dict[str, Any]) -> list[str]:
    """A section, or nothing: each reason once, and the groups that the budget dropped."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report["not_measured"].items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"- {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]
    dropped = report.get("dropped", {})
    if dropped:
        rows = sum(sum(groups.values()) for groups in dropped.values())
        lines.append(f"- Dropped by the budget, {_counted(rows, 'row')}:")
    for benchmark, groups in dropped.items():
        counts = f"{_counted(sum(groups.values()), 'row')} of {_counted(len(groups), 'group')}"
        lines.append(f"  - {benchmark}, {counts}: {'; '.join(groups)}")
    return ["", "## Not measured", "", *lines] if lines else []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
