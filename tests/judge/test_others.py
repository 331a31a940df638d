"""Judges that are no model: the environment's labels, and a function of the user's."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from settings import read

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.config import build, load
from opd_jax.config.settings import binds_a_run, binds_an_evaluation, read_settings
from opd_jax.envs.base import BROKEN, Task
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.rule import rule
from opd_jax.envs.react import Random
from opd_jax.experience.demonstrations import play_out
from opd_jax.losses import Verdict

SKIP, WEAK, STRONG, FAILED = Verdict.SKIP, Verdict.WEAK, Verdict.STRONG, Verdict.DET_FAIL


def conversation(*turns: tuple[str, str], end: str = "turn_limit") -> Conversation:
    """Turns as (failure, oracle)."""
    made = Conversation(Task("t", "", "", ""), end=end)
    for failure, oracle in turns:
        action = "" if failure else "look"
        made.turns.append(
            Turn(
                observation="",
                admissible=(),
                response=action,
                stop="stop_token",
                action=action,
                failure=failure,
                feedback="",
                oracle=oracle,
            )
        )
    return made


PLAYED = [
    conversation(("", "WEAK"), ("rejected", ""), ("", "SKIP")),
    conversation(("", ""), ("", "STRONG")),
    conversation(("", "SKIP"), end=BROKEN),
]


def labeller(*changes: str) -> Any:
    return build.make_labeller(read("quickstart", "env.max_turns=4", *changes), None)


def test_the_oracle_gives_the_environments_labels() -> None:
    verdict, metrics, *_ = labeller("judge.by=oracle")(PLAYED, 0)
    assert verdict.dtype == np.int32
    # A failed turn needs no label, and one without a label is STRONG. No turn: SKIP.
    assert verdict.tolist() == [
        [WEAK, FAILED, SKIP, SKIP],
        [STRONG, STRONG, SKIP, SKIP],
        [SKIP, SKIP, SKIP, SKIP],
    ]
    assert metrics["judge/precision"] == (2, 2)
    assert metrics["judge/recall"] == (2, 2)
    assert metrics["judge/asked"] == (4, 5)
    assert metrics["verdict/det_fail"] == (1, 5)


def test_an_oracle_without_any_label_is_an_error_of_the_first_update_alone() -> None:
    judge = labeller("judge.by=oracle")
    with pytest.raises(ValueError, match=r"`judge.by` = 'oracle': no turn of the first batch"):
        judge([conversation(("", ""))], 0)
    assert judge([conversation(("", ""))], 1)[0][0, 0] == STRONG
    assert judge([conversation(("rejected", ""))], 0)[0][0, 0] == FAILED


def test_the_rule_sees_the_record_of_each_turn() -> None:
    env = Household(size="small", max_turns=6, show_admissible=0)
    played = [
        play_out(
            env,
            "valid_unseen",
            n,
            player=lambda task, first, rng: Random(rng),
            rng=random.Random(n),
        )
        for n in range(8)
    ]
    played.append(conversation(("rejected", "")))
    build = labeller("env.max_turns=6", "judge.by=record")
    verdict, metrics, judgement, _ = build(played, 0)
    expected = np.full((9, 6), SKIP)
    for row, c in enumerate(played):
        for k, turn in enumerate(c.turns):
            if turn.failure:
                expected[row, k] = FAILED
            else:
                expected[row, k] = Verdict[rule(c.task, turn.record, turn.action)]
    assert verdict.tolist() == expected.tolist()
    assert {SKIP, STRONG, FAILED} <= set(verdict.flat)
    assert metrics["judge/asked"][0] == judgement.asked.sum() == (expected != FAILED).sum() - 5
    assert metrics["judge/recall"][0] > 0.9 * metrics["judge/recall"][1]
    for by in ("alfworld_qwen3", "scienceworld_qwen3"):
        changes = ("env.data=somewhere",) if "alf" in by else ()
        with pytest.raises(ValueError, match=r"`judge.by` = 'record' .* brings none \(`rule` and"):
            read(by, *changes, "judge.by=record")


# --- A function of the user's


def repeats(conversations: Sequence[Conversation], update: int, *, code: int = STRONG):
    """A repeated action needs correction."""
    longest = max(len(c.turns) for c in conversations)
    verdict = np.zeros((len(conversations), longest), int)
    for row, played in enumerate(conversations):
        actions = [turn.action for turn in played.turns]
        for k, action in enumerate(actions):
            verdict[row, k] = code if action in actions[:k] else SKIP
    return verdict, {"judge/updates": update}


def test_a_function_judges_the_turns_that_did_not_fail() -> None:
    verdict, metrics, *_ = labeller("judge.by=test_others:repeats")(PLAYED, 3)
    assert verdict.dtype == np.int32
    assert verdict.tolist() == [
        [SKIP, FAILED, STRONG, SKIP],
        [SKIP, STRONG, SKIP, SKIP],
        [SKIP, SKIP, SKIP, SKIP],
    ]
    assert metrics["judge/updates"] == 3
    assert metrics["judge/precision"] == (1, 2)


def with_code(code: int) -> Any:
    """Settings of a config whose section has a field for the function."""
    config = ConfigDict(load("quickstart", []).to_dict())
    config.judge.by, config.judge.code = "test_others:repeats", code
    config.env.max_turns = 4
    return config


def test_the_other_fields_of_the_section_are_its_arguments() -> None:
    judge = build.make_labeller(read_settings(with_code(int(WEAK))), None)
    assert judge(PLAYED, 0)[0][0, 2] == WEAK
    config = with_code(1)
    config.judge.shade = "red"
    with pytest.raises(ValueError, match=r"`judge.by` = .*`judge.shade` is none of .* takes code"):
        read_settings(config)
    # Elsewhere an unknown field is a typo.
    config.judge.by = "teacher"
    with pytest.raises(ValueError, match=r"`judge.code`: there is no such setting"):
        read_settings(config)


def all_four(conversations: Sequence[Conversation], update: int):
    return np.full((len(conversations), 4), FAILED), {}


def floats(conversations: Sequence[Conversation], update: int):
    return np.ones((len(conversations), 4)), {}


def too_few(conversations: Sequence[Conversation], update: int):
    return np.zeros((len(conversations), 2), int), {}


def too_many(conversations: Sequence[Conversation], update: int):
    return np.zeros((len(conversations), 5), int), {}


def flat(conversations: Sequence[Conversation], update: int):
    return np.zeros(len(conversations), int), {}


def alone(conversations: Sequence[Conversation], update: int):
    return np.zeros((len(conversations), 4), int)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("all_four", r"expected the codes 0 \(SKIP\), 1 \(WEAK\), 2 \(STRONG\), got \[3\]"),
        ("floats", r"expected the codes .* got \[1.0\]"),
        ("too_few", r"expected verdicts \[3, 4\], got the shape \[3, 2\]"),
        ("too_many", r".* got the shape \[3, 5\]"),
        ("flat", r".* got the shape \[3\]"),
        ("alone", r"expected verdicts \[B, K\] and a dict of metrics"),
    ],
)
def test_what_it_gives_is_checked(name: str, wrong: str) -> None:
    judge = labeller(f"judge.by=test_others:{name}")
    with pytest.raises(ValueError, match=f"`judge.by` = 'test_others:{name}': {wrong}"):
        judge(PLAYED, 0)


def one_argument(conversations: Sequence[Conversation]):
    raise AssertionError


def needs_more(conversations: Sequence[Conversation], update: int, *, words: tuple[str, ...]):
    raise AssertionError


def test_failures_alone_need_no_judge() -> None:
    verdict = labeller("judge.by=failures")(PLAYED, 0).verdict
    expected = np.full((3, 4), Verdict.SKIP)
    expected[0, 1] = Verdict.DET_FAIL
    assert verdict.tolist() == expected.tolist()
    read("alfworld_qwen3", "env.data=somewhere", "judge.by=failures")  # every environment has them


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            ["judge.by=techer"],
            r"`judge.by`: expected one of teacher, oracle, failures, record, or module:name",
        ),
        (["judge.by=test_others:nobody"], r"`judge.by` = .* module `test_others` has no `nobody`"),
        (["judge.by=test_others:one_argument"], r"a function of \(conversations, updates done\)"),
        (["judge.by=test_others:needs_more"], r"`judge.words` is missing"),
        (["judge.by=test_others:PLAYED"], r"a function of \(conversations, updates done\)"),
        (["judge.by=oracle", "eval.judge=true"], r"`eval.judge` .* `judge.by` = 'oracle'"),
    ],
)
def test_mistakes_are_found_in_the_settings(changes: list[str], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read("quickstart", *changes)


def test_an_oracle_needs_an_environment_with_labels() -> None:
    with pytest.raises(ValueError, match=r"`judge.by` = 'oracle' takes .* `env.by` = 'alfworld'"):
        read("alfworld_qwen3", "env.data=somewhere", "judge.by=oracle")
    read("alfworld_qwen3:method=opd", "env.data=somewhere", "judge.by=oracle")  # it is not asked


def test_who_judges_binds_a_run_and_how_the_teacher_is_asked_only_if_it_is() -> None:
    for by, asked in (("teacher", True), ("oracle", False), ("test_others:repeats", False)):
        binds = binds_a_run(read("quickstart", f"judge.by={by}"))
        assert binds("judge.by")
        for name in ("decode", "context", "admissible_shown"):
            assert binds(f"judge.{name}") == asked
    assert binds_a_run(read_settings(with_code(1)))("judge.code")
    assert not binds_a_run(read("quickstart:method=opd"))("judge.by")
    assert not binds_an_evaluation(read("quickstart"))("judge.by")
