"""The device's side of a rollout: the rows of a batch sample, each at its own turn."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.agent import generate as gen
from opd_jax.agent.agent import Agent
from opd_jax.agent.contexts import ContextCache
from opd_jax.agent.positions import Positions
from opd_jax.model import ModelConfig, Params
from opd_jax.runtime import startup
from opd_jax.runtime.mesh import DECODING, shard_batch


class Response(NamedTuple):
    """One response as sampled.

    Attributes:
      tokens: sampled tokens, the stop token included.
      logprobs: one a token, nats.
      stop: why it ended: "stop_token", "turn_budget", "context", or "invented_turn" if it began to
        pretend to be the environment or the user.
    """

    tokens: list[int]
    logprobs: list[float]
    stop: str


@dataclass
class _Sampling:
    """A response under way.

    Attributes:
      key: index of its episode's PRNG key.
      turn: the turn, which is folded into the key.
      budget: tokens that may still be sampled.
      full: the context, not the turn's budget, limits it.
      tokens, logprobs: as in `Response`.
    """

    key: int
    turn: int
    budget: int
    full: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Session:
    """The cache of a rollout and the responses under way, by row.

    Rows need not be in step: while some sample, others wait for their environments.
    """

    def __init__(
        self,
        params: Params,
        keys: jax.Array,
        *,
        agent: Agent,
        rows: int,
        positions: Positions,
        purpose: str = "reading",
    ):
        decoding = agent.decoding
        self.agent, self.keys, self._positions = agent, keys, positions
        if isinstance(agent.model, ModelConfig) and not isinstance(params["layers"], tuple):
            params = gen.for_decoding(params, platform=jax.default_backend())
        self.cache = ContextCache(
            params,
            sizes=agent.model,
            rows=rows,
            slots=decoding.context_tokens,
            widths=decoding.extend_widths,
            rows_read=decoding.prefill_rows,
            int8=decoding.int8_cache,
            positions=positions,
            purpose=purpose,
        )
        self.live: dict[int, _Sampling] = {}
        self.stop_ids = jnp.asarray(agent.chat.stop_ids, jnp.int32)

    def begin(self, row: int, context: list[int], *, key: int, turn: int) -> None:
        """Starts a response to a context.

        It is sampled with `keys[key]` folded with `turn`, then with the position.
        """
        self.cache.put(row, context)
        decoding = self.agent.decoding
        budget = min(decoding.turn_tokens, decoding.context_tokens - len(context))
        self.live[row] = _Sampling(key, turn, budget, full=budget < decoding.turn_tokens)

    def launch(self) -> gen.Sampled | None:
        """Starts to sample a chunk for every live row, without waiting for it; None if none is."""
        if not self.live:
            return None
        self.cache.read(self.live)
        decoding = self.agent.decoding
        last, budget, key, turn = np.zeros((4, len(self.cache.held)), np.int32)
        for row, live in self.live.items():
            last[row] = (live.tokens or self.cache.contexts[row])[-1]
            budget[row], key[row], turn[row] = live.budget, live.key, live.turn
        cache, out = gen.generate(
            self.cache.params,
            self.cache.take(),
            *shard_batch((last, budget), rules=DECODING),
            _turn_keys(self.keys, key, turn),
            self.stop_ids,
            config=self.agent.model,
            sampling=decoding.sampling,
            chunk=decoding.chunk,
            sharded=self.cache.sharded,
        )
        self.cache.give(cache)
        return out

    def collect(self, launched: gen.Sampled | None) -> dict[int, Response]:
        """Waits for a chunk; returns the responses that ended in it, by row.

        A response that begins an invented turn is cut there. What was sampled beyond is dropped:
        it is no part of the row's next context.

        Raises:
          ValueError: the model's logits are not finite.
        """
        if launched is None:
            return {}
        out = jax.device_get(launched)
        startup.reached("token")
        sampled = np.arange(out.tokens.shape[1]) < out.counts[:, None]
        if not np.isfinite(out.logprobs[sampled]).all():
            raise ValueError(
                "the logits of the model that plays are not finite, so nothing can be sampled: "
                "if it is being trained, it has diverged; lower `optimizer.learning_rate`, or "
                "go on from an older checkpoint"
            )
        self.cache.held += out.counts
        tokens = int(out.counts.sum())
        self._positions.add("sampling", tokens=tokens, computed=out.computed)
        ended: dict[int, Response] = {}
        for row, live in list(self.live.items()):
            count = int(out.counts[row])
            live.tokens += out.tokens[row, :count].tolist()
            live.logprobs += out.logprobs[row, :count].tolist()
            live.budget -= count
            if live.budget and not out.stopped[row]:
                stay = self.agent.invented_in(live.tokens, new=count)
                if stay is None:
                    continue
            else:
                stay = self.agent.invented_at(live.tokens)
            del self.live[row]
            self.cache.contexts[row] = [*self.cache.contexts[row], *live.tokens]
            stop = "context" if live.full else "turn_budget"
            if stay is not None:
                stop = "invented_turn"
            elif out.stopped[row]:
                stop = "stop_token"
            ended[row] = Response(live.tokens[:stay], live.logprobs[:stay], stop)
        return ended


@jax.jit
def _turn_keys(keys: jax.Array, key: jax.Array, turn: jax.Array) -> jax.Array:
    """The rows' keys for one turn. Positions alone would repeat if turns are left out."""
    return jax.vmap(jax.random.fold_in)(keys[key], turn)
