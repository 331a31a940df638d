"""The smallest slice of a family that a run fits."""

from collections.abc import Callable
from typing import Any

from opd_jax.plan.chips import GIB, Slice, slices
from opd_jax.plan.program import Run
from opd_jax.plan.verdict import FITS, MISFIT, verdict


def smallest(
    family: str, *, fit: Callable[[Slice], Run], plan: Callable[[Run], dict[str, Any]]
) -> tuple[list[dict[str, str]], dict[str, Any] | None]:
    """Tries the slices of a family, from the smallest to the first that fits.

    Without a compiler it ends at the first slice that is no certain misfit: the run fits no smaller
    one, and perhaps not this one.

    Args:
      fit: the run on a slice; raises ValueError if something does not divide.
      plan: the report of a run.

    Returns:
      A row (slice, verdict, why) for each slice tried, and the report of the last one unless it is
      a misfit.
    """
    rows, report = [], None
    for where in slices(family):
        found, report = MISFIT, None
        try:
            run = fit(where)
            most = max(run.programs, key=run.least)
            why = f"{most.name} needs at least {run.least(most) / GIB:.2f} GiB"
            if verdict(run, most, None) != MISFIT:
                report = plan(run)
                found = report["verdict"]
                if report["compiled"]:
                    why = ", ".join(p["name"] for p in report["programs"] if p["verdict"] == found)
        except ValueError as error:
            why = str(error)
        rows.append({"slice": where.name, "verdict": found, "why": why})
        if found == FITS or (report and not report["compiled"]):
            break
    return rows, None if found == MISFIT else report
