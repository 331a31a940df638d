"""The token with which a row stops being finite is found, and the student of before is kept."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import OPD, SAGE, SFT
from tiny_batch import CONFIG, STUDENT, TEACHER, make_batch
from updates import random_adapters

from opd_jax.learner.batch import Batch
from opd_jax.learner.nonfinite import Find, Place, make_find
from opd_jax.learner.objective import Objective
from opd_jax.model import ModelConfig, Params
from opd_jax.model.lora import Lora
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

# The third row is "..00.111".
ROW = 2


@cache
def finder(objective: Objective = SAGE, config: ModelConfig = CONFIG, **options: Any) -> Find:
    return make_find(
        student=config,
        teacher=CONFIG if objective.needs_teacher else None,
        objective=objective,
        dtype=jnp.dtype("float32"),
        # Shorter than a row: a NaN does not spread to the chunks before its own.
        query_chunk=4,
        loss_chunk=16,
        remat="none",
        **dict(lora=None) | options,
    )


def batch_with(token: int, position: int, row: int = ROW) -> Batch:
    """A token that occurs at one place of the batch, and nowhere else."""
    batch = make_batch()
    batch.tokens[batch.tokens == token] = token - 1
    batch.tokens[row, position] = token
    return batch


def spoilt(params: Params, name: str, at: Any, value: float = np.nan) -> Params:
    return {**params, name: params[name].at[at].set(value)}


TOKEN = 29
HIDDEN = "the {}'s hidden state"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("position", range(8))
def test_a_token_that_a_model_cannot_read_is_found_wherever_it_is(
    position: int, who: str, value: float
) -> None:
    batch = batch_with(TOKEN, position)
    models = {"student": STUDENT(), "teacher": TEACHER()}
    models[who] = spoilt(models[who], "embed", TOKEN, value)
    found = finder()(models["student"], None, models["teacher"], batch, 4)
    assert found == [Place(ROW, position, HIDDEN.format(who))]


def test_a_gradient_alone_is_found_with_the_parameter_that_it_is_of() -> None:
    # The norm of so small a vector is finite, and its derivative overflows.
    batch, position = batch_with(TOKEN, 5), 5
    student = spoilt(STUDENT(), "embed", TOKEN, 1e-20)
    find = finder(config=replace(CONFIG, norm_eps=1e-30))
    found = find(student, None, TEACHER(), batch, 4)
    assert found == [Place(ROW, position, "only the gradient, of `embed`")]


def test_a_model_that_says_nothing_finite_is_named_and_few_rows_are_looked_at() -> None:
    student, teacher = (spoilt(p, "head", (0, 0)) for p in (STUDENT(), TEACHER()))
    broken = finder()(student, None, TEACHER(), make_batch(), 3)
    assert broken == [Place(row, -1, "the student's log-probability") for row in range(3)]
    broken = finder()(STUDENT(), None, teacher, make_batch(), 1)
    assert broken == [Place(0, -1, "the teacher's log-probability")]
    assert finder()(STUDENT(), None, TEACHER(), make_batch(), 4) == []


def test_without_a_teacher_with_adapters_and_on_many_devices_it_is_the_same_token() -> None:
    batch, student = batch_with(TOKEN, 4), spoilt(STUDENT(), "embed", TOKEN)
    want = [Place(ROW, 4, HIDDEN.format("student"))]
    assert finder(SFT)(student, None, None, batch, 4) == want
    lora = Lora(rank=2, alpha=4.0, targets=("q", "down"), int8=False)
    adapters = random_adapters(CONFIG, lora, scale=0.1)
    assert finder(lora=lora)(adapters, student, TEACHER(), batch, 4) == want
    with jax.set_mesh(make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])):
        assert finder(OPD)(student, None, TEACHER(), batch, 4) == want
