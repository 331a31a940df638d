"""The teacher in the student's episodes: which of their turns it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Actor, Turn
from opd_jax.model import Params
from opd_jax.runtime.mesh import replicate


@dataclass(frozen=True)
class Guide:
    """The teacher, which takes some turns of the student's episodes.

    Attributes:
      params: the teacher's, as `rollout` takes those of a player.
      agent: the teacher as it plays, with the tokenizer and the chat format of the student.
      share: each turn is the teacher's with this probability.
      after: once so many turns in a row have failed, all later ones are the teacher's; 0: never.
        Replayed turns do not count.
      learnt: the student learns from the teacher's turns; otherwise they carry no loss.

    Source: `share` is Guided-OPD's (arXiv 2606.15912), `after` is ours.
    """

    params: Params
    agent: Agent
    share: float
    after: int
    learnt: bool

    def takes(self, turns: Sequence[Turn], *, draw: float) -> bool:
        """Whether the turn after these is the teacher's; `draw` is random, in [0, 1)."""
        return draw < self.share or has_failed(turns, times=self.after)


def has_failed(turns: Sequence[Turn], *, times: int) -> bool:
    """Whether at any point so many turns in a row have failed; with 0 never.

    Replayed turns do not count: the student did not write them.
    """
    in_a_row = 0
    for turn in turns:
        if turn.actor is Actor.REPLAY:
            continue
        in_a_row = in_a_row + 1 if turn.failure else 0
        if times and in_a_row == times:
            return True
    return False


class Draws:
    """A random number in [0, 1) for each turn of each episode; it depends on the key alone."""

    def __init__(self, keys: jax.Array):
        self._keys, self._of_turn = keys, dict[int, np.ndarray]()

    def of(self, episode: int, turn: int) -> float:
        """The number of an episode's turn. The first to ask draws for all episodes."""
        if turn not in self._of_turn:
            self._of_turn[turn] = jax.device_get(_uniform(self._keys, np.uint32(turn)))
        return float(self._of_turn[turn][episode])


@jax.jit
def _uniform(keys: jax.Array, turn: jax.Array) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        # A token's key is folded with its position, which is less.
        of_turn = jax.random.fold_in(jax.random.fold_in(key, turn), np.uint32(2**32 - 1))
        return jax.random.uniform(of_turn)

    return replicate(jax.vmap(draw)(keys))
