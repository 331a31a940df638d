"""Controls of a weighting: a method is believed when its control loses.

This is no config. `methods` names these judges and weights:

  drop_accepted      as many accepted turns as were rejected are SKIP, drawn at random, all others
                     STRONG: is it the number of tokens?
  shuffled           the environment's labels, shuffled over the turns that it did not reject: is it
                     which turns?
  first_failures     0 where an action that does not repeat the one before was rejected, else 1
  repeated_failures  0 where one that does was rejected: is it loops?
  right_failures     r where an action was rejected, else 1; r is how often the teacher's own turn
                     at that history is right: is it the teacher's advice?
  wrong_failures     1 - r there, else 1
"""

import jax.numpy as jnp
import numpy as np

from opd_jax.losses import Verdict, of_each_token


def drop_accepted(conversations, update, *, seed=0):
    """A judge that knows nothing, and skips as much as the environment rejects."""
    rng = np.random.default_rng([seed, update])
    verdict = np.full(_shape(conversations), Verdict.STRONG)
    places = _places(conversations, failed=False)
    count = min(len(_places(conversations, failed=True)), len(places))
    for row, turn in rng.permutation(places)[:count]:
        verdict[row, turn] = Verdict.SKIP
    return verdict, {}


def shuffled(conversations, update, *, seed=0):
    """A judge that gives each verdict as often as the environment does, to any turn."""
    rng = np.random.default_rng([seed, update])
    verdict = np.full(_shape(conversations), Verdict.STRONG)
    places = _places(conversations, failed=False)
    labels = [conversations[row].turns[turn].oracle or "STRONG" for row, turn in places]
    for (row, turn), label in zip(places, rng.permutation(labels), strict=True):
        verdict[row, turn] = Verdict[label]
    return verdict, {}


def first_failures(turn_id, *, verdict, repeats):
    """A weight of 0 for rejected actions that are not the one before again."""
    return _where((verdict == Verdict.DET_FAIL) & (repeats == 0), 0.0, turn_id)


def repeated_failures(turn_id, *, verdict, repeats):
    """A weight of 0 for rejected actions that are the one before again."""
    return _where((verdict == Verdict.DET_FAIL) & (repeats == 1), 0.0, turn_id)


def right_failures(turn_id, *, verdict, reliability):
    """A weight of r for rejected actions; 0 where the teacher's own turn there is not known."""
    return _where(verdict == Verdict.DET_FAIL, jnp.nan_to_num(reliability), turn_id)


def wrong_failures(turn_id, *, verdict, reliability):
    """A weight of 1 - r for rejected actions; 0 where the teacher's own turn is not known."""
    return _where(verdict == Verdict.DET_FAIL, jnp.nan_to_num(1.0 - reliability), turn_id)


def _where(where, weight, turn_id):
    return of_each_token(jnp.where(where, weight, 1.0), turn_id)


def _shape(conversations):
    return len(conversations), max((len(c.turns) for c in conversations), default=0)


def _places(conversations, *, failed):
    return [
        (row, k)
        for row, c in enumerate(conversations)
        for k, turn in enumerate(c.turns)
        if bool(turn.failure) == failed and not c.broken
    ]
