"""What Triton compiles, at the tiles it ships with: several tiles of each kind in every call.

On a GPU, or with LONGROPE_PTX=80 or 90 in the machine of tests/ptx. The tests by feature,
test_attention_*.py and test_decode_*.py, run there too; their calls are small, for the interpreter,
and fit one tile of a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
from append_truth import Case as AppendCase
from append_truth import check as check_append
from append_truth import fp32
from attention_cases import PREPASS, REGISTERS, Case, check, check_grads
from attention_truth import bf16, fp16
from cases import CUDA
from cases import TRITON as TRITON_TARGET
from decode_truth import TRITON
from decode_truth import Case as DecodeCase
from decode_truth import check as check_decode

pytestmark = pytest.mark.compiled
ROTATED_BEFORE = [
    Case(1, 300, 0, 2, 1, 128, dtype=bf16, return_lse=True),
    Case(1, 200, 0, 1, 1, 64, dtype=fp16, causal=False, interleaved=True, sinks=True),
    Case(1, 270, 0, 1, 1, 96, dtype=bf16, window=140, n_hat=100),
    Case(2, 150, 0, 2, 1, 80, dtype=bf16, kv_start=(0, 131), layout="bhsd"),
    Case(1, 140, 200, 1, 1, 256, dtype=bf16),
    Case(1, 70, 0, 1, 1, 120, dtype=bf16),
    Case(0, 0, 0, 2, 2, 64, 16, dtype=bf16, layout="thd", counts=(140, 1, 60), softcap=5.0),
]
ROTATED_IN_REGISTERS = [
    Case(1, 60, 300, 4, 1, 128, dtype=bf16, return_lse=True),
    Case(1, 140, 200, 1, 1, 96, dtype=fp16, interleaved=True, n_hat=100),
    Case(2, 5, 150, 2, 2, 80, dtype=bf16, window=90, sets=(1, 0)),
    Case(1, 9, 70, 2, 1, 256, dtype=bf16, causal=False),
]
GRADIENTS = [
    Case(1, 200, 0, 2, 1, 64, dtype=bf16, interleaved=True, n_hat=100),
    Case(1, 150, 0, 2, 1, 128, dtype=bf16, return_lse=True, sinks=True),
    Case(1, 140, 0, 1, 1, 80, 40, dtype=fp16, softcap=5.0, window=70),
    Case(1, 40, 0, 1, 1, 256, dtype=bf16, causal=False),
    Case(1, 40, 0, 1, 1, 72, dtype=bf16),
]
DECODES = [
    DecodeCase((300, 901), 1, 8, 2, 128, boundary=900, n_hat=200, dtype=bf16),
    DecodeCase((130, 500), 4, 4, 1, 96, block=16, dtype=bf16, window=200, sinks=True),
    DecodeCase((333,), 1, 4, 1, 80, block=32, dtype=bf16, float8=True, n_hat=150),
    DecodeCase((300,), 1, 2, 1, 120, dtype=bf16),
    DecodeCase((200, 90), 1, 2, 1, 64, interleaved=True, dtype=fp16, positions="any"),
    DecodeCase((190,), 16, 8, 1, 256, dtype=bf16, kv_start=(70,)),
    DecodeCase((205, 98), 8, 8, 1, 128, dtype=bf16, boundary=(200, 202), n_hat=150),
    DecodeCase(
        (130,), 5, 4, 1, 96, dtype=bf16, block=16, lengths=((90, 91, 90, 91, 3),), boundary=90
    ),
]
APPENDS = [
    AppendCase((9, 17), 2, 3, 96, 16, source="fused"),
    AppendCase((9, 2), 3, 2, 33, dtype=fp32),
    AppendCase((9, 17), 3, 2, 128, 16, mapping="packed"),
    AppendCase((9, 3), 4, 2, 64, 12, float8=True),
    AppendCase((9, 3), 2, 2, 20, float8=True, dtype=fp16, mapping="rows", storage="one"),
]


def assert_fenced(unfenced_copies: bool = False) -> None:
    """All kernels since the last time, but for what wgmma reads of cp.async, see ptx/order.py."""
    if CUDA:
        return
    from ptx import install  # which is not for a process with the interpreter

    kernels = [install.device.compiled.popitem()[1] for _ in list(install.device.compiled)]
    assert kernels
    for kernel in kernels:
        assert unfenced_copies or not kernel.machine.order.passed


@pytest.mark.parametrize("case", ROTATED_BEFORE, ids=str)
def test_attention_to_keys_rotated_before(case: Case) -> None:
    check(PREPASS, case)
    assert_fenced(unfenced_copies=True)


@pytest.mark.parametrize("case", ROTATED_IN_REGISTERS, ids=str)
def test_attention_to_keys_rotated_in_registers(case: Case) -> None:
    check(REGISTERS, case)
    assert_fenced(unfenced_copies=True)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(case: Case) -> None:
    check_grads(PREPASS, case)
    assert_fenced(unfenced_copies=True)


@pytest.mark.parametrize("case", DECODES, ids=str)
def test_decoding(case: DecodeCase) -> None:
    check_decode(TRITON, case.call())
    counts = CUDA or counts_in_order()
    assert counts or case in DECODES[5:]  # which may have too few keys for two splits
    assert_fenced()


def counts_in_order() -> bool:
    """Whether programs count; what others read is stored before a barrier and a count that releases
    it, and read after.

    Blocks run one after the other here, so no run would show it.
    """
    from ptx import install

    counting = False
    for kernel in install.device.compiled.values():
        code = kernel.program.instructions
        counts = [i for i, x in enumerate(code) if x.name == "atom"]
        if not counts:
            continue
        (count,), counting = counts, True
        assert {"acq_rel", "gpu"} <= set(code[count].modifiers)
        before = [x for x in code[:count] if x.name == "bar" or is_global("st", x)]
        after = [x for x in code[count:] if x.name == "bar" or is_global("ld", x)]
        assert before[-1].name == after[0].name == "bar"
    return counting


def is_global(name: str, instruction: Any) -> bool:
    return instruction.name == name and "global" in instruction.modifiers


@pytest.mark.parametrize("case", APPENDS, ids=str)
def test_appending(case: AppendCase) -> None:
    check_append(TRITON_TARGET, case.arguments())
    assert_fenced()
