"""How good the teacher's advice is at a turn: its own turn there, executed and labelled.

A student's episode is played again up to a turn (a replay). There the teacher goes on in its place,
on exactly the tokens that the student had before it. So an environment needs nothing but `reset`
and equal answers to equal responses. Where it answers otherwise, the turn says nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import beginning, rollout, row_keys
from opd_jax.envs.base import BROKEN, Env
from opd_jax.judge.agreement import draw_turns
from opd_jax.judge.labels import NO_LABEL, EnvLabels, env_labels
from opd_jax.losses import Verdict
from opd_jax.model import Params
from opd_jax.runtime import processes

# Where the teacher takes a turn: (row of a conversation, turn). The turns before it are replayed.
Place = tuple[int, int]
# (conversations, updates done) to the reliability of their turns, [B, K], and metrics.
Reliability = Callable[[Sequence[Conversation], int], tuple[np.ndarray, Mapping[str, Any]]]

# What the student's turn was: names of labels in metrics and tables.
OUTCOMES = {int(verdict): verdict.name for verdict in Verdict} | {NO_LABEL: "ACCEPTED"}


def reliability_labeller(
    params: Params,
    *,
    agent: Agent,
    envs: Sequence[Env | None],
    max_turns: int,
    seed: int,
    samples: int,
    per_label: int,
    between: Callable[[], None] | None = None,
) -> Reliability:
    """The function that measures how reliable the teacher is at the turns of a batch.

    It gives float32 [B, K]: the share of the teacher's own turns there that the environment accepts
    and does not label WEAK or STRONG. NaN where nothing is known: there is no such turn, it was not
    asked, or the environment broke or answered otherwise when the episode was played again.

    A sample depends on the seed, the update, the row, the turn and its own number; on other turns
    that are asked only by rounding.

    Args:
      params: the teacher's.
      agent: the teacher as it plays, with the chat format of the student's tokens.
      envs: one environment a row of the rollout (`rollout`); the caller closes them.
      max_turns: K.
      seed: of the teacher's samples, and of the turns drawn.
      samples: own turns of the teacher at each turn.
      per_label: most turns asked of each label of the student's turns; 0: every turn.
      between: see `rollout`.
    """

    def measure(
        conversations: Sequence[Conversation], update: int
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        labels = env_labels(conversations, max_turns=max_turns)
        asked = draw(labels, per_label=per_label, seed=(seed, update))
        places = [(row, turn) for row, turn in np.argwhere(asked).tolist()]
        positions = Positions()
        own = own_turns(
            params,
            conversations,
            places,
            agent=agent,
            envs=envs,
            rng=sample_key(seed, update),
            samples=samples,
            between=between,
            positions=positions,
        )
        reliable = np.full(asked.shape, np.nan, np.float32)
        count = own.played.sum(axis=1)
        reliable[asked] = np.where(count, right(own).sum(axis=1) / np.maximum(count, 1), np.nan)
        return reliable, _metrics(labels, asked, own, positions)

    return measure


def own_turns(
    params: Params,
    conversations: Sequence[Conversation],
    places: Sequence[Place],
    *,
    agent: Agent,
    envs: Sequence[Env | None],
    rng: jax.Array,
    samples: int,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
) -> EnvLabels:
    """The environment's labels of the teacher's own turns at N places, [N, samples].

    `played` is false where the environment broke, or did not repeat the student's history. For the
    other arguments see `play_on` and `reliability_labeller`.
    """
    # Early turns first: each row of the rollout begins with another episode, and goes on with it.
    order = sorted(range(len(places)), key=lambda number: places[number][1])
    drawn = [(number, sample) for number in order for sample in range(samples)]
    there, rows = [places[number] for number, _ in drawn], len(conversations)
    numbers = [sample * rows + row for (_, sample), (row, _) in zip(drawn, there, strict=True)]
    played = play_on(
        params,
        conversations,
        there,
        agent=agent,
        envs=envs,
        keys=row_keys(rng, numbers),
        turns=1,
        between=between,
        positions=positions,
    )
    longest = max((turn + 1 for _, turn in places), default=1)
    shape = len(places), samples
    labels = EnvLabels(np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.int32))
    found = env_labels(played, max_turns=longest)
    for into, of_turn in zip(labels, found, strict=True):
        for row, (at, (_, turn)) in enumerate(zip(drawn, there, strict=True)):
            into[at] = of_turn[row, turn]
    return labels


def play_on(
    params: Params,
    conversations: Sequence[Conversation],
    places: Sequence[Place],
    *,
    agent: Agent,
    envs: Sequence[Env | None],
    keys: jax.Array,
    turns: int,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
) -> list[Conversation]:
    """Episodes that begin with the first turns of the student's, and in which the teacher goes on.

    Args:
      params: the teacher's.
      conversations: the student's episodes, each with the `split` and `index` of its task.
      places: where the teacher goes on, any number of them.
      agent: the teacher as it plays, with the chat format of the student's tokens.
      envs, between, positions: see `rollout`.
      keys: PRNG keys, one for each place.
      turns: most turns of the teacher; 0: to the end of the episode.

    Returns:
      An episode for each place, in order. It is `broken`, with a warning, where the environment
      gave other answers, so that its history is not the student's.
    """
    of = [conversations[row] for row, _ in places]
    played = rollout(
        params,
        keys,
        agent=agent,
        envs=envs,
        tasks=[(c.split, c.index) for c in of],
        depth=[turns and turn + turns for _, turn in places],
        replay=[beginning(c, turns=turn) for c, (_, turn) in zip(of, places, strict=True)],
        keep=True,
        between=between,
        positions=positions,
    )
    for now, c, (_, turn) in zip(played, of, places, strict=True):
        start = c.spans[turn][0]
        if not now.broken and now.tokens[:start] != c.tokens[:start]:
            now.end = BROKEN
            processes.warn(
                "`env`: %s/%d answered otherwise when an episode was played again, so it cannot be "
                "told how the teacher goes on there",
                *(c.split, c.index),
            )
    return played


def sample_key(seed: int, update: int) -> jax.Array:
    """The key of the teacher's samples in an update; the student's episodes have others."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2**32 - 2), update)


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
      weight: float [B, K], the sum over a turn's tokens.
      reliable: float [B, K], of `Reliability`.
      labels: the environment's, of the same turns.

    Returns:
      0..1; nan if there is no weight.
    """
    good = total = 0.0
    for there in by_outcome(labels).values():
        asked = there & np.isfinite(reliable)
        if (known := weight[asked].sum()) > 0:
            of_label = weight[there].sum()
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
