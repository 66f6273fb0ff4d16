"""flash-attn 2, 3 and 4 behind our rotation: what they are asked for, and what comes back.

On the CPU by the stand-ins of flash_stand_ins.py; the last test runs the real ones, where there is
a GPU that has them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import Backend, Case, check, check_grads
from attention_truth import bf16, fp16, fp32
from flash_stand_ins import stand_ins
from test_attention_forward import CHUNKS, EMPTY_ROWS, LSE, SHAPES, WINDOWS

from longrope_kernels import Rope, attention
from longrope_kernels.backends import choose as backends
from longrope_kernels.backends import flash_attention
from longrope_kernels.backends.flash_attention import LIBRARIES
from longrope_kernels.calls.records import AttentionCall, Keys, Scores, Selection

NAMES = list(LIBRARIES)
FLASH = {name: Backend(name, "cpu", (bf16, fp16), smallest_dim=8) for name in NAMES}


def install(monkeypatch: pytest.MonkeyPatch, name: str, *made: Callable[..., Any]) -> None:
    """Importable as the library, and served on the CPU."""
    path = LIBRARIES[name].module.split(".")
    for i in range(1, len(path) + 1):
        module = ModuleType(".".join(path[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.flash_attn_func, module.flash_attn_varlen_func = made
    flash_attention.functions.cache_clear()
    missing = backends.missing
    monkeypatch.setattr(backends, "missing", lambda n: None if n == name else missing(n))
    monkeypatch.setitem(backends._DEVICES, name, ("cpu",))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    flash_attention.functions.cache_clear()


@pytest.fixture(params=NAMES)
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each library in turn, as its stand-in."""
    install(monkeypatch, request.param, *stand_ins(request.param))
    return FLASH[request.param]


# ------------------------------------------------------------------------------------- the result

PACKED = [
    Case(counts=(7, 1, 30), layout="thd"),
    Case(counts=(5, 0, 14), layout="thd", lengths=(5, 5000, 4097), dim=64, heads=6),
    Case(counts=(3, 5), counts_k=(9, 7), layout="thd", return_lse=True),
    Case(counts=(9, 0, 4), counts_k=(3, 2, 9), layout="thd", return_lse=True, dtype=fp16),
    Case(counts=(9, 4, 3), counts_k=(3, 0, 9), layout="thd", causal=False, return_lse=True),
    Case(counts=(20, 4), counts_k=(3, 9), layout="thd", causal=False, window=5, return_lse=True),
    Case(counts=(20, 4), counts_k=(9, 20), layout="thd", window=12, return_lse=True),
]
SOFTCAPS = [Case(softcap=0.7), Case(counts=(5, 14), layout="thd", softcap=5.0, window=4)]
EVERYTHING = [*SHAPES, *CHUNKS, *EMPTY_ROWS, *WINDOWS, *LSE, *PACKED, *SOFTCAPS]


def served(name: str, case: Case) -> bool:
    return max(case.dim, 8) in LIBRARIES[name].head_dims and not case.kv_start


CASES = {
    f"{name}-{FLASH[name].nearest(case)}": (name, FLASH[name].nearest(case))
    for name in NAMES
    for case in EVERYTHING
    if served(name, case)
}
every_call = pytest.mark.parametrize(
    ("name", "case"), [pytest.param(*pair, id=i) for i, pair in CASES.items()]
)


@every_call
def test_against_the_truth(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name, *stand_ins(name))
    check(FLASH[name], case)


GRADIENTS = [
    Case(2, 19, dim=64),
    Case(2, 5, 20, layout="bhsd", dtype=fp16),
    Case(2, 20, 9, window=4),
    Case(2, 20, 9, window=4, causal=False),
    Case(counts=(9, 4, 3), counts_k=(3, 0, 9), layout="thd"),
    Case(counts=(9, 0, 4), layout="thd", window=3),
    Case(2, 0),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(flash: Backend, case: Case) -> None:
    check_grads(flash, flash.nearest(case))


def test_a_call_whose_queries_see_nothing_has_zero_gradients(flash: Backend) -> None:
    q, k = torch.randn(2, 5, 4, 16).to(bf16), torch.randn(2, 0, 2, 16).to(bf16)
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    out = flash.attend(
        *leaves, torch.arange(5), (1.0,) * 8, 0, key_positions=torch.arange(0), causal=False
    )
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not out.any()
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert not grads[0].any()


def test_values_whose_rows_are_not_aligned(flash: Backend) -> None:
    """A view one element into its memory, heads 20 elements apart, and one head seen as two."""
    case = Case(2, 19, dim=16, dtype=bf16)
    q, k, _ = case.tensors()
    shifted = torch.randn(2, 19, 2, 24).to(bf16)[..., 1:17]
    apart = torch.randn(2, 19, 2, 20).to(bf16)[..., :16]
    for v in (shifted, apart, k[:, :, :1].expand(2, 19, 2, 16)):
        check(flash, case, [q, k, v])


def test_old_versions_return_the_log_sum_exp_unasked(
    flash: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the keyword there was a pair, always."""
    dense, packed = stand_ins(flash.backend)
    keyword = LIBRARIES[flash.backend].lse

    def old(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        given = {"softmax_scale": softmax_scale, "causal": causal}
        return dense(q, k, v, **given, **{keyword: True})[:2]

    install(monkeypatch, flash.backend, old, packed)
    for return_lse in (False, True):
        check(flash, Case(2, 19, dtype=bf16, return_lse=return_lse))


# ----------------------------------------------------------------------------------- the keywords


def call_of(
    queries: int,
    slots: int,
    causal: bool = True,
    window: int = 0,
    borders: Sequence[torch.Tensor | None] = (None, None),
) -> AttentionCall:
    """A call as a backend gets it, of tensors without values."""
    q, k = (torch.empty(1, n, 1, 16, device="meta") for n in (queries, slots))
    keys = Keys(k, k, borders=borders[1])
    tables = Rope.plain(16).tables(torch.device("cpu"))
    selection, scores = Selection(borders=borders[0]), Scores(causal, 0.25, window)
    return AttentionCall(q, torch.empty(1, queries), keys, tables, selection, scores)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("causal", "given", "sizes", "window"),
    [
        (True, 0, (5, 5), None),
        (False, 0, (5, 9), None),
        (True, 3, (5, 9), (2, 0)),
        (False, 3, (5, 9), (2, 2)),
        (False, 3, (9, 3), (2, 2)),
        (True, 1, (5, 5), (0, 0)),
        (True, 9, (5, 9), None),
        (False, 2**40, (9, 5), None),
        (True, 8, (9, 5), (7, 0)),
    ],
    ids=str,
)
def test_the_window_of_the_libraries_counts_keys_on_either_side(
    name: str, causal: bool, given: int, sizes: tuple[int, int], window: tuple[int, int] | None
) -> None:
    """Not the query's own, where ours does; one that hides nothing is left out."""
    keywords = flash_attention.keywords(name, call_of(*sizes, causal, given))
    assert keywords.pop("window_size", None) == window
    assert keywords == {"softmax_scale": 0.25, "causal": causal, "deterministic": True}


@pytest.mark.parametrize("name", NAMES)
def test_borders_are_not_read(name: str) -> None:
    """Meta tensors have no values: the longest sequence is bounded by all tokens."""
    borders = [torch.empty(3, dtype=torch.int64, device="meta") for _ in range(2)]
    given = flash_attention.keywords(name, call_of(5, 7, True, 4, borders))
    assert given["cu_seqlens_q"].dtype == given["cu_seqlens_k"].dtype == torch.int32
    longest = [given.get("max_seqlen_q"), given.get("max_seqlen_k")]
    assert longest == ([7, 7] if LIBRARIES[name].longest else [None, None])


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_where_torch_is(name: str) -> None:
    torch.use_deterministic_algorithms(False)  # the fixture in conftest.py turns it back on
    assert "deterministic" not in flash_attention.keywords(name, call_of(5, 5))


# ------------------------------------------------------------------------------- what is refused


def arguments(backend: Backend, dim: int = 16, **more: Any) -> dict[str, Any]:
    q, k, v = Case(2, 5, dim=dim, dtype=bf16).tensors()
    rest = {"positions": torch.arange(5), "factors": (1.0,) * (dim // 2), "n_hat": 0}
    return {"q": q, "k": k, "v": v, **rest, "backend": backend.backend, **more}


def test_left_padding_is_refused_and_packing_named(flash: Backend) -> None:
    with pytest.raises(ValueError, match=rf"kv_start.*{flash}.*triton.*composed.*cu_seqlens"):
        attention(**arguments(flash, kv_start=torch.tensor([0, 2])))


# Of FlashAttention-4: capability, head_dim, softcap, whether it trains, what is said.
ON_DEVICES = [
    (9, 256, True, True, None),
    (9, 8, True, True, None),
    (10, 256, False, True, None),
    (10, 256, True, False, None),
    (10, 256, True, True, r"head_dim \[.*128\] with gradients and softcap, got 256"),
    (11, 192, False, False, r"head_dim \[.*128, 256\], got 192"),
    (10, 128, True, True, None),
    (8, 128, True, False, None),
    (8, 64, False, True, r"head_dim \[\] with gradients, got 64"),
    (12, 64, False, False, None),
    (12, 64, False, True, "no deterministic gradients"),
    (12, 64, True, True, r"head_dim \[\] with gradients and softcap"),
    (7, 64, False, False, r"head_dim \[\], got 64"),
]


@pytest.mark.parametrize(("major", "dim", "softcap", "trains", "says"), ON_DEVICES)
def test_what_flash_attn_4_serves_by_device(
    major: int,
    dim: int,
    softcap: bool,
    trains: bool,
    says: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through `attention`, as if the CPU had that capability; tests are deterministic."""
    install(monkeypatch, "flash-attn-4", *stand_ins("flash-attn-4"))
    monkeypatch.setattr(flash_attention, "capability", lambda device: major)
    given = arguments(FLASH["flash-attn-4"], dim, softcap=2.0 if softcap else None)
    given["q"].requires_grad_(trains)
    if says is None:
        attention(**given)
        return
    what = rf"backend: 'flash-attn-4' \(4.0.0b36\) serves on compute capability {major} {says}"
    with pytest.raises(ValueError, match=what):
        attention(**given)


def test_the_others_say_themselves_what_a_device_lacks() -> None:
    for name in ("flash-attn-2", "flash-attn-3"):
        flash_attention.check_device(name, 7, 256, softcap=True, trains=True)


def test_a_window_longer_than_the_keys_with_more_queries(flash: Backend) -> None:
    case = Case(2, 20, 5, window=8, causal=False, dtype=bf16)
    with pytest.raises(ValueError, match=rf"window.*{flash}.*5 keys.*got 8"):
        check(flash, case)


def test_a_gradient_of_the_log_sum_exp_is_refused(flash: Backend) -> None:
    """The libraries would drop it without a word."""
    given = arguments(flash, return_lse=True)
    given["k"].requires_grad_()
    with pytest.raises(ValueError, match=rf"return_lse.*{flash}.*triton.*no_grad"):
        attention(**given)
    with torch.no_grad():
        attention(**given)


def test_dtypes_and_head_dims(flash: Backend) -> None:
    given = arguments(flash)
    with pytest.raises(ValueError, match=rf"{flash}.*float32.*reference"):
        attention(**{**given, **{n: given[n].to(fp32) for n in "qkv"}})
    for dim in (12, 264, 256):
        if dim in LIBRARIES[flash.backend].head_dims:
            attention(**arguments(flash, dim))
            continue
        with pytest.raises(ValueError, match=rf"{flash}.*head_dim from 8 .* steps of 8, got {dim}"):
            attention(**arguments(flash, dim))


def test_only_on_a_gpu(flash: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._DEVICES, flash.backend, ("cuda",))
    with pytest.raises(ValueError, match=rf"{flash}.*cuda.*cpu"):
        attention(**arguments(flash))


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason, and how to get it; never another backend in silence."""
    monkeypatch.setitem(sys.modules, LIBRARIES[name].module.split(".")[0], None)
    reason = flash_attention.missing(name)
    assert reason is not None
    assert reason.endswith(LIBRARIES[name].get)
    monkeypatch.setattr(backends, "missing", flash_attention.missing)
    with pytest.raises(RuntimeError) as raised:
        attention(**arguments(FLASH[name]))
    assert str(raised.value) == f"backend: {name!r} is not available: {reason}"


def test_a_library_built_for_another_torch(flash: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(flash_attention.importlib, "import_module", broken)
    reason = flash_attention.missing(flash.backend)
    assert reason == f"undefined symbol: _ZN3c10; {LIBRARIES[flash.backend].get}"


CHOSEN = [
    (Case(2, 9, 40, dim=64, dtype=bf16), "flash-attn-4"),
    (Case(1, 19, dim=256, dtype=bf16), "flash-attn-4"),
    (Case(1, 19, window=5, dtype=bf16), "flash-attn-4"),
    (Case(counts=(7, 1, 30), layout="thd", dtype=bf16), "flash-attn-4"),
    (Case(1, 19, dtype=bf16), "composed"),
    (Case(1, 9, 40, causal=False, dtype=bf16), "composed"),
    (Case(1, 40, 9, dtype=bf16), "composed"),
    (Case(2, 9, 40, kv_start=(3, 0), dtype=bf16), "triton"),
    (Case(2, 20, 5, window=8, causal=False, dtype=bf16), "triton"),
    (Case(1, 19, dim=33, window=5, dtype=bf16), "triton"),
    (Case(1, 9, 40, softcap=5.0, dtype=bf16), "triton"),
    (Case(1, 9, 40, dtype=bf16, return_lse=True), "triton"),
    (Case(1, 9, 40, dtype=fp32), "composed"),
]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU as a GPU of compute capability 9 with FlashAttention-4; what is chosen, is told."""
    install(monkeypatch, "flash-attn-4", *stand_ins("flash-attn-4"))
    monkeypatch.setattr(backends, "capability_of", lambda device: 9)
    monkeypatch.setitem(backends.ATTENTION_CHOICE, "cpu", backends.ATTENTION_CHOICE["cuda 9"])
    chosen: list[str] = []
    choose = backends.choose_attention

    def spy(*args: Any) -> str:
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(backends, "choose_attention", spy)
    return chosen


UNNAMED = Backend(None, "cpu", (bf16, fp16))  # type: ignore[arg-type]  # what the choice takes


@pytest.mark.parametrize(("case", "name"), CHOSEN, ids=str)
def test_what_hopper_takes(hopper: list[str], case: Case, name: str) -> None:
    check(UNNAMED, case)
    assert hopper == [name]


@pytest.mark.parametrize("case", [case for case, name in CHOSEN[:4]], ids=str)
def test_what_hopper_trains_by(hopper: list[str], case: Case) -> None:
    check_grads(UNNAMED, case)
    assert hopper == ["flash-attn-4"]


def test_a_graph_takes_no_library(hopper: list[str]) -> None:
    q, k, v = (torch.randn(1, n, 2, 64, dtype=bf16) for n in (9, 40, 40))
    at, rope = torch.arange(40), Rope.plain(64)

    def attend(q: torch.Tensor) -> Any:
        return attention(q, k, v, at[31:], rope, key_positions=at, window=20)

    right = attend(q)
    assert hopper.pop() == "flash-attn-4"
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q)
    torch.testing.assert_close(compiled, right, rtol=0, atol=0.02)
    assert "flash-attn-4" not in hopper


def test_the_others_are_never_chosen_without_being_named() -> None:
    """None is measured faster, and of them nobody says what serves which device."""
    chosen = {
        n for needs in backends.ATTENTION_CHOICE.values() for names in needs.values() for n in names
    }
    assert chosen & set(NAMES) == {"flash-attn-4"}
    assert {row["name"] for row in backends.attention_table()} == {"composed", *NAMES}


# ----------------------------------------------------------------------------- the real libraries

INSTALLED = [name for name in NAMES if backends.missing(name) is None]

if INSTALLED:  # an empty parametrisation would be a skipped test

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", EVERYTHING, ids=str)
    @pytest.mark.parametrize("name", INSTALLED)
    def test_the_library_itself(name: str, case: Case) -> None:
        backend = Backend(name, "cuda", (bf16, fp16), smallest_dim=8)
        case = backend.nearest(case)
        if not served(name, case):
            with pytest.raises(ValueError, match=name):
                check(backend, case)
            return
        check(backend, case)
        if not case.return_lse:
            check_grads(backend, case)
