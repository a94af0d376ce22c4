"""The text of a compiled program: its computations, their instructions and types, and how often each runs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BITS = re.compile(r"^(?:pred|[a-z]+(\d+)\w*)$")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAMED = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    inside: str  # between its parentheses
    rest: str  # after them

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, name: str) -> str:
        """`name=...`, without braces and the sign of names; "" where there is none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.rest)
        return "" if found is None else (found[1] if found[1] is not None else found[2]).replace("%", "")

    @property
    def target(self) -> str:
        """What a custom call calls; "" of others."""
        return self.attribute("custom_call_target").strip('"')


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the entry's."""
    program: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = program[header[1]] = {}
                entry = header[1] if line.startswith("ENTRY") else entry
        elif line == "}" or line.startswith("}, execution_thread"):  # a kernel's metadata have "}}, ..."
            current = None
        elif head := _NAMED.match(line):
            current[head[1]] = _instruction(head[1], line[head.end() :])
    return program, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    stop = _closed(text, start)
    return Instruction(name, kind, text[:start], text[start + 1 : stop - 1], text[stop:])


def _closed(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


def arrays(kind: str) -> list[tuple[float, tuple[int, ...], str]]:
    """(bytes of an element, shape, layout) of each array of a type, tuples flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        if bits := _BITS.match(dtype):
            shape = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
            found.append((int(bits[1] or 8) / 8, shape, layout))
    return found


def shape(kind: str) -> tuple[int, ...]:
    """Of the first array of a type."""
    return arrays(kind)[0][1]


def size(kind: str) -> float:
    """Bytes of a type."""
    return sum(each * math.prod(dims) for each, dims, _ in arrays(kind))


# Loops

BODIES = {"while": "body", "fusion": "calls", "call": "to_apply", "async-start": "calls"}
BODIES |= {"conditional": "branch_computations"}


def runs(program: dict[str, Computation], entry: str) -> Iterator[tuple[Computation, float, bool]]:
    """(computation, how often it runs, whether by itself or as part of a fusion)."""
    waiting = [(entry, 1.0, True)]
    while waiting:
        name, times, scheduled = waiting.pop()
        computation = program[name]
        yield computation, times, scheduled
        for i in computation.values():
            if i.op in BODIES:
                often = times * trips(program, i) if i.op == "while" else times
                bodies = i.attribute(BODIES[i.op]).split(", ")
                waiting += [(body, often, scheduled and i.op != "fusion") for body in bodies if body]


def trips(program: dict[str, Computation], loop: Instruction) -> int:
    """How often a loop runs: as the compiler says, or the bound in its condition by the step in its body."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition, body = loop.attribute("condition"), loop.attribute("body")
    bound = max(_constants(program, condition), default=1)
    counter = next((i for i in program[condition].values() if i.op == "get-tuple-element"), None)
    last = list(program[body].values())[-1]
    if counter is None or last.op != "tuple":
        return bound
    after = last.operands[int(counter.attribute("index"))]
    return max(1, -(-bound // max(1, _added(program, body, after))))


def _added(program: dict[str, Computation], name: str, value: str) -> int:
    """What the whole numbers on the way to `value` add to a counter that begins at 0."""
    i = program[name][value]
    if i.op == "add":
        return sum(_added(program, name, operand) for operand in i.operands)
    if i.op in ("copy", "bitcast", "convert"):
        return _added(program, name, i.operands[0])
    if i.op == "fusion":
        called = i.attribute("calls")
        given = sum(_added(program, name, operand) for operand in i.operands)
        return given + _added(program, called, list(program[called])[-1])
    return _constant(i) or 0


def _constants(program: dict[str, Computation], name: str) -> list[int]:
    """The whole numbers in a computation and in what it calls."""
    found = []
    for i in program[name].values():
        if (value := _constant(i)) is not None:
            found.append(value)
        if called := i.attribute("calls") or i.attribute("to_apply"):
            found += _constants(program, called)
    return found


def _constant(i: Instruction) -> int | None:
    return int(i.inside) if i.op == "constant" and i.inside.isdecimal() else None
