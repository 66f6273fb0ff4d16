"""Enabled models over ranks where a call is not served, or a rank is lost: each one says so."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_cases import family_model, generated, tokens
from ranks import Ranks, check_survivors
from test_models_spread import LLAMA, PHI3, group_of, results, spread_model
from transformers import DynamicCache, StaticCache

from longrope_kernels.integrations.transformers import enable


def refuse(case: str) -> Any:
    """The error of a call that is not served, and that the next one is."""
    model = spread_model(PHI3, 4)
    ids = tokens(1, 24)
    inputs: dict[str, Any] = {"input_ids": ids}
    with torch.no_grad():
        try:
            if case == "ids":
                model(input_ids=ids + dist.get_rank())
            elif case == "labels":
                model(input_ids=ids, labels=ids[:, :6])
            elif case == "few":
                model(input_ids=ids[:, :7])
            elif case == "positions":
                model(input_ids=ids, position_ids=torch.arange(6)[None])
            elif case == "packed rows":
                positions = torch.arange(12).repeat(2)[None].expand(2, -1)
                model(input_ids=ids.expand(2, -1), position_ids=positions)
            elif case == "static":
                model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=32))
            elif case == "mask":
                model(**inputs, attention_mask={"full_attention": ids > 0})
            elif case == "filled":
                cache = DynamicCache(config=model.config)
                enable(family_model(PHI3))(input_ids=ids, past_key_values=cache)
                model(**inputs, past_key_values=cache)
            elif case == "recorded":
                with torch.enable_grad():
                    model(**inputs, past_key_values=DynamicCache(config=model.config))
            elif case == "kept":
                model(**inputs, logits_to_keep=1)
            elif case == "kept by index":
                cache = DynamicCache(config=model.config)
                model(**inputs, past_key_values=cache, logits_to_keep=torch.tensor([3]))
            elif case == "without a cache":
                generated(model, ids, use_cache=False)
            elif case == "drafts with a prompt":
                drafts = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}
                generated(model, ids[:, :12].repeat(1, 2), **drafts)
            elif case == "rotated":
                enable(model, group=group_of(4), cache="rotated")
            elif case == "backend":
                enable(model, group=group_of(4), backend="cuda")
            elif case == "order":
                enable(model, group=group_of(4), order="mixed")
            elif case == "own order":
                enable(model, order="contiguous")
            elif case == "group":
                enable(model, group=4)
        except (ValueError, TypeError) as error:
            return str(error), model(input_ids=ids).logits.shape[1]
    return None


REFUSED = {
    "ids": r"input_ids: expected the same on all ranks, got \(\(1, 24\), \d+\) on rank 0, ",
    "labels": r"labels: expected those of all tokens on each rank, got \(1, 6\) where this rank",
    "few": r"input_ids: expected at least two tokens a rank, got 7",
    "positions": r"position_ids: expected those of all 24 tokens on each rank, got \(1, 6\)",
    "packed rows": r"position_ids: expected packed sequences in one row with group=, got 2 rows",
    "static": r"past_key_values: expected a DynamicCache that offloads nothing, got StaticCache",
    "mask": r"attention_mask: expected a tensor or None with group=, got dict",
    "filled": r"past_key_values: expected an empty DynamicCache, or one that this model has filled",
    "recorded": r"past_key_values: expected None where gradients are recorded",
    "kept": r"logits_to_keep: expected 0 with group=, where each rank has .* own tokens, .*got 1",
    "kept by index": r"logits_to_keep: expected 0 or 1 with group=, .* the last, got a Tensor",
    "without a cache": r"logits_to_keep: expected 0 with group=, .*got 1",
    "drafts with a prompt": r"logits_to_keep: expected 0 or 1 with group=, .*got 4",
    "rotated": r"cache: expected 'unrotated' with group=, got 'rotated'",
    "backend": r"backend: expected one of reference, composed, triton, native or None with group=",
    "order": r"order: expected 'balanced' or 'contiguous', got 'mixed'",
    "own order": r"order: expected 'balanced' without group=, got 'contiguous'",
    "group": r"group: expected a ProcessGroup, a DeviceMesh or None, got int",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused(case: str, four: Ranks) -> None:
    for answer in results(four, 4, refuse, case):
        message, count = answer
        with pytest.raises(ValueError, match=f"^{REFUSED[case]}"):
            raise ValueError(message)
        assert count == 6  # tokens of this rank: the next call is served


def other_kept() -> Any:
    with torch.no_grad():
        spread_model(PHI3, 4)(input_ids=tokens(1, 24), logits_to_keep=int(dist.get_rank() == 2))


def test_what_one_rank_keeps_ends_all(four: Ranks) -> None:
    answers = [str(x) for x in four("kept", other_kept)]
    assert answers[2].startswith("ValueError: logits_to_keep: expected 0 with group=")
    assert answers[0] == answers[1] == answers[3] == f"ValueError: group: rank 2: {answers[2]}"


def other_routers() -> Any:
    spread_model("phimoe", 4)(input_ids=tokens(1, 24), output_router_logits=dist.get_rank() == 2)


def test_other_routers_on_a_rank_end_all(four: Ranks) -> None:
    for answer in four("routers", other_routers):
        assert str(answer) == (
            "ValueError: output_router_logits: expected the same on all ranks, got False on rank 0,"
            " False on rank 1, True on rank 2, False on rank 3"
        )


def other_cache() -> Any:
    model = spread_model(PHI3, 4)
    cache: Any = DynamicCache(config=model.config)
    if dist.get_rank() == 2:
        cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(input_ids=tokens(1, 24), past_key_values=cache)


def test_what_one_rank_refuses_ends_all(four: Ranks) -> None:
    message = "expected a DynamicCache that offloads nothing, got StaticCache"
    own = f"ValueError: past_key_values: {message}"
    others = f"ValueError: group: rank 2: {own}"
    assert [str(x) for x in four("cache", other_cache)] == [others, others, own, others]


def other_labels() -> Any:
    ids = tokens(1, 24)
    spread_model(PHI3, 4)(input_ids=ids, labels=ids.masked_fill(ids < 9 * dist.get_rank(), -100))


def test_other_labels_on_a_rank_end_all(four: Ranks) -> None:
    for answer in four("labels", other_labels):
        assert str(answer).startswith(
            "ValueError: labels: expected the same on all ranks, got ((1,"
        )


def other_order() -> Any:
    order = "contiguous" if dist.get_rank() == 2 else "balanced"
    model = enable(family_model(PHI3), group=group_of(4), order=order)
    with torch.no_grad():
        model(input_ids=tokens(1, 24))


def test_another_order_on_a_rank_ends_all(four: Ranks) -> None:
    for answer in four("order", other_order):
        assert str(answer) == (
            "ValueError: order: expected the same on all ranks, got balanced on rank 0, "
            "balanced on rank 1, contiguous on rank 2, balanced on rank 3"
        )


def dying(where: str) -> None:
    """Rank 1 dies in a forward, after it, or in the fourth token of ``generate()``."""
    model = spread_model(LLAMA, 3)
    count = 0

    def die(*_: Any) -> None:
        nonlocal count
        count += 1
        if dist.get_rank() == 1 and count == {"forward": 1, "generate": 4}.get(where):
            os._exit(7)

    model.model.layers[1].register_forward_pre_hook(die)
    ids = tokens(1, 24)
    if where == "generate":
        generated(model, ids)
        return
    loss = model.train()(input_ids=ids, labels=ids).loss
    if dist.get_rank() == 1:
        os._exit(7)
    loss.backward()


@pytest.mark.parametrize("where", ["forward", "backward", "generate"])
def test_a_dead_rank_ends_the_others_by_name(where: str) -> None:
    pool = Ranks(3, timeout=5)
    found = pool("die", dying, where)
    pool.close()
    check_survivors(found)


def other_head() -> Any:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(family_model(LLAMA).config)
    try:
        enable(model, group=group_of(4))
    except ValueError as error:
        return str(error)
    return None


def test_other_heads_are_refused(four: Ranks) -> None:
    for message in results(four, 4, other_head):
        assert message == (
            "model: expected a causal language model or its base model with group=, got "
            "LlamaForSequenceClassification"
        )
