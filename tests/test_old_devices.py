"""What kernels cannot serve: GPUs before compute capability 8.0, ROCm's, Apple's and Intel's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longrope_kernels import Rope
from longrope_kernels import decode as decode_op
from longrope_kernels.backends import choose
from longrope_kernels.kernels import attention, attention_backward, decode
from longrope_kernels.ops import append

BF16 = torch.bfloat16
NEEDS = "needs compute capability 8.0 or more, and Tesla T4 has 7.5"


@pytest.fixture(autouse=True)
def _device_of(monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[None]:
    """A process with one GPU of the capability and kind that the test names."""
    capability, hip = request.param
    for variable in ("TRITON_INTERPRET", "LONGROPE_CUDA_EMULATE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(choose.part("cuda", "device"), "missing", lambda: None)
    kept = choose.missing, choose._device_lacks
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def appends(monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that writes new keys and values there."""
    monkeypatch.setattr(append, "device_type", lambda x: "cuda")
    new = torch.empty(1, 1, 1, 16, dtype=BF16, device="meta")
    return append._choose(None, new, new)


old = pytest.mark.parametrize("_device_of", [((7, 5), None)], indirect=True)
new = pytest.mark.parametrize("_device_of", [((8, 0), None)], indirect=True)
rocm = pytest.mark.parametrize("_device_of", [((9, 4), "7.1.0")], indirect=True)


@old
def test_triton_rotates_and_appends_on_an_old_device_and_does_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose.choose_rotary(None, "cuda", False) == "triton"
    assert appends(monkeypatch) == "triton"
    assert choose.choose_rotary("triton", "cuda", False) == "triton"
    assert choose.choose_attention(None, "cuda", BF16, 64, "masked") == "composed"
    assert choose.choose_attention(None, "cuda", BF16, 64, "scored") == "reference"
    assert choose.choose_decode(None, "cuda", BF16, BF16, 64) == "reference"
    with pytest.raises(RuntimeError, match=f"'triton' .*{NEEDS}; expected 'composed' or 'ref"):
        choose.choose_attention("triton", "cuda", BF16, 64, "plain")
    with pytest.raises(RuntimeError, match=f"'triton' .*{NEEDS}; expected 'reference'"):
        choose.choose_decode("triton", "cuda", BF16, BF16, 64)


@old
def test_cuda_is_compiled_for_later_ones() -> None:
    with pytest.raises(RuntimeError, match=f"'cuda' .*{NEEDS}"):
        choose.choose_rotary("cuda", "cuda", False)
    with pytest.raises(RuntimeError, match=f"'cuda' .*{NEEDS}"):
        choose.choose_decode("cuda", "cuda", BF16, BF16, 64)


@old
def test_the_table_says_so() -> None:
    rows = {row["name"]: row for row in choose.table()}
    assert rows["triton"]["missing"] is None
    assert NEEDS in rows["triton"]["missing_products"]
    assert NEEDS in rows["cuda"]["missing"]


@new
def test_from_8_0_on_they_serve_everything() -> None:
    assert choose.choose_attention(None, "cuda", BF16, 64, "masked") == "triton"
    assert choose.choose_decode(None, "cuda", BF16, BF16, 64) == "triton"
    assert choose.choose_rotary("cuda", "cuda", False) == "cuda"


@new
def test_an_old_device_beside_a_newer_one_is_asked_itself() -> None:
    assert choose.choose_attention(None, "cuda", BF16, 64, "masked", capability=7) == "composed"
    assert choose.choose_decode(None, "cuda", BF16, BF16, 64, capability=7) == "reference"
    for name in ("triton", "cuda"):
        needs = f"'{name}' .*needs compute capability 8.0 or more, and the device of the call has 7"
        with pytest.raises(RuntimeError, match=needs):
            choose.choose_attention(name, "cuda", BF16, 64, "plain", capability=7)
        with pytest.raises(RuntimeError, match=needs):
            choose.choose_decode(name, "cuda", BF16, BF16, 64, capability=7)


@new
def test_it_is_asked_before_anything_is_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "capability_now", lambda x: 7)
    monkeypatch.setattr(choose, "_interprets", lambda *where: True)  # of tensors of the CPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q, new = torch.randn(1, 1, 2, 16).bfloat16(), torch.randn(1, 1, 1, 16).bfloat16()
    k_cache, v_cache = torch.zeros(2, 1, 8, 1, 16, dtype=BF16)
    lens, rope = torch.tensor([3]), Rope.plain(16)
    with pytest.raises(RuntimeError, match="the device of the call has 7"):
        decode_op(*(q, k_cache, v_cache, lens, rope), k_new=new, v_new=new, backend="triton")
    assert not k_cache.any()
    assert not v_cache.any()


@rocm
def test_rocm_has_the_rotation_and_append_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose.choose_rotary(None, "cuda", False) == "triton"
    assert appends(monkeypatch) == "triton"
    assert choose.choose_attention(None, "cuda", BF16, 64, "masked") == "composed"
    assert choose.choose_decode(None, "cuda", BF16, BF16, 64) == "reference"
    only = r"ROCm .*HIP 7.1.0\) it serves the rotation and append alone; expected"
    with pytest.raises(RuntimeError, match=f"{only} 'reference'"):
        choose.choose_decode("triton", "cuda", BF16, BF16, 64)
    with pytest.raises(RuntimeError, match=f"{only} 'composed' or"):
        choose.choose_attention("triton", "cuda", BF16, 64, "plain")


@new
@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_have_the_reference(device: str) -> None:
    assert choose.choose_rotary(None, device, False) == "reference"
    assert choose.choose_decode(None, device, BF16, BF16, 64) == "reference"
    assert choose.choose_attention(None, device, BF16, 64, "masked") == "composed"
    for name in ("native", "triton", "cuda"):
        with pytest.raises(ValueError, match=f"'{name}' serves tensors on c.*, got {device}"):
            choose.choose_rotary(name, device, False)
        with pytest.raises(ValueError, match=f"'{name}' serves tensors on c.*, got {device}"):
            choose.choose_decode(name, device, BF16, BF16, 64)
    with pytest.raises(ValueError, match=f"'triton' serves tensors on cuda, got {device}"):
        choose.choose_attention("triton", device, BF16, 64, "plain")


@new
def test_no_kernel_has_tiles_for_an_old_device() -> None:
    """Where a graph that is traced takes one that stands beside a newer one for it."""
    for choice in (
        lambda: attention.choose_config(75, 64, False),
        lambda: attention_backward.choose_configs(75, 64),
        lambda: decode.choose_config(75, 64, 1),
    ):
        with pytest.raises(ValueError, match=r"8\.0 or more .*got a device of 7\.5; expected"):
            choice()
