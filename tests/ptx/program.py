"""The text of a PTX kernel as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Address(NamedTuple):
    """``[base + offset]``."""

    base: str
    offset: int = 0


# A register, a number or a symbol; several of them in braces; an address.
Operand = str | tuple[str, ...] | Address


@dataclass(frozen=True)
class Instruction:
    """``@guard name.modifiers operands;`` and the line of Python that it comes from."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str
    place: str

    @property
    def type(self) -> str:
        """The last modifier: of most instructions the type."""
        return self.modifiers[-1]

    def __str__(self) -> str:
        text = self.text if len(self.text) < 200 else f"{self.text[:120]} ... {self.text[-60:]}"
        return f"{text} ({self.place})"


@dataclass
class Program:
    """A kernel: parameters (name, type) in order, declared registers, where labels point.

    threads: that a block must have; 0 where the text does not say.
    """

    parameters: list[tuple[str, str]] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int = 0

    def target(self, instruction: Instruction) -> int:
        """Where a branch goes."""
        label = instruction.operands[0]
        assert isinstance(label, str)
        return self.labels[label]


_PARAMETER = re.compile(r"\.param\s+\.(\w+)\b[^,)]*?(\w+_param_\d+)")
_THREADS = re.compile(r"\.reqntid\s+(\d+)")
_STATEMENT = re.compile(r"\s*(?:@(!?)([%\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"\s*([$\w]+):")


def parse(text: str) -> Program:
    """The one kernel in the text of a module."""
    program = Program()
    head, body = re.split(
        r"\)\s*(?:\.\w+\s+[\d, ]+\s*)*\{", text[text.index(".entry") :], maxsplit=1
    )
    program.parameters = [(name, kind) for kind, name in _PARAMETER.findall(head)]
    required = _THREADS.search(text)
    program.threads = int(required[1]) if required else 0
    _Parser(program).read(body)
    return program


class _Parser:
    """Statements of nested scopes: names that a scope declares are made its own."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        self.place = "?"

    def read(self, body: str) -> None:
        # The places stand in comments: "// decode.py:328:20".
        body = re.sub(r"^\s*\.loc[^\n]*//\s*(\S+)[^\n]*$", r".place \1;", body, flags=re.MULTILINE)
        body = re.sub(r"^\s*\.loc[^\n]*$|//[^\n]*$", "", body, flags=re.MULTILINE)
        at = 0
        while self.scopes:
            at += len(body[at:]) - len(body[at:].lstrip())
            if body[at] in "{}":
                self._scope(body[at])
                at += 1
            elif label := _LABEL.match(body, at):
                self.program.labels[self._own(label[1])] = len(self.program.instructions)
                at = label.end()
            else:
                end = body.index(";", at)
                self._statement(body[at:end].strip())
                at = end + 1

    def _scope(self, brace: str) -> None:
        if brace == "{":
            self.opened += 1
            self.scopes.append({})
        else:
            self.scopes.pop()

    def _own(self, name: str) -> str:
        """A name that this scope declares."""
        if len(self.scopes) > 1:
            self.scopes[-1][name] = f"{name}@{self.opened}"
        return self._known(name)

    def _known(self, name: str) -> str:
        return next((s[name] for s in reversed(self.scopes) if name in s), name)

    def _statement(self, text: str) -> None:
        if text.startswith(".place"):
            self.place = text.split()[1]
        elif declared := _REGISTERS.match(text):
            for name in declared[2].split(","):
                prefix = name.strip().partition("<")[0]
                self.program.registers[self._own(prefix)] = declared[1]
        elif not text.startswith((".pragma", ".shared", ".local")):
            self.program.instructions.append(self._instruction(text))

    def _instruction(self, text: str) -> Instruction:
        negated, guard, name, modifiers, rest = _STATEMENT.fullmatch(text).groups()
        return Instruction(
            name,
            tuple(modifiers.split(".")[1:]),
            tuple(self._operand(x) for x in _split(rest)),
            self._known(guard) if guard else None,
            bool(negated),
            " ".join(text.split()),
            self.place,
        )

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return tuple(self._known(x) for x in _split(text[1:-1]))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            return Address(self._known(base.strip()), int(offset or "0"))
        return self._known(text)


def _split(text: str) -> list[str]:
    """The parts between commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
