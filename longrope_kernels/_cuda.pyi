"""The CUDA kernels: csrc/cuda_bindings.cpp takes the records of calls/records.py."""

from torch import Tensor

from .calls.records import AppendCall, AttentionCall, DecodeCall, RotaryCall

Place = tuple[int, int]
Splits = tuple[int, int, int, int, int, int]

def append(call: AppendCall, place: Place, /) -> None: ...
def attention(
    call: AttentionCall, out: Tensor, lse: Tensor, stages: int, place: Place, /
) -> None: ...
def decode(call: DecodeCall, out: Tensor, lse: Tensor, splits: Splits, place: Place, /) -> None: ...
def rotary(call: RotaryCall, q_out: Tensor, k_out: Tensor, place: Place, /) -> None: ...
