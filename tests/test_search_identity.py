"""What says that two models have the same losses: their weights, in whatever dtype and place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from longrope_kernels.search import source
from longrope_kernels.search.extend import _digest_of_files
from longrope_kernels.search.source import fingerprint

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def model(**changed: torch.Tensor) -> nn.Module:
    """Of more values than a block has; a scalar, a vector, quantised and empty storages."""
    torch.manual_seed(3)
    made = nn.Module()
    values = {
        "weight": torch.randn(70, 1024, dtype=torch.bfloat16),
        "norm": torch.randn(5),
        "scale": torch.tensor(2.0),
        "bits": torch.arange(300, dtype=torch.uint8).view(30, 10),
        "signed": torch.arange(-4, 4, dtype=torch.int8),
        "none": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }
    for name, value in (values | changed).items():
        made.register_buffer(name, value)
    return made


def test_every_value_counts_and_so_does_its_place():
    seen = {fingerprint(model())}
    for name, value in model().state_dict().items():
        for at in {0, value.numel() // 3, value.numel() - 1} if value.numel() else ():
            other = value.clone()
            other.view(-1)[at] = ~value.view(-1)[at] if value.dtype == torch.bool else 7
            seen.add(fingerprint(model(**{name: other})))
    assert len(seen) == 16
    weight = model().weight
    swapped = weight.clone()
    swapped[3, [8, 9]] = weight[3, [9, 8]]
    rows = weight[[1, 0, *range(2, 70)]]
    for other in (swapped, rows, weight.roll(1, 0), weight.roll(1, 1), weight.view(1024, 70)):
        seen.add(fingerprint(model(weight=other)))
    assert len(seen) == 21


@pytest.mark.parametrize("device", DEVICES)
def test_neither_place_nor_layout_nor_a_wider_dtype_counts(device, monkeypatch):
    expected = fingerprint(model())
    assert fingerprint(model().to(device)) == expected
    wide = {"weight": model().weight.float(), "scale": torch.tensor(2.0, dtype=torch.float16)}
    assert fingerprint(model(**wide).to(device)) == expected
    assert fingerprint(model(weight=model().weight.t().contiguous().t())) == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert fingerprint(model()) == expected
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # larger parts, as a GPU takes them
    assert fingerprint(model()) == expected
    assert model().weight.numel() > source._BLOCK


def test_every_byte_of_a_models_files_counts(tmp_path: Path) -> None:
    weights, seen = bytearray(2**21), set()
    for at in (None, 100, 2**20 + 7, 2**21 - 1):
        if at is not None:
            weights[at] ^= 1
        (tmp_path / "model.safetensors").write_bytes(weights)
        seen.add(_digest_of_files(tmp_path))
    assert len(seen) == 4
