"""One update: its loss and gradient, and what leaves it as it is: splits, devices, padding."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import assert_same_tree
from objectives import OPD, SAGE, SFT, weighed
from test_objective import BY_TRAJECTORY, reference_divergence, reference_weights
from tiny_batch import (
    CONFIG,
    DET_FAIL,
    LONG_AND_SHORT,
    SKIP,
    STRONG,
    STUDENT,
    STUDENT_MASK,
    STUDENT_TOKENS,
    VERDICT,
    B,
    K,
    T,
    logprobs,
    make_batch,
    params,
    read_by_teacher,
)
from updates import KEEPER, train_step

from opd_jax import model
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Objective
from opd_jax.learner.train_state import init_state
from opd_jax.learner.train_step import TrainSettings
from opd_jax.learner.weighing import Weight
from opd_jax.losses import NO_TURN
from opd_jax.model import Params

pytestmark = pytest.mark.usefixtures("compile_quickly")

# The same float32 sums in another order: a few units in the last place (6e-8) at each of the two
# layers and in their gradients, relative to the largest entry of a parameter's gradient.
ROUNDING = 5e-6


@cache
def step_function(objective: Objective, **settings: Any) -> Callable:
    """Compiled once for all tests that share its settings."""
    return train_step(CONFIG, objective, loss_chunk=8, **settings)


@dataclass(frozen=True)
class Updated:
    """What one update did, on the host."""

    params: Params
    gradient: Params
    metrics: dict[str, Any]


def update(objective: Objective, batch: Batch | None = None, **settings: Any) -> Updated:
    batch = make_batch() if batch is None else batch
    teacher = read_by_teacher(batch) if objective.needs_teacher else None
    state = init_state(STUDENT(), KEEPER, seed=0)
    state, metrics = step_function(objective, **settings)(state, teacher, batch)
    state, metrics = jax.device_get((state, metrics))
    return Updated(state.params, state.opt_state.trace, metrics)


def assert_same_update(got: Updated, want: Updated, *, rounding: float = ROUNDING) -> None:
    assert_same_tree(got.gradient, want.gradient, rounding=rounding)
    for name in ("loss", "z", "grad_norm"):
        np.testing.assert_allclose(got.metrics[name], want.metrics[name], rtol=rounding)


# --- Against float64 and an unfused loss --------------------------------------------------------


@jax.jit
@jax.grad
def unfused_gradient(student: Params, weight: jax.Array) -> jax.Array:
    """The gradient of Σ weight · divergence / N, written out over all of [B, T, V]."""
    log_t = logprobs(2).astype(np.float32)
    hidden = model.forward(
        student, make_batch().tokens, config=CONFIG, query_chunk=16, remat="none"
    )
    log_s = jnp.roll(jax.nn.log_softmax(hidden @ student["head"]), 1, axis=1)
    divergence = jnp.sum(jnp.exp(log_s) * (log_s - log_t), axis=-1)
    return jnp.sum(weight * divergence) / len(STUDENT_TOKENS)


@pytest.mark.parametrize("objective", [SAGE, BY_TRAJECTORY], ids=["batch", "trajectory"])
def test_loss_and_gradient_of_an_update(objective: Objective) -> None:
    s, z = reference_weights(objective)
    got = update(objective)
    loss = (z * s * reference_divergence()).sum() / len(STUDENT_TOKENS)
    np.testing.assert_allclose(got.metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
        got.metrics["z"], z.item() if objective.scope == "batch" else 1, rtol=1e-5
    )
    # 1e-5: the weights come from float64, rounded once.
    want = unfused_gradient(STUDENT(), (z * s).astype(np.float32))
    assert_same_tree(got.gradient, want, rounding=1e-5)
    norm = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in jax.tree.leaves(got.gradient)))
    for name in ("grad_norm", "update_norm"):
        np.testing.assert_allclose(got.metrics[name], norm, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_update_norm_is_that_of_the_new_minus_the_old_parameters(dtype: str) -> None:
    optimizer = optax.adamw(1e-4)  # bfloat16 rounds most of such a step away
    before = jax.tree.map(lambda p: p.astype(dtype), STUDENT())
    step = step_function(SAGE, optimizer=optimizer)
    batch = make_batch()
    state, metrics = step(init_state(before, optimizer, seed=0), read_by_teacher(batch), batch)
    moved = [
        (np.asarray(new, np.float64) - np.asarray(old, np.float64)).ravel()
        for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True)
    ]
    norm = np.linalg.norm(np.concatenate(moved))
    np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-6)


def test_fine_tuning_is_the_cross_entropy_of_the_tokens() -> None:
    nll = -np.take_along_axis(logprobs(1), make_batch().tokens[..., None], axis=-1)[..., 0]
    got = update(SFT).metrics
    np.testing.assert_allclose(got["loss"], nll[STUDENT_MASK].mean(), rtol=1e-5)
    assert got["z"] == 1
    assert got["sums"].teacher_entropy == 0


class ReadsStudent(Weight):
    """The same weights, declared to depend on the student's scores."""

    reads_student = True  # type: ignore[assignment]


def after_scores(objective: Objective) -> Objective:
    settings = {f.name: getattr(objective.weight, f.name) for f in fields(Weight)}
    return replace(objective, weight=ReadsStudent(**settings))


BY_ENTROPY = weighed(BY_TRAJECTORY, by="entropy_aware", entropy_threshold=2.88)


@pytest.mark.parametrize(
    "objective",
    [
        SAGE,
        replace(weighed(SAGE, by="intervention"), normalize="active_tokens"),
        replace(weighed(SAGE, confidence_temperature=0.5), normalize="none"),
        weighed(SAGE, by="iw_opd"),
        replace(SAGE, divergence="forward_kl"),
        replace(SAGE, divergence="sampled_reverse_kl"),
        replace(BY_ENTROPY, divergence="jsd", beta=0.3),
        SFT,
    ],
    ids=lambda o: f"{o.weight.by}-{o.divergence}-{o.scope}-{o.normalize}",
)
@pytest.mark.parametrize("settings", [{}, {"micro_batches": 4}], ids=["whole", "four_parts"])
def test_weights_before_or_after_the_scores_give_the_same_update(
    objective: Objective, settings: dict[str, Any]
) -> None:
    got, want = (update(o, **settings) for o in (objective, after_scores(objective)))
    assert_same_update(got, want)
    for mine, theirs in zip(*(jax.tree.leaves(u.metrics) for u in (got, want)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


# --- What changes nothing -----------------------------------------------------------------------


FOUR = dict(micro_batches=4, remat="layers")  # all of them save memory


def test_any_split_gives_the_same_update() -> None:
    got, want = update(SAGE, **FOUR), update(SAGE)
    assert_same_update(got, want)
    sums = [jax.tree.leaves(u.metrics["sums"]) for u in (got, want)]
    for mine, theirs in zip(*sums, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_a_batch_of_more_rows_is_split_into_more_parts_of_the_same_size() -> None:
    # The same parts, so the same sums in the same order.
    other = FOUR | dict(micro_batches=1, batch_rows=1)
    assert_same_update(update(SAGE, **other), update(SAGE, **FOUR), rounding=0)


def test_neutral_factors_are_bit_for_bit_plain_opd() -> None:
    neutral = weighed(SAGE, skip_weight=1.0, weak_weight=1.0, confidence_temperature=0.0)
    got, want = update(neutral), update(OPD)
    assert_same_update(got, want, rounding=0)
    assert_same_tree(got.params, want.params, rounding=0)
    moved = jax.tree.map(lambda x, y: np.any(x != y), got.params, STUDENT())
    assert all(jax.tree.leaves(moved))


def test_orders_of_rows_and_of_turns_change_nothing() -> None:
    batch = jax.tree.map(lambda x: x[np.array([2, 0, 3, 1])], make_batch())
    turns = np.array([1, 2, 0])
    position = np.append(np.argsort(turns), NO_TURN).astype(np.int32)  # NO_TURN is the last index
    renamed = batch.replace(turn_id=position[batch.turn_id], verdict=batch.verdict[:, turns])
    got, want = update(SAGE, renamed), update(SAGE)
    assert_same_update(got, want)
    by_turn = want.metrics["sums"].divergence[turns]
    np.testing.assert_allclose(got.metrics["sums"].divergence, by_turn, rtol=ROUNDING)


def test_longer_rows_responses_and_more_turns_change_nothing() -> None:
    longer = make_batch(length_multiple=16, response_multiple=12)
    longer = longer.replace(verdict=np.pad(VERDICT, [(0, 0), (0, 2)], constant_values=STRONG))
    assert [x.shape[1] for x in (longer.tokens, longer.response, longer.verdict)] == [16, 12, 5]
    got = update(SAGE, longer)
    assert_same_update(got, update(SAGE))
    assert not got.metrics["sums"].turns[K:].any()


def test_a_micro_batch_of_short_rows_is_computed_in_half_the_positions() -> None:
    batch = make_batch(LONG_AND_SHORT)
    whole, in_two = update(SAGE, batch), update(SAGE, batch, micro_batches=2)
    assert_same_update(in_two, whole)
    teacher, step = read_by_teacher(batch), step_function(SAGE, micro_batches=2)
    broken = STUDENT() | {"embed": STUDENT()["embed"].at[0].set(np.nan)}  # token 0 is padding
    state, _ = step(init_state(broken, KEEPER, seed=0), teacher, batch)
    assert_same_tree(jax.device_get(state.opt_state.trace), in_two.gradient, rounding=0)
    state, metrics = step_function(SAGE)(init_state(broken, KEEPER, seed=0), teacher, batch)
    assert not np.isfinite(metrics["grad_norm"])


def test_garbage_where_the_student_did_not_write_changes_nothing() -> None:
    batch = make_batch()
    padding = batch.tokens == 0
    turn_exists = (batch.turn_id[..., None] == np.arange(K)).any(axis=1)
    garbage = np.random.default_rng(7).integers(1, 32, (B, T))
    dirty = batch.replace(
        tokens=np.where(padding, garbage, batch.tokens).astype(np.int32),
        sampled_logprobs=np.where(STUDENT_MASK, batch.sampled_logprobs, np.float32(np.nan)),
        verdict=np.where(turn_exists, VERDICT, DET_FAIL).astype(np.int32),
    )
    assert padding.any()
    assert not turn_exists.all()
    got = update(SAGE, dirty)
    assert_same_update(got, update(SAGE), rounding=0)
    assert np.isfinite(got.metrics["sums"].logprob_error)


# --- Edges --------------------------------------------------------------------------------------


def test_an_update_without_any_weight_changes_nothing() -> None:
    # Momentum of a first step, and weight decay, would move the student on a gradient of zero.
    optimizer = optax.adamw(1e-3, b1=0.9, weight_decay=0.1)
    step = step_function(SAGE, optimizer=optimizer)
    batch = make_batch()
    teacher = read_by_teacher(batch)
    state, metrics = step(init_state(STUDENT(), optimizer, seed=0), teacher, batch)
    assert metrics["no_step"] == 0
    nobody = np.full_like(batch.turn_id, NO_TURN)
    for still in (
        batch.replace(verdict=np.full((B, K), SKIP, np.int32)),
        batch.replace(turn_id=nobody, response=np.full_like(batch.response, T)),
    ):
        before = jax.device_get(state)
        state, metrics = step(state, teacher, still)
        for name in ("params", "opt_state"):
            assert_same_tree(getattr(state, name), getattr(before, name), rounding=0)
        assert state.step == before.step + 1
        assert (metrics["no_step"], metrics["z"]) == (1, 1)
        assert metrics["loss"] == metrics["grad_norm"] == metrics["update_norm"] == 0


def test_a_batch_of_episodes_that_ended_before_their_first_turn_changes_nothing() -> None:
    batch = make_batch([""] * B, length_multiple=8, response_multiple=4)
    assert (batch.tokens.shape, batch.response.shape) == ((B, 8), (B, 4))
    state = init_state(STUDENT(), KEEPER, seed=0)
    state, metrics = step_function(SAGE)(state, read_by_teacher(batch), batch)
    assert_same_tree(state.params, STUDENT(), rounding=0)
    assert (metrics["no_step"], metrics["loss"], metrics["update_norm"]) == (1, 0, 0)


def test_the_state_is_donated_and_its_source_is_not() -> None:
    mine, teacher = params(3), read_by_teacher(make_batch())
    state = init_state(mine, KEEPER, seed=0)
    new, _ = step_function(SAGE)(state, teacher, make_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((mine, teacher)))
    assert new.step == 1


def test_an_objective_without_the_teacher_it_needs_is_refused() -> None:
    state = init_state(STUDENT(), KEEPER, seed=0)
    with pytest.raises(ValueError, match=r"`objective.divergence` = 'reverse_kl'.*got None"):
        step_function(SAGE)(state, None, make_batch())


@pytest.mark.parametrize("name", [field.name for field in fields(TrainSettings)])
def test_a_value_out_of_range_is_named(name: str) -> None:
    good: dict[str, Any] = {field.name: 1 for field in fields(TrainSettings)} | {"remat": "none"}
    TrainSettings(**good)
    with pytest.raises(ValueError, match=f"^`{name}`: expected .* got 0"):
        TrainSettings(**good | {name: 0})
