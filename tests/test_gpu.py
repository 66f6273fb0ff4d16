"""What only a device can show: values are not read there, and nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from cases import Shape, Target, by_id, factors, positions_for, two_sets
from test_errors import FACTORS, POSITIONS, SELECTION, Bad, good

from longrope_kernels import Rope, apply_rotary

pytestmark = pytest.mark.gpu

VALUES = ("high", "low", "negative", "start", "end", "past", "descending")
BAD = [bad for bad in (*POSITIONS, *SELECTION) if bad.id in VALUES]
BAD += [bad for bad in FACTORS if bad.id.startswith("tensor")]
on_device = pytest.mark.parametrize(
    "target", by_id([Target("triton", "cuda"), Target("reference", "cuda")])
)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=f"{bad.names}-{bad.id}") for bad in BAD])
@on_device
def test_values_are_not_read_by_default(
    target: Target, bad: Bad, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_errors has the other half: the same input under LONGROPE_CHECK=1 raises."""
    monkeypatch.delenv("LONGROPE_CHECK", raising=False)
    arguments = good(target)
    arguments.update(bad.change(arguments))
    apply_rotary(**{name: target.move(x) for name, x in arguments.items()})
    torch.cuda.synchronize()


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@on_device
def test_no_sync(target: Target, inplace: bool) -> None:
    q, positions = torch.randn(2, 5, 4, 16).cuda(), torch.arange(5).cuda()
    rope, lengths = two_sets(8).to("cuda"), torch.tensor([5, 5000]).cuda()
    values = torch.tensor(factors(8)).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        target.rotary(q, None, positions, rope, lengths=lengths, inplace=inplace)
        target.rotary(q, None, positions, values, 7, inplace=inplace)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_native_serves_the_cpu() -> None:
    q, positions = torch.randn(1, 3, 2, 16).cuda(), torch.arange(3).cuda()
    with pytest.raises(ValueError, match=r"backend.*native.*cpu.*cuda"):
        apply_rotary(q, None, positions, Rope.plain(16), backend="native")


@pytest.mark.parametrize("kind", ["forward", "inplace", "backward"])
def test_one_kernel_and_no_memcpy(kind: str) -> None:
    """A call with a Rope is one launch; so is its backward. The profiler counts."""
    torch.use_deterministic_algorithms(False)  # no launches that poison memory
    inplace, backward = kind == "inplace", kind == "backward"
    q, k = torch.randn(1, 64, 4, 64).cuda(), torch.randn(1, 64, 2, 64).cuda()
    positions, rope = torch.arange(64).cuda(), two_sets(32).to("cuda")
    lengths = torch.tensor([5000]).cuda()
    leaves = [x.clone().requires_grad_(backward) for x in (q, k)]
    kwargs = {"lengths": lengths, "inplace": inplace, "backend": "triton"}
    outs = apply_rotary(*leaves, positions, rope, **kwargs)  # compiles
    if backward:
        torch.autograd.grad(outs, leaves, outs)
        outs = apply_rotary(*leaves, positions, rope, **kwargs)
        grads = [x.detach().clone() for x in outs]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        if backward:
            torch.autograd.grad(outs, leaves, grads)
        else:
            apply_rotary(*leaves, positions, rope, **kwargs)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1, names
    assert "rotary" in names[0]


@on_device
def test_cuda_graph(target: Target) -> None:
    """Captured once; replayed with other data, positions and lengths in the same memory."""
    shape = Shape(2, 9, 2, 1, 32)
    q, k = (target.move(x) for x in shape.qk())
    positions = target.move(positions_for(9, 7))
    lengths = torch.tensor([4096, 4096]).cuda()
    rope = two_sets(16).to("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        target.rotary(q, k, positions, rope, lengths=lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = target.rotary(q, k, positions, rope, lengths=lengths)
    q.normal_()
    positions += 1
    lengths[1] = 4097
    graph.replay()
    wanted = target.rotary(q, k, positions, rope, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))
