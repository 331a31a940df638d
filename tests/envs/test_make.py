"""Environments from settings: ours by name, anybody's by `module:Class`, and their players."""

import random
from pathlib import Path

import pytest
from settings import read

from opd_jax.config import build
from opd_jax.envs.base import Observation
from opd_jax.envs.make import ENVS, EnvSettings, invented, keeps_record, make_env
from opd_jax.envs.players import make_player
from opd_jax.envs.react import RESPONSE, TRY, Random
from opd_jax.envs.turns import before_invented_turn
from opd_jax.envs.workers import Worker
from opd_jax.experience.demonstrations import play_out
from opd_jax.experience.tasks import Panel


@pytest.mark.parametrize(
    ("config", "by", "wrong"),
    [
        ("quickstart", "alfworld", "`env.size` is none .*`env.data` is missing"),
        ("alfworld_qwen3", "household", "`env.data` is none .*`env.size` is missing"),
    ],
)
def test_fields_of_another_environment_are_named(config: str, by: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"`env.by` = '{by}' does not fit .*{wrong}"):
        make_env(read(config, f"env.by={by}").env)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match=r"`env.by`: expected one of household, .*'office'"):
        make_env(read("quickstart", "env.by=office").env)
    with pytest.raises(ValueError, match=r"`env.by` = 'os:path': expected a class .* a module"):
        make_env(read("quickstart", "env.by=os:path").env)
    with pytest.raises(ValueError, match=r"`eval.who`.*household.*'nobody'.*expert"):
        make_player("nobody", read("quickstart").env, field="eval.who", habits={})


def test_of_ours_all_but_gymnasiums_keep_a_record() -> None:
    assert [by for by in ENVS if not keeps_record(by)] == ["gymnasium"]


@pytest.mark.parametrize(
    ("by", "said", "reply"),
    [
        ("household", "Thought: so.\nAction: look\n", "Observation: Nothing happens."),
        ("alfworld", "Thought: so.\nAction: look\n", "Observation: You see a desk 1."),
        ("scienceworld", "Thought: so.\nAction: look around\n", "Observation: A door."),
        ("searchqa", "<action>search[x]</action>\n", "Result: <information>\nDoc 1"),
        ("factbookqa", "<action>search[x]</action>", "<information>\nDoc 1"),
    ],
)
def test_an_environment_knows_where_a_response_invents_its_reply(
    by: str, said: str, reply: str
) -> None:
    pattern = invented(by)
    assert pattern is not None
    assert before_invented_turn(said, pattern) == (said, False)
    assert before_invented_turn(said + reply, pattern) == (said, True)
    thinking = f"<think>{reply}\n{reply}"
    assert before_invented_turn(thinking, pattern) == ("", False)  # it may think what it will see
    assert before_invented_turn(f"{thinking}</think>{said}{reply}", pattern) == (said, True)


# --- Somebody else's

CORRIDOR = """
from opd_jax.envs.base import Observation, Task


class Walker:
    def __init__(self, task, first, rng):
        self.goal = task.goal

    def respond(self, observation):
        return f"to {self.goal}"


class Corridor:
    players = {"expert": Walker}
    system = "Walk."
    waits = False

    def __init__(self, *, length, max_turns):
        self.length, self.max_turns = length, max_turns

    def size(self, split):
        return {"train": 5, "test": 2}[split]

    def digest(self, split):
        return f"{split}-{self.length}"

    def reset(self, split, index):
        self.task = Task(f"corridor/{split}/{index}", "walk", "reach the end", "corridor")
        self.place = 0
        return self._see("")

    def step(self, response):
        self.place += 1
        return self._see(response)

    def _see(self, action):
        text = f"You are at {self.place} of {self.length}."
        end = {self.length: "success", self.max_turns: "turn_limit"}.get(self.place, "")
        return Observation(text, text, ("go",), end, float(end == "success"), action)
"""
CONFIG = """
from opd_jax.configs import quickstart


def get_config(arg=None):
    config = quickstart.get_config("runlocal")
    config.env = dict(
        by="corridor:Corridor",
        length=3,
        max_turns=5,
        workers=arg == "workers",
        start_timeout_s=60.0,
        step_timeout_s=10.0,
    )
    config.eval.splits = ("test",)
    return config
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with an environment beside it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "corridor.py").write_text(CORRIDOR)
    (folder / "mine.py").write_text(CONFIG)
    return folder / "mine.py"


def episode(settings: EnvSettings, who: str = "random") -> list[str]:
    """What a player was told in one episode."""
    env = make_env(settings)
    assert isinstance(env, Worker) == settings.workers
    player = make_player(who, settings, field="eval.who", habits={})
    played = play_out(env, "train", 4, player=player, rng=random.Random(0))
    if isinstance(env, Worker):
        env.close()
    assert played.task is not None
    assert played.task.id == "corridor/train/4"
    return [turn.feedback for turn in played.turns] + [played.end]


@pytest.mark.parametrize("where", ["in_process", "workers"])
def test_an_environment_of_ones_own_plays(where: str, mine: Path) -> None:
    settings = read(f"{mine}:{where}")
    assert build.panels(settings) == {"train": Panel(5, "train-3"), "test": Panel(2, "test-3")}
    walked = [f"You are at {place} of 3." for place in (1, 2, 3)]
    assert episode(settings.env) == [*walked, "success"]
    assert episode(read(f"{mine}:{where}", "env.length=9").env)[-1] == "turn_limit"


def test_an_environment_of_ones_own_brings_its_players(mine: Path) -> None:
    settings = read(str(mine), "eval.who=expert,random", "data.source=expert")
    build.check_players(settings)
    player = make_player("expert", settings.env, field="eval.who", habits={})
    env = make_env(settings.env)
    first = env.reset("train", 0)
    assert player(env.task, first, random.Random(0)).respond(first) == "to reach the end"
    assert episode(settings.env, "expert")[-1] == "success"


def test_where_nothing_is_admissible_the_random_player_says_nothing() -> None:
    dead_end, crossing = Observation("wall", "wall", ()), Observation("way", "way", ("go",))
    player = Random(random.Random(0))
    assert [player.respond(seen) for seen in (dead_end, crossing)] == ["", RESPONSE % (TRY, "go")]


def test_mistakes_about_an_environment_of_ones_own_are_named(mine: Path) -> None:
    with pytest.raises(ValueError, match=r"`env.by` = 'corridor:Office': .*`corridor` has no"):
        make_env(read(str(mine), "env.by=corridor:Office").env)
    with pytest.raises(ValueError, match=r"`env.by` = 'coridor:Corridor': there is no module"):
        make_env(read(str(mine), "env.by=coridor:Corridor").env)
    with pytest.raises(ValueError, match=r"`env.size` is none .*`env.length` is missing.* takes"):
        make_env(read("quickstart", "env.by=corridor:Corridor").env)
    with pytest.raises(ValueError, match=r"corridor:Corridor has no player 'nobody'.*, expert"):
        make_player("nobody", read(str(mine)).env, field="eval.who", habits={})
