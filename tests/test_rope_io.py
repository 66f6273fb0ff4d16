"""A `Rope` to configs, files and arrays and back: exact, or an error that says why not."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope_kernels import FactorSet, Rope
from longrope_kernels.rope import scaling
from longrope_kernels.rope.published import published_configs
from longrope_kernels.rope.scaling import FactorWarning

quiet = pytest.mark.filterwarnings("ignore::longrope_kernels.rope.scaling.FactorWarning")
PUBLISHED = sorted(published_configs())
SHORT, LONG = (1.0, 1.1, 1.3), (1.0, 2.5, 7.0 / 3.0 + 2)
TWO = Rope((FactorSet(SHORT, 0, 1.1, 4096), FactorSet(LONG, 0, 1.1)), base=5e5)

numbers = st.floats(1e-3, 1e3)
n_hats = st.integers(0, 2**31 - 1)


@st.composite
def ropes(draw: st.DrawFn, counts: tuple[int, ...] = (1, 2, 3)) -> Rope:
    pairs, count = draw(st.integers(1, 5)), draw(st.sampled_from(counts))
    bounds = sorted(draw(st.sets(st.integers(2, 2**31), min_size=count - 1, max_size=count - 1)))
    sets = []
    for bound in [*bounds, None]:
        factors = draw(st.lists(numbers, min_size=pairs, max_size=pairs))
        sets.append(FactorSet(factors, draw(n_hats), draw(numbers), bound))
    return Rope(tuple(sets), draw(st.floats(1.5, 1e7)), draw(st.booleans()))


# ----------------------------------------------------------------------------------------- configs


@quiet
@given(ropes((2,)), st.sampled_from([4, 5]), st.sampled_from([0, 1, 2, 57]))
def test_two_sets_through_a_config(rope: Rope, version: int, more: int) -> None:
    """Exactly, thresholds and unequal attention factors included, and through JSON text."""
    rope = replace(rope, interleaved=False)
    fields = rope.to_config(version=version, head_dim=rope.rotary_dim + more)
    assert Rope.from_config(json.loads(json.dumps(fields))) == rope


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "rope",
    [
        Rope.plain(6),
        Rope.plain(6, base=5e5),
        scaling.linear(6, 7.3, base=5e5),
        scaling.linear(6, 7.3, n_hat=9),
        Rope(FactorSet((1.0, 1.0, 1.0), 9)),
    ],
    ids=["plain", "base", "linear", "linear-n_hat", "plain-n_hat"],
)
def test_one_even_set_through_a_config(rope: Rope, version: int) -> None:
    fields = rope.to_config(version=version, head_dim=8)
    assert Rope.from_config(fields) == rope


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "rope",
    [
        scaling.yarn(16, 4.0, 64),
        scaling.ntk_aware(16, 4.0, n_hat=3),
        scaling.llama3(16, 8, 1, 4, 64),
        Rope(FactorSet((2.0, 2.0), attention_factor=1.5)),
        Rope(FactorSet((1.0, 1.0), attention_factor=1.5)),
    ],
    ids=["yarn", "ntk", "llama3", "linear-a", "plain-a"],
)
def test_another_single_set_stands_in_both_lists(rope: Rope, version: int) -> None:
    fields = rope.to_config(version=version, original_max_position_embeddings=64)
    (only,) = rope.sets
    assert Rope.from_config(fields) == Rope((replace(only, max_length=64), only), rope.base)


def test_the_fields_of_transformers_5() -> None:
    assert TWO.to_config(head_dim=8) == {
        "rope_scaling": None,
        "head_dim": 8,
        "longrope_n_hat": None,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5e5,
            "partial_rotary_factor": 0.75,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
            "attention_factor": 1.1,
            "original_max_position_embeddings": 4096,
        },
    }
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert Rope.plain(8).to_config() == {"rope_scaling": None, "longrope_n_hat": None, **plain}


def test_the_fields_of_transformers_4() -> None:
    rope = Rope.longrope(SHORT, LONG, 4096, 131072, n_hat=(0, 4))
    assert rope.to_config(version=4, max_position_embeddings=131072) == {
        "rope_parameters": None,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "longrope_n_hat": [0, 4],
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
    }
    assert rope.to_config(version=4)["rope_scaling"]["attention_factor"] == math.sqrt(
        1 + math.log(32) / math.log(4096)
    )
    assert Rope.plain(8).to_config(version=4) == {
        "rope_parameters": None,
        "longrope_n_hat": None,
        "rope_theta": 1e4,
        "rope_scaling": None,
    }


@pytest.mark.parametrize("n_hat", [0, 7, (0, 4)])
@pytest.mark.parametrize("before", [4, 5])
@pytest.mark.parametrize("version", [4, 5])
def test_merged_into_a_config_of_another_rope(version: int, before: int, n_hat: Any) -> None:
    old = Rope.longrope(LONG, LONG, 2048, 65536, n_hat=(3, 5), base=1e6)
    sizes = {"head_dim": 6, "max_position_embeddings": 131072}
    config = old.to_config(version=before, **sizes)
    ropes = [Rope.longrope(SHORT, LONG, 4096, 131072, n_hat=n_hat)]
    if not isinstance(n_hat, tuple):
        ropes += [Rope.plain(6), scaling.linear(6, 2.0, n_hat=n_hat)]
    for rope in ropes:
        fields = rope.to_config(version=version, **sizes)
        assert Rope.from_config({**config, **fields}) == rope
        object_ = LlamaConfig(**copy.deepcopy(config), num_hidden_layers=1)
        object_.update(copy.deepcopy(fields))
        assert Rope.from_config(object_) == rope


def test_unequal_attention_factors_are_the_mscales() -> None:
    rope = Rope((replace(TWO.sets[0], attention_factor=1.0), TWO.sets[1]))
    parameters = rope.to_config()["rope_parameters"]
    assert (parameters["short_mscale"], parameters["long_mscale"]) == (1.0, 1.1)
    assert "attention_factor" not in parameters


@pytest.mark.parametrize("head_dim", range(6, 300, 7))
def test_partial_rotary_factor_gives_the_rotary_dimensions(head_dim: int) -> None:
    for rotary_dim in range(2, head_dim + 1, 2):
        fields = Rope.plain(rotary_dim).to_config(head_dim=head_dim)
        share = fields["rope_parameters"]["partial_rotary_factor"]
        assert int(head_dim * share) == rotary_dim


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_written_as_it_was(name: str) -> None:
    published = published_configs()[name]
    rope = Rope.from_config(published)
    fields = rope.to_config(
        version=4,
        head_dim=published["head_dim"],
        max_position_embeddings=published["max_position_embeddings"],
    )
    assert fields == {field: published.get(field) for field in fields}


@pytest.mark.parametrize("n_hat", [0, 4, (0, 4)])
@pytest.mark.parametrize("version", [4, 5])
def test_phi3_keeps_what_is_written(version: int, n_hat: Any, tmp_path: Path) -> None:
    """Through the config class and its file, threshold included; and it computes the same."""
    rope = Rope.from_config(published_configs()["phi-4-mini"], n_hat=n_hat)
    fields = rope.to_config(version=version, head_dim=128, max_position_embeddings=131072)
    config = Phi3Config(
        **copy.deepcopy(fields), hidden_size=3072, num_attention_heads=24, num_hidden_layers=1
    )
    config.save_pretrained(tmp_path)
    again = Phi3Config.from_pretrained(tmp_path)
    for read in (config, again, json.loads((tmp_path / "config.json").read_text("utf-8"))):
        assert Rope.from_config(read) == rope
    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](again, seq_len=4097)
    assert attention_factor == rope.sets[1].attention_factor


def test_llama_keeps_what_is_written(tmp_path: Path) -> None:
    rope = scaling.linear(64, 4.0, n_hat=7)
    LlamaConfig(**rope.to_config(head_dim=64), num_hidden_layers=1).save_pretrained(tmp_path)
    assert Rope.from_config(LlamaConfig.from_pretrained(tmp_path)) == rope


ORIGINAL = "original_max_position_embeddings"
BAD_CONFIGS: list[tuple[str, Rope, dict[str, Any]]] = [
    ("version", TWO, {"version": 3}),
    ("interleaved", Rope.plain(6, interleaved=True), {}),
    ("sets", Rope((FactorSet((1.0,), max_length=4), FactorSet((1.0,), max_length=8))), {}),
    ("sets", Rope(tuple(FactorSet((1.0,), max_length=n) for n in (4, 8, None))), {}),
    ("sets", scaling.dynamic_ntk(8, 2.0, 64, 128), {}),
    (ORIGINAL, scaling.yarn(16, 4.0, 64), {}),
    (ORIGINAL, TWO, {ORIGINAL: 4097}),
    *(("max_position_embeddings", TWO, {"max_position_embeddings": n}) for n in ("64", 0, 64.5)),
    (ORIGINAL, scaling.yarn(16, 4.0, 64), {ORIGINAL: "64"}),
    (ORIGINAL, scaling.yarn(16, 4.0, 64), {ORIGINAL: 0}),
    ("head_dim", TWO, {"head_dim": 4}),
    ("head_dim", TWO, {"head_dim": 8.0}),
]


@pytest.mark.parametrize(("name", "rope", "arguments"), BAD_CONFIGS)
def test_what_no_config_can_say(name: str, rope: Rope, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rope.to_config(**arguments)


# ----------------------------------------------------------------------------------------- sidecar


@quiet
@given(ropes())
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, rope: Rope) -> None:
    path = tmp_path_factory.mktemp("rope") / "any.json"
    rope.save(path)
    again = Rope.load(path)
    assert again == rope
    assert repr(again) == repr(rope)


def test_a_folder_gets_longrope_json(tmp_path: Path) -> None:
    TWO.save(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["longrope.json"]
    assert Rope.load(str(tmp_path)) == Rope.load(tmp_path / "longrope.json") == TWO


def test_the_sidecar_is_readable(tmp_path: Path) -> None:
    scaling.linear(2, 7.3, n_hat=4).save(tmp_path)
    assert json.loads((tmp_path / "longrope.json").read_text("utf-8")) == {
        "format": "longrope_kernels.Rope",
        "version": 1,
        "base": 10000.0,
        "interleaved": False,
        "sets": [{"factors": [7.3], "n_hat": 4, "attention_factor": 1.0, "max_length": None}],
    }


def test_loading_checks(tmp_path: Path) -> None:
    Rope(FactorSet((2.0, 1.0))).save(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Rope.load(tmp_path)
    assert [(w.category, w.filename) for w in caught] == [(FactorWarning, __file__)]
    assert str(caught[0].message).startswith(f"{tmp_path}: factors: not monotone")


GOOD = {
    "format": "longrope_kernels.Rope",
    "version": 1,
    "base": 1e4,
    "interleaved": False,
    "sets": [{"factors": [1.0], "n_hat": 0, "attention_factor": 1.0, "max_length": None}],
}
SET = GOOD["sets"][0]  # type: ignore[index]
BAD_SIDECARS: list[tuple[str, Any]] = [
    ("JSON", "{"),
    ("format", []),
    ("format", {"rope_type": "longrope"}),
    ("version 1, got 2", {**GOOD, "version": 2}),
    ("keys", {k: v for k, v in GOOD.items() if k != "base"}),
    ("keys", {**GOOD, "more": 1}),
    ("sets", {**GOOD, "sets": {}}),
    ("sets", {**GOOD, "sets": []}),
    (r"sets\[0\].*keys", {**GOOD, "sets": [1.0]}),
    (r"sets\[0\].*keys", {**GOOD, "sets": [{"factors": [1.0]}]}),
    ("base", {**GOOD, "base": "10000"}),
    ("interleaved", {**GOOD, "interleaved": 0}),
    ("factors", {**GOOD, "sets": [{**SET, "factors": []}]}),
    ("factors.*nan", {**GOOD, "sets": [{**SET, "factors": [math.nan]}]}),
    ("factors.*-1", {**GOOD, "sets": [{**SET, "factors": [-1.0]}]}),
    ("n_hat", {**GOOD, "sets": [{**SET, "n_hat": 1.5}]}),
    ("attention_factor", {**GOOD, "sets": [{**SET, "attention_factor": 0}]}),
    ("max_length", {**GOOD, "sets": [{**SET, "max_length": 0}]}),
    ("as many factors", {**GOOD, "sets": [{**SET, "max_length": 4}, {**SET, "factors": [1, 2]}]}),
]


@pytest.mark.parametrize(("says", "content"), BAD_SIDECARS)
def test_bad_sidecars(says: str, content: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{says}"):
        Rope.load(path)


def test_no_sidecar(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"longrope\.json"):
        Rope.load(tmp_path)


# --------------------------------------------------------------------------------------------- csv


@quiet
@given(st.lists(st.floats(2.0**-24, 1e300), min_size=1, max_size=6), n_hats)
def test_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, factors: list[float], n_hat: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "set.csv"
    scaling.save_csv(path, factors)
    assert scaling.load_csv(path) == FactorSet(factors)
    scaling.save_csv(path, FactorSet(factors, n_hat), n_hat_first=True)
    assert scaling.load_csv(path, n_hat_first=True, pairs=len(factors)) == FactorSet(factors, n_hat)


@pytest.mark.parametrize(
    "text",
    [
        "1\n1.5\n2e0\n",
        "1,1.5,2",
        " 1 , 1.5 , 2 \r\n",
        "1,1.5,2\n1,1.5,2\n\n1.0,1.50,2.0\n",
        "factor\n1\n1.5\n2\n",
        "a,b,c\n1,1.5,2\n",
        "# made by a search\n1\n# more\n1.5\n2",
        "\ufeff1\n1.5\n2\n",
    ],
    ids=["column", "row", "spaces", "layers", "header", "row-header", "comments", "mark"],
)
def test_csv_forms(text: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(text, "utf-8")
    assert scaling.load_csv(path, pairs=3) == FactorSet((1.0, 1.5, 2.0))


BAD_CSV: list[tuple[str, str, dict[str, Any]]] = [
    (": expected numbers, got an empty file", "", {}),
    (": expected numbers, got an empty file", "factor\n", {}),
    (", line 3: expected finite numbers, got 'x'", "factor\n1\nx\n", {}),
    (", line 2: expected finite numbers, got 'factor'", "1\nfactor\n", {}),
    (", line 1: expected finite numbers, got 'x'", "1,x,2\n", {}),
    (", line 1: expected finite numbers, got ''", "1,2,\n", {}),
    (", line 1: expected finite numbers, got '1.0.5'", "1.0.5\n2\n", {}),
    (", line 1: expected finite numbers, got '1;2;3'", "1;2;3\n", {}),
    (", line 1: expected finite numbers, got 'nan'", "nan\n2\n", {}),
    (", line 2: expected finite numbers, got 'nan'", "1\nnan\n", {}),
    (", line 2: expected finite numbers, got 'inf'", "1\ninf\n", {}),
    (", line 2: expected one number", "1\n2,3\n", {}),
    (", line 3: expected the same numbers as in line 1", "1,2\n1,2\n1,3\n", {}),
    (", line 2: expected the same numbers as in line 1", "1,2\n1,2,3\n", {}),
    (": factors: expected finite numbers above 0, got 0.0 for pair 1", "1\n0\n", {}),
    (": factors: expected finite numbers above 0, got -2.0 for pair 1", "1,-2", {}),
    (": expected 3 factors, got 2", "1\n2\n", {"pairs": 3}),
    (": expected 2 factors, got 1", "1\n2\n", {"pairs": 2, "n_hat_first": True}),
    (": expected n_hat", "1.5\n2\n", {"n_hat_first": True}),
    (": n_hat: expected", "-1\n2\n", {"n_hat_first": True}),
    (": factors: expected at least one", "1\n", {"n_hat_first": True}),
]


@pytest.mark.parametrize(("says", "text", "arguments"), BAD_CSV)
def test_bad_csv(says: str, text: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{says}")):
        scaling.load_csv(path, **arguments)


def test_csv_checks(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("1\n9\n8\n", "utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaling.load_csv(path)
        scaling.load_csv(path, factor=4.0)
    assert all(w.category is FactorWarning and w.filename == __file__ for w in caught)
    fall = f"{path}: factors: not monotone, falls from 9.0 for pair 1 to 8.0 for pair 2"
    beyond = f"{path}: factors: 9.0 for pair 1 (and 1 more) is beyond 1.25 s = 5"
    seen = [str(w.message) for w in caught]
    assert len(seen) == 3
    assert all(
        text.startswith(start) for text, start in zip(seen, (fall, fall, beyond), strict=True)
    )
    with pytest.raises(ValueError, match=r"^n_hat_first: expected True .*n_hat = 4"):
        scaling.save_csv(path, FactorSet((1.0,), 4))
    with pytest.raises(FileNotFoundError):
        scaling.load_csv(tmp_path / "none.csv")


# ------------------------------------------------------------------------------------------ arrays

NAMES = ("rope_factors_short.weight", "rope_factors_long.weight")


def arrays_of(make: Any) -> dict[str, Any]:
    return {
        NAMES[0]: make(np.float32(SHORT)),
        NAMES[1]: make(np.float32(LONG)),
        "output_norm.weight": None,
    }


@pytest.mark.parametrize(
    "make", [np.asarray, torch.from_numpy, lambda x: x.tolist()], ids=["numpy", "torch", "list"]
)
def test_arrays_of_two_sets(make: Any) -> None:
    rope = scaling.from_arrays(arrays_of(make), 4096, 131072, base=5e5, interleaved=True)
    exact = [np.float32(values).astype(np.float64).tolist() for values in (SHORT, LONG)]
    assert rope == Rope.longrope(*exact, 4096, 131072, base=5e5, interleaved=True)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_arrays_round_trip(numpy: bool) -> None:
    rope = scaling.from_arrays(arrays_of(np.asarray), 4096, attention_factor=(1.0, 1.2))
    arrays = scaling.to_arrays(rope, numpy=numpy)
    assert list(arrays) == list(NAMES)
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32") if numpy else torch.float32}
    assert scaling.from_arrays(arrays, 4096, attention_factor=(1.0, 1.2)) == rope


def test_arrays_of_one_set() -> None:
    rope = scaling.llama3(16, 8.0, 1.0, 4.0, 8192, base=5e5)
    arrays = scaling.to_arrays(rope)
    assert list(arrays) == ["rope_freqs.weight"]
    again = scaling.from_arrays(arrays, base=5e5)
    assert again.sets[0].factors == pytest.approx(rope.sets[0].factors, rel=2.0**-24)
    assert scaling.from_arrays(scaling.to_arrays(again), base=5e5) == again
    with_a = scaling.from_arrays(arrays, attention_factor=1.5, n_hat=3, base=5e5)
    assert with_a.sets == (replace(again.sets[0], attention_factor=1.5, n_hat=3),)


def test_arrays_are_checked() -> None:
    arrays = arrays_of(np.asarray)
    arrays[NAMES[1]] = arrays[NAMES[1]][::-1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaling.from_arrays(arrays, 4096, 8192)
    assert {(w.category, w.filename) for w in caught} == {(FactorWarning, __file__)}
    seen = " ".join(str(w.message) for w in caught)
    for text in ("not monotone", "beyond 1.25 s = 2.5", "is larger than"):
        assert text in seen


ONE = {"rope_freqs.weight": [1.0, 2.0]}
BAD_ARRAYS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("arrays: expected .*got none", {"output.weight": [1.0]}, {}),
    ("arrays: expected .*short.*got", {NAMES[0]: [1.0]}, {}),
    ("arrays: expected .*got", {**ONE, NAMES[0]: [1.0, 2.0], NAMES[1]: [1.0, 2.0]}, {}),
    ("original_max_position_embeddings: ", {NAMES[0]: [1.0], NAMES[1]: [1.0]}, {}),
    (NAMES[0], {NAMES[0]: [[1.0]], NAMES[1]: [1.0]}, {}),
    (NAMES[1], {NAMES[0]: [1.0], NAMES[1]: np.float32([0.0])}, {}),
    (NAMES[1], {NAMES[0]: [1.0], NAMES[1]: torch.tensor([math.inf])}, {}),
    ("rope_freqs.weight", {"rope_freqs.weight": np.ones((2, 2), np.float32)}, {}),
    ("attention_factor, n_hat: expected one", ONE, {"attention_factor": (1.0, 1.0)}),
    ("attention_factor, n_hat: expected one", ONE, {"n_hat": (1, 1)}),
]


@pytest.mark.parametrize(("says", "arrays", "arguments"), BAD_ARRAYS)
def test_bad_arrays(says: str, arrays: dict[str, Any], arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{says}"):
        scaling.from_arrays(arrays, **arguments)


def test_arrays_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"^long_factor: expected 1 factors"):
        scaling.from_arrays({NAMES[0]: [1.0], NAMES[1]: [1.0, 2.0]}, 4096, 8192)


@pytest.mark.parametrize(
    ("says", "rope"),
    [
        ("one or two sets, got 3", Rope(tuple(FactorSet((1.0,), max_length=n) for n in (4, 8, 9)))),
        (r"n_hat = 0.*\[5\]", Rope(FactorSet((1.0,), 5))),
        ("float32's range", Rope(FactorSet((1e39,)))),
    ],
)
def test_what_no_array_can_say(says: str, rope: Rope) -> None:
    with pytest.raises(ValueError, match=rf"^rope: expected .*{says}"):
        scaling.to_arrays(rope)
