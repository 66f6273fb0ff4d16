"""Which accesses to shared memory nothing puts in an order: a race, whatever the result was.

Vector clocks: a warp counts its own steps from one meeting to the next and knows, of each other
one, how far it had come when they last met. An access to a byte is in order where its warp knows of
the last one that it must not overtake. The threads of a warp are in step here.

Copies of the tensor memory accelerator end on behalf of no warp, but of an agent: one for each
mbarrier, of which those know who waited for it.

Products of wgmma and copies of the tensor memory accelerator reach shared memory through the async
proxy, all other accesses through the generic one. An access by the async proxy comes after one by
the generic proxy only where fence.proxy.async stands on the way from one to the other (PTX ISA 8.7,
memory consistency model, proxy-preserved base causality order); any warp on that way may execute
it. A second clock counts up to where the steps of each warp are fenced so. The other way round none
is needed: who waits for the async proxy waits for a fence, too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

# Bytes in which matrices of wgmma and boxes of the tensor memory accelerator lie together.
CHUNK = 16
# mbarriers that a block can have.
AGENTS = 256
# What the async proxy reads after cp.async wrote it; what it writes after the generic proxy wrote
# or read it.
UNFENCED = ("copied", "overwritten", "read")


class Order:
    """Of ``warps`` warps over ``size`` bytes.

    unfenced: what passes without a proxy fence although the PTX ISA asks for one, of `UNFENCED`.
    """

    def __init__(self, warps: int, size: int, unfenced: Collection[str] = ()) -> None:
        size = -(-size // CHUNK) * CHUNK
        self.warps, self.unfenced = warps, unfenced
        self.known = np.zeros((warps, warps + AGENTS), np.int32)
        self.fenced = np.zeros_like(self.known)
        self.writer = np.zeros(size, np.int16)
        self.written = np.zeros(size, np.int32)
        # When warps last read by the generic proxy, and waited for what reads by the other one.
        self.read = np.zeros((warps, size), np.int32)
        self.used = np.zeros((warps, size), np.int32)
        self.uses = False
        # A copy into these bytes, or what reads them, may still be going on.
        self.copied = np.zeros(size, bool)
        self.in_use = np.zeros(size, np.int16)
        # The last one to write was cp.async.
        self.by_copy = np.zeros(size, bool)
        self.landed = np.zeros(AGENTS, np.int32)
        self.own = np.arange(warps)
        # Of `unfenced`: what there was, in all blocks so far.
        self.passed: set[str] = set()

    def reset(self) -> None:
        self.known[:] = 0
        self.known[self.own, self.own] = 1
        for x in (self.fenced, self.writer, self.written, self.read, self.landed):
            x[:] = 0
        if self.uses:
            self.used[:] = 0
        for x in (self.copied, self.in_use, self.by_copy):
            x[:] = 0

    def meet(self, warps: Any) -> None:
        """A barrier of warps, by their indices or (warps,) bool."""
        self.known[warps] = self.known[warps].max(0)
        self.fenced[warps] = self.fenced[warps].max(0)
        self._step(warps)

    def clock(self) -> np.ndarray:
        """Where `give` leaves what warps know."""
        return np.zeros((2, self.warps + AGENTS), np.int32)

    def give(self, warps: Any, to: np.ndarray) -> None:
        """Warps leave what they know in ``to``, of `clock`; `take` gets it from there."""
        np.maximum(to[0], self.known[warps].max(0), out=to[0])
        np.maximum(to[1], self.fenced[warps].max(0), out=to[1])
        self._step(warps)

    def take(self, warps: Any, of: np.ndarray) -> None:
        self.known[warps] = np.maximum(self.known[warps], of[0])
        self.fenced[warps] = np.maximum(self.fenced[warps], of[1])

    def fence(self, warps: Any) -> None:
        """fence.proxy.async by warps: of all writes they know of, their own among them."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.known[warps])
        self._step(warps)

    def _step(self, warps: Any) -> None:
        self.known[self.own[warps], self.own[warps]] += 1

    # ------------------------------------------------------------------------------ of warps

    def reads(self, places: np.ndarray, warp: np.ndarray) -> str | None:
        """Bytes read by warps, two arrays of one shape; what is wrong, or None."""
        if self.copied[places].any():
            return "reads what a copy that was not waited for may still change"
        if (self.written[places] > self.known[warp, self.writer[places]]).any():
            return "reads what another warp wrote, with no barrier between"
        self.read[warp, places] = self.known[warp, warp]
        return None

    def writes(self, places: np.ndarray, warp: np.ndarray, copy: bool = False) -> str | None:
        """Bytes written by warps, or copied into on their behalf."""
        if self.copied[places].any():
            return "writes where a copy that was not waited for is going on"
        if self.in_use[places].any():
            return "writes what a product or copy that was not waited for may still read"
        if (self.written[places] > self.known[warp, self.writer[places]]).any():
            return "writes what another warp wrote, with no barrier between"
        known = self.known[warp, : self.warps]
        for clock in (self.read, self.used) if self.uses else (self.read,):
            if (clock[:, places] > np.moveaxis(known, -1, 0)).any():
                return "writes what another warp reads, with no barrier between"
        self.writer[places] = warp
        self.written[places] = self.known[warp, warp]
        self.by_copy[places] = copy
        if copy:
            self.copied[places] = True
        return None

    def copied_by(self, places: np.ndarray, warp: np.ndarray) -> None:
        """Copies of warps have ended: the bytes are as if those had written them now."""
        self.copied[places] = False
        self.writer[places] = warp
        self.written[places] = self.known[warp, warp]

    # -------------------------------------------------------------------- of the async proxy

    def _forbids(self, what: str, where: np.ndarray) -> bool:
        """Whether something of `UNFENCED`, if it is anywhere, is an error; else it is noted."""
        if not where.any():
            return False
        self.passed.add(what)
        return what not in self.unfenced

    def begin_use(self, chunks: np.ndarray, warps: np.ndarray) -> str | None:
        """Warps have the async proxy read chunks, each once, from now to `end_use`."""
        if _of(self.copied, chunks).any():
            return "reads what a copy that was not waited for may still change"
        writer, written = _of(self.writer, chunks), _of(self.written, chunks)
        if (written > self.known[warps].min(0)[writer]).any():
            return "reads what another warp wrote, with no barrier between"
        bare = (writer < self.warps) & (written > self.fenced[warps].min(0)[writer])
        copied = bare & _of(self.by_copy, chunks)
        if self._forbids("copied", copied) or (bare & ~copied).any():
            return "reads what the generic proxy wrote, with no fence.proxy.async between"
        self.in_use.reshape(-1, CHUNK)[chunks] += 1
        return None

    def end_use(self, chunks: np.ndarray, warps: np.ndarray) -> None:
        """Warps have waited for what reads chunks: it is as if they had read them now."""
        self.in_use.reshape(-1, CHUNK)[chunks] -= 1
        for warp in warps:
            self.used[warp].reshape(-1, CHUNK)[chunks] = self.known[warp, warp]
        self.uses = True

    def begin_copy(self, chunks: np.ndarray, warp: int) -> str | None:
        """A warp has the async proxy write chunks, until `land`."""
        if _of(self.copied, chunks).any():
            return "writes where a copy that was not waited for is going on"
        if _of(self.in_use, chunks).any():
            return "writes what a product or copy that was not waited for may still read"
        writer, written = _of(self.writer, chunks), _of(self.written, chunks)
        if (written > self.known[warp][writer]).any():
            return "writes what another warp wrote, with no barrier between"
        bare = (writer < self.warps) & (written > self.fenced[warp][writer])
        if self._forbids("overwritten", bare):
            return "writes what the generic proxy wrote, with no fence.proxy.async between"
        known = self.known[warp, : self.warps, None, None]
        read, used = (x.reshape(self.warps, -1, CHUNK)[:, chunks] for x in (self.read, self.used))
        if (np.maximum(read, used) > known).any():
            return "writes what another warp reads, with no barrier between"
        if self._forbids("read", read > self.fenced[warp, : self.warps, None, None]):
            return "writes what the generic proxy read, with no fence.proxy.async between"
        self.copied.reshape(-1, CHUNK)[chunks] = True
        return None

    def land(self, chunks: np.ndarray, agent: int, to: np.ndarray) -> None:
        """A copy has ended: those know who `take` from ``to``."""
        self.landed[agent] += 1
        self.copied.reshape(-1, CHUNK)[chunks] = False
        self.by_copy.reshape(-1, CHUNK)[chunks] = False
        self.writer.reshape(-1, CHUNK)[chunks] = self.warps + agent
        self.written.reshape(-1, CHUNK)[chunks] = self.landed[agent]
        to[:, self.warps + agent] = self.landed[agent]


def _of(x: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    chosen: np.ndarray = x.reshape(-1, CHUNK)[chunks]
    return chosen
