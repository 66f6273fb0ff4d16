"""The ranks of a sequence: who they are, that all were called alike, and who failed to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = dist.ProcessGroup | DeviceMesh | None


class Line(NamedTuple):
    """The ranks of one process group; without a group, this one alone."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Line(None, 0, 1)


class Ranks(NamedTuple):
    """Ranks that share a sequence: ``ring.size`` times ``heads.size`` of them.

    Those of a line of ``heads`` exchange heads for tokens; their sequence goes round the ring.
    """

    ring: Line
    heads: Line

    @property
    def rank(self) -> int:
        """Which part of the sequence this rank has."""
        return self.ring.rank * self.heads.size + self.heads.rank

    @property
    def size(self) -> int:
        """Into how many parts the sequence is cut."""
        return self.ring.size * self.heads.size


def ranks_of(group: Group) -> Ranks:
    """A process group, a mesh of one dimension, or of two: ring and heads; None: all processes."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: expected processes that torch.distributed.init_process_group has joined, "
            "got none"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim not in (1, 2):
            raise ValueError(f"group: expected a mesh of 1 or 2 dimensions, got {group.ndim}")
        lines = [_line(group.get_group(i)) for i in range(group.ndim)]
        return Ranks(lines[0], lines[1] if group.ndim == 2 else ALONE)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}"
        )
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return Ranks(_line(group), ALONE)


def _line(group: dist.ProcessGroup) -> Line:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected one that this rank belongs to, got one without it")
    return Line(group, rank, dist.get_world_size(group))


# ------------------------------------------------------------------------------------- messages

Work: TypeAlias = tuple[int, Any]  # the rank at the other end, and what to wait for


def start(
    line: Line,
    sends: Sequence[tuple[int, torch.Tensor]],
    receives: Sequence[tuple[int, torch.Tensor]],
) -> list[Work]:
    """Begin to send tensors to ranks of the line and to receive from them; nothing where empty."""
    group = line.group
    assert group is not None
    messages: list[tuple[Callable[..., Any], int, torch.Tensor]]
    messages = [(dist.isend, peer, x) for peer, x in sends if x.numel()]
    messages += [(dist.irecv, peer, x) for peer, x in receives if x.numel()]
    if not messages:
        return []
    if messages[0][2].is_cpu:  # one by one, so that an error has a name
        works: list[Work] = []
        for function, peer, x in messages:
            try:
                works.append((peer, function(x, dist.get_global_rank(group, peer), group)))
            except RuntimeError as error:  # noqa: PERF203
                raise _unanswered(line, [peer], error) from error
        return works
    ops = [
        dist.P2POp(function, x, dist.get_global_rank(group, peer), group)
        for function, peer, x in messages
    ]
    found = answered(line, lambda: dist.batch_isend_irecv(ops))
    if len(found) < len(ops):  # one stands for all
        return [(messages[-1][1], work) for work in found]
    return [(peer, work) for (_, peer, _), work in zip(messages, found, strict=True)]


def finish(line: Line, works: Sequence[Work]) -> None:
    """Wait for what `start` began.

    Raises:
        RuntimeError: naming all ranks that did not answer.
    """
    silent: dict[int, RuntimeError] = {}
    for peer, work in works:
        try:
            work.wait()
        except RuntimeError as error:  # noqa: PERF203 (each may be the one that died)
            silent[peer] = error
    if silent:
        raise _unanswered(line, sorted(silent), next(iter(silent.values())))


def answered(line: Line, do: Callable[[], Any]) -> Any:
    """What ``do`` returns, an operation of all ranks; its errors say so."""
    try:
        return do()
    except RuntimeError as error:
        others = [rank for rank in range(line.size) if rank != line.rank]
        raise _unanswered(line, others, error) from error


def _unanswered(line: Line, ranks: list[int], error: RuntimeError) -> RuntimeError:
    whom = f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {ranks}"
    reason = str(error).strip().splitlines()[0]
    return RuntimeError(
        f"group: {whom} of {line.size} died or did not answer rank {line.rank} in time: {reason}"
    )


# -------------------------------------------------------------------------------------- digests

_CPU = torch.device("cpu")
_ERROR = "error"  # in place of arguments
_TOLD = "group: "  # before what another rank said
_known: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()


def agree(ranks: Ranks, fields: dict[str, Any], device: torch.device) -> None:
    """All ranks were called with these arguments.

    On a CPU they are compared in each call. On other devices, where a comparison waits for the
    device, those that a group has compared once are not compared again.

    Raises:
        ValueError: on all ranks, naming an argument that differs and what each rank has.
        RuntimeError: naming a rank that did not answer.
    """
    found: ValueError | None = None
    across = (ranks.ring.rank * ranks.heads.size, 1), (ranks.heads.rank, ranks.heads.size)
    for line, (first, stride) in zip((ranks.heads, ranks.ring), across, strict=True):
        if line.group is None or line.size == 1:
            continue
        digest = hashlib.sha256(repr(fields).encode()).hexdigest()[:32]
        known = _known.setdefault(line.group, set())
        if device.type != "cpu" and digest in known:
            continue
        try:
            _compare(line, digest, fields, device, range(first, first + stride * line.size, stride))
        except ValueError as error:
            # Those of the ring know nothing of it yet, and wait.
            found = found or error
            fields = {_ERROR: str(found).removeprefix(_TOLD)}
        else:
            if device.type != "cpu":
                known.add(digest)
    if found is not None:
        raise found


@contextmanager
def telling(ranks: Ranks, first: object) -> Iterator[None]:
    """A wrong argument of this rank, found before `agree`, ends the others there, by its name.

    first: the device of the call, or an argument that has it where it is what it should be.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        device = first.device if isinstance(first, torch.Tensor) else first
        # Where the others compare on the CPU: this one may have no tensor at all, or none there.
        if not isinstance(device, torch.device) or device.type in ("cpu", "meta"):
            with suppress(ValueError, RuntimeError):
                told = f"rank {ranks.rank}: {type(error).__name__}: {error}"
                agree(ranks, {_ERROR: told}, _CPU)
        raise


def _compare(
    line: Line, digest: str, fields: dict[str, Any], device: torch.device, names: range
) -> None:
    own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    others = [i for i in range(line.size) if i != line.rank]
    got = {i: torch.empty_like(own) for i in others}
    works = start(line, [(i, own) for i in others], list(got.items()))
    finish(line, works)
    if all(torch.equal(own, x) for x in got.values()):
        return
    everyone: list[Any] = [None] * line.size
    answered(line, lambda: dist.all_gather_object(everyone, fields, group=line.group))
    for of_rank in everyone:
        if _ERROR in of_rank:
            raise ValueError(f"{_TOLD}{of_rank[_ERROR]}")
    for name in fields:
        values = [of_rank.get(name) for of_rank in everyone]
        if any(value != values[0] for value in values):
            pairs = zip(values, names, strict=True)
            shown = ", ".join(f"{value} on rank {i}" for value, i in pairs)
            raise ValueError(f"{name}: expected the same on all ranks, got {shown}")
    given = [sorted(of_rank) for of_rank in everyone]
    raise ValueError(f"group: expected the same call on all ranks, got {given}")
