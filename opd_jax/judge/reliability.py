"""How good the teacher's advice is at a turn: is its own turn there right?

Its own turns are labelled by the environment, which executes them, or by a rule over the record of
the episode, which needs neither a replay nor hidden knowledge (`own_turns`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.agent.positions import Positions
from opd_jax.envs.base import Rule
from opd_jax.judge.agreement import draw_turns
from opd_jax.judge.labels import NO_LABEL, EnvLabels, env_labels
from opd_jax.judge.own_turns import OwnTurns
from opd_jax.losses import Verdict

# What the student's turn was: names of labels in metrics and tables.
OUTCOMES = {int(verdict): verdict.name for verdict in Verdict} | {NO_LABEL: "ACCEPTED"}


class Reliability(NamedTuple):
    """How reliable the teacher is at the turns of a batch, and what it did there.

    Attributes:
      asked: bool [B, K], the turns at which it was asked, N of them.
      turns: its own turns there, in the order of `np.argwhere(asked)`.
      labels: what is said of them, [N, samples]. `played` is false where nothing is known.
      metrics: as (sum, count), `reliability/…`.
    """

    asked: np.ndarray
    turns: OwnTurns
    labels: EnvLabels
    metrics: Mapping[str, Any]

    @property
    def share(self) -> np.ndarray:
        """The share of its own turns that are right, float32 [B, K].

        NaN where nothing is known: there is no such turn, it was not asked, or the environment
        broke or answered otherwise when the episode was played again.
        """
        share, count = np.full(self.asked.shape, np.nan, np.float32), self.labels.played.sum(axis=1)
        good = right(self.labels).sum(axis=1)
        share[self.asked] = np.where(count, good / np.maximum(count, 1), np.nan)
        return share


# (conversations, updates done) to the teacher's reliability at their turns.
Measure = Callable[[Sequence[Conversation], int], Reliability]


def reliability_labeller(
    take: Callable[..., OwnTurns],
    *,
    rule: Rule | None,
    max_turns: int,
    seed: int,
    samples: int,
    per_label: int,
) -> Measure:
    """The function that measures how reliable the teacher is at the turns of a batch.

    A sample depends on the seed, the update, the row, the turn and its own number; on other turns
    that are asked only by rounding. Those that a rule judges are other samples than those that the
    environment executes.

    Args:
      take: takes the teacher's own turns, `own_turns.played_turns` or `sampled_turns` with their
        arguments up to `rng`.
      rule: labels the turns from the record before them (`Env.rule`). None: the environment has
        labelled them when they were played.
      max_turns: K.
      seed: of the teacher's samples, and of the turns drawn.
      samples: own turns of the teacher at each turn.
      per_label: most turns asked of each label of the student's turns; 0: every turn.
    """

    def measure(conversations: Sequence[Conversation], update: int) -> Reliability:
        labels = env_labels(conversations, max_turns=max_turns)
        asked = draw(labels, per_label=per_label, seed=(seed, update))
        places = [(row, turn) for row, turn in np.argwhere(asked).tolist()]
        positions = Positions()
        rng = sample_key(seed, update, executed=rule is None)
        turns = take(conversations, places, rng=rng, samples=samples, positions=positions)
        if rule:
            own = labels_by_rule(turns, [conversations[row] for row, _ in places], rule=rule)
        else:
            own = own_labels(turns)
        return Reliability(asked, turns, own, _metrics(labels, asked, own, positions))

    return measure


def own_labels(turns: OwnTurns) -> EnvLabels:
    """The environment's labels of the teacher's own turns at N places, [N, samples]."""
    return _labels(turns, lambda _, turn: (bool(turn.failure), turn.oracle))


def labels_by_rule(
    turns: OwnTurns, conversations: Sequence[Conversation], *, rule: Rule
) -> EnvLabels:
    """A rule's labels of the teacher's own turns at N places, [N, samples].

    It sees the record before the turn and the command. A turn without a command has failed.

    Args:
      turns: played or sampled ones.
      conversations: of each place the student's episode.
      rule: the environment's.
    """

    def judged(number: int, turn: Turn) -> tuple[bool, str]:
        task = conversations[number].task
        assert task is not None  # a row that only fills a batch has no turns
        return not turn.action, rule(task, turn.record, turn.action) if turn.action else ""

    return _labels(turns, judged)


def _labels(turns: OwnTurns, said: Callable[[int, Turn], tuple[bool, str]]) -> EnvLabels:
    """Labels of what is said of each turn: whether it failed, and a `Verdict`'s name or ""."""
    shape = len(turns), max(map(len, turns), default=0)
    labels = EnvLabels(np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, NO_LABEL))
    for number, of_place in enumerate(turns):
        for sample, turn in enumerate(of_place):
            if turn is not None:
                failed, label = said(number, turn)
                labels.played[number, sample], labels.failed[number, sample] = True, failed
                labels.oracle[number, sample] = Verdict[label] if label else NO_LABEL
    return labels


def sample_key(seed: int, update: int, *, executed: bool) -> jax.Array:
    """The key of the teacher's samples in an update; the student's episodes have others."""
    which = 2**32 - 2 if executed else 2**32 - 3
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), which), update)


def outcome(labels: EnvLabels) -> np.ndarray:
    """The label of every turn as one code (`OUTCOMES`), int32 [B, K].

    DET_FAIL, the environment's label, or `NO_LABEL` where it accepted the turn without one. It
    means nothing where no turn was played.
    """
    return np.where(labels.failed, Verdict.DET_FAIL, labels.oracle)


def right(labels: EnvLabels) -> np.ndarray:
    """Turns that the environment accepts and does not label WEAK or STRONG, bool [B, K]."""
    return labels.played & np.isin(outcome(labels), (Verdict.SKIP, NO_LABEL))


def draw(labels: EnvLabels, *, per_label: int, seed: Sequence[int]) -> np.ndarray:
    """The turns to ask, bool [B, K]: all that were played, or as many of each label, at random."""
    if not per_label:
        return labels.played
    return np.logical_or.reduce(
        [
            draw_turns(there, most=per_label, seed=(*seed, number))
            for number, there in enumerate(by_outcome(labels).values())
        ]
    )


def by_outcome(labels: EnvLabels) -> dict[str, np.ndarray]:
    """Of each label (`OUTCOMES`) the turns that have it, bool [B, K]."""
    codes = outcome(labels)
    return {name: labels.played & (codes == code) for code, name in OUTCOMES.items()}


def weight_on_reliable(weight: np.ndarray, reliable: np.ndarray, labels: EnvLabels) -> float:
    """The share of a method's weight that lies where the teacher is right.

        Σ_label W · (Σ_turn w · r / Σ_turn w) / Σ_label W

    W is the label's weight on all its turns, w and r are weight and reliability of those that were
    asked. So turns may be drawn label by label, as many of each. A label without an answer is left
    out.

    Args:
      weight: float [B, K], the sum over a turn's tokens. NaN where it is not known: then W is its
        mean over the label's other turns, times all of them.
      reliable: float [B, K], `Reliability.share`.
      labels: the environment's, of the same turns.

    Returns:
      0..1; nan if there is no weight.
    """
    good = total = 0.0
    for there in by_outcome(labels).values():
        given = there & np.isfinite(weight)
        asked = given & np.isfinite(reliable)
        if (known := weight[asked].sum()) > 0:
            of_label = weight[given].sum() * (there.sum() / given.sum())
            good += of_label * (weight[asked] * reliable[asked]).sum() / known
            total += of_label
    return float(good / total) if total else math.nan


def _metrics(
    labels: EnvLabels, asked: np.ndarray, own: EnvLabels, positions: Positions
) -> dict[str, Any]:
    """What became of the teacher's turns, as (sum, count), and its tokens for a turn asked.

    Of all turns, and of those of each label of the student's (`right_skip`).
    """
    good, failed = right(own), own.failed & own.played
    metrics: dict[str, Any] = {}
    for name, there in {"": labels.played, **by_outcome(labels)}.items():
        end, of = f"_{name.lower()}" if name else "", there[asked]
        if there.any():
            tries = own.played[of].sum()
            metrics |= {
                f"reliability/asked{end}": (of.sum(), there.sum()),
                f"reliability/right{end}": (good[of].sum(), tries),
                f"reliability/failed{end}": (failed[of].sum(), tries),
            }
    for what, name in (("reading", "read"), ("sampling", "sampled")):
        metrics[f"reliability/{name}"] = (positions.tokens(what), asked.sum())
    return metrics
