"""The smallest slice of a family that a run fits."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from ml_collections import FrozenConfigDict

from opd_jax.plan.analysis import analyze
from opd_jax.plan.chips import GIB, Slice, slices
from opd_jax.plan.verdict import FITS, MISFIT, NOT_COMPILED


def tried(
    config: FrozenConfigDict,
    family: str,
    *,
    given: Collection[str],
    plan: Callable[[Slice], dict[str, Any]],
    compiles: bool,
) -> Iterator[tuple[Slice, str, str]]:
    """(slice, verdict, why) for the slices of a family, from the smallest to the first that fits.

    Without a compiler the first that is no certain misfit is the last one: whether it fits is then
    not known, only that no smaller one does.

    Args:
      given: fields set on the command line.
      plan: the report of a slice, compiled where that is possible.
    """
    for where in slices(family):
        try:
            analysis = analyze(config, where, given=given, flops=False)
        except ValueError as error:
            yield where, MISFIT, str(error)
            continue
        largest = max(analysis.costs, key=lambda cost: cost.least)
        least = f"{largest.program.name} needs at least {largest.least / GIB:.2f} GiB"
        if largest.verdict == MISFIT:
            yield where, MISFIT, least
            continue
        if not compiles:
            yield where, NOT_COMPILED, least
            return
        report = plan(where)
        worst = [p for p in report["programs"] if p["verdict"] == report["verdict"]]
        yield where, report["verdict"], ", ".join(program["name"] for program in worst)
        if report["verdict"] == FITS:
            return
