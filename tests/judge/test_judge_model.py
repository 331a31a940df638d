"""Another model than the teacher as the judge."""

import random
from pathlib import Path

import jax
import numpy as np
import pytest
from settings import one_device, read

from opd_jax.agent.conversation import Conversation
from opd_jax.config import build, load
from opd_jax.config.models import load_student, load_teacher
from opd_jax.config.settings import binds_a_run
from opd_jax.config.workdir import check_models, store_run
from opd_jax.envs.make import make_env
from opd_jax.envs.players import make_player
from opd_jax.experience.demonstrations import play_out

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = ("env.max_turns=6", "judge.batch=4", "judge.extend_widths=256", "judge.agreement_every=0")
OTHER = "judge.model=embedded:student"


def conversations() -> list[Conversation]:
    settings = read("quickstart:runlocal", *SMALL).env
    player = make_player("random", settings, field="", habits={})
    env = make_env(settings)
    rng = random.Random(0)
    return [play_out(env, "train", index, player=player, rng=rng) for index in range(4)]


def test_it_gives_the_verdicts() -> None:
    played = conversations()
    settings, mesh = read("quickstart:runlocal", *SMALL), one_device()
    with jax.set_mesh(mesh):
        student, teacher = load_student(settings, mesh), load_teacher(settings, mesh)
        of_student = build.make_labeller(settings, student)(played, 1).verdict
        of_teacher = build.make_labeller(settings, teacher)(played, 1).verdict
        changed = read("quickstart:runlocal", *SMALL, OTHER)
        verdict, metrics, *_ = build.make_labeller(changed, teacher)(played, 1)
    assert (of_student != of_teacher).any()
    np.testing.assert_array_equal(verdict, of_student)
    assert metrics["judge/asked"][0] > 0


def test_its_mistakes_are_found_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"`judge.context` = 'history' .* `judge.model`"):
        read("quickstart", OTHER, "judge.context=history")
    with pytest.raises(ValueError, match=r"`nowhere` does not exist"):
        build.check_named(read("quickstart", "judge.model=nowhere"))
    answer = ("judge.decode=generate", "judge.max_new_tokens=9999", OTHER)
    with pytest.raises(ValueError, match=r"leaves no room .*`judge.model` = 'embedded:student'"):
        build.check_named(read("quickstart", *answer))
    build.check_named(read("quickstart", OTHER))
    # Where nobody is asked it is not looked for.
    build.check_named(read("quickstart:method=opd", "judge.model=nowhere"))


def test_a_run_goes_on_with_the_same_judge(tmp_path: Path) -> None:
    with_it = read("quickstart", OTHER)
    assert binds_a_run(with_it)("judge.model")
    assert not binds_a_run(read("quickstart:method=opd"))("judge.model")
    store_run(load("quickstart", [f"--config.{OTHER}"]), with_it, {}, tmp_path)
    check_models(with_it, tmp_path)
    with pytest.raises(ValueError, match=r"`judge.model` = .* is not the model that the run in"):
        check_models(read("quickstart", "judge.model=embedded:teacher"), tmp_path)
