"""How often each instruction of a compiled program runs.

TPU text has no trip counts, so a loop is run here: only the integers that its condition depends on
are computed. The step matters: a loop that overlaps a product with its collective counts in twos.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

from opd_jax.plan.hlo import Instruction, Module

MOST_TRIPS = 2**16  # of a loop that is run here

# Called with `index`: the integer at that place of a tuple, or with None the integer itself.
_Value = Callable[..., int | None]
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "optimization-barrier"}
_OPERATORS = {
    name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE", "EQ")
}
_OPERATORS |= {"add": operator.add, "subtract": operator.sub}


class Running(NamedTuple):
    """An instruction, and how often it runs."""

    where: str  # its computation
    instruction: Instruction
    times: int  # product of the trips of the loops around it; unknown ones count as 1
    known: bool  # whether all of them are known
    source: str | None  # place in the source of it, or of what runs its computation


def running(module: Module) -> Iterator[Running]:
    """All instructions that run.

    A loop that may end early counts with its most trips, a condition with its largest branch.
    """

    def walk(where: str, times: int, known: bool, source: str | None) -> Iterator[Running]:
        for instruction in module.computations.get(where, {}).values():
            place = module.source(instruction) or source
            yield Running(where, instruction, times, known, place)
            trips = trip_count(module, where, instruction) if instruction.opcode == "while" else 1
            each, sure = (times, False) if trips is None else (times * trips, known)
            runs = [walk(called, each, sure, place) for called in instruction.called()]
            if instruction.opcode == "conditional":
                yield from max(map(list, runs), key=_bytes)
            else:
                yield from chain(*runs)

    return walk(module.entry, 1, True, None)


def _bytes(run: Iterable[Running]) -> int:
    """Bytes of the results of all that runs."""
    return sum(found.times * array.bytes for found in run for array in found.instruction.arrays())


def trip_count(module: Module, where: str, loop: Instruction) -> int | None:
    """The most trips of a `while` instruction; None if they cannot be computed.

    Args:
      where: the computation that the loop is in.
    """
    printed = loop.attribute(r"known_trip_count\D{0,8}n\W{1,4}(\d+)")
    if printed:
        return int(printed)
    called = {role: name for name, role in loop.called().items()}
    condition, body = (module.root(called[role]).name for role in ("condition", "body"))
    state: _Value = partial(_read, module, where, loop.operands[0], [])
    for trips in range(MOST_TRIPS):
        goes_on = _read(module, called["condition"], condition, [state])
        if not goes_on:
            return None if goes_on is None else trips
        state = cache(partial(_read, module, called["body"], body, [state]))
    return None


def _read(
    module: Module, where: str, name: str, arguments: Sequence[_Value], index: int | None = None
) -> int | None:
    """The integer, or the truth, that an instruction gives; None if it is not known.

    Args:
      arguments: of the computation `where`; empty if they are not known.
      index: reads this element of the tuple that the instruction gives.
    """
    instruction = module.computations[where].get(name)
    if not instruction:
        return None
    opcode, operands = instruction.opcode, instruction.operands
    read = partial(_read, module, where, arguments=arguments)
    if opcode == "constant":
        text = instruction.inside.strip()
        return int(text) if text.lstrip("-").isdigit() else None
    if opcode == "parameter":
        return arguments[int(instruction.inside)](index=index) if arguments else None
    if opcode == "get-tuple-element" and index is None:
        return read(operands[0], index=int(instruction.attribute(r"index=(\d+)") or 0))
    if opcode == "tuple" and index is not None:
        return read(operands[index])
    if opcode in _SAME:
        return read(operands[0], index=index)
    if opcode in ("fusion", "call"):
        inner = next(iter(instruction.called()))
        values = [partial(read, operand) for operand in operands]
        return _read(module, inner, module.root(inner).name, values, index)
    if opcode in ("add", "subtract", "compare", "and"):
        sides = [side for side in map(read, operands) if side is not None]
        if opcode == "and":  # a side that is not known may hold, so the other bounds the loop
            return all(sides) if sides else None
        do = _OPERATORS[instruction.attribute(r"direction=(\w+)") or opcode]
        return do(*sides) if len(sides) == 2 else None
    return None
