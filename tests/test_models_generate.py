"""generate() of enabled models: every way of decoding, padding, caches, and the switch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from model_cases import (
    ONE_OF_EACH,
    SWITCH,
    family_config,
    family_model,
    generated,
    logits,
    max_diff,
    padded,
    tokens,
)
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import enable, set_rope

CLOSE = 2e-5
SLIDING = ("phi3 sliding", "phimoe sliding", "mistral sliding", "qwen2 sliding", "qwen3 sliding")


def left_padded(*lengths: int) -> dict[str, torch.Tensor]:
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


def scored(model: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens of greedy decoding (batch, new), and their logits (batch, new, vocabulary)."""
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **arguments}
    out = model.generate(**arguments, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, arguments["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward of the base model takes."""
    counts: list[int] = []

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].shape[1])

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


def forced(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of tokens one by one through a cache, after a prefill of ``first`` tokens."""
    cache, parts = None, []
    for part in ids.split([first] + [1] * (ids.shape[1] - first), dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


# -------------------------------------------------------------------------------- below the switch

WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampled twice": {"do_sample": True, "num_return_sequences": 2},
    # With an end of the text, without which transformers before 5.13 fails.
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},
}


@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("name", ["phi3", "mistral sliding", "qwen2 sliding"])
def test_the_same_tokens_as_the_untouched_model(name, arguments):
    ids = tokens(1, 20)
    expected = generated(family_model(name), ids, **arguments)
    assert torch.equal(generated(enable(family_model(name)), ids, **arguments), expected)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *SLIDING])
def test_left_padded_batch(name):
    batch = left_padded(6, 20, 24)
    expected = scored(family_model(name), **batch)
    actual = scored(enable(family_model(name)), **batch)
    assert torch.equal(actual[0], expected[0])
    assert max_diff(actual[1], expected[1]) < CLOSE


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_static_cache(name):
    batch = left_padded(6, 20)
    expected = scored(family_model(name), **batch)
    model = enable(family_model(name))
    actual = scored(model, **batch, cache_implementation="static")
    assert torch.equal(actual[0], expected[0])
    assert max_diff(actual[1], expected[1]) < CLOSE


def test_assisted():
    """Candidates are checked several at a time, the refused ones cut off the cache."""
    ids = tokens(1, SWITCH - 8)
    model = enable(family_model("phi3"))
    expected = generated(model, ids, max_new_tokens=6)
    for helper in (family_model("phi3", num_hidden_layers=1), family_model("phi3 sliding")):
        with counted(model) as counts:
            actual = generated(model, ids, max_new_tokens=6, assistant_model=enable(helper))
        assert torch.equal(actual, expected)
        assert max(counts[1:]) > 1


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["phi3", "phimoe", "llama"])
def test_from_embeddings(name, arguments):
    """In a batch with padding; below the switch as the untouched model, by beams as well."""
    batch = left_padded(6, 20)
    mask = batch["attention_mask"]
    model = family_model(name)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    rest = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = family_model(name).generate(inputs_embeds=embeds, **rest, **more)
        actual = enable(family_model(name)).generate(
            inputs_embeds=embeds, **rest, **more, **arguments
        )
        assert torch.equal(actual, expected)


# ----------------------------------------------------------------------------- across the switch


@pytest.mark.parametrize("seed", range(6))
def test_drafts_across_the_switch(seed):
    """Verified together, each under the set of its own length: the tokens of plain greedy."""
    model, helper = (enable(family_model("phi3")) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.lm_head.weight[0] = helper.lm_head.weight[0] = 0  # padding is never generated
        for weight in helper.parameters():
            weight.add_(0.003 * torch.randn(weight.shape, generator=generator))
    ids = tokens(1, SWITCH - 10, seed=seed)
    expected = generated(model, ids, max_new_tokens=20)
    with counted(model) as counts:
        actual = generated(model, ids, max_new_tokens=20, assistant_model=helper)
    assert torch.equal(actual, expected)
    assert max(counts[1:]) > 1


def test_many_drafts_by_a_rope_for_the_final_length():
    """Those that come with the prompt, or more than 16 of them, are all under one set there."""
    model, helper = (enable(family_model("phi3")) for _ in range(2))
    with torch.no_grad():
        model.lm_head.weight[0] = helper.lm_head.weight[0] = 0
        helper.lm_head.weight.mul_(20)  # sure of its drafts: it makes all it may
    ids = tokens(1, SWITCH - 10)
    set_rope(model, Rope.from_config(model.config).for_length(SWITCH + 20))
    expected = generated(model, ids, max_new_tokens=30)
    with counted(model) as counts:
        actual = generated(model, ids, max_new_tokens=30, assistant_model=helper)
    assert torch.equal(actual, expected)
    assert counts[0] > SWITCH


@pytest.mark.parametrize("padded_rows", [False, True])
def test_only_the_new_tokens(padded_rows):
    """A turn whose ids are the new tokens alone, and whose mask is of all."""
    lengths = (22, 25) if padded_rows else (25, 25)
    batch = left_padded(*lengths)
    ids, mask, new = batch["input_ids"], batch["attention_mask"], tokens(2, 3, seed=4)
    model = enable(family_model("phi3"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    full = torch.cat((mask, torch.ones_like(new)), 1)
    rest = {"attention_mask": full, "past_key_values": cache, "max_new_tokens": 4}
    actual = generated(model, new, **rest)[:, -4:]
    for row, length in enumerate(lengths):
        whole = torch.cat((tokens(1, length, seed=length), new[row : row + 1]), 1)
        expected = generated(family_model("phi3"), whole, max_new_tokens=4)[:, -4:]
        assert torch.equal(actual[row : row + 1], expected)


def test_switch_is_a_new_prefill_where_one_layer_has_all_the_keys():
    """Keys of the first layer are made of embeddings, which no set has touched."""
    ids = tokens(1, SWITCH - 3)
    one = {"num_hidden_layers": 1}
    expected = scored(family_model("phi3", **one), input_ids=ids, use_cache=False)
    model = enable(family_model("phi3", **one))
    actual = scored(model, input_ids=ids)
    assert torch.equal(actual[0], expected[0])
    assert max_diff(actual[1], expected[1]) < CLOSE


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}], ids=str)
def test_nothing_is_prefilled_again(arguments):
    """Phi-3's own generate() drops the cache there."""
    model = enable(family_model("phi3"))
    with counted(model) as counts:
        generated(model, tokens(1, SWITCH - 3), **arguments)
    assert counts == [SWITCH - 3] + [1] * 7


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_a_rope_for_the_final_length_never_crosses(name):
    """As the untouched model of the long set alone, which runs a short prompt under it, too."""
    ids = tokens(1, SWITCH - 3)
    rope = Rope.from_config(family_config(name))
    long = rope.for_length(SWITCH + 5)
    expected = generated(enable(family_model(name), rope=Rope(rope.sets[1:])), ids)
    assert torch.equal(generated(enable(family_model(name), rope=long), ids), expected)
    model = enable(family_model(name))
    for around in (long, rope.for_length(SWITCH), rope):
        set_rope(model, around)
        alone = generated(enable(family_model(name), rope=around), ids)
        assert torch.equal(generated(model, ids), alone)
        assert torch.equal(alone, expected) == (around is long)


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}], ids=str)
def test_rows_that_cross_at_different_steps_equal_running_alone(arguments):
    """Always short, crossing at the second and at the sixth new token, long from the start."""
    lengths = (SWITCH - 20, SWITCH - 1, SWITCH - 5, SWITCH + 4)
    model = enable(family_model("phi3"))
    ids, values = scored(model, **left_padded(*lengths), **arguments)
    for length, its_ids, its_values in zip(lengths, ids, values, strict=True):
        alone = scored(model, input_ids=tokens(1, length, seed=length), **arguments)
        assert torch.equal(its_ids[None], alone[0])
        assert max_diff(its_values[None], alone[1]) < CLOSE


@pytest.mark.parametrize("name", ["phi3", "phimoe", "phi3 partial", "phi3 sliding"])
def test_beams_cross_together(name):
    """Reordering permutes the beams of a prompt, which have the same set."""
    model = enable(family_model(name))
    ids = tokens(2, SWITCH - 3)
    beams = generated(model, ids, num_beams=3)
    assert beams.shape == (2, SWITCH + 5)
    for row in range(2):
        alone = generated(model, ids[row : row + 1], num_beams=3)
        assert torch.equal(beams[row : row + 1], alone)


# ------------------------------------------------------------------------------ caches of the user


def test_turns_of_a_chat_share_a_cache():
    """The second turn goes on where the first left off, on the other side of the switch."""
    model = enable(family_model("phi3"))
    first, second = tokens(1, 20), tokens(1, 18, seed=5)
    cache = DynamicCache(config=model.config)
    with counted(model) as counts:
        answer = generated(model, first, past_key_values=cache, max_new_tokens=4)
        whole = torch.cat((answer, second), 1)
        generated(model, whole, past_key_values=cache, max_new_tokens=4)
    assert counts == [20, 1, 1, 1, 19, 1, 1, 1]


def test_a_cropped_cache_goes_on():
    model, ids = enable(family_model("phi3")), tokens(1, 24)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-4)
        actual = model(ids[:, 20:], past_key_values=cache).logits
    assert max_diff(actual, logits(family_model("phi3"))[:1, 20:]) < CLOSE


# -------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", ["phi3", "qwen2"])
def test_compiled_decode_steps_cross_without_recompilation(name):
    torch.compiler.reset()
    ids, prompt = tokens(2, SWITCH + 6), SWITCH - 4
    model = enable(family_model(name))
    expected = forced(model, ids, prompt)
    cache = StaticCache(config=model.config, max_cache_len=SWITCH + 8)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        for at in range(prompt, ids.shape[1]):
            positions = torch.full((1, 1), at)
            stance = "default" if at == prompt else "fail_on_recompile"
            with torch.compiler.set_stance(stance):
                out = step(ids[:, at : at + 1], past_key_values=cache, position_ids=positions)
            assert max_diff(out.logits[:, 0], expected[:, at]) < CLOSE


def test_compiled_prefill_of_a_static_cache():
    torch.compiler.reset()
    batch = left_padded(20, 30)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = enable(family_model("phi3"))
    cache = StaticCache(config=model.config, max_cache_len=40)
    cache.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
    for row, count in enumerate((20, 30)):
        expected = logits(family_model("phi3"), ids=tokens(1, count, seed=count))[0]
        assert max_diff(actual[row, -count:], expected) < CLOSE


def test_continuous_batching_with_one_factor_set():
    """Sequences in one forward share its set, and their keys stay: several sets are refused."""
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, SWITCH - 2)]
    settings = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)

    def batched(model: Any) -> list[Any]:
        arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        config = GenerationConfig(eos_token_id=-1, **arguments)
        out = model.generate_batch(prompts, config, settings, warmup=False)
        return [out[name] for name in sorted(out)]

    one = enable(family_model("llama"), cache="rotated")
    alone = [generated(one, torch.tensor([prompt]), max_new_tokens=6)[0] for prompt in prompts]
    for prompt, whole, found in zip(prompts, alone, batched(one), strict=True):
        assert found.generated_tokens == whole[len(prompt) :].tolist()
    for found in batched(enable(family_model("phi3"), cache="rotated")):
        assert not found.generated_tokens
        assert "generate_batch: expected a rope of one factor set" in found.error
