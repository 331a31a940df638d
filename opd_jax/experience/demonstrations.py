"""Episodes played by a player instead of a model: data for off-policy fine-tuning, and baselines.

A player reads observations and answers in text. Its responses become the sampled tokens of a
`Conversation`, so all later code treats demonstrations and rollouts alike.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation, open_conversation, opening, record_turn
from opd_jax.envs.base import Env, MakePlayer, Observation
from opd_jax.envs.faults import act, begin, breaks
from opd_jax.losses import NO_TURN
from opd_jax.runtime.exits import WorldFailed


class Step(NamedTuple):
    """One turn: the response, whether a distractor gave it, the observations around it."""

    before: Observation
    response: str
    strayed: bool
    after: Observation


def play(
    env: Env,
    first: Observation,
    *,
    player: MakePlayer,
    distractor: MakePlayer | None,
    distraction: float,
    head_start: int = 0,
    rng: random.Random,
    stopping: Callable[[], object] | None = None,
) -> Iterator[Step]:
    """The turns of one episode after its `first` observation; none if the environment broke there.

    With probability `distraction` the distractor, if there is one, plays a turn (it strays), and
    the player goes on from there. The first `head_start` turns are all the distractor's. Both see
    every observation. `rng` is all their randomness. Once `stopping` is true, no turn is played any
    more. A player that raises breaks its own episode.
    """
    if first.done:
        return
    observation = first
    try:
        plays = player(env.task, first, rng)
        strays = distractor(env.task, first, rng) if distractor else None
        played = 0
        while not observation.done and not (stopping and stopping()):
            response, strayed = plays.respond(observation), False
            if strays is not None:
                other = strays.respond(observation)
                strayed = played < head_start or rng.random() < distraction
                response = other if strayed else response
            before, observation = observation, act(env, response)
            played += 1
            yield Step(before, response, strayed, observation)
    except WorldFailed:
        raise
    except Exception as error:  # the player's: `act` raises none
        yield Step(observation, "", False, breaks("the player", env.task, error))


def demonstrate(
    env: Env,
    split: str,
    index: int,
    *,
    player: MakePlayer,
    distractor: MakePlayer | None,
    distraction: float,
    head_start: int = 0,
    rng: random.Random,
    chat: ChatFormat,
    context_tokens: int,
    stopping: Callable[[], object] | None = None,
) -> Conversation:
    """One episode of a task as a conversation; see `play` for the players.

    Strayed turns stay in the history but belong to no turn of the student (`NO_TURN`), so they
    carry no loss: the model learns to recover without learning to stray. The conversation ends
    before a turn that would exceed `context_tokens`; it is `unfit` if that is the first.
    """
    begun = begin(env, split, index)
    conversation = open_conversation(begun, split, index, chat=chat, context_tokens=context_tokens)
    if conversation.end:
        return conversation
    for step in play(
        env,
        begun.observation,
        player=player,
        distractor=distractor,
        distraction=distraction,
        head_start=head_start,
        rng=rng,
        stopping=stopping,
    ):
        tokens = [*chat.response(step.response), chat.stop_ids[0]]
        if len(conversation.tokens) + len(tokens) > context_tokens:
            conversation.end = "context"
            break
        turn = NO_TURN if step.strayed else len(conversation.turns)
        conversation.append_response(tokens, [0.0] * len(tokens), turn)
        record_turn(conversation, step.before, step.response, "stop_token", step.after)
        if step.after.done:
            break
        follow = chat.follow(step.after.message, ended=True)
        if len(conversation.tokens) + len(follow) >= context_tokens:
            conversation.end = "context"
            break
        conversation.append_given(follow)
    return conversation


def play_out(
    env: Env,
    split: str,
    index: int,
    *,
    player: MakePlayer,
    rng: random.Random,
    stopping: Callable[[], object] | None = None,
) -> Conversation:
    """One episode without tokens, for the figures of a player."""
    begun = begin(env, split, index)
    conversation = opening(begun, split, index)
    first = begun.observation
    for step in play(
        env, first, player=player, distractor=None, distraction=0.0, rng=rng, stopping=stopping
    ):
        record_turn(conversation, step.before, step.response, "stop_token", step.after)
    return conversation
