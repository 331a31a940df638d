"""What a compiled program sends between devices, and the large copies that it makes."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from opd_jax.plan.hlo import Instruction, Module
from opd_jax.plan.loops import Times, run_counts

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
LARGE_COPY = 64 * 2**20


@dataclass(frozen=True)
class Collective:
    """Collectives of one place in the source that are alike.

    Attributes:
      kind: one of `KINDS`.
      shape: of its result on one device.
      group: devices that take part together.
      times: how often each runs.
      known: whether that is known; if not, `times` leaves out loops that it could not be read from.
      source: place in the source, or path of operations.
      instances: how many of them there are.
      sent: bytes that one device sends in one run of the program, all of them together, in a ring.
    """

    kind: str
    shape: str
    group: int
    times: int
    known: bool
    source: str
    instances: int
    sent: int


@dataclass(frozen=True)
class Copy:
    """Copies of like arrays from the device's memory to the same memory, from one place.

    Attributes:
      shape: dtype and shape on one device.
      bytes: of one array.
      times: how often each is made.
      known: as in `Collective`.
      source: as in `Collective`.
      instances: how many there are.
    """

    shape: str
    bytes: int
    times: int
    known: bool
    source: str
    instances: int


def collectives(module: Module) -> list[Collective]:
    """All collectives, those that send most first.

    An asynchronous one is printed many times, in each of the fusions that hide it, with one
    channel: of those one counts, where it runs least often.
    """
    found: dict[object, tuple[Times, str, Instruction]] = {}
    for name, times in run_counts(module).items():
        for instruction in module.computations.get(name, {}).values():
            if _kind(instruction) is None:
                continue
            channel = instruction.attribute(r"channel_id=(\d+)") or (name, instruction.name)
            if channel not in found or times.count < found[channel][0].count:
                found[channel] = (times, name, instruction)
    return _merged(module, [found[channel] for channel in found])


def _merged(module: Module, found: list[tuple[Times, str, Instruction]]) -> list[Collective]:
    sent: dict[tuple, int] = defaultdict(int)
    instances: dict[tuple, int] = defaultdict(int)
    for times, where, instruction in found:
        kind = _kind(instruction)
        assert kind is not None
        if where.startswith("all-reduce-scatter"):  # each device goes on with its own part
            kind = "reduce-scatter"
        group = _group(instruction, module.partitions)
        arrays = _result(instruction)
        whole = sum(array.bytes for array in arrays)
        if kind == "reduce-scatter" and _kind(instruction) == kind:
            whole *= group  # what is printed is the part that is left
        shape = ", ".join(array.text for array in arrays)
        key = (kind, shape, group, times, _source(module, where, instruction))
        sent[key] += round(_sent(kind, whole, group)) * times.count
        instances[key] += 1
    rows = [
        Collective(kind, shape, group, times.count, times.known, source, instances[key], sent[key])
        for key in sent
        for kind, shape, group, times, source in [key]
    ]
    return sorted(rows, key=lambda row: -row.sent)


def _source(module: Module, where: str, instruction: Instruction) -> str:
    """Where an instruction comes from; where it does not say, what runs its computation."""
    if place := module.source(instruction):
        return place
    for computation in module.computations.values():
        for caller in computation.values():
            if (place := module.source(caller)) and (where in dict(caller.called()).values()):
                return place
    return instruction.name


def _kind(instruction: Instruction) -> str | None:
    """The kind of a collective, or of its asynchronous start; None for all else."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _result(instruction: Instruction) -> list:
    """Arrays of the result; of a start, which also gives its operands, only what will come."""
    arrays = instruction.arrays()
    operands = len(instruction.operands)
    starts = instruction.opcode in ("all-gather-start", "collective-permute-start")
    return arrays[operands : 2 * operands] if starts and len(arrays) > operands else arrays


def _sent(kind: str, whole: int, group: int) -> float:
    """Bytes that a device sends of an array of `whole` bytes, in a ring of `group` devices."""
    if kind in ("collective-permute", "collective-broadcast"):
        return whole
    once = whole * (group - 1) / group
    return 2 * once if kind == "all-reduce" else once


def _group(instruction: Instruction, partitions: int) -> int:
    """Devices of one group, from any of the ways in which groups are printed."""
    attributes = instruction.attributes
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", attributes
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", mesh[1])}
        # A part of an axis is written 'name':(before)size.
        axes = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if tiled := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    return partitions


def copies(module: Module, *, at_least: int = LARGE_COPY) -> list[Copy]:
    """Copies of at least so many bytes within the device's memory, the largest in sum first.

    A copy inside a fusion is made on the way and takes no memory, unless it is all that the fusion
    gives.
    """
    counts = run_counts(module)
    fused = {
        called
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for _, called in instruction.called()
    }
    found: dict[tuple, int] = defaultdict(int)
    for name, times in counts.items():
        computation = module.computations.get(name, {})
        for instruction in computation.values():
            if name in fused or not _is_copy(module, instruction):
                continue
            array = instruction.arrays()[0]
            source = computation.get(instruction.operands[0])
            from_hbm = source is None or all(part.in_hbm for part in source.arrays())
            if array.bytes >= at_least and array.in_hbm and from_hbm:
                found[array, times, _source(module, name, instruction)] += 1
    rows = [
        Copy(array.text, array.bytes, times.count, times.known, source, instances)
        for (array, times, source), instances in found.items()
    ]
    return sorted(rows, key=lambda copy: -copy.bytes * copy.times * copy.instances)


def _is_copy(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":
        ((_, called),) = instruction.called()
        return any(i.is_root and i.opcode == "copy" for i in module.computations[called].values())
    return instruction.opcode in ("copy", "copy-start")
