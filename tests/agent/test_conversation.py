"""A conversation grows token by token and turn by turn."""

from typing import Any

import pytest

from opd_jax.agent.conversation import Conversation, Message, Turn, record_turn
from opd_jax.envs.base import Observation
from opd_jax.losses import NO_TURN


def observation(text: str, **fields: Any) -> Observation:
    return Observation(text=text, message=f"{text}\nAct.", admissible=("look",), **fields)


def test_provenance_is_recorded_with_each_token() -> None:
    c = Conversation(None)
    c.append_given([5, 6, 7])
    c.append_response([8, 9], [-0.5, -0.25], 0)
    c.append_given([4])
    c.append_response([3], [-1.0], 1)
    assert c.tokens == [5, 6, 7, 8, 9, 4, 3]
    assert c.turn_id == [NO_TURN, NO_TURN, NO_TURN, 0, 0, NO_TURN, 1]
    assert c.logprobs == [0.0, 0.0, 0.0, -0.5, -0.25, 0.0, -1.0]
    assert c.spans == [(3, 5), (6, 7)]


@pytest.mark.parametrize(
    ("actions", "repeated"),
    [
        ([], 0),
        (["look", "go"], 0),
        (["look", "go", "look"], 1),
        (["look", "look", "look"], 2),
        (["", "", "look"], 0),  # turns without an action repeat nothing
    ],
)
def test_repeated_actions(actions: list[str], repeated: int) -> None:
    turns = [Turn("", (), "", "stop_token", action, "", "", "") for action in actions]
    assert Conversation(None, turns=turns).repeated_actions == repeated


def test_a_turn_joins_what_was_seen_with_what_came_of_it() -> None:
    c = Conversation(None)
    seen, more = {"seen": ("desk 1",)}, {"seen": ("desk 1", "desk 2")}
    before = observation(
        "You see a desk 1.", oracle="STRONG", failure="of the turn before", record=seen
    )
    after = observation(
        "Nothing happens.", action="fly", failure="refused", oracle="WEAK", record=more
    )
    record_turn(c, before, "Action: fly", "turn_budget", after)
    assert c.turns == [
        Turn(
            observation="You see a desk 1.",
            admissible=("look",),
            response="Action: fly",
            stop="turn_budget",
            action="fly",
            # Failure and label belong to the turn that led to `after`.
            failure="refused",
            feedback="Nothing happens.",
            oracle="WEAK",
            record=seen,  # as it was before the turn
        )
    ]


@pytest.mark.parametrize("end", ["success", "turn_limit", "lost", "broken", ""])
def test_an_episode_ends_as_the_environment_says(end: str) -> None:
    c = Conversation(None)
    after = observation("Done.", end=end, score=0.75, measures={"f1": 0.5})
    record_turn(c, observation("You see."), "x", "stop_token", after)
    assert (c.end, c.score, c.measures) == (end, 0.75, {"f1": 0.5})
    assert (c.success, c.broken) == (end == "success", end == "broken")


def test_what_was_said_is_kept_and_an_environment_may_end_without_a_word() -> None:
    c = Conversation(None)
    first, second = observation("You see."), observation("Nothing happens.")
    record_turn(c, first, "x", "stop_token", second)
    last = Observation(text="", message="", admissible=(), end="success")
    record_turn(c, second, "y", "stop_token", last)
    said = [("assistant", "x"), ("user", "Nothing happens.\nAct."), ("assistant", "y")]
    assert c.messages == [Message(*words) for words in said]
