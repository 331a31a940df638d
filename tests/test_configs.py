"""The config files that ship: every one loads, holds together, and says what its arguments say."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from opd_jax.compare import variant
from opd_jax.config import load, to_json
from opd_jax.config.loading import flatten
from opd_jax.config.settings import read_settings
from opd_jax.configs.methods import METHODS as NAMED
from opd_jax.configs.stages import STAGES
from opd_jax.envs.alfworld.env import AlfWorld
from opd_jax.envs.alfworld.panel import OFFICIAL_SIZES
from opd_jax.envs.base import Env
from opd_jax.envs.scienceworld import tasks as scienceworld_tasks
from opd_jax.envs.scienceworld.env import ScienceWorld
from opd_jax.envs.search.searchqa_data import SETS

CONFIGS = Path(__file__).parents[1] / "configs"

SHARED = {
    "__init__",
    "controls",
    "methods",
    "paper",
    "stages",
}  # what configs build on, and no experiment
PAPER = ["alfworld_qwen3", "scienceworld_qwen3", "searchqa_qwen3"]

# Argument -> the fields in which the method differs from SAGE, and how.
OPD = {"weight.by": "uniform"}
UNSCALED = {"objective.normalize": "none"}
METHODS: dict[str, dict[str, object]] = {
    "method=sage": {},
    "method=sage_table9": {},
    "ablate=intervention": {"weight.by": "confidence"},
    "ablate=confidence": {"weight.by": "intervention"},
    "ablate=normalizer": UNSCALED,
    "method=opd": OPD,
    "method=sft": OPD | {"objective.divergence": "cross_entropy", "data.source": "teacher"},
    "method=sft_success": OPD
    | {"objective.divergence": "cross_entropy", "data.source": "teacher"}
    | {"data.only_success": True},
    "method=rft": OPD | {"objective.divergence": "cross_entropy", "data.only_success": True},
    "method=failures": {
        "weight.by": "intervention",
        "weight.skip_weight": 1.0,
        "weight.fail_weight": 0.0,
        "judge.by": "failures",
    },
    "method=sage_fail0": {"weight.fail_weight": 0.0},
    **{
        f"method={name}_{judge}": {**failures, "judge.by": judge}
        for name, failures in (("sage", {}), ("sage_fail0", {"weight.fail_weight": 0.0}))
        for judge in ("oracle", "record")
    },
    "method=drop_accepted": {
        "weight.by": "intervention",
        "judge.by": "opd_jax.configs.controls:drop_accepted",
    },
    **{
        f"method=drop_{which}": {
            "weight.by": f"opd_jax.configs.controls:{which}",
            "judge.by": "failures",
        }
        for which in ("first_failures", "repeated_failures")
    },
    **{
        f"method=keep_{which}_failures": {
            "weight.by": f"opd_jax.configs.controls:{which}_failures",
            "judge.by": "failures",
        }
        for which in ("right", "wrong")
    },
    "method=sage_fail0_shuffled": {
        "weight.fail_weight": 0.0,
        "judge.by": "opd_jax.configs.controls:shuffled",
    },
    "method=reliability": {"weight.by": "reliability"},
    "method=reliability_proxy": {
        "weight.by": "reliability",
        "weight.teacher_labels": "record",
    },
    "method=return_to_go": {"weight.by": "return_to_go"},
    "method=entropy_aware": {"weight.by": "entropy_aware"} | UNSCALED,
    "method=sod": {"weight.by": "sod"} | UNSCALED,
    "method=iw_opd": {"weight.by": "iw_opd"} | UNSCALED,
    "method=opd_two_rollouts": OPD | {"rollout.per_task": 2},
    "method=tcod_f2b": OPD | {"rollout.depth_start": 1},
    "method=tcod_b2f": OPD
    | {
        "data.source": "prefixes:runs/quickstart/episodes/teacher-train.jsonl",
        "data.only_success": True,
        "rollout.depth_start": 1,
        "rollout.depth_every": 2,
        "rollout.depth_from": "back",
    },
    "method=guided": OPD | {"objective.teacher_turns": "forward_kl", "rollout.teacher_share": 1.0},
    "method=take_over": OPD
    | {"objective.teacher_turns": "forward_kl", "rollout.take_over_after": 3},
    "method=cut_repeated": OPD | {"rollout.cut_repeated_failure": True},
}
OF = dict.fromkeys(["quickstart", *PAPER], METHODS)
PROXY = "method=reliability_proxy"  # needs an environment with a rule
CASES = [
    *((name, arg) for name, methods in OF.items() for arg in methods),
    *(("household_pair", who) for who in ("who=teacher", "who=student", "who=recovering")),
    ("household_pair", "who=recovering,histories=runs/histories.jsonl"),
    ("quickstart", "compare"),
    *(("quickstart", f"table={stage}") for stage in STAGES),
    *((name, "student=0.6b,teacher=32b") for name in PAPER),
]


def changed(before: ConfigDict, after: ConfigDict) -> dict[str, object]:
    """The fields in which two configs differ, with their values in the second."""
    old, new = flatten(before), flatten(after)
    assert old.keys() == new.keys()
    return {name: value for name, value in new.items() if value != old[name]}


@pytest.mark.parametrize("name", PAPER)
def test_a_method_that_needs_a_rule_is_refused_where_there_is_none(name: str) -> None:
    env = load(name, []).env.by
    with pytest.raises(ValueError, match=rf"'record' labels .* `env.by` = '{env}' does not bring"):
        read_settings(load(f"{name}:{PROXY}", []))


def test_every_config_file_is_looked_at_here() -> None:
    assert {name for name, _ in CASES} | SHARED == {path.stem for path in CONFIGS.glob("*.py")}


@pytest.mark.parametrize(
    ("name", "arg"), [case for case in CASES if case[0] not in PAPER or case[1] != PROXY]
)
def test_a_config_holds_together_survives_storage_and_shrinks(name: str, arg: str) -> None:
    whole, local = (load(f"{name}:{arg}{more}", []) for more in ("", ",runlocal"))
    for config in (whole, local):
        if name in PAPER and arg.endswith(("_oracle", "_record")):
            # No benchmark labels turns or brings a rule.
            with pytest.raises(ValueError, match=rf"`judge.by` = '{arg[-6:]}' takes .* none"):
                read_settings(whole)
        else:
            read_settings(config)
        assert changed(ConfigDict(json.loads(to_json(config))), config) == {}
    assert local.checkpoint.every == 2
    assert local.train.updates < whole.train.updates / 10
    assert local.eval.tasks < whole.eval.tasks / 10
    # What is measured stays what it was.
    assert local.objective == whole.objective
    assert local.compare.methods == whole.compare.methods
    # Two calls share nothing.
    first, untouched = ConfigDict(whole.to_dict()), to_json(whole)
    first.compare.variants.sage = dict(weight=dict(weak_weight=0.9))
    first.compare.variants.opd.objective.normalize = "active_tokens"
    first.optimizer.learning_rate = 9.0
    assert to_json(load(f"{name}:{arg}", [])) == untouched


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("quickstart:method=ppo", ["method=ppo", "sage", "opd", "sft"]),
        ("quickstart:ablate=nothing", ["ablate=nothing", "intervention"]),
        ("quickstart:method=opd,ablate=confidence", ["method=opd", "sage only"]),
        # The variants are changes to SAGE: on another base their names would be wrong.
        ("quickstart:compare,method=opd", ["`compare`", "`method`"]),
        ("quickstart:compare,ablate=confidence", ["`compare`", "`ablate`"]),
        ("quickstart:table=A,method=opd", ["`table`", "`method`"]),
        ("quickstart:table=A,compare", ["`table`", "`compare`"]),
        ("quickstart:table=D", ["`table`", "A, B", "'D'"]),
        ("household_pair:who=judge", ["`who`", "teacher", "student", "recovering", "judge"]),
        ("household_pair:histories=a.jsonl", ["`histories`", "who=recovering", "teacher"]),
        ("alfworld_qwen3:student=4b", ["`student`", "0.6b", "1.7b", "4b"]),
        ("scienceworld_qwen3:teacher=14b", ["`teacher`", "8b", "32b", "14b"]),
        ("searchqa_qwen3:method=ppo", ["method=ppo", "tcod_f2b"]),
        (
            "alfworld_qwen3:method=opd,ablate=confidence",
            ["method=opd,ablate=confidence", "sage only"],
        ),
        ("alfworld_qwen3:ablate=nothing", ["ablate=nothing", "normalizer"]),
    ],
)
def test_a_choice_that_does_not_exist_is_named(path: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="config") as error:
        load(path, [])
    assert all(word in str(error.value) for word in words), error.value


# --- Methods differ in what their names say, and in nothing else


def test_sage_has_every_factor() -> None:
    for name in OF:
        config = load(name, [])
        objective, weight, source = config.objective, config.weight, config.data.source
        assert (weight.by, weight.skip_weight, weight.fail_weight) == ("sage", 0.0, 1.0)
        assert (objective.normalize, objective.max_z) == ("all_tokens", 0.0)
        assert (objective.divergence, weight.weak_weight) == ("reverse_kl", 0.5)
        assert (objective.scope, source) == ("batch", "on_policy")


@pytest.mark.parametrize("runlocal", ["", ",runlocal"])
@pytest.mark.parametrize(("name", "arg"), [case for case in CASES if case[1] in METHODS])
def test_a_method_differs_from_sage_in_its_own_fields(name: str, arg: str, runlocal: str) -> None:
    sage, method = load(f"{name}:{runlocal}", []), load(f"{name}:{arg}{runlocal}", [])
    assert changed(sage, method) == OF[name][arg]
    # A comparison runs the same.
    kind, which = arg.split("=")
    label = which if kind == "method" else f"sage_without_{which}"
    assert changed(variant(sage, label, seed=7), method) == {"seed": 0}
    assert len(sage.compare.variants) == len(OF[name])


def test_the_comparison_holds_the_ablation_and_otherwise_changes_only_evaluation() -> None:
    config = load("quickstart:compare", [])
    assert {"sft", "opd", "sage"} < set(config.compare.methods) < set(config.compare.variants)
    assert len(config.compare.seeds) >= 3
    assert config.eval.tasks >= 400
    differing = changed(load("quickstart", []), config)
    assert differing.keys() == {"compare.methods", "compare.seeds", "eval.tasks"}


def test_the_stages_hold_every_method_and_only_they_name_the_split_that_is_reported() -> None:
    first, second = (load(f"quickstart:table={stage}", []) for stage in "AB")
    # Together A and B are one table with all methods but those that need a file first.
    own = [name for name, fields in NAMED.items() if ":" not in fields["data"]["source"]]
    assert sorted(first.compare.methods + second.compare.methods) == sorted(own)
    assert first.compare.results == second.compare.results
    assert (first.compare.seeds, second.compare.seeds) == ((0, 1, 2), (0,))
    folders = {load(f"quickstart:table={stage}", []).compare.results for stage in STAGES}
    assert len(folders) == len(STAGES) - 1
    for stage in STAGES:
        config = load(f"quickstart:table={stage}", [])
        assert "opd" in (first if stage == "B" else config).compare.methods
        assert (config.eval.splits, config.eval.tasks) == (("test_unseen",), 800)
        assert (config.eval.dev, config.eval.dev_tasks) == ("dev", 200)
        assert config.eval.every == config.train.updates
        first_teacher = stage == "C-teacher"
        assert config.teacher == f"embedded:{'teacher' if first_teacher else 'recovering'}"
        assert config.judge.context == ("table9" if first_teacher else "record")
        # A smoke test writes nothing into the repository.
        assert load(f"quickstart:table={stage},runlocal", []).compare.results == ""
    for name, arg in CASES:
        if not arg.startswith("table="):
            config = load(f"{name}:{arg}", [])
            used = (*config.eval.splits, config.eval.dev, config.data.split)
            assert "test_unseen" not in used


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
    "weight.weak_weight": 0.5,
    "objective.divergence": "reverse_kl",
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    config = flatten(load(name, []))
    assert {stated: config[stated] for stated in STATED} == STATED


def test_the_papers_protocols() -> None:
    alfworld, scienceworld, searchqa = (load(name, []) for name in PAPER)
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
    config = load(name, [])
    assert config.train.updates == tasks[name] // config.rollout.batch


@pytest.mark.parametrize(("name", "env"), [(PAPER[0], AlfWorld), (PAPER[1], ScienceWorld)])
def test_an_environments_fields_are_its_arguments(name: str, env: type[Env]) -> None:
    # Those of search are tried out where they are played.
    around = {"by", "workers", "start_timeout_s", "step_timeout_s"}
    assert set(load(name, []).env) - around == set(inspect.signature(env).parameters)


@pytest.mark.parametrize("name", PAPER)
def test_sizes_name_folders_and_change_nothing_else(name: str) -> None:
    small = load(f"{name}:student=0.6b,teacher=32b", [])
    folders = {"student": "models/Qwen3-0.6B", "teacher": "models/Qwen3-32B"}
    assert changed(load(name, []), small) == folders


def test_what_a_search_is_called_without_searchqas_data() -> None:
    local = load("searchqa_qwen3:runlocal", [])
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
