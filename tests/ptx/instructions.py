"""All instructions by name."""

from __future__ import annotations

from . import (
    arithmetic,
    conversions,
    copies,
    fences,
    matrices,
    memory,
    warps,
    wgmma,
)
from .machine import Machine, Step
from .program import Instruction

BUILDERS = {
    **arithmetic.BUILDERS,
    **conversions.BUILDERS,
    **copies.BUILDERS,
    **fences.BUILDERS,
    **matrices.BUILDERS,
    **memory.BUILDERS,
    **warps.BUILDERS,
    **wgmma.BUILDERS,
}


def build(machine: Machine, instruction: Instruction) -> Step:
    """What runs an instruction in a machine."""
    if instruction.name not in BUILDERS:
        raise NotImplementedError(str(instruction))
    return BUILDERS[instruction.name](machine, instruction)


def parts_threads(instruction: Instruction) -> bool:
    """Whether threads may go on from it at different times or places."""
    return instruction.name in warps.PARTING
