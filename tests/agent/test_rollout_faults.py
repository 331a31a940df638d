"""Environments that are killed, hang or never come up in the middle of a rollout.

The workers serve the real household; what is done to their processes is done from outside.
"""

import dataclasses
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import TINY
from objectives import SAGE

from opd_jax import model
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation, Trajectory, check, pack
from opd_jax.agent.generate import Sampling
from opd_jax.agent.rollout import Agent, rollout, row_keys
from opd_jax.envs.base import BROKEN, Env, Observation, Task
from opd_jax.envs.household import tokenizer as household_tokenizer
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.workers import DIED, TIMEOUT, Worker
from opd_jax.experience.demonstrations import demonstrate, play_out
from opd_jax.experience.source import episode_metrics, judge_metrics
from opd_jax.judge.prompt import PHRASES, Judge
from opd_jax.judge.verdicts import judge
from opd_jax.learner.batch import make_batch
from opd_jax.learner.train_state import init_state
from opd_jax.learner.train_step import make_train_step
from opd_jax.losses import NO_TURN, Verdict

MAX_TURNS = 4
HOUSEHOLD = partial(Household, size="small", max_turns=MAX_TURNS, show_admissible=2)
NEVER = partial(os._exit, 3)  # a process that ends where the environment should begin
KILL, HANG = signal.SIGKILL, signal.SIGSTOP
PLACES = {"reset": 0, "first step": 1, "second step": 2}


class Sabotaged(Worker):
    """A worker whose process gets a signal just before one of an episode's calls.

    Args:
      make: of the environment.
      signals: which signal at which call: 0 for `reset`, n for the n-th `step`.
    """

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


# A row's factory and signals. The processes are up before the first reset.
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
    tokenizer = household_tokenizer.build(phrases=PHRASES)
    return Agent(
        model=dataclasses.replace(
            TINY,
            vocab_size=len(tokenizer),
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            d_ff=16,
            rope_theta=1e3,
            max_positions=1024,
        ),
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(tokenizer),
        sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0),
        turn_tokens=12,
        context_tokens=256,
        cache_step=256,
        extend_widths=(32,),
        chunk=12,
        history_turns=0,
    )


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
    """A rollout with faults and one of the same workers after it, without."""
    first = play(agent, params, workers)
    counts = [(dict(worker.breaks), worker.restarts) for worker in workers]
    # Of a process that never comes up the reset is tried again, in another one.
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


# --- The record


def test_the_batch_completes_and_only_what_broke_is_broken(played: list[Conversation]) -> None:
    assert [row for row, c in enumerate(played) if c.broken] == BROKEN_ROWS
    assert all(c.end == BROKEN and not c.success for c in (played[r] for r in BROKEN_ROWS))
    assert all(c.end in ("turn_limit", "success") for c in (played[r] for r in SOUND_ROWS))


def test_the_others_episodes_are_those_without_faults(
    played: list[Conversation], clean: list[Conversation]
) -> None:
    for row in SOUND_ROWS:
        assert played[row] == clean[row]


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


def test_an_episode_that_never_began_is_recorded_without_a_token(
    played: list[Conversation],
) -> None:
    never = played[4]
    assert never == Conversation(Task(id="train/4", type="", goal="", scene=""), end=BROKEN)


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


# --- No loss

GRADIENT_KEEPER = optax.chain(optax.trace(decay=0.0), optax.scale(-1.0))


def packed(conversations: list[Conversation]) -> Trajectory:
    return pack(conversations, max_turns=MAX_TURNS, length_multiple=64)


@pytest.mark.parametrize("scope", ["batch", "trajectory"])
def test_broken_rows_carry_no_loss(
    agent: Agent,
    params: model.Params,
    played: list[Conversation],
    scope: str,
    random_params: Callable,
) -> None:
    trajectory = packed(played)
    check(trajectory, vocab_size=agent.model.vocab_size)
    assert (trajectory.turn_id[BROKEN_ROWS] == NO_TURN).all()
    assert not trajectory.sampled_logprobs[BROKEN_ROWS].any()
    assert not trajectory.failed[BROKEN_ROWS].any()
    assert trajectory.lengths.tolist() == [len(c.tokens) for c in played]  # what was played stays
    without = [Conversation(None) if c.broken else c for c in played]
    # The width of the batch is that of the longest sound episode in both.
    assert max(len(c.tokens) for c in without) == max(len(c.tokens) for c in played)

    step = make_train_step(
        student=agent.model,
        teacher=agent.model,
        objective=dataclasses.replace(SAGE, scope=scope),
        optimizer=GRADIENT_KEEPER,
        placement=None,
        micro_batches=1,
        batch_rows=None,
        dtype=jnp.dtype("float32"),
        query_chunk=64,
        loss_chunk=64,
        remat="none",
    )
    verdict = np.full(trajectory.failed.shape, Verdict.STRONG, np.int32)  # even if all were judged

    def update(trajectory: Trajectory) -> tuple[Any, Any]:
        state = init_state(params, GRADIENT_KEEPER, seed=0)
        batch = make_batch(trajectory, verdict, response_multiple=16)
        state, metrics = step(state, random_params(agent.model, seed=5), batch)
        return jax.device_get(state.opt_state[0].trace), jax.device_get(metrics)

    gradient, metrics = update(trajectory)
    expected, reference = update(packed(without))
    student = sum(turn != NO_TURN for row in SOUND_ROWS for turn in played[row].turn_id)
    assert metrics["sums"].tokens == reference["sums"].tokens == student
    assert metrics["loss"] == reference["loss"] > 0
    assert metrics["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)

    nothing, zero = update(packed([c if c.broken else Conversation(None) for c in played]))
    assert zero["loss"] == zero["grad_norm"] == zero["sums"].tokens == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(nothing))


# --- No verdict, no figure


@pytest.fixture(scope="module")
def asker(agent: Agent) -> Judge:
    return Judge(
        model=agent.model,
        tokenizer=agent.tokenizer,
        chat=agent.chat,
        context="table9",
        admissible_shown=2,
        batch=4,
        length_multiple=256,
        max_new_tokens=2,
    )


def test_the_judge_is_not_asked_about_broken_episodes(
    params: model.Params, played: list[Conversation], asker: Judge
) -> None:
    ask = partial(judge, params, by=asker, max_turns=MAX_TURNS, decode="constrained")
    judgement = ask(played)
    assert not judgement.asked[BROKEN_ROWS].any()
    assert (judgement.verdict[BROKEN_ROWS] == Verdict.SKIP).all()
    sound = [played[row] for row in SOUND_ROWS]
    np.testing.assert_array_equal(judgement.verdict[SOUND_ROWS], ask(sound).verdict)
    # Shares are of the turns that count, not of those that nobody was asked about.
    got, expected = judge_metrics(judgement, played), judge_metrics(ask(sound), sound)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_figures_count_broken_episodes_and_leave_them_out(played: list[Conversation]) -> None:
    sound = [played[row] for row in SOUND_ROWS]
    got, expected = episode_metrics(played, packed(played)), episode_metrics(sound, packed(sound))
    assert got["end/broken"] == (len(BROKEN_ROWS), len(ROWS))
    assert sum(part for name, (part, _) in got.items() if name.startswith("end/")) == len(ROWS)
    for name, value in expected.items():
        if not name.startswith(("end/", "tokens/sequence")):
            assert got[name] == value, name
        if name.startswith("end/"):
            assert got[name] == (value[0], len(ROWS)), name


# --- Players

PLAYER = dict(
    player=lambda task, first, rng: Expert(task, first, rng=rng),
    distractor=None,
    distraction=0.0,
)


def test_a_players_episode_breaks_alone_too(agent: Agent) -> None:
    tokens = dict(tokenizer=agent.tokenizer, chat=agent.chat, context_tokens=agent.context_tokens)
    for signals, turns in (({}, None), ({2: KILL}, 2)):
        worker = Sabotaged(HOUSEHOLD, signals)
        rng = random.Random(0)
        got = demonstrate(worker, "train", 0, rng=rng, **PLAYER, **tokens)
        whole = demonstrate(HOUSEHOLD(), "train", 0, rng=random.Random(0), **PLAYER, **tokens)
        assert got.broken == bool(signals)
        assert (len(got.turns) == turns) if signals else (got == whole)
        assert got.tokens == whole.tokens[: len(got.tokens)]
        got = play_out(worker, "train", 0, player=PLAYER["player"], rng=random.Random(0))
        assert got.broken == bool(signals)
        worker.close()


def test_a_player_does_not_begin_what_is_broken(agent: Agent) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("there is nothing to play")

    tokens = dict(tokenizer=agent.tokenizer, chat=agent.chat, context_tokens=agent.context_tokens)
    worker = Sabotaged(NEVER, {})
    expected = Conversation(Task(id="train/0", type="", goal="", scene=""), end=BROKEN)
    rng = random.Random(0)
    assert demonstrate(worker, "train", 0, rng=rng, **PLAYER | {"player": never}, **tokens) == (
        expected
    )
    assert play_out(worker, "train", 0, player=never, rng=rng) == expected
