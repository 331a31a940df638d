"""Live objects from settings: players, agents, labellers, demonstrators."""

import dataclasses
import json
from pathlib import Path

import pytest
from settings import one_device, read

from opd_jax.agent.conversation import Conversation
from opd_jax.config import build, load
from opd_jax.config.models import LoadedModel, load_student, new_model
from opd_jax.config.settings import Settings
from opd_jax.config.stored import store
from opd_jax.envs.make import make_env
from opd_jax.losses import NO_TURN, Verdict


def pair(*overrides: str) -> Settings:
    tiny = ("new_model.d_model=32", "new_model.num_layers=1")
    return read("household_pair:runlocal", *tiny, *overrides)


def test_every_split_is_looked_for() -> None:
    found = build.panels(read("quickstart"))
    assert list(found) == ["train", "valid_seen", "valid_unseen"]
    household = make_env(read("quickstart").env)
    assert all(p == (household.size(s), household.digest(s)) for s, p in found.items())
    for field, value in (("data.split", "far"), ("eval.splits", "train,far")):
        with pytest.raises(ValueError, match=rf"`{field}`.*'far'"):
            build.panels(read("quickstart", f"{field}={value}"))


def test_every_player_is_looked_for() -> None:
    build.check_players(read("quickstart"))
    build.check_players(pair())
    for field, names in (("player", "nobody"), ("distractors", "clumsy,nobody")):
        with pytest.raises(ValueError, match=rf"`demonstrations.{field}`: household .*'nobody'"):
            build.check_players(pair(f"demonstrations.{field}={names}"))
    build.check_players(read("searchqa_qwen3", "eval.who=before,random"))
    for field, names in (("data.source", "expert"), ("eval.who", "before,expert")):
        with pytest.raises(ValueError, match=rf"`{field}`: searchqa has no .*'expert'.* random"):
            build.check_players(read("searchqa_qwen3", f"{field}={names}"))
    nothing_listed = ("env.list_admissible=0", "eval.who=before,random")
    with pytest.raises(ValueError, match=r"`eval.who`: the random player .*`env.list_admissible`"):
        build.check_players(read("scienceworld_qwen3", *nothing_listed))


def test_an_agent_for_evaluation_differs_in_temperature_only() -> None:
    settings = read("quickstart", "rollout.temperature=0.8")
    student = load_student(settings, one_device())
    training = build.make_agent(student, settings)
    greedy = build.make_agent(student, settings, temperature=0.0)
    assert (training.decoding.temperature, greedy.decoding.temperature) == (0.8, 0.0)
    cooled = dataclasses.replace(training.decoding, temperature=0.0)
    assert dataclasses.replace(training, decoding=cooled) == greedy


def test_a_context_beyond_a_models_positions_is_refused_before_anything_is_loaded() -> None:
    build.check_named(read("quickstart"))
    with pytest.raises(ValueError, match=r"`rollout.context_tokens` = 9999 exceeds .* `student`"):
        build.check_named(read("quickstart", "rollout.context_tokens=9999"))
    with pytest.raises(ValueError, match=r"exceeds the 700 positions of `student` = 'new'"):
        build.check_named(pair("new_model.max_positions=700", "rollout.context_tokens=701"))
    with pytest.raises(ValueError, match="nowhere"):
        build.check_named(read("quickstart", "teacher=nowhere"))


def test_shapes_that_cannot_be_are_refused_before_anything_is_loaded() -> None:
    wide = ("mesh.fsdp=64", "rollout.batch=64", "eval.batch=64", "judge.batch=64")
    for fine in ((), ("lora.rank=4",), ("teacher_dtype=int8", "mesh.fsdp=2")):
        build.check_shapes(read("quickstart", *fine))
    build.check_shapes(pair())
    with pytest.raises(ValueError, match=r"`student` = 'embedded:student': .* `tensor` = 2; chan"):
        build.check_shapes(read("quickstart", "mesh.tensor=2"))
    with pytest.raises(
        ValueError, match=r"`teacher` = 'embedded:teacher': .* `fsdp` × `decode` = 64; change"
    ):
        build.check_shapes(read("quickstart", *wide))
    with pytest.raises(ValueError, match=r"`student` = 'embedded:student': `lora.rank`: expected"):
        build.check_shapes(read("quickstart", "lora.rank=999"))
    answer = ("judge.decode=generate", "judge.max_new_tokens=9999")
    with pytest.raises(
        ValueError, match=r"`judge.max_new_tokens` = 9999 leaves no room .*`teacher`"
    ):
        build.check_named(read("quickstart", *answer))
    build.check_named(read("quickstart", *answer), ["student"])


def test_a_workdir_is_no_model(tmp_path: Path) -> None:
    store(load("quickstart", []), tmp_path)
    for who in ("student", "teacher"):
        with pytest.raises(ValueError, match=f"workdir of a run.* --workdir={tmp_path} --out="):
            build.check_named(read("quickstart", f"{who}={tmp_path}"))


def test_without_verdicts_in_the_weight_every_turn_is_strong_and_nobody_is_asked() -> None:
    label = build.make_labeller(read("quickstart", "weight.by=uniform"), None)
    verdict, metrics, *_ = label([Conversation(task=None)] * 2, 0)
    assert verdict.tolist() == [[Verdict.STRONG] * read("quickstart").env.max_turns] * 2
    assert metrics == {}


# --- Demonstrations


@pytest.fixture(scope="module")
def beginner() -> LoadedModel:
    return new_model(pair(), one_device())


def episodes(settings: Settings, loaded: LoadedModel, numbers: range) -> list[Conversation]:
    play = build.make_demonstrator(settings, chat=loaded.chat)
    return [play(number) for number in numbers]


def test_a_demonstration_is_a_function_of_its_number(beginner: LoadedModel) -> None:
    forwards = episodes(pair(), beginner, range(6))
    assert episodes(pair(), beginner, range(5, -1, -1))[::-1] == forwards
    assert len({tuple(c.tokens) for c in forwards}) == 6
    assert episodes(pair("seed=1"), beginner, range(6)) != forwards


def imitated(conversation: Conversation) -> set[int]:
    return {turn for turn in conversation.turn_id if turn != NO_TURN}


def test_turns_of_a_distractor_are_history_and_never_imitated(beginner: LoadedModel) -> None:
    disturbed = episodes(pair("demonstrations.distraction=1.0"), beginner, range(12))
    shares = [len(imitated(c)) / len(c.turns) for c in disturbed]
    # The share of strayed turns is drawn for each episode, from none to all.
    assert min(shares) < 0.5 < max(shares)
    for alone in episodes(pair("demonstrations.distraction=0.0"), beginner, range(4)):
        assert imitated(alone) == set(range(len(alone.turns)))


def test_a_head_start_is_history_and_what_follows_is_imitated(beginner: LoadedModel) -> None:
    changes = ("demonstrations.distraction=0.0", "demonstrations.head_start=3")
    firsts = []
    for made in episodes(pair(*changes), beginner, range(30)):
        first = min(imitated(made), default=len(made.turns))
        assert imitated(made) == set(range(first, len(made.turns)))
        firsts.append(first)
    assert set(firsts) == {0, 1, 2, 3}
    assert 8 < firsts.count(0) < 22


def test_a_demonstration_goes_on_from_an_episode_of_a_model(
    beginner: LoadedModel, tmp_path: Path
) -> None:
    file = tmp_path / "student.jsonl"
    settings = pair("demonstrations.distraction=1.0")
    others = [c for c in episodes(settings, beginner, range(40, 60)) if len(c.turns) > 3]
    lines = [
        {
            "messages": [message._asdict() for message in c.messages],
            "task": {"id": c.task.id, "split": c.split, "index": c.index},
        }
        for c in others
        if c.task
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = (
        "demonstrations.distractors=histories,",
        f"demonstrations.histories={file}",
        "demonstrations.distraction=0.0",
        "demonstrations.head_start=3",
    )
    said = {c.index: [turn.response for turn in c.turns] for c in others}
    firsts = []
    for number, made in enumerate(episodes(pair(*changes), beginner, range(30))):
        first = min(imitated(made), default=len(made.turns))
        assert imitated(made) == set(range(first, len(made.turns)))
        assert [turn.response for turn in made.turns[:first]] == said.get(made.index, [])[:first]
        assert first or made.index == number
        firsts.append(first)
    assert set(firsts) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"histories`.*'train', expected `data.split` = 'dev'"):
        episodes(pair(*changes, "data.split=dev"), beginner, range(1))
    large = pair(*changes, "demonstrations.sizes=large,")
    with pytest.raises(ValueError, match=r"histories`.*household/small/train/\d+, .*sizes"):
        episodes(large, beginner, range(10))


def test_larger_rooms_come_in_as_episodes_go_on(beginner: LoadedModel) -> None:
    settings = pair("demonstrations.sizes=small,large", "demonstrations.sizes_from=6")
    places = [c.task.id.split("/")[1] for c in episodes(settings, beginner, range(20)) if c.task]
    assert set(places[:6]) == {"small"}
    assert set(places[6:]) == {"small", "large"}
