"""Fits, uncertain or does not fit; or why neither can be said."""

from collections.abc import Iterable
from dataclasses import dataclass

FITS, UNCERTAIN, MISFIT = "fits", "uncertain", "does not fit"
NOT_COMPILED, NO_LIMIT = "not compiled", "memory unknown"

# Of the memory that a program can use, so much may be taken for it to count as fitting. Our margin,
# not a measured one: near the limit the compiler changes programs to fit, and what it says of them
# stops being monotone in their sizes.
MARGIN = 0.92


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler says.

    Attributes:
      arguments: of the program.
      outputs: of the program.
      aliased: outputs that take the place of donated arguments.
      temporaries: all that are needed, were none to share memory with another.
      code: the program itself.
      peak: most in use at any time.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """Everything at once."""
        needed = self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        return max(needed, self.peak)


def compiled_verdict(memory: Memory, *, beside: int, limit: int | None) -> str:
    """The verdict on a program that the compiler accepted, which is no proof that it fits.

    Args:
      beside: bytes of other arrays that stay on the device.
      limit: bytes that a device has; None where that is unknown.
    """
    if limit is None:
        return NO_LIMIT
    if memory.total + beside <= MARGIN * limit:
        return FITS
    return UNCERTAIN if memory.peak + beside <= limit else MISFIT


def analytic_verdict(least: int, *, limit: int | None) -> str:
    """The verdict without a compiler: only a misfit is certain.

    Args:
      least: bytes that are needed whatever the compiler does.
    """
    return MISFIT if limit is not None and least > limit else NOT_COMPILED


def worst(verdicts: Iterable[str]) -> str:
    """The verdict on a run from those on its programs."""
    order = (FITS, NO_LIMIT, UNCERTAIN, NOT_COMPILED, MISFIT)
    return max(verdicts, key=order.index, default=NOT_COMPILED)
