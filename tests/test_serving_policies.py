"""The parts of the plugin for vLLM that need no vLLM: policies, and the rotary module.

tests/serving has those that run in its engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longrope_kernels import Rope, apply_rotary
from longrope_kernels.integrations.vllm.policies import POLICIES, Policies, check_policy
from longrope_kernels.integrations.vllm.rotary import TokenRotary
from longrope_kernels.rope.factor_set import FactorSet

ROPE = Rope(
    (
        FactorSet((1.0,) * 8, 0, 1.0, 32),
        FactorSet(tuple(1.5 + i for i in range(8)), 4, 1.1, 64),
        FactorSet(tuple(2.0 + 3 * i for i in range(8)), 0, 1.2),
    )
)


def request(policy: Any = None, new: int = 10) -> Any:
    extra = None if policy is None else {"longrope_policy": policy}
    return SimpleNamespace(max_tokens=new, extra_args=extra)


@pytest.mark.parametrize(
    ("policy", "prompt", "known", "index"),
    [
        ("recompute", 30, 32, 0),
        ("recompute", 30, 33, 1),
        ("recompute", 30, 65, 2),
        ("prompt", 32, 70, 0),
        ("prompt", 33, 70, 1),
        ("final", 22, 22, 1),  # 62 in the end
        ("final", 24, 24, 1),
        ("final", 25, 25, 2),
    ],
)
def test_the_set_of_a_request(policy: str, prompt: int, known: int, index: int) -> None:
    for policies, params in (
        (Policies(ROPE, policy, "rotated"), request(new=40)),
        (
            Policies(ROPE, "prompt" if policy != "prompt" else "final", "rotated"),
            request(policy, 40),
        ),
    ):
        assert policies.index(params, prompt, known, limit=128) == index


def test_a_final_length_stays_within_the_limit() -> None:
    """A request is cut at max_model_len, whatever its max_tokens."""
    policies = Policies(ROPE, "final", "rotated")
    assert policies.index(request(new=1000), prompt=20, known=20, limit=64) == 1
    assert policies.index(request(new=1000), prompt=20, known=20, limit=65) == 2


def test_parameters_without_extra_args_take_the_default() -> None:
    policies = Policies(ROPE, "prompt", "rotated")
    assert policies.of(SimpleNamespace(extra_args={})) == "prompt"
    assert policies.of(None) == "prompt"


@pytest.mark.parametrize("policy", ["switch", "Final", "", 0, ["final"]])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"^longrope_policy: expected one of 'recomp") as caught:
        Policies(ROPE, "final", "rotated").of(request(policy))
    assert repr(policy) in str(caught.value)
    assert ("needs mode 'unrotated'" in str(caught.value)) == (policy == "switch")


@pytest.mark.parametrize("mode", POLICIES)
def test_every_policy_is_one(mode: str) -> None:
    assert [check_policy("policy", policy, mode) for policy in POLICIES[mode]] == [*POLICIES[mode]]


def test_drafts_beyond_the_last_token_of_a_request_choose_no_set() -> None:
    """It is never computed: of 30 and 3 tokens 32 are."""
    assert Policies(ROPE, "recompute", "rotated").index(request(new=3), 30, 35, limit=128) == 0


@pytest.fixture
def rotary() -> TokenRotary:
    return TokenRotary(ROPE, head_dim=20, most=16)


def packed(heads: int) -> torch.Tensor:
    """As vLLM cuts q and k from one projection: (tokens, heads * D) within longer rows."""
    return torch.randn(9, heads * 20 + 7)[:, : heads * 20]


def test_each_token_turns_by_the_set_of_its_request(rotary: TokenRotary) -> None:
    q, k, positions = packed(4), packed(2), torch.tensor([0, 1, 2, 40, 41, 5, 70, 71, 72])
    expected = []
    for token, index in enumerate((0, 0, 0, 1, 1, 0, 2, 2, 2)):
        rope = Rope((ROPE.sets[index],))
        one = [x[token].clone().view(1, 1, -1, 20) for x in (q, k)]
        expected.append(apply_rotary(*one, positions[token : token + 1], rope))
    rotary.choose([(3, 3), (41, 42), (6, 6), (73, 73)], [3, 2, 1, 3])
    found = rotary(positions, q, k)
    for each, (before, which) in zip(found, ((q, 0), (k, 1)), strict=True):
        assert each.data_ptr() == before.data_ptr()  # in place
        assert torch.equal(each, torch.stack([x[which].flatten() for x in expected]))


def test_a_graph_reads_what_the_next_step_chose(rotary: TokenRotary) -> None:
    """Traced once; the buffer stays where it is."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(rotary, backend=backend, fullgraph=True, dynamic=True)
    address = rotary.token_sets.data_ptr()
    for lengths in ((9, 40), (70, 9), (33, 64)):
        q, k, positions = packed(4), packed(2), torch.arange(9)
        rotary.choose([(n, n) for n in lengths], [4, 5])
        found = compiled(positions, q.clone(), k.clone())
        assert all(map(torch.equal, found, rotary(positions, q, k)))
    assert len(graphs) == 1
    assert rotary.token_sets.data_ptr() == address
    assert not rotary.state_dict()


def test_more_dimensions_than_a_head_has() -> None:
    with pytest.raises(ValueError, match=r"^rope: expected at most 8 rotated dim.*got 16"):
        TokenRotary(ROPE, head_dim=8, most=4)
