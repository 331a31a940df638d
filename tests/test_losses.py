"""The objective against float64 numpy, scipy, finite differences and hand arithmetic."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy

from opd_jax.losses import (
    NO_TURN,
    Verdict,
    WeightTotals,
    entropy_factor,
    forward_kl,
    fused_cross_entropy,
    fused_divergence,
    fused_loss,
    fused_scores,
    fused_teacher_scores,
    intervention_weight,
    jsd,
    raw_weights,
    reverse_kl,
    sage_weights,
    sampled_reverse_kl,
    scale,
    turn_confidence,
    weighted_loss,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)
KINDS = [("reverse_kl", None), ("forward_kl", None), ("jsd", 0.3)]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def reference(student: np.ndarray, teacher: np.ndarray, beta: float) -> np.ndarray:
    """The divergence in float64, from probabilities and scipy's relative entropy."""
    p_s, p_t = (softmax(np.asarray(x, np.float64), axis=-1) for x in (student, teacher))
    if beta == 1:
        return rel_entr(p_s, p_t).sum(-1)
    if beta == 0:
        return rel_entr(p_t, p_s).sum(-1)
    m = beta * p_t + (1 - beta) * p_s
    return beta * rel_entr(p_t, m).sum(-1) + (1 - beta) * rel_entr(p_s, m).sum(-1)


def finite_difference(function: Callable, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function in float64."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        out[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return out


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


S, T = logits(0, 3, 4, 7), logits(1, 3, 4, 7)


# --- Divergences --------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_its_gradient_equal_float64(beta: float) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        s, t = jnp.asarray(S, dtype), jnp.asarray(T, dtype)
        got = jsd(s, t, beta=beta)
        assert got.dtype == jnp.float32
        # Of bfloat16 only the inputs are rounded, else the error were 4e-3.
        np.testing.assert_allclose(got, reference(s, t, beta), rtol=1e-5)
    student, teacher = jax.grad(lambda s, t: jsd(s, t, beta=beta).sum(), argnums=(0, 1))(S, T)
    want = finite_difference(lambda s: reference(s, T, beta).sum(), S)
    np.testing.assert_allclose(student, want, atol=2e-6)
    assert not np.any(teacher)  # the teacher gets no gradient


def test_named_divergences_are_the_ends_of_beta() -> None:
    p_s, p_t = softmax(S.astype(np.float64), axis=-1), softmax(T.astype(np.float64), axis=-1)
    np.testing.assert_allclose(reverse_kl(S, T), entropy(p_s, p_t, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(jsd(S, T, beta=1), reverse_kl(S, T))
    np.testing.assert_array_equal(jsd(S, T, beta=0), forward_kl(S, T))
    # Swapping the arguments swaps the direction, through the same arithmetic.
    np.testing.assert_array_equal(forward_kl(S, T), reverse_kl(T, S))


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence(beta: float) -> None:
    value, gradient = jax.value_and_grad(lambda s: jsd(s, S + 3.0, beta=beta).sum())(S)
    # A shift by a constant is the same distribution; 12 tokens at float32 rounding.
    assert abs(value) < 1e-5
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_banned_by_both_drop_out(beta: float) -> None:
    banned = [1, 4]
    kept = np.delete(np.arange(7), banned)
    s, t = S.copy(), T.copy()
    s[..., banned] = t[..., banned] = -np.inf
    value, gradient = jax.value_and_grad(lambda s: jsd(s, t, beta=beta).sum())(s)
    want, want_gradient = jax.value_and_grad(lambda s: jsd(s, t[..., kept], beta=beta).sum())(
        s[..., kept]
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., kept], want_gradient, atol=1e-6)
    assert not np.any(gradient[..., banned])


@pytest.mark.parametrize(
    ("banned_by", "beta"), [("student", 1.0), ("student", 0.3), ("teacher", 0.0), ("teacher", 0.3)]
)
def test_a_token_banned_by_one_is_finite_where_the_divergence_is(
    banned_by: str, beta: float
) -> None:
    s, t = S.copy(), T.copy()
    (s if banned_by == "student" else t)[..., 2] = -np.inf
    value, gradient = jax.value_and_grad(lambda s: jsd(s, t, beta=beta).sum())(s)
    np.testing.assert_allclose(value, reference(s, t, beta).sum(), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_impossible_under_the_second_argument_is_infinite() -> None:
    banned = S.copy()
    banned[..., 2] = -np.inf
    assert np.all(np.isposinf(reverse_kl(T, banned)))
    assert np.all(np.isposinf(forward_kl(banned, T)))


def test_large_logits_are_stable() -> None:
    s = np.array([1e4, 0.0, -1e4], np.float32)
    t = np.array([0.0, 1e4, -1e4], np.float32)
    # The student is sure of token 0, at which the teacher's log-probability is -1e4, and back.
    np.testing.assert_allclose([reverse_kl(s, t), forward_kl(s, t)], 1e4, rtol=1e-6)
    # Disjoint distributions: jsd_.5 = ln 2.
    np.testing.assert_allclose(jsd(s, t, beta=0.5), math.log(2), rtol=1e-6)
    for beta in BETAS:
        assert np.all(np.isfinite(jax.grad(lambda x, b=beta: jsd(x, t, beta=b))(s)))


# --- The one-sample estimate --------------------------------------------------------------------


def test_sampled_estimate_is_exact_in_expectation() -> None:
    # Every action weighted by its probability: an expectation without sampling noise.
    s, t = S[0, 0], T[0, 0]
    probability = jnp.asarray(softmax(s.astype(np.float64)), jnp.float32)

    def expected(s: jax.Array) -> jax.Array:
        return jnp.sum(probability * sampled_reverse_kl(jax.nn.log_softmax(s), log_softmax(t)))

    value, gradient = jax.value_and_grad(expected)(s)
    np.testing.assert_allclose(value, reference(s, t, 1.0), rtol=1e-5)
    want = finite_difference(lambda s: reference(s, t, 1.0), s)
    np.testing.assert_allclose(gradient, want, atol=1e-5)


def test_sampled_estimate_has_the_value_of_the_gap_and_no_gradient_to_the_teacher() -> None:
    # -100 + 1000.3: the surrogate is -9e4 and must not round the value when it is taken back.
    student = np.float32([-100.0, -2.0, -9.0])
    teacher = np.float32([-1000.3, -0.1, -np.inf])
    np.testing.assert_array_equal(sampled_reverse_kl(student, teacher), student - teacher)
    # gap · ∇ log p_S = -2 - (-1)
    gradient = jax.grad(sampled_reverse_kl, argnums=(0, 1))(jnp.float32(-2.0), jnp.float32(-1.0))
    assert gradient == (-1, 0)


# --- The fused form -----------------------------------------------------------------------------

N, D, D_TEACHER, V = 10, 4, 6, 11
HEADS = (logits(2, N, D), logits(3, D, V) / 2, logits(4, N, D_TEACHER), logits(5, D_TEACHER, V) / 2)
TARGETS = np.arange(N) % V


TOKEN_WEIGHT = np.linspace(0.5, 2, N).astype(np.float32)  # other tokens, other cotangents


@cache
def unfused(kind: str, beta: float | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Value and gradient to the student of the weighted divergence from whole logits."""

    def loss(h_s: jax.Array, w_s: jax.Array, h_t: jax.Array, w_t: jax.Array) -> jax.Array:
        known = {"forward_kl": 0.0, "reverse_kl": 1.0}
        return TOKEN_WEIGHT @ jsd(h_s @ w_s, h_t @ w_t, beta=known.get(kind, beta))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*HEADS)


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_fused_equals_unfused(kind: str, beta: float | None, chunk_size: int) -> None:
    def loss(*heads: jax.Array) -> jax.Array:
        divergence, _ = fused_divergence(*heads, kind=kind, chunk_size=chunk_size, beta=beta)
        return TOKEN_WEIGHT @ divergence

    got, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*HEADS)
    want, want_gradients = unfused(kind, beta)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for gradient, expected in zip(gradients[:2], want_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(gradients[2])
    assert not np.any(gradients[3])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_fused_scores_equal_float64(temperature: float) -> None:
    h_s, w_s, h_t, w_t = (x.astype(np.float64) for x in HEADS)
    log_s, log_t = log_softmax(h_s @ w_s, axis=-1), log_softmax(h_t @ w_t, axis=-1)
    got = fused_scores(
        *HEADS, TARGETS, kind="reverse_kl", chunk_size=4, confidence_temperature=temperature
    )._asdict()
    sharpened = 1.0 if temperature == 0 else softmax(h_t @ w_t / temperature, axis=-1).max(-1)
    # The temperature is the confidence's alone: nothing else moves with it.
    want = {
        "divergence": reference(h_s @ w_s, h_t @ w_t, 1.0),
        "teacher_top1_prob": np.broadcast_to(sharpened, N),
        "student_logprob": log_s[np.arange(N), TARGETS],
        "teacher_logprob": log_t[np.arange(N), TARGETS],
        "student_entropy": entropy(np.exp(log_s), axis=-1),
        "teacher_entropy": entropy(np.exp(log_t), axis=-1),
    }
    assert got.keys() == want.keys()
    if temperature == 0:  # exactly, so that plain OPD is a neutral SAGE to the bit
        np.testing.assert_array_equal(got["teacher_top1_prob"], np.ones(N))
    for name, value in got.items():
        assert value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_fused_scores_bfloat16_in_float32() -> None:
    score = partial(fused_divergence, kind="reverse_kl", chunk_size=3)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in HEADS]
    h_s, w_s, h_t, w_t = (np.asarray(x, np.float64) for x in rounded)
    divergence, top1 = score(*rounded)
    np.testing.assert_allclose(divergence, reference(h_s @ w_s, h_t @ w_t, 1.0), rtol=1e-4)
    np.testing.assert_allclose(top1, softmax(h_t @ w_t, axis=-1).max(-1), rtol=1e-4)
    # A CPU adds up in float32 even where nobody asks for it. So look at the program's products.
    program = str(jax.make_jaxpr(score)(*rounded))
    assert program.count("dot_general[") == program.count("preferred_element_type=float32") == 2


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_fused_cross_entropy_equals_float64(chunk_size: int) -> None:
    h, w = (x.astype(np.float64) for x in HEADS[:2])
    got = fused_cross_entropy(*HEADS[:2], TARGETS, chunk_size=chunk_size)
    log_p = log_softmax(h @ w, axis=-1)
    nll = -log_p[np.arange(N), TARGETS]
    np.testing.assert_allclose(got.divergence, nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.student_logprob, -nll, rtol=1e-5, atol=1e-6)
    entropies = entropy(np.exp(log_p), axis=-1)
    np.testing.assert_allclose(got.student_entropy, entropies, rtol=1e-4, atol=1e-5)
    assert not np.any([got.teacher_top1_prob, got.teacher_logprob, got.teacher_entropy])

    # ∇_hidden Σ nll = (p - onehot) headᵀ, and nothing through the entropy.
    def total(h: jax.Array) -> jax.Array:
        scores = fused_cross_entropy(h, HEADS[1], TARGETS, chunk_size=chunk_size)
        return sum(x.sum() for x in scores._replace(student_logprob=jnp.zeros(())))

    gradient = jax.grad(total)(HEADS[0])
    np.testing.assert_allclose(gradient, (np.exp(log_p) - np.eye(V)[TARGETS]) @ w.T, atol=1e-5)


EVERY_KIND = [*KINDS, ("sampled_reverse_kl", None), ("cross_entropy", None)]
WITHOUT_TWO = np.where(np.arange(N) % 5 == 2, 0, TOKEN_WEIGHT).astype(np.float32)


def two_sweeps(kind: str, beta: float | None, heads: tuple, weight: np.ndarray) -> tuple:
    """((loss, scores), gradient) with the weights after the scores."""

    def loss(h_s: jax.Array, w_s: jax.Array) -> tuple[jax.Array, Any]:
        if kind == "cross_entropy":
            scores = fused_cross_entropy(h_s, w_s, TARGETS, chunk_size=3)
        else:
            how = dict(kind=kind, beta=beta, chunk_size=3, confidence_temperature=0.5)
            scores = fused_scores(h_s, w_s, *heads[2:], TARGETS, **how)
        return jnp.sum(weight * scores.divergence), scores

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*heads[:2])


def one_sweep(
    kind: str, beta: float | None, heads: tuple, weight: np.ndarray, chunk_size: int = 3
) -> tuple:
    how = dict(kind=kind, beta=beta, chunk_size=chunk_size, confidence_temperature=0.5)
    frozen = (None, None) if kind == "cross_entropy" else heads[2:]

    def loss(h_s: jax.Array, w_s: jax.Array) -> tuple[jax.Array, Any]:
        return fused_loss(h_s, w_s, *frozen, TARGETS, weight, **how)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*heads[:2])


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize(("kind", "beta"), EVERY_KIND)
def test_one_sweep_gives_what_two_give(kind: str, beta: float | None, chunk_size: int) -> None:
    got = one_sweep(kind, beta, HEADS, WITHOUT_TWO, chunk_size)
    want = two_sweeps(kind, beta, HEADS, WITHOUT_TWO)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    (_, _), (d_hidden, _) = got
    assert not np.any(d_hidden[WITHOUT_TWO == 0])
    assert np.all(np.any(d_hidden[WITHOUT_TWO > 0], axis=-1))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_one_sweep_equals_unfused(kind: str, beta: float | None) -> None:
    (loss, _), gradient = one_sweep(kind, beta, HEADS, TOKEN_WEIGHT)
    want, want_gradient = unfused(kind, beta)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for mine, theirs in zip(gradient, want_gradient, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "beta"), EVERY_KIND)
def test_one_sweep_of_bfloat16_adds_up_in_float32(kind: str, beta: float | None) -> None:
    # A float32 head with hidden states of bfloat16: the same roundings as in two sweeps.
    heads = (jnp.asarray(HEADS[0], jnp.bfloat16), HEADS[1], *HEADS[2:])
    (_, scores), (d_hidden, d_head) = got = one_sweep(kind, beta, heads, WITHOUT_TWO)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(score.dtype == jnp.float32 for score in scores)
    want = two_sweeps(kind, beta, heads, WITHOUT_TWO)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_one_sweep_without_gradient_gives_the_same_loss_and_scores() -> None:
    how = dict(kind="jsd", beta=0.3, chunk_size=3, confidence_temperature=0.5)
    got = jax.jit(partial(fused_loss, **how))(*HEADS, TARGETS, WITHOUT_TWO)
    want, _ = one_sweep("jsd", 0.3, HEADS, WITHOUT_TWO)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_the_loss_of_one_sweep_is_scaled_and_its_scores_have_no_gradient() -> None:
    def loss(h_s: jax.Array) -> jax.Array:
        total, scores = fused_loss(
            h_s,
            *HEADS[1:],
            TARGETS,
            TOKEN_WEIGHT,
            kind="reverse_kl",
            chunk_size=4,
            confidence_temperature=1.0,
        )
        return 3 * total + sum(score.sum() for score in scores)

    _, (d_hidden, _) = one_sweep("reverse_kl", None, HEADS, TOKEN_WEIGHT)
    np.testing.assert_allclose(jax.grad(loss)(HEADS[0]), 3 * d_hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_teacher_alone_scores_as_beside_the_student(temperature: float) -> None:
    how = dict(chunk_size=4, confidence_temperature=temperature)
    want = fused_scores(*HEADS, TARGETS, kind="reverse_kl", **how)._asdict()
    for name, got in fused_teacher_scores(*HEADS[2:], TARGETS, **how)._asdict().items():
        np.testing.assert_allclose(got, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert fused_teacher_scores(*HEADS[2:], None, **how).teacher_logprob is None


def test_fused_of_no_positions_is_empty() -> None:
    empty = (HEADS[0][:0], HEADS[1], HEADS[2][:0], HEADS[3])
    divergence, top1 = fused_divergence(*empty, kind="reverse_kl", chunk_size=8)
    assert divergence.shape == top1.shape == (0,)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_fused_memory_does_not_grow_with_positions_times_vocabulary(sweeps: int) -> None:
    wide = 32_768

    @partial(jax.grad, argnums=(0, 1))
    def gradient(*heads: jax.Array) -> jax.Array:
        if sweeps == 1:
            how = dict(kind="reverse_kl", chunk_size=16, confidence_temperature=1.0)
            return fused_loss(*heads, None, jnp.ones(heads[0].shape[:1]), **how)[0]
        return fused_divergence(*heads, kind="reverse_kl", chunk_size=16)[0].sum()

    def temporary_bytes(positions: int) -> int:
        shapes = ((positions, 16), (16, wide), (positions, 8), (8, wide))
        heads = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        compiled = jax.jit(gradient).lower(*heads).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, two = temporary_bytes(512), temporary_bytes(1024)
    assert one < 512 * wide * 4 / 2
    # 512 more positions cost their hidden states and scores, below a hundredth of their logits.
    assert two - one < 512 * wide * 4 / 100


# --- Weights: one example by hand ---------------------------------------------------------------

# Two trajectories. Row 0: turn 0 has two tokens, turn 1 one. Row 1: one token, then three.
TURN_ID = np.array([[-1, 0, 0, -1, 1, -1], [-1, 0, -1, 1, 1, 1]])
VERDICT = np.array([[WEAK, STRONG, SKIP], [SKIP, DET_FAIL, SKIP]])
TOP1 = np.array([[np.nan, 0.5, 0.7, np.nan, 0.8, 0.1], [0.1, 0.9, np.inf, 0.2, 0.3, 0.4]])
# Means (.5 + .7)/2, .8 | .9, (.2 + .3 + .4)/3; the third turn does not exist.
CONFIDENCE = np.array([[0.6, 0.8, 0.0], [0.9, 0.3, 0.0]])
# s = i·c: .5 · .6 = .3, 1 · .8 | 0 · .9, 1 · .3
RAW = np.array([[0, 0.3, 0.3, 0, 0.8, 0], [0, 0, 0, 0.3, 0.3, 0.3]])
# Σ s = 1.4 + .9 = 2.3 over N = 3 + 4 = 7 tokens, of which the one of the SKIP turn is not active.


def weights(**settings: Any) -> tuple[np.ndarray, np.ndarray]:
    weight, z = sage_weights(TURN_ID, VERDICT, CONFIDENCE, **settings)
    return np.asarray(weight), np.asarray(z)


def random_turns(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    turn_id = np.sort(rng.integers(0, 5, (6, 40)), axis=1)
    turn_id[rng.random((6, 40)) < 0.4] = NO_TURN
    verdict = rng.integers(0, 4, (6, 5))
    return turn_id, verdict, rng.uniform(0.1, 1, (6, 5)).astype(np.float32)


def test_intervention_weights() -> None:
    codes = jnp.array([SKIP, WEAK, STRONG, DET_FAIL, -1, 4])  # an unknown code weighs 1
    assert intervention_weight(codes).dtype == jnp.float32
    assert intervention_weight(codes).tolist() == [0, 0.5, 1, 1, 1, 1]
    assert intervention_weight(codes, weak_weight=0.25).tolist() == [0, 0.25, 1, 1, 1, 1]
    assert intervention_weight(codes, skip_weight=0.25, fail_weight=0).tolist()[:4] == [
        *(0.25, 0.5, 1, 0),
    ]


def test_verdict_codes_are_those_on_disk() -> None:
    codes = {v.name: v.value for v in Verdict}
    assert codes == {"SKIP": 0, "WEAK": 1, "STRONG": 2, "DET_FAIL": 3}
    assert NO_TURN == -1


def test_confidence_by_hand_whatever_other_positions_hold() -> None:
    got = turn_confidence(jnp.asarray(TOP1), jnp.asarray(TURN_ID), 3)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, CONFIDENCE, rtol=1e-6)
    gradient = jax.grad(lambda p: turn_confidence(p, jnp.asarray(TURN_ID), 3).sum())(TOP1)
    assert not np.any(gradient)


def test_confidence_of_bfloat16_is_averaged_in_float32() -> None:
    top1 = jnp.full((1, 1000), 0.3, jnp.bfloat16)
    got = turn_confidence(top1, jnp.zeros((1, 1000), jnp.int32), 1)
    np.testing.assert_allclose(got, float(top1[0, 0]), rtol=1e-5)


@pytest.mark.parametrize("normalize", ["all_tokens", "active_tokens", "none"])
def test_totals_of_the_parts_give_the_scale_of_the_whole(normalize: str) -> None:
    turns = random_turns(7)
    parts = [[x[part] for x in turns] for part in (slice(0, 2), slice(2, 5), slice(5, 6))]
    how: dict[str, Any] = dict(weak_weight=0.5, token_factor=None, scope="batch")
    totals = [raw_weights(*part, **how)[1] for part in parts]
    z = scale(jax.tree.map(lambda *x: sum(x), *totals), normalize=normalize, eps=1e-8, max_z=None)
    weight, want = sage_weights(*turns, normalize=normalize)
    np.testing.assert_allclose(z, want, rtol=1e-6)
    # With it, weights of the parts are those of the whole.
    s = np.concatenate([raw_weights(*part, **how)[0] for part in parts])
    np.testing.assert_allclose(s * z, weight, rtol=1e-6)


@pytest.mark.parametrize("normalize", ["all_tokens", "active_tokens", "none"])
def test_without_any_weight_the_scale_is_one(normalize: str) -> None:
    rows = WeightTotals(*jnp.array([[0.0, 2.0], [5.0, 4.0], [0.0, 4.0]]))
    z = scale(rows, normalize=normalize, eps=1e-8, max_z=None)
    np.testing.assert_array_equal(z, [1.0, 1.0 if normalize == "none" else 2.0])


def test_a_turn_that_no_verdict_is_for_has_no_weight_under_jit() -> None:
    turn_id = jnp.array([[0, 1, NO_TURN, 2]])
    args = (turn_id, jnp.array([[STRONG, WEAK]]), jnp.ones((1, 2)))
    weight, _ = jax.jit(partial(sage_weights, normalize="none"))(*args)
    np.testing.assert_array_equal(weight, [[1.0, 0.5, 0.0, 0.0]])


def test_without_a_verdict_or_a_confidence_their_factor_is_one() -> None:
    how: dict[str, Any] = dict(weak_weight=0.5, token_factor=None, scope="batch")
    ones = jnp.ones(CONFIDENCE.shape)
    plain, _ = raw_weights(TURN_ID, None, None, **how)
    np.testing.assert_array_equal(plain, (TURN_ID != NO_TURN).astype(np.float32))
    intervened, _ = raw_weights(TURN_ID, VERDICT, None, **how)
    np.testing.assert_array_equal(intervened, raw_weights(TURN_ID, VERDICT, ones, **how)[0])
    confident, _ = raw_weights(TURN_ID, None, CONFIDENCE, **how)
    strong = jnp.full(VERDICT.shape, STRONG)
    np.testing.assert_array_equal(confident, raw_weights(TURN_ID, strong, CONFIDENCE, **how)[0])


@pytest.mark.parametrize(
    ("settings", "z"),
    [
        ({}, 7 / 2.3),
        ({"normalize": "active_tokens"}, 6 / 2.3),
        ({"normalize": "none"}, 1.0),
        ({"max_z": 2.0}, 2.0),
        ({"max_z": 10.0}, 7 / 2.3),
        ({"scope": "trajectory"}, [3 / 1.4, 4 / 0.9]),
        ({"scope": "trajectory", "normalize": "active_tokens"}, [3 / 1.4, 3 / 0.9]),
        ({"scope": "trajectory", "normalize": "none"}, [1.0, 1.0]),
        ({"scope": "trajectory", "max_z": 3.0}, [3 / 1.4, 3.0]),
    ],
)
def test_weights_by_hand(settings: dict[str, Any], z: float | list[float]) -> None:
    weight, got_z = weights(**settings)
    np.testing.assert_allclose(got_z, z, rtol=1e-6)
    assert got_z.shape == np.shape(z)
    np.testing.assert_allclose(weight, RAW * np.reshape(z, (-1, 1)), rtol=1e-6)


def test_the_entropy_factor_by_hand() -> None:
    got = entropy_factor(jnp.array([0.0, 0.8, 0.81, 3.0]), bonus=1.0, threshold=0.8)
    np.testing.assert_array_equal(got, [1, 1, 2, 2])
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(entropy_factor(got, bonus=0.0, threshold=0.0), np.ones(4))


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_weight_is_one(seed: int) -> None:
    turn_id, verdict, confidence = random_turns(seed)
    student = turn_id != NO_TURN
    weight, _ = sage_weights(turn_id, verdict, confidence)
    np.testing.assert_allclose(np.mean(np.asarray(weight)[student]), 1, rtol=1e-6)
    by_row, _ = sage_weights(turn_id, verdict, confidence, scope="trajectory")
    np.testing.assert_allclose(np.sum(by_row, axis=1) / np.sum(student, axis=1), 1, rtol=1e-6)
    weight, _ = sage_weights(turn_id, verdict, confidence, normalize="active_tokens")
    np.testing.assert_allclose(np.mean(np.asarray(weight)[np.asarray(weight) > 0]), 1, rtol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "trajectory"])
@pytest.mark.parametrize("normalize", ["all_tokens", "active_tokens", "none"])
def test_neutral_factors_are_bit_for_bit_plain_opd(normalize: str, scope: str) -> None:
    turn_id, verdict, confidence = random_turns(4)
    weight, z = sage_weights(
        turn_id,
        np.maximum(verdict, WEAK),
        np.ones_like(confidence),
        weak_weight=1.0,
        normalize=normalize,
        scope=scope,
    )
    plain = (turn_id != NO_TURN).astype(np.float32)
    np.testing.assert_array_equal(weight, plain)
    np.testing.assert_array_equal(z, np.ones_like(z))
    divergence = logits(6, *turn_id.shape) ** 2
    got = weighted_loss(jnp.asarray(divergence), weight, turn_id)
    assert got == jnp.sum(jnp.where(turn_id == NO_TURN, 0.0, divergence)) / plain.sum()


def test_turns_that_a_compiled_function_captures_are_checked_as_others_are() -> None:
    turn_id, verdict, confidence = random_turns(4)
    held = jnp.array(turn_id)
    captured = jax.jit(lambda confidence: sage_weights(held, verdict, confidence))
    want = sage_weights(turn_id, verdict, confidence)
    for got, expected in zip(captured(confidence), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    few = jax.jit(lambda confidence: sage_weights(held, verdict[:, :1], confidence))
    with pytest.raises(ValueError, match="expected turns below K = 1"):
        few(confidence[:, :1])


@pytest.mark.parametrize("scope", ["batch", "trajectory"])
@pytest.mark.parametrize("normalize", ["all_tokens", "active_tokens", "none"])
def test_all_turns_skipped_gives_zero(normalize: str, scope: str) -> None:
    skip = np.full_like(VERDICT, SKIP)

    def loss(divergence: jax.Array) -> jax.Array:
        weight, z = sage_weights(TURN_ID, skip, CONFIDENCE, normalize=normalize, scope=scope)
        assert np.all(np.isfinite(z))
        return weighted_loss(divergence, weight, TURN_ID)

    value, gradient = jax.value_and_grad(loss)(jnp.ones(TURN_ID.shape))
    assert value == 0
    assert not np.any(gradient)


def test_weights_get_no_gradient() -> None:
    def weight_of(confidence: jax.Array) -> jax.Array:
        weight, z = sage_weights(TURN_ID, VERDICT, confidence)
        return jnp.sum(weight * jnp.arange(6)) + z

    assert not np.any(jax.grad(weight_of)(CONFIDENCE))
    divergence = jnp.ones(TURN_ID.shape)
    gradient = jax.grad(lambda w: weighted_loss(divergence, w, TURN_ID))(jnp.asarray(RAW))
    assert not np.any(gradient)


# --- The loss -----------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    divergence = np.array([[9.0, 1, 2, 9, 3, 9], [9, 4, 9, 1, 2, 3]])
    # (.3·1 + .3·2 + .8·3 + 0·4 + .3·(1 + 2 + 3)) / 7 = 5.1 / 7
    got = weighted_loss(jnp.asarray(divergence), jnp.asarray(RAW), TURN_ID)
    np.testing.assert_allclose(got, 5.1 / 7, rtol=1e-6)
    # Full SAGE-OPD is the s-weighted token mean: 5.1 / Σ s = 5.1 / 2.3.
    got = weighted_loss(jnp.asarray(divergence), weights()[0], TURN_ID)
    np.testing.assert_allclose(got, 5.1 / 2.3, rtol=1e-6)
    assert got.dtype == jnp.float32


def test_loss_without_student_tokens_is_zero() -> None:
    nobody = np.full((2, 3), NO_TURN)
    value, gradient = jax.value_and_grad(weighted_loss)(jnp.ones((2, 3)), jnp.ones((2, 3)), nobody)
    assert value == 0
    assert not np.any(gradient)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_garbage_at_other_positions_is_harmless(garbage: float) -> None:
    student = TURN_ID != NO_TURN

    def loss(divergence: jax.Array, top1: jax.Array, weight_there: float) -> jax.Array:
        confidence = turn_confidence(top1, TURN_ID, 3)
        weight, _ = sage_weights(TURN_ID, VERDICT, confidence, token_factor=top1)
        return weighted_loss(divergence, jnp.where(student, weight, weight_there), TURN_ID)

    clean = np.where(student, logits(7, 2, 6) ** 2, 0)
    top1 = np.where(student, TOP1, 0)
    want, want_gradient = jax.value_and_grad(loss)(clean, top1, 0.0)
    got, gradient = jax.value_and_grad(loss)(
        np.where(student, clean, garbage), np.where(student, top1, garbage), garbage
    )
    assert got == want
    np.testing.assert_array_equal(gradient, want_gradient)
    assert not np.any(np.asarray(gradient)[~student])


def test_skipped_turns_and_other_positions_get_exactly_no_gradient() -> None:
    student = (TURN_ID != NO_TURN)[..., None]

    @jax.grad
    def gradient(student_logits: jax.Array) -> jax.Array:
        teacher_logits = logits(9, 2, 6, 5)
        student_logits = jnp.where(student, student_logits, 0.0)
        top1 = jnp.max(jax.nn.softmax(teacher_logits), axis=-1)
        confidence = turn_confidence(top1, TURN_ID, 3)
        weight, _ = sage_weights(TURN_ID, VERDICT, confidence)
        return weighted_loss(reverse_kl(student_logits, teacher_logits), weight, TURN_ID)

    clean = logits(8, 2, 6, 5)
    want = gradient(clean)
    np.testing.assert_array_equal(np.any(want, axis=-1), RAW > 0)
    # Logits replaced before the divergence may have been NaN.
    np.testing.assert_array_equal(gradient(np.where(student, clean, np.nan)), want)


def sampled_last(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """`sampled_reverse_kl` where the last token was sampled."""
    logprobs = (jax.nn.log_softmax(x)[..., -1] for x in (student_logits, teacher_logits))
    return sampled_reverse_kl(*logprobs)


@pytest.mark.parametrize("banned_by", ["student", "teacher"])
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, partial(jsd, beta=0.5)])
def test_a_banned_token_of_a_skipped_turn_changes_nothing(
    divergence: Callable, banned_by: str
) -> None:
    turn_id, confidence = np.array([[0, 0, 1]]), np.array([[0.5, 0.5]])
    skipped = turn_id == 0

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        weight, _ = sage_weights(turn_id, np.array([[SKIP, STRONG]]), confidence)
        return weighted_loss(divergence(student, teacher), weight, turn_id)

    s, t = logits(10, 1, 3, 3), logits(11, 1, 3, 3)
    want, want_gradient = jax.value_and_grad(loss)(s, t)
    banned = {"student": s.copy(), "teacher": t.copy()}
    banned[banned_by][skipped, -1] = -np.inf
    got, gradient = jax.value_and_grad(loss)(banned["student"], banned["teacher"])
    assert got == want > 0
    np.testing.assert_array_equal(gradient, want_gradient)
    assert not np.any(np.asarray(gradient)[skipped])


def test_a_sampled_token_that_the_teacher_bans_counts_only_with_a_weight() -> None:
    s, t = logits(10, 3, 3), logits(11, 3, 3)
    t[:2, -1] = -np.inf
    np.testing.assert_array_equal(np.isposinf(sampled_last(s, t)), [True, True, False])

    def loss(student: jax.Array) -> jax.Array:
        weight = jnp.array([[0.0, 0.0, 2.0]])
        return weighted_loss(sampled_last(student, t)[None], weight, np.zeros((1, 3), int))

    value, gradient = jax.value_and_grad(loss)(s)
    np.testing.assert_allclose(value, 2 / 3 * sampled_last(s, t)[2], rtol=1e-6)
    assert not np.any(gradient[:2])
    assert np.all(np.isfinite(gradient[2]))
    assert np.any(gradient[2])


@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_fused_form_keeps_an_infinity_out_of_a_gradient_of_zero(sweeps: int) -> None:
    hidden, head = np.abs(logits(12, 4, 5)), logits(13, 5, 3)
    banning = head.copy()
    banning[:, 2] = -np.inf  # times a positive hidden state; chunks need no padding with zeros

    teacher = np.ones((4, 5), np.float32), banning

    def loss(hidden: jax.Array, head: jax.Array, weight: float) -> jax.Array:
        if sweeps == 1:
            how = dict(kind="reverse_kl", chunk_size=2, confidence_temperature=1.0)
            return fused_loss(hidden, head, *teacher, None, jnp.full(4, weight), **how)[0]
        divergence, _ = fused_divergence(hidden, head, *teacher, kind="reverse_kl", chunk_size=2)
        return weighted_loss(divergence[None], jnp.full((1, 4), weight), np.zeros((1, 4), int))

    assert np.isposinf(loss(hidden, head, 1.0))
    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head, 0.0)
    assert value == 0
    assert not any(np.any(part) for part in gradient)


# --- What does not fit --------------------------------------------------------------------------


def fused(*heads: np.ndarray, kind: str = "reverse_kl", chunk_size: int = 4, **more: Any) -> Any:
    return fused_divergence(*heads, kind=kind, chunk_size=chunk_size, **more)


H_S, W_S, H_T, W_T = HEADS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reverse_kl(S, T[0]), r"`student_logits` and `teacher_logits`.*\(3, 4, 7\)"),
        (lambda: forward_kl(S, T[0]), "`student_logits` and `teacher_logits`"),
        (lambda: jsd(S, T[0], beta=0.5), "`student_logits` and `teacher_logits`"),
        (lambda: jsd(S, T, beta=-0.1), r"`beta`: expected 0\.\.1"),
        (lambda: jsd(S, T, beta=1.1), r"`beta`: expected 0\.\.1"),
        (lambda: sampled_reverse_kl(S, T[0]), "`student_logprob` and `teacher_logprob`"),
        (lambda: fused(H_S, W_S, H_T[1:], W_T), "`teacher_hidden` has 9 positions, expected"),
        (lambda: fused(H_S, W_S, H_T, W_T[:, 1:]), "`teacher_head` has 10 tokens, expected"),
        (lambda: fused(H_S, W_S[1:], H_T, W_T), "`student_hidden` .* and `student_head`"),
        (lambda: fused(H_S, W_S, H_T, W_T.T), "`teacher_hidden` .* and `teacher_head`"),
        (lambda: fused(H_S[None], W_S, H_T, W_T), r"expected \[N, D\] and \[D, V\]"),
        (lambda: fused(*HEADS, kind="kl"), "`kind`: expected one of reverse_kl, forward_kl, jsd"),
        (lambda: fused(*HEADS, kind="sampled_reverse_kl"), "needs the sampled tokens"),
        (lambda: fused(*HEADS, kind="jsd"), "needs `beta`"),
        (
            lambda: one_sweep("reverse_kl", None, HEADS, TOKEN_WEIGHT[1:]),
            r"`weight` \(9,\): expected",
        ),
        (
            lambda: one_sweep("jsd", 0.5, (H_S, W_S, None, None), TOKEN_WEIGHT),
            "'jsd', which needs `teac",
        ),
        (lambda: fused(*HEADS, kind="jsd", beta=2.0), "`beta`: expected 0..1"),
        (lambda: fused(*HEADS, chunk_size=0), "`chunk_size`: expected at least 1, got 0"),
        (lambda: weights(normalize="mean"), r"`normalize`: .*all_tokens.*got 'mean'"),
        (lambda: weights(scope="turn"), "`scope`: expected one of batch, trajectory, got 'turn'"),
        (lambda: weights(token_factor=jnp.ones(3)), "`token_factor` and `turn_id`"),
        (
            lambda: sage_weights(TURN_ID, VERDICT, CONFIDENCE[:, :2]),
            "`verdict` and `confidence`: expected equal",
        ),
        (
            lambda: sage_weights(jnp.array([[2]]), jnp.ones((1, 2), int), jnp.ones((1, 2))),
            r"`turn_id`: expected turns below K = 2 .* got 2",
        ),
        (lambda: sage_weights(TURN_ID, VERDICT[:1], CONFIDENCE[:1]), "with B = 2 of `turn_id`"),
        (lambda: turn_confidence(TOP1[:, 1:], TURN_ID, 3), "`teacher_top1_prob` and `turn_id`"),
        (lambda: weighted_loss(RAW[:, 1:], RAW, TURN_ID), "`divergence` and `weight`"),
        (lambda: weighted_loss(RAW, RAW, TURN_ID[:, 1:]), "`divergence` and `turn_id`"),
    ],
)
def test_arrays_and_settings_that_do_not_fit_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
