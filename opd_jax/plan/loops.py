"""How often each computation of a compiled program runs.

TPU text does not say how often a loop runs: it is read from the condition's bound, the counter's
start and its step. The step matters: loops that overlap a product with its collective count in
twos.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_jax.plan.hlo import Instruction, Module

# What an instruction gives, as far as loops need it: a number, an element of the loop's state plus
# a number, the whole state, or several of these; None is anything else.
Value = object
_Thunk = Callable[[], Value]
_STATE = object()
# One value in, the same out; what a copy is started with is what it ends with.
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "optimization-barrier"}


@dataclass(frozen=True)
class _Element:
    """Element `index` of the loop's state, plus `offset`."""

    index: int
    offset: int


@dataclass(frozen=True)
class Times:
    """How often a computation runs.

    Attributes:
      count: the product of the loops around it; of those that are not known, 1.
      known: whether all of them are.
    """

    count: int
    known: bool


def run_counts(module: Module) -> dict[str, Times]:
    """How often each computation that is reached runs, over all places that it is run from.

    Of a loop that may end early this is the most; of a condition every branch counts.
    """
    counts = {module.entry: Times(1, True)}
    for name in _callers_first(module):
        mine = counts[name]
        for instruction in module.computations[name].values():
            trips = trip_count(module, name, instruction) if instruction.opcode == "while" else 1
            for role, called in instruction.called():
                # A condition is asked once more than the body runs.
                times = trips if role in ("body", "condition") else 1
                before = counts.get(called, Times(0, True))
                counts[called] = Times(
                    before.count + mine.count * (1 if times is None else times),
                    before.known and mine.known and times is not None,
                )
    return counts


def _callers_first(module: Module) -> list[str]:
    """The computations reached from the entry, each after all that run it."""
    order: list[str] = []
    seen: set[str] = set()
    waiting: list[tuple[str, bool]] = [(module.entry, False)]
    while waiting:
        name, done = waiting.pop()
        if done:
            order.append(name)
            continue
        if name in seen or name not in module.computations:
            continue
        seen.add(name)
        waiting.append((name, True))
        for instruction in module.computations[name].values():
            waiting += [(called, False) for _, called in instruction.called()]
    return order[::-1]


def trip_count(module: Module, where: str, loop: Instruction) -> int | None:
    """How often the body of a `while` instruction runs, at most; None where it cannot be read.

    Args:
      where: the computation that the loop stands in.
    """
    known = loop.attribute(r"known_trip_count\D{0,8}n\W{1,4}(\d+)")
    if known:
        return int(known)
    called = dict(loop.called())
    conditions = module.computations.get(called.get("condition", ""))
    if not conditions or called.get("body") not in module.computations:
        return None
    reader = _Reader(module)
    counts = [
        _count(reader, where, loop, called, comparison)
        for comparison in _comparisons(reader, called["condition"], _root(conditions))
    ]
    return min((count for count in counts if count is not None), default=None)


def _comparisons(
    reader: "_Reader", where: str, root: Instruction
) -> list[tuple[Value, Value, str]]:
    """(left, right, direction) of everything that must hold for the loop to go on."""
    return reader.comparisons(where, root, [lambda: _STATE])


def _count(
    reader: "_Reader",
    where: str,
    loop: Instruction,
    called: dict[str, str],
    comparison: tuple[Value, Value, str],
) -> int | None:
    left, right, direction = comparison
    if isinstance(right, _Element) and not _is_fixed(reader, called["body"], right):
        left, right, direction = right, left, _TURNED.get(direction, direction)
    if not isinstance(left, _Element):
        return None
    start = reader.element(where, loop.operands[0], left.index)
    after = reader.state_after(called["body"], left.index)
    if isinstance(right, _Element):
        bound = reader.element(where, loop.operands[0], right.index)
        bound = bound + right.offset if isinstance(bound, int) else None
    else:
        bound = right
    if not (isinstance(start, int) and isinstance(bound, int) and isinstance(after, _Element)):
        return None
    step = after.offset if after.index == left.index else 0
    return _steps(start + left.offset, bound, step, direction)


_TURNED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def _is_fixed(reader: "_Reader", body: str, element: _Element) -> bool:
    return reader.state_after(body, element.index) == _Element(element.index, 0)


def _steps(start: int, bound: int, step: int, direction: str) -> int | None:
    """How many of start, start + step, ... lie on the right side of the bound."""
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
    if direction == "NE" and step and (bound - start) % step:
        return None
    upwards = {"LT": True, "LE": True, "GT": False, "GE": False, "NE": step > 0}.get(direction)
    if upwards is None or step == 0 or (step > 0) != upwards:
        return None
    return max(-(-(bound - start) // step), 0)


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


class _Reader:
    """Values of instructions, followed backwards as far as a loop's counter needs it."""

    def __init__(self, module: Module):
        self._module = module

    def element(self, where: str, name: str, index: int) -> Value:
        """Element `index` of a tuple, outside any loop state."""
        return self._element(where, name, index, [])

    def state_after(self, body: str, index: int) -> Value:
        """What a loop's body leaves in element `index` of its state."""
        root = _root(self._module.computations[body])
        return self._element(body, root.name, index, [lambda: _STATE])

    def comparisons(
        self, where: str, instruction: Instruction, args: Sequence[_Thunk]
    ) -> list[tuple[Value, Value, str]]:
        """(left, right, direction) of the comparisons whose conjunction an instruction is."""
        module = self._module.computations[where]
        if instruction.opcode == "compare":
            left, right = (self._value(where, name, args) for name in instruction.operands)
            return [(left, right, instruction.attribute(r"direction=(\w+)") or "")]
        if instruction.opcode in ("fusion", "call"):
            inner = instruction.called()[0][1]
            return self.comparisons(
                inner,
                _root(self._module.computations[inner]),
                self._thunks(where, instruction, args),
            )
        if instruction.opcode == "and" or instruction.opcode in _SAME:
            parts = [module[name] for name in instruction.operands if name in module]
            return [found for part in parts for found in self.comparisons(where, part, args)]
        return []

    def _value(self, where: str, name: str, args: Sequence[_Thunk]) -> Value:
        instruction = self._module.computations[where].get(name)
        if instruction is None:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            text = instruction.literal.strip()
            return int(text) if text.lstrip("-").isdigit() else None
        if opcode == "parameter":
            place = int(instruction.literal)
            return args[place]() if place < len(args) else None
        if opcode == "get-tuple-element":
            index = int(instruction.attribute(r"index=(\d+)") or 0)
            return self._element(where, operands[0], index, args)
        if opcode in _SAME:
            return self._value(where, operands[0], args)
        if opcode in ("add", "subtract"):
            left, right = (self._value(where, operand, args) for operand in operands)
            return _sum(left, right, -1 if opcode == "subtract" else 1)
        if opcode in ("fusion", "call"):
            inner = instruction.called()[0][1]
            root = _root(self._module.computations[inner])
            return self._value(inner, root.name, self._thunks(where, instruction, args))
        return None

    def _element(self, where: str, name: str, index: int, args: Sequence[_Thunk]) -> Value:
        """Element `index` of the tuple that an instruction gives; only that one is followed."""
        instruction = self._module.computations[where].get(name)
        if instruction is None:
            return None
        if instruction.opcode == "tuple":
            return self._value(where, instruction.operands[index], args)
        if instruction.opcode in ("fusion", "call"):
            inner = instruction.called()[0][1]
            root = _root(self._module.computations[inner])
            return self._element(inner, root.name, index, self._thunks(where, instruction, args))
        if instruction.opcode in _SAME:
            return self._element(where, instruction.operands[0], index, args)
        whole = self._value(where, name, args)
        return _Element(index, 0) if whole is _STATE else None

    def _thunks(self, where: str, instruction: Instruction, args: Sequence[_Thunk]) -> list[_Thunk]:
        return [
            lambda name=name: self._value(where, name, args)  # type: ignore[misc]
            for name in instruction.operands
        ]


def _sum(left: Value, right: Value, sign: int) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Element) and isinstance(right, int):
        return _Element(left.index, left.offset + sign * right)
    if isinstance(left, int) and isinstance(right, _Element) and sign > 0:
        return _Element(right.index, right.offset + left)
    return None
