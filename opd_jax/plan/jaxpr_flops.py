"""FLOPs of a traced program, counted in its jaxpr.

Only matrix products count; all else is small beside them in a transformer. XLA's `cost_analysis`
counts the body of every loop once, so it cannot be used here.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from opd_jax.model.attention import BLOCK

_JAXPRS = (Jaxpr, ClosedJaxpr)


def count_flops(jaxpr: Jaxpr | ClosedJaxpr, *, while_trips: Sequence[float] = ()) -> float:
    """Multiplications and additions of all matrix products, over all devices.

    Loops multiply what is in them. Of a condition, the most expensive branch counts. A kernel
    (`pallas_call`) counts its body at every point of its grid, but for those of attention
    (`_computed`).

    Args:
      while_trips: of `while` loops with products: of an outermost one, of one inside it, and so on.
        A loop over a cache takes `attention.BLOCK` slots at a time.

    Raises:
      ValueError: more such loops are inside each other than `while_trips` has.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation(equation, while_trips) for equation in inner.eqns)


def _equation(equation: Any, while_trips: Sequence[float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (_, contracted), (_, batch) = params["dimension_numbers"]
        return _product(equation, {*contracted, *batch})
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        return _product(equation, {*contracted, *batch, *numbers.rhs_group_dimensions})
    if name.startswith("dot_product_attention"):  # cuDNN's, causal
        B, T, N, H = equation.invars[0].aval.shape
        # Backwards: the scores again, and gradients of these, queries, keys and values.
        products = 2 if "_fwd" in name else 5
        return products * B * N * H * T * (T + 1)
    parts = [part for part in jax.tree.leaves([*params.values()]) if isinstance(part, _JAXPRS)]
    if name == "while":
        if not any(map(_has_product, parts)):
            return 0
        times, *rest = _trips(while_trips)
        return times * sum(count_flops(part, while_trips=rest) for part in parts)
    inside = [count_flops(part, while_trips=while_trips) for part in parts]
    if name == "cond":
        return max(inside)
    return sum(inside) * _times(equation, while_trips)


def _trips(while_trips: Sequence[float]) -> Sequence[float]:
    if not while_trips:
        raise ValueError(
            "`while_trips`: expected the trips of every `while` loop with products, and of those "
            "inside it; got too few"
        )
    return while_trips


def _has_product(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return any(
        equation.primitive.name in ("dot_general", "ragged_dot_general")
        or any(
            _has_product(part)
            for part in jax.tree.leaves([*equation.params.values()])
            if isinstance(part, _JAXPRS)
        )
        for equation in inner.eqns
    )


def _product(equation: Any, not_free: set[int]) -> int:
    """2 · (elements of the left operand) · (free elements of the right one).

    This also holds if groups of rows on the left are multiplied by different matrices.
    """
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    free = [size for axis, size in enumerate(right) if axis not in not_free]
    return 2 * math.prod(left) * math.prod(free)


def _times(equation: Any, while_trips: Sequence[float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its body is the work of one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _computed(equation, while_trips)
    return 1


def _computed(kernel: Any, while_trips: Sequence[float]) -> float:
    """The share of what a kernel's body and grid say that it computes.

    A causal mask leaves splash attention the blocks of scores at and below the diagonal. Over a
    cache `model.ragged` computes the slots that the plain form's loop would.
    """
    params = kernel.params
    name = params["name"] or params["jaxpr"].debug_info.func_name
    if name.startswith("splash"):
        blocks = params["grid_mapping"].grid[-1]
        return (blocks + 1) / (2 * blocks)
    if name == "ragged_attention":
        slots = kernel.invars[2].aval.shape[2]  # of keys [B, G, S, H]
        return _trips(while_trips)[0] * min(BLOCK, slots) / slots
    return 1
