"""The device's side of a batch of conversations: one cache that lives as long as the episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.agent import Agent
from opd_jax.model import KVCache, ModelConfig, Params
from opd_jax.runtime.mesh import shard_batch


class Response(NamedTuple):
    """One response as sampled.

    Attributes:
      tokens: sampled tokens, the stop token included.
      logprobs: one a token, nats.
      stop: why it ended: "stop_token", "turn_budget", "context", or "others" if it began to make up
        another's words.
    """

    tokens: list[int]
    logprobs: list[float]
    stop: str


class CacheSession:
    """The cache of a batch of conversations between calls.

    It tracks what each row holds and grows when needed.
    """

    def __init__(self, params: Params, agent: Agent, rows: int):
        self.params, self.agent = params, agent
        self.sharded = model.is_sharded(params)
        slots = min(agent.decoding.cache_step, agent.decoding.context_tokens)
        self.cache = empty_cache(params, agent.model, rows=rows, slots=slots)
        self.contexts: list[list[int]] = [[] for _ in range(rows)]
        self.held = np.zeros(rows, np.int32)
        self.stop_ids = jnp.asarray(agent.chat.stop_ids, jnp.int32)

    def extend(self, contexts: Mapping[int, list[int]]) -> None:
        """Appends what the cache lacks of every row's context, except the last token."""
        self._roll_back(contexts)
        while True:
            new = [
                context[held:-1] if row in contexts else []
                for row, (context, held) in enumerate(zip(self.contexts, self.held, strict=True))
            ]
            longest = max(map(len, new))
            if longest == 0:
                return
            widths = self.agent.decoding.extend_widths
            width = next((w for w in widths if w >= longest), widths[-1])
            tokens, counts = padded([pending[:width] for pending in new], width=width)
            self._make_room(counts)
            self.cache = gen.extend(
                self.params,
                self.cache,
                *shard_batch((tokens, counts)),
                config=self.agent.model,
                sharded=self.sharded,
            )
            self.held += counts

    def _make_room(self, counts: np.ndarray) -> None:
        """Grows the cache by whole steps until row b has slots for `counts[b]` more tokens."""
        step, needed = self.agent.decoding.cache_step, int((self.held + counts).max())
        slots = min(-(-needed // step) * step, self.agent.decoding.context_tokens)
        if slots > self.cache.slots:
            self.cache = model.grow_cache(self.cache, slots=slots)

    def _roll_back(self, contexts: Mapping[int, list[int]]) -> None:
        """Gives rows new contexts. The prefix that old and new context share stays cached."""
        held = self.held.copy()
        for row, context in contexts.items():
            held[row] = _common(self.contexts[row][: held[row]], context[:-1])
            self.contexts[row] = context
        if (held < self.held).any():
            self.held = held
            self.cache = replace(self.cache, lengths=shard_batch(held.copy()))

    def sample(self, rows: Sequence[int], keys: jax.Array) -> dict[int, Response]:
        """One response for each of `rows`; the other rows stay as they are.

        `keys` has this turn's PRNG key for each row of the batch. After each chunk a row whose
        response makes up another's words is cut there. What was sampled beyond is dropped: the
        cache is rolled back when the row's next context is read.

        Raises:
          ValueError: the model's logits are not finite.
        """
        agent = self.agent
        budget, last = np.zeros_like(self.held), np.zeros_like(self.held)
        for row in rows:
            room = agent.decoding.context_tokens - len(self.contexts[row])
            budget[row] = min(agent.decoding.turn_tokens, room)
            last[row] = self.contexts[row][-1]
        full = budget < agent.decoding.turn_tokens
        stopped = np.zeros(len(self.held), bool)
        said = {row: Response([], [], stop="") for row in rows}
        made_up: dict[int, int] = {}  # row to the tokens that stay
        while budget.any():
            self._make_room(np.minimum(budget, agent.decoding.chunk))
            self.cache, out = gen.generate(
                self.params,
                self.cache,
                *shard_batch((last, budget)),
                keys,
                self.stop_ids,
                config=agent.model,
                sampling=agent.decoding.sampling,
                chunk=agent.decoding.chunk,
                sharded=self.sharded,
            )
            out = jax.device_get(out)
            sampled = np.arange(out.tokens.shape[1]) < out.counts[:, None]
            if not np.isfinite(out.logprobs[sampled]).all():
                raise ValueError(
                    "the logits of the model that plays are not finite, so nothing can be sampled: "
                    "if it is being trained, it has diverged; lower `optimizer.learning_rate`, or "
                    "go on from an older checkpoint"
                )
            for row, response in said.items():
                count = int(out.counts[row])
                response.tokens.extend(out.tokens[row, :count].tolist())
                response.logprobs.extend(out.logprobs[row, :count].tolist())
                if count:
                    last[row] = response.tokens[-1]
                    if (stay := agent.made_up(response.tokens)) is not None:
                        made_up[row] = stay
            self.held += out.counts
            stopped |= out.stopped
            budget = np.where(stopped, 0, budget - out.counts)
            budget[list(made_up)] = 0

        for row, response in said.items():
            self.contexts[row] = [*self.contexts[row], *response.tokens]
            stop = "stop_token" if stopped[row] else "context" if full[row] else "turn_budget"
            if stay := made_up.get(row):
                tokens, logprobs, _ = response
                response, stop = Response(tokens[:stay], logprobs[:stay], ""), "others"
            said[row] = response._replace(stop=stop)
        return said


def empty_cache(params: Params, sizes: ModelConfig, *, rows: int, slots: int) -> KVCache:
    """An empty cache in the dtype of the parameters and the layout that suits the backend."""
    return model.init_cache(
        sizes,
        batch=rows,
        slots=slots,
        dtype=params["embed"].dtype,
        layout=model.backend_cache_layout(),
    )


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
