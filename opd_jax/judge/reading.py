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

# [B, R, D]: the width is sharded too, since in decoding the batch is over few devices.
_AXES = ("batch", None, "heads")


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
    """

    def __init__(self, params: Params, *, response: np.ndarray, sizes: ModelConfig, **more: Any):
        super().__init__(params, sizes=sizes, **more)
        rows = len(self.held)
        self._response = response
        self._conversation, self._shared = np.zeros((2, rows), np.int32)
        # [B, R, D]; 0 where nothing was read.
        self._states = _no_states(
            shape=(*response.shape, sizes.d_model), dtype=params["embed"].dtype
        )

    def begin(self, row: int, conversation: int, *, shared: int) -> None:
        """Says whose question a row gets next, and how much of it is that conversation.

        Tokens of the last question are read again, even those that the conversation shares: their
        states were not kept. And another conversation is read from before its first response on,
        however it begins: its states are kept apart.
        """
        if conversation == self._conversation[row]:
            again = self._shared[row]
        else:
            again = max(self._response[conversation, 0] - 1, 0)
        self.held[row] = min(self.held[row], again)
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
        given = shard_batch((tokens, counts, rows), rules=DECODING)
        hidden, self._cache = extend_and_tell(
            self.params, self.take(), *given, config=self.sizes, sharded=self.sharded
        )
        given = shard_batch((place, conversation), rules=DECODING)
        self._states = _keep(self._states, hidden, *given)

    def kept(self) -> jax.Array:
        """The states, sharded as a batch in training. Nothing may be read afterwards."""
        return _as_in_training(self._states)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _no_states(*, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return constrain(jnp.zeros(shape, dtype), *_AXES, rules=DECODING)


@partial(jax.jit, static_argnames=("config", "sharded"), donate_argnames="cache")
def extend_and_tell(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    rows: jax.Array,
    *,
    config: ModelConfig,
    sharded: bool,
) -> tuple[jax.Array, KVCache]:
    """`generate.extend`, and the hidden states of the tokens, [B, T, D]."""
    return model.forward_cached(
        params, cache, tokens, counts, config=config, sharded=sharded, rows=rows
    )


# A program of its own: R is another one now and then, and this one is compiled at once.
@partial(jax.jit, donate_argnums=0)
def _keep(
    states: jax.Array, hidden: jax.Array, place: jax.Array, conversation: jax.Array
) -> jax.Array:
    return constrain(put_rows(states, hidden, place, conversation), *_AXES, rules=DECODING)


@jax.jit
def _as_in_training(states: jax.Array) -> jax.Array:
    return constrain(states, "batch", None, None)


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
    judge's role and the task are shared, then with "history" the conversation so far. A `Reading`
    keeps states where its rows are: there the rows of a device are asked about the device's own
    conversations.
    """
    rows = len(cache.held)
    ways = shards("batch", rules=DECODING) if isinstance(cache, Reading) else 1
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
