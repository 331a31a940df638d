"""Where an update's tokens come from, and what is counted about them."""

import random
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from opd_jax.agent.conversation import Conversation, Turn, pack
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.config import build as experiment
from opd_jax.config import load
from opd_jax.envs.base import Task
from opd_jax.envs.household.expert import Expert
from opd_jax.experience import environments
from opd_jax.experience.source import (
    Experience,
    Source,
    depth_at,
    episode_metrics,
    judge_metrics,
    make_source,
)
from opd_jax.judge.verdicts import Judgement
from opd_jax.learner.batch import make_batch
from opd_jax.learner.train_state import TrainState, init_state
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.report.metrics import means
from opd_jax.report.stopwatch import Stopwatch
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIGS = Path(__file__).parents[2] / "configs"
SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)


def turn(action: str = "look", *, failure: str = "", oracle: str = "", stop: str = "stop_token"):
    return Turn("seen", (), f"Action: {action}", stop, action, failure, "heard", oracle)


def conversation(turns: Sequence[Turn], *, end: str, score: float, tokens: int) -> Conversation:
    """The first token is given, the rest belong to turn 0."""
    made = Conversation(task=Task("id", "type", "goal", "scene"), end=end, score=score)
    made.append_given([1])
    made.append_response([2] * (tokens - 1), [-1.0] * (tokens - 1), 0)
    made.turns.extend(turns)
    return made


# --- Episodes

EPISODES = [
    conversation(
        [turn("go"), turn("take"), turn("go", stop="turn_budget")],
        end="success",
        score=1.0,
        tokens=9,
    ),
    conversation(
        [turn("go", failure="rejected"), turn("", failure="no_action", stop="turn_budget")],
        end="turn_limit",
        score=0.25,
        tokens=5,
    ),
    conversation([turn("look", stop="context")], end="context", score=0.0, tokens=2),
    conversation([turn("look"), turn("look")], end="turn_limit", score=0.0, tokens=4),
]


def test_figures_of_a_batch_of_episodes() -> None:
    metrics = episode_metrics(EPISODES, pack(EPISODES, max_turns=3, length_multiple=8))
    assert metrics == {
        "batch/success": (1, 4),
        "batch/score": (1.25, 4),
        "batch/turns": (8, 4),
        # The second `go` and the second `look`; a turn without an action repeats none.
        "batch/repeated": (2, 8),
        "batch/failed": (2, 8),
        "end/success": (1, 4),
        "end/turn_limit": (2, 4),
        "end/context": (1, 4),
        "stop/stop_token": (5, 8),
        "stop/turn_budget": (2, 8),
        "stop/context": (1, 8),
        "tokens/sampled": (8 + 4 + 1 + 3, 1),
        "tokens/sequence": (9 + 5 + 2 + 4, 1),
    }


def test_every_end_and_every_stop_is_counted() -> None:
    metrics = episode_metrics(EPISODES, pack(EPISODES, max_turns=3, length_multiple=8))
    for group in ("end/", "stop/"):
        shares = [value for name, value in metrics.items() if name.startswith(group)]
        assert sum(part for part, _ in shares) == shares[0][1]


# --- The judge

# Oracle's label, the judge's, for turns 0, 1, 2; "fail": failed deterministically, never asked.
JUDGED = [
    [("SKIP", SKIP), ("SKIP", WEAK), ("STRONG", STRONG)],
    [("WEAK", WEAK), ("", DET_FAIL)],
    [("STRONG", SKIP), ("WEAK", STRONG), ("", STRONG)],
]


def judged() -> tuple[Judgement, list[Conversation]]:
    verdict = np.full((3, 4), SKIP, np.int32)  # K = 4: no episode has a fourth turn
    asked = np.zeros((3, 4), bool)
    conversations = []
    for row, pairs in enumerate(JUDGED):
        turns = []
        for index, (oracle, given) in enumerate(pairs):
            verdict[row, index] = given
            asked[row, index] = given != DET_FAIL
            failure = "rejected" if given == DET_FAIL else ""
            turns.append(turn(oracle=oracle, failure=failure))
        conversations.append(conversation(turns, end="turn_limit", score=0.0, tokens=3))
    unparsable = np.zeros((3, 4), bool)
    unparsable[2, 2] = True
    return Judgement(verdict, asked, unparsable), conversations


def test_figures_of_the_judge() -> None:
    metrics = judge_metrics(*judged())
    by_turn = {name: metrics.pop(name) for name in list(metrics) if name.startswith("by_turn/")}
    assert metrics == {
        "judge/asked": (7, 8),
        "judge/unparsable": (1, 7),
        "verdict/skip": (2, 8),
        "verdict/weak": (2, 8),
        "verdict/strong": (3, 8),
        "verdict/det_fail": (1, 8),
        # Wanted corrected among those with a label: weak, strong, weak, strong; the first is fine.
        "judge/precision": (3, 4),
        # Not fine: strong, weak, strong, weak; the third was skipped.
        "judge/recall": (3, 4),
        "judge/corrected": 4,
        "judge/wrong": 4,
        "judge/recall_skip": (1, 2),
        "judge/recall_weak": (1, 2),
        "judge/recall_strong": (1, 2),
    }
    sums = {name: total.tolist() for name, (total, _) in by_turn.items()}
    assert sums == {
        "by_turn/skip": [2, 0, 0, 0],
        "by_turn/weak": [1, 1, 0, 0],
        "by_turn/strong": [0, 1, 2, 0],
        "by_turn/det_fail": [0, 1, 0, 0],
    }
    assert all(count.tolist() == [3, 3, 2, 0] for _, count in by_turn.values())


def test_shares_of_verdicts_add_up_and_turns_nobody_had_are_null() -> None:
    shares = means(judge_metrics(*judged()))
    assert sum(shares[f"verdict/{v.name.lower()}"] for v in Verdict) == pytest.approx(1)
    for k in range(3):
        assert sum(shares[f"by_turn/{v.name.lower()}"][k] for v in Verdict) == pytest.approx(1)
    assert all(shares[f"by_turn/{v.name.lower()}"][3] is None for v in Verdict)


def test_without_labels_of_an_oracle_nothing_is_said_of_precision() -> None:
    judgement, conversations = judged()
    for made in conversations:
        for one in made.turns:
            one.oracle = ""
    metrics = judge_metrics(judgement, conversations)
    assert not any(name.startswith(("judge/precision", "judge/recall")) for name in metrics)


# --- Sources, with the embedded pair


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def base(small: tuple[str, ...]) -> FrozenConfigDict:
    return load(f"{CONFIGS / 'quickstart.py'}:runlocal", small)


@pytest.fixture(scope="module")
def pair(base: FrozenConfigDict, mesh: jax.sharding.Mesh) -> tuple:
    return experiment.load_pair(base, mesh)


def changed(config: FrozenConfigDict, **groups: dict) -> FrozenConfigDict:
    return FrozenConfigDict(
        {
            name: {**value, **groups.get(name, {})} if isinstance(value, dict) else value
            for name, value in config.to_dict().items()
        }
    )


def source(config: FrozenConfigDict, pair: tuple, cursor: Sequence[int] = (0, 0)) -> Source:
    return make_source(config, student=pair[0], teacher=pair[1], cursor=cursor)


def state(config: FrozenConfigDict, model: experiment.LoadedModel, step: int = 0) -> TrainState:
    made = init_state(model.params, experiment.make_optimizer(config), seed=config.seed)
    return made.replace(step=made.step + step)


def assert_same(ours: Experience, theirs: Experience, *, same: bool = True) -> None:
    one, other = (jax.tree.leaves(experience.batch) for experience in (ours, theirs))
    equal = [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
    assert all(equal) if same else not equal[0]


def test_a_draw_is_a_function_of_state_and_cursor(base: FrozenConfigDict, pair: tuple) -> None:
    first = source(base, pair)
    start, later = state(base, pair[0]), state(base, pair[0], step=1)
    drawn = first.draw(start, Stopwatch())
    assert first.cursor == [4, 0]
    following = first.draw(later, Stopwatch())
    assert first.cursor == [8, 0]
    assert_same(source(base, pair, [4, 0]).draw(later, Stopwatch()), following)
    assert_same(source(base, pair).draw(start, Stopwatch()), drawn)
    # The same tasks with the next update's key: other episodes.
    assert_same(source(base, pair).draw(later, Stopwatch()), drawn, same=False)
    first.close()


# What neither cuts, nor repeats, nor leaves out anything: plain OPD.
NEUTRAL = [
    {"depth_start": 3, "depth_every": 3},  # as many turns as the environment gives
    {"depth_start": 99, "depth_every": 1},
    {"history_turns": 3},
]


@pytest.mark.parametrize("settings", NEUTRAL, ids=str)
def test_baselines_at_neutral_settings_draw_what_opd_draws(
    base: FrozenConfigDict, pair: tuple, settings: dict
) -> None:
    opd = changed(base, objective={"intervention": False})
    assert opd.env.max_turns == 3
    start = state(base, pair[0])
    drawn = source(opd, pair).draw(start, Stopwatch())
    ours = source(changed(opd, rollout=settings), pair).draw(start, Stopwatch())
    assert_same(ours, drawn)
    assert ours.metrics == drawn.metrics


def test_episodes_deepen_from_update_to_update(base: FrozenConfigDict, pair: tuple) -> None:
    opd = changed(base, objective={"intervention": False})
    deepening = changed(opd, rollout={"depth_start": 1, "depth_every": 2})
    for step, depth in ((0, 1), (1, 1), (2, 2), (5, 3)):
        assert depth_at(step, deepening.rollout) == depth
        now = state(base, pair[0], step)
        drawn = source(deepening, pair).draw(now, Stopwatch())
        whole = source(opd, pair).draw(now, Stopwatch())
        kept = whole.batch.turn_id < depth
        want = np.where(kept & (whole.batch.turn_id >= 0), whole.batch.tokens, 0)
        student = drawn.batch.turn_id >= 0
        width = student.shape[1]
        assert not want[:, width:].any()
        np.testing.assert_array_equal(np.where(student, drawn.batch.tokens, 0), want[:, :width])
        cut, episodes = drawn.metrics.get("end/depth", (0, 4))
        assert (cut > 0) == (depth < opd.env.max_turns)
        assert episodes == 4


def test_several_episodes_of_a_task_are_different_and_move_the_cursor_less(
    base: FrozenConfigDict, pair: tuple
) -> None:
    hot = {"per_task": 2, "temperature": 4.0}  # the student is sure of most of its tokens
    twice = changed(base, rollout=hot, objective={"intervention": False})
    drawing = source(twice, pair, [8, 0])
    drawn = drawing.draw(state(base, pair[0]), Stopwatch())
    assert drawing.cursor == [10, 0]
    env = environments.make_env(base.env)
    tasks = experiment.train_tasks(env.size("train"), seed=base.seed, start=8, count=2)
    for row, task in enumerate([tasks[0], tasks[0], tasks[1], tasks[1]]):
        prompt = pair[0].chat.first(env.system, env.reset("train", task).message)
        assert drawn.batch.tokens[row, : len(prompt)].tolist() == list(prompt)
    for first in (0, 2):
        assert (drawn.batch.tokens[first] != drawn.batch.tokens[first + 1]).any()


def test_two_rollouts_of_a_task_are_plain_distillation_on_a_list_that_names_it_twice(
    base: FrozenConfigDict, pair: tuple
) -> None:
    hot = {"per_task": 2, "temperature": 4.0}
    twice = changed(base, rollout=hot, objective={"intervention": False})
    start = state(base, pair[0])
    drawn = source(twice, pair, [8, 0]).draw(start, Stopwatch())

    size = environments.make_env(base.env).size("train")
    one, other = experiment.train_tasks(size, seed=base.seed, start=8, count=2)
    played = rollout(
        start.params,
        row_keys(jax.random.fold_in(start.rng, 0), range(4)),
        agent=experiment.make_agent(pair[0], twice.rollout),
        envs=environments.make_envs(base.env, 4),
        tasks=[("train", task) for task in (one, one, other, other)],
        depth=0,
    )
    train, turns = base.train, base.env.max_turns
    packed = pack(played, max_turns=turns, length_multiple=train.length_multiple)
    batch = make_batch(
        packed, np.full((4, turns), STRONG), response_multiple=train.response_multiple
    )
    assert_same(drawn, Experience(batch, {}))


def test_with_part_of_the_history_verdicts_follow_their_turns_into_rows(
    base: FrozenConfigDict, pair: tuple
) -> None:
    short = changed(base, rollout={"history_turns": 1})
    drawn = source(short, pair).draw(state(base, pair[0]), Stopwatch())
    batch = drawn.batch
    assert len(batch.tokens) % 4 == 0
    assert len(batch.tokens) > 4
    turns = [set(row[row >= 0].tolist()) for row in batch.turn_id]
    assert sum(map(len, turns)) == drawn.metrics["batch/turns"][0]
    failed = sum(
        int(batch.verdict[row, turn] == DET_FAIL) for row, own in enumerate(turns) for turn in own
    )
    assert failed == drawn.metrics["batch/failed"][0]
    skipped = sum(
        int(batch.verdict[row, turn] == SKIP) for row, own in enumerate(turns) for turn in own
    )
    assert skipped == drawn.metrics["verdict/skip"][0]


def test_prompts_are_those_of_the_tasks_in_their_shuffled_order(
    base: FrozenConfigDict, pair: tuple
) -> None:
    drawn = source(base, pair, [8, 0]).draw(state(base, pair[0]), Stopwatch())
    env = environments.make_env(base.env)
    tasks = experiment.train_tasks(env.size("train"), seed=base.seed, start=8, count=4)
    for row, task in enumerate(tasks):
        prompt = pair[0].chat.first(env.system, env.reset("train", task).message)
        assert drawn.batch.tokens[row, : len(prompt)].tolist() == list(prompt)
        assert (drawn.batch.turn_id[row, : len(prompt)] == NO_TURN).all()
        assert drawn.batch.turn_id[row, len(prompt)] == 0


def test_on_policy_the_student_plays_and_off_policy_the_teacher(
    base: FrozenConfigDict, pair: tuple
) -> None:
    off_policy = changed(base, data={"source": "teacher"}, objective={"intervention": False})
    on_policy = changed(base, objective={"intervention": False})
    as_it_is = state(base, pair[0])
    moved = as_it_is.replace(params=jax.tree.map(lambda x: 3.0 * x, as_it_is.params))
    draws = [
        [source(config, pair).draw(start, Stopwatch()) for start in (as_it_is, moved)]
        for config in (off_policy, on_policy)
    ]
    assert_same(*draws[0])
    assert_same(*draws[1], same=False)


def test_the_expert_plays_the_same_tasks_without_a_model(
    base: FrozenConfigDict, pair: tuple
) -> None:
    from_expert = changed(
        base,
        data={"source": "expert"},
        objective={"intervention": False},
        env={"max_turns": 15},  # enough for an expert
        rollout={"context_tokens": 512},
    )
    drawn = source(from_expert, pair, [8, 0]).draw(state(base, pair[0], step=3), Stopwatch())
    assert_same(source(from_expert, pair, [8, 0]).draw(state(base, pair[0]), Stopwatch()), drawn)
    total, count = drawn.metrics["batch/success"]
    assert total == count == 4
    env = environments.make_env(base.env)
    tasks = experiment.train_tasks(env.size("train"), seed=base.seed, start=8, count=4)
    student = pair[0]
    for row, task in enumerate(tasks):
        first = env.reset("train", task)
        prompt = student.chat.first(env.system, first.message)
        response = Expert(env.task, first, rng=random.Random(0)).respond(first)
        answer = [*student.tokenizer.encode(response), student.chat.stop_ids[0]]
        expected = [*prompt, *answer]
        assert drawn.batch.tokens[row, : len(expected)].tolist() == expected
        turns = [NO_TURN] * len(prompt) + [0] * len(answer)
        assert drawn.batch.turn_id[row, : len(expected)].tolist() == turns


def test_the_judge_is_asked_only_where_verdicts_count(base: FrozenConfigDict, pair: tuple) -> None:
    clock = Stopwatch()
    plain = changed(base, objective={"intervention": False})
    drawn = source(plain, pair).draw(state(base, pair[0]), clock)
    assert (drawn.batch.verdict == STRONG).all()
    assert not any(name.startswith(("judge/", "verdict/")) for name in drawn.metrics)
    assert set(clock.seconds) == {"rollout"}

    clock = Stopwatch()
    drawn = source(base, pair).draw(state(base, pair[0]), clock)
    assert set(clock.seconds) == {"rollout", "judge"}
    assert drawn.metrics["verdict/det_fail"] == drawn.metrics["batch/failed"]
    asked, turns = drawn.metrics["judge/asked"]
    assert asked + drawn.metrics["batch/failed"][0] == turns


def test_the_other_decoding_is_asked_every_so_many_updates(
    base: FrozenConfigDict, pair: tuple
) -> None:
    often = changed(base, judge={"agreement_every": 2})
    never = changed(base, judge={"agreement_every": 0})
    seen = {
        (name, step): "judge/decodings_agree"
        in source(config, pair).draw(state(base, pair[0], step), Stopwatch()).metrics
        for name, config in (("often", often), ("never", never))
        for step in range(3)
    }
    assert [key for key, there in seen.items() if there] == [("often", 0), ("often", 2)]


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({}, "`objective.intervention`"),
        ({"data": {"source": "teacher"}, "objective": {"intervention": False}}, "`data.source`"),
    ],
)
def test_who_is_to_judge_or_to_play_has_to_be_there(
    base: FrozenConfigDict, pair: tuple, groups: dict, named: str
) -> None:
    with pytest.raises(ValueError, match=f"{named}.*`teacher`"):
        source(changed(base, **groups), (pair[0], None))
    # Plain distillation asks the teacher only in the update.
    source(changed(base, objective={"intervention": False}), (pair[0], None)).close()


# --- Demonstrations by players


@pytest.fixture(scope="module")
def lessons() -> FrozenConfigDict:
    return load(
        f"{CONFIGS / 'household_pair.py'}:runlocal",
        [
            "--config.data.window=4",
            "--config.data.judge_examples=4",
            "--config.new_model.num_layers=1",
        ],
    )


@pytest.fixture(scope="module")
def beginner(lessons: FrozenConfigDict, mesh: jax.sharding.Mesh) -> experiment.LoadedModel:
    return experiment.new_model(lessons, mesh)


def test_lessons_go_on_from_any_cursor(
    lessons: FrozenConfigDict, beginner: experiment.LoadedModel
) -> None:
    start = state(lessons, beginner)
    first = source(lessons, (beginner, None))
    cursors, draws = [first.cursor], []
    for _ in range(9):
        draws.append(first.draw(start, Stopwatch()))
        cursors.append(first.cursor)
    first.close()
    assert cursors[-1][0] >= 1, "the draws should reach a second window"
    for number, drawn in enumerate(draws):
        resumed = source(lessons, (beginner, None), cursors[number])
        assert_same(resumed.draw(start, Stopwatch()), drawn)
        assert resumed.cursor == cursors[number + 1]
        resumed.close()


def test_lessons_hold_episodes_and_answers_to_the_judges_question(
    lessons: FrozenConfigDict, beginner: experiment.LoadedModel
) -> None:
    start, answers, episodes = state(lessons, beginner), set(), 0
    first = source(lessons, (beginner, None))
    while first.cursor[0] == 0:
        batch = first.draw(start, Stopwatch()).batch
        assert (batch.verdict == STRONG).all()
        for tokens, turn_id in zip(batch.tokens, batch.turn_id, strict=True):
            supervised = tokens[turn_id != NO_TURN].tolist()
            text = beginner.tokenizer.decode(supervised)
            if "Action:" in text:
                episodes += 1
            elif supervised:
                assert supervised[-1] == beginner.chat.stop_ids[0]
                answers.add(beginner.tokenizer.decode(supervised[:-1]))
    first.close()
    assert answers
    assert answers <= {"SKIP", "WEAK", "STRONG"}
    assert episodes >= 4
