"""The teacher's own turn at a student's history: executed, labelled, and how often it is right."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from models import chain
from settings import one_device, read
from words import word_tokenizer

from opd_jax.agent.agent import Agent, Decoding
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Actor, Conversation
from opd_jax.agent.history import context
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import beginning, rollout, row_keys
from opd_jax.config import build
from opd_jax.config.models import load_model
from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.envs.make import make_env
from opd_jax.judge.labels import NO_LABEL, EnvLabels, env_labels
from opd_jax.judge.own_turns import OwnTurns, play_on, played_turns, sampled_turns
from opd_jax.judge.reliability import (
    labels_by_rule,
    outcome,
    own_labels,
    reliability_labeller,
    sample_key,
    weight_on_reliable,
)
from opd_jax.losses import NO_TURN, Verdict

pytestmark = pytest.mark.usefixtures("compile_quickly")

# --- A scripted environment, a student and a teacher that know one word for each place ------------

WORDS = ["<unk>", "<system>", "<user>", "<end>", "act", "one", "two", "three", "stuck", "home"]
WORDS += ["go", "jump", "back", "far"]
# What each says at a place.
STUDENT = {"one": "go", "two": "jump", "stuck": "back", "three": "back"}
TEACHER = {"one": "go", "two": "go", "stuck": "jump", "three": "go"}
# Place and response to the next place and the label; all else is rejected.
MOVES = {
    ("one", "go"): ("two", "SKIP"),
    ("two", "go"): ("home", "SKIP"),
    ("three", "go"): ("home", "WEAK"),
    ("stuck", "back"): ("three", "WEAK"),
    ("three", "back"): ("one", "STRONG"),
}
OPENINGS = ("one", "stuck")
MAX_TURNS = 5


class Places:
    """Tells the place alone. A rejected response leads to "stuck"."""

    system = "act"
    waits = False

    def reset(self, split: str, index: int) -> Observation:
        self.task = Task(f"{split}/{index}", "walk", goal="home", scene="")
        self.place, self.turns = OPENINGS[index], 0
        return self.observe()

    def step(self, response: str) -> Observation:
        self.turns += 1
        self.place, oracle = MOVES.get((self.place, response), ("stuck", ""))
        failure = "" if oracle else "rejected"
        return self.observe(action=response, failure=failure, oracle=oracle)

    def observe(self, **of_turn: str) -> Observation:
        end = "success" if self.place == "home" else "turn_limit" * (self.turns == MAX_TURNS)
        return Observation(self.place, self.place, (), end, **of_turn)


class Unlabelled(Places):
    def observe(self, **of_turn: str) -> Observation:
        return super().observe(**of_turn | {"oracle": ""})


class Recorded(Places):
    """Its record has the place alone, which its rule needs; "jump" is no command."""

    def record(self) -> dict[str, Sequence[str]]:
        return {"seen": (self.place,)}

    @staticmethod
    def parse(response: str) -> tuple[str, str]:
        return ("", "no_action") if response == "jump" else (response, "")

    @staticmethod
    def rule(task: Task, record: Any, command: str) -> str:
        assert command
        return MOVES.get((record["seen"][0], command), ("", "STRONG"))[1]


def walker(says: dict[str, str], *, logit: float = 9.0, **decoding: Any) -> tuple[Agent, Any]:
    """A model that answers the last word; the lower its logit, the more often with another."""
    pairs = says | dict.fromkeys(["go", "jump", "back"], "<end>")
    config, params = chain(
        len(WORDS), {WORDS.index(a): WORDS.index(b) for a, b in pairs.items()}, logit=logit
    )
    how = dict(temperature=1.0, top_k=0, top_p=1.0, turn_tokens=3, context_tokens=48)
    layout = dict(extend_widths=(8,), prefill_rows=2, chunk=3, join_after=0)
    settings = Decoding(**how | layout | dict(int8_cache=False, history_turns=0) | decoding)
    tokenizer = word_tokenizer(WORDS)
    return Agent(config, tokenizer, ChatFormat.from_tokenizer(tokenizer), settings), params


def walk(kind: type[Places] = Places, rows: int = 2) -> list[Conversation]:
    """The student's episodes, one of each opening."""
    agent, params = walker(STUDENT, temperature=0.0)
    return rollout(
        params,
        row_keys(jax.random.key(0), range(2)),
        agent=agent,
        envs=[kind() for _ in range(rows)],
        tasks=[("any", index) for index in range(2)],
        depth=0,
    )


def measure(
    conversations: Sequence[Conversation],
    *,
    kind: type[Places] = Places,
    rows: int = 2,
    logit: float = 9.0,
    seed: int = 0,
    update: int = 0,
    samples: int = 1,
    per_label: int = 0,
    **decoding: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The teacher's reliability; with a high logit it says what `TEACHER` says.

    With a `Recorded` environment its rule labels turns that nobody executes.
    """
    temperature = 0.0 if logit == 9.0 else 1.0
    agent, params = walker(TEACHER, logit=logit, **dict(temperature=temperature) | decoding)
    take: Callable[..., OwnTurns] = partial(played_turns, envs=[kind() for _ in range(rows)])
    rule = kind.rule if issubclass(kind, Recorded) else None
    if rule:
        take = partial(sampled_turns, parse=Recorded.parse, rows=rows)
    labeller = reliability_labeller(
        partial(take, params, agent=agent),
        rule=rule,
        max_turns=MAX_TURNS + 1,
        seed=seed,
        samples=samples,
        per_label=per_label,
    )
    measured = labeller(conversations, update)
    return measured.share, dict(measured.metrics)


NAN = math.nan


def test_the_students_episodes_are_as_scripted() -> None:
    labels = env_labels(walk(), max_turns=MAX_TURNS)
    skip, weak, strong, failed = Verdict.SKIP, Verdict.WEAK, Verdict.STRONG, Verdict.DET_FAIL
    assert outcome(labels).tolist() == [
        [skip, failed, weak, strong, skip],  # one, two, stuck, three, one
        [weak, strong, skip, failed, weak],  # stuck, three, one, two, stuck
    ]


@pytest.mark.parametrize("history_turns", [0, 1])
def test_the_teacher_is_right_where_its_own_turn_is(history_turns: int) -> None:
    reliable, metrics = measure(walk(), history_turns=history_turns)
    assert reliable.dtype == np.float32
    # At "one" and "two" it goes on; at "stuck" it is rejected; at "three" its turn is WEAK.
    expected = [[1, 1, 0, 0, 1, NAN], [0, 0, 1, 1, 0, NAN]]
    np.testing.assert_array_equal(reliable, np.array(expected, np.float32))
    asked, read, sampled = (
        metrics.pop(f"reliability/{name}") for name in ("asked", "read", "sampled")
    )
    assert asked == (10, 10)
    assert metrics == {
        "reliability/right": (5, 10),
        "reliability/failed": (3, 10),
        "reliability/asked_skip": (3, 3),
        "reliability/right_skip": (3, 3),
        "reliability/failed_skip": (0, 3),
        "reliability/asked_weak": (3, 3),
        "reliability/right_weak": (0, 3),
        "reliability/failed_weak": (3, 3),
        "reliability/asked_strong": (2, 2),
        "reliability/right_strong": (0, 2),
        "reliability/failed_strong": (0, 2),
        "reliability/asked_det_fail": (2, 2),
        "reliability/right_det_fail": (2, 2),
        "reliability/failed_det_fail": (0, 2),
    }
    # A word and its end each time. Before turn k the context has 4 tokens of the first prompt and 4
    # more of each turn; the last of them is not read, and neither is what a row holds already.
    assert sampled == (2 * 10, 10)
    assert read[1] == 10
    whole = 2 * sum(3 + 4 * k for k in range(MAX_TURNS))
    if not history_turns:
        assert 2 * (3 + 4 * (MAX_TURNS - 1)) - 2 * 10 <= read[0] < whole / 2


def test_without_labels_it_is_right_where_it_is_accepted() -> None:
    reliable, metrics = measure(walk(Unlabelled), kind=Unlabelled)
    assert reliable[:, :5].tolist() == [[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]
    assert metrics["reliability/right_accepted"] == (5, 8)
    assert metrics["reliability/right_det_fail"] == (2, 2)
    assert "reliability/right_skip" not in metrics


def test_a_sample_depends_on_its_seed_and_place_and_on_no_other() -> None:
    conversations = walk()
    random = partial(measure, conversations, logit=2.0)
    reliable, _ = random(samples=8)
    assert 0 < np.nanmean(reliable) < 0.9  # far from what it says where it is sure
    assert ((reliable > 0) & (reliable < 1)).any()  # the samples of a turn differ
    np.testing.assert_array_equal(random(samples=8)[0], reliable)
    for other in (dict(seed=1), dict(update=1)):
        assert not np.array_equal(random(samples=8, **other)[0], reliable, equal_nan=True)
    drawn, metrics = random(samples=8, per_label=2)
    asked = np.isfinite(drawn)
    assert asked.sum() == 8
    np.testing.assert_array_equal(drawn[asked], reliable[asked])
    for label in ("skip", "weak", "strong", "det_fail"):
        assert metrics[f"reliability/asked_{label}"][0] == 2
        assert metrics[f"reliability/right_{label}"][1] == 16
    assert not np.array_equal(np.isfinite(random(per_label=2, update=1)[0]), asked)


def test_more_samples_come_behind_the_first() -> None:
    conversations = walk()
    agent, params = walker(TEACHER, logit=2.0)
    how: dict[str, Any] = dict(agent=agent, envs=[Places()], rng=sample_key(0, 0, executed=True))
    places = [(1, 2), (0, 1), (0, 0)]
    three = played_turns(params, conversations, places, samples=3, **how)
    one = played_turns(params, conversations, places, samples=1, **how)
    assert [len(turns) for turns in three] == [3, 3, 3]
    assert [turns[:1] for turns in three] == one
    assert own_labels(three).failed.shape == (3, 3)
    nothing = played_turns(params, conversations, [], samples=3, **how)
    assert own_labels(nothing).played.sum(axis=1).shape == (0,)


# --- Without the environment ----------------------------------------------------------------------


@pytest.mark.parametrize("history_turns", [0, 1])
def test_a_sampled_turn_is_the_one_that_would_be_played(history_turns: int) -> None:
    conversations = walk(Recorded)
    agent, params = walker(TEACHER, logit=2.0, history_turns=history_turns)
    places = [(row, turn) for turn in range(MAX_TURNS) for row in range(2)]
    how: dict[str, Any] = dict(agent=agent, rng=jax.random.key(3), samples=4)
    played = played_turns(params, conversations, places, envs=[Recorded()], **how)
    shared = dict(parse=Recorded.parse, **how)
    read: list[int] = []
    for rows in (1, 3):
        positions = Positions()
        sampled = sampled_turns(
            params, conversations, places, rows=rows, positions=positions, **shared
        )
        read.append(positions.tokens("reading"))
        for (row, k), mine, theirs in zip(places, sampled, played, strict=True):
            before = conversations[row].turns[k]
            for own, other in zip(mine, theirs, strict=True):
                assert own is not None
                assert other is not None
                assert (own.response, own.stop) == (other.response, other.stop)
                assert own.record == other.record == before.record
                assert own.observation == before.observation
                assert own.action == ("" if own.response == "jump" else own.response)
                assert (own.oracle, own.feedback) == ("", "")
    assert len({own.response for turns in sampled for own in turns if own}) > 3
    if not history_turns:  # a row reads each episode once: 4 tokens, and 4 more each turn
        assert read[0] <= 2 * (3 + 4 * (MAX_TURNS - 1))
        assert read[0] < read[1]
    # The rule sees the record before the turn and the command, executed or not.
    of = [conversations[row] for row, _ in places]
    labels = labels_by_rule(sampled, of, rule=Recorded.rule)
    for number, turns in enumerate(sampled):
        for sample, own in enumerate(turns):
            assert own is not None
            assert labels.played[number, sample]
            assert labels.failed[number, sample] == (own.response in ("jump", ""))
            known = MOVES.get((own.observation, own.response), ("", "STRONG"))[1]
            expected = Verdict[known] if own.action else NO_LABEL
            assert labels.oracle[number, sample] == expected


def test_the_proxy_is_the_oracle_where_the_rule_knows_all_and_the_teacher_is_sure() -> None:
    conversations = walk(Recorded)
    proxy, metrics = measure(conversations, kind=Recorded, rows=3)
    np.testing.assert_array_equal(proxy, measure(conversations)[0])
    assert metrics["reliability/right"] == (5, 10)
    assert metrics["reliability/failed"] == (3, 10)  # "jump", at "stuck"
    assert metrics["reliability/sampled"] == (2 * 10, 10)


def test_the_proxys_samples_are_its_own() -> None:
    conversations = walk(Recorded)
    random = partial(measure, conversations, kind=Recorded, logit=2.0, samples=8)
    reliable, _ = random()
    np.testing.assert_array_equal(random()[0], reliable)
    for other in (dict(seed=1), dict(update=1)):
        assert not np.array_equal(random(**other)[0], reliable, equal_nan=True)
    executed = measure(conversations, logit=2.0, samples=8)[0]
    assert not np.array_equal(executed, reliable, equal_nan=True)
    assert np.nanmean(executed) == pytest.approx(np.nanmean(reliable), abs=0.2)


def test_where_the_environment_does_not_repeat_itself_nothing_is_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Moody(Places):
        """Another place comes of the third response of the first task, each time."""

        count = 0

        def step(self, response: str) -> Observation:
            seen = super().step(response)
            if self.task.id.endswith("0") and self.turns == 3:
                Moody.count += 1
                return replace(seen, message="far " * Moody.count + seen.message)
            return seen

    reliable, metrics = measure(walk(Moody), kind=Moody)
    assert np.isnan(reliable[0]).tolist() == [False] * 3 + [True] * 3
    assert metrics["reliability/asked"] == (10, 10)
    assert metrics["reliability/right"] == (4, 8)
    assert caplog.text.count("any/0 answered otherwise") == 1


@pytest.mark.parametrize("kind", [Places, Recorded])
def test_an_episode_that_broke_is_not_asked_about(kind: type[Places]) -> None:
    conversations = walk(kind)
    conversations[0].end = BROKEN
    reliable, metrics = measure(conversations, kind=kind)
    assert np.isnan(reliable[0]).all()
    assert metrics["reliability/asked"] == (5, 5)
    conversations[1].end = BROKEN
    reliable, metrics = measure(conversations, kind=kind)
    assert np.isnan(reliable).all()
    assert metrics == {"reliability/read": (0, 0), "reliability/sampled": (0, 0)}


# --- The history is the student's, token by token -------------------------------------------------


@pytest.mark.parametrize("history_turns", [0, 1])
def test_the_teacher_takes_over_on_the_students_tokens(
    history_turns: int, small: Sequence[str]
) -> None:
    settings = read("quickstart:runlocal", *small, f"rollout.history_turns={history_turns}")
    student, teacher = (
        load_model(f"embedded:{who}", dtype="float32", mesh=one_device())
        for who in ("student", "teacher")
    )
    agent, envs = build.make_agent(student, settings), [make_env(settings.env) for _ in range(4)]
    tasks = [("train", index) for index in range(4)]
    episodes = rollout(
        student.params,
        row_keys(jax.random.key(0), range(4)),
        agent=agent,
        envs=envs,
        tasks=tasks,
        depth=0,
    )
    places = [(row, turn) for row, c in enumerate(episodes) for turn in range(len(c.turns))]
    assert {turn for _, turn in places} == {0, 1, 2}
    there = replace(agent, model=teacher.config)
    play: Callable[..., list[Conversation]] = partial(
        play_on,
        teacher.params,
        episodes,
        places,
        agent=there,
        envs=envs,
        keys=row_keys(jax.random.key(1), range(len(places))),
    )
    positions = Positions()
    own = play(turns=1, positions=positions)
    for now, (row, turn) in zip(own, places, strict=True):
        c = episodes[row]
        start, end = now.spans[turn]
        assert now.tokens[:start] == c.tokens[:start]
        replayed = [replace(played, actor=Actor.STUDENT) for played in now.turns[:turn]]
        assert replayed == c.turns[:turn]
        assert now.turn_id[:start] == [NO_TURN] * start
        assert now.turn_id[start:end] == [turn] * (end - start)
        assert len(now.turns) == turn + 1
        assert now.turns[turn].observation == c.turns[turn].observation
        how: dict[str, Any] = dict(history_turns=history_turns, left_out=agent.chat.left_out)
        assert context(now, turns=turn, **how) == context(c, turns=turn, **how)
    assert positions.tokens("sampling") >= len(places)
    # What a row keeps of the episode before changes what is read, and no token.
    cleared = rollout(
        teacher.params,
        row_keys(jax.random.key(1), range(len(places))),
        agent=there,
        envs=envs,
        tasks=[tasks[row] for row, _ in places],
        depth=[turn + 1 for _, turn in places],
        replay=[beginning(episodes[row], turns=turn) for row, turn in places],
        positions=(afresh := Positions()),
    )
    for now, alone in zip(own, cleared, strict=True):
        assert (now.tokens, now.turns) == (alone.tokens, alone.turns)
        np.testing.assert_allclose(now.logprobs, alone.logprobs, atol=1e-4)
    if not history_turns:
        assert positions.tokens("reading") < afresh.tokens("reading")
    for now, (row, turn) in zip(play(turns=0), places, strict=True):
        assert now.tokens[: now.spans[turn][0]] == episodes[row].tokens[: now.spans[turn][0]]
        assert now.success or len(now.turns) == settings.env.max_turns or now.end == "context"


# --- Weight on reliable advice --------------------------------------------------------------------


def test_weight_on_reliable_advice_by_hand() -> None:
    played = np.array([[True, True, True, True], [True, True, False, False]])
    failed = np.array([[False, False, True, True], [False, False, False, False]])
    oracle = np.array([[0, 2, NO_LABEL, NO_LABEL], [0, 0, NO_LABEL, NO_LABEL]])
    labels = EnvLabels(played, failed, oracle)
    weight = np.array([[2.0, 4.0, 1.0, 3.0], [6.0, 2.0, 9.0, 9.0]])
    reliable = np.array([[1.0, 0.5, 0.0, 1.0], [0.5, 1.0, NAN, NAN]])
    everything = (2 * 1 + 4 * 0.5 + 3 * 1 + 6 * 0.5 + 2 * 1) / 18
    assert weight_on_reliable(weight, reliable, labels) == pytest.approx(everything)
    # Of SKIP two are asked, of weight 2 and 6 of 10; of the failures one, of weight 1 of 4.
    some = np.array([[1.0, 0.5, 0.0, NAN], [0.5, NAN, NAN, NAN]])
    drawn = (10 * (2 + 3) / 8 + 2 + 4 * 0.0) / 18
    assert weight_on_reliable(weight, some, labels) == pytest.approx(drawn)
    # A label without an answer says nothing; nor does no weight at all.
    none_failed = np.where(failed, NAN, reliable)
    assert weight_on_reliable(weight, none_failed, labels) == pytest.approx((2 + 2 + 3 + 2) / 14)
    assert math.isnan(weight_on_reliable(0 * weight, reliable, labels))
    # A weight that is not known is as large as those of its label: here SKIP has (2 + 2) · 3 / 2.
    unknown = np.where(weight == 6, NAN, weight)
    estimate = (6 * 1 + 4 * 0.5 + 3 * 1) / (6 + 4 + 4)
    assert weight_on_reliable(unknown, reliable, labels) == pytest.approx(estimate)
