"""The teacher's pass gives what a forward pass of the same weights gives, however it is run."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same_tree
from tiny_batch import CONFIG, LONG_AND_SHORT, STUDENT_MASK, TEACHER, T, make_batch

from opd_jax import model
from opd_jax.learner.objective import response_hidden
from opd_jax.learner.teacher import make_teacher_pass

pytestmark = pytest.mark.usefixtures("compile_quickly")

WHOLE = dict(micro_batches=1, batch_rows=None, query_chunk=16)
# The same float32 sums in another order, through two layers.
ROUNDING = 5e-6


def test_the_pass_gives_the_hidden_state_before_each_student_token() -> None:
    batch = make_batch()
    got = make_teacher_pass(CONFIG, **WHOLE)(TEACHER(), batch)
    hidden = model.forward(TEACHER(), batch.tokens, config=CONFIG, query_chunk=16, remat="none")
    filled = batch.response < T
    before = np.roll(hidden, 1, axis=1)[STUDENT_MASK]  # entry t predicts token t
    np.testing.assert_allclose(got[filled], before, rtol=0, atol=ROUNDING * np.abs(before).max())
    assert not np.any(got[~filled])
    # The student's own forward pass reads the same positions by the same code.
    student = model.functions_of(CONFIG, query_chunk=16, remat="layers")
    same = response_hidden(TEACHER(), batch, hidden=student.hidden)
    assert_same_tree(same, got, rounding=ROUNDING)


@pytest.mark.parametrize(("micro_batches", "batch_rows"), [(2, None), (4, None), (1, 2), (2, 2)])
def test_any_split_gives_the_same_states(micro_batches: int, batch_rows: int | None) -> None:
    split = WHOLE | dict(micro_batches=micro_batches, batch_rows=batch_rows)
    got, want = (
        make_teacher_pass(CONFIG, **how)(TEACHER(), make_batch()) for how in (split, WHOLE)
    )
    assert_same_tree(got, want, rounding=ROUNDING)


def test_a_micro_batch_of_short_rows_is_computed_in_half_the_positions() -> None:
    batch = make_batch(LONG_AND_SHORT)
    got, want = (
        make_teacher_pass(CONFIG, **WHOLE | dict(micro_batches=parts))(TEACHER(), batch)
        for parts in (2, 1)
    )
    assert_same_tree(got, want, rounding=ROUNDING)
    broken = TEACHER() | {"embed": TEACHER()["embed"].at[0].set(jnp.nan)}  # token 0 is padding
    in_two = make_teacher_pass(CONFIG, **WHOLE | dict(micro_batches=2))(broken, batch)
    np.testing.assert_array_equal(in_two, got)
    assert np.isnan(make_teacher_pass(CONFIG, **WHOLE)(broken, batch)).any()


def test_states_on_padding_that_are_nan_reach_nothing() -> None:
    # One query at a time, so no real position attends to padding with weight 0.
    run = make_teacher_pass(CONFIG, **WHOLE | dict(query_chunk=1))
    batch = make_batch([".00", ".0"], length_multiple=3, response_multiple=1)
    assert batch.response.tolist() == [[1, 2], [1, 3]]
    broken = TEACHER() | {"embed": TEACHER()["embed"].at[0].set(jnp.nan)}  # token 0 is padding
    got = run(broken, batch)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, run(TEACHER(), batch))
