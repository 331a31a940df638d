"""Floating-point operations of a traced program, counted in its jaxpr.

Only products of matrices are counted; all else is small beside them in a transformer. XLA's own
`cost_analysis` counts the body of every loop once, so it cannot be used here.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Jaxpr | ClosedJaxpr, *, while_trips: int | None) -> int:
    """Multiplications and additions of all matrix products, over all devices.

    Loops multiply, of the branches of a condition the dearest counts, and everything that holds a
    jaxpr is entered: rematerialization, custom derivatives, nested `jit`. A kernel (`pallas_call`)
    counts as its body on every point of its grid, which is more than it does where it skips some.

    Args:
      while_trips: how often the body of a `while` loop runs; None where no such loop multiplies.

    Raises:
      ValueError: a `while` loop has products in it and `while_trips` is None.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation(equation, while_trips) for equation in inner.eqns)


def _equation(equation: Any, while_trips: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (_, contracted), (_, batch) = params["dimension_numbers"]
        return _product(equation, {*contracted, *batch})
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        return _product(equation, {*contracted, *batch, *numbers.rhs_group_dimensions})
    inside = [count_flops(part, while_trips=while_trips) for part in _jaxprs(params)]
    if name == "cond":
        return max(inside)
    if name == "while" and sum(inside):
        if while_trips is None:
            raise ValueError(
                "`while_trips`: the program has a `while` loop with matrix products, expected how "
                "often it runs, got None"
            )
        return sum(inside) * while_trips
    return sum(inside) * _times(name, params)


def _product(equation: Any, not_free: set[int]) -> int:
    """2 · (elements of the left operand) · (free elements of the right one).

    Every element of the left one meets each free index of the right one exactly once, also where
    groups of its rows meet different matrices.
    """
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    free = [size for axis, size in enumerate(right) if axis not in not_free]
    return 2 * math.prod(left) * math.prod(free)


def _times(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its body is what one device does
        manual = params.get("newly_manual_axes") or params["manual_axes"]  # its older name
        return math.prod(params["mesh"].shape[axis] for axis in manual)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (Jaxpr, ClosedJaxpr)):
                yield part
