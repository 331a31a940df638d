"""Responses to contexts that are given as they are: nothing is played, no environment is needed."""

from collections import deque
from collections.abc import Callable, Sequence

import jax
import numpy as np

from opd_jax.agent.agent import Agent
from opd_jax.agent.positions import Positions
from opd_jax.agent.session import Response, Session
from opd_jax.model import Params
from opd_jax.runtime import progress


def respond(
    params: Params,
    contexts: Sequence[list[int]],
    keys: jax.Array,
    *,
    agent: Agent,
    turns: Sequence[int],
    rows: int,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
) -> list[Response]:
    """Samples one response to each context, `rows` at a time.

    It is what `rollout` samples to this context in this turn with this key, up to rounding. Each
    row goes through a part of the list, and its cache keeps what a context shares with the one
    before. So in the order of an episode's turns, only what is new is read.

    Args:
      params: the player's; those of `generate.for_decoding` are not copied.
      contexts: N token lists, each shorter than the agent's `context_tokens`.
      keys: PRNG keys, one for each context.
      agent: who responds.
      turns: the turn of each response, which is folded into its key.
      rows: the batch of every compiled program.
      between: called before each chunk of tokens; what it raises ends the sampling.
      positions: counts what is read and sampled.
    """
    session = Session(params, keys, agent=agent, rows=rows, positions=positions or Positions())
    parts = [deque(part.tolist()) for part in np.array_split(np.arange(len(contexts)), rows)]
    current: dict[int, int] = {}  # the context that a row is at
    found: dict[int, Response] = {}
    with progress.doing("", total=len(contexts), unit="turns") as sampled:
        while True:
            for row, part in enumerate(parts):
                if part and row not in session.live:
                    current[row] = number = part.popleft()
                    session.begin(row, contexts[number], key=number, turn=turns[number])
            if not session.live:
                return [found[number] for number in range(len(contexts))]
            if between:
                between()
            for row, response in session.collect(session.launch()).items():
                found[current[row]] = response
                sampled.done += 1
