"""What is told of tokens is what the update computes of them, and two float64 softmaxes."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import OPD, SAGE
from tiny_batch import CONFIG, STUDENT, STUDENT_TOKENS, TEACHER, B, K, T, logprobs, make_batch
from tiny_batch import read_by_teacher as read
from updates import KEEPER, train_step

from opd_jax.learner.looking import make_look
from opd_jax.learner.objective import Objective, Seen
from opd_jax.learner.train_state import init_state
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOP = 5


def seen(objective: Objective, rows: list[int] | None = None, *, top: int = TOP) -> Seen:
    look = make_look(
        student=CONFIG,
        teacher=CONFIG,
        objective=objective,
        dtype=jnp.dtype("float32"),
        query_chunk=16,
        loss_chunk=16,
        lora=None,
        top=top,
    )
    return look(STUDENT(), None, TEACHER(), make_batch(), list(range(B)) if rows is None else rows)


@cache
def update(objective: Objective) -> dict[str, Any]:
    step = train_step(CONFIG, objective)
    state = init_state(STUDENT(), KEEPER, seed=0)
    return jax.device_get(step(state, read(make_batch()), make_batch())[1])


@pytest.mark.parametrize("scope", ["batch", "trajectory"])
def test_weights_and_divergences_add_up_to_what_the_update_reports(scope: str) -> None:
    objective = replace(SAGE, scope=scope)
    got, want = seen(objective), update(objective)
    filled = make_batch().response < T
    tokens = filled.sum()
    assert tokens == len(STUDENT_TOKENS)
    sums = want["sums"]
    mean = got.scores.divergence[filled].sum() / tokens
    np.testing.assert_allclose(mean, sums.divergence.sum() / tokens, rtol=1e-5)
    weight = got.weight * (want["z"] if scope == "batch" else 1.0)
    assert (weight[~filled] == 0).all()
    loss = (weight * np.where(filled, got.scores.divergence, 0.0)).sum() / tokens
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    np.testing.assert_allclose(weight[filled].mean(), 1.0, rtol=1e-5)
    assert (got.z is None) == (scope == "batch")
    # The weight of a turn's token is the product of what is told of its turn.
    factors = np.asarray(got.intervention) * np.asarray(got.confidence)
    for row in range(B):
        own = 1.0 if got.z is None else got.z[row]
        for slot in np.flatnonzero(filled[row]):
            turn = make_batch().turn_id[row, make_batch().response[row, slot]]
            np.testing.assert_allclose(got.weight[row, slot], own * factors[row, turn], rtol=1e-6)


def test_logprobs_and_the_likeliest_tokens_are_those_of_the_two_models() -> None:
    got, batch = seen(SAGE), make_batch()
    log_s, log_t = logprobs(1), logprobs(2)
    slot = dict.fromkeys(range(B), 0)
    for row, position, _ in STUDENT_TOKENS:
        at = row, slot[row]
        slot[row] += 1
        token = batch.tokens[row, position]
        s, t = log_s[row, position], log_t[row, position]
        np.testing.assert_allclose(got.scores.student_logprob[at], s[token], atol=1e-5)
        np.testing.assert_allclose(got.scores.teacher_logprob[at], t[token], atol=1e-5)
        best = np.argsort(-t)[:TOP]
        assert got.choices.tokens[at].tolist() == best.tolist()
        np.testing.assert_allclose(got.choices.teacher_prob[at], np.exp(t[best]), atol=1e-5)
        np.testing.assert_allclose(got.choices.student_prob[at], np.exp(s[best]), atol=1e-5)
        assert got.choices.agrees[at] == (s.argmax() == t.argmax())
    assert 0 < got.choices.agrees[batch.response < T].mean() < 1


def test_some_rows_are_told_what_they_are_told_among_all_and_on_many_devices() -> None:
    whole = seen(SAGE)
    assert seen(SAGE, top=0).choices.tokens.shape[-1] == 0
    # Three rows on two devices: one place stays empty.
    with jax.set_mesh(make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])):
        some = seen(SAGE, [2, 0, 3])
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(whole), strict=True):
        assert a.shape[0] == 3
        np.testing.assert_allclose(a, b[[2, 0, 3]], atol=1e-5)
    assert some.confidence is not None
    assert some.confidence.shape == (3, K)


def test_what_the_objective_does_not_read_is_not_told() -> None:
    plain = seen(OPD)
    assert plain.intervention is None
    assert plain.confidence is None
    filled = make_batch().response < T
    assert (plain.weight == filled).all()
