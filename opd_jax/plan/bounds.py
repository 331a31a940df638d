"""The shortest time that a program can take on a chip, and what sets it."""

from dataclasses import dataclass

from opd_jax.plan.chips import Chip


@dataclass(frozen=True)
class Bound:
    """Seconds that one run takes at least, were the chip at its published peaks.

    Attributes:
      compute: FLOPs of one device over its peak; None where that is unknown.
      memory: bytes moved over the memory's peak bandwidth; None where that is unknown.
    """

    compute: float | None
    memory: float | None

    @property
    def seconds(self) -> float | None:
        """The larger of the two, since they can overlap."""
        known = [term for term in (self.compute, self.memory) if term is not None]
        return max(known, default=None)

    @property
    def term(self) -> str:
        """Which of the two it is."""
        if self.seconds is None:
            return ""
        return "compute" if self.seconds == self.compute else "memory"


def bound(chip: Chip, *, flops: float, moved: float) -> Bound:
    """The bound of a program on one chip.

    Args:
      flops: that one device does.
      moved: bytes that it moves.
    """
    return Bound(
        compute=None if chip.flops is None else flops / chip.flops,
        memory=None if chip.bandwidth is None else moved / chip.bandwidth,
    )
