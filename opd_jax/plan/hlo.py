"""Compiled HLO text as computations of instructions, for TPU, GPU and CPU (`as_text()`)."""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# ROOT, name, type, opcode, what is in its parentheses, and the rest of the line.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)(.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Array(NamedTuple):
    """One array of an instruction's result."""

    text: str  # dtype and shape, e.g. "bf16[4,128]"
    bytes: int  # without padding


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    type: str  # text of the result's type
    inside: str  # text in the opcode's parentheses: operands, or a literal
    attributes: str  # the rest of the line
    is_root: bool  # whether it is the computation's result

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.inside)

    def arrays(self) -> list[Array]:
        """The arrays of the result; several if it is a tuple."""
        return [_array(dtype, shape) for dtype, shape in _ARRAY.findall(self.type)]

    def called(self) -> dict[str, str]:
        """The computations that the instruction runs, each with its role, e.g. "body"."""
        return {
            name: role
            for role, names in _CALLED.findall(self.attributes)
            for name in re.findall(r"[\w.-]+", names)
        }

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match and match[1]


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, dict[str, Instruction]]  # by name; instructions by name, in order
    entry: str  # the computation that runs first
    partitions: int  # number of devices
    frames: dict[str, str]  # `stack_frame_id` -> "file.py:line"

    def root(self, computation: str) -> Instruction:
        """The result of a computation."""
        return next(i for i in self.computations[computation].values() if i.is_root)

    def source(self, instruction: Instruction) -> str | None:
        """Where in the source an instruction comes from, else the path of its operation."""
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        return self.frames.get(frame or "") or instruction.attribute(r'op_name="([^"]*)"')


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        # Kernels print metadata over several lines that may start with, but never are, a brace.
        if line == "}":
            current = None
        elif current is None:
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, kind, opcode, inside, rest = match.groups()
            current[name] = Instruction(name, opcode, kind, inside, rest, bool(root))
    if not entry:
        raise ValueError("compiled text: expected an ENTRY computation, got none")
    partitions = re.search(r"\bnum_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1, _frames(text))


def _array(dtype: str, shape: str) -> Array:
    digits = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    size = math.prod(int(side) for side in shape.split(",") if side)
    return Array(f"{dtype}[{shape}]", -(-size * bits // 8))


def _frames(text: str) -> dict[str, str]:
    """Reads the tables of source places that stand before the computations."""

    def rows(title: str, pattern: str) -> list[tuple[str, ...]]:
        table = text.partition(f"\n{title}\n")[2].partition("\n\n")[0]
        return re.findall(rf"^(\d+) {pattern}", table, re.MULTILINE)

    # Paths from the package on are the same on every machine.
    files = {i: re.sub(r".*(opd_jax|-packages)/", "", p) for i, p in rows("FileNames", '"(.*)"')}
    places = {
        i: f"{files[file]}:{line}"
        for i, file, line in rows("FileLocations", r"\{file_name_id=(\d+) .*?\bline=(\d+)")
    }
    frames: dict[str, str] = {}
    shift = 0
    for i, place, up in rows("StackFrames", r"\{file_location_id=(\d+) parent_frame_id=(\d+)"):
        # Parents may be printed one too high: then the first frame names itself.
        shift = 1 if i == up == "1" else shift
        # `runtime/mesh.py` constrains the shardings of others, so their place is more useful.
        is_helper = places[place].startswith("runtime/mesh.py")
        caller = frames.get(str(int(up) - shift)) if is_helper else None
        frames[i] = caller or places[place]
    return frames
