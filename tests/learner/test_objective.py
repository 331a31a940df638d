"""The objective of a batch against float64 numpy, token by token, and by hand."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import OPD, SAGE, SFT, weighed
from scipy.special import rel_entr
from scipy.stats import entropy
from tiny_batch import (
    CONFIG,
    DET_FAIL,
    RELIABILITY,
    SKIP,
    STRONG,
    STUDENT,
    STUDENT_MASK,
    STUDENT_TOKENS,
    VERDICT,
    WEAK,
    B,
    K,
    T,
    logprobs,
    make_batch,
    read_by_teacher,
)

from opd_jax import model
from opd_jax.learner.objective import Objective, objective_sums, score
from opd_jax.learner.teacher import Teacher
from opd_jax.learner.weighing import Weight
from opd_jax.losses import TokenScores, WeightTotals
from opd_jax.model import Params

pytestmark = pytest.mark.usefixtures("compile_quickly")

BY_TRAJECTORY = replace(SAGE, scope="trajectory")
THRESHOLD = 2.88  # nats; about half of the tokens' entropies lie above


def student_unsure(
    turn_id: jax.Array, *, student_entropy: jax.Array, weak_weight: float, most: float
) -> jax.Array:
    """A method of a user's. What it reads is known only after the student's scores."""
    return jnp.minimum(weak_weight * student_entropy, most)


OBJECTIVES = {
    "sage": SAGE,
    "opd": OPD,
    "intervention": weighed(SAGE, by="intervention"),
    "confidence": weighed(SAGE, by="confidence"),
    "without_normalizer": replace(SAGE, normalize="none"),
    "active_tokens": replace(SAGE, normalize="active_tokens"),
    "weak_weight": weighed(SAGE, weak_weight=0.25),
    "skip_weight": weighed(SAGE, skip_weight=0.3),
    "fail_weight": weighed(SAGE, fail_weight=0.0),
    "max_z": replace(SAGE, max_z=1.25),
    "by_trajectory": BY_TRAJECTORY,
    "by_trajectory_max_z": replace(BY_TRAJECTORY, max_z=9.0),
    "entropy_aware": weighed(OPD, by="entropy_aware", entropy_threshold=THRESHOLD),
    "entropy_aware_by_trajectory": weighed(
        BY_TRAJECTORY, by="entropy_aware", entropy_threshold=THRESHOLD
    ),
    "sod": weighed(SAGE, by="sod"),
    "sod_unbounded": weighed(SAGE, by="sod", most_weight=9.0, discrepancy_eps=0.5),
    "iw_opd": weighed(SAGE, by="iw_opd"),
    "return_to_go": weighed(SAGE, by="return_to_go"),
    "reliability": weighed(SAGE, by="reliability"),
    "brought": weighed(SAGE, by="test_objective:student_unsure", options=(("most", 2.5),)),
}


# --- A reference in float64, token by token -----------------------------------------------------


@cache
def reference_divergence() -> np.ndarray:
    """The reverse KL [B, T]."""
    return rel_entr(np.exp(logprobs(1)), np.exp(logprobs(2))).sum(-1)


@cache
def reference_confidence() -> np.ndarray:
    """The mean over each turn of the teacher's top-1 probability [B, K]; 0 without a turn."""
    top1 = np.exp(logprobs(2)).max(-1)
    turn_id = make_batch().turn_id
    confidence = np.zeros((B, K))
    for b, _, k in STUDENT_TOKENS:
        confidence[b, k] = np.mean(top1[b, turn_id[b] == k])
    return confidence


def reference_raw(weight: Weight) -> np.ndarray:
    """s [B, T], each token from its row's tokens."""
    i = {SKIP: weight.skip_weight, WEAK: weight.weak_weight, STRONG: 1.0}
    i[DET_FAIL] = weight.fail_weight
    H_s, H_t = (entropy(np.exp(logprobs(who)), axis=-1) for who in (1, 2))
    batch, s = make_batch(), np.zeros((B, T))
    said = np.take_along_axis(logprobs(2), batch.tokens[..., None], axis=-1)[..., 0]
    gap = batch.sampled_logprobs - said  # of the student's tokens: l_S - l_T
    for b, t, k in STUDENT_TOKENS:
        mine = np.flatnonzero(STUDENT_MASK[b])
        by_turn = {j: gap[b, batch.turn_id[b] == j] for j in batch.turn_id[b, mine].tolist()}
        size = {j: np.mean(np.abs(of_turn)) for j, of_turn in by_turn.items()}
        c = reference_confidence()[b, k]
        first, eps = min(size), weight.discrepancy_eps
        later = sum(
            weight.discount ** (j - k) * max(np.mean(of_turn), 0.0)
            for j, of_turn in by_turn.items()
            if j > k
        )
        to_come = np.abs(gap[b, mine[mine >= t]]).sum() / np.abs(gap[b, mine]).sum()
        s[b, t] = {
            "uniform": 1.0,
            "sage": i[int(VERDICT[b, k])] * c,
            "intervention": i[int(VERDICT[b, k])],
            "confidence": c,
            "entropy_aware": 1 + weight.entropy_bonus * (H_t[b, t] > weight.entropy_threshold),
            "sod": min((size[first] + eps) / (size[k] + eps), weight.most_weight),
            "iw_opd": 1 + weight.early_bonus * to_come,
            "return_to_go": 1 + later,
            "reliability": np.nan_to_num(RELIABILITY[b, k]),
            "test_objective:student_unsure": min(weight.weak_weight * H_s[b, t], 2.5),
        }[weight.by]
    return s


def reference_weights(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """s [B, T], and z: one number, or one for each row [B, 1]."""
    s = reference_raw(objective.weight)
    axis = 1 if objective.scope == "trajectory" else None
    counted = s > 0 if objective.normalize == "active_tokens" else STUDENT_MASK
    z = counted.sum(axis, keepdims=True) / s.sum(axis, keepdims=True)
    if objective.normalize == "none":
        z = np.ones_like(z)
    return s, np.minimum(z, objective.max_z or np.inf)


@cache
def scores() -> TokenScores:
    batch = make_batch()
    return jax.jit(partial(score, **SETTINGS, objective=SAGE))(
        STUDENT(), read_by_teacher(batch), batch
    )


SETTINGS: dict[str, Any] = dict(
    student=model.functions_of(CONFIG, query_chunk=16, remat="none"),
    dtype=jnp.dtype("float32"),
    loss_chunk=8,
)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_equals_float64(name: str) -> None:
    objective = OBJECTIVES[name]
    s, z = reference_weights(objective)
    sums = objective_sums(scores(), make_batch(), objective=objective)
    if objective.scope == "trajectory":  # each row's own z is in its weights already
        np.testing.assert_allclose(sums.loss, (s * z * reference_divergence()).sum(), rtol=1e-5)
        np.testing.assert_allclose(sums.weight_by_turn.sum(), (s * z).sum(), rtol=1e-5)
    else:
        np.testing.assert_allclose(sums.loss, (s * reference_divergence()).sum(), rtol=1e-5)
        np.testing.assert_allclose(objective.scale(sums.totals), z.item(), rtol=1e-5)
    np.testing.assert_allclose(sums.totals, (s.sum(), len(STUDENT_TOKENS), (s > 0).sum()), 1e-5)


def test_the_objectives_differ_on_this_batch() -> None:
    weights = [np.multiply(*reference_weights(o)).tobytes() for o in OBJECTIVES.values()]
    assert len(set(weights)) == len(weights)
    uncertain = entropy(np.exp(logprobs(2)), axis=-1)[STUDENT_MASK] > THRESHOLD
    assert 0.2 < uncertain.mean() < 0.8


NEUTRAL = {
    "sage": dict(by="intervention", skip_weight=1.0, weak_weight=1.0, fail_weight=1.0),
    "entropy_aware": dict(by="entropy_aware", entropy_bonus=0.0),
    "sod": dict(by="sod", discrepancy_eps=1e9),
    "iw_opd": dict(by="iw_opd", early_bonus=0.0),
    "return_to_go": dict(by="return_to_go", discount=0.0),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_method_at_its_neutral_setting_is_plain_opd_to_the_bit(name: str) -> None:
    neutral = replace(weighed(SAGE, **NEUTRAL[name]), normalize="none")
    got, want = (objective_sums(scores(), make_batch(), objective=o) for o in (neutral, OPD))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_sums_equal_loops() -> None:
    log_s, log_t = logprobs(1), logprobs(2)
    s, _ = reference_weights(SAGE)
    kl, tokens = reference_divergence(), make_batch().tokens
    want: dict[str, Any] = dict(loss=0.0, student_entropy=0.0, teacher_entropy=0.0)
    for name in ("divergence", "tokens_by_turn", "weight_by_turn"):
        want[name] = np.zeros(K)
    for b, t, k in STUDENT_TOKENS:
        want["loss"] += s[b, t] * kl[b, t]
        want["divergence"][k] += kl[b, t]
        want["tokens_by_turn"][k] += 1
        want["weight_by_turn"][k] += s[b, t]
        want["student_entropy"] += entropy(np.exp(log_s[b, t]))
        want["teacher_entropy"] += entropy(np.exp(log_t[b, t]))
    errors = [abs(-1.5 - log_s[b, t, tokens[b, t]]) for b, t, _ in STUDENT_TOKENS]
    want["logprob_error"] = max(errors)
    want["confidence"] = reference_confidence().sum(axis=0)
    want["turns"] = (reference_confidence() > 0).sum(axis=0)
    want["totals"] = (s.sum(), len(STUDENT_TOKENS), (s > 0).sum())
    got = vars(objective_sums(scores(), make_batch(), objective=SAGE))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_each_divergence_equals_float64() -> None:
    batch = make_batch()
    log_s, log_t = logprobs(1), logprobs(2)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    m = 0.3 * p_t + 0.7 * p_s
    sampled_s, sampled_t = (
        np.take_along_axis(x, batch.tokens[..., None], axis=-1)[..., 0] for x in (log_s, log_t)
    )
    want = {
        "reverse_kl": rel_entr(p_s, p_t).sum(-1),
        "forward_kl": rel_entr(p_t, p_s).sum(-1),
        "jsd": (0.3 * rel_entr(p_t, m) + 0.7 * rel_entr(p_s, m)).sum(-1),
        "sampled_reverse_kl": sampled_s - sampled_t,
        "cross_entropy": -sampled_s,
    }

    @jax.jit
    def each(student: Params, teacher: Teacher) -> dict[str, jax.Array]:
        def divergence(kind: str) -> jax.Array:
            base = SFT if kind == "cross_entropy" else OPD
            objective = replace(base, divergence=kind, beta=0.3)
            return score(student, teacher, batch, objective=objective, **SETTINGS).divergence

        return {kind: divergence(kind) for kind in want}

    for kind, got in each(STUDENT(), read_by_teacher(batch)).items():
        mine = got[batch.response < T]
        np.testing.assert_allclose(
            mine, want[kind][STUDENT_MASK], rtol=1e-4, atol=1e-5, err_msg=kind
        )


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "z"),
    [
        ({}, 12),
        ({"normalize": "active_tokens"}, 8),
        ({"normalize": "none"}, 1),
        ({"eps": 1.0}, 6),
        ({"max_z": 5.0}, 5),
    ],
)
def test_every_setting_of_the_scale_reaches_it(settings: dict[str, Any], z: float) -> None:
    totals = WeightTotals(weight=jnp.float32(0.5), tokens=jnp.float32(6), active=jnp.float32(4))
    assert replace(SAGE, **settings).scale(totals) == z


@pytest.mark.parametrize(
    "wrong",
    [
        {"divergence": "kl"},
        {"beta": 1.5},
        {"normalize": "mean"},
        {"scope": "turn"},
        {"eps": 0.0},
        {"max_z": -1.0},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^`{name}`: expected .* got .*{value}"):
        replace(SAGE, **wrong)


@pytest.mark.parametrize("by", ["sage", "confidence", "reliability", "sod"])
def test_fine_tuning_has_no_weight_from_a_teacher(by: str) -> None:
    with pytest.raises(ValueError, match=f"`divergence` = 'cross_entropy'.*'{by}'"):
        weighed(SFT, by=by)
