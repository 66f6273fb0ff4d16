"""Enabled models over ranks, on gloo: what one process makes of the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import factors
from model_cases import (
    KEEPING,
    SHARED,
    SWITCH,
    family_model,
    generated,
    keeping_model,
    max_diff,
    padded,
    tokens,
)
from ranks import Ranks
from test_distributed import whole
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)

from longrope_kernels import FactorSet, Rope
from longrope_kernels.integrations.transformers import disable, enable

CLOSE = 2e-5
PHI3, LLAMA = "phi3", "llama"


def group_of(size: int) -> Any:
    """The first ranks, or a mesh of two times two; None on ranks outside of it."""
    if dist.get_rank() >= (size or 4):
        return None
    return ranks.GROUPS[size] if size else ranks.MESH[0]


def spread_model(family: str, size: int, **config: Any) -> Any:
    group, order = group_of(size), config.pop("order", "balanced")
    if group is None:
        return None
    return enable(family_model(family, **config), group=group, order=order)


def results(pool: Ranks, size: int, function: Any, *args: Any) -> list[Any]:
    found = pool("spread", function, *args)[: size or 4]
    for rank, answer in enumerate(found):
        if isinstance(answer, Exception):
            raise AssertionError(f"rank {rank}: {answer}")
    return found


# -------------------------------------------------------------------------- logits, loss, training


def forward(family: str, size: int, inputs: dict[str, Any], config: dict[str, Any]) -> Any:
    """Logits of the tokens of this rank, and with labels the loss and the mean of the gradients."""
    model = spread_model(family, size, **config)
    if model is None:
        return None
    if "labels" not in inputs:
        with torch.no_grad():
            return model(**inputs).logits, None, None
    model.train()
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model, size)


def gradients(model: Any, size: int | None) -> list[torch.Tensor]:
    """Of all parameters, the mean over so many ranks; None: those of one process."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    if size is not None:
        for grad in grads:
            dist.all_reduce(grad, group=ranks.GROUPS[size or 4])
            grad /= size or 4
    return grads


def alone(family: str, inputs: dict[str, Any], config: dict[str, Any]) -> Any:
    """The same of an untouched model in one process."""
    model = family_model(family, **config).train()
    out = model(**inputs, use_cache=False)
    if out.loss is None:
        return out.logits.detach(), None, None
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model, None)


def check(pool: Ranks, size: int, family: str, inputs: dict[str, Any], **config: Any) -> None:
    found = results(pool, size, forward, family, size, inputs, config)
    order = config.pop("order", "balanced")
    logits, loss, grads = alone(family, inputs, config)
    count = logits.shape[1]
    assert max_diff(whole([part for part, _, _ in found], count, order, 1), logits) < CLOSE
    if loss is not None:
        for _, value, gradients in found:
            assert torch.equal(value, found[0][1])
            assert max_diff(value, loss) < CLOSE
            assert max(map(max_diff, gradients, grads)) < CLOSE


@pytest.mark.parametrize("family", [LLAMA, PHI3])
@pytest.mark.parametrize("size", [2, 3, 0])
def test_training_is_that_of_one_process(size: int, family: str, four: Ranks) -> None:
    ids = tokens(2, SWITCH + 9)
    labels = ids.masked_fill(ids < 20, -100)  # unevenly over the ranks
    check(four, size, family, {"input_ids": ids, "labels": labels})


def test_contiguous_tokens(four: Ranks) -> None:
    ids = tokens(2, SWITCH + 9)
    check(four, 3, "phi3 sliding", {"input_ids": ids, "labels": ids}, order="contiguous")


@pytest.mark.parametrize("length", [8, 11, SWITCH, SWITCH + 1])
def test_any_length_and_the_switch(length: int, four: Ranks) -> None:
    check(four, 4, PHI3, {"input_ids": tokens(1, length)})


def plain() -> Any:
    """Full masks ask for nothing that torch's own attention has not: logits here."""
    model = enable(family_model(PHI3), backend="composed", group=group_of(4))
    ids = tokens(2, SWITCH)
    with torch.no_grad():
        return [model(input_ids=ids, attention_mask=mask).logits for mask in (None, ids > 0)]


def test_the_fast_attention_serves_what_is_not_padded(four: Ranks) -> None:
    expected, _, _ = alone(PHI3, {"input_ids": tokens(2, SWITCH)}, {})
    for parts in zip(*results(four, 4, plain), strict=True):
        assert max_diff(whole(list(parts), SWITCH, "balanced", 1), expected) < CLOSE


@pytest.mark.parametrize(
    "family", ["phi3 sliding", "phi3 partial", "qwen2 sliding", "qwen3", "phimoe"]
)
def test_other_families(family: str, four: Ranks) -> None:
    check(four, 2, family, {"input_ids": tokens(1, 21)})


def routed(size: int | None, masked: bool) -> Any:
    """Loss, logits of the routers and gradients of a Mixtral, with a loss of its routers."""
    torch.manual_seed(3)
    fields = {**SHARED, "num_local_experts": 4, "router_aux_loss_coef": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **fields)).train()
    if size is not None:
        enable(model, group=group_of(size))
    ids = tokens(2, 21)
    mask = (torch.arange(21) >= torch.tensor([[0], [5 * masked]])).long()
    labels, given = ids.masked_fill(mask == 0, -100), {"attention_mask": mask} if masked else {}
    out = model(ids, **given, labels=labels, output_router_logits=True, use_cache=False)
    out.loss.backward()
    routers = [x.detach()[mask.flatten() == 1] for x in out.router_logits]
    return out.loss.detach(), routers, gradients(model, size)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [4, 0])
def test_the_loss_of_routers(size: int, masked: bool, four: Ranks) -> None:
    """Which a head adds to that of the tokens: of all of them, and the same on all ranks."""
    loss, logits, grads = routed(None, masked)
    found = results(four, size, routed, size, masked)
    for value, of_routers, gradients in found:
        assert torch.equal(value, found[0][0])
        assert max_diff(value, loss) < CLOSE
        assert max(map(max_diff, of_routers, logits)) < CLOSE
        assert max(map(max_diff, gradients, grads)) < CLOSE


def scaled_by_position(size: int | None) -> Any:
    """Logits and new tokens of a Ministral 3, whose layers scale queries by their positions."""
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.8}
    fields = {**SHARED, "rope_parameters": {**rope, "original_max_position_embeddings": 4}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ministral3", **fields)).eval()
    if size is not None:
        enable(model, group=group_of(size))
    ids = tokens(2, 21)
    return generated(model, ids), model(input_ids=ids, use_cache=False).logits.detach()


def test_layers_that_read_positions(four: Ranks) -> None:
    ids, logits = scaled_by_position(None)
    found = results(four, 4, scaled_by_position, 4)
    assert max_diff(whole([part for _, part in found], 21, "balanced", 1), logits) < CLOSE
    for out, _ in found:
        assert torch.equal(out, ids)


def several_ropes(size: int | None) -> Any:
    """Logits, gradients and new tokens of a Gemma 3, whose sliding layers have their own rope."""
    torch.manual_seed(3)
    kinds = ["sliding_attention", "full_attention"]
    fields = {**SHARED, "head_dim": 32, "sliding_window": 8, "layer_types": kinds}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **fields))
    sets = (FactorSet(factors(16, 1.25), max_length=SWITCH), FactorSet(factors(16, 2.0), 7, 1.19))
    group = None if size is None else group_of(size)
    enable(model, rope={"full_attention": Rope(sets)}, group=group)
    ids = tokens(2, SWITCH - 4)
    found = generated(model.eval(), ids, max_new_tokens=12)
    out = model.train()(input_ids=found, labels=found, use_cache=False)
    out.loss.backward()
    return found, out.logits.detach(), gradients(model, size)


def test_layers_of_several_ropes(four: Ranks) -> None:
    ids, logits, grads = several_ropes(None)
    found = results(four, 4, several_ropes, 4)
    parts = [part for _, part, _ in found]
    assert max_diff(whole(parts, ids.shape[1], "balanced", 1), logits) < CLOSE
    for out, _, gradients in found:
        assert torch.equal(out, ids)
        assert max(map(max_diff, gradients, grads)) < CLOSE


def test_recomputed_layers(four: Ranks) -> None:
    for answer in results(four, 2, recomputed):
        if answer is not None:
            assert max(map(max_diff, *answer)) < CLOSE


def recomputed() -> Any:
    """Gradients with layers run again in the backward, after another forward, and without."""
    model = spread_model(PHI3, 2)
    if model is None:
        return None
    found = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        losses = [model(input_ids=ids, labels=ids).loss for ids in (tokens(2, 40), tokens(2, 11))]
        sum(losses).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_sets_that_mix(side: str, four: Ranks) -> None:
    """Each row as if it came alone; the short set's and the long one's in one batch."""
    rows = [tokens(1, n, seed=n)[0] for n in (SWITCH - 7, SWITCH + 6)]
    ids, mask = padded(rows, side)
    found = results(four, 3, forward, PHI3, 3, {"input_ids": ids, "attention_mask": mask}, {})
    logits = whole([part for part, _, _ in found], ids.shape[1], "balanced", 1)
    for row, own, real in zip(rows, logits, mask.bool(), strict=True):
        expected, _, _ = alone(PHI3, {"input_ids": row[None]}, {})
        assert max_diff(own[real], expected[0]) < CLOSE


@pytest.mark.parametrize(
    ("given", "order"), [("position_ids", "balanced"), ("cu_seq_lens", "contiguous")]
)
def test_packed_sequences(given: str, order: str, four: Ranks) -> None:
    """As if each came alone, in the forward and in training; the ranks do not divide the tokens."""
    rows = [tokens(1, n, seed=n) for n in (5, SWITCH + 3, 9)]
    ids = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    labels = ids.masked_fill(positions == 0, -100)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "labels": labels}
    if given == "cu_seq_lens":
        borders = torch.tensor([0, 5, 5 + SWITCH + 3, ids.shape[1]])
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    found = results(four, 4, forward, PHI3, 4, inputs, {"order": order})
    logits = whole([part for part, _, _ in found], ids.shape[1], order, 1)
    expected = [alone(PHI3, {"input_ids": row, "labels": row}, {}) for row in rows]
    assert max_diff(logits, torch.cat([of_row for of_row, _, _ in expected], 1)) < CLOSE
    shares = [(row.shape[1] - 1) / (ids.shape[1] - len(rows)) for row in rows]
    losses = [share * loss for share, (_, loss, _) in zip(shares, expected, strict=True)]
    for _, loss, grads in found:
        assert max_diff(loss, sum(losses)) < CLOSE  # type: ignore[arg-type]
        for i, grad in enumerate(grads):
            of_rows = [share * of[i] for share, (_, _, of) in zip(shares, expected, strict=True)]
            assert max_diff(grad, sum(of_rows)) < CLOSE  # type: ignore[arg-type]


def keeping(name: str, size: int | None) -> Any:
    """Logits of padded rows, and of packed ones, whose borders each layer is told."""
    group = None if size is None else group_of(size)
    if size is not None and group is None:
        return None
    model = enable(keeping_model(name), group=group)
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in (17, 22)])
    borders = torch.tensor([0, 9, 22])
    with torch.no_grad():
        both = (
            model(input_ids=ids, attention_mask=mask, use_cache=False),
            model(ids[1:], cu_seq_lens_q=borders, cu_seq_lens_k=borders, use_cache=False),
        )
    return [out.logits for out in both]


@pytest.mark.parametrize("name", KEEPING)
def test_layers_that_keep_keywords_from_their_attention(name: str, four: Ranks) -> None:
    found = zip(*results(four, 2, keeping, name, 2), strict=True)
    for parts, expected in zip(found, keeping(name, None), strict=True):
        logits = whole(list(parts), 22, "balanced", 1)
        assert max_diff(logits[-1], expected[-1]) < CLOSE
        assert max_diff(logits[:, 5:], expected[:, 5:]) < CLOSE


def page() -> Any:
    """What docs/distributed.md shows of a model."""
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    given = {"model": family_model(LLAMA), "group": group_of(4), "ids": tokens(1, 24)}
    for block in blocks:
        if "transformers" in block:
            exec(block, given)
    return given["found"].shape[1]


def test_the_page_runs(four: Ranks) -> None:
    assert results(four, 4, page) == [26] * 4


# ----------------------------------------------------------------------------------------- generate


def generate(
    family: str, size: int, inputs: dict[str, Any], arguments: dict[str, Any], order: str
) -> Any:
    model = spread_model(family, size, order=order)
    if model is None:
        return None
    cache = DynamicCache(config=model.config)
    out = generated(
        model, inputs["input_ids"], **inputs_beside(inputs), **arguments, past_key_values=cache
    )
    return out, [layer.keys.shape[2] for layer in cache.layers]


def inputs_beside(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in inputs.items() if name != "input_ids"}


@pytest.mark.parametrize(
    ("size", "family", "order"),
    [
        (2, LLAMA, "balanced"),
        (2, PHI3, "contiguous"),
        (0, LLAMA, "contiguous"),
        (0, PHI3, "balanced"),
    ],
)
def test_generates_the_tokens_of_one_process(
    size: int, family: str, order: str, four: Ranks
) -> None:
    """64 tokens, the switch among them, from keys that each rank has some of."""
    inputs, more = {"input_ids": tokens(1, SWITCH - 9)}, {"max_new_tokens": 64}
    found = results(four, size, generate, family, size, inputs, more, order)
    expected = generated(enable(family_model(family)), **inputs_of(inputs), **more)
    total = expected.shape[1] - 1  # the last one is not put in
    for out, _ in found:
        assert torch.equal(out, expected)
    for held in zip(*(held for _, held in found), strict=True):
        assert sum(held) == total
        assert max(held) - min(held) <= 2


def inputs_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"ids": inputs["input_ids"], **inputs_beside(inputs)}


def test_generates_from_a_short_prompt(four: Ranks) -> None:
    """One that is no more than a step: one rank holds it."""
    inputs = {"input_ids": tokens(1, 3)}
    expected = generated(enable(family_model(PHI3)), **inputs_of(inputs))
    for out, _ in results(four, 4, generate, PHI3, 4, inputs, {}, "balanced"):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("family", [PHI3, "qwen2 sliding"])
def test_generates_for_padded_rows_and_beams(family: str, four: Ranks) -> None:
    rows = [tokens(1, n, seed=n)[0] for n in (3, SWITCH - 4)]
    ids, mask = padded(rows)
    inputs, more = {"input_ids": ids, "attention_mask": mask}, {"num_beams": 2}
    found = results(four, 3, generate, family, 3, inputs, more, "balanced")
    expected = generated(enable(family_model(family)), **inputs_of(inputs), **more)
    for out, _ in found:
        assert torch.equal(out, expected)


def chunks(group_size: int | None) -> Any:
    """Logits of the last token of a prompt, of a chunk, of a step, and of others in their place."""
    model = enable(family_model(PHI3))
    if group_size is not None:
        model = spread_model(PHI3, group_size)
    if model is None:
        return None
    ids, found = tokens(2, 60), []
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop, dropped in ((0, 20, 0), (20, 43, 0), (43, 46, 0), (36, 60, 10)):
            if dropped:
                cache.crop(-dropped)
            out = model(input_ids=ids[:, start:stop], past_key_values=cache)
            found.append(out.logits[:, -1:])
    assert cache.get_seq_length() == 60
    return torch.cat(found, 1)


@pytest.mark.parametrize("size", [2, 0])
def test_chunks_and_dropped_tokens(size: int, four: Ranks) -> None:
    expected = chunks(None)
    for found in results(four, size, chunks, size):
        assert max_diff(found, expected) < CLOSE


def back() -> Any:
    """What `disable` leaves of the group: nothing."""
    model = family_model(PHI3)
    ids = tokens(1, 12)
    before = model(input_ids=ids, labels=ids)
    disable(enable(model, group=group_of(4)))
    after = model(input_ids=ids, labels=ids)
    hooks = [len(model._forward_pre_hooks)]
    hooks += [len(model.model._forward_pre_hooks), len(model.model._forward_hooks)]
    return torch.equal(before.logits, after.logits), torch.equal(before.loss, after.loss), hooks


def test_disable_puts_everything_back(four: Ranks) -> None:
    assert results(four, 4, back) == [(True, True, [0, 0, 0])] * 4
