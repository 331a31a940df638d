"""Whether a program, and a run, fits in device memory."""

from collections.abc import Iterable, Mapping
from typing import Any

from opd_jax.plan.program import Program, Run

FITS, UNCERTAIN, MISFIT = "fits", "uncertain", "does not fit"
NOT_COMPILED, NO_LIMIT = "not compiled", "memory unknown"

# A program fits if it needs at most this part of usable memory. This is our margin, not a measured
# one: near the limit the compiler changes programs to fit, and its figures are then not monotone in
# their sizes.
MARGIN = 0.92


def verdict(run: Run, program: Program, result: Mapping[str, Any] | None) -> str:
    """The verdict on one program. That the compiler accepts it does not prove that it fits.

    Args:
      result: from `compiling`; None if it was not compiled.
    """
    limit, beside = run.where.chip.memory, run.beside(program)
    if result is None or result["refused"]:
        too_large = limit is not None and run.least(program) > limit
        refused = result is not None and "RESOURCE_EXHAUSTED" in result["refused"]
        return MISFIT if too_large or refused else NOT_COMPILED
    if limit is None:
        return NO_LIMIT
    if result["total"] + beside <= MARGIN * limit:
        return FITS
    return UNCERTAIN if result["peak"] + beside <= limit else MISFIT


def worst(verdicts: Iterable[str]) -> str:
    """The verdict on a run from those on its programs."""
    order = (FITS, NO_LIMIT, UNCERTAIN, NOT_COMPILED, MISFIT)
    return max(verdicts, key=order.index, default=NOT_COMPILED)
