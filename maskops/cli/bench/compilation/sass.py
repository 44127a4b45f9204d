"""Reads the instructions that ptxas made: the loops that do the work, what they load and how wide, what they spill."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

_SECTION = re.compile(r"^\.text\.([\w$.]+):")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;")
_TARGET = re.compile(r"\((\.L_\w+)\)")

TENSOR_CORES = ("HGMMA", "HMMA")
_WORK = (TENSOR_CORES, ("MUFU.EX2",), ("LDG", "LDGSTS", "UTMALDG", "STG"))
"""What makes a loop the one that matters: its matrix products; without any its exponentials; else its traffic."""

_SPILLS = ("LDL", "STL")
_LOADS = ("LDG", "LDGSTS", "UTMALDG")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Loop:
    """One hot loop.

    Attributes:
        instructions: Instructions of one pass, for each warp.
        tensor_cores: Matrix instructions by name, ``{"HGMMA": 16}``.
        loads: Global loads by instruction and width in bytes, ``{"LDGSTS.16": 8}``; UTMALDG loads whole tiles.
        spills: Loads and stores of local memory.
        exponentials: MUFU.EX2.
        order: How products, exponentials, waits, barriers and loads follow each other: ``M`` product, ``e``
            exponential, ``W`` wait for products, ``B`` barrier, ``L`` load, with the length of each run.
    """

    instructions: int
    tensor_cores: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    spills: int = 0
    exponentials: int = 0
    order: str = ""


@dataclass
class Function:
    """The instructions of a kernel, without predicates, and where its labels stand."""

    instructions: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def functions(disassembly: str) -> dict[str, Function]:
    """The kernels in the output of ``nvdisasm -c``, by their mangled names."""
    found: dict[str, Function] = {}
    current = Function()
    for line in disassembly.splitlines():
        if section := _SECTION.match(line):
            current = found.setdefault(section.group(1), Function())
        elif label := _LABEL.match(line):
            current.labels[label.group(1)] = len(current.instructions)
        elif instruction := _INSTRUCTION.match(line):
            current.instructions.append(instruction.group(1))
    return found


def count(function: Function, *opcodes: str) -> int:
    """How many instructions have one of these opcodes, whatever their modifiers."""
    return sum(1 for text in function.instructions if _opcode(text).split(".")[0] in opcodes)


def hot_loops(function: Function) -> list[Loop]:
    """The innermost loops that do the work, in the order in which they stand."""
    bodies = _loops(function)
    for work in _WORK:
        working = [body for body in bodies if _has(function.instructions[slice(*body)], work)]
        if working:
            break
    else:
        return []
    innermost = [
        body
        for body in working
        if not any(body != other and body[0] <= other[0] and other[1] <= body[1] for other in working)
    ]
    return [_describe(function.instructions[slice(*body)]) for body in sorted(innermost)]


def _loops(function: Function) -> list[tuple[int, int]]:
    """Where a branch goes back to an instruction before it: first instruction and one past the last."""
    bodies: dict[int, int] = {}
    for position, text in enumerate(function.instructions):
        target = _TARGET.search(text) if _opcode(text).startswith("BRA") else None
        start = function.labels.get(target.group(1)) if target else None
        if start is not None and start <= position:
            # A loop with `continue` has several branches back; the last one ends it.
            bodies[start] = position + 1
    return list(bodies.items())


def _has(body: Sequence[str], opcodes: Sequence[str]) -> bool:
    return any(_opcode(text).startswith(opcode) for text in body for opcode in opcodes)


def _describe(body: Sequence[str]) -> Loop:
    opcodes = [_opcode(text) for text in body]
    names = Counter(opcode.split(".")[0] for opcode in opcodes)
    loads = Counter(_load(opcode) for opcode in opcodes if opcode.split(".")[0] in _LOADS)
    return Loop(
        instructions=len(body),
        tensor_cores={name: names[name] for name in TENSOR_CORES if names[name]},
        loads=dict(sorted(loads.items())),
        spills=sum(names[name] for name in _SPILLS),
        exponentials=sum(opcode.startswith("MUFU.EX2") for opcode in opcodes),
        order=_order(opcodes),
    )


def _opcode(text: str) -> str:
    return text.split()[0]


def _load(opcode: str) -> str:
    name, *modifiers = opcode.split(".")
    width = next((_WIDTHS[part] for part in modifiers if part in _WIDTHS), 4)
    return name if name == "UTMALDG" else f"{name}.{width}"


def _order(opcodes: Sequence[str]) -> str:
    marks = {"HGMMA": "M", "HMMA": "M", "BAR": "B", "LDGSTS": "L", "UTMALDG": "L", "LDG": "L"}
    events = []
    for opcode in opcodes:
        if opcode.startswith("MUFU.EX2"):
            events.append("e")
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            events.append("W")
        elif mark := marks.get(opcode.split(".")[0]):
            events.append(mark)
    runs = [(mark, len(list(run))) for mark, run in groupby(events)]
    return " ".join(mark if length == 1 else f"{mark}x{length}" for mark, length in runs)
