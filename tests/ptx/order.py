"""Which accesses to shared memory nothing puts in an order: a race, whatever the result was.

Vector clocks: a warp counts its own steps from one meeting to the next and knows, of each other
one, how far it had come when they last met. An access to a byte is in order where its warp knows of
the last one that it must not overtake. The threads of a warp are in step here.

Products of wgmma read shared memory through the async proxy, all other accesses go through the
generic one. An access by the async proxy comes after one by the generic proxy only where
fence.proxy.async stands on the way from one to the other (PTX ISA 8.7, memory consistency model,
proxy-preserved base causality order); any warp on that way may execute it. A second clock counts up
to where the steps of each warp are fenced so. The other way round none is needed: who waits for the
async proxy waits for a fence, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Bytes in which matrices of wgmma lie together.
CHUNK = 16


class Order:
    """Of ``warps`` warps over ``size`` bytes.

    unfenced_copies: what cp.async wrote passes to the async proxy without a proxy fence, although
    the PTX ISA asks for one.
    """

    def __init__(self, warps: int, size: int, unfenced_copies: bool = False) -> None:
        size = -(-size // CHUNK) * CHUNK
        self.warps, self.unfenced_copies = warps, unfenced_copies
        self.known = np.zeros((warps, warps), np.int32)
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
        self.own = np.arange(warps)
        # Whether there was one, in any block so far.
        self.passed = False

    def reset(self) -> None:
        self.known[:] = 0
        self.known[self.own, self.own] = 1
        for x in (self.fenced, self.writer, self.written, self.read):
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
            return "writes what a product that was not waited for may still read"
        if (self.written[places] > self.known[warp, self.writer[places]]).any():
            return "writes what another warp wrote, with no barrier between"
        known = self.known[warp]
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

    def begin_use(self, chunks: np.ndarray, warps: np.ndarray) -> str | None:
        """Warps have the async proxy read chunks, each once, from now to `end_use`."""
        if _of(self.copied, chunks).any():
            return "reads what a copy that was not waited for may still change"
        writer, written = _of(self.writer, chunks), _of(self.written, chunks)
        if (written > self.known[warps].min(0)[writer]).any():
            return "reads what another warp wrote, with no barrier between"
        bare = written > self.fenced[warps].min(0)[writer]
        copied = bare & _of(self.by_copy, chunks)
        self.passed |= bool(copied.any())
        if ((bare & ~copied) if self.unfenced_copies else bare).any():
            return "reads what the generic proxy wrote, with no fence.proxy.async between"
        self.in_use.reshape(-1, CHUNK)[chunks] += 1
        return None

    def end_use(self, chunks: np.ndarray, warps: np.ndarray) -> None:
        """Warps have waited for what reads chunks: it is as if they had read them now."""
        self.in_use.reshape(-1, CHUNK)[chunks] -= 1
        for warp in warps:
            self.used[warp].reshape(-1, CHUNK)[chunks] = self.known[warp, warp]
        self.uses = True


def _of(x: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    chosen: np.ndarray = x.reshape(-1, CHUNK)[chunks]
    return chosen
