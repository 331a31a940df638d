"""What an update computes of the student's tokens, and the weights of any method from it."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from opd_jax.learner.weighing import Weight
from opd_jax.losses import NO_TURN, TokenScores


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of B episodes, with what both models say of them.

    Attributes:
      turn_id: int32 [rows, R], `NO_TURN` where a row has no token.
      sampled_logprobs: float32 [rows, R], nats.
      scores: of the same tokens, [rows, R].
      episode: int [rows], which of the episodes each row is of.
      shape: (B, K).
    """

    turn_id: np.ndarray
    sampled_logprobs: np.ndarray
    scores: TokenScores
    episode: np.ndarray
    shape: tuple[int, int]

    @property
    def count(self) -> np.ndarray:
        """The number of tokens of each turn, float [B, K]."""
        return self.total(np.ones(self.turn_id.shape))

    def total(self, x: Any) -> np.ndarray:
        """The sum of x [rows, R] over the tokens of each turn, float [B, K]."""
        result, (row, place) = np.zeros(self.shape), np.nonzero(self.turn_id != NO_TURN)
        turn = self.turn_id[row, place]
        np.add.at(result, (self.episode[row], turn), np.asarray(x)[row, place])
        return result

    def mean(self, x: Any) -> np.ndarray:
        """The mean of x [rows, R] over the tokens of each turn, float [B, K]; 0 without any."""
        return self.total(x) / np.maximum(self.count, 1)

    def weigh(self, weight: Weight, **labels: np.ndarray) -> np.ndarray:
        """A method's raw weight of each turn, Σ s over its tokens, float [B, K].

        `labels` are those that it reads, [B, K].
        """
        s = weight(
            jnp.asarray(self.turn_id),
            num_turns=self.shape[1],
            sampled_logprobs=self.sampled_logprobs,
            **self.scores._asdict(),
            **{name: jnp.asarray(label[self.episode]) for name, label in labels.items()},
        )
        return self.total(s)
