"""The teacher's own turns at the histories of a student's: played in the environment, or sampled.

To play one, the student's episode is played again up to that turn (a replay). There the teacher
goes on in the student's place, on exactly the tokens that the student had before it. So an
environment needs nothing but `reset` and equal answers to equal responses. Where it answers
otherwise, nothing is known of the turn.

To sample one takes the same tokens and no environment. Nobody knows then what would come of it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.agent.positions import Positions
from opd_jax.agent.respond import respond
from opd_jax.agent.rollout import beginning, rollout, row_keys
from opd_jax.envs.base import BROKEN, Env, Parse
from opd_jax.model import Params
from opd_jax.runtime import processes

# Where the teacher takes a turn: (row of a conversation, turn).
Place = tuple[int, int]
# [N][samples], own turns at N places; None where nothing is known.
OwnTurns = list[list[Turn | None]]


def played_turns(
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
) -> OwnTurns:
    """The teacher's own turns at N places, with what the environment said of them.

    None where the environment broke, or did not repeat the student's history.

    Args:
      params: the teacher's.
      conversations: the student's episodes, each with the `split` and `index` of its task.
      places: where the teacher takes a turn. The turns before it are replayed.
      agent: the teacher as it plays, with the chat format of the student's tokens.
      envs: one environment a row of the rollout (`rollout`); the caller closes them.
      rng: of the samples.
      samples: at each place.
      between, positions: see `rollout`.
    """
    # Early turns first: each row of the rollout begins with another episode, and goes on with it.
    order = sorted(range(len(places)), key=lambda number: places[number][1])
    drawn = [(number, sample) for number in order for sample in range(samples)]
    there = [places[number] for number, _ in drawn]
    played = play_on(
        params,
        conversations,
        there,
        agent=agent,
        envs=envs,
        keys=_keys(rng, there, drawn, rows=len(conversations)),
        turns=1,
        between=between,
        positions=positions,
    )
    own: OwnTurns = [[None] * samples for _ in places]
    for (number, sample), (_, turn), c in zip(drawn, there, played, strict=True):
        if not c.broken:
            own[number][sample] = c.turns[turn]
    return own


def sampled_turns(
    params: Params,
    conversations: Sequence[Conversation],
    places: Sequence[Place],
    *,
    agent: Agent,
    parse: Parse,
    rows: int,
    rng: jax.Array,
    samples: int,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
) -> OwnTurns:
    """The teacher's own turns at N places, which nobody carries out.

    They are the student's turns with another response. What only the environment knows is empty:
    what it answers, and whether it rejects the command.

    Args:
      parse: finds the command in a response (`Env.parse`).
      rows: the batch of every compiled program.
      params, conversations, places, agent, rng, samples: see `played_turns`.
      between, positions: see `respond`.
    """
    # An episode's turns in order: each context begins with the one before.
    order = sorted(range(len(places)), key=places.__getitem__)
    drawn = [(number, sample) for number in order for sample in range(samples)]
    there = [places[number] for number, _ in drawn]
    responses = respond(
        params,
        [agent.context(conversations[row], turn) for row, turn in there],
        _keys(rng, there, drawn, rows=len(conversations)),
        agent=agent,
        turns=[turn for _, turn in there],
        rows=rows,
        between=between,
        positions=positions,
    )
    own: OwnTurns = [[None] * samples for _ in places]
    for (number, sample), (row, turn), response in zip(drawn, there, responses, strict=True):
        text = agent.text(response.tokens)
        action, failure = parse(text)
        own[number][sample] = dataclasses.replace(
            conversations[row].turns[turn],
            response=text,
            stop=response.stop,
            action=action,
            failure=failure,
            feedback="",
            oracle="",
        )
    return own


def _keys(
    rng: jax.Array, there: Sequence[Place], drawn: Sequence[tuple[int, int]], *, rows: int
) -> jax.Array:
    """Keys that depend on row and sample; the turn is folded in where a token is sampled."""
    numbers = [sample * rows + row for (row, _), (_, sample) in zip(there, drawn, strict=True)]
    return row_keys(rng, numbers)


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
