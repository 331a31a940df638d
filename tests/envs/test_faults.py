"""What an environment or a player gets wrong ends its own episode."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.envs.faults import act, begin
from opd_jax.experience.demonstrations import play_out
from opd_jax.runtime.exits import WorldFailed

FINE = Observation("You see a desk.", "You see a desk.", ("look",))


class Says:
    """An environment that answers everything alike."""

    system, waits, task = "", False, Task("desk/1", "look", "Look.", "A desk.")

    def __init__(self, answer: Any):
        self.answer = answer

    def reset(self, split: str, index: int) -> Any:
        return self.answer

    def step(self, response: str) -> Any:
        return self.answer


class Lost:
    """A player that knows nothing to say after its first words."""

    def __init__(self, error: Exception, words: int = 1):
        self.error, self.words = error, words

    def respond(self, observation: Observation) -> str:
        self.words -= 1
        if self.words < 0:
            raise self.error
        return "Action: look"


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        ("You see a desk.", 1.0, True, {}),
        *(replace(FINE, **{name: None}) for name in ("text", "message", "action", "admissible")),
        replace(FINE, admissible="look"),
        replace(FINE, end=True),
        replace(FINE, score=float("nan")),
        replace(FINE, measures={"f1": None}),
        replace(FINE, oracle="skip"),
    ],
)
def test_what_is_no_observation_breaks_its_episode(
    wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    begun = begin(Says(wrong), "train", 0)
    assert begun.observation.end == BROKEN
    assert "expected" in begun.refused  # a mistake, if all tasks have it
    assert act(Says(wrong), "Action: look").end == BROKEN
    assert "broke in `step` of desk/1: ValueError: " in caplog.messages[-1]


def test_a_task_or_a_system_message_without_text_is_refused() -> None:
    for name, value in (
        ("task", None),
        ("task", Task("desk/2", "look", "Look.", 3)),
        ("system", 0),
    ):
        env = Says(FINE)
        setattr(env, name, value)
        begun = begin(env, "train", 0)
        assert begun.observation.end == BROKEN
        assert "expected texts, got the task" in begun.refused


def test_what_is_an_observation_stays_as_it_is() -> None:
    for right in (
        FINE,
        replace(FINE, end="success", score=1, measures={"f1": np.float32(0.5)}, oracle="WEAK"),
        replace(FINE, admissible=["look"], score=True),
    ):
        assert begin(Says(right), "train", 0).observation is right
        assert act(Says(right), "Action: look") is right


def test_a_player_that_raises_breaks_its_episode() -> None:
    def play(player: Any) -> Any:
        return play_out(Says(FINE), "train", 0, player=player, rng=random.Random(0))

    def refuses(task: Task, first: Observation, rng: random.Random) -> Lost:
        raise ValueError("an introduction in other words")

    assert (play(refuses).end, len(play(refuses).turns)) == (BROKEN, 1)
    played = play(lambda *_: Lost(KeyError("desk")))
    assert [turn.response for turn in played.turns] == ["Action: look", ""]
    assert played.broken
    assert "broke in `the player`: KeyError: 'desk'" in played.turns[-1].feedback
    with pytest.raises(WorldFailed):
        play(lambda *_: Lost(WorldFailed("Java is gone")))
