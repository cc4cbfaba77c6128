"""PTX text -> the instructions of one kernel, with unique names of registers and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.errors import EmulationError

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*$", re.S | re.M)
_ENTRY = r"\.entry\s+({name})\s*\((.*?)\)\s*((?:\.\w+[^\n{{]*\s*)*)\{{"
_GLOBAL = re.compile(r"^\s*(?:\.\w+\s+)*\.global\b[^;=\[]*?([\w$]+)\s*(?:\[\d*\])?\s*[=;]", re.M)
# The tokens that can begin a statement.
_TOKEN = re.compile(r"\s*(?:(\{)|(\})|([A-Za-z_$%][\w$]*)\s*:(?!:)|([^;]*);)")
_NAME = re.compile(r"[\w$%]+")
_BITS = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    bytes: int


@dataclass(frozen=True)
class Instruction:
    """`name` is the opcode with its modifiers, `parts` the same in pieces.

    guard: the predicate register before it and whether its value is negated, or None.
    """

    name: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    text: str

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


@dataclass
class _Scope:
    """The names declared between two braces, and what they are called in the whole kernel."""

    number: int
    names: dict[str, str] = field(default_factory=dict)

    def declare(self, name: str) -> str:
        # The outermost names are unique already.
        self.names[name] = f"{name}__{self.number}" if self.number else name
        return self.names[name]


def entries(ptx: str) -> list[str]:
    """The names of the kernels in a PTX file."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that are in no bracket."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        operands.append(current.strip())
    return tuple(operands)


class Kernel:
    """One kernel of a PTX file: the first one, or the one called `name`.

    Attributes:
        name: the kernel's name.
        parameters: what it is launched with.
        threads: of a block, where the file says so (.reqntid or .maxntid), else None.
        code: its instructions.
        labels: label -> index into code.
        registers: declared register, or the prefix of a numbered family -> PTX type.
        static_shared: name -> (bytes, alignment) of what it declares in shared memory.
        extern_shared: the names of shared memory whose size comes with the launch.
        globals: the names of data in the file, such as the messages of assertions.
        local: name -> (bytes, alignment) of each thread's own memory.
    """

    def __init__(self, ptx: str, name: str | None = None):
        ptx = _COMMENT.sub("", ptx)
        pattern = re.escape(name) if name else r"[\w$]+"
        head = re.search(_ENTRY.format(name=pattern), ptx, re.S)
        if head is None:
            raise EmulationError(f"no kernel {name or ''} in the PTX")
        self.name = head[1]
        self.parameters = [_parameter(p) for p in head[2].split(",") if p.strip()]
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
        self.threads = int(threads[1]) if threads else None
        self.extern_shared = re.findall(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\s*\[\s*\]", ptx)
        self.globals = _GLOBAL.findall(ptx)
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}
        self.static_shared: dict[str, tuple[int, int]] = {}
        self.local: dict[str, tuple[int, int]] = {}
        self._parse(ptx, head.end())

    def _parse(self, ptx: str, at: int) -> None:
        count = 0
        scopes = [_Scope(0)]
        statements: list[tuple[str, tuple[_Scope, ...]]] = []
        labels: dict[str, int] = {}
        while True:
            token = _TOKEN.match(ptx, at)
            if token is None:
                raise EmulationError(f"{self.name}: cannot parse {ptx[at : at + 80]!r}")
            at = token.end()
            if token[1]:
                count += 1
                scopes.append(_Scope(count))
            elif token[2]:
                scopes.pop()
                if not scopes:
                    break
            elif token[3]:
                labels[scopes[-1].declare(token[3])] = len(statements)
            else:
                text = " ".join(token[4].split())
                if text.startswith(".reg"):
                    self._declare_registers(text, scopes[-1])
                elif text.startswith((".shared", ".local")):
                    self._declare_memory(text)
                elif text and not text.startswith("."):
                    statements.append((text, tuple(scopes)))
        self.labels = labels
        # Names are looked up last: a label may come after the branch that names it.
        self.code = [_instruction(_rename(text, chain)) for text, chain in statements]

    def _declare_registers(self, text: str, scope: _Scope) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for name in names.split(","):
            name = name.strip()
            family = re.match(r"([\w%$]+)<\d+>", name)
            self.registers[family[1] if family else scope.declare(name)] = kind

    def _declare_memory(self, text: str) -> None:
        align = re.search(r"\.align\s+(\d+)", text)
        kind, name, size = re.search(r"\.(\w+)\s+([\w$]+)(?:\s*\[\s*(\d+)\s*\])?$", text).groups()
        element = _BITS[kind[1:]]
        place = (int(size or 1) * element, int(align[1]) if align else element)
        (self.static_shared if text.startswith(".shared") else self.local)[name] = place


def _parameter(text: str) -> Parameter:
    name, count = re.search(r"([\w$]+)(?:\[(\d+)\])?\s*$", text).groups()
    kind = re.search(r"\.([busf](?:8|16|32|64))\b", text)[1]
    return Parameter(name, kind, int(count or 1) * _BITS[kind[1:]])


def _rename(text: str, chain: tuple[_Scope, ...]) -> str:
    inner = [scope.names for scope in reversed(chain[1:]) if scope.names]
    if not inner:
        return text
    return _NAME.sub(lambda m: next((n[m[0]] for n in inner if m[0] in n), m[0]), text)


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)([%\w$]+)\s+(.*)", text)
    rest = guard[3] if guard else text
    name, operands = re.match(r"([a-z][\w.:]*)\s*(.*)", rest).groups()
    return Instruction(
        name, split_operands(operands), (guard[2], guard[1] == "!") if guard else None, text
    )
