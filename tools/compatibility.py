"""What the tests ran with: versions, processor and results of an environment.

    python tools/compatibility.py names             what pyproject.toml asks for, without bounds
    python tools/compatibility.py compare LOCK XML  locked and newest versions, and what failed
    python tools/compatibility.py record NAME XML   a row of reports/compatibility.json

Each is run by the Python of the environment it speaks of; XML is what pytest's --junitxml wrote.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "reports" / "compatibility.json"
PACKAGES = ("torch", "triton", "transformers", "numpy")
# The instruction sets that the native backend chooses by.
CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512"}


def names() -> list[str]:
    """What the package and its extras ask for, without bounds; what tests ask for, with them."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    ours = project["project"]
    lists = [ours["dependencies"], *ours["optional-dependencies"].values()]
    asked = [Requirement(line) for lines in lists for line in lines]
    here = (r.name for r in asked if r.marker is None or r.marker.evaluate())
    found = {name for name in here if name != ours["name"]}
    groups = project["dependency-groups"]
    bounded = [r for r in groups["build"] + groups["test"] if isinstance(r, str)]
    return sorted({*found, *bounded})


def locked(path: Path) -> dict[str, str]:
    """Package to version, of the lines of a lock that hold for this Python and system."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    pins = [Requirement(line) for line in lines if line]
    return {
        pin.name: str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def results(xml: Path) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that did not."""
    passed, bad = 0, []
    for case in ElementTree.parse(xml).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            bad.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" not in outcomes:
            passed += 1
    return passed, bad


def compare(lock: Path, xml: Path) -> int:
    """One line a package, one a failed test, one for all. Returns the exit status."""
    pins = locked(lock)
    found = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    width = max(map(len, pins))
    print(f"{'package':{width}}  {'locked':16}  newest")
    for name in sorted(pins.keys() & found.keys()):
        mark = "" if pins[name] == found[name].partition("+")[0] else "  *"
        print(f"{name:{width}}  {pins[name]:16}  {found[name]}{mark}")
    passed, bad = results(xml)
    for test in bad:
        print(f"FAILED {test}")
    print(f"{passed} passed, {len(bad)} failed with the newest (* is not the locked one)")
    return 1 if bad or not passed else 0


def cpu() -> str:
    """The processor's name, and which code of the native backend it takes."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        for field in ("model name", "flags"):
            found = re.search(rf"^{field}\s*: (.*)", text, re.MULTILINE)
            if found and field == "flags":
                flags = found[1]
            elif found:
                name = found[1]
    widest = [shown for flag, shown in CPU_FLAGS.items() if flag in flags.split()][-1:]
    return ", ".join([name, *widest])


def row(environment: str, xml: Path) -> dict[str, Any]:
    passed, bad = results(xml)
    suite = next(ElementTree.parse(xml).iter("testsuite"))
    return {
        "environment": environment,
        "date": suite.get("timestamp", "")[:10],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        **{package: version(package) for package in PACKAGES},
        "passed": passed,
        "failed": len(bad),
    }


def record(environment: str, xml: Path) -> None:
    """Put the row in place of one of the same environment, Python and processor, or after all."""
    new = row(environment, xml)
    rows = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else []
    same = ("environment", "python", "system", "cpu")
    kept = [old for old in rows if any(old[name] != new[name] for name in same)]
    RECORD.write_text(json.dumps([*kept, new], indent=2) + "\n", "utf-8")


def main(command: str, *args: str) -> int:
    if command == "names":
        print(*names(), sep="\n")
    elif command == "compare":
        return compare(*map(Path, args))
    elif command == "record":
        record(args[0], Path(args[1]))
    else:
        raise SystemExit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
