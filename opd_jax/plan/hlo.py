"""Compiled HLO text as computations of instructions.

Written for what the compilers of TPU, GPU and CPU print (`Compiled.as_text()`). A computation ends
at a line that is exactly `}`: kernels print metadata over several lines, some of which start so.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A computation's name, before its parameters; its line ends in `{`.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"^\s*([a-z][\w-]*)\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_WIDTHS = {"pred": 8, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      text: dtype and shape, e.g. "bf16[4,128]".
      bytes: without padding.
      in_hbm: whether it lies in the device's main memory, not in a faster one beside the cores.
    """

    text: str
    bytes: int
    in_hbm: bool


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: e.g. "all-gather".
      type: text of the result's type.
      operands: names.
      literal: what stands between the parentheses, e.g. of a constant.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def arrays(self) -> list[Array]:
        """The arrays of the result; several where it is a tuple."""
        return [_array(*match.groups()) for match in _ARRAY.finditer(self.type)]

    def called(self) -> list[tuple[str, str]]:
        """(role, computation) for every computation that the instruction runs."""
        return [
            (role, name.strip().removeprefix("%"))
            for role, names in _CALLED.findall(self.attributes)
            for name in names.strip("{}").split(",")
            if name.strip()
        ]

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match and match[1]


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name; each its instructions by name, in order.
      entry: the name of the one that is run.
      partitions: number of devices.
      frames: by `stack_frame_id`, where in the source: "file.py:line function".
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    partitions: int
    frames: dict[int, str]

    def source(self, instruction: Instruction) -> str | None:
        """Where an instruction comes from: place in the source, else the operation's path."""
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        place = self.frames.get(int(frame)) if frame else None
        path = instruction.attribute(r'op_name="([^"]*)"')
        return place or _source_line(instruction) or path


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line == "}":
            current = None
        elif current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("compiled text: expected an ENTRY computation, got none")
    partitions = re.search(r"\bnum_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1, _frames(text))


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    kind, rest = _split_type(match[3])
    opcode = _OPCODE.match(rest)
    if not opcode:
        return None
    inside, attributes = _parenthesized(rest[opcode.end() - 1 :])
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(
        match[2], opcode[1], kind, operands, inside, attributes, is_root=bool(match[1])
    )


def _split_type(text: str) -> tuple[str, str]:
    """A tuple's type has spaces and parentheses in it, and so has an array's layout."""
    if text.startswith("("):
        inside, rest = _parenthesized(text)
        return f"({inside})", rest
    kind, _, rest = text.partition(" ")
    return kind, " " + rest


def _parenthesized(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that `text` starts with, and what follows it."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[1:place], text[place + 1 :]
    return text[1:], ""


def _array(dtype: str, shape: str, layout: str | None) -> Array:
    width = _WIDTHS.get(dtype)
    if width is None:
        digits = re.search(r"\d+", dtype)
        width = int(digits[0]) if digits else 0
    size = 1
    for side in filter(None, shape.split(",")):
        size *= int(side)
    return Array(f"{dtype}[{shape}]", -(-size * width // 8), "S(" not in (layout or ""))


def _source_line(instruction: Instruction) -> str | None:
    # As older versions print it.
    file = instruction.attribute(r'source_file="([^"]*)"')
    line = instruction.attribute(r"source_line=(\d+)")
    return file and f"{_short(file)}:{line}"


def _short(path: str) -> str:
    """A path from the name of the package on, which is the same on every machine."""
    for anchor in ("opd_jax/", "site-packages/"):
        if anchor in path:
            return path.rpartition(anchor)[2]
    return path.rpartition("/")[2]


def _frames(text: str) -> dict[int, str]:
    """The tables of source places that stand before the computations."""
    files = {int(i): _short(name) for i, name in _table(text, "FileNames", r'(\d+) "(.*)"')}
    functions = {int(i): name for i, name in _table(text, "FunctionNames", r'(\d+) "(.*)"')}
    pattern = r"(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    locations = {
        i: f"{files.get(int(file), '?')}:{line} {functions.get(int(function), '?')}"
        for i, file, function, line in _table(text, "FileLocations", pattern)
    }
    pattern = r"(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)"
    rows = {int(i): (place, int(up)) for i, place, up in _table(text, "StackFrames", pattern)}
    # Printed one too high: a frame without a parent names itself, or the first one does.
    shift = 1 if rows.get(1, ("", 0))[1] == 1 else 0

    def name(frame: int) -> str | None:
        """Of what `mesh` does for others, theirs."""
        place, up = rows[frame]
        parent = up - shift
        if locations.get(place, "").startswith("mesh.py") and parent in rows and parent < frame:
            return name(parent)
        return locations.get(place)

    return {frame: found for frame in rows if (found := name(frame))}


def _table(text: str, title: str, pattern: str) -> Iterator[tuple[str, ...]]:
    start = text.find(f"\n{title}\n")
    if start < 0:
        return
    for line in text[start + len(title) + 2 :].split("\n\n", 1)[0].splitlines():
        if match := re.match(pattern, line):
            yield match.groups()
