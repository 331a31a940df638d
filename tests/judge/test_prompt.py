"""A question of the user's: its fields, its words and what they mean."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from buckets import BUCKET, another_process, served
from settings import read

from opd_jax.agent.conversation import Turn
from opd_jax.config.loading import load
from opd_jax.config.settings import binds_a_run
from opd_jax.config.workdir import check_models, store_run
from opd_jax.envs.base import Task
from opd_jax.judge.answer import UNPARSABLE, parse_label
from opd_jax.judge.prompt import Prompt, judge_prompt, read_prompt
from opd_jax.losses import Verdict
from opd_jax.runtime import bucket
from opd_jax.runtime.exits import printed

__all__ = ["served"]

FILE = """
Good = SKIP
Dubious = WEAK
bad = STRONG
Worse = STRONG

Goal: {task.goal} {{as told}}

The agent saw: {turn.observation}
It may: {admissible}. It says: {turn.response}
"""
TASK = Task(id="t/0", type="heat", goal="a hot egg", scene="a fridge")
TURN = Turn(
    observation="It is {closed}.",
    admissible=("open fridge", "look", "wait"),
    response="Action: look",
    stop="stop_token",
    action="look",
    failure="",
    feedback="Nothing.",
    oracle="",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "judge.txt"
    path.write_text(FILE)
    return path


def test_a_file_gives_words_their_verdicts_and_the_question(file: Path) -> None:
    prompt = read_prompt(str(file))
    assert prompt.words == ("Good", "Dubious", "bad", "Worse")
    assert prompt.verdicts == (Verdict.SKIP, Verdict.WEAK, Verdict.STRONG, Verdict.STRONG)
    assert prompt.question(TASK, TURN, admissible_shown=2, context="table9") == (
        "Goal: a hot egg {as told}\n\n"
        "The agent saw: It is {closed}.\n"
        "It may: open fridge, look (+1 more). It says: Action: look"
    )


def test_an_answer_is_the_verdict_of_its_word(file: Path) -> None:
    prompt = read_prompt(str(file))
    said = {"good.": Verdict.SKIP, "It is BAD": Verdict.STRONG, "worse": Verdict.STRONG}
    for answer, verdict in said.items():
        assert parse_label(answer, prompt) == verdict
    for answer in ("SKIP", "", "good or bad", "goodness"):
        assert parse_label(answer, prompt) == UNPARSABLE


def test_the_file_may_lie_in_a_bucket(file: Path, served: Any) -> None:
    another_process()
    url = f"gs://{BUCKET}/judge.txt"
    with pytest.raises(ValueError, match=r"`judge\.prompt`.*expected a file of text") as error:
        read_prompt(url)
    assert f"'{url}'" in printed(str(error.value)).partition("]")[2]
    bucket._blob(bucket.place(url, name="judge.prompt")).upload_from_filename(file)
    before = read_prompt(url)
    assert before == read_prompt(str(file))
    file.write_text(FILE.replace("Dubious = WEAK", "Dubious = SKIP"))
    bucket._blob(bucket.place(url, name="judge.prompt")).upload_from_filename(file)
    assert read_prompt(url) == before != read_prompt(str(file))  # a process reads it once
    with pytest.raises(ValueError, match=r"`judge\.prompt`.*no such bucket"):
        read_prompt("gs://nowhere/judge.txt")


def test_without_a_file_it_is_the_paper_s_question() -> None:
    how: Any = dict(admissible_shown=2, context="+feedback")
    assert read_prompt("") == Prompt()
    assert Prompt().question(TASK, TURN, **how) == judge_prompt(TASK, TURN, **how)
    assert [Verdict(code).name for code in Prompt().verdicts] == list(Prompt().words)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "expected a line `WORD = SKIP`"),
        ("YES = SKIP\n\nIs it good?", "for each of two words or more"),
        ("YES = SKIP\nyes = STRONG\n\nIs it good?", "for each of two words or more"),
        ("YES = 0\nNO = 1\n\nIs it good?", "first lines are 'YES = 0"),
        ("YES = SKIP\nNO = STRONG", "and the question"),
        ("YES = SKIP\nNO = STRONG\n\nIs {turn.action} good, {name}?", "no field {name}; expected"),
        ("YES = SKIP\nNO = STRONG\n\n{task.__class__}?", "no field {task.__class__}; expected"),
        ("YES = SKIP\nNO = STRONG\n\nIs it {good?", "a brace of the text itself is doubled"),
    ],
)
def test_a_file_that_is_written_otherwise_is_a_mistake(
    text: str, wrong: str, tmp_path: Path
) -> None:
    path = tmp_path / "judge.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^`judge.prompt` = .*{re.escape(wrong)}"):
        read("quickstart", f"judge.prompt={path}")


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`judge.prompt` = .*: expected a file of text"):
        read("quickstart", f"judge.prompt={tmp_path / 'none.txt'}")


def test_a_model_that_learns_to_judge_learns_the_paper_s_words(file: Path) -> None:
    with pytest.raises(ValueError, match=r"`judge.prompt` has words of its own"):
        read("household_pair", f"judge.prompt={file}")


def test_a_run_goes_on_with_the_same_text_only(file: Path, tmp_path: Path) -> None:
    flags = [f"--config.judge.prompt={file}"]
    settings = read("quickstart", *flags)
    assert binds_a_run(settings)("judge.prompt")
    workdir = tmp_path / "run"
    store_run(load("quickstart", flags), settings, {}, workdir)
    check_models(settings, workdir)
    file.write_text(FILE.replace("Dubious = WEAK", "Dubious = SKIP"))
    with pytest.raises(ValueError, match=r"`judge.prompt` = .* is not the text that the run in"):
        check_models(settings, workdir)
    # Where the teacher is not asked, the file is not read for anything.
    unread = read("quickstart:method=opd", *flags)
    assert not binds_a_run(unread)("judge.prompt")
    check_models(unread, workdir)


def test_a_record_is_shown_where_the_environment_keeps_one(tmp_path: Path) -> None:
    path = tmp_path / "judge.txt"
    path.write_text("good = SKIP\nbad = WEAK\n\n{record.seen} / {record.tried} / {turn.action}?")
    prompt = read_prompt(str(path))
    told = dataclasses.replace(TURN, record={"seen": ("a", "b"), "tried": ()})
    assert prompt.question(TASK, told, admissible_shown=2, context="table9") == (
        "a; b / nothing / look?"
    )
    ways = {
        "`judge.context` = record": ["judge.context=record"],
        f"`judge.prompt` = '{path}'": [f"judge.prompt={path}"],
    }
    for named, change in ways.items():
        read("quickstart", *change)
        with pytest.raises(ValueError, match=f"{re.escape(named)} shows .* `env.by` = 'gymnasium'"):
            read("quickstart", "env.by=gymnasium", *change)
        read("quickstart:method=opd", "env.by=gymnasium", *change)  # nobody is asked
