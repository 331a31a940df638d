"""The objective against float64 numpy, scipy, finite differences and hand arithmetic."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy

from opd_jax.losses import (
    NO_TURN,
    Verdict,
    entropy_factor,
    forward_kl,
    fused_cross_entropy,
    fused_divergence,
    fused_scores,
    intervention_weight,
    jsd,
    kind_to_beta,
    normalizer,
    raw_weights,
    reverse_kl,
    sage_weights,
    sampled_reverse_kl,
    turn_confidence,
    weighted_loss,
)

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


def every_equation(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The operations of a program, those of its inner programs included."""
    is_program = lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)  # noqa: E731
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from every_equation(getattr(value, "jaxpr", value))


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


S, T = logits(0, 3, 4, 7), logits(1, 3, 4, 7)


# --- Divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_equals_float64(beta: float) -> None:
    got = jsd(S, T, beta=beta)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(S, T, beta), rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_gradient_equals_finite_differences(beta: float) -> None:
    got = jax.grad(lambda s: jsd(s, T, beta=beta).sum())(S)
    want = finite_difference(lambda s: reference(s, T, beta).sum(), S)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_named_divergences_have_their_direction() -> None:
    p_s, p_t = softmax(S.astype(np.float64), axis=-1), softmax(T.astype(np.float64), axis=-1)
    np.testing.assert_allclose(reverse_kl(S, T), entropy(p_s, p_t, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(forward_kl(S, T), entropy(p_t, p_s, axis=-1), rtol=1e-5)


def test_ends_of_beta_are_exactly_the_divergences() -> None:
    np.testing.assert_array_equal(jsd(S, T, beta=0), forward_kl(S, T))
    np.testing.assert_array_equal(jsd(S, T, beta=1), reverse_kl(S, T))
    # Swapping the arguments swaps the direction, through the same arithmetic.
    np.testing.assert_array_equal(forward_kl(S, T), reverse_kl(T, S))


def test_interior_of_beta_tends_to_the_scaled_ends() -> None:
    # jsd_β / β -> forward KL with an error of order β.
    np.testing.assert_allclose(jsd(S, T, beta=1e-3) / 1e-3, forward_kl(S, T), rtol=0.05)
    np.testing.assert_allclose(jsd(S, T, beta=1 - 1e-3) / 1e-3, reverse_kl(S, T), rtol=0.05)


def test_half_beta_is_symmetric_and_jensen_shannon() -> None:
    np.testing.assert_allclose(jsd(S, T, beta=0.5), jsd(T, S, beta=0.5), rtol=1e-6)
    distance = jensenshannon(softmax(S, axis=-1), softmax(T, axis=-1), axis=-1)
    np.testing.assert_allclose(jsd(S, T, beta=0.5), distance**2, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence(beta: float) -> None:
    value, gradient = jax.value_and_grad(lambda s: jsd(s, S + 3.0, beta=beta).sum())(S)
    # A shift by a constant is the same distribution; 12 tokens at float32 rounding.
    assert abs(value) < 1e-5
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_teacher_logits_get_no_gradient(beta: float) -> None:
    student, teacher = jax.grad(lambda s, t: jsd(s, t, beta=beta).sum(), argnums=(0, 1))(S, T)
    assert not np.any(teacher)
    assert np.all(np.any(student, axis=-1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_bfloat16_inputs_are_scored_in_float32(beta: float) -> None:
    s, t = jnp.asarray(S, jnp.bfloat16), jnp.asarray(T, jnp.bfloat16)
    got = jsd(s, t, beta=beta)
    assert got.dtype == jnp.float32
    # 1e-5 and not the 4e-3 of bfloat16: only the inputs are rounded.
    want = reference(s.astype(np.float32), t.astype(np.float32), beta)
    np.testing.assert_allclose(got, want, rtol=1e-5)


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


def test_divergence_rejects_other_shapes() -> None:
    for function in (reverse_kl, forward_kl, lambda s, t: jsd(s, t, beta=0.5)):
        with pytest.raises(ValueError, match=r"`student_logits` and `teacher_logits`.*\(3, 4, 7\)"):
            function(S, T[0])


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside_its_range_is_rejected(beta: float) -> None:
    with pytest.raises(ValueError, match=r"`beta`: expected 0\.\.1"):
        jsd(S, T, beta=beta)


# --- The one-sample estimate ----------------------------------------------------------------------


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


def test_sampled_estimate_has_exactly_the_value_of_the_gap() -> None:
    # -100 + 1000.3: the surrogate is -9e4 and must not round the value when it is taken back.
    student = np.float32([-100.0, -2.0, -9.0])
    teacher = np.float32([-1000.3, -0.1, -np.inf])
    np.testing.assert_array_equal(sampled_reverse_kl(student, teacher), student - teacher)


def test_sampled_estimate_gives_the_teacher_no_gradient() -> None:
    assert jax.grad(sampled_reverse_kl, argnums=1)(jnp.float32(-2.0), jnp.float32(-1.0)) == 0
    # gap · ∇ log p_S = -2 - (-1)
    assert jax.grad(sampled_reverse_kl)(jnp.float32(-2.0), jnp.float32(-1.0)) == -1


def test_sampled_estimate_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match="`student_logprob` and `teacher_logprob`"):
        sampled_reverse_kl(jnp.zeros(2), jnp.zeros(3))


# --- The fused form -------------------------------------------------------------------------------

N, D, D_TEACHER, V = 10, 4, 6, 11
HEADS = (logits(2, N, D), logits(3, D, V) / 2, logits(4, N, D_TEACHER), logits(5, D_TEACHER, V) / 2)
TARGETS = np.arange(N) % V


TOKEN_WEIGHT = np.linspace(0.5, 2, N).astype(np.float32)  # other tokens, other cotangents


@cache
def unfused(kind: str, beta: float | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Value and gradient to the student of the weighted divergence from whole logits."""

    def loss(h_s: jax.Array, w_s: jax.Array, h_t: jax.Array, w_t: jax.Array) -> jax.Array:
        return TOKEN_WEIGHT @ jsd(h_s @ w_s, h_t @ w_t, beta=kind_to_beta(kind, beta))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*HEADS)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 64])
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


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_fused_equals_float64(kind: str, beta: float | None) -> None:
    h_s, w_s, h_t, w_t = (x.astype(np.float64) for x in HEADS)
    divergence, top1 = fused_divergence(*HEADS, kind=kind, chunk_size=3, beta=beta)
    want = reference(h_s @ w_s, h_t @ w_t, kind_to_beta(kind, beta))
    np.testing.assert_allclose(divergence, want, rtol=1e-4)
    np.testing.assert_allclose(top1, softmax(h_t @ w_t, axis=-1).max(-1), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_fused_scores_equal_float64(temperature: float) -> None:
    h_s, w_s, h_t, w_t = (x.astype(np.float64) for x in HEADS)
    log_s, log_t = log_softmax(h_s @ w_s, axis=-1), log_softmax(h_t @ w_t, axis=-1)
    got = fused_scores(
        *HEADS, TARGETS, beta=1.0, chunk_size=4, confidence_temperature=temperature
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
    for name, value in got.items():
        assert value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_confidence_temperature_zero_is_exactly_one() -> None:
    scores = fused_scores(*HEADS, TARGETS, beta=1.0, chunk_size=4, confidence_temperature=0.0)
    np.testing.assert_array_equal(scores.teacher_top1_prob, np.ones(N))


def test_fused_bfloat16_equals_float64_of_the_rounded_inputs() -> None:
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in HEADS]
    h_s, w_s, h_t, w_t = (np.asarray(x, np.float64) for x in rounded)
    divergence, top1 = fused_divergence(*rounded, kind="reverse_kl", chunk_size=3)
    np.testing.assert_allclose(divergence, reference(h_s @ w_s, h_t @ w_t, 1.0), rtol=1e-4)
    np.testing.assert_allclose(top1, softmax(h_t @ w_t, axis=-1).max(-1), rtol=1e-4)


def test_fused_asks_for_float32_logits() -> None:
    # Of the program and not of its values: a CPU adds up in float32 even where nobody asks.
    score = partial(fused_divergence, kind="reverse_kl", chunk_size=3)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in HEADS]
    products = [
        equation.outvars[0].aval.dtype
        for equation in every_equation(jax.make_jaxpr(score)(*rounded).jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert products == [jnp.float32, jnp.float32]


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_fused_cross_entropy_equals_float64(chunk_size: int) -> None:
    h, w = (x.astype(np.float64) for x in HEADS[:2])
    nll, entropies = fused_cross_entropy(*HEADS[:2], TARGETS, chunk_size=chunk_size)
    log_p = log_softmax(h @ w, axis=-1)
    np.testing.assert_allclose(nll, -log_p[np.arange(N), TARGETS], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropies, entropy(np.exp(log_p), axis=-1), rtol=1e-4, atol=1e-5)
    # ∇_hidden Σ nll = (p - onehot) headᵀ, and nothing through the entropy.
    gradient = jax.grad(
        lambda h: sum(
            x.sum() for x in fused_cross_entropy(h, HEADS[1], TARGETS, chunk_size=chunk_size)
        )
    )(HEADS[0])
    np.testing.assert_allclose(gradient, (np.exp(log_p) - np.eye(V)[TARGETS]) @ w.T, atol=1e-5)


def test_fused_ignores_dropped_positions_even_nan() -> None:
    kept = np.array([0, 2, 3, 7])
    dirty = [x.copy() for x in HEADS]
    for hidden in (dirty[0], dirty[2]):
        hidden[np.setdiff1d(np.arange(N), kept)] = np.nan

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(h_s: jax.Array, w_s: jax.Array, h_t: jax.Array, w_t: jax.Array) -> jax.Array:
        # Chunks of 3 over 4 tokens: the last one is filled up with positions of no one.
        return fused_divergence(h_s[kept], w_s, h_t[kept], w_t, kind="reverse_kl", chunk_size=3)[
            0
        ].sum()

    got, (hidden, head) = loss(*dirty)
    want, (_, want_head) = loss(*HEADS)
    assert got == want
    np.testing.assert_array_equal(head, want_head)
    assert not np.any(np.delete(hidden, kept, axis=0))


def test_fused_of_no_positions_is_empty() -> None:
    empty = (HEADS[0][:0], HEADS[1], HEADS[2][:0], HEADS[3])
    divergence, top1 = fused_divergence(*empty, kind="reverse_kl", chunk_size=8)
    assert divergence.shape == top1.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: (h[0], h[1], h[2][1:], h[3]), "`teacher_hidden` has 9 positions, expected"),
        (lambda h: (h[0], h[1], h[2], h[3][:, 1:]), "`teacher_head` has 10 tokens, expected"),
        (lambda h: (h[0], h[1][1:], h[2], h[3]), "`student_hidden` .* and `student_head`"),
        (lambda h: (h[0], h[1], h[2], h[3].T), "`teacher_hidden` .* and `teacher_head`"),
        (lambda h: (h[0][None], h[1], h[2], h[3]), r"expected \[N, D\] and \[D, V\]"),
    ],
)
def test_fused_rejects_arrays_that_do_not_fit(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_divergence(*change(HEADS), kind="reverse_kl", chunk_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kl", "chunk_size": 4}, "`kind`: expected reverse_kl, forward_kl or jsd"),
        ({"kind": "jsd", "chunk_size": 4}, "needs `beta`"),
        ({"kind": "jsd", "chunk_size": 4, "beta": 2.0}, "`beta`: expected 0..1"),
        ({"kind": "reverse_kl", "chunk_size": 0}, "`chunk_size`: expected at least 1, got 0"),
    ],
)
def test_fused_rejects_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_divergence(*HEADS, **settings)


# --- Memory of the fused form ---------------------------------------------------------------------

WIDE = 32_768


def abstract_heads(positions: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    shapes = ((positions, 16), (16, WIDE), (positions, 8), (8, WIDE))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def fused_loss(*heads: jax.Array) -> jax.Array:
    return fused_divergence(*heads, kind="reverse_kl", chunk_size=16)[0].sum()


def unfused_loss(h_s: jax.Array, w_s: jax.Array, h_t: jax.Array, w_t: jax.Array) -> jax.Array:
    return reverse_kl(h_s @ w_s, h_t @ w_t).sum()


def largest_array(loss: Callable, positions: int) -> int:
    """Elements of the largest array that value and gradient compute."""
    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*abstract_heads(positions))
    arrays = [v.aval.shape for e in every_equation(gradient.jaxpr) for v in e.outvars]
    return max(math.prod(shape) for shape in arrays)


def test_no_array_of_the_fused_program_has_positions_times_vocabulary() -> None:
    # The head [16, V] and one chunk's logits [16, V] are the largest.
    assert largest_array(fused_loss, 512) == 16 * WIDE
    # The walk does find such an array where there is one.
    assert largest_array(unfused_loss, 512) == 512 * WIDE


def temporary_bytes(positions: int) -> int:
    gradient = jax.jit(jax.grad(fused_loss, argnums=(0, 1)))
    compiled = gradient.lower(*abstract_heads(positions)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_fused_memory_does_not_grow_with_positions_times_vocabulary() -> None:
    one, two = temporary_bytes(512), temporary_bytes(1024)
    assert one < 512 * WIDE * 4 / 2
    # 512 more positions cost their hidden states and scores, below a hundredth of their logits.
    assert two - one < 512 * WIDE * 4 / 100


# --- Weights: one example by hand -----------------------------------------------------------------

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
    codes = jnp.array([SKIP, WEAK, STRONG, DET_FAIL])
    np.testing.assert_array_equal(intervention_weight(codes), [0, 0.5, 1, 1])
    np.testing.assert_array_equal(
        intervention_weight(codes, weak_weight=0.25), np.float32([0, 0.25, 1, 1])
    )
    assert intervention_weight(codes).dtype == jnp.float32


def test_unknown_verdict_weighs_one() -> None:
    np.testing.assert_array_equal(intervention_weight(jnp.array([-1, 4, 99])), [1, 1, 1])


def test_verdict_codes_are_those_on_disk() -> None:
    codes = {v.name: v.value for v in Verdict}
    assert codes == {"SKIP": 0, "WEAK": 1, "STRONG": 2, "DET_FAIL": 3}
    assert NO_TURN == -1


def test_confidence_by_hand_whatever_other_positions_hold() -> None:
    got = turn_confidence(jnp.asarray(TOP1), jnp.asarray(TURN_ID), 3)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, CONFIDENCE, rtol=1e-6)


def test_confidence_of_bfloat16_is_averaged_in_float32() -> None:
    top1 = jnp.full((1, 1000), 0.3, jnp.bfloat16)
    got = turn_confidence(top1, jnp.zeros((1, 1000), jnp.int32), 1)
    np.testing.assert_allclose(got, float(top1[0, 0]), rtol=1e-5)


def test_confidence_gets_no_gradient() -> None:
    gradient = jax.grad(lambda p: turn_confidence(p, jnp.asarray(TURN_ID), 3).sum())(TOP1)
    assert not np.any(gradient)


def test_raw_weights_by_hand() -> None:
    np.testing.assert_allclose(raw_weights(TURN_ID, VERDICT, CONFIDENCE), RAW, rtol=1e-6)


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


@pytest.mark.parametrize("scope", ["batch", "trajectory"])
def test_a_factor_of_tokens_enters_the_mean_that_z_keeps(scope: str) -> None:
    rng = np.random.default_rng(8)
    factor = np.where(TURN_ID == NO_TURN, np.nan, 1 + rng.random(TURN_ID.shape)).astype(np.float32)
    s = RAW * np.where(TURN_ID == NO_TURN, 0, factor)
    student = TURN_ID != NO_TURN
    z = student.sum() / s.sum() if scope == "batch" else student.sum(1) / s.sum(1)
    weight, got_z = weights(scope=scope, token_factor=jnp.asarray(factor))
    np.testing.assert_allclose(got_z, z, rtol=1e-6)
    np.testing.assert_allclose(weight, s * np.reshape(z, (-1, 1)), rtol=1e-6)


def test_a_factor_of_ones_is_bit_for_bit_none() -> None:
    ones = jnp.ones(TURN_ID.shape)
    for got, want in zip(weights(token_factor=ones), weights(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_factor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="`token_factor` and `turn_id`"):
        weights(token_factor=jnp.ones(3))


def test_weak_weight_scales_weak_turns_only() -> None:
    # α = .25 halves the .3 of row 0's first turn: Σ s = .15·2 + .8 + .9 = 2.
    weight, z = weights(weak_weight=0.25)
    np.testing.assert_allclose(z, 7 / 2, rtol=1e-6)
    np.testing.assert_allclose(weight[0, 1:3], 0.15 * 7 / 2, rtol=1e-6)
    np.testing.assert_allclose(weight[0, 4], 0.8 * 7 / 2, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_mean_weight_is_one(seed: int) -> None:
    turn_id, verdict, confidence = random_turns(seed)
    weight, _ = sage_weights(turn_id, verdict, confidence)
    np.testing.assert_allclose(np.mean(np.asarray(weight)[turn_id != NO_TURN]), 1, rtol=1e-6)
    by_row, _ = sage_weights(turn_id, verdict, confidence, scope="trajectory")
    means = np.sum(by_row, axis=1) / np.sum(turn_id != NO_TURN, axis=1)
    np.testing.assert_allclose(means, 1, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_mean_weight_over_active_tokens_is_one(seed: int) -> None:
    weight, _ = sage_weights(*random_turns(seed), normalize="active_tokens")
    active = np.asarray(weight)[np.asarray(weight) > 0]
    np.testing.assert_allclose(np.mean(active), 1, rtol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "trajectory"])
@pytest.mark.parametrize("normalize", ["all_tokens", "active_tokens"])
def test_a_constant_factor_of_every_weight_changes_nothing(normalize: str, scope: str) -> None:
    turn_id, verdict, confidence = random_turns(3)
    weight = lambda c: sage_weights(turn_id, verdict, c, normalize=normalize, scope=scope)[0]  # noqa: E731
    np.testing.assert_array_equal(weight(confidence * 0.25), weight(confidence))  # exact in binary
    np.testing.assert_allclose(weight(confidence * 0.37), weight(confidence), rtol=1e-5)


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


def test_orders_of_trajectories_and_of_turns_change_nothing() -> None:
    turn_id, verdict, confidence = random_turns(5)
    weight, z = sage_weights(turn_id, verdict, confidence)
    rows = np.array([3, 0, 5, 1, 4, 2])
    permuted, permuted_z = sage_weights(turn_id[rows], verdict[rows], confidence[rows])
    np.testing.assert_allclose(permuted, np.asarray(weight)[rows], rtol=1e-6)
    np.testing.assert_allclose(permuted_z, z, rtol=1e-6)
    # Turn k is renamed to position[k]; its verdict and confidence move along.
    turns = np.array([4, 2, 0, 1, 3])
    position = np.argsort(turns)
    renamed_id = np.where(turn_id == NO_TURN, NO_TURN, position[turn_id])
    renamed, _ = sage_weights(renamed_id, verdict[:, turns], confidence[:, turns])
    np.testing.assert_allclose(renamed, weight, rtol=1e-6)


def test_padding_of_tokens_and_turns_changes_nothing() -> None:
    turn_id, verdict, confidence = random_turns(6)
    weight, z = sage_weights(turn_id, verdict, confidence)
    padded, padded_z = sage_weights(
        np.pad(turn_id, [(0, 0), (0, 9)], constant_values=NO_TURN),
        np.pad(verdict, [(0, 0), (0, 2)], constant_values=STRONG),
        np.pad(confidence, [(0, 0), (0, 2)], constant_values=0.7),
    )
    np.testing.assert_allclose(padded_z, z, rtol=1e-6)
    np.testing.assert_allclose(padded[:, :40], weight, rtol=1e-6)
    assert not np.any(padded[:, 40:])


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


def test_normalizer_of_a_tiny_sum_is_bounded_by_eps() -> None:
    assert normalizer(jnp.zeros(()), jnp.float32(5), jnp.zeros(()), eps=0.5) == 10
    assert normalizer(jnp.zeros(()), jnp.float32(5), jnp.zeros(()), eps=0.5, max_z=3.0) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "mean"}, "`normalize`: expected all_tokens, active_tokens or none"),
        ({"scope": "turn"}, "`scope`: expected batch or trajectory, got 'turn'"),
    ],
)
def test_unknown_settings_are_rejected(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(**settings)


def test_weights_of_other_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"`verdict` .* and `confidence`"):
        sage_weights(TURN_ID, VERDICT, CONFIDENCE[:, :2])
    with pytest.raises(ValueError, match="with B = 2 of `turn_id`"):
        sage_weights(TURN_ID, VERDICT[:1], CONFIDENCE[:1])
    with pytest.raises(ValueError, match="`teacher_top1_prob` and `turn_id`"):
        turn_confidence(jnp.asarray(TOP1[:, 1:]), jnp.asarray(TURN_ID), 3)


# --- The loss -------------------------------------------------------------------------------------


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
        weight, _ = sage_weights(TURN_ID, VERDICT, confidence)
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


def test_the_fused_form_keeps_an_infinity_out_of_a_gradient_of_zero() -> None:
    hidden, head = np.abs(logits(12, 4, 5)), logits(13, 5, 3)
    banning = head.copy()
    banning[:, 2] = -np.inf  # times a positive hidden state; chunks need no padding with zeros

    def loss(hidden: jax.Array, head: jax.Array, weight: float) -> jax.Array:
        divergence, _ = fused_divergence(
            hidden, head, np.ones((4, 5), np.float32), banning, kind="reverse_kl", chunk_size=2
        )
        return weighted_loss(divergence[None], jnp.full((1, 4), weight), np.zeros((1, 4), int))

    assert np.isposinf(loss(hidden, head, 1.0))
    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head, 0.0)
    assert value == 0
    assert not any(np.any(part) for part in gradient)


def test_loss_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match="`divergence` and `weight`"):
        weighted_loss(jnp.ones((2, 5)), jnp.asarray(RAW), TURN_ID)
    with pytest.raises(ValueError, match="`divergence` and `turn_id`"):
        weighted_loss(jnp.ones((2, 6)), jnp.asarray(RAW), TURN_ID[:, 1:])
