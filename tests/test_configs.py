"""The config files that ship: every one loads, holds together, and says what its arguments say."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.compare import variant
from opd_jax.config import differences, from_json, load, to_json, validate

CONFIGS = Path(__file__).parents[1] / "configs"

ARGUMENTS = {
    "quickstart.py": [
        "",
        "method=sage",
        "method=opd",
        "method=sft",
        "ablate=intervention",
        "ablate=confidence",
        "ablate=normalizer",
        "compare",
    ],
    "household_pair.py": ["", "who=teacher", "who=student"],
}
CASES = [(file, arg) for file, args in ARGUMENTS.items() for arg in args]


def quickstart(arg: str = "", *overrides: str) -> FrozenConfigDict:
    return load(f"{CONFIGS / 'quickstart.py'}:{arg}", overrides)


def changed(before: ConfigDict, after: ConfigDict) -> set[str]:
    return {line.split(":")[0] for line in differences(before, after, ignore=())}


def test_every_config_file_is_looked_at_here() -> None:
    assert set(ARGUMENTS) == {path.name for path in CONFIGS.glob("*.py")}


@pytest.mark.parametrize(("file", "arg"), CASES)
@pytest.mark.parametrize("runlocal", ["", "runlocal"])
def test_loads_validates_and_survives_storage(file: str, arg: str, runlocal: str) -> None:
    config = load(f"{CONFIGS / file}:{arg},{runlocal}", [])
    validate(config)
    assert differences(from_json(to_json(config)), config, ignore=()) == []


@pytest.mark.parametrize(("file", "arg"), CASES)
def test_runlocal_is_smaller_and_checkpoints_every_other_update(file: str, arg: str) -> None:
    whole = load(f"{CONFIGS / file}:{arg}", [])
    local = load(f"{CONFIGS / file}:{arg},runlocal", [])
    assert local.checkpoint.every == 2
    assert local.train.updates < whole.train.updates / 10
    assert local.eval.tasks < whole.eval.tasks / 10
    # What is measured stays what it was.
    assert local.objective == whole.objective
    assert local.compare.methods == whole.compare.methods


@pytest.mark.parametrize(("file", "arg"), CASES)
def test_two_calls_share_nothing(file: str, arg: str) -> None:
    path = f"{CONFIGS / file}:{arg}"
    first = ConfigDict(load(path, []).to_dict())
    untouched = to_json(first)
    first.compare.variants.sage = dict(objective=dict(weak_weight=0.9))
    first.compare.variants.opd.objective.normalize = "active_tokens"
    first.optimizer.learning_rate = 9.0
    assert to_json(load(path, [])) == untouched


@pytest.mark.parametrize("file", ARGUMENTS)
@pytest.mark.parametrize(
    ("arg", "overrides", "words"),
    [
        ("runlocl", [], ["`runlocl`", "`runlocal`"]),
        ("runlocal=maybe", [], ["`runlocal`", "bool"]),
        ("", ["--config.train.update=3"], ["`train.update`", "`train.updates`"]),
        ("", ["--config.nothing=3"], ["`nothing`"]),
        ("", ["--config.train.updates=many"], ["`train.updates`", "int", "many"]),
    ],
)
def test_a_mistake_is_named(file: str, arg: str, overrides: list, words: list) -> None:
    with pytest.raises(ValueError, match="config") as error:
        load(f"{CONFIGS / file}:{arg}", overrides)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("quickstart.py:method=ppo", ["method=ppo", "sage", "opd", "sft"]),
        ("quickstart.py:ablate=nothing", ["ablate=nothing", "intervention"]),
        ("quickstart.py:method=opd,ablate=confidence", ["method=opd", "sage only"]),
        # The variants are changes to SAGE: on another base their names would be wrong.
        ("quickstart.py:compare,method=opd", ["`compare`", "`method`"]),
        ("quickstart.py:compare,ablate=confidence", ["`compare`", "`ablate`"]),
        ("household_pair.py:who=judge", ["`who`", "teacher", "student", "judge"]),
    ],
)
def test_a_choice_that_does_not_exist_is_named(path: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="config") as error:
        load(str(CONFIGS / path), [])
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
    teacher = load(str(CONFIGS / "household_pair.py:who=teacher"), [])
    student = load(str(CONFIGS / "household_pair.py:who=student"), [])
    assert (teacher.data.player, student.data.player) == ("expert", "forgetful")
    assert teacher.data.judge_examples > 0
    assert student.data.judge_examples == 0
    assert student.new_model.d_model < teacher.new_model.d_model
    for config in (teacher, student):
        assert (config.student, config.teacher) == ("new", "")
        assert config.objective.divergence == "cross_entropy"
