"""The persistent forward kernel against the truth, both forms, in the interpreter or on a GPU."""

from __future__ import annotations

import contextvars
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_truth import PREPASS, Case, bf16, check, fp16
from cases import CUDA
from triton.runtime import _allocation

from longrope_kernels.backends.triton import launch as triton_launch
from longrope_kernels.calls.masks import Mask
from longrope_kernels.calls.records import Rotation, Scoring
from longrope_kernels.kernels import attention_hopper
from longrope_kernels.kernels.attention_hopper import PersistentConfig, place_of_turn, plan, serves
from longrope_kernels.kernels.attention_tiles import tile_at
from longrope_kernels.kernels.descriptors import row_of_head

pytestmark = pytest.mark.last
DEVICE = "cuda" if CUDA else "cpu"
ARCH = triton_launch.arch_of(torch.empty(0, device=DEVICE))
# In the interpreter the forms differ in loops and masks, not in who runs them. Others than 9.0 have
# no specialised form.
FORMS = ("plain", "specialised") if ARCH in (0, 90) else ("plain",)


@pytest.fixture(params=FORMS)
def grids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The persistent kernel for all that it serves, in one form; the grids of its launches."""
    launched = []
    specialize = request.param == "specialised"
    small = PersistentConfig(64, 64, 4, 2, False) if CUDA and not specialize else None
    form = "specialized" if specialize else "persistent"
    monkeypatch.setenv("LONGROPE_SM90_ATTENTION", form)

    def spy(*args: Any) -> Any:
        launch = plan(*args, small)
        launched.append(launch.grid)
        return launch

    monkeypatch.setattr(attention_hopper, "plan", spy)
    monkeypatch.setattr(attention_hopper, "ARCH", ARCH)
    monkeypatch.setattr(attention_hopper, "INTERPRETED", PersistentConfig(32, 32, 4, 1, specialize))
    return launched


CASES = [
    Case(2, 1, 0, 4, 2, 64, dtype=bf16, return_lse=True),
    Case(1, 63, 0, 1, 1, 128, dtype=bf16, n_hat=40, return_lse=True),
    Case(1, 200, 0, 1, 1, 64, dtype=fp16, return_lse=True),
    Case(1, 64, 0, 2, 1, 64, dtype=bf16, causal=False, return_lse=True),
    Case(2, 33, 0, 2, 1, 64, dtype=bf16, causal=False),
    Case(1, 33, 70, 2, 2, 96, dtype=bf16, return_lse=True),
    Case(1, 40, 9, 2, 2, 32, dtype=bf16, return_lse=True),
    Case(1, 70, 3, 2, 1, 32, dtype=fp16, causal=False),
    Case(2, 35, 0, 2, 1, 128, dtype=bf16, layout="bhsd", return_lse=True),
    Case(1, 33, 65, 2, 1, 80, 16, dtype=bf16, layout="bhsd", causal=False),
    Case(1, 40, 0, 2, 1, 128, 48, dtype=fp16, attention_factor=0.8),
    Case(1, 33, 0, 2, 1, 96, dtype=bf16, interleaved=True, n_hat=0),
    Case(1, 70, 0, 2, 1, 32, dtype=bf16, window=17, return_lse=True),
    Case(1, 70, 0, 1, 1, 32, dtype=fp16, window=17, causal=False),
    Case(2, 50, 20, 1, 1, 32, dtype=bf16, window=6, causal=False, return_lse=True),
    Case(2, 20, 0, 2, 1, 32, dtype=bf16, lengths=(40, 4000)),
    Case(2, 20, 0, 2, 1, 32, dtype=bf16, sets=(1, 0)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(grids: list[tuple[int, ...]], case: Case) -> None:
    check(PREPASS, case)
    assert grids


def test_a_few_programs_take_all_tiles(grids: list[tuple[int, ...]]) -> None:
    """Three in the interpreter, for 2 x 2 x 4 tiles; the multiprocessors of a GPU."""
    check(PREPASS, Case(2, 100, 0, 2, 1, 32, dtype=bf16))
    assert CUDA or grids == [(3,)]


# Rows of q past the end are NaN there, and so are their scores, which nobody stores.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton.runtime")
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_memory_around_the_tensors_does_not_matter(
    grids: list[tuple[int, ...]], layout: str
) -> None:
    """Rows past the end come by TMA too, and a NaN among them would reach every row."""
    case = Case(2, 37, 45, 2, 1, 64, dtype=bf16, layout=layout)
    around = []
    for x in case.tensors():
        x = x if layout == "bshd" else x.transpose(1, 2)
        batch, seq, heads, dim = x.shape
        shape = (batch, seq + 40, heads + 2, dim)
        large = x.new_full(shape, torch.nan)
        if layout == "bhsd":
            large = x.new_full((batch, heads + 2, seq + 40, dim), torch.nan).transpose(1, 2)
        view = large[:, :seq, 1:-1].copy_(x)
        around.append(view if layout == "bshd" else view.transpose(1, 2))
    check(PREPASS, case, around)
    assert grids


def served(
    *,
    pairs: int = 32,
    interleaved: bool = False,
    softmax_scale: float = 0.1,
    softcap: float = 0.0,
    arch: int = 90,
    cu_seqlens: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    **tensors: torch.Tensor,
) -> bool:
    """Whether this call is, which is one that is served but for what is given."""
    q = torch.empty(2, 8, 4, 64, dtype=bf16, device=DEVICE)
    k = torch.empty(2, 2, 8, 64, dtype=bf16, device=DEVICE).transpose(1, 2)
    v = torch.empty(2, 8, 2, 64, dtype=bf16, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int64)
    steps = index.new_zeros(1, 2, pairs)
    rotation = Rotation(steps, index, index.double(), index, interleaved=interleaved)
    mask = Mask(True, None, kv_start, cu_seqlens, cu_seqlens)
    scoring = Scoring(index[None], index[None], rotation, mask, softmax_scale, softcap)
    q, k, v = ({"q": q, "k": k, "v": v} | tensors).values()
    return serves(q, k, v, scoring, arch)


def _heads(*shape: int, dim: int = 64) -> torch.Tensor:
    return torch.empty(*shape, dim, dtype=bf16, device=DEVICE)


def test_what_is_served() -> None:
    index = torch.zeros(3, dtype=torch.int32)
    assert served()
    assert served(interleaved=True)
    assert served(pairs=16)
    assert served(pairs=0)
    assert not served(pairs=12)
    assert not served(pairs=8)
    assert served(pairs=8, interleaved=True)
    assert not served(pairs=12, interleaved=True)
    assert not served(arch=80)
    assert not served(arch=100)
    assert not served(cu_seqlens=index)
    assert not served(kv_start=index)
    assert not served(softcap=1.0)
    assert not served(softmax_scale=0.0)
    wide = {name: _heads(1, 4, 1, dim=256) for name in "qkv"}
    assert not served(**wide, pairs=32)


def test_what_no_descriptor_reaches_is_not_served() -> None:
    moved = _heads(2 * 8 * 2 + 1).flatten()[4:].unfold(0, 64, 64).view(2, 8, 2, 64)
    odd = _heads(2, 8, 2, dim=68)[..., :64]
    assert not served(v=moved)
    assert not served(v=odd)
    assert not served(k=odd)
    assert not served(v=_heads(2, 8, 1).expand(2, 8, 2, 64))
    assert not served(q=_heads(2, 8, 4, dim=68)[..., :64])
    # The batch stride is no multiple of the token stride.
    ragged = torch.empty(4096, dtype=bf16, device=DEVICE).as_strided(
        (2, 4, 4, 64), (1032, 256, 64, 1)
    )
    assert not served(q=ragged)
    assert served(q=ragged[:1], k=_heads(1, 8, 2), v=_heads(1, 8, 2))


@pytest.mark.parametrize(
    "strides",
    [
        (4 * 64 * 9, 4 * 64, 64),
        (4 * 64 * 9, 64, 64 * 9),
        (6 * 64 * 9, 6 * 64, 64),
        (6 * 64 * 9, 64, 64 * 9),
        (4 * 72 * 9, 72, 72 * 9),
        (64 * 9, 64, 2 * 64 * 9),
        (64, 4 * 2 * 64, 2 * 64),
    ],
)
def test_the_matrix_of_q_has_every_row(strides: tuple[int, ...]) -> None:
    q = torch.empty(20000, dtype=bf16).as_strided((2, 9, 4, 64), (*strides, 1))
    place = row_of_head(q)
    if place is None:
        assert strides[0] % strides[1]
        return
    for b, h in itertools.product(range(2), range(4)):
        row, column = b * place[0] + h * place[1], h * place[2]
        assert row * strides[1] + column == q[b, 0, h].storage_offset()


def test_it_is_taken_only_where_asked_for(
    grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LONGROPE_SM90_ATTENTION")
    check(PREPASS, CASES[0])
    assert not grids
    monkeypatch.setenv("LONGROPE_SM90_ATTENTION", "fast")
    with pytest.raises(ValueError, match=r"LONGROPE_SM90_ATTENTION: .*'fast'"):
        check(PREPASS, CASES[0])


@triton.jit
def _order_kernel(out, places, rounds, tiles, section, heads):
    programs = tl.num_programs(0)
    for i_turn in range(tl.program_id(0), places, programs):
        i_place = place_of_turn(i_turn, programs, places)
        i_tile, i_head = tile_at(i_place, tiles, section, heads)
        p = out + (tl.program_id(0) * rounds + i_turn // programs) * 2
        tl.store(p, i_tile)
        tl.store(p + 1, i_head)


@pytest.mark.parametrize(
    ("programs", "tiles", "heads", "section"),
    [(1, 3, 2, 2), (7, 5, 4, 4), (7, 16, 8, 8), (5, 16, 6, 4), (13, 8, 3, 3), (6, 2, 3, 3)],
)
def test_programs_share_the_work(programs: int, tiles: int, heads: int, section: int) -> None:
    """Every tile once, and when causal no program has more than one longest tile too much."""
    places = tiles * heads
    rounds = -(-places // programs)
    taken = torch.full((programs, rounds, 2), -1, dtype=torch.int32, device=DEVICE)
    _order_kernel[(programs,)](taken, places, rounds, tiles, section, heads)
    taken = taken.cpu()
    seen = sorted(tuple(x) for x in taken.flatten(0, 1).tolist() if x[0] >= 0)
    assert seen == list(itertools.product(range(tiles), range(heads)))
    work = (taken[..., 0] + 1).sum(1)
    assert work.max() - work.min() <= tiles


def test_the_allocator_of_the_caller_stays() -> None:
    """Only the launch itself sees the one that serves it."""
    seen: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **options: seen.append(_allocation._allocator.get())

    launch = SimpleNamespace(kernel=Kernel(), grid=(1,), args=(), constants={}, warps=4, stages=1)

    def theirs(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        raise AssertionError

    def run() -> Any:
        triton.set_allocator(theirs)
        triton_launch.run_launch_with_scratch(launch, torch.device(DEVICE))
        return _allocation._allocator.get()

    assert contextvars.copy_context().run(run) is theirs
    memory = seen[0](1000, 128, None)
    assert memory.nbytes == 1000
    assert memory.device.type == DEVICE
