"""What SASS, as cuobjdump prints it, does to the registers of matrix products that are under way.

wgmma (HGMMA in SASS) is asynchronous: between its issue and the WARPGROUP.DEPBAR that waits for it,
the matrix unit reads A where it comes from registers, and owns the accumulator. ptxas allocates
those registers, and up to CUDA 13.0 it has been seen to reuse them too early
(triton-lang/triton#11781): a wrong result that no look at the PTX shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LINE = re.compile(
    r"/\*(?P<place>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<name>[A-Z][A-Za-z0-9_.]*)(?P<operands>[^;]*);"
)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
# These write no register; everything else writes the first one that it names.
_STORES = {"ST", "STG", "STS", "STL", "STSM", "RED", "REDG", "LDGSTS", "CCTL", "UTMASTG", "UTMALDG"}
_BRANCHES = {"BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK", "NOP", "YIELD"}
_BARRIERS = {"BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "ERRBAR"}
_PREDICATES = {"ISETP", "FSETP", "DSETP", "HSETP2", "PSETP", "FCHK", "R2P", "R2UR", "VOTEU"}
_WRITE_NOTHING = _STORES | _BRANCHES | _BARRIERS | _PREDICATES | {"SYNCS"}
_ASYNCHRONOUS = ("HGMMA", "QGMMA", "IGMMA")
_MOST_GROUPS = 8  # under way at once; older ones are waited for long before


class Instruction(NamedTuple):
    """One line: its address, whether a predicate guards it, its name, and its operands."""

    place: int
    guarded: bool
    name: str
    operands: tuple[str, ...]

    @property
    def family(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.family != "BRA":
            return None
        return int(self.operands[-1], 16)

    def writes(self) -> range:
        """The registers that a synchronous instruction writes."""
        if self.family in _WRITE_NOTHING:
            return range(0)
        first = next((x for x in self.operands if not re.fullmatch(r"!?U?PR?(\d+|T)?", x)), "")
        register = re.match(r"R(\d+)\b", first)
        if register is None:
            return range(0)
        return range(int(register[1]), int(register[1]) + _width(self.name))

    def names(self) -> set[int]:
        """The registers that stand in its text, of a wide operand the first."""
        return {int(x) for operand in self.operands for x in _REGISTER.findall(operand)}


def _width(name: str) -> int:
    """How many registers an instruction of this name writes."""
    family, *parts = name.split(".")
    if family == "HMMA":
        return 4 if "F32" in parts else 2
    if family == "IMMA":
        return 4
    if family == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if "128" in parts:
        return 4
    if family == "CS2R":
        return 1 if "32" in parts else 2
    if "64" in parts or "WIDE" in parts or family in ("DADD", "DMUL", "DFMA", "DMNMX"):
        return 2
    to_64_bits = parts[:1] in (["F64"], ["S64"], ["U64"])
    return 2 if to_64_bits and family in ("F2F", "I2F", "F2I") else 1


def functions(dump: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The name and the instructions of each function."""
    starts = [*_FUNCTION.finditer(dump)]
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        text = dump[start.end() : end.start() if end else len(dump)]
        yield start[1], [_instruction(match) for match in _LINE.finditer(text)]


def _instruction(match: re.Match[str]) -> Instruction:
    text = re.split(r"\s[&?]", match["operands"])[0].strip()  # what follows is for the scheduler
    operands = tuple(x.strip() for x in text.split(",")) if text else ()
    return Instruction(int(match["place"], 16), bool(match["guard"]), match["name"], operands)


# Registers of products under way: whether it is an accumulator, and how many groups of products
# were committed since, that of its own product included.
_Pending = dict[int, tuple[bool, int]]


def _registers(product: Instruction) -> tuple[range, range]:
    """The accumulator and, where it is in registers, A."""
    acc, a = (re.match(r"R(\d+)\b", x) for x in product.operands[:2])
    assert acc is not None, product
    size = re.search(r"\.64x(\d+)x", product.name)
    assert size is not None, product
    width = int(size[1]) // (2 if ".F32" in product.name or "S32" in product.name else 4)
    first, of_a = int(acc[1]), int(a[1]) if a else 0
    return range(first, first + width), range(of_a, of_a + 4 if a else 0)


def _after(instruction: Instruction, before: _Pending) -> _Pending:
    """What is under way after an instruction."""
    if instruction.family in _ASYNCHRONOUS:
        acc, a = _registers(instruction)
        after = {**before, **dict.fromkeys(a, (False, 0)), **dict.fromkeys(acc, (True, 0))}
        if "gsb0" not in instruction.operands:
            return after
        return {r: (is_acc, min(n + 1, _MOST_GROUPS)) for r, (is_acc, n) in after.items()}
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        most = int(instruction.operands[-1], 16)
        return {r: x for r, x in before.items() if x[1] <= most}
    return before


def _fault(instruction: Instruction, pending: _Pending) -> int | None:
    """A register under way that the instruction must not touch."""
    written: range | set[int] = instruction.writes()
    read = instruction.names()
    if instruction.family in _ASYNCHRONOUS:
        # A product may add to the accumulator of the one before: the matrix unit keeps the order.
        acc, a = _registers(instruction)
        written, read = {r for r in acc if r in pending and not pending[r][0]}, set(a)
    touched = [r for r in written if r in pending]
    touched += [r for r in read if r in pending and pending[r][0]]
    return min(touched, default=None)


def touched_too_early(dump: str) -> list[str]:
    """Instructions that write a register of a product under way, or read its accumulator."""
    faults = []
    for function, instructions in functions(dump):
        if not any(x.family in _ASYNCHRONOUS for x in instructions):
            continue
        index = {x.place: i for i, x in enumerate(instructions)}
        pending: list[_Pending | None] = [None] * len(instructions)
        todo = [(0, _Pending())]
        while todo:
            i, arriving = todo.pop()
            known = pending[i]
            if known is not None:
                # On whatever way one comes: all that may be under way, as late as it may be.
                merged = dict(known)
                for r, (is_acc, n) in arriving.items():
                    old_acc, old = known.get(r, (False, _MOST_GROUPS))
                    merged[r] = (is_acc or old_acc, min(n, old))
                if merged == known:
                    continue
                arriving = merged
            pending[i] = arriving
            instruction = instructions[i]
            after = _after(instruction, arriving)
            target = instruction.target
            if target is not None:
                todo.append((index[target], after))
            ends = instruction.family in ("EXIT", "BRA", "RET") and not instruction.guarded
            if not ends and i + 1 < len(instructions):
                todo.append((i + 1, after))
        for instruction, state in zip(instructions, pending, strict=True):
            register = None if state is None else _fault(instruction, state)
            if register is not None:
                text = f"{instruction.name} {', '.join(instruction.operands)}"
                faults.append(f"{function} {instruction.place:#x} R{register}: {text}")
    return faults
