"""How the judge's questions are read: conversation after conversation, over one kept cache.

With the context "history" a question follows its conversation, so to ask about all turns the
teacher reads the whole conversation once. The hidden states from which it scores the student's
tokens are the same, so they are kept (`Reading`), and the update needs no pass of the teacher.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.agent.contexts import ContextCache
from opd_jax.agent.positions import Positions
from opd_jax.judge.answer import DECODINGS, Answer, Judge
from opd_jax.model import KVCache, ModelConfig, Params
from opd_jax.model.cache import put_rows
from opd_jax.runtime.mesh import DECODING, constrain, shard_batch, shards

# The cache's slots are a multiple of this: few sizes, since each is a program to compile.
SLOTS = 512


class Question(NamedTuple):
    """What a row of the cache reads next.

    Attributes:
      turn: the turn that is asked about; None: nothing is asked, the conversation is only read.
      shared: how many of the tokens are the conversation's own.
      tokens: the conversation's, then those of the question.
    """

    turn: int | None
    shared: int
    tokens: list[int]


# Of each conversation, in the order of its turns.
Questions = Mapping[int, Sequence[Question]]


class Reading(ContextCache):
    """A cache that keeps the hidden states from which the student's tokens are predicted.

    Args:
      response: int32 [B, R], ascending positions of the student's tokens in each of B
        conversations; those beyond a conversation are never read. B divides over the mesh.
      more: as in `ContextCache`.

    Attributes:
      states: float [B, R, D], sharded over the batch; 0 where nothing was read.
    """

    def __init__(self, params: Params, *, response: np.ndarray, sizes: ModelConfig, **more: Any):
        super().__init__(params, sizes=sizes, **more)
        rows = len(self.held)
        self._response = response
        self._conversation, self._shared = np.zeros((2, rows), np.int32)
        self.states = _no_states(
            shape=(*response.shape, sizes.d_model), dtype=params["embed"].dtype
        )

    def begin(self, row: int, conversation: int, *, shared: int) -> None:
        """Says whose question a row gets next, and how much of it is that conversation.

        What the row holds of its last question is read again. So all that it holds at places of the
        conversation was read as the conversation.
        """
        self.held[row] = min(self.held[row], self._shared[row])
        self._conversation[row], self._shared[row] = conversation, shared

    def _append(self, tokens: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> None:
        conversation = self._conversation[rows]
        place = np.full(tokens.shape, self._response.shape[1], np.int32)
        for n, (row, count) in enumerate(zip(rows, counts, strict=True)):
            end = min(self.held[row] + count, self._shared[row] - 1)
            response = self._response[conversation[n]]
            # A state predicts the token after it.
            first, last = np.searchsorted(response, [self.held[row] + 1, end + 1])
            place[n, response[first:last] - 1 - self.held[row]] = np.arange(first, last)
        arrays = tokens, counts, rows, place, conversation
        self._cache, self.states = _extend_and_keep(
            self.params,
            self.take(),
            self.states,
            *shard_batch(arrays, rules=DECODING),
            config=self.sizes,
            sharded=self.sharded,
        )


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _no_states(*, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return constrain(jnp.zeros(shape, dtype), "batch", None, None, rules=DECODING)


@partial(jax.jit, static_argnames=("config", "sharded"), donate_argnames=("cache", "states"))
def _extend_and_keep(
    params: Params,
    cache: KVCache,
    states: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    rows: jax.Array,
    place: jax.Array,
    conversation: jax.Array,
    *,
    config: ModelConfig,
    sharded: bool,
) -> tuple[KVCache, jax.Array]:
    """`generate.extend`, and the new hidden states in their places [B, T] of `states`."""
    hidden, cache = model.forward_cached(
        params, cache, tokens, counts, config=config, sharded=sharded, rows=rows
    )
    return cache, put_rows(states, hidden, place, conversation)


def open_cache(
    params: Params,
    questions: Questions,
    conversations: int,
    *,
    by: Judge,
    positions: Positions,
    response: np.ndarray | None,
) -> ContextCache:
    """An empty cache for the questions, a `Reading` with `response`.

    The number of its rows depends on that of the conversations, whether there are questions about
    them or not: else what is compiled would depend on the update.
    """
    how, ways = by.settings, shards("batch", rules=DECODING)
    longest = max((len(q.tokens) for turns in questions.values() for q in turns), default=0)
    how_read: dict[str, Any] = dict(
        sizes=by.model,
        rows=min(how.batch, -(-conversations // ways) * ways),
        slots=-(-(longest + by.answer_tokens) // SLOTS) * SLOTS,
        widths=how.extend_widths,
        rows_read=how.prefill_rows,
        positions=positions,
        purpose="judging",
    )
    if response is None:
        return ContextCache(params, **how_read)
    return Reading(params, response=response, **how_read)


def answers(
    cache: ContextCache, questions: Questions, conversations: int, *, by: Judge
) -> Iterator[dict[tuple[int, int], Answer]]:
    """Answers by (conversation, turn), of a batch of questions after another.

    Each row of the cache is asked the questions of one conversation, turn by turn, then those of
    another one. Only what a question does not share with the row's last one is read: first the
    judge's role and the task are shared, then with "history" the conversation so far. The rows of a
    device are asked about its own part of the conversations.
    """
    rows, ways = len(cache.held), shards("batch", rules=DECODING)
    # Those with most turns first, so that all rows end at about the same time.
    waiting: list[deque[int]] = [deque() for _ in range(ways)]
    for conversation in sorted(questions, key=lambda n: -len(questions[n])):
        waiting[conversation * ways // conversations].append(conversation)
    asking: list[tuple[int, deque[Question]]] = [(0, deque())] * rows
    while True:
        asked: dict[int, tuple[int, int]] = {}
        last, counts = np.zeros((2, rows), np.int32)
        reads = []
        for row in range(rows):
            if not asking[row][1] and (own := waiting[row * ways // rows]):
                asking[row] = own[0], deque(questions[own.popleft()])
            conversation, left = asking[row]
            if not left:
                continue
            question = left.popleft()
            reads.append(row)
            if isinstance(cache, Reading):
                cache.begin(row, conversation, shared=question.shared)
            cache.put(row, question.tokens)
            if question.turn is not None:
                asked[row] = conversation, question.turn
                last[row], counts[row] = question.tokens[-1], 1
        if not reads:
            return
        cache.read(reads)
        if asked:
            given = DECODINGS[by.settings.decode](cache, last, counts, by=by)
            yield {place: given[row] for row, place in asked.items()}
