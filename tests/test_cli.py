"""The command line: what it prints, writes and refuses."""

import importlib.util
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from longrope_kernels import __version__, cli
from longrope_kernels.backends import choose as backends


def run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments)


def test_help_names_the_commands_and_explains_them():
    assert "info" in run("--help").stdout
    text = run("demo", "--help").stdout
    assert "--out" in text
    assert "error.png" in text


def test_info_prints_version_backends_and_the_choice():
    result = run("info")
    assert result.exit_code == 0
    assert f"longrope_kernels {__version__}" in result.stdout
    for name in backends.BACKENDS:
        assert f"\n  {name}" in result.stdout
    for function in ("apply_rotary", "decode"):
        assert f"\n  {function:<13} cpu   native > reference" in result.stdout


def test_info_names_the_assembler_that_triton_takes(monkeypatch):
    from triton import knobs

    tool = knobs.nvidia.ptxas
    assert f"triton's ptxas   {tool.version}, {tool.path}\n" in run("info").stdout
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else real(name)
    )
    assert "ptxas" not in run("info").stdout


def test_info_says_that_a_backend_makes_no_products(monkeypatch):
    row = {"name": "triton", "devices": ("cuda",), "missing": None, "missing_products": "too old"}
    monkeypatch.setattr(backends, "table", lambda: [row])
    assert "triton     cuda  ready for the rotation and append alone: too old" in run("info").stdout


def test_info_says_why_a_backend_is_missing(monkeypatch):
    row = {"name": "native", "devices": ("cpu",), "missing": "not built; run make"}
    row["missing_products"] = row["missing"]
    monkeypatch.setattr(backends, "table", lambda: [row])
    assert "native     cpu   missing: not built; run make" in run("info").stdout


def test_serve_check_without_vllm_is_one_line_naming_the_extra(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name)
    )
    result = run("serve-check", str(tmp_path))
    assert result.exit_code == 1
    expected = "longrope serve-check needs vllm: pip install 'longrope-kernels[vllm]'\n"
    assert result.stderr == expected


def test_demo_without_its_packages_is_one_line_naming_the_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    result = run("demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    expected = "longrope demo needs matplotlib: pip install 'longrope-kernels[demo]'\n"
    assert result.stderr == expected
    assert not (tmp_path / "out").exists()


def test_demo_into_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "out").touch()
    result = run("demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "Invalid value for '--out'" in result.stderr


@pytest.mark.parametrize("command", ["search", "readjust", "extend", "evaluate", "plot"])
def test_a_search_without_its_packages_is_one_line_naming_the_extra(monkeypatch, command):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    given = {"plot": [], "extend": ["--documents", "d", "--stage", "9"]}
    result = run(command, "m", *given.get(command, ["--documents", "d", "--length", "9"]))
    assert result.exit_code == 1
    assert result.stderr == (
        f"longrope {command}: needs tqdm: pip install 'longrope-kernels[search]'\n"
    )


def test_the_command_line_imports_no_optional_package():
    code = (
        "import sys, longrope_kernels.cli;"
        "assert not {'transformers', 'matplotlib', 'cmaes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_quick_demo_agrees_and_writes_its_files(tmp_path):
    result = run("demo", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "the same tokens with and without the kernels" in result.stdout
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((tmp_path / "results.json").read_text())
    logits = results["logits"]
    assert logits["float32_kernels"] < 1e-3
    assert logits["bfloat16_kernels"] <= 2 * logits["bfloat16_untouched"]
    rows = results["errors"]
    assert {"transformers", "reference"} <= {row["method"] for row in rows}
    for row in rows:
        if row["method"] != "transformers":
            assert row["angle_error"] < 1e-6, row
            assert row["float32_error"] < 1e-6, row
        elif row["position"] == 2**21 - 1:
            assert row["angle_error"] > 0.05, row
    variants = {row["variant"] for row in results["times"]["rows"]}
    assert {"transformers eager", "reference", "clone", "copy_"} <= variants


def test_a_variant_that_did_not_run_says_why(monkeypatch):
    import torch

    from longrope_kernels import Rope
    from longrope_kernels.demo.peers import TransformersRotary, phi3_config
    from longrope_kernels.demo.rotations import time_rotations
    from longrope_kernels.demo.run import time_cells

    def no_compiler(*_, **__):
        def fail(*_):
            raise RuntimeError("no compiler\nfar below")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    config = phi3_config("phi-3-mini-128k")
    rotary = TransformersRotary(config, torch.device("cpu"))
    q = torch.randn(1, 3, 2, 96)
    rows = time_rotations(Rope.from_config(config), rotary, q, torch.float32, 1e-4)
    (failed,) = (row for row in rows if "reason" in row)
    name = "transformers torch.compile"
    cells = [name, "float32", "not measured: no compiler", "", ""]
    assert list(time_cells(failed).values()) == cells
    assert time_cells(rows[0])["x eager"] == "1.0"
