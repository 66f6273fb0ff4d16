"""Contacts of longrope_kernels.backends.triton.private: with one of these Triton starts all itself.

test_launches.py runs this, as launches.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from launching import LENGTHS, STARTED, decode_one, rotate
from stand_in_driver import Driver, driver_of
from triton import knobs

from longrope_kernels.backends.triton import launch as launches
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


def test_what_is_ready_starts_on_its_own_device(
    monkeypatch: pytest.MonkeyPatch, by_triton: list[str]
) -> None:
    for _ in range(3):
        rotate(**LENGTHS)
    assert len(by_triton) == 1
    own, current = Driver.get_current_device(driver_of(90, 132)), [-2]
    monkeypatch.setattr(Driver, "get_current_device", lambda self: current[0])
    rotate(**LENGTHS)  # on tensors of that device, were they not those of the CPU
    assert len(by_triton) == 2

    @contextlib.contextmanager
    def of_tensor(x: torch.Tensor) -> Iterator[None]:
        before, current[0] = current[0], own
        yield
        current[0] = before

    monkeypatch.setattr(launches, "on_device", of_tensor)
    rotate(**LENGTHS)
    assert len(by_triton) == 2
    assert current == [-2]
    assert len(STARTED) == 5


def test_a_stream_is_asked_for_at_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate(**LENGTHS)
    monkeypatch.setattr(Driver, "get_current_stream", lambda self, device: 5)
    with pytest.raises(AssertionError):  # of `start`, which expects stream 0
        rotate(**LENGTHS)
