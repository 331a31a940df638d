"""Learning from a file: what is read back is what was written, by a run or by hand."""

import dataclasses
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from settings import one_device, read

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Actor, Conversation, Turn
from opd_jax.agent.rollout import beginning, rollout, row_keys
from opd_jax.agent.session import Response
from opd_jax.config import build
from opd_jax.config.models import LoadedModel, load_student
from opd_jax.config.settings import Settings
from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.make import make_env
from opd_jax.envs.react import Random
from opd_jax.experience.demonstrations import demonstrate
from opd_jax.experience.recorded import read_conversations, recorded, recorded_panel
from opd_jax.experience.source import Source
from opd_jax.experience.tasks import Panel
from opd_jax.judge.labels import env_labels
from opd_jax.learner.train_state import TrainState, init_state
from opd_jax.losses import NO_TURN
from opd_jax.report.episodes import Episode, episode, write_episodes

pytestmark = pytest.mark.usefixtures("compile_quickly")

DOCS = Path(__file__).parents[2] / "docs" / "episodes.md"


def expert(task: Task, first: Observation, rng: random.Random) -> Expert:
    return Expert(task, first, rng=rng)


def stray(task: Task, first: Observation, rng: random.Random) -> Random:
    return Random(rng=rng)


@pytest.fixture(scope="module")
def agent() -> Agent:
    settings = read("quickstart:runlocal", "rollout.context_tokens=1000")
    return build.make_agent(load_student(settings, one_device()), settings)


def with_context(agent: Agent, context_tokens: int) -> Agent:
    decoding = dataclasses.replace(agent.decoding, context_tokens=context_tokens, turn_tokens=8)
    return dataclasses.replace(agent, decoding=decoding)


def demonstrated(agent: Agent, index: int, *, max_turns: int = 12) -> Conversation:
    """An expert's episode in which a distractor plays some turns."""
    return demonstrate(
        Household(size="small", max_turns=max_turns, show_admissible=2),
        "train",
        index,
        player=expert,
        distractor=stray,
        distraction=0.3,
        rng=random.Random(index),
        chat=agent.chat,
        context_tokens=agent.decoding.context_tokens,
    )


def line_of(conversation: Conversation, agent: Agent) -> Episode:
    """The line, through JSON."""
    decode = agent.tokenizer.decode
    line = episode(conversation, who="train", update=0, actor="teacher", decode=decode)
    return json.loads(json.dumps(line))


def assert_same(got: Conversation, want: Conversation) -> None:
    """Equal but for what no line holds: the goal, the scene, and what was admissible."""
    assert got.task is not None
    assert want.task is not None
    assert (got.task.id, got.task.type) == (want.task.id, want.task.type)
    same = ("split", "index", "messages", "tokens", "turn_id", "spans", "end", "measures")
    for name in same:
        assert getattr(got, name) == getattr(want, name), name
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=1e-4)
    for a, b in zip(got.turns, want.turns, strict=True):
        for name in ("response", "stop", "action", "failure", "oracle", "record"):
            assert getattr(a, name) == getattr(b, name), name
    assert got.score == pytest.approx(want.score, rel=1e-4)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_demonstrations_are_read_back_with_and_without_their_tokens(
    agent: Agent, index: int
) -> None:
    played = demonstrated(agent, index)
    line = line_of(played, agent)
    assert_same(recorded(line, agent=agent), played)
    actors = [turn["actor"] for turn in line["turns"]]
    given = [played.turn_id[start] == NO_TURN for start, _ in played.spans]
    assert actors == ["replay" if is_given else "teacher" for is_given in given]
    # Without its tokens the chat format writes the same ones.
    del line["tokens"]
    assert_same(recorded(line, agent=agent), played)
    # And so does the template of the tokenizer.
    text = agent.tokenizer.apply_chat_template(line["messages"], tokenize=False)
    assert text.startswith(agent.tokenizer.decode(played.tokens))


def test_some_turns_were_replayed(agent: Agent) -> None:
    turns = [t for i in range(4) for t in line_of(demonstrated(agent, i), agent)["turns"]]
    assert {turn["actor"] for turn in turns} == {"teacher", "replay"}


def test_a_plain_conversation_is_learnt_from_whole(agent: Agent) -> None:
    line = line_of(demonstrated(agent, 0), agent)
    plain = recorded({"messages": line["messages"]}, agent=agent)
    assert all(plain.turn_id[start] == k for k, (start, _) in enumerate(plain.spans))
    assert (plain.end, plain.success) == ("unknown", False)
    done = recorded({"messages": line["messages"], "success": True}, agent=agent)
    assert done.success


def test_an_episode_is_cut_where_the_context_ends(agent: Agent) -> None:
    line = line_of(demonstrated(agent, 0), agent)
    whole = recorded(line, agent=agent)
    for fits, (start, end) in enumerate(whole.spans):
        for limit, turns in ((end - 1, fits), (end, fits + 1)):
            cut = recorded(line, agent=with_context(agent, limit))
            assert len(cut.turns) == turns
            assert cut.tokens == whole.tokens[: len(cut.tokens)]
            assert (cut.end == "context") == (turns < len(whole.turns))
        assert start < end
    nothing = recorded(line, agent=with_context(agent, 13))
    assert nothing.unfit


# --- What a model sampled


@pytest.fixture(scope="module")
def base(small: tuple[str, ...]) -> Settings:
    # The student is sure of its tokens: at this temperature they are not those of their text.
    return read("quickstart:runlocal", *small, "rollout.temperature=6")


@pytest.fixture(scope="module")
def student(base: Settings) -> LoadedModel:
    return load_student(base, one_device())


def fresh(settings: Settings, student: LoadedModel) -> TrainState:
    return init_state(student.params, build.optimizer(settings), seed=settings.seed)


def test_what_was_sampled_is_learnt_as_it_was_sampled(base: Settings, student: LoadedModel) -> None:
    tasks = build.panels(base)["train"]
    source = build.make_source(base, student, None, tasks=tasks)
    played = source.play(fresh(base, student)).conversations
    source.close()
    agent, changed = build.make_agent(student, base), 0
    for conversation in played:
        line = line_of(conversation, agent)
        assert_same(recorded(line, agent=agent), conversation)
        # Also where turns carry no loss, whatever ended them.
        for silent in (range(len(conversation.turns)), range(0, len(conversation.turns), 2)):
            given = [NO_TURN if turn in silent else turn for turn in conversation.turn_id]
            other = dataclasses.replace(conversation, turn_id=given)
            assert_same(recorded(line_of(other, agent), agent=agent), other)
        del line["tokens"]
        changed += recorded(line, agent=agent).tokens != conversation.tokens
    assert changed > 0, "the text should encode to other tokens than were sampled"
    assert {turn.stop for c in played for turn in c.turns} > {"turn_budget"}


def test_tokens_of_another_tokenizer_are_not_taken(agent: Agent) -> None:
    line = line_of(demonstrated(agent, 0), agent)
    want = recorded(line, agent=agent)
    for wrong in (
        [token + 1 for token in line["tokens"]["id"]],
        [*line["tokens"]["id"][1:], 0],
        [0] * len(line["tokens"]["id"]),
    ):
        other = line | {"tokens": line["tokens"] | {"id": wrong}}
        assert recorded(other, agent=agent).tokens == want.tokens


# --- The source


def file_source(settings: Settings, student: LoadedModel, path: Path, **data: Any) -> Source:
    section = dataclasses.replace(settings.data, source=f"episodes:{path}", **data)
    changed = dataclasses.replace(settings, data=section)
    tasks = build.panels(changed)[changed.data.tasks]
    return build.make_source(changed, student, None, tasks=tasks)


@pytest.fixture(scope="module")
def sft(small: tuple[str, ...]) -> Settings:
    more = ("data.source=expert", "env.max_turns=15", "rollout.context_tokens=512")
    return read("quickstart:runlocal,method=sft", *small, *more, "train.length_multiple=512")


def test_learning_from_a_file_is_learning_from_the_same_episodes_in_memory(
    sft: Settings, student: LoadedModel, tmp_path: Path
) -> None:
    # Both sources take eight episodes in the same shuffled order.
    in_memory = build.make_source(sft, student, None, tasks=Panel(8, ""))
    state = fresh(sft, student)
    agent, by_index = build.make_agent(student, sft), dict[int, Conversation]()
    plays = [in_memory.play(state) for _ in range(4)]
    for played in plays:
        by_index |= {c.index: c for c in played.conversations}
    path = tmp_path / "expert.jsonl"
    write_episodes(path, [line_of(by_index[n], agent) for n in range(8)])
    from_file = file_source(sft, student, path)
    pack, other = build.make_pack(sft, student.config), state
    strong = build.make_labeller(sft, None)
    step = build.make_update(sft, student, None, state)
    ours, theirs = fresh(sft, student), fresh(sft, student)
    for number, played in enumerate(plays):
        same = from_file.play(other)
        assert from_file.cursor == [4 * (number + 1), 0]
        assert [c.index for c in same.conversations] == [c.index for c in played.conversations]
        batches = [pack(p, strong(p.conversations, 0).verdict) for p in (played, same)]
        jax.tree.map(np.testing.assert_array_equal, *batches)
        (ours, a), (theirs, b) = step(ours, batches[0], None), step(theirs, batches[1], None)
        assert a["loss"] == b["loss"] > 0
    for x, y in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    in_memory.close()
    from_file.close()


def write(path: Path, lines: Sequence[Episode]) -> Path:
    write_episodes(path, lines)
    return path


def test_only_successful_episodes_on_request(agent: Agent, tmp_path: Path) -> None:
    played = [demonstrated(agent, n, max_turns=2 + 30 * (n % 2)) for n in range(4)]
    lines = [line_of(c, agent) for c in played]
    assert [line["success"] for line in lines] == [False, True, False, True]
    broken = lines[0] | {"end": "broken"}
    path = write(tmp_path / "file.jsonl", [broken, *lines])

    def found(*, only: bool) -> list[int]:
        read = read_conversations(path, agent=agent, only_success=only, max_turns=32)
        return [c.index for c in read]

    assert found(only=False) == [0, 1, 2, 3]
    assert found(only=True) == [1, 3]
    assert recorded_panel(path).size == 5
    with pytest.raises(ValueError, match=r"`env.max_turns` = 3: an episode of `.*file.jsonl` has"):
        read_conversations(path, agent=agent, only_success=False, max_turns=3)
    write(path, lines[::2])
    with pytest.raises(ValueError, match=r"`data.source`: .* no episode that succeeded"):
        found(only=True)


def test_a_panel_tells_files_apart(agent: Agent, tmp_path: Path) -> None:
    lines = [line_of(demonstrated(agent, n), agent) for n in range(2)]
    one, two = write(tmp_path / "one", lines), write(tmp_path / "two", lines[::-1])
    assert recorded_panel(one) == recorded_panel(write(tmp_path / "again", lines))
    assert recorded_panel(one) != recorded_panel(two)


@pytest.mark.parametrize(
    "wrong",
    [
        {"turns": {"actor": "student"}},
        {"task": "train/3"},
        {"tokens": {"id": [1]}},
        {"tokens": {"id": [1, 2], "turn": [0], "sampled_logprob": [0.0]}},
    ],
)
def test_a_field_of_another_form_is_named_with_the_file(
    wrong: dict, agent: Agent, tmp_path: Path
) -> None:
    line = line_of(demonstrated(agent, 0), agent) | wrong
    path = write(tmp_path / "file", [line])
    with pytest.raises(ValueError, match=r"file`: an episode, .* of another form"):
        read_conversations(path, agent=agent, only_success=False, max_turns=12)


# --- Playing on


def as_written(turns: Sequence[Turn]) -> list[Turn]:
    """Replayed turns as if they were not."""
    return [dataclasses.replace(turn, actor=Actor.STUDENT) for turn in turns]


def lines_of(played: Sequence[Conversation], agent: Agent) -> list[Episode]:
    return [line_of(c, agent) for c in played]


def test_the_student_goes_on_from_within_the_episodes_of_a_file(
    base: Settings, student: LoadedModel, tmp_path: Path
) -> None:
    state, agent = fresh(base, student), build.make_agent(student, base)
    source = build.make_source(base, student, None, tasks=build.panels(base)["train"])
    before = source.play(state).conversations
    source.close()
    path = write(tmp_path / "file.jsonl", lines_of(before, agent))
    changed = dataclasses.replace(
        base, data=dataclasses.replace(base.data, source=f"prefixes:{path}")
    )

    def played(step: int) -> list[Conversation]:
        tasks = build.panels(changed)[changed.data.tasks]
        on = build.make_source(changed, student, None, tasks=tasks)
        found = on.play(state.replace(step=state.step + step)).conversations
        on.close()
        return found

    first = played(0)
    assert played(0) == first != played(1)
    begun = [sum(c.is_given(k) for k in range(len(c.turns))) for c in first]
    assert set(begun) > {0}
    assert sorted(c.index for c in first) == sorted(c.index for c in before)
    labels = env_labels(first, max_turns=base.env.max_turns)
    for row, (c, turns) in enumerate(zip(first, begun, strict=True)):
        (recorded,) = (other for other in before if other.index == c.index)
        assert 0 <= turns < len(recorded.turns)
        assert {turn.actor for turn in c.turns[:turns]} <= {Actor.REPLAY}
        assert (
            as_written(c.turns[:turns]) == recorded.turns[:turns]
        )  # the environment answers alike
        start = recorded.spans[turns][0]
        assert c.tokens[:start] == recorded.tokens[:start]
        assert c.turn_id[:start] == [NO_TURN] * start
        assert c.turn_id[start] == turns
        assert labels.played[row].tolist()[: turns + 1] == [False] * turns + [True]


def test_of_a_recorded_episode_the_student_plays_the_last_turns(
    base: Settings, student: LoadedModel, tmp_path: Path
) -> None:
    state, agent = fresh(base, student), build.make_agent(student, base)
    source = build.make_source(base, student, None, tasks=build.panels(base)["train"])
    before = {c.index: c for c in source.play(state).conversations}
    source.close()
    lines = lines_of(list(before.values()), agent)
    lines[0] |= {"success": False}
    path = write(
        tmp_path / "file.jsonl", [line | {"success": True} for line in lines[1:]] + lines[:1]
    )
    how = dict(depth_start=1, depth_every=2, depth_from="back")
    changed = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, source=f"prefixes:{path}", only_success=True),
        rollout=dataclasses.replace(base.rollout, **how),
    )
    on = build.make_source(changed, student, None, tasks=build.panels(changed)[changed.data.tasks])
    for step, last in ((0, 1), (1, 1), (2, 2), (4, 3), (99, 50)):
        for c in on.play(state.replace(step=state.step + step)).conversations:
            whole = before[c.index]
            turns = max(len(whole.turns) - last, 0)
            assert [turn.actor for turn in c.turns[:turns]] == [Actor.REPLAY] * turns
            assert {turn.actor for turn in c.turns[turns:]} == {Actor.STUDENT}
            assert c.tokens[: whole.spans[turns][0]] == whole.tokens[: whole.spans[turns][0]]
            assert c.index != lines[0]["task"]["index"]
    on.close()


def test_with_its_own_key_an_episode_goes_on_as_it_went(
    base: Settings, student: LoadedModel
) -> None:
    agent, envs = build.make_agent(student, base), [make_env(base.env) for _ in range(4)]
    keys, tasks = row_keys(jax.random.key(3), range(4)), [("train", index) for index in range(4)]
    how: dict[str, Any] = dict(agent=agent, envs=envs, tasks=tasks, depth=0)
    whole = rollout(student.params, keys, **how)
    replay = [beginning(c, turns=turns) for turns, c in enumerate(whole)]
    assert [len(responses) for responses in replay] == [0, 1, 2, 3]
    for c in whole:  # what the household had told before each turn
        assert [len(turn.record["tried"]) for turn in c.turns] == [*range(len(c.turns))]
    for turns, (c, want) in enumerate(
        zip(rollout(student.params, keys, **how, replay=replay), whole, strict=True)
    ):
        assert (c.tokens, c.messages) == (want.tokens, want.messages)
        assert as_written(c.turns) == want.turns
        assert (c.end, c.spans) == (want.end, want.spans)
        given = [NO_TURN if 0 <= turn < turns else turn for turn in want.turn_id]
        assert c.turn_id == given
        own = [n for n, turn in enumerate(given) if turn != NO_TURN]
        np.testing.assert_allclose(
            np.array(c.logprobs)[own], np.array(want.logprobs)[own], atol=1e-4
        )


def test_what_does_not_fit_is_not_replayed(base: Settings, student: LoadedModel) -> None:
    agent = build.make_agent(student, base)
    how: dict[str, Any] = dict(tasks=[("train", 0)], depth=0, envs=[make_env(base.env)])
    keys = row_keys(jax.random.key(0), [0])
    whole = rollout(student.params, keys, agent=agent, **how)[0]
    start, end = whole.spans[0]
    response = Response(whole.tokens[start:end], [0.0] * (end - start), whole.turns[0].stop)
    for room, given in ((end, False), (end + 1, True)):
        small = with_context(agent, room)
        (c,) = rollout(student.params, keys, agent=small, **how, replay=[[response]])
        assert c.is_given(0) == given


def test_a_plain_conversation_cannot_be_played_again(
    base: Settings, student: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "plain"
    path.write_text(json.dumps({"messages": [{"role": r, "content": "x"} for r in WHO]}) + "\n")
    section = dataclasses.replace(base.data, source=f"prefixes:{path}")
    with pytest.raises(ValueError, match=r"`data.source`: .*`split` and `index`"):
        build.make_source(
            dataclasses.replace(base, data=section), student, None, tasks=Panel(1, "")
        )


WHO = ("user", "assistant")


# --- The page


def examples() -> list[str]:
    return re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def test_the_files_of_the_page_are_learnt_from(agent: Agent, tmp_path: Path) -> None:
    by_hand, by_a_run = examples()
    path = tmp_path / "file.jsonl"
    path.write_text(by_hand + json.dumps(json.loads(by_a_run)) + "\n")
    found = read_conversations(path, agent=agent, only_success=False, max_turns=12)
    assert [c.success for c in found] == [False, True, True]
    assert [len(c.turns) for c in found] == [1, 1, 1]
    assert found[0].turns[0].response == "Thought: it is shut.\nAction: open door 1"
    assert [message.role for message in found[1].messages] == ["system", "user", "assistant"]


def test_the_columns_of_the_page_have_their_lengths() -> None:
    line = json.loads(examples()[1])
    tokens, own = line["tokens"], line["student_tokens"]
    assert {len(column) for column in tokens.values()} == {len(tokens["id"])}
    assert {len(column) for column in own.values()} == {len(own["position"])}
    assert own["position"] == [n for n, turn in enumerate(tokens["turn"]) if turn >= 0]
    of_turn = line["turns"][0]
    weight = line["z"] * of_turn["intervention"] * of_turn["confidence"]
    assert own["weight"] == pytest.approx([weight] * 4)
