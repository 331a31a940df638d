"""Live objects from settings: players, agents, labellers, demonstrators."""

import dataclasses

import jax
import pytest

from opd_jax.agent.conversation import Conversation
from opd_jax.config import build, load
from opd_jax.config.models import LoadedModel, load_student, load_teacher, new_model
from opd_jax.config.settings import Settings, read_settings
from opd_jax.envs.make import make_env
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.runtime.mesh import make_mesh


def read(*overrides: str, name: str = "quickstart") -> Settings:
    return read_settings(load(name, [f"--config.{word}" for word in overrides]))


def pair(*overrides: str) -> Settings:
    tiny = ("new_model.d_model=32", "new_model.num_layers=1")
    return read(*tiny, *overrides, name="household_pair:runlocal")


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def test_every_split_is_looked_for() -> None:
    found = build.panels(read())
    assert list(found) == ["train", "valid_seen", "valid_unseen"]
    household = make_env(read().env)
    assert all(p == (household.size(s), household.digest(s)) for s, p in found.items())
    for field, value in (("data.split", "dev"), ("eval.splits", "train,dev")):
        with pytest.raises(ValueError, match=rf"`{field}`.*'dev'"):
            build.panels(read(f"{field}={value}"))


def test_every_player_is_looked_for() -> None:
    build.check_players(read())
    build.check_players(pair())
    for field, names in (("player", "nobody"), ("distractors", "clumsy,nobody")):
        with pytest.raises(ValueError, match=rf"`demonstrations.{field}`: household .*'nobody'"):
            build.check_players(pair(f"demonstrations.{field}={names}"))
    build.check_players(read("eval.who=before,random", name="searchqa_qwen3"))
    for field, names in (("data.source", "expert"), ("eval.who", "before,expert")):
        with pytest.raises(ValueError, match=rf"`{field}`: searchqa has no .*'expert'.* random"):
            build.check_players(read(f"{field}={names}", name="searchqa_qwen3"))


def test_an_agent_for_evaluation_differs_in_temperature_only(mesh: jax.sharding.Mesh) -> None:
    settings = read("rollout.temperature=0.8")
    student = load_student(settings, mesh)
    training = build.make_agent(student, settings)
    greedy = build.make_agent(student, settings, temperature=0.0)
    assert (training.decoding.temperature, greedy.decoding.temperature) == (0.8, 0.0)
    cooled = dataclasses.replace(training.decoding, temperature=0.0)
    assert dataclasses.replace(training, decoding=cooled) == greedy
    with pytest.raises(ValueError, match=r"`rollout.context_tokens` = 9999 exceeds the .*student"):
        build.make_agent(student, read("rollout.context_tokens=9999"))


def test_without_intervention_every_turn_is_strong_and_nobody_is_asked(
    mesh: jax.sharding.Mesh,
) -> None:
    label = build.make_labeller(read("objective.intervention=false"), None)
    verdict, metrics = label([Conversation(task=None)] * 2, 0)
    assert verdict.tolist() == [[Verdict.STRONG] * read().env.max_turns] * 2
    assert metrics == {}
    settings = read()
    asked, _ = build.make_labeller(settings, load_teacher(settings, mesh))(
        [Conversation(task=None, end="success")], 1
    )
    assert asked.shape == (1, settings.env.max_turns)


# --- Demonstrations


@pytest.fixture(scope="module")
def beginner(mesh: jax.sharding.Mesh) -> LoadedModel:
    return new_model(pair(), mesh)


def episodes(settings: Settings, loaded: LoadedModel, numbers: range) -> list[Conversation]:
    play = build.make_demonstrator(settings, tokenizer=loaded.tokenizer, chat=loaded.chat)
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


def test_larger_rooms_come_in_as_episodes_go_on(beginner: LoadedModel) -> None:
    settings = pair("demonstrations.sizes=small,large", "demonstrations.sizes_from=6")
    places = [c.task.id.split("/")[1] for c in episodes(settings, beginner, range(20)) if c.task]
    assert set(places[:6]) == {"small"}
    assert set(places[6:]) == {"small", "large"}
