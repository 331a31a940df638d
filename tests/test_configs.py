"""The config files that ship: every one loads, holds together, and says what its arguments say."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.compare import variant
from opd_jax.config import differences, from_json, load, to_json
from opd_jax.config.settings import read_settings
from opd_jax.envs.alfworld.env import AlfWorld
from opd_jax.envs.alfworld.panel import OFFICIAL_SIZES
from opd_jax.envs.base import Env
from opd_jax.envs.scienceworld import tasks as scienceworld_tasks
from opd_jax.envs.scienceworld.env import ScienceWorld
from opd_jax.envs.search.searchqa_data import SETS

CONFIGS = Path(__file__).parents[1] / "configs"

SHARED = {"__init__", "paper"}  # what configs build on, and no experiment
PAPER = ["alfworld_qwen3", "scienceworld_qwen3", "searchqa_qwen3"]
METHODS = ["sage", "opd", "sft", "opd_two_rollouts", "entropy_aware", "tcod_f2b"]
ABLATIONS = ["intervention", "confidence", "normalizer"]
# Quickstart's methods are those of the paper's configs too; there they differ by their own names.
ARGUMENTS = {
    "quickstart": [
        *("", "compare", "method=opd", "method=sft"),
        *(f"ablate={factor}" for factor in ABLATIONS),
    ],
    "household_pair": ["who=teacher", "who=student"],
    **{
        name: [
            *("", "student=0.6b,teacher=32b"),
            *(f"method={method}" for method in METHODS[1:]),
            *(f"ablate={factor}" for factor in ABLATIONS),
        ]
        for name in PAPER
    },
}
CASES = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def quickstart(arg: str = "", *overrides: str) -> FrozenConfigDict:
    return load(f"quickstart:{arg}", overrides)


def changed(before: ConfigDict, after: ConfigDict) -> set[str]:
    return {line.split(":")[0] for line in differences(before, after, binds=lambda field: True)}


def test_every_config_file_is_looked_at_here() -> None:
    assert set(ARGUMENTS) | SHARED == {path.stem for path in CONFIGS.glob("*.py")}


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_a_config_holds_together_survives_storage_and_shrinks(name: str, arg: str) -> None:
    whole, local = (load(f"{name}:{arg}{more}", []) for more in ("", ",runlocal"))
    for config in (whole, local):
        read_settings(config)
        assert changed(from_json(to_json(config)), config) == set()
    assert local.checkpoint.every == 2
    assert local.train.updates < whole.train.updates / 10
    assert local.eval.tasks < whole.eval.tasks / 10
    # What is measured stays what it was.
    assert local.objective == whole.objective
    assert local.compare.methods == whole.compare.methods
    # Two calls share nothing.
    first, untouched = ConfigDict(whole.to_dict()), to_json(whole)
    first.compare.variants.sage = dict(objective=dict(weak_weight=0.9))
    first.compare.variants.opd.objective.normalize = "active_tokens"
    first.optimizer.learning_rate = 9.0
    assert to_json(load(f"{name}:{arg}", [])) == untouched


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_mistake_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown config argument `runlocl`.*`runlocal`"):
        load(f"{name}:runlocl", [])
    with pytest.raises(ValueError, match=r"unknown config field `train.update`.*`train.updates`"):
        load(name, ["--config.train.update=3"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("quickstart:method=ppo", ["method=ppo", "sage", "opd", "sft"]),
        ("quickstart:ablate=nothing", ["ablate=nothing", "intervention"]),
        ("quickstart:method=opd,ablate=confidence", ["method=opd", "sage only"]),
        # The variants are changes to SAGE: on another base their names would be wrong.
        ("quickstart:compare,method=opd", ["`compare`", "`method`"]),
        ("quickstart:compare,ablate=confidence", ["`compare`", "`ablate`"]),
        ("household_pair:who=judge", ["`who`", "teacher", "student", "judge"]),
        ("alfworld_qwen3:student=4b", ["`student`", "0.6b", "1.7b", "4b"]),
        ("scienceworld_qwen3:teacher=14b", ["`teacher`", "8b", "32b", "14b"]),
        ("searchqa_qwen3:method=ppo", ["`method`", "tcod_f2b", "ppo"]),
        ("alfworld_qwen3:method=opd,ablate=confidence", ["`ablate`", "opd_without_confidence"]),
        ("alfworld_qwen3:ablate=nothing", ["`ablate`", "sage_without_normalizer", "nothing"]),
    ],
)
def test_a_choice_that_does_not_exist_is_named(path: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="config") as error:
        load(path, [])
    assert all(word in str(error.value) for word in words), error.value


# --- Methods differ in what their names say, and in nothing else

FACTORS = {
    "intervention": ("objective.intervention", False),
    "confidence": ("objective.confidence", False),
    "normalizer": ("objective.normalize", "none"),
}


def field(config: ConfigDict, name: str) -> object:
    group, leaf = name.split(".")
    return config[group][leaf]


def test_sage_has_every_factor() -> None:
    sage = quickstart()
    assert [field(sage, name) for name, _ in FACTORS.values()] == [True, True, "all_tokens"]
    assert (sage.objective.divergence, sage.objective.weak_weight) == ("reverse_kl", 0.5)
    assert (sage.data.source, sage.objective.scope, sage.objective.max_z) == (
        "on_policy",
        "batch",
        0.0,
    )


@pytest.mark.parametrize("factor", FACTORS)
def test_an_ablation_sets_its_factor_to_one_and_changes_nothing_else(factor: str) -> None:
    name, off = FACTORS[factor]
    ablated = quickstart(f"ablate={factor}")
    assert changed(quickstart(), ablated) == {name}
    assert field(ablated, name) == off


def test_plain_distillation_is_sage_without_any_factor() -> None:
    opd = quickstart("method=opd")
    assert changed(quickstart(), opd) == {name for name, _ in FACTORS.values()}
    assert all(field(opd, name) == off for name, off in FACTORS.values())


def test_fine_tuning_is_cross_entropy_on_the_teachers_episodes() -> None:
    sft = quickstart("method=sft")
    assert changed(quickstart("method=opd"), sft) == {"objective.divergence", "data.source"}
    assert (sft.objective.divergence, sft.data.source) == ("cross_entropy", "teacher")


def test_the_comparison_holds_every_method_and_otherwise_changes_only_evaluation() -> None:
    config = quickstart("compare")
    assert set(config.compare.methods) == set(config.compare.variants)
    assert len(config.compare.methods) == 6
    assert len(config.compare.seeds) >= 3
    assert config.eval.tasks >= 400
    assert changed(quickstart(), config) == {
        "compare.methods",
        "compare.seeds",
        "eval.tasks",
    }


@pytest.mark.parametrize(
    ("method", "arg"),
    [
        ("sft", "method=sft"),
        ("opd", "method=opd"),
        ("sage", "method=sage"),
        ("sage_without_intervention", "ablate=intervention"),
        ("sage_without_confidence", "ablate=confidence"),
        ("sage_without_normalizer", "ablate=normalizer"),
    ],
)
def test_a_run_of_the_comparison_is_the_run_of_its_argument(method: str, arg: str) -> None:
    one = variant(quickstart("compare"), method, seed=7)
    assert changed(one, quickstart(arg, "--config.seed=7")) == {"eval.tasks"}


def test_teacher_and_student_of_the_pair_differ_in_size_and_in_whom_they_imitate() -> None:
    teacher = load("household_pair:who=teacher", [])
    student = load("household_pair:who=student", [])
    assert teacher.demonstrations.player == "expert"
    assert student.demonstrations.player == "forgetful"
    assert teacher.demonstrations.judge_examples > 0 == student.demonstrations.judge_examples
    assert student.new_model.d_model < teacher.new_model.d_model
    for config in (teacher, student):
        assert (config.student, config.teacher) == ("new", "")
        assert config.objective.divergence == "cross_entropy"


# --- The paper's experiments


def paper(name: str, arg: str = "", *overrides: str) -> FrozenConfigDict:
    return load(f"{name}:{arg}", overrides)


# Of its table of hyper-parameters; the rest is the environment's.
STATED = {
    "optimizer.learning_rate": 1e-6,
    "optimizer.weight_decay": 0.1,
    "rollout.batch": 64,
    "rollout.per_task": 1,
    "rollout.temperature": 0.4,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "rollout.turn_tokens": 4096,
    "rollout.history_turns": 0,
    "eval.temperature": 0.4,
    "judge.max_new_tokens": 1028,
    "objective.weak_weight": 0.5,
    "objective.divergence": "reverse_kl",
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    config = paper(name)
    assert {stated: field(config, stated) for stated in STATED} == STATED


def test_the_papers_protocols() -> None:
    alfworld, scienceworld, searchqa = map(paper, PAPER)
    assert (alfworld.env.max_turns, alfworld.env.show_admissible) == (30, 30)
    assert set(alfworld.eval.splits) == OFFICIAL_SIZES.keys()
    assert alfworld.eval.tasks == max(OFFICIAL_SIZES.values())
    assert scienceworld.env.max_turns == 30
    (split,) = scienceworld.eval.splits
    assert scienceworld.eval.tasks == len(scienceworld_tasks.tasks(split)) == 150
    # A step may start the engine anew and play the episode again.
    assert scienceworld.env.step_timeout_s >= 3 * scienceworld.env.timeout_s
    assert searchqa.eval.splits == tuple(SETS)
    assert (searchqa.env.max_turns, searchqa.env.max_searches, searchqa.env.passages) == (16, 8, 3)
    assert (searchqa.env.train_questions, searchqa.env.test_questions) == (10_000, 500)
    assert searchqa.eval.tasks == 500
    assert not searchqa.env.retry_wrong


@pytest.mark.parametrize("name", PAPER)
def test_an_epoch_is_as_long_as_its_tasks(name: str) -> None:
    tasks = {
        "alfworld_qwen3": 3553,  # games in ALFWorld's download
        "scienceworld_qwen3": len(scienceworld_tasks.tasks("train")),
        "searchqa_qwen3": 10_000,
    }
    config = paper(name)
    assert config.train.updates == tasks[name] // config.rollout.batch


@pytest.mark.parametrize(("name", "env"), [(PAPER[0], AlfWorld), (PAPER[1], ScienceWorld)])
def test_an_environments_fields_are_its_arguments(name: str, env: type[Env]) -> None:
    # Those of search are tried out where they are played.
    around = {"by", "workers", "start_timeout_s", "step_timeout_s"}
    assert set(paper(name).env) - around == set(inspect.signature(env).parameters)


@pytest.mark.parametrize("name", PAPER)
def test_sizes_name_folders_and_change_nothing_else(name: str) -> None:
    small = paper(name, "student=0.6b,teacher=32b")
    assert (small.student, small.teacher) == ("models/Qwen3-0.6B", "models/Qwen3-32B")
    assert changed(paper(name, "student=1.7b,teacher=8b"), small) == {"student", "teacher"}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize(
    ("method", "field_name", "value"),
    [
        ("opd_two_rollouts", "rollout.per_task", 2),
        ("entropy_aware", "objective.entropy_bonus", 1.0),
        ("tcod_f2b", "rollout.depth_start", 1),
    ],
)
@pytest.mark.parametrize("runlocal", ["", ",runlocal"])
def test_a_baseline_is_plain_distillation_but_for_one_field(
    name: str, method: str, field_name: str, value: float, runlocal: str
) -> None:
    baseline = paper(name, f"method={method}{runlocal}")
    assert changed(paper(name, f"method=opd{runlocal}"), baseline) == {field_name}
    assert field(baseline, field_name) == value
    assert baseline.rollout.depth_every == 1
    assert baseline.rollout.batch % baseline.rollout.per_task == 0


@pytest.mark.parametrize("name", PAPER)
def test_methods_differ_as_they_do_in_the_quickstart(name: str) -> None:
    for arg in ("method=opd", "method=sft", *(f"ablate={factor}" for factor in ABLATIONS)):
        assert changed(paper(name), paper(name, arg)) == changed(quickstart(), quickstart(arg))


@pytest.mark.parametrize("name", PAPER)
def test_a_sweep_over_the_methods_is_a_run_for_each(name: str) -> None:
    flags = (f"--config.compare.methods={','.join(METHODS)}", "--config.compare.seeds=0")
    config = paper(name, "", *flags)
    read_settings(config)
    for method in METHODS:
        assert changed(variant(config, method, 0), paper(name, f"method={method}")) == set()
    ablated = [f"sage_without_{factor}" for factor in ABLATIONS]
    assert set(config.compare.variants) == {*METHODS, *ablated}


def test_what_a_search_is_called_without_searchqas_data() -> None:
    local = paper("searchqa_qwen3", "runlocal")
    assert local.env.by == "factbookqa"
    assert not set(local.eval.splits) & SETS.keys()


def test_runlocal_of_a_benchmark_trains_and_evaluates_in_the_real_environment(
    benchmark: tuple[str, ...], command: Callable, tmp_path: Path
) -> None:
    done = command("train", *benchmark, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["update_norm"] > 0
        assert np.isfinite(line["loss"])
        assert "end/broken" not in line
        # What was sampled through the cache is what is trained on.
        assert line["logprob_error"] < 1e-3
    config = load(benchmark[0].removeprefix("--config="), list(benchmark[1:]))
    results = json.loads((tmp_path / "summary.json").read_text())["eval"]
    assert results.keys() == {"before", "after"}
    for splits in results.values():
        assert splits.keys() == set(config.eval.splits)
        for figures in splits.values():
            assert (figures["n"], figures["broken"]) == (2, 0)
            assert figures["turns"] <= config.env.max_turns == 3
    labels = {"alfworld": "(generated)", "factbookqa": "(FactbookQA)"}
    assert labels.get(config.env.by, "panel") in done.stdout
    assert "SearchQA" not in done.stdout
