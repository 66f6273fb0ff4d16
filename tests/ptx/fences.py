"""fence: order between proxies. Between threads of one proxy all accesses are in order here."""

from __future__ import annotations

import numpy as np

from .arithmetic import Builder
from .machine import Machine, Mask, Step
from .program import Instruction


def _fence(machine: Machine, instruction: Instruction) -> Step:
    kinds = instruction.modifiers
    if kinds[0] != "proxy":
        # fence.acq_rel, fence.mbarrier_init: the steps of a block are in order.
        return lambda mask: None
    if kinds[1] != "async":
        raise NotImplementedError(str(instruction))

    def run(mask: Mask) -> None:
        machine.order.fence(np.unique(machine.warp[machine.active(mask)]))

    return run


BUILDERS: dict[str, Builder] = {"fence": _fence}
