"""What the embedded pair can do: it thinks, acts and judges, and a rebuild of it learns.

Bounds lie far below what was measured when the pair was built, so that another machine's rounding
passes and a pair of random or swapped weights does not.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from opd_jax import evaluate
from opd_jax.agent.conversation import Conversation
from opd_jax.config import build as experiment
from opd_jax.config import load
from opd_jax.experience.stream import balanced_turns
from opd_jax.judge import agreement
from opd_jax.judge.verdicts import Judgement
from opd_jax.judge.verdicts import judge as judge_all
from opd_jax.report.figures import summarize
from opd_jax.runtime.mesh import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = 20


def settings(size: str) -> FrozenConfigDict:
    """Rooms of one size, all else alike: one set of compiled programs serves every size."""
    return load(
        str(CONFIGS / "quickstart.py"),
        [
            f"--config.env.size={size}",
            "--config.env.max_turns=30",
            "--config.rollout.context_tokens=896",
        ],
    )


@pytest.fixture(scope="module")
def models() -> dict[str, experiment.LoadedModel]:
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    return {
        who: experiment.load_model(f"embedded:{who}", dtype="float32", mesh=mesh)
        for who in ("student", "teacher")
    }


@pytest.fixture(scope="module")
def played(models: dict) -> dict[tuple[str, str], list[Conversation]]:
    """Greedy episodes in scenes nobody trained in."""
    episodes = {}
    for who, loaded in models.items():
        for size in ("small", "large"):
            config = settings(size)
            episodes[who, size] = evaluate.play_model(
                loaded.params,
                jax.random.key(0),
                agent=experiment.make_agent(loaded, config.rollout, temperature=0.0),
                env=config.env,
                split="valid_unseen",
                tasks=TASKS,
                batch=TASKS,
            )
    return episodes


def success(conversations: list[Conversation]) -> float:
    return summarize(conversations)["success"]


@pytest.mark.parametrize(("size", "bound"), [("small", 0.8), ("large", 0.7)])
def test_the_teacher_solves_tasks_in_unseen_scenes(played: dict, size: str, bound: float) -> None:
    assert success(played["teacher", size]) >= bound


def test_the_student_has_begun_and_has_much_to_learn(played: dict) -> None:
    # Over both sizes, for more episodes: a share from the low tens to the middle of percents.
    student, best = (
        success(played[who, "small"] + played[who, "large"]) for who in ("student", "teacher")
    )
    assert 0.05 <= student <= best - 0.2


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_both_think_before_they_act(played: dict, who: str) -> None:
    turns = [t for size in ("small", "large") for c in played[who, size] for t in c.turns]
    formed = [re.fullmatch(r"Thought: [^\n]+\nAction: [^\n]+", turn.response) for turn in turns]
    assert np.mean([match is not None for match in formed]) >= 0.95
    assert np.mean([turn.stop == "stop_token" for turn in turns]) >= 0.95
    # A thought is of the moment: not one sentence for everything.
    assert len({turn.response.split("\n")[0] for turn in turns}) >= 20


# --- The judge


@pytest.fixture(scope="module")
def others(models: dict) -> list[Conversation]:
    """Episodes by other players in unseen scenes, whose turns the oracle has labelled."""
    config = load(
        str(CONFIGS / "household_pair.py:who=teacher"),
        [
            "--config.data.split=valid_unseen",
            "--config.data.sizes=small,large",
            "--config.data.sizes_from=0",
            "--config.seed=99",
        ],
    )
    loaded = models["teacher"]
    play = experiment.make_demonstrator(config, tokenizer=loaded.tokenizer, chat=loaded.chat)
    return [play(number) for number in range(60)]


@pytest.fixture(scope="module")
def asked(others: list[Conversation]) -> list[Conversation]:
    """The same number of turns of each label, each the only one of its conversation to judge."""
    made = []
    for conversation, index in balanced_turns(others, 120, random.Random(0)):
        turns = [dataclasses.replace(turn, failure="not asked") for turn in conversation.turns]
        turns[index] = conversation.turns[index]
        made.append(dataclasses.replace(conversation, turns=turns))
    return made


def judgement(models: dict, asked: list[Conversation], decode: str) -> Judgement:
    judge = experiment.make_judge(models["teacher"], settings("large").judge)
    return judge_all(models["teacher"].params, asked, by=judge, max_turns=30, decode=decode)


def test_the_judge_tells_good_turns_from_bad_ones(models: dict, asked: list) -> None:
    judged = judgement(models, asked, "constrained")
    assert judged.asked.sum() == len(asked)
    confusion = agreement.confusion(judged, asked).sum(axis=0)
    assert confusion.sum(axis=1).tolist() == [len(asked) / 3] * 3
    # One label for everything, whichever, would have 1/3.
    assert agreement.balanced_accuracy(confusion) >= 0.5, confusion
    # And in the distinction that weighs most: is a turn to be corrected at all?
    fine = confusion[0, 0] / confusion[0].sum()
    found = confusion[1:, 1:].sum() / confusion[1:].sum()
    assert (fine + found) / 2 >= 0.65, confusion


def test_the_judge_answers_in_words_as_it_scores_them(models: dict, asked: list) -> None:
    scored = judgement(models, asked, "constrained")
    said = judgement(models, asked, "generate")
    assert said.unparsable.sum() <= 0.02 * len(asked)
    assert (said.verdict == scored.verdict)[said.asked].mean() >= 0.95


# --- Building it


@pytest.mark.slow
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_shortened_rebuild_learns(who: str, command: Callable, tmp_path: Path) -> None:
    done = command(
        "train",
        f"--config=configs/household_pair.py:who={who}",
        "--config.train.updates=150",
        "--config.train.length_multiple=512",  # one shape: compiling takes longer than padding
        "--config.optimizer.warmup_updates=20",
        "--config.data.sizes=small",
        "--config.data.tokens_per_batch=4096",
        "--config.env.size=small",
        # Losses say it all; one task there must be.
        "--config.eval.splits=valid_seen",
        "--config.eval.tasks=1",
        "--config.eval.batch=1",
        "--config.eval.who=",
        f"--workdir={tmp_path}",
        # Updates by the hundred: programs twice as fast are worth their compilation.
        XLA_FLAGS="",
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 150
    # From even odds over some 600 tokens to knowing the format and most of what follows in it.
    assert np.mean(losses[:5]) > 3
    assert np.mean(losses[-20:]) < 1
