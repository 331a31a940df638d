"""Labels of turns, as arrays [B, K]: what the environment itself says of every turn of a batch.

The teacher's judgement (`verdicts`) gives arrays of the same shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opd_jax.agent.conversation import Conversation
from opd_jax.losses import Verdict

NO_LABEL = -1


class EnvLabels(NamedTuple):
    """What the environment says of every turn.

    Attributes:
      played: bool [B, K], there is such a turn, and the environment did not break in its episode.
      failed: bool [B, K], the turn failed deterministically.
      oracle: int32 [B, K], the environment's own `Verdict` from hidden knowledge; `NO_LABEL` where
        it has none.
    """

    played: np.ndarray
    failed: np.ndarray
    oracle: np.ndarray


def env_labels(conversations: Sequence[Conversation], *, max_turns: int) -> EnvLabels:
    """The environment's labels of every turn.

    Args:
      conversations: B of them; rows that only fill a batch have no turns.
      max_turns: K.
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
            labels.played[row, k] = True
            labels.failed[row, k] = bool(turn.failure)
            if turn.oracle:
                labels.oracle[row, k] = Verdict[turn.oracle]
    return labels
