"""The agent loop: a batch of conversations between a model and its environments.

Per turn: append what the environments said (ragged, only the new tokens), sample a response for
every open row, let each environment act on its own response. The key/value cache lives as long as
the episodes. Each token is recorded with its turn as soon as it is sampled. An environment that
breaks ends only its own episode.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation, open_conversation, record_turn
from opd_jax.agent.session import CacheSession
from opd_jax.envs.base import Env, Observation, Task
from opd_jax.envs.workers import Worker
from opd_jax.model import Params
from opd_jax.runtime import processes
from opd_jax.runtime.signals import signalled

# How often a signal is looked for while environments are waited for.
_LOOK_S = 0.5

T = TypeVar("T")


def rollout(
    params: Params,
    keys: jax.Array,
    *,
    agent: Agent,
    envs: Sequence[Env | None],
    tasks: Sequence[tuple[str, int]],
    depth: int,
    between: Callable[[], None] | None = None,
) -> list[Conversation]:
    """Plays one episode of each task.

    An episode depends only on the parameters, its task and its key. The last bits also depend on
    the cache size, which the longest row sets.

    Args:
      keys: PRNG keys, one for each environment (see `row_keys`). A key is folded with the turn,
        then with the position.
      envs: one environment a row; their number is the batch of every compiled program. None for a
        row whose environment lives in another process.
      tasks: (split, index), at most one a row; rows without a task stay idle.
      depth: turns after which an episode ends with "depth"; 0: no limit but the environment's.
      between: called before every turn, in all processes; what it raises ends the rollout.

    Returns:
      A finished `Conversation` for each task, in order. It is `broken` if the environment broke or
      the first prompt did not fit, and has no token if that happened before the first turn.

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
    session = CacheSession(params, agent, len(envs))
    turn = 0
    while rows := [r for r, c in enumerate(conversations) if not c.end]:
        if between:
            between()
        session.extend({row: agent.context(conversations[row]) for row in rows})
        sampled = session.sample(rows, _turn_keys(keys, turn))
        responses = [agent.text(sampled[row].tokens, sampled[row].stop) for row in rows]
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
    """The rows' keys for one turn. Positions alone would repeat if turns are left out."""
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
        conversations.append(
            open_conversation(task, prompt, context_tokens=agent.decoding.context_tokens)
        )
    return conversations, observations


def make_envs(make: Callable[[], Env], count: int) -> list[Env | None]:
    """An environment for each row of a batch; None for a row that another process owns."""
    return [make() if processes.owns(row, count) else None for row in range(count)]


def close(envs: Sequence[Env | None]) -> None:
    """Ends the worker processes of environments now, not when they are garbage-collected."""
    for env in envs:
        if isinstance(env, Worker):
            env.close()


def everywhere(
    act: Callable[[Env, Any], T], envs: Sequence[Env | None], arguments: Sequence[Any]
) -> list[T]:
    """`act(env, argument)` of each row, in the process that owns it. All processes get all answers.

    `envs` has None for a row that another process owns. Answers are pickled.

    Raises:
      Stopped: a signal came to a process before it had its answers. A server that is away is asked
        for minutes, and the process may have seconds.
    """
    own = {row: env for row, env in enumerate(envs) if env is not None}
    calls = [partial(act, env, arguments[row]) for row, env in own.items()]
    # In threads if all environments wait for a process or a server. Otherwise one after another: an
    # engine need not be thread-safe, and most would gain nothing.
    waits = own and all(env.waits for env in own.values())
    answers = _in_threads(calls) if waits else _in_turn(calls)
    given = signalled() if answers is None else dict(zip(own, answers, strict=True))
    return processes.share(given, len(envs))


def _in_turn(calls: Sequence[Callable[[], T]]) -> list[T] | None:
    """The answers; None if a signal came before the last call."""
    answers: list[T] = []
    for call in calls:
        if signalled():
            return None
        answers.append(call())
    return answers


def _in_threads(calls: Sequence[Callable[[], T]]) -> list[T] | None:
    """The answers, from a thread each; None if a signal came before all were there."""
    pool = ThreadPoolExecutor(len(calls))
    futures = [pool.submit(call) for call in calls]
    while wait(futures, timeout=_LOOK_S).not_done:
        if signalled():
            pool.shutdown(wait=False, cancel_futures=True)
            return None
    pool.shutdown()
    return [future.result() for future in futures]


def _go_on(agent: Agent, conversation: Conversation, stop: str, after: Observation) -> None:
    """Appends what the environment said, unless the context is full."""
    follow = agent.chat.follow(after.message, ended=stop == "stop_token")
    # One slot must remain to sample into. A conversation without one ends with this turn.
    if (
        stop == "context"
        or len(agent.context(conversation)) + len(follow) >= agent.decoding.context_tokens
    ):
        conversation.end = "context"
    else:
        conversation.append_given(follow)
