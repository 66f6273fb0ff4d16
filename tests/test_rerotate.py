"""`rerotate_`: keys rotated by one set, turned in place to another, against angles of the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import truth
from cases import Target, every_cpu_target, every_target, factors, positions_for, two_sets
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope, apply_rotary, rerotate_

PAIRS = 8
LONG = Rope((FactorSet(factors(PAIRS, 2.0), 0, 1.19),))
SHORT = Rope((FactorSet(factors(PAIRS), 0, 1.05),))


def one(n_hat: int, scale: float = 2.0, a: float = 1.19, base: float = 10000.0) -> Rope:
    return Rope((FactorSet(factors(PAIRS, scale), n_hat, a),), base)


def expected(
    k: torch.Tensor,
    positions: torch.Tensor,
    old: Rope,
    new: Rope,
    old_sets: torch.Tensor | None = None,
    new_sets: torch.Tensor | None = None,
) -> truth.Expected:
    """k (B, S, H, D) turned by the new angle less the old one."""
    batch, seq = k.shape[:2]
    positions = (positions[None] if positions.dim() == 1 else positions).expand(batch, seq)
    turns = []
    for rope, sets in ((old, old_sets), (new, new_sets)):
        of_token = truth.token_sets(rope, batch, seq, None, sets)
        cos, sin = truth.cos_sin(rope, positions, of_token)
        turns.append(torch.complex(cos, sin))
    ratio = turns[1] / turns[0]
    outs = [truth.rotate(x, ratio.real, ratio.imag, new.interleaved) for x in (k.double(), k)]
    return truth.Expected(*outs)


def rerotated(target: Target, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    moved = target.move(k.clone())
    arguments = {name: target.move(x) for name, x in kwargs.items()}
    out = rerotate_(moved, *map(target.move, args), **arguments, backend=target.backend)
    assert out is moved
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(SHORT, LONG, id="no-threshold"),
        pytest.param(one(7), one(7, 1.0, 1.0), id="one-threshold"),
        pytest.param(one(0), one(4096), id="to-threshold"),
        pytest.param(one(4096), one(0), id="from-threshold"),
        pytest.param(one(7), one(4096, 3.0, 1.3), id="two-thresholds"),
        pytest.param(one(7), one(7, base=500000.0), id="other-base"),
    ],
)
@every_target
def test_turns_by_the_difference(target: Target, old: Rope, new: Rope, dtype: torch.dtype) -> None:
    k = torch.randn(1, 20, 2, 24).to(dtype)  # partial: 16 of 24 dimensions turn
    positions = positions_for(20, 7)
    out = rerotated(target, k, positions, old, new)
    assert_close(out, expected(k, positions, old, new))
    assert torch.equal(out.cpu()[..., 16:], k[..., 16:])


@every_target
def test_each_entry_has_its_sets(target: Target) -> None:
    rope, k = two_sets(PAIRS), torch.randn(4, 5, 1, 16)
    old = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    new = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    positions = torch.tensor([0, 6, 7, 4096, 2**31 - 1]).expand(4, 5)
    out = rerotated(target, k, positions, rope, rope, old_sets=old, new_sets=new)
    assert_close(out, expected(k, positions, rope, rope, old, new))
    # From a set to itself nothing moves.
    assert torch.equal(out.cpu()[0], k[0])


@every_cpu_target
def test_equals_rotating_with_the_new_set(target: Target) -> None:
    """At the crossing: the keys of the short set become those of the long one."""
    rope, k = two_sets(PAIRS, interleaved=True), torch.randn(2, 9, 2, 16)
    positions = torch.arange(4090, 4099)
    kwargs = {"backend": target.backend}
    short, long = (torch.full((2,), i, dtype=torch.int32) for i in (0, 1))
    _, cached = apply_rotary(k, k.clone(), positions, rope, sets=short, **kwargs)
    _, wanted = apply_rotary(k, k.clone(), positions, rope, sets=long, **kwargs)
    rerotate_(cached, positions, rope, rope, old_sets=short, new_sets=long, **kwargs)
    torch.testing.assert_close(cached, wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("layout", ["bhsd", "thd"])
def test_layouts(layout: str) -> None:
    k = torch.randn(1, 9, 2, 16)
    view = k.clone()
    moved = view[0] if layout == "thd" else view.transpose(1, 2)
    out = rerotate_(moved, torch.arange(9), SHORT, LONG, layout=layout)
    assert out is moved
    assert torch.equal(view, rerotate_(k, torch.arange(9), SHORT, LONG))


def test_pages_are_batch_entries() -> None:
    k, positions = torch.randn(6, 16, 2, 16), torch.arange(96).view(6, 16)
    paged = rerotate_(k.clone(), positions, SHORT, LONG)
    flat = rerotate_(k.view(1, 96, 2, 16).clone(), positions.view(96), SHORT, LONG)
    assert torch.equal(paged.view(1, 96, 2, 16), flat)


def test_compiles_without_a_break() -> None:
    def run(k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rerotate_(k, positions, SHORT, LONG)

    k, positions = torch.randn(1, 9, 2, 16), torch.arange(9)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(k.clone(), positions)
    assert torch.equal(compiled, run(k.clone(), positions))


@pytest.mark.parametrize("new", [LONG, one(7)], ids=["one turn", "two turns"])
def test_view_of_a_parameter_is_refused_and_kept(new: Rope) -> None:
    leaf = torch.randn(2, 9, 2, 16, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="k_cache is a view of a leaf that requires grad"):
        rerotate_(leaf[:1], torch.arange(9), SHORT, new)
    assert torch.equal(leaf, before)


INT = torch.int32
BAD = [
    pytest.param({"k_cache": 3}, TypeError, "k_cache: expected a tensor, got int", id="k"),
    pytest.param({"old": [1.0]}, TypeError, "old: expected a Rope, got list", id="old"),
    pytest.param({"new": Rope.plain(8)}, ValueError, "new: expected 8 pairs .* got 4", id="pairs"),
    pytest.param(
        {"new": Rope.plain(16, interleaved=True)}, ValueError, "new: .* and True", id="pairing"
    ),
    pytest.param({"positions": torch.arange(8)}, ValueError, r"positions: .*\(8,\)", id="seq"),
    pytest.param({"layout": "shd"}, ValueError, "layout: expected one of", id="layout"),
    pytest.param({"backend": "opencl"}, ValueError, "backend: .*'opencl'", id="backend"),
    pytest.param({"old": two_sets(PAIRS)}, ValueError, "old_sets: .* 2 factor sets", id="sets"),
    pytest.param(
        {"old_sets": torch.zeros(2, dtype=INT)}, ValueError, r"old_sets: .*\(1,\)", id="shape"
    ),
    pytest.param({"new_sets": torch.zeros(1).long()}, TypeError, "new_sets: .*int64", id="dtype"),
    pytest.param(
        {"new_sets": torch.ones(1, dtype=INT)}, ValueError, "new_sets: .* 0 to 0", id="range"
    ),
    pytest.param(
        {"k_cache": torch.ones(1, 1, 2, 16).expand(1, 9, 2, 16)}, ValueError, "k_cache", id="shared"
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_changes_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {
        "k_cache": torch.randn(1, 9, 2, 16),
        "positions": torch.arange(9),
        "old": SHORT,
        "new": LONG,
        **change,
    }
    k = arguments["k_cache"]
    before = k.clone() if isinstance(k, torch.Tensor) else k
    with pytest.raises(error, match=message):
        rerotate_(**arguments)
    assert k is before or torch.equal(k, before)
