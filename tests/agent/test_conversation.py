"""Conversations, their packing into arrays, and the check of what the compiled world relies on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opd_jax.agent.conversation import Conversation, Trajectory, Turn, check, pack, record_turn
from opd_jax.envs.base import Observation, Task
from opd_jax.losses import NO_TURN

TASK = Task(id="test/0", type="pick", goal="put a mug on the desk", scene="You see a desk 1.")


def observation(text: str, **fields: Any) -> Observation:
    return Observation(text=text, message=f"{text}\nAct.", admissible=("look",), **fields)


def turn(action: str = "look", failure: str = "") -> Turn:
    return Turn("seen", ("look",), f"Action: {action}", "stop_token", action, failure, "ok", "")


def two_turns() -> Conversation:
    """Three given tokens, two sampled, one given, one sampled."""
    c = Conversation(TASK)
    c.append_given([5, 6, 7])
    c.append_response([8, 9], [-0.5, -0.25], 0)
    c.turns.append(turn())
    c.append_given([4])
    c.append_response([3], [-1.0], 1)
    c.turns.append(turn(failure="Nothing happens."))
    c.end, c.score = "success", 1.0
    return c


def one_turn() -> Conversation:
    c = Conversation(TASK)
    c.append_given([1])
    c.append_response([2], [-2.0], 0)
    c.turns.append(turn())
    c.end, c.score = "turn_limit", 0.25
    return c


def packed() -> Trajectory:
    return pack([two_turns(), one_turn()], max_turns=3, length_multiple=4)


# --- Growing a conversation -----------------------------------------------------------------------


def test_provenance_is_recorded_with_each_token() -> None:
    c = two_turns()
    assert c.tokens == [5, 6, 7, 8, 9, 4, 3]
    assert c.turn_id == [NO_TURN, NO_TURN, NO_TURN, 0, 0, NO_TURN, 1]
    assert c.logprobs == [0.0, 0.0, 0.0, -0.5, -0.25, 0.0, -1.0]


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
    assert Conversation(TASK, turns=[turn(a) for a in actions]).repeated_actions == repeated


def test_recorded_turn_joins_what_was_seen_with_what_came_of_it() -> None:
    c = Conversation(TASK)
    before = observation("You see a desk 1.", oracle="STRONG", failure="of the turn before")
    after = observation("Nothing happens.", action="fly", failure="refused", oracle="WEAK")
    record_turn(c, before, "Action: fly", "turn_budget", after)
    (got,) = c.turns
    assert (got.observation, got.admissible) == ("You see a desk 1.", ("look",))
    assert (got.response, got.stop, got.action) == ("Action: fly", "turn_budget", "fly")
    # Failure and label belong to the turn that led to `after`.
    assert (got.failure, got.feedback, got.oracle) == ("refused", "Nothing happens.", "WEAK")
    assert c.end == ""
    assert not c.success


@pytest.mark.parametrize("end", ["success", "turn_limit", "lost", ""])
def test_episode_ends_as_the_environment_says(end: str) -> None:
    c = Conversation(TASK)
    after = observation("Done.", end=end, score=0.75)
    record_turn(c, observation("You see."), "x", "stop_token", after)
    assert (c.end, c.success, c.score) == (end, end == "success", 0.75)


# --- Packing --------------------------------------------------------------------------------------


def test_pack_pads_on_the_right() -> None:
    t = packed()
    # The longest has 7 tokens; the next multiple of 4 is 8.
    np.testing.assert_array_equal(t.tokens, [[5, 6, 7, 8, 9, 4, 3, 0], [1, 2, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        t.turn_id, [[-1, -1, -1, 0, 0, -1, 1, -1], [-1, 0, -1, -1, -1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        t.sampled_logprobs,
        np.float32([[0, 0, 0, -0.5, -0.25, 0, -1, 0], [0, -2, 0, 0, 0, 0, 0, 0]]),
    )
    np.testing.assert_array_equal(t.lengths, [7, 2])
    np.testing.assert_array_equal(t.num_turns, [2, 1])
    np.testing.assert_array_equal(t.failed, [[False, True, False], [False, False, False]])
    np.testing.assert_array_equal(t.success, [True, False])
    np.testing.assert_array_equal(t.score, np.float32([1.0, 0.25]))


def test_pack_has_the_documented_dtypes() -> None:
    got = {name: getattr(packed(), name).dtype.name for name in Trajectory.__dataclass_fields__}
    assert got == {
        "tokens": "int32",
        "turn_id": "int32",
        "sampled_logprobs": "float32",
        "lengths": "int32",
        "num_turns": "int32",
        "failed": "bool",
        "success": "bool",
        "score": "float32",
    }


@pytest.mark.parametrize(("multiple", "width"), [(1, 7), (7, 7), (4, 8), (16, 16)])
def test_pack_rounds_the_longest_up(multiple: int, width: int) -> None:
    conversations = [two_turns(), one_turn()]
    t = pack(conversations, max_turns=2, length_multiple=multiple)
    assert t.tokens.shape == t.turn_id.shape == t.sampled_logprobs.shape == (2, width)


def test_pack_rejects_too_many_turns() -> None:
    with pytest.raises(ValueError, match="`max_turns`: trajectory 1 has 2 turns, expected at most"):
        pack([one_turn(), two_turns()], max_turns=1, length_multiple=4)


# --- Checking -------------------------------------------------------------------------------------


def test_check_accepts_what_pack_makes() -> None:
    check(packed(), vocab_size=10)


def test_check_knows_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"`tokens` of trajectory 0, position 4: expected 0\.\.8"):
        check(packed(), vocab_size=9)  # the largest token is 9


@pytest.mark.parametrize(
    ("name", "row", "column", "value", "message"),
    [
        ("tokens", 1, 1, -1, r"`tokens` of trajectory 1, position 1: expected 0\.\.9"),
        ("turn_id", 0, 4, 3, r"`turn_id` of trajectory 0, position 4: expected -1\.\.2"),
        ("turn_id", 1, 1, -2, r"`turn_id` of trajectory 1, position 1: expected -1\.\.2"),
        ("turn_id", 1, 0, 0, r"`turn_id\[:, 0\]` of trajectory 1.*nothing precedes"),
        ("turn_id", 1, 5, 0, "`turn_id in padding` of trajectory 1, position 5: expected -1"),
        ("sampled_logprobs", 0, 3, 0.5, "`sampled_logprobs` of trajectory 0, position 3"),
        ("sampled_logprobs", 0, 3, np.nan, "`sampled_logprobs` of trajectory 0, position 3"),
        ("sampled_logprobs", 1, 1, -np.inf, "expected finite log-probabilities, at most 0"),
    ],
)
def test_check_names_field_row_and_position(
    name: str, row: int, column: int, value: float, message: str
) -> None:
    t = packed()
    array = getattr(t, name).copy()
    array[row, column] = value
    with pytest.raises(ValueError, match=message):
        check(replace(t, **{name: array}), vocab_size=10)


def test_check_names_the_first_of_several_rows() -> None:
    t = packed()
    tokens = np.full_like(t.tokens, 99)
    tokens[0] = 0
    with pytest.raises(ValueError, match="trajectory 1, position 0"):
        check(replace(t, tokens=tokens), vocab_size=10)
