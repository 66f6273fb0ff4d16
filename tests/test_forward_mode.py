"""Forward-mode derivatives: served, or refused by name; never dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from longrope_kernels import append, apply_rotary, attention, decode

POSITIONS = torch.arange(5)
ROPE: dict[str, Any] = {"factors": [1.0 + i for i in range(8)], "n_hat": 2, "attention_factor": 1.2}


def random(*seeds: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for seed in seeds
    ]


@pytest.mark.parametrize("backend", ["native", None, "reference"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_a_rotation_turns_tangents_too(backend: str | None, inplace: bool) -> None:
    """Of one tensor or both, also where they are another's view."""
    q, k, of_q, of_k = random(1, 2, 3, 4)
    expected = apply_rotary(of_q, of_k, POSITIONS, **ROPE, backend="reference")
    for of_k_too in (True, False):
        with forward_ad.dual_level():
            duals = (
                forward_ad.make_dual(q.clone(), of_q.clone()),
                forward_ad.make_dual(k.clone(), of_k.clone()) if of_k_too else k.clone(),
            )
            found = apply_rotary(*duals, POSITIONS, **ROPE, backend=backend, inplace=inplace)
            turned = [forward_ad.unpack_dual(x) for x in found]
        rotated = apply_rotary(q, k, POSITIONS, **ROPE, backend="reference")
        for x, right in zip(turned, rotated, strict=True):
            torch.testing.assert_close(x.primal, right)
        torch.testing.assert_close(turned[0].tangent, expected[0])
        if of_k_too:
            torch.testing.assert_close(turned[1].tangent, expected[1])
        else:
            assert turned[1].tangent is None or not turned[1].tangent.any()


def test_torch_func_jvp_of_a_rotation() -> None:
    q, of_q = random(1, 3)
    rotate = lambda x: apply_rotary(x, None, POSITIONS, **ROPE, backend="native")[0]  # noqa: E731
    _, tangent = torch.func.jvp(rotate, (q,), (of_q,))
    torch.testing.assert_close(tangent, rotate(of_q))


def jvp_of_attention(**rest: Any) -> torch.Tensor:
    q, k, v, *tangents = random(1, 2, 3, 4, 5, 6)
    attend = lambda q, k, v: attention(q, k, v, POSITIONS, **ROPE, **rest)  # noqa: E731
    tangent: torch.Tensor = torch.func.jvp(attend, (q, k, v), tuple(tangents))[1]
    return tangent


@pytest.mark.parametrize("rest", [{}, {"softcap": 3.0}, {"window": 2}], ids=str)
def test_attention_by_default_is_the_reference_then(rest: dict[str, Any]) -> None:
    expected = jvp_of_attention(**rest, backend="reference")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(jvp_of_attention(**rest), expected, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"^q: backend 'native' has no forward-mode"):
        jvp_of_attention(**rest, backend="native")
    if "softcap" not in rest:
        with pytest.raises(NotImplementedError):
            jvp_of_attention(**rest, backend="composed")


@pytest.mark.parametrize("backend", ["native", None, "reference"])
def test_caches_have_none(backend: str | None) -> None:
    q, k, v, tangent = random(1, 2, 3, 4)
    lens = torch.tensor([5, 5])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangent)
        with pytest.raises(NotImplementedError, match=r"^q: decode has no forward-mode"):
            decode(dual, k, v, lens, **ROPE, backend=backend)
        with pytest.raises(NotImplementedError, match=r"^k: append has no forward-mode"):
            append(dual, v, k, v.clone(), lens, backend=backend)
