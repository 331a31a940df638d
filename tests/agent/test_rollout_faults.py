"""Environments that are killed, hang or never start in the middle of a rollout.

The workers serve the real household. Faults are done to their processes from outside.
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from faulty import Faulty
from small_agent import household_agent

from opd_jax import model
from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation, check_some_played
from opd_jax.agent.environments import close, everywhere
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.envs.base import BROKEN, Env, Observation, Task
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.workers import DIED, TIMEOUT, Worker
from opd_jax.experience.demonstrations import demonstrate, play_out
from opd_jax.losses import NO_TURN
from opd_jax.runtime.exits import Stopped, WorldFailed
from opd_jax.runtime.stop import Stop

MAX_TURNS = 4
# Workers import this in a process without JAX.
HOUSEHOLD = partial(Household, size="small", max_turns=MAX_TURNS, show_admissible=2)
NEVER = partial(os._exit, 3)  # a process that ends where the environment should begin
KILL, HANG = signal.SIGKILL, signal.SIGSTOP
PLACES = {"reset": 0, "first step": 1, "second step": 2}


class Sabotaged(Worker):
    """A worker whose process gets a signal just before a call: 0 is `reset`, n the n-th `step`."""

    def __init__(self, make: Callable[[], Env], signals: dict[int, signal.Signals]):
        super().__init__(make, start_timeout_s=60.0, step_timeout_s=5.0)
        self.signals = signals
        self._calls = 0

    def reset(self, split: str, index: int) -> Observation:
        self._calls = 0
        self._strike()
        return super().reset(split, index)

    def step(self, response: str) -> Observation:
        self._calls += 1
        self._strike()
        return super().step(response)

    def _strike(self) -> None:
        if sent := self.signals.get(self._calls):
            os.kill(self.pid, sent)


# Each row's environment and signals. The processes have started before the first reset.
ROWS: list[tuple[Callable[[], Env], dict[int, signal.Signals]]] = [
    (HOUSEHOLD, {}),
    (HOUSEHOLD, {PLACES["second step"]: KILL}),
    (HOUSEHOLD, {PLACES["first step"]: HANG}),
    (HOUSEHOLD, {PLACES["reset"]: KILL}),  # a second process can do what the first could not
    (NEVER, {}),
    (HOUSEHOLD, {}),
]
TASKS = [("train", n) for n in range(len(ROWS))]
BROKEN_ROWS, SOUND_ROWS = [1, 2, 4], [0, 3, 5]


pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def agent() -> Agent:
    return household_agent()


@pytest.fixture(scope="module")
def params(agent: Agent, random_params: Callable) -> model.Params:
    return jax.tree.map(jnp.asarray, random_params(agent.model, seed=4))


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Sabotaged]]:
    made = [Sabotaged(factory, signals) for factory, signals in ROWS]
    for worker, (factory, _) in zip(made, ROWS, strict=True):
        if factory is HOUSEHOLD:
            assert worker.size("train") == HOUSEHOLD().size("train")
    yield made
    for worker in made:
        worker.close()


def play(agent: Agent, params: model.Params, envs: list[Any]) -> list[Conversation]:
    keys = row_keys(jax.random.key(0), range(len(ROWS)))
    return rollout(params, keys, agent=agent, envs=envs, tasks=TASKS, depth=0)


@pytest.fixture(scope="module")
def clean(agent: Agent, params: model.Params) -> list[Conversation]:
    """The episodes as they are without workers and without faults."""
    return play(agent, params, [HOUSEHOLD() for _ in ROWS])


@pytest.fixture(scope="module")
def twice(
    agent: Agent, params: model.Params, workers: list[Sabotaged]
) -> tuple[list[Conversation], list[Conversation]]:
    """A rollout with faults, and one of the same workers after it without."""
    first = play(agent, params, workers)
    counts = [(dict(worker.breaks), worker.restarts) for worker in workers]
    # A process that never starts is started again once for the reset.
    assert counts == [
        ({}, 0),
        ({DIED: 1}, 0),
        ({TIMEOUT: 1}, 0),
        ({DIED: 1}, 1),
        ({DIED: 2}, 1),
        ({}, 0),
    ]
    for worker in workers:
        worker.signals = {}
    return first, play(agent, params, workers)


@pytest.fixture(scope="module")
def played(twice: tuple[list[Conversation], list[Conversation]]) -> list[Conversation]:
    return twice[0]


# --- The record ---------------------------------------------------------------------------------


def test_only_what_broke_is_broken_and_the_other_episodes_are_those_without_faults(
    played: list[Conversation], clean: list[Conversation]
) -> None:
    assert [row for row, c in enumerate(played) if c.broken] == BROKEN_ROWS
    assert all(c.end == BROKEN and not c.success for c in (played[r] for r in BROKEN_ROWS))
    assert {played[row].end for row in SOUND_ROWS} <= {"turn_limit", "success"}
    for row in SOUND_ROWS:
        assert played[row] == clean[row]
    # A row whose environment never began has no token.
    task = Task(id="train/4", type="", goal="", scene="")
    assert played[4] == Conversation(task, "train", 4, end=BROKEN)


def test_a_broken_episode_is_recorded_up_to_where_it_broke(
    played: list[Conversation], clean: list[Conversation]
) -> None:
    for row, turns, why in ((1, 2, "killed by SIGKILL"), (2, 1, "no answer within 5 s")):
        broken, whole = played[row], clean[row]
        assert len(broken.turns) == turns
        assert broken.task == whole.task
        assert broken.turns[:-1] == whole.turns[: turns - 1]
        assert broken.turns[-1].response == whole.turns[turns - 1].response
        assert why in broken.turns[-1].feedback
        assert (broken.turns[-1].failure, broken.turns[-1].action) == ("", "")
        # What was sampled is there to the last token, and nothing was appended to it.
        length = len(broken.tokens)
        assert broken.tokens == whole.tokens[:length]
        assert broken.turn_id == whole.turn_id[:length]
        assert broken.logprobs == whole.logprobs[:length]
        assert broken.turn_id[-1] == turns - 1
        assert whole.turn_id[length] == NO_TURN


def test_the_next_rollout_has_all_environments_back(
    twice: tuple[list[Conversation], list[Conversation]],
    clean: list[Conversation],
    workers: list[Sabotaged],
) -> None:
    _, again = twice
    assert [c.broken for c in again] == [factory is NEVER for factory, _ in ROWS]
    for row in (0, 1, 2, 3, 5):
        assert again[row] == clean[row]
    assert [worker.restarts for worker in workers] == [0, 1, 1, 1, 3, 0]


# --- Players ------------------------------------------------------------------------------------

PLAYER = dict(
    player=lambda task, first, rng: Expert(task, first, rng=rng),
    distractor=None,
    distraction=0.0,
)


def test_a_players_episode_breaks_alone_too(agent: Agent) -> None:
    tokens = dict(chat=agent.chat, context_tokens=agent.decoding.context_tokens)
    whole = demonstrate(HOUSEHOLD(), "train", 0, rng=random.Random(0), **PLAYER, **tokens)
    for signals, turns in (({}, len(whole.turns)), ({2: KILL}, 2)):
        worker = Sabotaged(HOUSEHOLD, signals)
        got = demonstrate(worker, "train", 0, rng=random.Random(0), **PLAYER, **tokens)
        assert got.broken == bool(signals)
        assert len(got.turns) == turns
        assert got.tokens == whole.tokens[: len(got.tokens)]
        got = play_out(worker, "train", 0, player=PLAYER["player"], rng=random.Random(0))
        assert got.broken == bool(signals)
        worker.close()

    def never(*_: Any) -> Any:
        raise AssertionError("there is nothing to play")

    # A player does not begin what is broken.
    worker, rng = Sabotaged(NEVER, {}), random.Random(0)
    task = Task(id="train/0", type="", goal="", scene="")
    expected = Conversation(task, "train", 0, end=BROKEN)
    got = demonstrate(worker, "train", 0, rng=rng, **PLAYER | {"player": never}, **tokens)
    assert got == play_out(worker, "train", 0, player=never, rng=rng) == expected


# --- What an environment raises

FAULTY = partial(Faulty, malformed=(1, 4), fails=2, max_turns=MAX_TURNS)


@pytest.mark.parametrize("in_workers", [False, True])
def test_what_an_environment_raises_ends_its_own_episode(
    in_workers: bool,
    agent: Agent,
    params: model.Params,
    clean: list[Conversation],
    caplog: pytest.LogCaptureFixture,
) -> None:
    envs: list[Any] = [FAULTY() for _ in ROWS]
    if in_workers:
        envs = [Worker(FAULTY, start_timeout_s=60.0, step_timeout_s=60.0) for _ in ROWS]
    played = play(agent, params, envs)
    close(envs)
    for row in (0, 3, 5):
        assert played[row] == clean[row]
    for row in (1, 4):
        task = Task(id=f"train/{row}", type="", goal="", scene="")
        said = f"row {row} has no answer"
        assert played[row] == Conversation(task, "train", row, end=BROKEN, refused=said)
    assert [played[2].end, len(played[2].turns)] == [BROKEN, 2]
    assert played[2].tokens == clean[2].tokens[: len(played[2].tokens)]
    check_some_played(played)
    check_some_played(played)
    step, *refused = (record.getMessage() for record in caplog.records)
    assert f"broke in `step` of {clean[2].task.id}: KeyError: 'title' (faulty.py, line" in step
    if not in_workers:  # a warning is given once in a process
        assert refused == [
            f"`env`: train/{row} is left out: row {row} has no answer" for row in (1, 4)
        ]
    # A player's episode ends as a model's does.
    env, rng, how = FAULTY(), random.Random(0), dict(player=PLAYER["player"])
    assert play_out(env, "train", 1, rng=rng, **how).refused == "row 1 has no answer"
    assert len(play_out(env, "train", 2, rng=rng, **how).turns) == 2
    assert play_out(env, "train", 2, rng=rng, **how).broken


def test_what_all_tasks_are_refused_for_is_a_mistake() -> None:
    refused = [Conversation(task=None, end=BROKEN, refused="`data`: no such folder")] * 2
    with pytest.raises(ValueError, match=r"^`env`: `data`: no such folder$"):
        check_some_played(refused)
    with pytest.raises(WorldFailed, match="all 3 episodes broke"):
        check_some_played([*refused, Conversation(task=None, end=BROKEN)])


# --- Signals


@pytest.mark.parametrize("waits", [True, False])
def test_a_signal_is_noticed_while_environments_are_waited_for(waits: bool) -> None:
    def signal_and_hang(env: Any, argument: int) -> int:
        if argument == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        elif waits:
            released.wait(timeout=600)
        else:
            raise AssertionError("the second row is asked after the signal")
        return argument

    released = threading.Event()
    envs: list[Any] = [SimpleNamespace(waits=waits) for _ in range(2)]
    try:
        with Stop(), pytest.raises(Stopped):
            everywhere(signal_and_hang, envs, [0, 1])
    finally:
        released.set()
    assert everywhere(lambda env, argument: argument, envs, [0, 1]) == [0, 1]


def test_a_rollout_may_be_left_whenever_answers_are_due(agent: Agent, params: model.Params) -> None:
    class Left(Exception):
        pass

    def play_until(leave: int) -> list[Conversation]:
        def between() -> None:
            asked.append(1)
            if len(asked) == leave:
                raise Left

        asked.clear()
        envs = [HOUSEHOLD() for _ in ROWS]
        keys = row_keys(jax.random.key(0), range(len(ROWS)))
        return rollout(params, keys, agent=agent, envs=envs, tasks=TASKS, depth=0, between=between)

    asked: list[int] = []
    assert play_until(0) == play(agent, params, [HOUSEHOLD() for _ in ROWS])
    times = len(asked)
    assert times > MAX_TURNS  # once for the first observations
    for leave in (1, times):
        with pytest.raises(Left):
            play_until(leave)
