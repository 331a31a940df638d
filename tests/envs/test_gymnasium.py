"""The adapter of Gymnasium's interface, on environments that need no package."""

import random

import pytest
from test_check import found

from opd_jax.envs.base import Observation
from opd_jax.envs.check import BREAKS
from opd_jax.envs.gymnasium import LAST_SEED, NO_COMMAND, Gymnasium


class Lights:
    """Gymnasium's interface: as many lights as the seed says are to be switched on, in order."""

    def __init__(self, lights: int = 3, says: str = ""):
        self.lights, self.says = lights, says

    def reset(self, *, seed: int) -> tuple[str, dict]:
        self.order = random.Random(seed).sample(range(self.lights), self.lights)
        self.on = 0
        return f"The order is {self.order}. Seed {seed}.", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        if action == "leave":
            return "You leave.", 0.0, True, False, self._info()
        if action == "sleep":
            return "Time is up.", 0.0, False, True, self._info()
        if action != f"press {self.order[self.on]}":
            return "It stays dark.", -0.25, False, False, self._info()
        self.on += 1
        return "A light.", 1.0, self.on == self.lights, False, self._info()

    def _info(self) -> dict:
        told = {self.says: self.on == self.lights} if self.says else {}
        return {"admissible_commands": [f"press {n}" for n in range(self.lights)], **told}


class OldInterface(Lights):
    def reset(self, *, seed: int) -> str:  # type: ignore[override]
        return super().reset(seed=seed)[0]


MADE = dict(make="test_gymnasium:Lights", max_turns=6, system="Press.", train_tasks=50)
MADE["test_tasks"] = 10


def played(env: Gymnasium, *commands: str) -> list[Observation]:
    first = env.reset("train", 7)
    return [first, *(env.step(f"Thought: so.\nAction: {command}") for command in commands)]


def test_an_episode_is_that_of_the_wrapped_environment() -> None:
    env = Gymnasium(**MADE)
    wrapped = Lights()
    text, _ = wrapped.reset(seed=7)
    presses = [f"press {n}" for n in wrapped.order]
    seen = played(env, "press 9", *presses)
    assert (seen[0].text, seen[0].message) == (text, text)
    assert seen[0].admissible == ("press 0", "press 1", "press 2")
    assert [o.text for o in seen[1:]] == ["It stays dark.", "A light.", "A light.", "A light."]
    assert [o.score for o in seen] == [0.0, -0.25, 0.75, 1.75, 2.75]
    assert [o.end for o in seen] == ["", "", "", "", "success"]
    assert seen[1].action == "press 9"
    assert (env.task.id, env.task.goal) == ("test_gymnasium:Lights/train/7", "Press.")


@pytest.mark.parametrize(
    ("commands", "says", "end"),
    [
        (["leave"], "", "ended"),
        (["sleep"], "", "truncated"),
        (["wait"] * 6, "", "turn_limit"),
        (["leave"], "is_success", "ended"),
    ],
)
def test_an_episode_says_why_it_ended(commands: list[str], says: str, end: str) -> None:
    assert played(Gymnasium(**MADE, says=says), *commands)[-1].end == end


def test_what_the_environment_says_of_success_counts_before_its_reward() -> None:
    class Sold(Lights):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
            return "Sold.", 1.0, True, False, {"won": False}

    env = Gymnasium(**MADE)
    env._env = Sold()
    assert played(env, "sell")[-1].end == "ended"


def test_a_response_without_a_command_is_a_failed_turn_that_changes_nothing() -> None:
    env = Gymnasium(**MADE)
    env.reset("train", 7)
    answer = env.step("press 0")
    assert (answer.text, answer.failure, answer.score) == (NO_COMMAND, "no_action", 0.0)
    assert env._env.on == 0


def test_splits_have_seeds_of_their_own() -> None:
    env = Gymnasium(**MADE)
    assert env.reset("train", 3).text.endswith("Seed 3.")
    assert env.reset("test", 3).text.endswith(f"Seed {LAST_SEED - 3}.")
    assert env.digest("train") != env.digest("test")
    assert env.digest("train") == Gymnasium(**MADE).digest("train")
    assert env.digest("train") != Gymnasium(**MADE, lights=4).digest("train")


def test_it_keeps_the_protocol() -> None:
    options = [f"--{name}={value}" for name, value in MADE.items()]
    table = found("gymnasium", *options, "--splits=train,test", "--lights=4")
    assert BREAKS not in {finding.state for finding in table.values()}, table
    assert table["admissible"].state == table["equal answers"].state == "ok"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"`env\.make` = 'test_gymnasium:Lamps': module"):
        Gymnasium(**MADE | {"make": "test_gymnasium:Lamps"})
    with pytest.raises(ValueError, match=r"`env.make` = .*`env.lamps` is none of its fields"):
        Gymnasium(**MADE, lamps=3)
    with pytest.raises(ValueError, match=r"`reset` gave 'The order.*expected a text and `info`"):
        Gymnasium(**MADE | {"make": "test_gymnasium:OldInterface"}).reset("train", 0)
    with pytest.raises(ValueError, match="expected the split train or test, got 'valid'"):
        Gymnasium(**MADE).size("valid")
