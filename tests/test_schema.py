"""Schemas and flat arguments of call records are those of their fields."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from longrope_kernels.calls import schema
from longrope_kernels.calls.records import AppendCall, AttentionCall, DecodeCall, RotaryCall


class Inner(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    count: int = 0


class Outer(NamedTuple):
    x: torch.Tensor
    first: Inner
    second: Inner
    scale: float
    flag: bool
    name: str | None


def test_a_record_in_a_record_gives_its_name_first() -> None:
    assert schema.arguments(Outer, mutable=("x",)) == (
        "Tensor(a!) x, Tensor first_weight, Tensor? first_bias, int first_count, "
        "Tensor second_weight, Tensor? second_bias, int second_count, "
        "float scale, bool flag, str? name"
    )


def test_there_and_back() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    call = Outer(x, Inner(y), Inner(x, y, 3), 0.5, True, None)
    flat = schema.flatten(call)
    assert flat == [x, y, None, 0, x, y, 3, 0.5, True, None]
    assert schema.build(Outer, (*flat, "more")) == call
    assert len(flat) == len(schema.fields(Outer))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("append", AppendCall),
        ("attention", AttentionCall),
        ("decode", DecodeCall),
        ("rotary", RotaryCall),
    ],
)
def test_ops_take_the_fields_of_their_record(name: str, record: type) -> None:
    op = getattr(torch.ops.longrope_kernels, name).default
    names = [argument.name for argument in op._schema.arguments]
    assert names[: len(schema.fields(record))] == [name for name, _ in schema.fields(record)]
    assert names[-1] == "backend"
