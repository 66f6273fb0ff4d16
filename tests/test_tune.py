"""benchmarks/tune.py in the interpreter: small calls, two candidates for each kernel."""

from __future__ import annotations

import ast
from typing import Any

import benchmark_modules  # noqa: F401  which finds them
import pytest
import torch

from benchmarks import tune
from longrope_kernels.kernels import attention
from longrope_kernels.kernels.attention_backward import Configs
from longrope_kernels.kernels.attention_tiles import Config
from longrope_kernels.kernels.decode import Config as DecodeConfig
from longrope_kernels.kernels.rotary import Tile

pytestmark = pytest.mark.skipif(not tune.INTERPRETED, reason="tables of the interpreter")
SHAPE = ("--seq", "20", "--head-dim", "16")
CANDIDATES = {
    "forward": (Config(16, 16, 4, 1), Config(16, 32, 4, 1)),
    "backward": (Config(16, 16, 4, 1), Config(32, 16, 4, 1)),
    "decode": (DecodeConfig(16, 32, 4, 1, 1), DecodeConfig(16, 16, 4, 1, 2)),
    "rotary": (Tile(4, 1, 4), Tile(8, 2, 4)),
}


def configs_in(launch: Any) -> tuple[int, ...]:
    constants = launch.constants
    return tuple(constants.get(name, 0) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_T", "BLOCK_H"))


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], float]:
    """Seconds of launches by their tiles, 1 for others; each kernel has two candidates."""
    times: dict[tuple[int, ...], float] = {}
    for name, (module, _) in tune.KERNELS.items():
        monkeypatch.setattr(module, "CANDIDATES", CANDIDATES[name])
    monkeypatch.setattr(tune, "seconds", lambda x: times.get(configs_in(x), 1.0))
    return times


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[int, Any]]:
    """The tables that the script prints, as Python reads them."""
    tune.main([*SHAPE, *arguments])
    names = {"Config": Config, "Configs": Configs, "Tile": Tile}
    tables = []
    for part in capsys.readouterr().out.split("# ")[1:]:
        file, _, text = part.partition("\n")
        ast.parse(text)
        config = DecodeConfig if file == "decode.py" else Config
        scope: dict[str, Any] = {**names, "Config": config, "CONFIGS": {}}
        exec(text, scope)
        tables.append(scope["CONFIGS"][0])
    return tables


def test_the_fastest_candidate_of_each_kernel_is_printed(
    takes: dict[tuple[int, ...], float], capsys: pytest.CaptureFixture[str]
) -> None:
    takes |= {(16, 16, 0, 0): 0.5, (16, 32, 0, 0): 0.25, (0, 0, 8, 2): 0.5}
    forward, backward, decode, rotary = printed(capsys)
    assert forward[16] == (Config(16, 32, 4, 1),) * 3
    # dk and dv by themselves take as long together as in one kernel that is twice as fast.
    assert backward[16] == Configs(Config(16, 16, 4, 1), None, Config(16, 16, 4, 1))
    assert decode[16] == (DecodeConfig(16, 32, 4, 1, 1),) * 2
    assert rotary[16] == Tile(8, 2, 4)
    assert 256 in forward  # what was not tuned stands as it is


def test_less_than_one_percent_is_no_gain(
    takes: dict[tuple[int, ...], float], capsys: pytest.CaptureFixture[str]
) -> None:
    takes |= {(16, 16, 0, 0): 0.995}
    (forward,) = printed(capsys, "--kernel", "forward")
    assert forward[16] == attention.CONFIGS[0][256]  # as it stood


def test_a_candidate_that_computes_something_else_is_told_and_not_timed(
    takes: dict[tuple[int, ...], float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    takes |= {(16, 16, 0, 0): 0.1, (16, 32, 0, 0): 0.5}
    run = tune.run

    def broken(launch: Any) -> None:
        run(launch)
        if configs_in(launch)[:2] == (16, 16):
            launch.args[3][0][0, -1] *= 1.5

    monkeypatch.setattr(tune, "run", broken)
    tune.main([*SHAPE, "--kernel", "forward"])
    told = capsys.readouterr()
    assert (
        "Config(block_m=16, block_n=16, warps=4, stages=1, joined=False): wrong result" in told.err
    )
    assert "16: (Config(block_m=16, block_n=32," in told.out


def test_what_does_not_compile_is_left_out(
    takes: dict[tuple[int, ...], float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "CANDIDATES", (Config(24, 16, 4, 1),))
    (forward,) = printed(capsys, "--kernel", "forward")
    assert forward[16] == attention.CONFIGS[0][256]  # as it stood


def test_the_present_entry_stands_where_time_is_over(
    takes: dict[tuple[int, ...], float], capsys: pytest.CaptureFixture[str]
) -> None:
    takes |= {(16, 16, 0, 0): 0.1}
    (forward,) = printed(capsys, "--kernel", "forward", "--budget", "0")
    assert forward[16] == attention.CONFIGS[0][256]  # as it stood


def test_difference_sees_one_wrong_row_and_nan() -> None:
    x = torch.randn(1, 40, 2, 16).bfloat16()
    assert tune.difference(x, x) == 0
    y = x.clone()
    y[0, 7, 1] *= 1.1
    assert tune.difference(y, x) > 1
    y[0, 7, 1, 0] = torch.nan
    assert not tune.difference(y, x) <= 1
