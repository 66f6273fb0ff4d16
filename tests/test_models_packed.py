"""Packed sequences in enabled models: each is as it is alone, under its own factor set."""

import pytest
import torch
from model_cases import ONE_OF_EACH, SWITCH, family_model, logits, max_diff, tokens
from test_models_forward import true_model
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import enable

CLOSE = 2e-5
LENGTHS = (SWITCH + 8, 10, 1, SWITCH, 3)
TOTAL = sum(LENGTHS)
BORDERS = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0, dtype=torch.int32)
ROWS = [tokens(1, n, seed=n)[0] for n in LENGTHS]
PACKED = torch.cat(ROWS)[None]
RESTARTING = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def alone(name: str, row: torch.Tensor, rope: Rope | None = None) -> torch.Tensor:
    model = true_model(name, rope)
    with torch.no_grad():
        return model(row[None], use_cache=False).logits[0]


def ones() -> dict[str, torch.Tensor]:
    return {"attention_mask": torch.ones_like(PACKED)}


def borders(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS, **more}


WAYS = {
    "positions": lambda: {"position_ids": RESTARTING},
    "positions, no cache": lambda: {"position_ids": RESTARTING, "use_cache": False},
    "positions, ones": lambda: {"position_ids": RESTARTING, **ones()},
    "positions, ones, no cache": lambda: {"position_ids": RESTARTING, "use_cache": False, **ones()},
    "borders": borders,
    "borders, positions": lambda: borders(position_ids=RESTARTING, use_cache=False),
    "borders, as TRL": lambda: borders(position_ids=RESTARTING, max_length_q=40, max_length_k=40),
}


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "mistral sliding", "qwen2 sliding"])
@pytest.mark.parametrize("way", ["positions", "borders"])
def test_each_family(name, way):
    with torch.no_grad():
        actual = enable(family_model(name))(PACKED, **WAYS[way]()).logits[0]
    for row, of_row in zip(ROWS, actual.split(LENGTHS), strict=True):
        assert max_diff(of_row, alone(name, row)) < CLOSE


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_each_way_of_saying_it(way):
    with torch.no_grad():
        actual = enable(family_model("phi3"))(PACKED, **way()).logits[0]
    for row, of_row in zip(ROWS, actual.split(LENGTHS), strict=True):
        assert max_diff(of_row, alone("phi3", row)) < CLOSE


@pytest.mark.parametrize("way", ["positions", "borders"])
def test_thresholds_count_from_each_beginning(way):
    rope = Rope.from_config(family_model("phi3").config, n_hat=6)
    with torch.no_grad():
        actual = enable(family_model("phi3"), rope=rope)(PACKED, **WAYS[way]()).logits[0]
    for row, of_row in zip(ROWS, actual.split(LENGTHS), strict=True):
        assert max_diff(of_row, alone("phi3", row, rope)) < CLOSE


def test_a_collator_of_transformers():
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ROWS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate(features)
    del batch["labels"]
    with torch.no_grad():
        actual = enable(family_model("phi3"))(**batch).logits[0]
    for row, of_row in zip(ROWS, actual.split(LENGTHS), strict=True):
        assert max_diff(of_row, alone("phi3", row)) < CLOSE


def test_rows_of_packed_sequences_with_padding():
    """Padding on the left of one row and on the right of another; each is packed differently."""
    ids, mask = torch.zeros(2, 50, dtype=torch.int64), torch.zeros(2, 50, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    places = [(0, 5, 36), (0, 41, 9), (1, 0, 20), (1, 20, 12), (1, 32, 6)]
    for row, at, n in places:
        ids[row, at : at + n], mask[row, at : at + n] = tokens(1, n, seed=n)[0], 1
        positions[row, at : at + n] = torch.arange(n)
    with torch.no_grad():
        actual = enable(family_model("phi3"))(
            ids, attention_mask=mask, position_ids=positions
        ).logits
    for row, at, n in places:
        expected = alone("phi3", tokens(1, n, seed=n)[0])
        assert max_diff(actual[row, at : at + n], expected) < CLOSE


@pytest.mark.parametrize("way", ["positions", "borders"])
@pytest.mark.parametrize("name", ["phi3", "mistral sliding"])
def test_gradients(name, way):
    """Those of a batch of each sequence alone, under its own set."""
    found = []
    for packed in (False, True):
        model = (enable(family_model(name)) if packed else true_model(name)).train()
        if packed:
            out = model(PACKED, **WAYS[way]()).logits
            out.double().square().sum().backward()
        else:
            for row in ROWS:
                model(row[None], use_cache=False).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    scale = max(float(e.abs().max()) for e in found[0])
    for e, a in zip(*found, strict=True):
        assert max_diff(a, e) <= 2e-5 * scale


def test_skipped_positions_are_borders_where_transformers_says_so():
    """Without a mask and a cache it takes them for packed sequences, with either for one."""
    positions = torch.cat((torch.arange(8), torch.arange(12, 28)))[None]
    for rest in ({"use_cache": False}, {}, {"attention_mask": torch.ones(1, 24)}):
        found = []
        for model in (family_model("phi3"), enable(family_model("phi3"))):
            with torch.no_grad():
                found.append(model(tokens(1), position_ids=positions, **rest).logits)
        assert max_diff(*found) < CLOSE


def test_the_next_token_goes_on_with_the_last_sequence():
    last = tokens(1, 11, seed=5)
    ids = torch.cat((ROWS[0][None], last[:, :10]), 1)
    positions = torch.cat((torch.arange(LENGTHS[0]), torch.arange(10)))[None]
    model = enable(family_model("phi3"))
    with torch.no_grad():
        cache = model(ids, position_ids=positions, use_cache=True).past_key_values
        step = model(last[:, 10:], position_ids=torch.tensor([[10]]), past_key_values=cache)
    assert max_diff(step.logits[0], alone("phi3", last[0])[-1:]) < CLOSE


@pytest.mark.parametrize(
    "arguments", [{}, {"cu_seq_lens_q": BORDERS}], ids=["positions", "borders"]
)
def test_a_static_cache_takes_packed_sequences(arguments):
    model = enable(family_model("phi3"))
    cache = StaticCache(config=model.config, max_cache_len=TOTAL + 9)
    with torch.no_grad():
        given = {"position_ids": RESTARTING, "past_key_values": cache, **arguments}
        actual = model(PACKED, **given).logits[0]
    for row, of_row in zip(ROWS, actual.split(LENGTHS), strict=True):
        assert max_diff(of_row, alone("phi3", row)) < CLOSE


def test_compiled_by_borders():
    torch.compiler.reset()
    model = enable(family_model("phi3"))
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = step(PACKED, **borders(position_ids=RESTARTING, use_cache=False)).logits[0]
    for row, of_row in zip(ROWS, actual.split(LENGTHS), strict=True):
        assert max_diff(of_row, alone("phi3", row)) < CLOSE


@pytest.mark.parametrize("kind", ["alone", "mask of ones", "static cache"])
def test_a_graph_refuses_positions_that_restart(kind):
    """It can't look for borders, and says so without waiting; padding is no border."""
    torch.compiler.reset()
    model = enable(family_model("phi3"))
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")

    def given(**more):
        if kind == "static cache":
            more["past_key_values"] = StaticCache(config=model.config, max_cache_len=TOTAL + 9)
        elif kind == "mask of ones":
            more = {"attention_mask": torch.ones_like(PACKED), "use_cache": False, **more}
        return {"use_cache": False, **more}

    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"position_ids: .*give their borders as cu_seq_le"):
            step(PACKED, position_ids=RESTARTING, **given())
        actual = step(PACKED, position_ids=torch.arange(TOTAL)[None], **given()).logits
        assert max_diff(actual, logits(model, ids=PACKED)) < CLOSE
        if kind == "mask of ones":
            mask = torch.ones_like(PACKED)
            mask[:, :5] = 0
            where = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
            actual = step(PACKED, position_ids=where, **given(attention_mask=mask)).logits
            assert max_diff(actual[:, 5:], logits(model, ids=PACKED[:, 5:])) < CLOSE


REFUSED = {
    "shape": ({"cu_seq_lens_q": BORDERS[None]}, r"cu_seq_lens_q: expected shape .*got \(1, 6\)"),
    "end": ({"cu_seq_lens_q": BORDERS[:-1]}, rf"cu_seq_lens_q: expected {TOTAL} last"),
    "keys": (borders(cu_seq_lens_k=BORDERS[1:]), "cu_seq_lens_k: expected the borders"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_borders_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        enable(family_model("phi3"))(PACKED, **arguments)


def test_borders_behind_keys_of_a_cache():
    model, cache = enable(family_model("phi3")), DynamicCache()
    model(tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected no keys in the cache, got 4"):
        model(PACKED, past_key_values=cache, **borders())


@pytest.mark.parametrize("count", [3, 20])
def test_positions_behind_keys_of_a_cache(count):
    """Where cached keys lie follows from the last token, so that nothing may be skipped."""
    model = enable(family_model("phi3"))
    for turn in (0, 1, 3):  # a restart, one twice, some skipped
        cache, where = DynamicCache(), torch.arange(4, 4 + count)[None].clone()
        where[:, 2:] += turn - where[0, 2] if turn == 0 else turn - 2
        with torch.no_grad():
            model(tokens(1, 4), past_key_values=cache)
            with pytest.raises(ValueError, match=r"position_ids: expected each one more .*cache"):
                model(tokens(1, count), position_ids=where, past_key_values=cache)
