"""The audit: whether the teacher is right where the student learns from it."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from objectives import SAGE
from settings import one_device, read
from test_export import save_run

from opd_jax import audit, evaluate
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.config import build
from opd_jax.config.models import load_model
from opd_jax.envs.base import Observation
from opd_jax.envs.household.env import Household
from opd_jax.envs.make import make_env
from opd_jax.learner.weights import METHODS

pytestmark = pytest.mark.usefixtures("compile_quickly")


class Silent(Household):
    """The household without labels, and without a rule."""

    labels_turns = False
    rule = None

    def step(self, response: str) -> Observation:
        return dataclasses.replace(super().step(response), oracle="")


JUDGES = ("sage", "oracle", "record")
CHANGES = (
    "env.size=small",
    "env.max_turns=6",
    "rollout.context_tokens=320",
    "rollout.extend_widths=48",
    "rollout.chunk=24",
    "eval.tasks=6",
    "eval.batch=6",
    "train.length_multiple=320",
    "judge.extend_widths=256",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SAGE, the student of which has noise in its weights."""
    made = tmp_path_factory.mktemp("runs") / "sage"
    save_run(made, *CHANGES)
    return made


def figures_of(workdir: Path, who: str, split: str = "valid_unseen") -> dict[str, Any]:
    return json.loads((workdir / "audit.json").read_text())[who][split]


def test_every_turn_is_asked_and_figures_add_up(workdir: Path, in_process: Callable) -> None:
    run = partial(in_process, audit.main, f"--workdir={workdir}", "--turns=0")
    said = run("--take_over=0,3")
    found = figures_of(workdir, "after")
    assert (found["update"], found["episodes"], found["samples"]) == (3, 6, 1)
    turns = found["turns"]
    assert set(turns) <= {"SKIP", "WEAK", "STRONG", "DET_FAIL"}
    assert len(turns) >= 3
    for of in turns.values():
        assert of["asked"] == of["turns"] > 0
        assert of["failed"] + of["right"] <= 1 + 1e-9
        for what in ("failed", "right"):
            low, high = of[f"{what}_ci95"]
            assert low - 1e-9 <= of[what] <= high + 1e-9
    for name in ("tokens", "divergence"):
        assert sum(of[name] for of in turns.values()) == pytest.approx(1)
    # The verdict of a failure is known, and SKIP has weight 0.
    tokens = {name: of["tokens"] for name, of in found["weights"].items()}
    failed = turns["DET_FAIL"]["tokens"]
    assert tokens["opd"] == 1
    assert tokens["opd_fail_0"] == pytest.approx(1 - failed)
    assert tokens["oracle"] == pytest.approx(1 - turns["SKIP"]["tokens"])
    for name in JUDGES:
        assert tokens[f"{name}_fail_0"] == pytest.approx(tokens[name] - failed)
    assert all(0 <= of["reliable"] <= 1 for of in found["weights"].values())
    asked = sum(of["turns"] for of in turns.values())
    for whose in ("teacher_tokens", "proxy_tokens"):
        assert found[whose]["sampled"] >= asked
    # The methods that read no verdict, SAGE with each judge's, and the proxy.
    judged = {f"{name}{end}" for name in ("opd", *JUDGES) for end in ("", "_fail_0")}
    by = {name: dataclasses.replace(SAGE.weight, by=name) for name in METHODS}
    unjudged = {name for name, weight in by.items() if not weight.labels} - {"uniform"}
    assert found["weights"].keys() == judged | unjudged | {"reliability_proxy"}
    assert {tokens[name] for name in unjudged} == {1}
    # What was executed is what is ranked, and a constant ranks nothing.
    ranked = found["auc"]
    assert ranked.keys() == {"proxy", "rule", "confidence", "entropy", "constant"}
    for score, of_label in ranked.items():
        assert {name: of["n"] for name, of in of_label.items()} == {"all": asked} | {
            name: of["asked"] for name, of in turns.items()
        }
        for name, of in of_label.items():
            if name != "all" and turns[name]["right"] in (0, 1):
                assert of["auc"] is None
            elif score == "constant":
                assert (of["auc"], of["ci95"]) == (0.5, [0.5, 0.5])
            else:
                assert of["ci95"][0] - 1e-9 <= of["auc"] <= of["ci95"][1] + 1e-9
    assert ranked["rule"]["all"]["auc"] > 0.8
    # After no turn of the student the teacher plays as in an evaluation.
    flags = ("--policy=teacher", "--config.eval.splits=valid_unseen")
    in_process(evaluate.main, f"--workdir={workdir}", *flags)
    summary = json.loads((workdir / "summary.json").read_text())
    teacher = summary["eval"]["teacher"]["valid_unseen"]
    curve = found["take_over"]
    assert curve["0"]["n"] == teacher["n"] == 6
    assert curve["0"]["success"] == curve["0"]["of_all"] == teacher["success"]
    assert curve["3"]["n"] <= 6
    assert curve["3"]["sampled"] < curve["0"]["sampled"]
    # Tables show these figures, and the same command gives the same.
    assert f"| {100 * turns['SKIP']['tokens']:.1f}% " in said
    before = (workdir / "audit.json").read_bytes()
    assert run("--take_over=0,3").partition("| turns of")[2] == said.partition("| turns of")[2]
    assert (workdir / "audit.json").read_bytes() == before


def test_some_turns_of_each_label_are_asked_of_the_untrained_student(
    workdir: Path, in_process: Callable
) -> None:
    words = ("--untrained", "--turns=2", "--samples=3", "--episodes=4", "--split=valid_seen")
    in_process(audit.main, f"--workdir={workdir}", *words)
    found = figures_of(workdir, "before", "valid_seen")
    assert (found["update"], found["episodes"]) == (0, 4)
    assert "take_over" not in found
    assert found["weights"]["reliability_proxy"]["tokens"] is None  # of most nobody asked
    assert 0 <= found["weights"]["reliability_proxy"]["reliable"] <= 1
    for of in found["turns"].values():
        assert of["asked"] == min(2, of["turns"])
        # Thirds of the turns that were asked.
        assert (3 * of["asked"] * of["right"]) % 1 == pytest.approx(0, abs=1e-6)


def test_where_there_is_a_dev_split_the_reported_one_is_not_played(
    workdir: Path, in_process: Callable
) -> None:
    words = ("--untrained", "--turns=1", "--episodes=2", "--config.eval.splits=test_unseen")
    in_process(audit.main, f"--workdir={workdir}", *words, "--config.eval.every=2")
    found = json.loads((workdir / "audit.json").read_text())["before"]
    assert "dev" in found
    assert "test_unseen" not in found


def test_without_labels_a_turn_is_right_where_it_is_accepted(
    in_process: Callable, tmp_path: Path
) -> None:
    flags = [f"--config.{change}" for change in CHANGES]
    words = ("--config=quickstart", *flags, "--config.env.by=test_audit:Silent", "--episodes=2")
    words += ("--config.eval.who=before",)  # it has no expert
    in_process(audit.main, *words, f"--workdir={tmp_path / 'run'}", "--untrained")
    found = figures_of(tmp_path / "run", "before")
    assert set(found["turns"]) <= {"ACCEPTED", "DET_FAIL"}
    for of in found["turns"].values():
        assert of["failed"] + of["right"] == pytest.approx(1)
    assert not {"oracle", "record", "reliability_proxy"} & found["weights"].keys()
    assert set(found["auc"]) == {"confidence", "entropy", "constant"}
    assert "proxy_tokens" not in found


@pytest.mark.parametrize("history_turns", [0, 1])
def test_sums_over_a_turn_are_those_of_its_tokens(history_turns: int) -> None:
    changes = (*CHANGES, "weight.by=intervention", f"rollout.history_turns={history_turns}")
    settings = read("quickstart", *changes)
    student, teacher = (
        load_model(f"embedded:{who}", dtype="float32", mesh=one_device())
        for who in ("student", "teacher")
    )
    with jax.set_mesh(one_device()):
        played = rollout(
            student.params,
            row_keys(jax.random.key(0), range(3)),
            agent=build.make_agent(student, settings),
            envs=[make_env(settings.env) for _ in range(3)],
            tasks=[("train", index) for index in range(3)],
            depth=0,
        )
        tokens = audit.read_tokens(settings, student, student.params, teacher, played)
    counts = [[c.turn_id.count(turn) for turn in range(settings.env.max_turns)] for c in played]
    assert tokens.count.tolist() == counts
    divergence = tokens.total(tokens.scores.divergence)
    assert (divergence[tokens.count > 0] > 0).all()
    assert not divergence[tokens.count == 0].any()
    # What the student sampled at temperature 1 is what it scores.
    np.testing.assert_allclose(
        tokens.total(tokens.sampled_logprobs),
        tokens.total(tokens.scores.student_logprob),
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["has no checkpoint", "`--untrained`"]),
        (["--untrained", "--step=3"], ["`--untrained`", "`--step`"]),
        (["--untrained", "--samples=0"], ["`--samples`", "at least 1"]),
        (["--untrained", "--turns=-1"], ["`--turns`", "at least 0"]),
        (["--untrained", "--take_over=0,10"], ["`--take_over`", "`env.max_turns` = 10", "0,10"]),
        (["--untrained", "--take_over=4,"], ["`--take_over`", "such as 0,4,8", "`4,`"]),
        (["--untrained", "--split=test"], ["valid_unseen", "'test'"]),
        (["--untrained", "--config.teacher="], ["`teacher` is empty"]),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        audit.main(["--config=quickstart:runlocal", f"--workdir={tmp_path}", *words])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert all(word in message for word in expected), message
    assert list(tmp_path.iterdir()) == []
