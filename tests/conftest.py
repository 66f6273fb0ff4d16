"""What every test needs: the interpreter without a GPU, poisoned memory, fixed seeds.

With LONGROPE_PTX=80 or 90 what Triton compiles for that GPU runs in place of its interpreter, see
tests/ptx. With LONGROPE_FULL=1 those tests run too that take long, see `make test-full`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

# Triton reads it when a kernel is defined, so it must be there before anything imports triton.
if not torch.cuda.is_available():
    if "LONGROPE_PTX" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["LONGROPE_CUDA_EMULATE"] = "1"

    import emulated

    try:
        emulated.build()
    except RuntimeError as error:  # then all tests of the backend fail, and no others
        warnings.warn(str(error), stacklevel=1)

    if "LONGROPE_PTX" in os.environ:
        from ptx.install import install

        install(int(os.environ["LONGROPE_PTX"]))
    else:
        import interpreted

        interpreted.hasten()

import codegen_cuda
import codegen_pages
import ranks
from hypothesis import HealthCheck, settings

# Derandomised: a red run is red again. No deadline: the interpreter is slow, and that is no bug.
settings.register_profile(
    "repository",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repository")


def pytest_configure(config: pytest.Config) -> None:
    # Triton 3.6's interpreter indexes with arrays of one element, once for each loop it runs.
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array:DeprecationWarning:triton.runtime"
    )


FULL = os.environ.get("LONGROPE_FULL") == "1"


def takes_long(item: pytest.Item) -> bool:
    """Gradients of more than a tile or two in Triton's interpreter, some seconds each."""
    given = getattr(item, "callspec", None)
    if item.path.stem != "test_attention_grad" or given is None or "LONGROPE_PTX" in os.environ:
        return False
    backend, case = given.params.get("backend"), given.params.get("case")
    if case is None or backend is None or backend.backend != "triton" or backend.device != "cpu":
        return False
    return bool(max(case.queries, case.keys, *case.counts) > 33 or case.dim > 64)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what only a GPU, what stands for one, or nvcc can run; an absent backend fails."""
    for item in items:
        if takes_long(item):
            item.add_marker(pytest.mark.full)
    absent = [] if FULL or torch.cuda.is_available() else ["full"]
    if not torch.cuda.is_available():
        absent.append("gpu")
        if "LONGROPE_PTX" not in os.environ:
            absent.append("compiled")
    if codegen_cuda.nvcc() is None:
        absent.append("nvcc")
    if not codegen_pages.counts_hold():
        absent.append("counts")

    def cannot_run(item: pytest.Item) -> bool:
        return any(item.get_closest_marker(name) for name in absent)

    config.hook.pytest_deselected(items=[item for item in items if cannot_run(item)])
    items[:] = [item for item in items if not cannot_run(item)]


def pytest_collection_finish() -> None:
    """All modules of the tests are imported, and none has run."""
    ranks.prepare()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    """Tests say which backends there are, by which calls of a kind are served."""
    from longrope_kernels.calls import kinds

    kinds.forget()


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN: an unwritten output element shows.

    The fill is part of the allocation in the dispatcher below Python, so it reaches `empty_like`,
    `new_empty` and the ops' own outputs alike, on every device. ``warn_only`` keeps operators
    without a deterministic form usable.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _freed() -> Iterator[None]:
    """Give back what a test had of a GPU, where it was much: other processes test on it too."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile as in a process that has compiled nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def four() -> Iterator[ranks.Ranks]:
    """Four processes with a group."""
    pool = ranks.Ranks(4)
    yield pool
    pool.close()
