"""reports/modelled/: made by tools/modelled.py, right by hand, and never taken for measured."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import figures
import pytest

from longrope_kernels.report import results
from longrope_kernels.report.compare import compare

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "reports" / "modelled").glob("*.md"))
UNKNOWN = "No GPU has been measured: the error is unknown."


@pytest.fixture(scope="module")
def modelled() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modelled", ROOT / "tools" / "modelled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modelled"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(modelled: ModuleType) -> None:
    assert [page.stem for page in PAGES] == sorted(d.name.lower() for d in modelled.SHOWN)
    for device in modelled.SHOWN:
        page = modelled.PAGES / f"{device.name.lower()}.md"
        assert page.read_text("utf-8") == modelled.page(device), "tools/modelled.py --write"


def test_peaks_agree_with_one_another(modelled: ModuleType) -> None:
    """The peak of the matrix units is what they do in a cycle, all of them, at the clock."""
    for device in modelled.DEVICES:
        a_cycle = {80: 2048, 90: 4096}[device.arch]
        assert device.matrix == pytest.approx(
            device.multiprocessors * a_cycle * device.clock, rel=1e-3
        )


def call(modelled: ModuleType, arch: int, group: str, name: str) -> Any:
    (found,) = (c for c in modelled.calls(arch) if (c.group, c.name) == (group, name))
    return found


def test_the_rotation_by_hand(modelled: ModuleType) -> None:
    of = call(modelled, 90, "forward, S = 8192, bfloat16", "triton")
    # 40 heads of 128 dimensions of 2 bytes, read and written.
    assert of.seconds(modelled.H100) == 8192 * 40 * 128 * 2 * 2 / 3.35e12
    (launch,) = of.launches
    # Tiles of 16 tokens and 4 heads, so 512 times 10 of them, 4 warps each.
    assert launch.instructions == 512 * 10 * 4 * int(launch.counts["instructions"])


@pytest.mark.parametrize("kernel", ["prepass", "registers", "dq", "dk", "dv"])
def test_flops_are_those_of_the_matrix_instructions(modelled: ModuleType, kernel: str) -> None:
    """On sm_80 each does 4096 FLOP: the loop that was counted is that of one tile."""
    counts = modelled.find("attention", sm=80, kernel=kernel, head_dim=128, variant="")
    block_m, block_n = modelled.tile_of(counts)
    of_tile = int(counts["tile matrix"]) * int(counts["warps"]) * 4096
    assert of_tile == modelled.PRODUCTS[kernel] * 2 * block_m * block_n * 128


@pytest.mark.parametrize(("tokens", "m", "n"), [(512, 128, 64), (512, 64, 128), (384, 128, 128)])
def test_tiles_are_those_with_a_score_that_counts(
    modelled: ModuleType, tokens: int, m: int, n: int
) -> None:
    visible = {(i // m, j // n) for i in range(tokens) for j in range(i + 1)}
    for by_keys in (False, True):
        assert modelled.tiles(tokens, m, n, True, by_keys) == len(visible)
        assert modelled.tiles(tokens, m, n, False, by_keys) == (tokens // m) * (tokens // n)


def test_a_launch_takes_as_long_as_its_slowest_unit(modelled: ModuleType) -> None:
    device, work = modelled.A100, modelled.Work
    memory, matrix = work("a", int(2.039e12)), work("b", 0, int(2 * 312e12))
    both = work("c", int(2.039e12), int(2 * 312e12))
    issue = work("d", 0, 0, int(3 * 108 * 4 * 1.41e9))
    special = work("e", 0, 0, 0, int(4 * 108 * 16 * 1.41e9))

    def seconds(*launches: Any) -> tuple[float, float]:
        of = modelled.Call("w", "g", "n", launches)
        return of.seconds(device), of.apart(device)

    assert seconds(memory) == pytest.approx((1, 1))
    assert seconds(matrix, memory) == pytest.approx((3, 3))
    assert seconds(both) == pytest.approx((2, 3))
    assert seconds(issue) == pytest.approx((3, 3))
    assert seconds(special) == pytest.approx((4, 4))


def test_calls_are_rows_of_the_benchmarks(
    modelled: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or no report could ever tell the error of the model."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attentions
    import decodes
    import torch

    groups = {
        f"attention {direction}, {attentions.Shape(*prompt)}"
        for prompt in modelled.PROMPTS
        for direction in ("forward", "backward")
    }
    groups |= {f"decode, {decodes.Shape(lengths, torch.bfloat16)}" for lengths in modelled.BATCHES}
    for kind in ("forward", "in place", "backward"):
        groups |= {f"{kind}, S = 4096, {dtype}" for dtype in ("float32", "bfloat16")}
        groups.add(f"{kind}, S = 8192, bfloat16")
    assert {c.group for c in modelled.calls(90)} == groups
    names = {"triton", *attentions.NAMES, *decodes.NAMES}
    assert {c.name for c in modelled.calls(90)} <= names


def save(reports: Path, gpu: dict[str, Any] | None, *rows: results.Row) -> None:
    folder = reports / "some-machine" / "2026-01-02"
    folder.mkdir(parents=True)
    machine = {"cpu": "a processor"} if gpu is None else {"cpu": "a processor", "gpu": gpu}
    results.save(folder / "results.json", {"machine": machine}, list(rows))


@pytest.mark.parametrize("gpu", [None, {"name": "NVIDIA T4"}])
def test_without_a_gpu_that_it_knows_the_error_is_unknown(
    modelled: ModuleType, tmp_path: Path, gpu: dict[str, Any] | None
) -> None:
    row = results.Row("forward, S = 8192, bfloat16", "triton", 1e-4, 1e-4, 1e-4, 5, {})
    save(tmp_path, gpu, row)
    assert UNKNOWN in modelled.page(modelled.H100, tmp_path)


def test_the_error_is_told_as_soon_as_there_is_a_report(
    modelled: ModuleType, tmp_path: Path
) -> None:
    of = call(modelled, 90, "forward, S = 8192, bfloat16", "triton")
    seconds = 1.25 * of.seconds(modelled.H200)
    row = results.Row(of.group, of.name, seconds, seconds, seconds, 5, {})
    other = results.Row(of.group, "clone", 1.0, 1.0, 1.0, 5, {})
    save(tmp_path, {"name": "NVIDIA H200"}, row, other)
    text = modelled.page(modelled.A100, tmp_path)
    assert UNKNOWN not in text
    assert "| some-machine/2026-01-02 | rotation | 1 | 1.25 | 1.25 | 1.25 |" in text


def test_compare_takes_no_modelled_page() -> None:
    for path in (ROOT / "reports" / "modelled", *PAGES):
        with pytest.raises(ValueError, match=r"found none|expected a results\.json"):
            compare(path, path)


def test_figures_take_no_modelled_page() -> None:
    for page in PAGES:
        with pytest.raises(ValueError, match="modelled"):
            figures.read(page.relative_to(ROOT).as_posix())


def modelled_times(text: str) -> set[str]:
    """The cells of the columns of times, of all tables of a page; short ones say nothing."""
    times: set[str] = set()
    columns: list[int] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = [i for i, cell in enumerate(cells) if cell.endswith(", us")]
        else:
            times |= {cells[i] for i in columns if len(cells[i]) > 4}
    return times


def test_no_other_page_shows_a_modelled_time() -> None:
    times = {time for page in PAGES for time in modelled_times(page.read_text("utf-8"))}
    assert len(times) > 200
    for page in figures.pages():
        text = page.read_text("utf-8")
        assert not times & set(re.findall(r"\d+\.\d+", text)), page
    assert "modelled" not in (ROOT / "README.md").read_text("utf-8").lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_it_is(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "modelled, not measured" in text.splitlines()[0]
    assert "throughput" not in text.lower()
