"""The agent loop: a batch of conversations between a model and its environments.

Per turn: append what the environments said (ragged, only the new tokens), sample a response for
every open row, let each environment act on its own response. The key/value cache lives as long as
the episodes. Every token is recorded with its provenance at the moment it comes into being. An
environment that breaks ends its own episode, which is recorded as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent import history
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation, open_conversation, record_turn
from opd_jax.agent.generate import Sampling
from opd_jax.envs.base import Env, Observation, Task
from opd_jax.model import KVCache, ModelConfig, Params
from opd_jax.runtime import processes
from opd_jax.runtime.mesh import shard_batch

T = TypeVar("T")


@dataclass(frozen=True)
class Agent:
    """Everything but the parameters that turns a model into an agent.

    Attributes:
      model: its sizes.
      tokenizer: a `transformers` tokenizer; used to read responses, never to re-tokenize them.
      chat: how messages become tokens.
      sampling: how tokens are drawn.
      turn_tokens: most tokens sampled in one turn.
      context_tokens: most tokens in a context, prompts and observations included: the cache.
      extend_widths: ascending widths in which new tokens are appended; one compiled program each.
      cache_step: slots by which the cache grows, as conversations do, up to `context_tokens`; a
        token reads all the slots that there are. For each size that it has, the programs that
        append and sample are compiled.
      chunk: tokens sampled between two looks at which rows are done.
      history_turns: earlier turns that a response is sampled from, at most; 0: all of them. Fewer
        than all cost a prefill of the context anew in each turn (`history`).
    """

    model: ModelConfig
    tokenizer: Any
    chat: ChatFormat
    sampling: Sampling
    turn_tokens: int
    context_tokens: int
    cache_step: int
    extend_widths: tuple[int, ...]
    chunk: int
    history_turns: int

    def context(self, conversation: Conversation) -> list[int]:
        """The tokens that the conversation's next response is sampled from."""
        return history.context(
            conversation,
            turns=len(conversation.spans),
            history_turns=self.history_turns,
            left_out=self.chat.left_out,
        )


def rollout(
    params: Params,
    keys: jax.Array,
    *,
    agent: Agent,
    envs: Sequence[Env | None],
    tasks: Sequence[tuple[str, int]],
    depth: int,
) -> list[Conversation]:
    """Play one episode of each task.

    Args:
      params: of `agent.model`.
      keys: PRNG keys, one for each environment (see `row_keys`). An episode depends on nothing but
        the parameters, its task and its key, which is folded with the turn and then the position;
        but for last bits, since all rows have the cache that the longest needs.
      agent: see `Agent`.
      envs: one environment a row; their number is the batch of every compiled program. None for a
        row whose environment lives in another process.
      tasks: (split, index), at most one a row; rows beyond stay idle.
      depth: turns after which an episode ends with "depth"; 0: as many as the environment gives.

    Returns:
      A finished `Conversation` for each task, in order; `Conversation.broken` where its environment
      broke, without a token where it did so before the first turn.

    Raises:
      ValueError: more tasks than environments, or not a key for each environment.
    """
    if len(tasks) > len(envs):
        raise ValueError(
            f"`tasks`: expected at most one for each of {len(envs)} environments, got {len(tasks)}"
        )
    if keys.shape != (len(envs),):
        raise ValueError(
            f"`keys`: expected one for each of {len(envs)} environments, got shape {keys.shape}"
        )
    conversations, observations = _open(agent, envs, tasks)
    tape = _Tape(params, agent, len(envs))
    turn = 0
    while rows := [r for r, c in enumerate(conversations) if not c.end]:
        tape.extend({row: agent.context(conversations[row]) for row in rows})
        sampled = tape.sample(rows, _turn_keys(keys, turn))
        responses = [_response(agent, *sampled[row]) for row in rows]
        answers = everywhere(
            lambda env, response: env.step(response), [envs[row] for row in rows], responses
        )
        for row, response, after in zip(rows, responses, answers, strict=True):
            conversation, (tokens, logprobs, stop) = conversations[row], sampled[row]
            conversation.append_response(tokens, logprobs, turn)
            record_turn(conversation, observations[row], response, stop, after)
            if not conversation.end and turn + 1 == depth:
                conversation.end = "depth"
            if not conversation.end:
                _go_on(agent, conversation, stop, after)
            observations[row] = after
        turn += 1
    return conversations


def row_keys(rng: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """A PRNG key for each number: `rng` folded with it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.asarray(numbers, jnp.uint32))


@jax.jit
def _turn_keys(keys: jax.Array, turn: int) -> jax.Array:
    """The rows' keys for one turn: positions alone may come again where turns are left out."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, turn)


def _open(
    agent: Agent, envs: Sequence[Env | None], tasks: Sequence[tuple[str, int]]
) -> tuple[list[Conversation], list[Observation]]:
    def reset(env: Env, task: tuple[str, int]) -> tuple[Observation, Task, str]:
        return env.reset(*task), env.task, env.system

    conversations, observations = [], []
    for observation, task, system in everywhere(reset, envs[: len(tasks)], tasks):
        observations.append(observation)
        if observation.done:  # it broke: there is nothing to react to
            conversations.append(Conversation(task, end=observation.end))
            continue
        prompt = agent.chat.first(system, observation.message)
        conversations.append(open_conversation(task, prompt, context_tokens=agent.context_tokens))
    return conversations, observations


def everywhere(
    act: Callable[[Env, Any], T], envs: Sequence[Env | None], arguments: Sequence[Any]
) -> list[T]:
    """`act` of each environment, in whichever process it lives; all processes get all answers.

    Args:
      act: (environment, argument) to what can be pickled.
      envs: one a row; None for a row whose environment lives in another process.
      arguments: one a row.
    """
    own = {row: env for row, env in enumerate(envs) if env is not None}
    answers = _side_by_side(act, list(own.values()), [arguments[row] for row in own])
    return processes.share(dict(zip(own, answers, strict=True)), len(envs))


def _side_by_side(
    act: Callable[[Env, Any], T], envs: Sequence[Env], arguments: Sequence[Any]
) -> list[T]:
    """`act` of each environment: at the same time where all wait for somebody else.

    Others take turns: an engine need not bear threads, and most would gain nothing by them.
    """
    if not envs or not all(env.waits for env in envs):
        return list(map(act, envs, arguments))
    with ThreadPoolExecutor(len(envs)) as pool:
        return list(pool.map(act, envs, arguments))


def _response(agent: Agent, tokens: Sequence[int], logprobs: Sequence[float], stop: str) -> str:
    """The text of sampled tokens, without the one that ended the turn."""
    return agent.tokenizer.decode(tokens[:-1] if stop == "stop_token" else tokens)


def _go_on(agent: Agent, conversation: Conversation, stop: str, after: Observation) -> None:
    """Append what the environment said, unless the context is full."""
    follow = agent.chat.follow(after.message, ended=stop == "stop_token")
    # One slot must remain to sample into: a conversation that cannot go on ends here, whole.
    if stop == "context" or len(agent.context(conversation)) + len(follow) >= agent.context_tokens:
        conversation.end = "context"
    else:
        conversation.append_given(follow)


class _Tape:
    """The device's side of the conversations: cache, and how much of each row it holds."""

    def __init__(self, params: Params, agent: Agent, rows: int):
        self.params, self.agent = params, agent
        self.sharded = model.is_sharded(params)
        self.cache: KVCache = model.init_cache(
            agent.model,
            batch=rows,
            slots=min(agent.cache_step, agent.context_tokens),
            dtype=params["embed"].dtype,
            layout=model.backend_cache_layout(),
        )
        self.contexts: list[list[int]] = [[] for _ in range(rows)]
        self.held = np.zeros(rows, np.int32)
        self.stop_ids = jnp.asarray(agent.chat.stop_ids, jnp.int32)

    def extend(self, contexts: Mapping[int, list[int]]) -> None:
        """Bring the cache up to all tokens but the last of every row's context."""
        self._roll_back(contexts)
        while True:
            new = [
                context[held:-1] if row in contexts else []
                for row, (context, held) in enumerate(zip(self.contexts, self.held, strict=True))
            ]
            longest = max(map(len, new))
            if longest == 0:
                return
            widths = self.agent.extend_widths
            width = next((w for w in widths if w >= longest), widths[-1])
            tokens = np.zeros((len(new), width), np.int32)
            for row, pending in enumerate(new):
                tokens[row, : len(pending[:width])] = pending[:width]
            counts = np.array([min(len(pending), width) for pending in new], np.int32)
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
        """Grow the cache by whole steps, until each row has slots for so many tokens more."""
        step, needed = self.agent.cache_step, int((self.held + counts).max())
        slots = min(-(-needed // step) * step, self.agent.context_tokens)
        if slots > self.cache.slots:
            self.cache = model.grow_cache(self.cache, slots=slots)

    def _roll_back(self, contexts: Mapping[int, list[int]]) -> None:
        """Give rows new contexts; of what they hold, what the two have in common stays."""
        held = self.held.copy()
        for row, context in contexts.items():
            held[row] = _common(self.contexts[row][: held[row]], context[:-1])
            self.contexts[row] = context
        if (held < self.held).any():
            self.held = held
            self.cache = replace(self.cache, lengths=shard_batch(held.copy()))

    def sample(
        self, rows: Sequence[int], keys: jax.Array
    ) -> dict[int, tuple[list[int], list[float], str]]:
        """One response for each of `rows`: its tokens, their log-probabilities, why it ended."""
        agent = self.agent
        budget, last = self._start_turn(rows)
        full = budget < agent.turn_tokens
        stopped = np.zeros(len(self.held), bool)
        tokens: dict[int, list[int]] = {row: [] for row in rows}
        logprobs: dict[int, list[float]] = {row: [] for row in rows}
        while budget.any():
            self._make_room(np.minimum(budget, agent.chunk))
            self.cache, out = gen.generate(
                self.params,
                self.cache,
                *shard_batch((last, budget)),
                keys,
                self.stop_ids,
                config=agent.model,
                sampling=agent.sampling,
                chunk=agent.chunk,
                sharded=self.sharded,
            )
            out = jax.device_get(out)
            for row in rows:
                count = int(out.counts[row])
                tokens[row] += out.tokens[row, :count].tolist()
                logprobs[row] += out.logprobs[row, :count].tolist()
                if count:
                    last[row] = tokens[row][-1]
            self.held += out.counts
            stopped |= out.stopped
            budget = np.where(stopped, 0, budget - out.counts)

        for row in rows:
            self.contexts[row] = [*self.contexts[row], *tokens[row]]

        def why(row: int) -> str:
            return "stop_token" if stopped[row] else "context" if full[row] else "turn_budget"

        return {row: (tokens[row], logprobs[row], why(row)) for row in rows}

    def _start_turn(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of every row: how many tokens it may sample, 0 if not in `rows`, and its last token."""
        budget = np.zeros(len(self.held), np.int32)
        last = np.zeros(len(self.held), np.int32)
        for row in rows:
            room = self.agent.context_tokens - len(self.contexts[row])
            budget[row] = min(self.agent.turn_tokens, room)
            last[row] = self.contexts[row][-1]
        return budget, last


def _common(held: list[int], context: list[int]) -> int:
    """How many tokens at their start the two have in common."""
    if held == context[: len(held)]:
        return len(held)
    pairs = enumerate(zip(held, context, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(held), len(context)))
