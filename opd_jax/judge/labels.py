"""What is said of every turn of a batch, as arrays [B, K]: by the environment, and by the judge."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.agent.conversation import Actor, Conversation
from opd_jax.losses import Verdict

NO_LABEL = -1


class EnvLabels(NamedTuple):
    """What the environment says.

    Attributes:
      played: bool [B, K], there is such a turn, it was not replayed, and the environment did not
        break in its episode.
      failed: bool [B, K], the turn failed deterministically.
      oracle: int32 [B, K], the environment's own `Verdict` from hidden knowledge, or `NO_LABEL`.
    """

    played: np.ndarray
    failed: np.ndarray
    oracle: np.ndarray


class Judgement(NamedTuple):
    """What the judge says.

    Attributes:
      verdict: int32 [B, K], `Verdict` codes; SKIP if there is no turn or the environment broke.
        STRONG, the conservative reading, if an answer is unparsable or a question too long.
      asked: bool [B, K], turns that the judge was asked about.
      unparsable: bool [B, K], answers with none or several of the three words.
      too_long: bool [B, K], turns that it was not asked about: the teacher lacks the positions.
      scores: float32 [B, K, 3], the log-probability of each word (`prompt.LABELS`), nats. NaN where
        the words were not compared: not asked, or another decoding.
      hidden: the teacher's hidden states before the student's tokens, float [B, R, D'], sharded as
        a batch in training, if the judge has read what the teacher scores; else None.
    """

    verdict: np.ndarray
    asked: np.ndarray
    unparsable: np.ndarray
    too_long: np.ndarray
    scores: np.ndarray
    hidden: jax.Array | None = None

    @property
    def given(self) -> np.ndarray:
        """bool [B, K], the turns that have a verdict."""
        return self.asked | self.too_long | (self.verdict == Verdict.DET_FAIL)

    @property
    def answered(self) -> np.ndarray:
        """bool [B, K], turns with one of the three words for an answer."""
        return self.asked & ~self.unparsable


def env_labels(conversations: Sequence[Conversation], *, max_turns: int) -> EnvLabels:
    """The environment's labels of every turn.

    Raises:
      ValueError: an episode has more than `max_turns` turns, K.
    """
    shape = (len(conversations), max_turns)
    labels = EnvLabels(
        played=np.zeros(shape, bool),
        failed=np.zeros(shape, bool),
        oracle=np.full(shape, NO_LABEL, np.int32),
    )
    for row, conversation in enumerate(conversations):
        if conversation.task is None or conversation.broken:
            continue
        if len(conversation.turns) > max_turns:
            raise ValueError(
                f"`env.max_turns` = {max_turns}: an episode has {len(conversation.turns)} turns; "
                "the environment has to end it after `max_turns`"
            )
        for k, turn in enumerate(conversation.turns):
            if conversation.is_given(k):
                continue
            labels.played[row, k] = True
            labels.failed[row, k] = bool(turn.failure)
            if turn.oracle:
                labels.oracle[row, k] = Verdict[turn.oracle]
    return labels


def actors(conversations: Sequence[Conversation], *, max_turns: int) -> np.ndarray:
    """Who wrote every turn, codes of `Actor`: int32 [B, K]; STUDENT where there is no turn."""
    found = np.full((len(conversations), max_turns), Actor.STUDENT, np.int32)
    for row, conversation in enumerate(conversations):
        for k, turn in enumerate(conversation.turns):
            found[row, k] = turn.actor
    return found


def repeats(conversations: Sequence[Conversation], *, max_turns: int) -> np.ndarray:
    """1 for a turn whose action is that of the turn before, else 0: float32 [B, K]."""
    found = np.zeros((len(conversations), max_turns), np.float32)
    for row, conversation in enumerate(conversations):
        actions = [turn.action for turn in conversation.turns]
        for k in range(1, len(actions)):
            found[row, k] = bool(actions[k]) and actions[k] == actions[k - 1]
    return found
