"""What is taken of torch that is not public: each still does what the package takes it for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longrope_kernels import Rope, append, apply_rotary, decode, torch_private
from longrope_kernels.torch_private import runs_now, unwatched, unwritable


class Watcher(TorchDispatchMode):
    """Sees every op that is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


def test_plain_tensors_are_unwatched() -> None:
    x = torch.zeros(2)
    assert unwatched(x, torch.nn.Parameter(x, requires_grad=False))
    with torch.no_grad():
        assert unwatched(x.clone().requires_grad_())
    with torch.inference_mode():
        assert unwatched(torch.zeros(2))


WATCHED: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a dispatch mode": Watcher,
    "fake tensors": FakeTensorMode,
    "the profiler": lambda: torch.profiler.profile(),
    "forward-mode derivatives": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("context", WATCHED.values(), ids=WATCHED)
def test_who_watches_is_seen(context: Callable[[], AbstractContextManager[object]]) -> None:
    x = torch.zeros(2)
    with context():
        assert not unwatched(x)
        assert runs_now(x) == (context is WATCHED["the profiler"])
    assert unwatched(x)


def test_recording_tracing_and_vectorising_are_seen() -> None:
    seen: list[bool] = []
    runs: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(unwatched(x))
        runs.append(runs_now(x))
        return x + 1

    look(torch.zeros(2, requires_grad=True))
    torch.vmap(look)(torch.zeros(2, 2))
    torch.func.grad(lambda x: look(x).sum())(torch.zeros(2))
    torch.jit.trace(look, torch.zeros(2), check_trace=False)

    class Own(torch.Tensor):
        pass

    look(torch.zeros(2).as_subclass(Own))
    assert seen == [False] * 5
    assert runs == [True] + [False] * 4


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_views_that_negate_memory_are_read_as_what_they_are(backend: str) -> None:
    """Such are the imaginary parts of conjugates."""
    x, n, rope = torch.randn(1, 3, 2, 16), torch.arange(3), Rope.plain(16)
    q, k, same = (torch._neg_view(-x) for _ in range(3))
    expected = apply_rotary(x, None, n, rope, backend=backend)[0]
    for inplace in (False, True):
        for out in apply_rotary(q, k, n, rope, inplace=inplace, backend=backend):
            assert torch.equal(out, expected)
    lens = torch.tensor([3])
    out = decode(same, same, same, lens, rope, backend=backend)
    assert torch.equal(out, decode(x, x, x, lens, rope, backend=backend))
    caches = torch.zeros(2, 1, 3, 2, 16).to(torch.float8_e4m3fn)
    scale = torch.complex(torch.ones(2), torch.full((2,), -0.5)).conj().imag
    append(same, same, *caches, lens, k_scale=scale, backend=backend)
    assert torch.equal(caches[0].float(), (2 * x).to(torch.float8_e4m3fn).float())
    assert torch.equal(caches[1].float(), x.to(torch.float8_e4m3fn).float())


def test_a_cache_that_negates_memory_is_refused() -> None:
    x, cache = torch.randn(1, 3, 2, 16), torch.zeros(1, 3, 2, 16)
    with pytest.raises(ValueError, match=r"v_cache: .* v_cache\.resolve_neg\(\)"):
        append(x, x, cache, torch._neg_view(cache.clone()), torch.tensor([3]))
    assert not cache.any()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "slice": lambda x: x[:1],
    "select": lambda x: x.select(0, 1),
    "transposed": lambda x: x.transpose(0, 1),
    "slice of an unflattened one": lambda x: x.unflatten(1, (2, 2))[:, 1],
    "unbind": lambda x: x.unbind(0)[1],
    "split": lambda x: x.split(1)[0],
    "chunk": lambda x: x.chunk(2)[0],
    "slice of unbind": lambda x: x.unbind(1)[1][1:],
    "detached": lambda x: x.detach(),
    "detached unbind": lambda x: x.unbind(0)[1].detach(),
    "made under no_grad": lambda x: torch.no_grad()(lambda: x[:1])(),
    "made under inference_mode": lambda x: torch.inference_mode()(lambda: x[:1])(),
    "made to require it": lambda x: x.detach()[:1].requires_grad_(),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("of", ["leaf", "computed", "constant"])
@pytest.mark.parametrize("grad", [True, False])
def test_what_torch_would_not_write_is_told_before(kind: str, of: str, grad: bool) -> None:
    x = torch.randn(2, 4, requires_grad=of != "constant")
    view = VIEWS[kind](x * 1 if of == "computed" else x)
    with torch.set_grad_enabled(grad):
        told = unwritable(view)
        try:
            view.zero_()
        except RuntimeError:
            assert told is not None
        else:
            assert told is None


def test_a_mode_sees_the_op() -> None:
    """The short way is not taken where somebody counts ops."""
    q = torch.randn(1, 4, 2, 8)
    with Watcher() as watcher:
        apply_rotary(q, None, torch.arange(4), Rope.plain(8), backend="native")
    assert "longrope_kernels.rotary.default" in watcher.seen


def test_in_place_counts_as_a_change() -> None:
    """What autograd saved before is refused after, on the short way too."""
    q = torch.randn(1, 4, 2, 8)
    weight = torch.ones_like(q, requires_grad=True)
    product = weight * q
    apply_rotary(q, None, torch.arange(4), Rope.plain(8), inplace=True, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_below_autograd() -> None:
    """An op inside that context does not come to its rule for gradients."""
    flags = []
    with torch_private.below_autograd():
        x = torch.ones(2, requires_grad=True)
        flags.append((x * 2).requires_grad)
    flags.append((x * 2).requires_grad)
    assert flags == [False, True]


def test_transforms_are_seen_through() -> None:
    """Gradients, tangents and memory by any transform around, not the innermost alone."""
    base, seen = torch.ones(3), []

    def look(x: torch.Tensor) -> torch.Tensor:
        ours = torch_private
        assert ours.transformed()
        same = ours.innermost(x).data_ptr() == base.data_ptr()
        nested = ours.has_nested_gradients(x)
        seen.append((ours.requires_grad(x), ours.has_tangent(x), nested, same))
        return (x**3).sum()

    grad, vmap = torch.func.grad, torch.vmap
    grad(look)(base)
    grad(lambda x: grad(look)(x).sum())(base)
    torch.func.jvp(grad(look), (base,), (base,))
    vmap(lambda _: look(base))(torch.ones(2))
    assert seen[:2] == [(True, False, False, True), (True, False, True, True)]
    assert seen[2][:3] == (True, True, False)
    assert seen[3] == (False, False, False, True)
    assert not torch_private.transformed()


def test_what_is_made_to_stay_is_of_no_transform() -> None:
    kept = []

    def look(x: torch.Tensor) -> torch.Tensor:
        with torch_private.made_to_stay():
            kept.append(torch.zeros(3) + 1)
        assert not torch_private.is_plain(x)
        return x + kept[-1]

    with torch.inference_mode():
        torch.vmap(look)(torch.zeros(2, 3))
        torch.func.functionalize(torch.vmap(look))(torch.zeros(2, 3))
    for x in kept:
        assert torch_private.is_plain(x)
        assert not x.is_inference()
        assert torch_private.innermost(x) is x


def test_constants_and_static_sizes_in_graphs() -> None:
    """A marked function is called once, while tracing; a marked tensor has no symbolic size."""
    calls = []

    @torch_private.constant_in_graphs
    def chosen() -> str:
        calls.append(1)
        return "native"

    table = torch.zeros(2, 3)
    torch_private.static_in_graphs(table)
    sizes = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        seen = (node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder"))
        sizes.extend(x.shape for x in seen if isinstance(x, torch.Tensor))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: (x * 2 if chosen() == "native" else x) + t.sum(),
        backend=backend,
        dynamic=True,
        fullgraph=True,
    )
    compiled(torch.zeros(4), table)
    compiled(torch.zeros(5), table)
    assert len(calls) == 1
    assert [[isinstance(n, int) for n in size] for size in sizes] == [[False], [True, True]]


def test_a_backward_pass_is_seen() -> None:
    """Also within a checkpoint's second run, which records gradients."""
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.in_backward())
        return x.sin()

    x = torch.zeros(2, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]
    assert not torch_private.in_backward()


def test_fake_mode() -> None:
    with FakeTensorMode() as mode:
        x = torch.zeros(2)
    assert torch_private.fake_mode_of(x) is mode
    assert torch_private.fake_mode_of(torch.zeros(2)) is None


@pytest.mark.parametrize("backend", ["", "eager", "aot_eager", "inductor"])
def test_what_is_expected_is_seen_in_graphs_too(backend: str) -> None:
    def look(x: torch.Tensor) -> torch.Tensor:
        torch_private.expect((x > 0).all(), "x: expected numbers above 0")
        return x + 1

    if backend:
        torch.compiler.reset()
        look = torch.compile(look, fullgraph=True, backend=backend)
    assert torch.equal(look(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="x: expected numbers above 0"):
        look(torch.zeros(2))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_on_cpu_has_lse_and_takes_that_over_more_keys(causal: bool) -> None:
    """Of grouped heads; with all keys in two blocks the backward of each gives its part."""
    q, d_out = (torch.randn(2, 4, 8, 16, dtype=torch.float32) for _ in range(2))
    k, v = (torch.randn(2, 2, 8, 16) for _ in range(2))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    x, y, z = (t.repeat_interleave(4 // t.shape[1], 1) for t in leaves)
    scores = 0.3 * x @ y.mT
    if causal:
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    wanted = torch.autograd.grad((scores.softmax(-1) @ z * d_out).sum(), leaves)

    out, lse = torch_private.flash_attention_on_cpu(q, k, v, causal, 0.3)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    torch.testing.assert_close(out, (scores.softmax(-1) @ z).float())
    halves = [slice(0, 8)] if causal else [slice(0, 3), slice(3, 8)]
    parts = [
        torch_private.flash_attention_on_cpu_backward(
            d_out, q, k[:, :, at], v[:, :, at], out, lse, causal, 0.3
        )
        for at in halves
    ]
    dqs, dks, dvs = zip(*parts, strict=True)
    found = sum(dqs), torch.cat(dks, 2), torch.cat(dvs, 2)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y.float())


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_context_parallel_is_seen() -> None:
    from torch.distributed.tensor.experimental import context_parallel

    x = torch.zeros(1, 8)
    assert not torch_private.in_context_parallel()
    with context_parallel(init_device_mesh("cpu", (1,)), buffers=[x], buffer_seq_dims=[1]):
        assert torch_private.in_context_parallel()
    assert not torch_private.in_context_parallel()
