"""One reading for score and judge: what it keeps is what the teacher's own pass gives."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from settings import one_device, read

from opd_jax.agent.conversation import Conversation
from opd_jax.config import build
from opd_jax.config.models import LoadedModel, load_student, load_teacher
from opd_jax.config.settings import Settings
from opd_jax.envs.base import BROKEN
from opd_jax.experience.source import Played
from opd_jax.judge.labels import env_labels
from opd_jax.judge.verdicts import judge_turns
from opd_jax.learner.train_state import init_state
from opd_jax.losses import Verdict
from opd_jax.runtime.mesh import make_mesh, shard_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

FIELDS = (
    "judge.context=history",
    "judge.agreement_every=0",
    "judge.batch=4",  # eight conversations, so a row of the cache is asked about several
    "env.max_turns=4",
    "rollout.batch=8",
    "rollout.context_tokens=768",
)


def models(settings: Settings, mesh: jax.sharding.Mesh) -> tuple[LoadedModel, LoadedModel]:
    teacher = load_teacher(settings, mesh)
    assert teacher is not None
    return load_student(settings, mesh), teacher


@pytest.fixture(scope="module")
def played() -> Played:
    """Episodes. Of one all turns failed, of one the last two; one broke, and two are the same."""
    settings = read("quickstart:runlocal", *FIELDS)
    with jax.set_mesh(one_device()):
        student, teacher = models(settings, one_device())
        state = init_state(student.params, build.optimizer(settings), seed=settings.seed)
        tasks = build.panels(settings)["train"]
        found = build.make_source(settings, student, teacher, tasks=tasks).play(state)
    failing, ending, broken, *_ = found.conversations
    for conversation, first in ((failing, 0), (ending, len(ending.turns) - 2)):
        for k in range(first, len(conversation.turns)):
            conversation.turns[k] = replace(conversation.turns[k], failure="invalid")
    broken.end = BROKEN
    found.conversations[-1] = found.rows[-1] = found.conversations[-2]
    return found


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [(dict(data=1, fsdp=1), 4), (dict(data=1, fsdp=1), 1), (dict(data=2, fsdp=2), 4)],
)
def test_the_judge_keeps_what_the_teachers_pass_gives(
    mesh: dict, rows: int, played: Played
) -> None:
    fields = [f"judge.batch={rows}", *(f"mesh.{k}={n}" for k, n in mesh.items())]
    settings = read("quickstart:runlocal", *FIELDS, *fields)
    assert settings.judges_what_it_scores
    devices = jax.devices()[: mesh["data"] * mesh["fsdp"]]
    with jax.set_mesh(made := make_mesh(**mesh, tensor=1, devices=devices)):
        student, teacher = models(settings, made)
        said = build.make_labeller(settings, teacher)(played.conversations, 0)
        batch = build.make_pack(settings, student.config)(played, said.verdict)
        _, teacher_pass = build.compile_update(
            settings, student=student.config, teacher=teacher.config, placement=None
        )
        assert teacher_pass is not None
        assert said.hidden is not None
        want = jax.device_get(teacher_pass(teacher.params, shard_batch(batch)))
        got = jax.device_get(said.hidden)
    assert got.shape == want.shape
    filled = batch.response < batch.tokens.shape[1]
    assert filled.any(axis=1).tolist() == [True, True, False, *[True] * 5]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not got[~filled].any()
    assert got[filled].any(axis=-1).all()


def test_verdicts_are_those_of_questions_alone_and_the_update_is_the_same(played: Played) -> None:
    settings = read("quickstart:runlocal", *FIELDS)
    with jax.set_mesh(one_device()):
        student, teacher = models(settings, one_device())
        said = build.make_labeller(settings, teacher)(played.conversations, 0)
        labels = env_labels(played.conversations, max_turns=settings.env.max_turns)
        by = build.make_judge(teacher, settings)
        alone = judge_turns(teacher.params, played.conversations, labels, by=by)
        assert alone.hidden is None
        assert said.hidden is not None
        np.testing.assert_array_equal(said.verdict, alone.verdict)
        assert (said.verdict == Verdict.DET_FAIL).sum() >= 3

        batch = build.make_pack(settings, student.config)(played, said.verdict)

        def updated(hidden: Any) -> Any:
            state = init_state(student.params, build.optimizer(settings), seed=settings.seed)
            state = jax.tree.map(lambda x: x.copy(), state)  # the update donates it
            _, metrics = build.make_update(settings, student, teacher, state)(state, batch, hidden)
            return metrics

        # The update donates them.
        other, once, twice = updated(0 * said.hidden), updated(said.hidden), updated(None)
    for name in ("loss", "z", "grad_norm"):
        np.testing.assert_allclose(once[name], twice[name], rtol=1e-5)
    assert abs(other["loss"] - once["loss"]) > 0.1  # they are used


def test_an_episode_that_nobody_reads_changes_nothing(played: Played) -> None:
    settings = read("quickstart:runlocal", *FIELDS)
    with jax.set_mesh(one_device()):
        _, teacher = models(settings, one_device())
        empty = [Conversation(task=None)] * 8
        said = build.make_labeller(settings, teacher)(empty, 1)
    assert said.hidden is not None
    assert not np.any(jax.device_get(said.hidden))
