"""A cache in which each row reads contexts of its own, one after another."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.positions import Positions
from opd_jax.model import KVCache, Model, ModelConfig, Params
from opd_jax.runtime import mesh
from opd_jax.runtime.mesh import DECODING, shard_batch


class ContextCache:
    """The cache of a batch of rows, and what each row holds.

    A row that gets another context keeps the prefix which the two share, and reads the rest in
    pieces. Their widths depend on this context alone, and all calls have the same number of rows.
    So what a row holds does not depend on the other rows, to the bit.

    Args:
      params: the model's, stacked or not. They are not copied.
      sizes: the model's; or the model itself, if it is another than ours.
      rows: of the cache.
      slots: of each row.
      widths: ascending widths of pieces; one compiled program each.
      rows_read: rows of each device that read at a time.
      int8: keep keys and values in 8 bits.
      positions: counts what is read, as `purpose`.
    """

    def __init__(
        self,
        params: Params,
        *,
        sizes: ModelConfig | Model,
        rows: int,
        slots: int,
        widths: Sequence[int],
        rows_read: int,
        int8: bool = False,
        positions: Positions,
        purpose: str,
    ):
        self.params = params
        self._positions, self._purpose = positions, purpose
        self.sizes, self._ours = sizes, isinstance(sizes, ModelConfig)
        self.sharded = self._ours and model.is_sharded(params)
        self.widths, self.rows_read = widths, rows_read
        self.contexts: list[list[int]] = [[] for _ in range(rows)]
        self.held = np.zeros(rows, np.int32)  # how many tokens of its context each row holds
        self._cache = model.empty_cache(params, config=sizes, rows=rows, slots=slots, int8=int8)

    def clear(self, row: int) -> None:
        """Empties a row."""
        self.contexts[row], self.held[row] = [], 0

    def put(self, row: int, context: list[int]) -> None:
        """Gives a row another context, to be read; its last token is never read here.

        Another model's cache may be a state of which no part can be taken back. It keeps all or
        nothing.
        """
        shared = _common(self.contexts[row][: self.held[row]], context[:-1])
        self.held[row] = shared if self._ours or shared == self.held[row] else 0
        self.contexts[row] = context

    def read(self, rows: Collection[int]) -> None:
        """Appends what the cache lacks of the contexts of rows, except their last tokens."""
        while pieces := self._pieces(rows):
            for width, of_width in sorted(pieces.items()):
                for call in self._calls(of_width):
                    tokens, counts = padded([new for _, new in call], width=width)
                    numbers = np.array([row for row, _ in call], np.int32)
                    self._append(tokens, counts, numbers)
                    np.add.at(self.held, numbers, counts)
                    self.count(tokens=int(counts.sum()), computed=tokens.size)

    def _append(self, tokens: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> None:
        """Appends the first `counts[n]` of `tokens[n]` to what `rows[n]` holds."""
        self._cache = gen.extend(
            self.params,
            self.take(),
            *shard_batch((tokens, counts, rows), rules=DECODING),
            config=self.sizes,
            sharded=self.sharded,
        )

    def count(self, *, tokens: int, computed: int) -> None:
        """Counts a call that computes so many positions, of which `tokens` hold one."""
        self._positions.add(self._purpose, tokens=tokens, computed=computed)

    def take(self) -> KVCache:
        """The cache, for a program that it is donated to; `give` takes what the program returns.

        Its lengths are what the rows hold.
        """
        return replace(self._cache, lengths=shard_batch(self.held.copy(), rules=DECODING))

    def give(self, cache: KVCache) -> None:
        """The cache after a program. What it appended counts only if `held` is raised."""
        self._cache = cache

    def _pieces(self, rows: Collection[int]) -> dict[int, dict[int, list[int]]]:
        """The next piece of each row's unread context, by width and row."""
        pieces: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for row in rows:
            if unread := self.contexts[row][self.held[row] : -1]:
                width = width_of(len(unread), self.widths)
                pieces[width][row] = unread[:width]
        return pieces

    def _calls(self, new: Mapping[int, list[int]]) -> Iterator[list[tuple[int, list[int]]]]:
        """Splits rows and their tokens into calls, each with as many rows for every device.

        Where rows are missing, a call has one of the device's that gets no token.
        """
        shards = mesh.shards("batch", rules=DECODING)
        size = len(self.held) // shards
        most = min(self.rows_read, size)
        parts = [[row for row in sorted(new) if row // size == part] for part in range(shards)]
        for start in range(0, max(map(len, parts)), most):
            call = []
            for part, rows in enumerate(parts):
                some = [(row, new[row]) for row in rows[start : start + most]]
                call += some + [(part * size, [])] * (most - len(some))
            yield call


def width_of(unread: int, widths: Sequence[int]) -> int:
    """The width of the next piece of so many unread tokens, of ascending `widths`."""
    return next((width for width in widths if width >= unread), widths[-1])


def padded(rows: Sequence[Sequence[int]], *, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as int32 [rows, width], padded with 0, and their lengths, int32 [rows]."""
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in rows], np.int32)


def _common(held: list[int], context: list[int]) -> int:
    """The length of the common prefix."""
    if held == context[: len(held)]:
        return len(held)
    pairs = enumerate(zip(held, context, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(held), len(context)))
