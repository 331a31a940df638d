"""From a config to live objects."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from opd_jax import model
from opd_jax.config import build as experiment
from opd_jax.config import load
from opd_jax.experience import environments
from opd_jax.experience.players import check_players, make_player
from opd_jax.losses import NO_TURN
from opd_jax.model.projections import Int8Weight
from opd_jax.runtime.mesh import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"


def quickstart(*overrides: str) -> FrozenConfigDict:
    return load(str(CONFIGS / "quickstart.py"), overrides)


def pair_config(*overrides: str) -> FrozenConfigDict:
    tiny = ("--config.new_model.d_model=32", "--config.new_model.num_layers=1")
    return load(str(CONFIGS / "household_pair.py:runlocal"), [*tiny, *overrides])


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def logits(loaded: experiment.LoadedModel, tokens: np.ndarray) -> np.ndarray:
    hidden = model.forward(
        loaded.params, tokens, config=loaded.config, query_chunk=64, remat="none"
    )
    return np.asarray(hidden @ model.head(loaded.params))


# --- Tasks


def test_an_epoch_holds_every_task_once_and_the_next_has_another_order() -> None:
    two = experiment.train_tasks(50, seed=3, start=0, count=100)
    assert sorted(two[:50]) == sorted(two[50:]) == list(range(50))
    assert two[:50] != two[50:]
    assert two[:50] != list(range(50))


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_tasks_drawn_in_batches_are_those_drawn_at_once(batch: int) -> None:
    at_once = experiment.train_tasks(20, seed=0, start=0, count=96)
    in_batches = [
        task
        for start in range(0, 96, batch)
        for task in experiment.train_tasks(20, seed=0, start=start, count=batch)
    ]
    assert in_batches[:96] == at_once
    # Resumed in the middle, with nothing drawn before in this process.
    assert experiment.train_tasks(20, seed=0, start=45, count=20) == at_once[45:65]


def test_the_seed_orders_the_tasks() -> None:
    draws = {tuple(experiment.train_tasks(30, seed=s, start=0, count=30)) for s in range(5)}
    assert len(draws) == 5


# --- Environments and players


class Scripted:
    """An environment with as many tasks as it is told."""

    def __init__(self, tasks: int):
        self.tasks = tasks

    def size(self, split: str) -> int:
        if split != "train":
            raise ValueError(f"no split {split!r}; there is train")
        return self.tasks


def test_the_size_of_a_split_or_the_field_that_named_it() -> None:
    assert environments.split_size(Scripted(3), "data.split", "train") == 3
    with pytest.raises(ValueError, match=r"`data.split`.*'train' has no tasks"):
        environments.split_size(Scripted(0), "data.split", "train")
    with pytest.raises(ValueError, match=r"`eval.splits`.*'dev'.*train"):
        environments.split_size(Scripted(3), "eval.splits", "dev")


def test_every_split_is_looked_for() -> None:
    found = environments.panels(quickstart())
    assert list(found) == ["train", "valid_seen", "valid_unseen"]
    household = environments.make_env(quickstart().env)
    assert all(p == (household.size(s), household.digest(s)) for s, p in found.items())
    with pytest.raises(ValueError, match=r"`data.split`.*'dev'"):
        environments.panels(quickstart("--config.data.split=dev"))
    with pytest.raises(ValueError, match=r"`eval.splits`.*'dev'"):
        environments.panels(quickstart("--config.eval.splits=train,dev"))


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match=r"`env.name`.*household.*'office'"):
        environments.make_env(quickstart("--config.env.name=office").env)
    with pytest.raises(ValueError, match=r"`data.player`.*household.*'nobody'.*expert"):
        make_player("nobody", pair_config(), field="data.player")


def test_every_player_is_looked_for() -> None:
    check_players(quickstart())
    check_players(pair_config())
    with pytest.raises(ValueError, match=r"`data.player`: household has no .*'nobody'"):
        check_players(pair_config("--config.data.player=nobody"))
    with pytest.raises(ValueError, match=r"`data.distractors`: household has no .*'nobody'"):
        check_players(pair_config("--config.data.distractors=clumsy,nobody"))
    searchqa = load(f"{CONFIGS / 'searchqa_qwen3.py'}", ["--config.eval.who=before,random"])
    check_players(searchqa)
    for field, word in (("data.source", "expert"), ("eval.who", "before,expert")):
        asked = load(f"{CONFIGS / 'searchqa_qwen3.py'}", [f"--config.{field}={word}"])
        with pytest.raises(ValueError, match=rf"`{field}`: searchqa has no .*'expert'.* random"):
            check_players(asked)


@pytest.mark.parametrize(
    ("file", "name", "wrong"),
    [
        ("quickstart", "alfworld", "`env.size` is none .*`env.data` is missing"),
        ("quickstart", "scienceworld", "`env.size` is none .*`env.heap_mb` is missing"),
        ("quickstart", "factbookqa", "`env.size` is none .*`env.max_searches` is missing"),
        ("quickstart", "searchqa", "`env.size` is none .*`env.retriever` is missing"),
        ("alfworld_qwen3", "household", "`env.data` is none .*`env.size` is missing"),
    ],
)
def test_fields_of_another_environment_are_named(file: str, name: str, wrong: str) -> None:
    config = load(f"{CONFIGS / file}.py", [f"--config.env.name={name}"])
    with pytest.raises(ValueError, match=rf"`env.name` = '{name}' does not fit .*{wrong}"):
        environments.make_env(config.env)


# --- Models


def test_names_stand_for_folders() -> None:
    assert (experiment.model_folder("embedded:student") / "config.json").is_file()
    assert experiment.model_folder("some/where") == Path("some/where")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_in_the_dtype_asked_for(dtype: str, mesh: jax.sharding.Mesh) -> None:
    loaded = experiment.load_model("embedded:student", dtype=dtype, mesh=mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
    assert loaded.config.vocab_size == len(loaded.tokenizer)


def test_a_teacher_in_int8_computes_in_bfloat16(mesh: jax.sharding.Mesh) -> None:
    teacher = experiment.load_teacher(quickstart("--config.teacher_dtype=int8"), mesh)
    assert teacher is not None
    dtypes = {
        key: jax.tree.map(lambda x: x.dtype, x) for key, x in teacher.params["layers"].items()
    }
    assert dtypes["q"] == dtypes["down"] == Int8Weight(jnp.int8, jnp.float32)
    assert dtypes["q_norm"] == teacher.params["embed"].dtype == jnp.bfloat16
    assert logits(teacher, np.arange(24, dtype=np.int32)[None]).dtype == jnp.bfloat16


def with_padded_vocabulary(source: Path, target: Path, rows: int) -> Path:
    """A copy of a model folder whose embedding has `rows` more rows, as large models have."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    more = np.full((rows, tensors[name].shape[1]), 3.0, tensors[name].dtype)
    save_file(tensors | {name: np.concatenate([tensors[name], more])}, file, {"format": "pt"})
    settings = json.loads((target / "config.json").read_text())
    settings["vocab_size"] += rows
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_rows_that_pad_a_vocabulary_are_cut_of_an_int8_teacher(
    mesh: jax.sharding.Mesh, tmp_path: Path
) -> None:
    folder = with_padded_vocabulary(experiment.EMBEDDED / "teacher", tmp_path / "teacher", rows=10)
    low = "--config.teacher_dtype=int8"
    plain = experiment.load_teacher(quickstart(low), mesh)
    padded = experiment.load_teacher(quickstart(low, f"--config.teacher={folder}"), mesh)
    assert plain is not None
    assert padded is not None
    assert padded.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, padded.params, plain.params)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_rows_that_pad_one_vocabulary_are_cut(
    who: str, mesh: jax.sharding.Mesh, tmp_path: Path
) -> None:
    plain = quickstart()
    folder = with_padded_vocabulary(experiment.EMBEDDED / who, tmp_path / who, rows=10)
    expected = experiment.load_pair(plain, mesh)
    padded = experiment.load_pair(quickstart(f"--config.{who}={folder}"), mesh)
    tokens = np.arange(24, dtype=np.int32)[None]
    for ours, theirs in zip(padded, expected, strict=True):
        assert ours.config.vocab_size == theirs.config.vocab_size
        np.testing.assert_array_equal(logits(ours, tokens), logits(theirs, tokens))
    alone = experiment.load_student(quickstart(f"--config.{who}={folder}"), mesh)
    np.testing.assert_array_equal(logits(alone, tokens), logits(expected[0], tokens))


def test_a_config_without_a_teacher_loads_none(mesh: jax.sharding.Mesh) -> None:
    student, teacher = experiment.load_pair(quickstart("--config.teacher="), mesh)
    assert teacher is None
    assert student.folder == experiment.EMBEDDED / "student"


def test_a_new_model_is_a_function_of_the_seed(mesh: jax.sharding.Mesh) -> None:
    def embedding(seed: int) -> np.ndarray:
        made, teacher = experiment.load_pair(pair_config(f"--config.seed={seed}"), mesh)
        assert teacher is None
        assert made.config.vocab_size == len(made.tokenizer)
        assert (made.config.d_model, made.config.num_layers) == (32, 1)
        return np.asarray(made.params["embed"])

    np.testing.assert_array_equal(embedding(1), embedding(1))
    assert not np.array_equal(embedding(1), embedding(2))


# --- Agents and objectives


def test_an_agent_for_evaluation_differs_in_temperature_only(mesh: jax.sharding.Mesh) -> None:
    config = quickstart("--config.rollout.temperature=0.8")
    loaded = experiment.load_model(config.student, dtype="float32", mesh=mesh)
    training = experiment.make_agent(loaded, config.rollout)
    greedy = experiment.make_agent(loaded, config.rollout, temperature=0.0)
    assert (training.sampling.temperature, greedy.sampling.temperature) == (0.8, 0.0)
    cooled = dataclasses.replace(training.sampling, temperature=0.0)
    assert dataclasses.replace(training, sampling=cooled) == greedy


def test_no_bound_on_z_is_written_as_zero() -> None:
    assert experiment.make_objective(quickstart().objective).max_z is None
    bounded = quickstart("--config.objective.max_z=4")
    assert experiment.make_objective(bounded.objective).max_z == 4.0


# --- Demonstrations


@pytest.fixture(scope="module")
def beginner(mesh: jax.sharding.Mesh) -> experiment.LoadedModel:
    return experiment.new_model(pair_config(), mesh)


def demonstrator(config: FrozenConfigDict, loaded: experiment.LoadedModel):
    return experiment.make_demonstrator(config, tokenizer=loaded.tokenizer, chat=loaded.chat)


def test_a_demonstration_is_a_function_of_its_number(beginner: experiment.LoadedModel) -> None:
    config = pair_config()
    forwards = [demonstrator(config, beginner)(n) for n in range(6)]
    again = demonstrator(config, beginner)
    backwards = [again(n) for n in reversed(range(6))][::-1]
    assert forwards == backwards
    assert len({tuple(c.tokens) for c in forwards}) == 6
    other = demonstrator(pair_config("--config.seed=1"), beginner)
    assert [other(n) for n in range(6)] != forwards


def test_turns_of_a_distractor_are_history_and_never_imitated(
    beginner: experiment.LoadedModel,
) -> None:
    disturbed = demonstrator(pair_config("--config.data.distraction=1.0"), beginner)
    shares = []
    for number in range(12):
        conversation = disturbed(number)
        imitated = {turn for turn in conversation.turn_id if turn != NO_TURN}
        shares.append(len(imitated) / len(conversation.turns))
    # The share of strayed turns is drawn for each episode, from none to all.
    assert min(shares) < 0.5
    assert max(shares) > 0.5
    alone = demonstrator(pair_config("--config.data.distraction=0.0"), beginner)
    for number in range(4):
        conversation = alone(number)
        assert {t for t in conversation.turn_id if t != NO_TURN} == set(
            range(len(conversation.turns))
        )
