"""Contacts of longrope_kernels.backends.triton.private: with one of these Triton starts all itself.

test_launches.py runs this, as launches.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton
from launching import LENGTHS, STARTED, decode_one, rotate
from stand_in_driver import Driver
from triton import knobs

from longrope_kernels.backends.triton import private
from longrope_kernels.kernels import decode as decode_kernels
from longrope_kernels.kernels import rotary as rotary_kernels


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str], name: str
) -> None:
    rotate(**LENGTHS)
    with monkeypatch.context() as patch:
        hook = getattr(knobs.runtime, name)
        patch.setattr(hook, "calls", [lambda metadata: None])
        rotate(**LENGTHS)
    assert len(by_triton) == 2
    rotate(**LENGTHS)
    assert len(by_triton) == 2


def test_hooks_of_a_kernel_are_called(by_triton: list[str]) -> None:
    seen: list[Any] = []
    kernel = rotary_kernels.rotary_kernel
    rotate(**LENGTHS)
    kernel.add_pre_run_hook(lambda *args, **named: seen.append(args))
    try:
        rotate(**LENGTHS)
    finally:
        kernel.pre_run_hooks.clear()
    assert len(seen) == 1
    assert len(by_triton) == 2


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "consan"),
        (rotary_kernels.rotary_kernel, "debug", True),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_compiles_otherwise_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str], where: Any, name: str, value: Any
) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(where, name, value)
    rotate(**LENGTHS)
    assert len(by_triton) == 2
    assert STARTED[1][0] is not STARTED[0][0]


def test_a_stage_that_somebody_adds_is_asked(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"))
    rotate(**LENGTHS)
    assert len(by_triton) == 2


def test_a_global_that_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_one()
    monkeypatch.setitem(decode_kernels.decode_kernel.__globals__, "LN2", None)
    with pytest.raises(RuntimeError, match="LN2 has changed"):
        decode_one()


def test_other_releases_start_all_themselves(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    monkeypatch.setattr(private, "USED", False)
    for _ in range(3):
        rotate(**LENGTHS)
    assert len(by_triton) == 3


def test_this_release_was_tried() -> None:
    assert private.USED, f"Triton {triton.__version__} is none of {private.TRIED}"


def test_another_device_is_another_kernel(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(Driver, "get_current_device", lambda self: -2)
    rotate(**LENGTHS)
    assert len(by_triton) == 2


def test_a_stream_is_asked_for_at_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(Driver, "get_current_stream", lambda self, device: 5)
    with pytest.raises(AssertionError):  # of `start`, which expects stream 0
        rotate(**LENGTHS)
