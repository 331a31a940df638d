"""What a compiled program sends between devices."""

import math
import re
from typing import NamedTuple

from opd_jax.plan.hlo import Instruction, Module
from opd_jax.plan.loops import Running, running

_ALL = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
KINDS = (*_ALL, "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """Like collectives from one place in the source, in one run of a program."""

    kind: str  # one of `KINDS`
    shape: str  # of the result on one device
    group: int  # devices that take part together
    source: str  # "file.py:line", or the path of operations
    bytes: int  # that one device sends in a ring, all of them together
    in_sequence: int  # how many run, one after another: instances times the trips of loops
    known: bool  # whether all trip counts are known; those that are not count as 1


def collectives(module: Module) -> list[Collective]:
    """All collectives of a program, those that send most first."""
    # An asynchronous collective is printed in each of the fusions that hide it, with one channel.
    # It counts once, where it runs least often.
    by_channel: dict[object, Running] = {}
    for found in running(module):
        if _kind(found.instruction):
            name = found.where, found.instruction.name
            channel = found.instruction.attribute(r"channel_id=(\d+)") or name
            if channel not in by_channel or found.times < by_channel[channel].times:
                by_channel[channel] = found
    rows: dict[tuple, Collective] = {}
    for found in by_channel.values():
        row = _describe(module, found)
        if other := rows.get(row[:4]):
            sent, count = row.bytes + other.bytes, row.in_sequence + other.in_sequence
            row = Collective(*row[:4], sent, count, row.known and other.known)
        rows[row[:4]] = row
    return sorted(rows.values(), key=lambda row: -row.bytes)


def _describe(module: Module, found: Running) -> Collective:
    instruction = found.instruction
    kind, group = _kind(instruction), _group(instruction, module.partitions)
    arrays, operands = instruction.arrays(), len(instruction.operands)
    # An asynchronous start may also give its operands.
    starts = instruction.opcode in ("all-gather-start", "collective-permute-start")
    if starts and len(arrays) > operands:
        arrays = arrays[operands : 2 * operands]
    size = sum(array.bytes for array in arrays)
    if kind == "reduce-scatter":
        size *= group  # the result is one device's part
    elif found.where.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion that keeps one part of what it reduces
    shape = ", ".join(array.text for array in arrays)
    sent = found.times * round(_ring_bytes(kind, size, group))
    source = found.source or instruction.name
    return Collective(kind, shape, group, source, sent, found.times, found.known)


def _kind(instruction: Instruction) -> str:
    """The kind of a collective or of its asynchronous start; empty for all else."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _ring_bytes(kind: str, size: int, group: int) -> float:
    """Bytes that a device sends of an array of `size` bytes, in a ring of `group` devices."""
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    once = size * (group - 1) / group
    return 2 * once if kind == "all-reduce" else once


def _group(instruction: Instruction, partitions: int) -> int:
    """Devices of one group, which is printed in three ways; without any it is all devices."""
    groups = instruction.attribute(r"replica_groups=(.*)") or ""
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", mesh[1]))
        # A part of an axis is printed as 'name':(before)size.
        axes = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if tiled := re.match(r"\[(?:\d+,)*(\d+)\]<=", groups):
        return int(tiled[1])
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    return partitions
