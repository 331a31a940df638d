"""Turns that the teacher took of the student's episodes: another divergence, the same weight."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same_tree
from objectives import OPD, SAGE
from scipy.special import rel_entr
from test_objective import SETTINGS, reference_weights
from test_train_step import ROUNDING, after_scores, assert_same_update, update
from tiny_batch import (
    CONFIG,
    STUDENT,
    STUDENT_TOKENS,
    B,
    K,
    T,
    conversations,
    logprobs,
    make_batch,
    read_by_teacher,
)

from opd_jax.agent.conversation import Actor
from opd_jax.learner.batch import Batch, pack
from opd_jax.learner.objective import Objective, loss_and_sums
from opd_jax.losses import NO_TURN, fused_loss, fused_scores
from opd_jax.model import Params
from opd_jax.runtime.mesh import make_mesh, shard_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Who wrote each turn. The second row has no third turn.
ACTOR = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 1]], np.int32)
BETA = 0.3
KINDS = [
    ("reverse_kl", "forward_kl"),  # Guided-OPD
    ("forward_kl", "reverse_kl"),
    ("forward_kl", "jsd"),
    ("jsd", "reverse_kl"),
    ("sampled_reverse_kl", "forward_kl"),
    ("reverse_kl", "reverse_kl"),
]


def mixed(base: Objective, kind: str, on_teachers: str) -> Objective:
    return replace(base, divergence=kind, teacher_turns=on_teachers, beta=BETA)


def make_mixed(**how: Any) -> Batch:
    return replace(make_batch(**how), actor=ACTOR)


@cache
def reference(kind: str) -> np.ndarray:
    """A divergence of every token [B, T], float64."""
    log_s, log_t = logprobs(1), logprobs(2)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    m = BETA * p_t + (1 - BETA) * p_s
    if kind == "jsd":
        return (BETA * rel_entr(p_t, m) + (1 - BETA) * rel_entr(p_s, m)).sum(-1)
    if kind == "sampled_reverse_kl":
        tokens = make_batch().tokens[..., None]
        return np.take_along_axis(log_s - log_t, tokens, axis=-1)[..., 0]
    pair = (p_s, p_t) if kind == "reverse_kl" else (p_t, p_s)
    return rel_entr(*pair).sum(-1)


def by_teacher(b: int, k: int) -> bool:
    return bool(ACTOR[b, k] == Actor.TEACHER)


def test_both_write_in_this_batch() -> None:
    written = [by_teacher(b, k) for b, _, k in STUDENT_TOKENS]
    assert 0.3 < np.mean(written) < 0.7


@pytest.mark.parametrize(("kind", "on_teachers"), KINDS)
@pytest.mark.parametrize("base", [OPD, SAGE], ids=["opd", "sage"])
def test_the_loss_of_mixed_turns_equals_float64(
    base: Objective, kind: str, on_teachers: str
) -> None:
    objective, batch = mixed(base, kind, on_teachers), make_mixed()
    s, _ = reference_weights(base)  # a turn weighs the same, whoever wrote it
    loss, by_turn, errors = 0.0, np.zeros(K), []
    for b, t, k in STUDENT_TOKENS:
        d = reference(on_teachers if by_teacher(b, k) else kind)[b, t]
        loss += s[b, t] * d
        by_turn[k] += d
        if not by_teacher(b, k):
            errors.append(abs(logprobs(1)[b, t, batch.tokens[b, t]] + 1.5))
    fused = jax.jit(partial(loss_and_sums, **SETTINGS, objective=objective))
    got, sums = fused(STUDENT(), read_by_teacher(batch), batch)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(sums.divergence, by_turn, rtol=1e-4)
    np.testing.assert_allclose(sums.totals.tokens, len(STUDENT_TOKENS))
    # Of the student's own turns: the teacher's were sampled by another.
    np.testing.assert_allclose(sums.logprob_error, max(errors), rtol=1e-5)


def test_the_largest_error_would_be_a_teachers() -> None:
    tokens = make_batch().tokens
    errors = {(b, k): 0.0 for b, _, k in STUDENT_TOKENS}
    for b, t, k in STUDENT_TOKENS:
        errors[b, k] = max(errors[b, k], abs(logprobs(1)[b, t, tokens[b, t]] + 1.5))
    assert by_teacher(*max(errors, key=lambda turn: errors[turn]))


@cache
def gradient_function(objective: Objective) -> Any:
    return jax.jit(jax.grad(partial(loss_and_sums, **SETTINGS, objective=objective), has_aux=True))


def gradient(objective: Objective, batch: Batch) -> Params:
    # `batch` is an argument: as a constant the compiler would compute with it for long.
    return gradient_function(objective)(STUDENT(), read_by_teacher(batch), batch)[0]


def only(actor: Actor) -> Batch:
    """The batch in which the other's tokens carry no loss."""
    batch = make_batch()
    turn_id = batch.turn_id.copy()
    for b, t, k in STUDENT_TOKENS:
        if ACTOR[b, k] != actor:
            turn_id[b, t] = NO_TURN
    return replace(batch, turn_id=turn_id)


@pytest.mark.parametrize(("kind", "on_teachers"), KINDS)
@pytest.mark.parametrize("late", [False, True], ids=["one_sweep", "after_scores"])
def test_the_gradient_is_that_of_both_parts(kind: str, on_teachers: str, late: bool) -> None:
    objective = mixed(OPD, kind, on_teachers)
    got = gradient(after_scores(objective) if late else objective, make_mixed())
    parts = [
        gradient(replace(objective, divergence=of, teacher_turns=""), only(actor))
        for of, actor in ((kind, Actor.STUDENT), (on_teachers, Actor.TEACHER))
    ]
    assert_same_tree(got, jax.tree.map(jnp.add, *parts), rounding=ROUNDING)


def test_without_a_teachers_turn_it_is_the_same_update() -> None:
    objective = mixed(SAGE, "reverse_kl", "forward_kl")
    nobody = replace(make_batch(), actor=np.zeros((B, K), np.int32))
    want = update(replace(SAGE, beta=BETA))
    assert_same_update(update(objective, nobody), want)
    # Where the batch does not say who wrote, nothing else is compiled: it is the same to the bit.
    assert_same_tree(update(objective).gradient, want.gradient, rounding=0)


def test_any_split_gives_the_same_update() -> None:
    objective = mixed(SAGE, "reverse_kl", "forward_kl")
    whole = update(objective, make_mixed())
    assert whole.metrics["loss"] != update(SAGE).metrics["loss"]
    for parts in (2, 4):
        assert_same_update(update(objective, make_mixed(), micro_batches=parts), whole)


def test_any_mesh_gives_the_same_loss() -> None:
    objective = mixed(SAGE, "reverse_kl", "forward_kl")
    batch = make_mixed()
    value = partial(loss_and_sums, **SETTINGS, objective=objective)
    want, _ = jax.jit(value)(STUDENT(), read_by_teacher(batch), batch)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        rows = shard_batch(batch)
        got, _ = jax.jit(value)(STUDENT(), read_by_teacher(rows), rows)
        np.testing.assert_allclose(jax.device_get(got), jax.device_get(want), rtol=1e-5)


def test_a_packed_batch_keeps_who_wrote() -> None:
    how: dict[str, Any] = dict(length_multiple=T, response_multiple=8, vocab_size=CONFIG.vocab_size)
    packed = pack(conversations(), make_batch().verdict, actor=ACTOR, **how)
    np.testing.assert_array_equal(packed.actor, ACTOR)


def test_an_estimate_from_samples_is_refused_where_the_student_did_not_sample() -> None:
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (3, 5)) * 2]
    how: dict[str, Any] = dict(kind="reverse_kl", chunk_size=2, confidence_temperature=1.0)
    wrong = dict(by_teacher=jnp.ones(4, bool), teacher_kind="sampled_reverse_kl")
    targets = jnp.zeros(4, jnp.int32)
    for function, more in ((fused_scores, ()), (fused_loss, (jnp.ones(4),))):
        with pytest.raises(ValueError, match="`teacher_kind` is 'sampled_reverse_kl'"):
            function(*heads, targets, *more, **how, **wrong)
