"""Logits of enabled models of every family against untouched ones and against the truth."""

import threading

import pytest
import torch
import truth
from model_cases import (
    FAMILIES,
    ONE_OF_EACH,
    SHARED,
    SWITCH,
    family_config,
    family_model,
    logits,
    max_diff,
    padded,
    tokens,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from longrope_kernels import FactorSet, Rope, decode
from longrope_kernels.backends import choose
from longrope_kernels.calls.records import FEW_QUERIES
from longrope_kernels.integrations.transformers import attention, enable

every_family = pytest.mark.parametrize("name", FAMILIES)
CLOSE = 2e-5  # float32, logits up to 3


class TrueRotary(torch.nn.Module):
    """cos and sin of a rope in float64, the set of each sequence that of its largest position."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sets = truth.token_sets(self.rope, *position_ids.shape, position_ids.amax(1) + 1)
        turns = truth.cos_sin(self.rope, position_ids, sets)
        return tuple(torch.cat((t, t), -1).to(x.dtype).reshape(*sets.shape, -1) for t in turns)


def true_model(name: str, rope: Rope | None = None) -> torch.nn.Module:
    """The untouched model in float64 with exact angles."""
    model = family_model(name, torch.float64)
    model.model.rotary_emb = TrueRotary(Rope.from_config(model.config) if rope is None else rope)
    return model


@every_family
def test_float64_is_the_truth(name):
    for start in (0, 100, 10**6):
        expected = logits(true_model(name), start)
        assert max_diff(logits(enable(family_model(name, torch.float64)), start), expected) < 1e-5


@every_family
def test_logits_are_the_untouched_models(name):
    expected = logits(family_model(name))
    model = enable(family_model(name))
    assert max_diff(logits(model), expected) < CLOSE
    without_order = logits(model, ids=tokens().flip(1)).flip(1)
    assert max_diff(without_order, expected) > 0.1  # rotation matters here: the test can fail


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("phimoe")])
def test_logits_above_the_switch_are_the_untouched_models(name):
    start = 2 * SWITCH
    expected = logits(family_model(name), start)
    assert max_diff(logits(enable(family_model(name)), start), expected) < CLOSE


def test_phimoe_above_the_switch_takes_its_long_factors():
    """transformers from 5.15 on rotates it by the short ones at any length."""
    start = 2 * SWITCH
    config = family_config("phimoe")
    parameters = config.rope_parameters
    long, short = (
        FactorSet(parameters[name], attention_factor=parameters["long_mscale"])
        for name in ("long_factor", "short_factor")
    )
    expected = logits(true_model("phimoe", Rope((long,))), start)
    assert max_diff(logits(enable(family_model("phimoe")), start), expected) < CLOSE
    assert max_diff(logits(true_model("phimoe", Rope((short,))), start), expected) > 0.1


def without_routing(model: torch.nn.Module) -> torch.nn.Module:
    """All tokens to the same experts: choosing one is a step, which no rounding bounds."""
    for name, weight in model.named_parameters():
        if ".router." in name:
            weight.data.zero_()
    return model


@pytest.mark.parametrize("start", [0, 2 * SWITCH])
@every_family
def test_bfloat16_logits_are_within_twice_the_models_own_error(name, start):
    expected = logits(without_routing(true_model(name)), start)
    low = without_routing(family_model(name, torch.bfloat16))
    low.model.rotary_emb = TrueRotary(Rope.from_config(low.config))
    model = enable(without_routing(family_model(name, torch.bfloat16)))
    error = max_diff(logits(model, start), expected)
    assert error <= 2 * max_diff(logits(low, start), expected)


@pytest.mark.parametrize("count", [4096, 4097])
def test_a_whole_forward_at_the_real_switch(count):
    """4096 tokens are short, one more makes all of them long."""
    config = {
        "rope_parameters": family_config("phi3").rope_parameters
        | {"original_max_position_embeddings": 4096},
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 2**17,
    }
    ids = tokens(1, count)
    expected = logits(family_model("phi3", **config), ids=ids)
    actual = logits(enable(family_model("phi3", **config)), ids=ids)
    # The angles of the untouched model are float32 products, wrong by up to 2e-4 rad there.
    assert max_diff(actual, expected) < 2e-3
    rope = Rope.from_config(family_config("phi3", **config))
    other = Rope((rope.sets[count <= 4096],), base=rope.base)
    assert max_diff(logits(enable(family_model("phi3"), rope=other), ids=ids), expected) > 0.1


# ------------------------------------------------------------------------------ padding and caches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "mistral sliding", "qwen2 sliding"])
def test_padded_rows_equal_running_alone(name, side):
    """Rows on both sides of the switch, and a row without padding."""
    rows = [tokens(1, n, seed=n)[0] for n in (10, SWITCH, SWITCH + 1, 45)]
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = enable(family_model(name))
    with torch.no_grad():
        actual = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, of_row, real in zip(rows, actual, mask.bool(), strict=True):
        expected = logits(true_model(name), ids=row[None])[0]
        assert max_diff(of_row[real], expected) < CLOSE


# What callers put at the positions of padding: nothing, one number, or numbers that go on.
RIGHT_POSITIONS = {
    "none": lambda mask: None,
    "ones": lambda mask: (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
    "ascending": lambda mask: torch.arange(mask.shape[1])[None],
}


@pytest.mark.parametrize("positions", RIGHT_POSITIONS.values(), ids=RIGHT_POSITIONS.keys())
def test_right_padding_counts_real_tokens(positions):
    rows = [tokens(1, n, seed=n)[0] for n in (20, SWITCH + 8)]
    ids, mask = padded(rows, "right")
    model = enable(family_model("phi3"))
    with torch.no_grad():
        actual = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    for row, of_row in zip(rows, actual, strict=True):
        assert max_diff(of_row[: len(row)], logits(family_model("phi3"), ids=row[None])[0]) < CLOSE


@pytest.fixture(params=["AMD", None])
def maker(request, monkeypatch):
    """Of the processor, which decides what serves chunks."""
    monkeypatch.setattr(choose, "capability_of", lambda device: request.param)
    monkeypatch.setattr(choose, "wide_vectors", lambda: False)
    return request.param


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("positions", RIGHT_POSITIONS.values(), ids=RIGHT_POSITIONS.keys())
@pytest.mark.parametrize("static", [False, True])
def test_right_padded_rows_in_chunks(positions, static):
    """In the second chunk one row is all padding, in the third two are; the keys stay in place."""
    rows = [tokens(1, n, seed=n)[0] for n in (6, 22, 30)]
    ids, mask = padded(rows, "right")
    model, parts, seen = enable(family_model("phi3")), [], 0
    kind = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    given = positions(mask)
    for size in (10, 18, 2):
        at = slice(seen, seen + size)
        seen += size
        with torch.no_grad():
            out = model(
                ids[:, at],
                attention_mask=mask[:, :seen],
                position_ids=None if given is None else given[:, at],
                past_key_values=kind,
            )
        parts.append(out.logits)
    for row, of_row in zip(rows, torch.cat(parts, 1), strict=True):
        assert max_diff(of_row[: len(row)], logits(family_model("phi3"), ids=row[None])[0]) < CLOSE


CHUNKS = (5, 1, 20, 4)  # by decode and, more than 16 at once, on some processors by attention


@pytest.mark.usefixtures("maker")
@every_family
def test_chunks_into_a_cache_equal_one_forward(name):
    ids = tokens(2, sum(CHUNKS))
    expected = logits(family_model(name), ids=ids)
    model, cache, parts = enable(family_model(name)), None, []
    for part in ids.split(CHUNKS, dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert max_diff(torch.cat(parts, 1), expected) < CLOSE


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_serves_a_chunk(maker, wide, dtype, monkeypatch):
    """Short ones in float32 the kernel that decodes, where it has 512-bit vectors."""
    monkeypatch.setattr(choose, "wide_vectors", lambda: wide)
    few, short = FEW_QUERIES, choose.SHORT_CHUNK
    decoded = []

    def counted(q, *others, **more):
        decoded.append(q.shape[1])
        return decode(q, *others, **more)

    monkeypatch.setattr(attention, "decode", counted)
    model = enable(family_model("llama", num_hidden_layers=1, max_position_embeddings=512)).to(
        dtype
    )
    cache, lengths = DynamicCache(), [20, few, few, few + 1, short, short + 1]
    with torch.no_grad():
        for length in lengths:
            model(tokens(1, length), past_key_values=cache)
    most = max(lengths) if maker == "AMD" else short if wide and dtype == torch.float32 else few
    assert decoded == [length for length in lengths[1:] if length <= most]


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("name", ["phi3", "mistral sliding", "qwen2 sliding"])
def test_chunks_of_left_padded_rows(name):
    rows = [tokens(1, n, seed=n)[0] for n in (12, 30)]
    ids, mask = padded(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model, cache, parts, seen = enable(family_model(name)), None, [], 0
    for size in (20, 1, 9):
        at = slice(seen, seen + size)
        seen += size
        with torch.no_grad():
            out = model(
                ids[:, at],
                attention_mask=mask[:, :seen],
                position_ids=positions[:, at],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        parts.append(out.logits)
    for row, of_row in zip(rows, torch.cat(parts, 1), strict=True):
        expected = logits(family_model(name), ids=row[None])[0]
        assert max_diff(of_row[-len(row) :], expected) < CLOSE


def test_inference_mode():
    expected = logits(family_model("phi3"))
    with torch.inference_mode():
        assert max_diff(enable(family_model("phi3"))(tokens()).logits, expected) < CLOSE


def test_positions_written_in_place_between_forwards_are_read_anew():
    """As a captured CUDA graph is fed, and what the layers share must not outlive its forward."""
    model, positions = enable(family_model("phi3")), torch.arange(24)[None].clone()
    with torch.no_grad():
        first = model(tokens(), position_ids=positions, use_cache=False).logits
        positions += 2 * SWITCH
        second = model(tokens(), position_ids=positions, use_cache=False).logits
    assert max_diff(first, logits(family_model("phi3"))) < CLOSE
    assert max_diff(second, logits(family_model("phi3"), 2 * SWITCH)) < CLOSE


def test_two_threads_call_one_model_at_once():
    """The second from beginning to end between a rotation of the first and its attention."""
    model, ids, found = enable(family_model("llama")), tokens(2, 24), []
    cache, waits = DynamicCache(config=model.config), [True]
    rotated, other_is_done = threading.Event(), threading.Event()
    update = cache.update

    def slow_update(*args, **kwargs):
        if waits and waits.pop():
            rotated.set()
            other_is_done.wait(60)
        return update(*args, **kwargs)

    def run():
        with torch.no_grad():
            found.append(model(ids[:1], past_key_values=cache).logits)

    cache.update = slow_update
    thread = threading.Thread(target=run)
    thread.start()
    assert rotated.wait(60)
    expected = logits(family_model("llama"), ids=ids)
    assert max_diff(logits(model, ids=ids[1:]), expected[1:]) < CLOSE
    other_is_done.set()
    thread.join()
    assert max_diff(found[0], expected[:1]) < CLOSE


def test_a_forward_that_ended_before_its_attention_leaves_nothing():
    """Not its rope either, to a first layer without rotation."""
    config = AutoConfig.for_model("smollm3", **SHARED, no_rope_layers=[0, 1])
    model = enable(AutoModelForCausalLM.from_config(config).eval())
    expected = logits(model)
    ends = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "output_attentions": True}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="output_attentions"):
        logits(model)
    ends.remove()
    assert torch.equal(logits(model), expected)


def test_a_graph_that_ends_between_rotation_and_attention():
    torch.compiler.reset()
    model, cache = enable(family_model("phi3")), DynamicCache(config=family_config("phi3"))
    cache.update = torch.compiler.disable(cache.update)
    step = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        actual = step(tokens(), past_key_values=cache).logits
    assert max_diff(actual, logits(family_model("phi3"))) < CLOSE


@pytest.mark.parametrize("padding", [0, 2])
def test_an_exported_forward_of_few_tokens_and_of_many(padding):
    """How many decides nothing where there is no cache."""
    model = enable(family_model("phi3"))

    def of(count):
        mask = torch.ones(2, count, dtype=torch.int64)
        mask[0, :padding] = 0
        return {"input_ids": tokens(2, count), "attention_mask": mask, "use_cache": False}

    length = {1: torch.export.Dim("length", min=3, max=64)}
    shapes = {"input_ids": length, "attention_mask": length, "use_cache": None}
    with torch.no_grad():
        step = torch.export.export(model, (), of(20), dynamic_shapes=shapes, strict=False).module()
        for count in (3, FEW_QUERIES, FEW_QUERIES + 1, SWITCH + 8):
            actual, expected = step(**of(count)).logits, model(**of(count)).logits
            assert max_diff(actual[0, padding:], expected[0, padding:]) < CLOSE
            assert max_diff(actual[1], expected[1]) < CLOSE


COMPILED = [
    ("unrotated", None),
    ("unrotated", True),
    ("rotated", None),
    ("rotated", False),
    pytest.param("unrotated", False, marks=pytest.mark.full),
    pytest.param("rotated", True, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("cache", "dynamic"), COMPILED)
def test_compiled_forwards_of_several_lengths(cache, dynamic):
    """Without a graph break, on both sides of the switch."""
    torch.compiler.reset()
    model = enable(family_model("phi3"), cache=cache)
    step = torch.compile(model.forward, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # A graph of its own for each length where none is dynamic.
    for count in (SWITCH, SWITCH + 1) if dynamic is False else (20, SWITCH, SWITCH + 1, 50):
        ids = tokens(2, count, seed=count)
        with torch.no_grad():
            actual = step(ids, use_cache=False).logits
        assert max_diff(actual, logits(family_model("phi3"), ids=ids)) < CLOSE
