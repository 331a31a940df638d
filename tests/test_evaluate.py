"""The commands that measure a policy and export a trained student."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import log_softmax
from settings import one_device, read
from test_export import copy_model, save_run

from opd_jax import evaluate, export, hf, model
from opd_jax.agent.conversation import Conversation
from opd_jax.config import build, load, read_stored, to_json
from opd_jax.config.loading import override
from opd_jax.config.models import LoadedModel, load_model, load_student, load_teacher
from opd_jax.config.settings import read_settings
from opd_jax.config.workdir import check_run, store_run
from opd_jax.envs.search.searchqa_data import SETS
from opd_jax.report.episodes import read_episodes
from opd_jax.report.tables import judge_table, results_table
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import Stopped
from opd_jax.runtime.lease import held
from opd_jax.runtime.stop import Stop

pytestmark = pytest.mark.usefixtures("compile_quickly")

QUICKSTART = "quickstart:runlocal"


# --- Players


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_expert_succeeds_and_chance_does_not(size: str) -> None:
    settings = read(QUICKSTART, "eval.tasks=40", f"env.size={size}", "env.max_turns=40")
    play = partial(evaluate.evaluate_player, settings, panels=build.panels(settings))
    expert, chance = play("expert"), play("random")
    assert expert.keys() == chance.keys() == {"valid_seen", "valid_unseen"}
    for split in expert:
        assert expert[split]["n"] == chance[split]["n"] == 40
        assert expert[split]["success"] >= 0.95
        assert chance[split]["success"] <= 0.6
        assert expert[split]["turns"] < chance[split]["turns"]
        assert expert[split]["failed"] == 0


def test_a_player_plays_the_first_tasks_of_a_split_and_always_alike() -> None:
    settings = read(QUICKSTART, "eval.tasks=5", "env.max_turns=2")
    play = partial(evaluate.play_player, settings, "random", "valid_seen")
    played = play(tasks=5)
    assert [c.task.id for c in played] == [f"household/small/valid_seen/{i}" for i in range(5)]
    assert play(tasks=3) == played[:3]
    # And no more than the split has.
    panels = build.panels(settings)
    panels["valid_seen"] = panels["valid_seen"]._replace(size=3)
    figures = evaluate.evaluate_player(settings, "random", panels=panels)
    assert [figures[split]["n"] for split in settings.eval.splits] == [3, 5]


# --- A model


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return load_model("embedded:student", dtype="float32", mesh=one_device())


@pytest.fixture(scope="module")
def play(student: LoadedModel, small: tuple) -> Callable[..., list[list[int]]]:
    """Plays tasks with the student; returns the tokens of each episode."""

    def run(tasks: int, batch: int = 2, seed: int = 0, temperature: float = 1.0):
        settings = read(QUICKSTART, *small, f"eval.batch={batch}", f"eval.seed={seed}")
        agent = build.make_agent(student, settings, temperature=temperature)
        played = evaluate.play_model(settings, agent, student.params, "valid_seen", tasks=tasks)
        # The first tasks in order. The last batch need not be full.
        ids = [f"household/small/valid_seen/{i}" for i in range(tasks)]
        assert [c.task.id for c in played] == ids
        return [c.tokens for c in played]

    return run


def test_at_temperature_zero_neither_batch_nor_seed_matters(play: Callable) -> None:
    played = play(4, temperature=0.0)
    assert play(4, batch=4, seed=1, temperature=0.0) == played


def test_a_sampled_evaluation_is_a_function_of_its_seed(play: Callable) -> None:
    played = play(4)
    # Neither more tasks behind them nor others beside them change anything.
    assert play(5)[:4] == played
    assert play(4, batch=4) == played
    assert play(4, seed=1) != played


# --- What need not be played again


FIGURES = {"n": 4, "update": 80, "temperature": 0.4, "seed": 0}
JUDGE = {"n": 9, "context": "table9", "decode": "constrained", "admissible_shown": 12}


@pytest.mark.parametrize(
    ("figures", "override", "same"),
    [
        (FIGURES, "", True),
        (FIGURES, "eval.batch=2", True),
        (FIGURES, "eval.tasks=5", False),
        # Played, if not to an end: played again they might break again, without end.
        (FIGURES | {"n": 3, "broken": 1}, "", True),
        (FIGURES | {"n": 3, "broken": 0}, "", False),
        (FIGURES, "eval.seed=1", False),
        (FIGURES, "eval.temperature=1.0", False),
        (FIGURES, "eval.judge=true", False),
        (FIGURES | {"judge": JUDGE}, "eval.judge=true", True),
        (FIGURES | {"judge": JUDGE | {"context": "history"}}, "eval.judge=true", False),
        (FIGURES | {"judge": JUDGE | {"decode": "generate"}}, "eval.judge=true", False),
        (FIGURES | {"judge": JUDGE | {"context": "history"}}, "", True),
        (FIGURES | {"update": 40}, "", False),
        ({"n": 4}, "eval.temperature=1.0", True),  # a player has no temperature
        (FIGURES | {"digest": "of other tasks"}, "", False),
        (FIGURES | {"digest": None}, "", False),
        ({"n": 4, "digest": "of other tasks"}, "", False),
    ],
)
def test_figures_hold_for_the_settings_they_were_made_with(
    figures: dict, override: str, same: bool
) -> None:
    settings = read(QUICKSTART, "eval.tasks=4", *filter(None, [override]))
    panels = build.panels(settings)
    both = {s: {"digest": panels[s].digest} | figures for s in settings.eval.splits}
    check = partial(evaluate.is_evaluated, settings=settings, panels=panels, update=80)
    assert check(both) == same
    assert not check({"valid_seen": both["valid_seen"]})
    # A set that is not on this machine has no tasks.
    here = {"valid_seen": panels["valid_seen"]}
    assert evaluate.is_evaluated(both, settings, panels=here, update=80) == same
    assert not check(both | {"valid_seen": None})
    assert not check(None)


# --- The command


class Ended(Exception):
    """What ends an evaluation here."""


@pytest.mark.parametrize("who", ["player", "model"])
def test_an_evaluation_that_was_ended_plays_only_the_splits_it_lacks(
    who: str, student: LoadedModel, small: tuple
) -> None:
    settings = read(QUICKSTART, *small, "eval.tasks=1", "eval.batch=1")
    first, second = settings.eval.splits
    how: dict[str, Any] = {"panels": build.panels(settings)}
    run = partial(evaluate.evaluate_player, settings, "random", **how)
    if who == "model":
        model = (settings, student, student.params)
        run = partial(evaluate.evaluate_model, *model, update=0, judging=None, **how)
    whole, told = run(), []

    def end_in_the_second() -> None:
        if told:
            raise Ended

    with pytest.raises(Ended):
        run(after_split=told.append, between=end_in_the_second)
    assert told == [{first: whole[first]}]
    # As JSON gives them back.
    known = json.loads(json.dumps(told.pop()))
    known[first]["turns"] = 1234.0
    found = run(known=known, after_split=told.append)
    assert found == told[-1] == {first: known[first], second: whole[second]}
    assert list(found) == [first, second]
    assert len(told) == 1


def test_a_model_is_asked_for_between_its_turns(student: LoadedModel, small: tuple) -> None:
    settings = read(QUICKSTART, *small, "eval.tasks=1", "eval.batch=1")
    agent = build.make_agent(student, settings, temperature=0.0)
    asked: list[int] = []

    def play(**how: Any) -> list:
        return evaluate.play_model(settings, agent, student.params, "valid_seen", tasks=1, **how)

    (episode,) = play(between=lambda: asked.append(1))
    assert len(asked) == 1 + len(episode.turns) > 2  # and before the first observation
    assert play() == [episode]
    with pytest.raises(Ended):
        play(between=lambda: raise_it(Ended()))


def raise_it(error: Exception) -> None:
    raise error


def test_a_signal_ends_a_players_episodes(small: tuple) -> None:
    settings = read(QUICKSTART, *small)
    with Stop():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            evaluate.play_player(settings, "random", "valid_seen", tasks=4)
    played = evaluate.play_player(settings, "random", "valid_seen", tasks=4)
    assert all(c.turns for c in played)


def children() -> set[str]:
    """The processes that this one has."""
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def test_environments_of_an_evaluation_that_fails_do_not_outlive_it(
    student: LoadedModel, small: tuple
) -> None:
    settings = read(QUICKSTART, *small, "env.workers=true", "rollout.context_tokens=25")
    panels = build.panels(settings)
    before = children()
    # Held by the caught error, nothing that it left behind is collected.
    with pytest.raises(ValueError, match=r"`rollout.context_tokens`") as caught:
        evaluate.evaluate_model(
            settings, student, student.params, panels=panels, update=0, judging=None
        )
    assert children() == before
    assert caught.tb


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_player_is_evaluated_into_the_summary(
    policy: str, in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    others = {"eval": {"before": {"valid_seen": {"success": 0.5}}}, "note": 1}
    (tmp_path / "summary.json").write_text(json.dumps(others))
    words = ("--config=quickstart:runlocal", *small, f"--workdir={tmp_path}")
    printed = in_process(evaluate.main, *words, f"--policy={policy}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    settings = read(QUICKSTART, *small)
    panels = build.panels(settings)
    expected = evaluate.evaluate_player(settings, policy, panels=panels)
    assert summary == {"eval": others["eval"] | {policy: expected}, "note": 1}
    splits = settings.eval.splits
    assert [expected[split]["digest"] for split in splits] == [panels[s].digest for s in splits]
    which = [f"{split}: 1000 tasks, digest {panels[split].digest}" for split in splits]
    assert printed.splitlines() == [*which, *results_table({policy: expected}).splitlines()]


def test_figures_of_another_model_or_environment_do_not_come_beside_an_evaluations(
    in_process: Callable, tmp_path: Path, small: tuple, capsys: pytest.CaptureFixture
) -> None:
    words = ("--config=quickstart:runlocal", *small, "--config.eval.tasks=1")
    run = partial(in_process, evaluate.main, *words, f"--workdir={tmp_path}")
    other = "embedded:teacher"
    run("--policy=random", "--config.teacher=no/where")  # a player needs no model
    run("--untrained", "--config.eval.splits=valid_seen")
    before = (tmp_path / "summary.json").read_bytes()
    assert json.loads(before)["eval"].keys() == {"random", "before"}
    for more, said in (
        (("--untrained", f"--config.student={other}"), f"`student` = {other!r} is not"),
        (("--policy=expert", "--config.env.size=medium"), "env.size: 'small' -> 'medium'"),
    ):
        with pytest.raises(SystemExit):
            run(*more)
        assert said in capsys.readouterr().err
    # A run that starts here keeps the figures that are its own.
    settings, config = read(QUICKSTART, *small), load(QUICKSTART, small)
    assert check_run(config, settings, tmp_path).keys() >= {"valid_seen"}
    store_run(config, settings, {}, tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == before
    store_run(config, read(QUICKSTART, *small, f"student={other}"), {}, tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_players_play_the_papers_benchmarks(
    policy: str, benchmark: tuple[str, ...], in_process: Callable, tmp_path: Path
) -> None:
    settings = read_settings(load(benchmark[0].removeprefix("--config="), list(benchmark[1:])))
    printed = in_process(evaluate.main, *benchmark, f"--workdir={tmp_path}", f"--policy={policy}")
    splits = json.loads((tmp_path / "summary.json").read_text())["eval"][policy]
    assert splits.keys() == set(settings.eval.splits)
    panels = build.panels(settings)
    for split, figures in splits.items():
        assert (figures["n"], figures["broken"]) == (2, 0)
        assert figures["digest"] == panels[split].digest
        if policy == "expert":
            assert figures["failed"] == 0
    assert f"| {policy}" in printed
    assert evaluate.is_evaluated(splits, settings, panels=panels, update=0)


def seven_sets(data: Path) -> tuple[str, ...]:
    """Writes SearchQA's sets, two questions each, and a passage; the flags that name them."""
    for name, file in SETS.items():
        path = data / file
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"question": f"Which word is it in {name}?", "golden_answers": ["word"]}
        path.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n in range(2)))
    corpus = data / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "1", "contents": '"Words"\nIt is a word.'}) + "\n")
    paths = (f"--config.env.data={data}", f"--config.env.retriever={corpus}")
    return ("--config=searchqa_qwen3", *paths)


def test_a_run_with_a_macro_average_is_finished(tmp_path: Path, is_finished: Callable) -> None:
    flags = seven_sets(tmp_path / "data")
    settings = read("searchqa_qwen3", *flags[1:])
    panels = build.eval_panels(settings)
    figures = {"n": 2, "broken": 0, "update": settings.train.updates, "seed": settings.eval.seed}
    figures["temperature"] = settings.eval.temperature
    splits = {name: figures | {"digest": panel.digest} for name, panel in panels.items()}
    for update, is_done in ((settings.train.updates, True), (1, False)):
        splits["popqa"]["update"] = update
        after = splits | {"macro_average": {"success": 0.5, "n": 14}}
        (tmp_path / "summary.json").write_text(json.dumps({"eval": {"after": after}}))
        assert is_finished(*flags, f"--workdir={tmp_path}") == is_done


def test_searchqa_has_a_macro_average(in_process: Callable, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    data = tmp_path / "data"
    flags = (*seven_sets(data), "--policy=random")
    printed = in_process(evaluate.main, *flags, f"--workdir={tmp_path / 'all'}")
    found = json.loads((tmp_path / "all/summary.json").read_text())["eval"]["random"]
    assert found.keys() == {*SETS, "macro_average"}
    sets = [found[name] for name in SETS]
    average = found["macro_average"]
    assert average["n"] == sum(figures["n"] for figures in sets) == 14
    assert average["success"] == pytest.approx(np.mean([f["success"] for f in sets]))
    assert average["measures"]["f1"] == pytest.approx(np.mean([f["measures"]["f1"] for f in sets]))
    last = [cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")]
    assert last[:3] == ["random", "macro_average", f"{average['success']:.1%}"]

    # A set that is not there is left out. Named alone it is a mistake.
    fewer = Path(shutil.copytree(data, tmp_path / "fewer"))
    (fewer / SETS["musique"]).unlink()
    there = (*flags, f"--config.env.data={fewer}")
    in_process(evaluate.main, *there, f"--workdir={tmp_path / 'six'}")
    six = json.loads((tmp_path / "six/summary.json").read_text())["eval"]["random"]
    assert six.keys() == {*SETS, "macro_average"} - {"musique"}
    assert six["macro_average"] is None
    assert six["popqa"] == found["popqa"]
    with pytest.raises(SystemExit):
        in_process(
            evaluate.main, *there, f"--workdir={tmp_path / 'no'}", "--config.eval.splits=nq,musique"
        )
    # Of some of the sets there is none: it would be another figure under the same name.
    some = in_process(
        evaluate.main, *flags, f"--workdir={tmp_path / 'some'}", "--config.eval.splits=nq,popqa"
    )
    assert "macro_average" not in some


def test_the_student_of_the_newest_checkpoint_is_evaluated_as_at_the_end_of_training(
    trained: Any, command: Callable, in_process: Callable, tmp_path: Path, capsys: Any
) -> None:
    workdir = Path(shutil.copytree(trained.workdir, tmp_path / "copy"))
    flags = (*trained.flags, f"--workdir={workdir}")
    before = (workdir / "summary.json").read_bytes()
    # Figures of another environment do not come to stand beside a run's own.
    with pytest.raises(SystemExit):
        in_process(evaluate.main, *flags, "--policy=expert", "--config.env.size=large")
    assert "env.size: 'small' -> 'large'" in capsys.readouterr().err
    assert (workdir / "summary.json").read_bytes() == before

    expected = json.loads(before)["eval"]["after"]
    (workdir / "summary.json").unlink()
    # How long the run is and how it is laid out do not bind. The teacher is not needed.
    free = ("--config.train.updates=99", "--config.teacher=no/where")
    done = command("evaluate", f"--workdir={workdir}", *free)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "summary.json").read_text()) == {"eval": {"after": expected}}


def test_a_workdir_says_itself_what_is_evaluated(
    trained: Any, in_process: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    workdir = Path(shutil.copytree(trained.workdir, tmp_path / "copy"))
    expected = json.loads((workdir / "summary.json").read_text())["eval"]
    (workdir / "summary.json").unlink()
    run = partial(in_process, evaluate.main, f"--workdir={workdir}")
    run("--policy=teacher")
    run("--step=4", "--config.eval.splits=valid_seen")  # the newest
    run("--step=2", "--config.eval.splits=valid_seen")
    found = json.loads((workdir / "summary.json").read_text())["eval"]
    assert found["teacher"] == expected["teacher"]
    assert found["after"] == {"valid_seen": expected["after"]["valid_seen"]}
    assert found["step-2"]["valid_seen"]["update"] == 2
    with pytest.raises(SystemExit):
        run("--policy=teacher", "--config.teacher=embedded:student")
    assert "`teacher` = 'embedded:student' is not the model" in capsys.readouterr().err
    # A run that goes on differently forgets what it has not trained.
    settings, config = read(QUICKSTART), load(trained.flags[0][9:], trained.flags[1:])
    store_run(override(ConfigDict(config), ["--config.seed=1"]), settings, {}, workdir)
    found = json.loads((workdir / "summary.json").read_text())["eval"]
    assert found == {"teacher": expected["teacher"]}


def test_a_step_is_one_that_the_workdir_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for workdir, step, said in (
        ("run", "2", "has no checkpoint of update 2; it keeps those of 3"),
        ("run", "best", "has no best checkpoint, as a run with `eval.every`"),
        ("run", "last", "expected the number of an update, newest or best; got last"),
        ("empty", "3", "has no config.json"),
    ):
        words = [f"--workdir={tmp_path / workdir}", f"--step={step}"]
        for main, more in ((evaluate.main, []), (export.main, [f"--out={tmp_path / 'out'}"])):
            with pytest.raises(SystemExit) as stop:
                main([*words, *more])
            message = capsys.readouterr().err
            assert (stop.value.code, message.count("\n")) == (2, 1)
            assert said in message
    (tmp_path / "run/summary.json").write_text('{"best": {"step": 3}}')
    assert export.export(tmp_path / "run", tmp_path / "out", which="best") == 3


@pytest.mark.parametrize(("policy", "rank"), [("model", 0), ("model", 4), ("before", 0)])
def test_an_evaluation_without_a_judge_needs_the_student_alone(
    policy: str, rank: int, in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    # Its vocabulary is padded, and its teacher's is not: training has cut the padding.
    student = copy_model("student", tmp_path / "student", padding=10)
    flags = (*small, f"--config.student={student}", f"--config.lora.rank={rank}")
    run = tmp_path / "run"
    save_run(run, *(flag.removeprefix("--config.") for flag in flags))
    words = (*flags, "--config.teacher=no/where", "--config.eval.splits=valid_seen")
    in_process(
        evaluate.main,
        "--config=quickstart",
        *words,
        f"--workdir={run}",
        *(["--untrained"] if policy == "before" else []),
    )
    (found,) = json.loads((run / "summary.json").read_text())["eval"].values()
    assert found["valid_seen"]["update"] == (3 if policy == "model" else 0)


def test_the_judge_is_measured_on_the_turns_that_an_untrained_student_played(
    in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    words = ("--config=quickstart:runlocal", *small, "--config.eval.judge=true")
    printed = in_process(evaluate.main, *words, f"--workdir={tmp_path}", "--untrained")
    (before,) = json.loads((tmp_path / "summary.json").read_text())["eval"].items()
    assert before[0] == "before"
    settings = read(QUICKSTART, *small)
    student, teacher = load_student(settings, one_device()), load_teacher(settings, one_device())
    assert teacher is not None
    agent = build.make_agent(student, settings, temperature=settings.eval.temperature)
    for split, figures in before[1].items():
        tasks = settings.eval.tasks
        played = evaluate.play_model(settings, agent, student.params, split, tasks=tasks)
        # Every turn that did not fail has a label in this environment.
        labelled = sum(not turn.failure for c in played for turn in c.turns)
        assert figures["judge"]["n"] == labelled > 0
        assert figures["judge"] == evaluate.measure_judge(settings, teacher, played)[0]

    def with_all_turns(**changed: str) -> list[Conversation]:
        turns = [[replace(turn, **changed) for turn in c.turns] for c in played]
        return [replace(c, turns=t) for c, t in zip(played, turns, strict=True)]

    # Nothing to ask: no figure. Asked, and no label of the environment's: it has none to give.
    failed, unlabelled = with_all_turns(failure="rejected"), with_all_turns(failure="", oracle="")
    nothing, _ = evaluate.measure_judge(settings, teacher, failed)
    assert (nothing["n"], nothing["balanced_accuracy"]) == (0, None)
    with pytest.raises(ValueError, match=r"`eval\.judge`: none of \d+ verdicts has a label"):
        evaluate.measure_judge(settings, teacher, unlabelled)
    assert judge_table(dict([before])) in printed
    assert "balanced accuracy" in printed


def test_another_judge_gives_verdicts_and_the_teacher_scores_tokens(
    in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    words = ("--config=quickstart:runlocal", *small, "--config.eval.splits=valid_seen")
    words = (*words, "--config.eval.tasks=2", "--config.eval.judge=true", "--episodes=2")
    other = "--config.judge.model=embedded:student"

    def told(who: str, flag: str, *more: str) -> list[dict]:
        folder = tmp_path / f"{who}{len(more)}"
        in_process(evaluate.main, *words, flag, *more, f"--workdir={folder}")
        return read_episodes(folder / "episodes" / f"{who}-valid_seen.jsonl")

    def verdicts(lines: list[dict]) -> list:
        return [[turn.get("judge") for turn in line["turns"]] for line in lines]

    for who, flag in (("before", "--untrained"), ("teacher", "--policy=teacher")):
        mine, others = told(who, flag), told(who, flag, other)
        assert [line["messages"] for line in mine] == [line["messages"] for line in others]
        assert verdicts(mine) != verdicts(others)
        for column in ("teacher_logprob", "divergence"):
            values = [[line["student_tokens"].get(column) for line in x] for x in (mine, others)]
            assert values[0] == values[1]
            assert (values[0][0] is None) == (who == "teacher")  # it is not compared with itself


def test_weights_that_read_what_an_evaluation_does_not_ask_are_left_out(
    in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    words = ("--config=quickstart:runlocal,method=reliability", *small, "--untrained")
    words += ("--config.eval.splits=valid_seen", "--config.eval.tasks=1", "--episodes=1")
    in_process(evaluate.main, *words, "--config.eval.judge=true", f"--workdir={tmp_path}")
    (line,) = read_episodes(tmp_path / "episodes" / "before-valid_seen.jsonl")
    assert "weight" not in line["student_tokens"]
    assert len(line["student_tokens"]["divergence"]) == len(line["student_tokens"]["text"]) > 0


def test_episodes_are_written_with_scores_where_the_teacher_is_read(
    in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    words = ("--config=quickstart:runlocal", *small, "--config.eval.splits=valid_seen")
    words = (*words, "--config.eval.tasks=3", f"--workdir={tmp_path}")
    file = tmp_path / "episodes" / "before-valid_seen.jsonl"
    in_process(evaluate.main, *words, "--untrained")
    assert not file.exists()
    in_process(evaluate.main, *words, "--untrained", "--episodes=2")
    plain = read_episodes(file)
    in_process(evaluate.main, *words, "--untrained", "--episodes=5", "--config.eval.judge=true")
    scored = read_episodes(file)
    assert (len(plain), len(scored)) == (2, 3)
    settings = read(QUICKSTART, *small)
    student, teacher = load_student(settings, one_device()), load_teacher(settings, one_device())
    assert teacher is not None
    agent = build.make_agent(student, settings, temperature=settings.eval.temperature)
    played = evaluate.play_model(settings, agent, student.params, "valid_seen", tasks=3)
    for number, (line, c) in enumerate(zip(scored, played, strict=True)):
        assert (line["who"], line["update"], line["task"]["index"]) == ("before", 0, number)
        assert line["tokens"]["id"] == c.tokens
        assert "z" not in line
        own, of_turn = line["student_tokens"], line["tokens"]["turn"]
        factors = [turn["intervention"] * turn["confidence"] for turn in line["turns"]]
        want = [factors[of_turn[position]] for position in own["position"]]
        np.testing.assert_allclose(own["weight"], want, rtol=1e-4)
        # The teacher's own forward pass over the same tokens.
        hidden = model.forward(
            teacher.params,
            jnp.array([c.tokens]),
            config=teacher.config,
            query_chunk=len(c.tokens),
            remat="none",
        )
        logprobs = log_softmax(np.asarray(hidden[0] @ model.head(teacher.params)), axis=-1)
        places = np.array(own["position"])
        of_token = logprobs[places - 1, np.array(c.tokens)[places]]
        np.testing.assert_allclose(own["teacher_logprob"], of_token, rtol=1e-3, atol=1e-4)
    without = ("z", "verdict", "intervention", "confidence", "judge")
    for line, other in zip(plain, scored[:2], strict=True):
        assert line["student_tokens"].keys() == {"position", "text"}
        assert not any(name in turn for turn in line["turns"] for name in without)
        assert line["messages"] == other["messages"]


def test_a_players_episodes_are_written_without_tokens(
    in_process: Callable, tmp_path: Path, small: tuple
) -> None:
    words = ("--config=quickstart:runlocal", *small, f"--workdir={tmp_path}")
    in_process(evaluate.main, *words, "--policy=expert", "--episodes=2")
    for split in ("valid_seen", "valid_unseen"):
        lines = read_episodes(tmp_path / "episodes" / f"expert-{split}.jsonl")
        assert [line["task"]["index"] for line in lines] == [0, 1]
        for line in lines:
            assert line["task"]["split"] == split
            assert not {"tokens", "student_tokens"} & line.keys()
            said = [m for m in line["messages"] if m["role"] == "assistant"]
            assert len(said) == len(line["turns"]) > 0


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("quikstart", "quickstart"), ("quickstart/sagee/seed-0", "quickstart/sage/seed-0")],
)
def test_a_mistyped_workdir_is_not_evaluated_as_untrained(
    typed: str, offered: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("quickstart", "quickstart/sage/seed-0", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(to_json(load(QUICKSTART, [])))
    before = sorted(tmp_path.rglob("*"))
    for main, words in (
        (evaluate.main, [f"--config={QUICKSTART}", "--policy=model"]),
        (export.main, [f"--out={tmp_path / 'out'}"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, f"--workdir={tmp_path / typed}"])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert f"closest: `{tmp_path / offered}`" in message
        assert message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_evaluation_in_the_workdir_of_a_running_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [f"--config={QUICKSTART}", "--policy=random", f"--workdir={tmp_path}"]
    with held(tmp_path), pytest.raises(SystemExit) as stop:
        evaluate.main(words)
    assert stop.value.code == 2
    assert "is working in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--policy=before"], ["`--policy`", "model", "teacher", "expert", "random", "before"]),
        (["--policy=teacher", "--step=3"], ["`--step`", "student"]),
        (["--policy=teacher", "--config.teacher="], ["`teacher` is empty"]),
        (["--untrained", "--step=3"], ["`--untrained`", "`--step`"]),
        (["--config.eval.splits=train,test"], ["`eval.splits`", "valid_unseen", "'test'"]),
        (["--config.eval.task=3"], ["`eval.task`", "`eval.tasks`"]),
        (["--config.eval.tasks=0"], ["`eval.tasks`", "at least 1"]),
        (["--config.student=no/where"], ["`no/where`"]),
        (["--policy=model"], ["has no checkpoint", "`--untrained`"]),
        (["--workdir=s3://bucket/run"], ["`--workdir`", "s3://bucket/run", "URL"]),
        (["--config.student=s3://bucket/model"], ["s3://bucket/model", "URL"]),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if not any(word.startswith("--workdir") for word in words):
        words = [f"--workdir={tmp_path}", *words]
    if not any(word.startswith(("--policy", "--untrained")) for word in words):
        words = ["--untrained", *words]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--config=quickstart:runlocal", *words])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert all(word in message for word in expected), message
    assert list(tmp_path.iterdir()) == []


# --- Export


def newest_params(workdir: Path) -> tuple[model.ModelConfig, model.Params]:
    student = load_student(read_settings(read_stored(workdir / "config.json")), one_device())
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    restored = checkpoints.restore_latest({"params": student.params}, partial=True)
    checkpoints.close()
    assert restored is not None
    return student.config, restored[1]["params"]


def greedy(
    sizes: model.ModelConfig, params: model.Params, prompt: list[int], new: int
) -> list[int]:
    """Greedy continuation by whole forward passes over a padded row."""
    tokens = np.zeros((1, len(prompt) + new), np.int32)
    tokens[0, : len(prompt)] = prompt

    @jax.jit
    def following(row: jax.Array, last: jax.Array) -> jax.Array:
        hidden = model.forward(params, row, config=sizes, query_chunk=row.shape[1], remat="none")
        return (hidden[0, last] @ model.head(params)).argmax()

    for place in range(len(prompt), len(prompt) + new):
        tokens[0, place] = following(tokens, place - 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("run", ["trained", "built"])
def test_transformers_opens_an_export_and_decodes_the_same_tokens(
    run: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    workdir, out = request.getfixturevalue(run).workdir, tmp_path / "exported"
    assert export.export(workdir, out) == 4
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    question = [{"role": "user", "content": "You are in a kitchen. Your task is to: heat."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    sizes, params = newest_params(workdir)
    with torch.no_grad():
        tokens = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
        )
    # `min_new_tokens` bans the end of a turn until then, so it is compared up to our first one.
    expected = greedy(sizes, params, prompt, new=24)
    ours = load_model(str(out), dtype="float32", mesh=one_device())
    length = next((i for i, t in enumerate(expected) if t in ours.chat.stop_ids), 24)
    assert length > 0
    assert tokens[0, len(prompt) :].tolist()[:length] == expected[:length]

    # And so do our own configs.
    assert ours.config == sizes
    for mine, exported in zip(jax.tree.leaves(params), jax.tree.leaves(ours.params), strict=True):
        np.testing.assert_array_equal(mine, exported)


def test_an_export_asks_for_parameters_alone(student: LoadedModel, tmp_path: Path) -> None:
    config = load("quickstart", ["--config.mesh.tensor=64"])  # more devices than there are
    (tmp_path / "config.json").write_text(to_json(config))
    params = jax.tree.map(lambda x: x * 1.01, student.params)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(7, {"params": params}, {})
    checkpoints.close()
    assert export.export(tmp_path, tmp_path / "model") == 7
    got = load_model(str(tmp_path / "model"), dtype="float32", mesh=one_device())
    assert got.config == student.config
    jax.tree.map(np.testing.assert_array_equal, got.params, params)


def test_an_export_goes_where_it_may_and_is_whole_or_absent(
    student: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(out: Path) -> None:
        hf.save_model(
            out, student.params, student.config, dtype="float32", tokenizer_from=student.folder
        )

    # A folder that exists is filled, as a mount point has to be; its own root is not replaced.
    there = tmp_path / "there"
    there.mkdir()
    (there / "lost+found").mkdir()
    killed = there / f".there.{dead_pid()}.partial"
    killed.mkdir()
    (killed / "model.safetensors").touch()
    inode = there.stat().st_ino
    (tmp_path / "link").symlink_to(there)
    save(tmp_path / "link")
    assert there.stat().st_ino == inode
    expected = {path.name for path in student.folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= {p.name for p in there.iterdir()}
    assert {p.name for p in there.iterdir()} - expected <= {"lost+found", "generation_config.json"}

    # The same where nothing is, behind a link too, and killed exports are cleared away.
    killed = tmp_path / f".new.{dead_pid()}.partial"
    killed.mkdir()
    (tmp_path / "ahead").symlink_to(tmp_path / "new")
    save(tmp_path / "ahead")
    files = {p.name: p.read_bytes() for p in there.iterdir() if p.is_file()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == files
    assert {p.name for p in tmp_path.iterdir()} == {"there", "link", "ahead", "new"}

    # Fails in the middle.
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(hf.save, "save_file", lambda *_, **__: raise_it(OSError("full")))
    for out in (empty, tmp_path / "absent"):
        with pytest.raises(OSError, match="full"):
            save(out)
    assert list(empty.iterdir()) == []
    assert not (tmp_path / "absent").exists()

    # A place that is none.
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("new/config.json", "new/config.json/below", "loop", "loop/below"):
        with pytest.raises(ValueError, match=rf"`.*{name}`"):
            save(tmp_path / name)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_an_export_needs_a_run_with_a_checkpoint_and_overwrites_nothing(
    trained: Any, command: Callable, tmp_path: Path
) -> None:
    def error(workdir: Path, out: Path = tmp_path / "out") -> str:
        with pytest.raises(ValueError, match="`") as caught:
            export.export(workdir, out)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "`--workdir`" in error(tmp_path / "nowhere")
    assert "config.json" in error(tmp_path)
    (tmp_path / "config.json").write_text(to_json(load("quickstart", [])))
    assert "no checkpoint" in error(tmp_path)
    assert "absent or an empty folder" in error(tmp_path, tmp_path)  # before anything is read
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path / "config.json") in error(tmp_path)

    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("all of it")
    words = ("export", f"--workdir={trained.workdir}")
    refused = command(*words, f"--out={used}")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert str(used) in refused.stderr
    assert [path.name for path in used.iterdir()] == ["thesis.txt"]
    done = command(*words, f"--out={tmp_path / 'new'}")
    assert done.stdout == f"update 4 of {trained.workdir} written to {tmp_path / 'new'}\n"
