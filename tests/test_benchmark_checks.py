"""What benchmarks/ checks before it times: right rows pass, rows that are a little wrong do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from benchmark_modules import (
    WrongResultError,
    decode_rows,
    decodes,
    forget_inputs,
    model_rows,
    model_truth,
    models,
    parameters,
    ropes,
)

from longrope_kernels import Rope, decode

# -------------------------------------------------------------------------------------- decoding

FEW_HEADS = parameters.Geometry("few heads", 2, 1, 32, 32)
TRITON = [name for name in decodes.NAMES if name.startswith("triton")]
FLOAT8 = [name for name in TRITON if decodes.kind_of(name) == "float8"]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two sequences, on both sides of a switch at 32 tokens."""
    short_rope = Rope.longrope(
        **ropes.factor_sets(32), original_max_position_embeddings=32, attention_factor=1.0
    )
    monkeypatch.setattr(decodes, "rope", lambda rotated: short_rope)
    forget_inputs()
    shape = decodes.Shape((40, 24), torch.bfloat16, FEW_HEADS)
    yield decodes.make_copies(shape).all[0]
    forget_inputs()


def test_each_kind_of_cache_has_the_same_kernel_on_rotated_keys() -> None:
    kinds = [decodes.kind_of(name) for name in decodes.NO_ROTATION.values()]
    assert kinds == [decodes.kind_of(name) for name in decodes.NO_ROTATION] == list(decodes.KINDS)
    shape = decodes.Shape((100, 50), torch.bfloat16)
    for rotating, rotated in decodes.NO_ROTATION.items():
        assert rotating in decodes.OURS
        # Before it, so that the row that rotates can be told against it.
        assert decodes.NAMES.index(rotated) < decodes.NAMES.index(rotating)
        assert shape.traffic(rotated) == shape.traffic(rotating)
        assert decodes.serves(rotated, shape)
        assert not decodes.serves(rotated, shape._replace(dtype=torch.float32))
    assert shape.traffic("triton, paged float8") < 0.6 * shape.traffic("triton, paged")


@pytest.mark.parametrize("name", TRITON)
def test_right_rows_of_each_cache_pass(step: Any, name: str) -> None:
    run, arguments = decode_rows._prepared(name, step)
    assert run(*arguments()).shape == step.q.shape


def test_rows_on_rotated_keys_rotate_nothing(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope_kernels.backends.triton import decode as triton_decode

    seen: list[Any] = []
    monkeypatch.setattr(triton_decode, "decode", lambda *given: seen.append(given))
    for name in decodes.NO_ROTATION.values():
        decodes.implementation(name, step)()
    for (call, *_), kind in zip(seen, decodes.KINDS, strict=True):
        cache = call.keys
        assert call.tables.pairs == 0
        assert (cache.block_table is not None) == (kind != "dense")
        assert (cache.k.dtype == torch.float8_e4m3fn) == (kind == "float8")


def _by_reference(inputs: Any, name: str, **changes: Any) -> torch.Tensor:
    """What a row would return that is wrong in one way, in float32 on the cache that it reads."""
    of = inputs.cache(decodes.kind_of(name), inputs.k)
    q, k, v = inputs.q.float(), of.k.float(), of.v.float()
    given = {"block_table": of.block_table, "backend": "reference", **changes}
    lens = given.pop("lens", of.lens)
    out = decode(q, k, v, lens, given.pop("rope", inputs.rope), **given)
    assert isinstance(out, torch.Tensor)
    return out.to(inputs.q.dtype)


WRONG: dict[str, Callable[[Any], dict[str, Any]]] = {
    "the short set for all": lambda inputs: {"sets": torch.zeros_like(inputs.lens)},
    "the long set for all": lambda inputs: {"sets": torch.ones_like(inputs.lens)},
    "half of the keys": lambda inputs: {"window": 20},
    "without the last key": lambda inputs: {"lens": inputs.lens - 1, "lengths": inputs.lens},
    "plain RoPE": lambda inputs: {"rope": Rope.plain(32)},
}


@pytest.mark.parametrize("name", ["triton", "triton, paged float8"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_step_that_is_wrong_in_one_way_fails(
    step: Any, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str
) -> None:
    def implementation(name: str, inputs: Any) -> Callable[[], torch.Tensor]:
        return lambda: _by_reference(inputs, name, **changes)

    monkeypatch.setattr(decode_rows, "implementation", implementation)
    changes: dict[str, Any] = {}
    decode_rows._prepared(name, step)
    changes = WRONG[wrong](step)
    with pytest.raises(WrongResultError, match=f"{name}, sequence [01]: error"):
        decode_rows._prepared(name, step)


@pytest.mark.parametrize("name", list(decodes.NO_ROTATION.values()))
def test_a_row_on_rotated_keys_that_rotates_again_fails(
    step: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    q, k = step.rotated
    of = step.cache(decodes.kind_of(name), k)

    def row(positions: torch.Tensor | None) -> Callable[..., Any]:
        given = {"block_table": of.block_table, "key_positions": positions}
        keys_and_values = of.k.float(), of.v.float()
        out = decode(q.float(), *keys_and_values, of.lens, step.rope, backend="reference", **given)
        assert isinstance(out, torch.Tensor)
        return lambda *_: lambda: out.to(q.dtype)

    at_zero = torch.zeros_like(k[..., 0, 0], dtype=torch.int64)
    monkeypatch.setattr(decode_rows, "implementation", row(at_zero))
    decode_rows._prepared(name, step)  # there nothing turns
    monkeypatch.setattr(decode_rows, "implementation", row(None))
    with pytest.raises(WrongResultError, match=f"{name}, sequence [01]: error"):
        decode_rows._prepared(name, step)


def test_a_float8_row_does_not_answer_for_the_rounding_of_its_cache(step: Any) -> None:
    exact, rounded = step.truth, step.truth_of_float8
    error = float((exact - rounded).abs().max() / exact.abs().max())
    assert error > decodes.allowed(FLOAT8[-1], step)
    assert decodes.allowed(FLOAT8[-1], step) == decodes.allowed("triton, paged", step)


def test_a_sequence_is_told_by_its_own_largest_value() -> None:
    right = torch.tensor([[100.0, 50.0], [1.0, 0.5]], dtype=torch.float64)
    found = right + torch.tensor([[0.0, 0.0], [0.0, 0.05]])
    ropes.assert_right("a", "out", found, right, 0.01)
    ropes.assert_each_right("a", "row", found, right, 0.051)
    with pytest.raises(WrongResultError, match=r"a, row 1: error 5\.0e-02"):
        ropes.assert_each_right("a", "row", found, right, 0.049)
    with pytest.raises(WrongResultError, match="expected"):
        ropes.assert_each_right("a", "row", found[:1], right, 1.0)


# ---------------------------------------------------------------------------------------- models

SMALL = models.SMALL_SWITCH
AT = models.Step(models.KINDS[2], SMALL)
STEPS = [
    models.Step("forward", 20),
    models.Step("forward", SMALL),
    models.Step(models.KINDS[1], SMALL - 2),
    AT,
    models.Step("generate", SMALL - models.NEW // 2),
]


@pytest.mark.parametrize("at", STEPS, ids=str)
def test_right_models_pass(at: Any) -> None:
    for name in ("transformers", "enabled, rotated", "enabled, switch"):
        # Before 5.20 transformers' generate() goes on from one token at the switch.
        if models.serves(name, at) and (at.kind, name) != ("generate", "transformers"):
            model_rows.check(name, at, models.step(name, at, False)(), False)


@pytest.mark.parametrize("tokens", [40, SMALL + 3])
def test_the_truth_of_a_model_is_its_own_in_float64(tokens: int) -> None:
    of = copy.deepcopy(models.model("transformers", False)).double()
    with torch.no_grad():
        right = of(models.ids(tokens), use_cache=False).logits
    for first in (0, tokens - 1):
        found = model_truth.logits("transformers", models.ids(tokens), first, False)
        if tokens > SMALL:  # of the others the short set is right
            found = found[:, max(0, SMALL - first) :]
        assert found.dtype == torch.float64
        expected = right[:, -found.shape[1] :]
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


@pytest.mark.parametrize("name", ["transformers", "enabled, rotated", "enabled, switch"])
def test_what_a_model_says_at_the_switch_by_other_factors_fails(name: str) -> None:
    ids = models.ids(SMALL + 1)
    said = {
        "short": model_truth.extend(model_truth.Past(), ids, SMALL, False)[1][:, -1:],
        "switch": model_truth.logits("enabled, switch", ids, SMALL, False),
        "long": model_truth.logits("transformers", ids, SMALL, False),
    }
    right = "switch" if name == "enabled, switch" else "long"
    for factors, logits in said.items():
        if factors == right:
            model_rows.check(name, AT, logits, False)
        else:
            with pytest.raises(WrongResultError, match="logits: error"):
                model_rows.check(name, AT, logits, False)


def test_a_prefix_takes_the_set_of_the_whole() -> None:
    """The cached part of the truth is no other than what would come without it."""
    ids = models.ids(SMALL + 2)
    whole = model_truth.extend(model_truth.Past(), ids, SMALL + 2, False)[1]
    found = model_truth.logits("enabled, rotated", ids, SMALL, False)
    assert torch.allclose(found, whole[:, SMALL:], atol=1e-12)


@pytest.mark.parametrize("index", [0, models.NEW // 2 + 3])
def test_another_token_than_the_best_fails(index: int) -> None:
    at = STEPS[-1]
    ids = models.step("enabled, rotated", at, False)()
    ids[:, at.tokens + index] = (ids[:, at.tokens + index] + 1) % 512
    with pytest.raises(WrongResultError, match="tokens: error"):
        model_rows.check("enabled, rotated", at, ids, False)


def test_what_steps_of_a_model_have_to_do() -> None:
    weights = sum(p.numel() for p in models.model("transformers", False).model.layers.parameters())
    cached = 2 * 2 * 4 * 96  # numbers of a token: keys and values of two layers, four heads of 96
    size = models.DTYPE.itemsize

    def amounts(name: str, at: Any) -> tuple[int, int]:
        return models.amounts(name, at, False)

    forward, _, below, _, generate = STEPS
    assert amounts("transformers", forward) == (size * weights, 2 * weights * 20)
    once = size * (weights + cached * (SMALL - 1)), 2 * weights
    assert amounts("enabled, switch", below) == amounts("transformers", below) == once
    once = size * (weights + cached * (SMALL + 1)), 2 * weights
    assert amounts("enabled, switch", AT) == once
    assert amounts("enabled, rotated", AT) == (once[0], (SMALL + 1) * once[1])
    # 16 forwards; the ninth, of 64 tokens in the cache, is the one that prefills again.
    assert models.forwards("enabled, switch", generate, False) == [
        (56, 0),
        *((1, n) for n in range(56, 71)),
    ]
    again = models.forwards("transformers", generate, False)
    assert [run for run in again if run[1] == 0] == [(56, 0), (SMALL + 1, 0)]
    assert len(again) == models.NEW
