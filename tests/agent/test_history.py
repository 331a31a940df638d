"""Contexts of the last few turns, by hand; and a response is scored on what it was sampled from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_agent import household, household_agent, with_decoding

from opd_jax import model
from opd_jax.agent import history
from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.learner.batch import pack
from opd_jax.losses import NO_TURN

LEFT_OUT = "_"


def episode(text: str, stops: str) -> Conversation:
    """A character is a token, and capitals are a response. A `>` ends each response.

    `stops` has a character for each: a dot if the `>` was sampled, `!` if the response was cut.
    """
    made = Conversation(task=None)
    responses = [part for part in text.replace(">", " ").split() if part.isupper()]
    for turn, (response, stop) in enumerate(zip(responses, stops, strict=True)):
        start = text.index(response, len(made.tokens))
        made.append_given([ord(c) for c in text[len(made.tokens) : start]])
        written = response + (">" if stop == "." else "")
        made.append_response([ord(c) for c in written], [-float(turn + 1)] * len(written), turn)
        reason = "stop_token" if stop == "." else "turn_budget"
        made.turns.append(Turn("", (), response, reason, "", "", "", ""))
    made.append_given([ord(c) for c in text[len(made.tokens) :]])
    return made


# Four turns, the third cut by its budget. Spaces are tokens too.
TEXT = "task one: AA> two: B> three: CCC> four: D> "
EPISODE = episode(TEXT, "..!.")


def context(turns: int, history_turns: int) -> str:
    tokens = history.context(
        EPISODE, turns=turns, history_turns=history_turns, left_out=[ord(LEFT_OUT)]
    )
    return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("turns", "history_turns", "expected"),
    [
        (0, 1, "task one: "),
        (1, 1, "task one: AA> two: "),
        (2, 1, "task one: _> two: B> three: "),
        (3, 1, "task one: _> three: CCC> four: "),
        (4, 1, "task one: _> four: D> "),  # after a cut response its end was given
        (3, 2, "task one: _> two: B> three: CCC> four: "),
        (4, 2, "task one: _> three: CCC> four: D> "),
        (4, 3, "task one: _> two: B> three: CCC> four: D> "),
        *((2, n, "task one: AA> two: B> three: ") for n in (0, 4, 9)),
        *((4, n, TEXT) for n in (0, 4, 9)),
    ],
)
def test_contexts_by_hand(turns: int, history_turns: int, expected: str) -> None:
    assert context(turns, history_turns) == expected


@pytest.mark.parametrize("history_turns", [1, 2, 3])
def test_every_response_is_scored_once_and_on_its_own_context(history_turns: int) -> None:
    other = episode("go: E> ", ".")
    left_out = [ord(LEFT_OUT)]
    rows, episodes = history.rows([other, EPISODE], history_turns=history_turns, left_out=left_out)
    assert episodes == [0] + [1] * (4 - history_turns)
    assert rows[0].tokens == other.tokens
    seen = []
    for row, number in zip(rows, episodes, strict=True):
        source = (other, EPISODE)[number]
        for turn in sorted(set(row.turn_id) - {NO_TURN}):
            start = row.turn_id.index(turn)
            begin, end = source.spans[turn]
            assert row.tokens[:start] == history.context(
                source, turns=turn, history_turns=history_turns, left_out=left_out
            )
            assert row.tokens[start : start + end - begin] == source.tokens[begin:end]
            assert row.logprobs[start : start + end - begin] == source.logprobs[begin:end]
            seen.append((number, turn))
        assert row.turns is source.turns
    assert seen == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("history_turns", [0, 3, 50])
def test_a_history_that_leaves_nothing_out_is_the_episode(history_turns: int) -> None:
    (row,), _ = history.rows([EPISODE], history_turns=history_turns, left_out=[1])
    assert row is EPISODE


def test_what_others_wrote_is_shown_and_not_scored() -> None:
    made = episode(TEXT, "..!.")
    begin, end = made.spans[1]
    made.turn_id[begin:end] = [NO_TURN] * (end - begin)
    rows, _ = history.rows([made], history_turns=1, left_out=[1])
    assert [sorted(set(row.turn_id)) for row in rows] == [[-1, 0], [-1, 2], [-1, 3]]
    assert ord("B") in rows[1].tokens


# --- A random model in a household --------------------------------------------------------------

MAX_TURNS, TASKS = 5, [("train", 3), ("valid_seen", 5)]


@pytest.fixture(scope="module")
def agent() -> Agent:
    return household_agent(turn_tokens=6, chunk=6)


@pytest.fixture(scope="module")
def params(agent: Agent, random_params: Callable) -> model.Params:
    return jax.tree.map(jnp.asarray, random_params(agent.model, seed=4))


def play(
    agent: Agent, params: model.Params, *, depth: int | list[int] = 0, **decoding: Any
) -> list[Conversation]:
    return rollout(
        params,
        row_keys(jax.random.key(0), range(len(TASKS))),
        agent=with_decoding(agent, **decoding),
        envs=[household(max_turns=MAX_TURNS) for _ in TASKS],
        tasks=TASKS,
        depth=depth,
    )


@pytest.fixture(scope="module")
def full(agent: Agent, params: model.Params) -> list[Conversation]:
    """The episodes with the whole history."""
    return play(agent, params)


@pytest.mark.parametrize("history_turns", [1, 2])
def test_a_response_is_scored_on_what_it_was_sampled_from(
    agent: Agent, params: model.Params, full: list[Conversation], history_turns: int
) -> None:
    played = play(agent, params, history_turns=history_turns)
    # The first turns see the whole history, and do not know of the limit. Later ones differ.
    for one, other in zip(played, full, strict=True):
        end = one.spans[history_turns][1]
        assert one.tokens[:end] == other.tokens[:end]
        assert one.logprobs[:end] == other.logprobs[:end]
    assert played != full

    rows, _ = history.rows(played, history_turns=history_turns, left_out=agent.chat.left_out)
    assert len(rows) == len(TASKS) * (MAX_TURNS - history_turns)
    batch = pack(
        rows,
        np.zeros((len(rows), MAX_TURNS), np.int32),
        length_multiple=64,
        response_multiple=1,
        vocab_size=agent.model.vocab_size,
    )
    hidden = model.forward(params, batch.tokens, config=agent.model, query_chunk=64, remat="none")
    logprobs = jax.nn.log_softmax(hidden @ model.head(params))
    recomputed = jnp.take_along_axis(logprobs[:, :-1], batch.tokens[:, 1:, None], axis=2)[..., 0]
    student = batch.turn_id[:, 1:] != NO_TURN
    assert student.sum() == sum(b - a for c in played for a, b in c.spans)
    np.testing.assert_allclose(
        recomputed[student], batch.sampled_logprobs[:, 1:][student], rtol=0, atol=1e-5
    )


def test_a_short_history_fits_where_the_whole_does_not(
    agent: Agent, params: model.Params, full: list[Conversation]
) -> None:
    room = max(len(c.tokens) for c in full) - 20
    assert {c.end for c in play(agent, params, context_tokens=room)} >= {"context"}
    played = play(agent, params, context_tokens=room, history_turns=1)
    assert {c.end for c in played} == {"turn_limit"}
    assert all(len(c.turns) == MAX_TURNS for c in played)


def test_a_depth_ends_episodes_and_changes_nothing_before(
    agent: Agent, params: model.Params, full: list[Conversation]
) -> None:
    for one, other in zip(play(agent, params, depth=2), full, strict=True):
        assert (one.end, len(one.turns)) == ("depth", 2)
        assert one.tokens == other.tokens[: other.spans[1][1]]
    assert play(agent, params, depth=MAX_TURNS) == full
    each = [number % MAX_TURNS for number in range(len(TASKS))]  # and the first has no limit
    for most, one, other in zip(each, play(agent, params, depth=each), full, strict=True):
        assert len(one.turns) == (most or MAX_TURNS)
        assert one.tokens == other.tokens[: other.spans[most - 1][1] if most else None]
