"""The device's side of a rollout: one cache whose rows read and sample, each at its own turn."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.agent import Agent
from opd_jax.model import KVCache, ModelConfig, Params
from opd_jax.runtime import mesh
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


@dataclass
class _Row:
    """A row that samples a response.

    Attributes:
      key: index of its episode's PRNG key.
      turn: the turn, which is folded into the key.
      budget: tokens that it may still sample.
      full: the context, not the turn's budget, limits it.
      tokens, logprobs: as in `Response`.
    """

    key: int
    turn: int
    budget: int
    full: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class CacheSession:
    """The cache of a batch of conversations between calls, and the responses under way.

    Rows need not be in step: while some sample, others wait for their environments.
    """

    def __init__(self, params: Params, keys: jax.Array, *, agent: Agent, rows: int):
        stacked = not isinstance(params["layers"], tuple)
        self.params = _unstack(params) if stacked else params
        self.keys, self.agent = keys, agent
        self.sharded = model.is_sharded(params)
        slots = agent.decoding.context_tokens
        self.cache = empty_cache(params, agent.model, rows=rows, slots=slots)
        self.contexts: list[list[int]] = [[] for _ in range(rows)]
        self.held = np.zeros(rows, np.int32)  # tokens of each row in the cache
        self.live: dict[int, _Row] = {}
        self.stop_ids = jnp.asarray(agent.chat.stop_ids, jnp.int32)

    def clear(self, row: int) -> None:
        """Empties a row, for an episode that begins."""
        self.contexts[row], self.held[row] = [], 0

    def begin(self, row: int, context: list[int], *, key: int, turn: int) -> None:
        """Starts a response to a context. What it shares with the row's last one stays cached.

        It is sampled with `keys[key]` folded with `turn`, then with the position.
        """
        decoding = self.agent.decoding
        self.held[row] = _common(self.contexts[row][: self.held[row]], context[:-1])
        self.contexts[row] = context
        room = decoding.context_tokens - len(context)
        budget = min(decoding.turn_tokens, room)
        self.live[row] = _Row(key, turn, budget, full=budget < decoding.turn_tokens)

    def read(self) -> None:
        """Appends what the cache lacks of the live rows' contexts, except their last tokens.

        The widths of a row's pieces depend on its own context alone, and all calls have the same
        number of rows. So an episode's bits do not depend on the other rows.
        """
        while pieces := self._pieces():
            for width, of_width in sorted(pieces.items()):
                for call in self._calls(of_width):
                    rows = np.array([row for row, _ in call], np.int32)
                    tokens, counts = padded([new for _, new in call], width=width)
                    self.cache = gen.extend(
                        self.params,
                        self._at_lengths(),
                        *shard_batch((tokens, counts, rows)),
                        config=self.agent.model,
                        sharded=self.sharded,
                    )
                    np.add.at(self.held, rows, counts)

    def launch(self) -> gen.Sampled:
        """Starts to sample a chunk for every live row, without waiting for it."""
        decoding, rows = self.agent.decoding, len(self.held)
        last, budget, key, turn = np.zeros((4, rows), np.int32)
        for row, live in self.live.items():
            last[row] = (live.tokens or self.contexts[row])[-1]
            budget[row], key[row], turn[row] = live.budget, live.key, live.turn
        self.cache, out = gen.generate(
            self.params,
            self._at_lengths(),
            *shard_batch((last, budget)),
            _turn_keys(self.keys, key, turn),
            self.stop_ids,
            config=self.agent.model,
            sampling=decoding.sampling,
            chunk=decoding.chunk,
            sharded=self.sharded,
        )
        return out

    def collect(self, launched: gen.Sampled) -> dict[int, Response]:
        """Waits for a chunk; returns the responses that ended in it, by row.

        A response that makes up another's words is cut there. What was sampled beyond is dropped:
        the cache is rolled back when the row's next context is read.

        Raises:
          ValueError: the model's logits are not finite.
        """
        out = jax.device_get(launched)
        sampled = np.arange(out.tokens.shape[1]) < out.counts[:, None]
        if not np.isfinite(out.logprobs[sampled]).all():
            raise ValueError(
                "the logits of the model that plays are not finite, so nothing can be sampled: "
                "if it is being trained, it has diverged; lower `optimizer.learning_rate`, or "
                "go on from an older checkpoint"
            )
        self.held += out.counts
        ended: dict[int, Response] = {}
        for row, live in list(self.live.items()):
            count = int(out.counts[row])
            live.tokens += out.tokens[row, :count].tolist()
            live.logprobs += out.logprobs[row, :count].tolist()
            live.budget -= count
            stay = self.agent.made_up(live.tokens)
            if stay is None and live.budget and not out.stopped[row]:
                continue
            del self.live[row]
            self.contexts[row] = [*self.contexts[row], *live.tokens]
            stop = "context" if live.full else "turn_budget"
            if stay is not None:
                stop = "others"
            elif out.stopped[row]:
                stop = "stop_token"
            ended[row] = Response(live.tokens[:stay], live.logprobs[:stay], stop)
        return ended

    def _at_lengths(self) -> KVCache:
        """The cache with the rows' lengths as the host counts them."""
        return replace(self.cache, lengths=shard_batch(self.held.copy()))

    def _pieces(self) -> dict[int, dict[int, list[int]]]:
        """The next piece of each live row's unread context, by width and row."""
        pieces: dict[int, dict[int, list[int]]] = defaultdict(dict)
        widths = self.agent.decoding.extend_widths
        for row in self.live:
            if unread := self.contexts[row][self.held[row] : -1]:
                width = next((w for w in widths if w >= len(unread)), widths[-1])
                pieces[width][row] = unread[:width]
        return pieces

    def _calls(self, new: Mapping[int, list[int]]) -> Iterator[list[tuple[int, list[int]]]]:
        """Splits rows and their tokens into calls; each has as many rows for every device.

        Where rows are missing, a call has one of the device's that gets no token.
        """
        shards = mesh.shards("batch")
        size = len(self.held) // shards
        most = min(self.agent.decoding.prefill_rows, size)
        parts = [[row for row in sorted(new) if row // size == part] for part in range(shards)]
        for start in range(0, max(map(len, parts)), most):
            call = []
            for part, rows in enumerate(parts):
                some = [(row, new[row]) for row in rows[start : start + most]]
                call += some + [(part * size, [])] * (most - len(some))
            yield call


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


_unstack = jax.jit(model.unstack)


@jax.jit
def _turn_keys(keys: jax.Array, key: jax.Array, turn: jax.Array) -> jax.Array:
    """The rows' keys for one turn. Positions alone would repeat if turns are left out."""
    return jax.vmap(jax.random.fold_in)(keys[key], turn)


def _common(held: list[int], context: list[int]) -> int:
    """The length of the common prefix."""
    if held == context[: len(held)]:
        return len(held)
    pairs = enumerate(zip(held, context, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(held), len(context)))
