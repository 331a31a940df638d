"""Other responses at a turn of an episode, with the environment's labels.

One question to a judge says much and its answer is one word. So after the answer a judge example
goes on: it proposes other responses at the same turn, and each has an answer.
"""

import random
from collections.abc import Sequence
from typing import Protocol

from opd_jax.agent.conversation import Conversation
from opd_jax.envs.base import Env, Labels, MakePlayer


class LabellingEnv(Env, Labels, Protocol):
    """An environment that labels responses without acting on them."""


def proposals(
    env: LabellingEnv,
    conversation: Conversation,
    index: int,
    *,
    players: Sequence[MakePlayer],
    count: int,
    rng: random.Random,
) -> list[tuple[str, str]]:
    """What players would say at turn `index` of an episode, and the label that it would have.

    The episode is played again up to the turn, while the players read along. Labels take turns, as
    far as there are responses with each. A response that would fail has no label, so it is left
    out, and so is what the episode itself says there.

    Returns:
      At most `count` pairs of response and label.
    """
    observation = env.reset(conversation.split, conversation.index)
    reading = [make(env.task, observation, rng) for make in players]
    said = [player.respond(observation) for player in reading]
    for turn in conversation.turns[:index]:
        observation = env.step(turn.response)
        said = [player.respond(observation) for player in reading]
    by_label: dict[str, list[str]] = {}
    for response in sorted({*said} - {conversation.turns[index].response}):
        by_label.setdefault(env.label(response), []).append(response)
    by_label.pop("", None)
    found: list[tuple[str, str]] = []
    while by_label and len(found) < count:
        for label in rng.sample(sorted(by_label), len(by_label)):
            of_label = by_label[label]
            found.append((of_label.pop(int(rng.random() * len(of_label))), label))
            if not of_label:
                del by_label[label]
    return found[:count]
