"""Tokens summed over their turns, and any method's weights of turns, against loops over tokens."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from objectives import SAGE

from opd_jax.learner.tokens import Tokens
from opd_jax.learner.weights import METHODS
from opd_jax.losses import NO_TURN, TokenScores

# The second episode has two rows, as with `rollout.history_turns`; the third has no token.
TURN_ID = np.array([[0, 0, 1, NO_TURN], [0, 1, 1, NO_TURN], [2, 2, 2, 2]], np.int32)
EPISODE, SHAPE = np.array([0, 1, 1]), (3, 4)
RNG = np.random.default_rng(0)
X = RNG.normal(size=TURN_ID.shape)
SCORES = TokenScores(*RNG.uniform(0.1, 2, (6, *TURN_ID.shape)).astype(np.float32))
TOKENS = Tokens(TURN_ID, -SCORES.student_logprob, SCORES, EPISODE, SHAPE)


def by_loop(x: np.ndarray) -> np.ndarray:
    total = np.zeros(SHAPE)
    for row, place in np.argwhere(TURN_ID != NO_TURN):
        total[EPISODE[row], TURN_ID[row, place]] += x[row, place]
    return total


def test_sums_and_means_over_turns() -> None:
    assert TOKENS.count.tolist() == [[2, 1, 0, 0], [1, 2, 4, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(TOKENS.total(X), by_loop(X))
    np.testing.assert_allclose(TOKENS.mean(X), by_loop(X) / np.maximum(TOKENS.count, 1))


def test_a_methods_weights_are_those_that_an_update_computes() -> None:
    labels = {
        "verdict": np.array([[1, 2, 0, 0], [3, 0, 2, 0], [0, 0, 0, 0]]),
        "reliability": np.array([[0.5, 1, np.nan, 0], [0.25, np.nan, 0.75, 1], [0, 0, 0, 0]]),
    }
    for name in METHODS:
        weight = replace(SAGE.weight, by=name)
        given = {label: jnp.asarray(labels[label][EPISODE]) for label in weight.labels}
        s = weight(
            jnp.asarray(TURN_ID),
            num_turns=SHAPE[1],
            sampled_logprobs=TOKENS.sampled_logprobs,
            **SCORES._asdict(),
            **given,
        )
        read = {label: labels[label] for label in weight.labels}
        np.testing.assert_allclose(TOKENS.weigh(weight, **read), by_loop(np.asarray(s)), rtol=1e-6)
    np.testing.assert_allclose(
        TOKENS.weigh(replace(SAGE.weight, by="reliability"), reliability=labels["reliability"]),
        TOKENS.count * np.nan_to_num(labels["reliability"]),
    )
