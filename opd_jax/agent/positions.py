"""What share of the positions that a model computes hold no token.

All rows of a compiled call have one width, so shorter ones are padded. A row that has nothing to do
is padding as a whole.
"""

from collections import defaultdict


class Positions:
    """Counts positions that are computed, by what for.

    That is "reading", "sampling" or "judging"; "reading_by_teacher" is that of a teacher that takes
    turns of the student's episodes.
    """

    def __init__(self) -> None:
        self._counts: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def add(self, what: str, *, tokens: int, computed: int) -> None:
        """Adds a call that computes so many positions, of which `tokens` hold one."""
        padded, before = self._counts[what]
        self._counts[what] = padded + computed - tokens, before + computed

    def tokens(self, what: str) -> int:
        """How many of the positions computed for this hold a token."""
        padded, computed = self._counts.get(what, (0, 0))
        return computed - padded

    @property
    def metrics(self) -> dict[str, tuple[int, int]]:
        """`padded/WHAT` as (sum, count): positions without a token, and all."""
        return {f"padded/{what}": counts for what, counts in self._counts.items()}
