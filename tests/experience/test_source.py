"""Where an update's tokens come from: who plays, which tasks, and what a resumed run plays."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from settings import one_device, read

from opd_jax.agent.conversation import Actor, Conversation
from opd_jax.agent.environments import make_envs
from opd_jax.agent.guide import Guide
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.config import build
from opd_jax.config.models import LoadedModel, load_student, load_teacher, new_model
from opd_jax.config.settings import Settings
from opd_jax.envs.base import Task
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.make import make_env
from opd_jax.experience.recorded import recorded
from opd_jax.experience.source import Episodes, Played, Source, padding
from opd_jax.experience.tasks import TaskOrder
from opd_jax.learner.train_state import TrainState, init_state
from opd_jax.learner.weighing import Weight
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.report import keys
from opd_jax.report.episodes import episode as line_of

pytestmark = pytest.mark.usefixtures("compile_quickly")

Pair = tuple[LoadedModel, LoadedModel | None]


@pytest.fixture(scope="module")
def base(small: tuple[str, ...]) -> Settings:
    return read("quickstart:runlocal", *small)


@pytest.fixture(scope="module")
def pair(base: Settings) -> Pair:
    return load_student(base, one_device()), load_teacher(base, one_device())


def changed(settings: Settings, **sections: dict) -> Settings:
    return dataclasses.replace(
        settings,
        **{
            name: dataclasses.replace(getattr(settings, name), **fields)
            for name, fields in sections.items()
        },
    )


def source(settings: Settings, pair: Pair, cursor: Sequence[int] = (0, 0)) -> Source:
    tasks = build.panels(settings)[settings.data.split]
    return build.make_source(settings, *pair, tasks=tasks, cursor=cursor)


def state(settings: Settings, model: LoadedModel, step: int = 0) -> TrainState:
    made = init_state(model.params, build.optimizer(settings), seed=settings.seed)
    return made.replace(step=made.step + step)


def play(settings: Settings, pair: Pair, *, step: int = 0, start: int = 0) -> Played:
    return source(settings, pair, [start, 0]).play(state(settings, pair[0], step))


def test_what_is_played_is_a_function_of_state_and_cursor(base: Settings, pair: Pair) -> None:
    first = source(base, pair)
    played = first.play(state(base, pair[0]))
    assert first.cursor == [4, 0]
    following = first.play(state(base, pair[0], step=1))
    assert first.cursor == [8, 0]
    first.close()
    assert play(base, pair, step=1, start=4) == following
    assert play(base, pair) == played
    # The same tasks with the next update's key: other episodes.
    assert play(base, pair, step=1).rows != played.rows


# The student is sure of most of its tokens: at this temperature episodes differ.
HOT = 4.0


@pytest.mark.parametrize("per_task", [1, 2])
def test_the_student_plays_the_next_tasks_of_the_shuffled_order(
    per_task: int, base: Settings, pair: Pair
) -> None:
    settings = changed(base, rollout={"per_task": per_task, "temperature": HOT})
    playing, start = source(settings, pair, [8, 0]), state(base, pair[0], step=3)
    played = playing.play(start)
    assert playing.cursor == [8 + 4 // per_task, 0]
    env = partial(make_env, base.env)
    order = TaskOrder("train", env().size("train"), base.seed, count=4 // per_task, per_task=1)
    twice = [task for task in order.from_number(8) for _ in range(per_task)]
    assert played.conversations == rollout(
        start.params,
        row_keys(jax.random.fold_in(start.rng, 3), range(4)),
        agent=build.make_agent(pair[0], settings),
        envs=make_envs(env, 4),
        tasks=twice,
        depth=0,
    )
    assert len({tuple(c.tokens) for c in played.conversations}) == 4
    assert (played.rows, played.episode) == (played.conversations, [0, 1, 2, 3])
    assert played.metrics["batch/turns"] == (sum(len(c.turns) for c in played.conversations), 4)


# What neither cuts, nor repeats, nor leaves out anything: plain OPD.
NEUTRAL = [
    {"depth_start": 3, "depth_every": 3},  # as many turns as the environment gives
    {"depth_start": 99, "depth_every": 1},
    {"history_turns": 3},
]


def test_baselines_at_neutral_settings_play_what_opd_plays(base: Settings, pair: Pair) -> None:
    assert base.env.max_turns == 3
    played = play(base, pair)
    for fields in NEUTRAL:
        assert play(changed(base, rollout=fields), pair) == played, fields


def test_episodes_deepen_from_update_to_update(base: Settings, pair: Pair) -> None:
    deepening = changed(base, rollout={"depth_start": 1, "depth_every": 2})
    for step, depth in ((0, 1), (1, 1), (2, 2), (5, 3)):
        assert deepening.rollout.depth(step) == depth
        played, whole = play(deepening, pair, step=step), play(base, pair, step=step)
        for cut, full in zip(played.conversations, whole.conversations, strict=True):
            assert cut.turns == full.turns[:depth]
            assert cut.tokens == full.tokens[: len(cut.tokens)]
            assert cut.end == ("depth" if len(full.turns) > depth else full.end)
        ends, episodes = played.metrics.get("end/depth", (0, 4))
        assert (ends > 0) == (depth < base.env.max_turns)
        assert episodes == 4


def test_with_part_of_the_history_verdicts_follow_their_turns_into_rows(
    base: Settings, pair: Pair
) -> None:
    settings = changed(base, rollout={"history_turns": 1})
    played = play(settings, pair)
    # Each turn its own label.
    verdict = np.array([[row, row + 1, row % 2] for row in range(3)] + [[3, 2, 1]], np.int32)
    batch = build.make_pack(settings, pair[0].config)(played, verdict)
    assert len(batch.tokens) % 4 == 0
    assert len(batch.tokens) > 4
    seen = []
    for row, episode in enumerate(played.episode):
        for turn in sorted(set(batch.turn_id[row].tolist()) - {NO_TURN}):
            seen.append((episode, turn))
            assert batch.verdict[row, turn] == verdict[episode, turn]
    turns = [len(c.turns) for c in played.conversations]
    expected = [(row, turn) for row, count in enumerate(turns) for turn in range(count)]
    assert sorted(seen) == expected  # the rows are ordered by length


def test_on_policy_the_student_plays_and_off_policy_the_teacher(base: Settings, pair: Pair) -> None:
    as_it_is = state(base, pair[0])
    moved = as_it_is.replace(params=jax.tree.map(lambda x: 3.0 * x, as_it_is.params))
    for who, same in (("teacher", True), ("on_policy", False)):
        settings = changed(base, data={"source": who})
        ours, theirs = (source(settings, pair).play(start) for start in (as_it_is, moved))
        assert (ours == theirs) == same, who


def test_the_expert_plays_the_same_tasks_without_a_model(base: Settings, pair: Pair) -> None:
    settings = changed(
        base,
        data={"source": "expert"},
        env={"max_turns": 15},  # enough for an expert
        rollout={"context_tokens": 512},
    )
    played = play(settings, pair, step=3, start=8)
    assert play(settings, pair, start=8) == played
    assert played.metrics["batch/success"] == (4, 4)
    env, student = make_env(settings.env), pair[0]
    order = TaskOrder("train", env.size("train"), base.seed, count=4, per_task=1)
    for conversation, task in zip(played.conversations, order.from_number(8), strict=True):
        first = env.reset(*task)
        prompt = student.chat.first(env.system, first.message)
        response = Expert(env.task, first, rng=random.Random(0)).respond(first)
        answer = [*student.tokenizer.encode(response), student.chat.stop_ids[0]]
        length = len(prompt) + len(answer)
        assert conversation.tokens[:length] == [*prompt, *answer]
        assert conversation.turn_id[:length] == [NO_TURN] * len(prompt) + [0] * len(answer)


@pytest.mark.parametrize("batch", [1, 4])
def test_tasks_that_fit_no_context_are_passed_over_unless_no_task_fits(
    base: Settings, pair: Pair, batch: int
) -> None:
    asked: list[list[int]] = []

    def playing(fits: Callable[[int], bool], size: int) -> Episodes:
        def play_tasks(
            _: TrainState, tasks: Sequence[tuple[str, int]], positions: Positions
        ) -> list[Conversation]:
            asked.append([index for _, index in tasks])
            return [
                Conversation(
                    Task(str(index), "", "", ""), end="success" if fits(index) else "context"
                )
                for _, index in tasks
            ]

        order = TaskOrder("train", size=size, seed=0, count=batch, per_task=1)
        agent = build.make_agent(pair[0], base)
        how: dict[str, int] = dict(length_multiple=8, response_multiple=8, micro_batches=1)
        return Episodes(play_tasks, [], order, agent, cursor=[0, 0], **how)

    order = TaskOrder("train", size=8, seed=0, count=8, per_task=1).from_number(0)
    late = [index for _, index in order[4:]]
    some, start = playing(late.__contains__, 8), state(base, pair[0])
    played = some.play(start)
    assert not any(c.unfit for c in played.conversations)
    assert [index for tasks in asked for index in tasks] == [n for _, n in order[: 4 + batch]]
    assert some.cursor == [4 + batch, 0]
    for size, tries in ((8, 8), (10**6, 16)):
        asked.clear()
        with pytest.raises(ValueError, match=r"`rollout.context_tokens`: none of"):
            playing(lambda index: False, size).play(start)
        assert sum(map(len, asked)) == tries


def tuned(settings: Settings, **changes: dict) -> Settings:
    """Fine-tuning on the tokens themselves."""
    weight = {"by": "uniform"}
    objective = {"weight": changed_weight(settings, **weight), "divergence": "cross_entropy"}
    return changed(settings, weight=weight, objective=objective, **changes)


@pytest.mark.parametrize("history_turns", [0, 1])
def test_only_episodes_that_succeeded_are_learnt_from(
    history_turns: int, base: Settings, pair: Pair
) -> None:
    room = {"history_turns": history_turns, "context_tokens": 512, "batch": 8}
    every = tuned(base, data={"source": "teacher"}, env={"max_turns": 8}, rollout=room)
    won = changed(every, data={"only_success": True})
    before, after = play(every, pair), play(won, pair)
    conversations = after.conversations
    assert before.conversations == conversations
    assert {c.success for c in conversations} == {True, False}
    # A batch keeps its shape, and what is said of the episodes is said of all.
    strong = np.full((8, 8), Verdict.STRONG, np.int32)
    pack = build.make_pack(won, pair[0].config)
    whole, part = pack(before, strong), pack(after, strong)
    assert part.tokens.tobytes() == whole.tokens.tobytes()
    for name in ("batch/success", "batch/turns", "tokens/sampled", "tokens/sequence"):
        assert before.metrics[name] == after.metrics[name]
    for row, number in enumerate(after.episode):
        learnt = whole.turn_id[row] if conversations[number].success else NO_TURN
        np.testing.assert_array_equal(part.turn_id[row], learnt)


def test_without_a_success_the_student_stays_as_it_was(base: Settings, pair: Pair) -> None:
    settings = tuned(base, data={"only_success": True})  # rejection fine-tuning
    played, student = play(settings, pair), pair[0]
    assert not any(c.success for c in played.conversations)
    start = state(settings, student)
    # The step takes the state's arrays.
    start = start.replace(params=jax.tree.map(jax.numpy.copy, start.params))
    said = build.make_labeller(settings, None)(played.conversations, 0)
    batch = build.make_pack(settings, student.config)(played, said.verdict, said.labels)
    update = build.make_update(settings, student, None, start)
    before = jax.tree.map(np.asarray, start.params)
    after, raw = update(start, batch, None)
    assert (raw["no_step"], raw["loss"], raw["grad_norm"]) == (1, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, after.params, before)
    assert int(after.step) == 1


def test_padding_counts_what_an_update_computes() -> None:
    lengths = (8, 3, 7, 4)
    rows = []
    for length in lengths:
        row = Conversation(None)
        row.append_given([1] * (length - 1))
        row.append_response([2], [-1.0], 0)
        rows.append(row)
    count = partial(padding, rows, length_multiple=8, response_multiple=2)
    assert count(parts=1) == (4 * 8 - sum(lengths), 4 * 8)
    assert count(parts=2) == (8 + 8 + 4 + 4 - sum(lengths), 8 + 8 + 4 + 4)
    assert count(parts=4) == count(parts=2)


# --- Turns of the teacher


def test_the_teacher_takes_turns_as_the_settings_say(base: Settings, pair: Pair) -> None:
    student, teacher = pair
    assert teacher
    settings = changed(
        base, rollout={"teacher_share": 1.0, "teacher_share_for": 1.0, "take_over_after": 2}
    )
    assert settings.train.updates == 4
    start = state(base, student, step=1)
    agent = build.make_agent(student, settings)
    guide = Guide(
        teacher.params,
        dataclasses.replace(agent, model=teacher.config),
        share=(1 + np.cos(np.pi / 4)) / 2,
        after=2,
        learnt=False,
    )
    assert play(settings, pair, step=1).conversations == rollout(
        start.params,
        row_keys(jax.random.fold_in(start.rng, 1), range(4)),
        agent=agent,
        envs=make_envs(partial(make_env, base.env), 4),
        tasks=TaskOrder(
            "train", make_env(base.env).size("train"), base.seed, count=4, per_task=1
        ).from_number(0),
        depth=0,
        guide=guide,
    )
    # When its share has fallen to 0, an update plays what it would have played without it.
    falling = changed(base, rollout={"teacher_share": 1.0, "teacher_share_for": 0.5})
    assert play(falling, pair, step=2) == play(base, pair, step=2)
    assert play(falling, pair, step=1) != play(base, pair, step=1)


@pytest.mark.parametrize("history_turns", [0, 1])
def test_the_batch_says_who_wrote_a_turn_that_is_learnt(
    history_turns: int, base: Settings, pair: Pair
) -> None:
    how = {"teacher_share": 0.5, "teacher_share_for": 0.0, "history_turns": history_turns}
    silent = changed(base, rollout=how)
    learning = changed(silent, objective={"teacher_turns": "forward_kl"})
    written = []
    for settings in (silent, learning):
        played = play(settings, pair)
        assert played.metrics["tokens/read_by_teacher"] > 0
        verdict = np.zeros((4, base.env.max_turns), np.int32)
        batch = build.make_pack(settings, pair[0].config)(played, verdict)
        learnt = set()
        for row, episode in enumerate(played.episode):
            turns = played.conversations[episode].turns
            for k in set(batch.turn_id[row].tolist()) - {NO_TURN}:
                learnt.add((episode, k, turns[k].actor))
                assert batch.actor is None or batch.actor[row, k] == turns[k].actor
        assert (batch.actor is None) == (settings is silent)
        written.append({actor for _, _, actor in learnt})
        turns = [(e, turn) for e, c in enumerate(played.conversations) for turn in c.turns]
        asked = [turn for _, turn in turns if turn.actor is Actor.STUDENT or settings is learning]
        assert len(learnt) == len(asked)
    assert written == [{Actor.STUDENT}, {Actor.STUDENT, Actor.TEACHER}]


def test_an_episode_that_the_teacher_played_in_is_read_back(base: Settings, pair: Pair) -> None:
    settings = changed(base, rollout={"teacher_share": 0.5, "teacher_share_for": 0.0})
    agent, decode = build.make_agent(pair[0], settings), pair[0].tokenizer.decode
    for c in play(settings, pair).conversations:
        line = line_of(c, who="train", update=0, actor="student", decode=decode)
        got = recorded(line, agent=agent)
        assert (got.tokens, got.spans) == (c.tokens, c.spans)
        # Whoever wrote a turn of a file, it is an example.
        assert [got.turn_id[start] for start, _ in got.spans] == [*range(len(c.turns))]


# --- Demonstrations by players


@pytest.fixture(scope="module")
def lessons() -> Settings:
    changes = ("demonstrations.window=4", "demonstrations.judge_examples=4")
    return read("household_pair:runlocal", *changes, "new_model.num_layers=1")


@pytest.fixture(scope="module")
def beginner(lessons: Settings) -> Pair:
    return new_model(lessons, one_device()), None


def test_lessons_go_on_from_any_cursor(lessons: Settings, beginner: Pair) -> None:
    start, first = state(lessons, beginner[0]), source(lessons, beginner)
    cursors, plays = [first.cursor], []
    for _ in range(9):
        plays.append(first.play(start))
        cursors.append(first.cursor)
    first.close()
    assert cursors[-1][0] >= 1, "it should reach a second window"
    for number in (0, 3, 8):
        resumed = source(lessons, beginner, cursors[number])
        assert resumed.play(start) == plays[number]
        assert resumed.cursor == cursors[number + 1]
        resumed.close()


def test_lessons_hold_episodes_and_answers_to_the_judges_question(
    lessons: Settings, beginner: Pair
) -> None:
    model, first = beginner[0], source(lessons, beginner)
    answers, episodes = set(), 0
    while first.cursor[0] == 0:
        played = first.play(state(lessons, model))
        for row in played.rows:
            supervised = [t for t, turn in zip(row.tokens, row.turn_id, strict=True) if turn >= 0]
            text = model.tokenizer.decode(supervised)
            if "Action:" in text:
                episodes += 1
            elif supervised:
                assert supervised[-1] == model.chat.stop_ids[0]
                answers.add(model.tokenizer.decode(supervised[:-1]))
    first.close()
    assert answers
    assert answers <= {verdict.name for verdict in Verdict}
    assert episodes >= 4


@pytest.mark.parametrize("labels", ["oracle", "record"])
def test_the_teacher_takes_the_students_turns_while_environments_are_idle(
    labels: str, base: Settings, pair: Pair
) -> None:
    weight = {"by": "reliability", "teacher_labels": labels}
    settings = changed(base, weight=weight, objective={"weight": changed_weight(base, **weight)})
    playing = source(settings, pair)
    played = playing.play(state(settings, pair[0]))
    student, teacher = pair
    label = build.make_labeller(settings, teacher, student, playing.envs)
    said = label(played.conversations, 0)
    reliable = said.labels["reliability"]
    turns = [len(c.turns) for c in played.conversations]
    there = np.arange(reliable.shape[1]) < np.array(turns)[:, None]
    # One sample a turn: the teacher was right there, or it was not.
    assert np.isnan(reliable[~there]).all()
    assert set(reliable[there].tolist()) <= {0.0, 1.0}
    assert said.metrics["reliability/asked"] == (sum(turns), sum(turns))
    assert all(keys.defined(name) for name in said.metrics)
    batch = build.make_pack(settings, student.config)(played, said.verdict, said.labels)
    np.testing.assert_array_equal(batch.labels["reliability"], reliable[played.episode])
    np.testing.assert_array_equal(label(played.conversations, 0).labels["reliability"], reliable)
    # The next update's episodes are those that it would have played anyway.
    again = source(settings, pair, cursor=playing.cursor).play(state(settings, pair[0], step=1))
    assert playing.play(state(settings, pair[0], step=1)).conversations == again.conversations


def changed_weight(settings: Settings, **fields: Any) -> Weight:
    return dataclasses.replace(settings.weight, **fields)
