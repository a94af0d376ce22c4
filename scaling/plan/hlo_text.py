"""A parser of compiled programs' text: computations, instructions and types, and how often each runs."""

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
    """One instruction: `name = type op(inside)rest`."""

    name: str
    type: str
    op: str
    inside: str  # text between the parentheses
    rest: str  # text after them

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, name: str) -> str:
        """Returns the value of `name=...` without braces and the % of names; "" if there is none."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.rest)
        return "" if match is None else (match[1] if match[1] is not None else match[2]).replace("%", "")

    @property
    def target(self) -> str:
        """The target of a custom call; "" for other instructions."""
        return self.attribute("custom_call_target").strip('"')


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the program's computations by name, and the name of its entry."""
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
            current[head[1]] = _parse_instruction(head[1], line[head.end() :])
    return program, entry


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _end_of_parenthesis(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    stop = _end_of_parenthesis(text, start)
    return Instruction(name, kind, text[:start], text[start + 1 : stop - 1], text[stop:])


def _end_of_parenthesis(text: str, start: int) -> int:
    """Returns the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


def arrays(kind: str) -> list[tuple[float, tuple[int, ...], str]]:
    """Returns (bytes per element, shape, layout) of each array of a type, tuples flattened."""
    rows = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        if bits := _BITS.match(dtype):
            shape = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
            rows.append((int(bits[1] or 8) / 8, shape, layout))
    return rows


def shape(kind: str) -> tuple[int, ...]:
    """Returns the shape of the first array of a type."""
    return arrays(kind)[0][1]


def size(kind: str) -> float:
    """Returns the bytes of a type."""
    return sum(each * math.prod(dims) for each, dims, _ in arrays(kind))


# Loops

# The attribute that names the computations an instruction runs.
BODIES = {"while": "body", "fusion": "calls", "call": "to_apply", "async-start": "calls"}
BODIES |= {"conditional": "branch_computations"}


def runs(program: dict[str, Computation], entry: str) -> Iterator[tuple[Computation, float, bool]]:
    """Yields (computation, how often it runs, whether it runs by itself and not as part of a fusion)."""
    stack = [(entry, 1.0, True)]
    while stack:
        name, times, scheduled = stack.pop()
        computation = program[name]
        yield computation, times, scheduled
        for i in computation.values():
            if i.op in BODIES:
                count = times * trips(program, i) if i.op == "while" else times
                bodies = i.attribute(BODIES[i.op]).split(", ")
                stack += [(body, count, scheduled and i.op != "fusion") for body in bodies if body]


def trips(program: dict[str, Computation], loop: Instruction) -> int:
    """Returns how often a loop runs: the compiler's count, or its condition's bound over its body's step."""
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(count[1])
    condition, body = loop.attribute("condition"), loop.attribute("body")
    bound = max(_integers(program, condition), default=1)
    counter = next((i for i in program[condition].values() if i.op == "get-tuple-element"), None)
    last = list(program[body].values())[-1]
    if counter is None or last.op != "tuple":
        return bound
    updated = last.operands[int(counter.attribute("index"))]
    return max(1, -(-bound // max(1, _increment(program, body, updated))))


def _increment(program: dict[str, Computation], name: str, value: str) -> int:
    """Returns what one pass adds to a counter: the sum of the integers on the way to its new `value`."""
    i = program[name][value]
    if i.op == "add":
        return sum(_increment(program, name, operand) for operand in i.operands)
    if i.op in ("copy", "bitcast", "convert"):
        return _increment(program, name, i.operands[0])
    if i.op == "fusion":
        called = i.attribute("calls")
        before = sum(_increment(program, name, operand) for operand in i.operands)
        return before + _increment(program, called, list(program[called])[-1])
    return _integer(i) or 0


def _integers(program: dict[str, Computation], name: str) -> list[int]:
    """Returns the integer constants in a computation and in those it calls."""
    values = []
    for i in program[name].values():
        if (value := _integer(i)) is not None:
            values.append(value)
        if called := i.attribute("calls") or i.attribute("to_apply"):
            values += _integers(program, called)
    return values


def _integer(i: Instruction) -> int | None:
    return int(i.inside) if i.op == "constant" and i.inside.isdecimal() else None
