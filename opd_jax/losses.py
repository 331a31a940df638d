"""The objective of SAGE-OPD (arXiv 2606.19659) and of its baselines, as pure functions on arrays.

Each student token has a divergence and a weight. The loss is the sum of their products, divided by
the number N of student tokens:

    loss = (1/N) Σ_token weight · divergence,    weight = z · s,    s = i_turn · c_turn [· e_token]

`i` is the turn's intervention (its verdict) and `c` the teacher's confidence over the turn. `z`
keeps the mean weight at one, the scale of plain OPD (weight = 1 everywhere). An ablation sets one
factor to one. A method that weighs single tokens adds a factor `e` (`entropy_factor`).

`raw_weights` gives s and its totals, which add up over micro-batches and devices. `scale` makes z
from the totals. `sage_weights` is both, for one batch. Weights get no gradient, and neither does
anything of the teacher.

`turn_id` says which tokens are the student's: k for a token sampled in turn k, `NO_TURN` for
prompts, observations, forced tokens and padding. Those positions may hold anything, even NaN.

This file imports JAX only. Inputs may be any float dtype; arithmetic is float32, logs are natural.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

NO_TURN = -1

KINDS = ("reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl")
NORMALIZERS = ("all_tokens", "active_tokens", "none")
SCOPES = ("batch", "trajectory")

# Replaces ∞ in gradients, where 0 · ∞ would be NaN for a token of weight 0. It exceeds any finite
# log-ratio, and their product is finite.
_LARGE = 1e19


class Verdict(IntEnum):
    """What became of a turn: the judge's label, or a failure that the environment reported."""

    SKIP = 0
    WEAK = 1
    STRONG = 2
    DET_FAIL = 3


# --- Divergences: [..., V] -> [...] -----------------------------------------------------------


def reverse_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """KL(student ‖ teacher) = Σ_v p_S(v) [log p_S(v) − log p_T(v)], the divergence of OPD.

    Mode seeking: it penalizes tokens that the teacher would not say.

    Args:
      student_logits: float [..., V], unnormalized.
      teacher_logits: float [..., V]; gets no gradient.

    Returns:
      float32 [...], nats, ≥ 0 up to rounding. Differentiable in the student's logits.

    Raises:
      ValueError: the shapes differ.
    """
    return jsd(student_logits, teacher_logits, beta=1.0)


def forward_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """KL(teacher ‖ student) = Σ_v p_T(v) [log p_T(v) − log p_S(v)]: mass covering.

    Shapes, dtypes and errors as in `reverse_kl`.
    """
    return jsd(student_logits, teacher_logits, beta=0.0)


def jsd(student_logits: jax.Array, teacher_logits: jax.Array, *, beta: float) -> jax.Array:
    """Generalized Jensen-Shannon divergence of GKD, between the two KL divergences.

    With the mixture m = β p_T + (1−β) p_S:

        jsd_β = β KL(p_T ‖ m) + (1−β) KL(p_S ‖ m)

    As β → 0 this tends to β · KL(teacher ‖ student), and as β → 1 to (1−β) · KL(student ‖ teacher).
    Both vanish, so the ends are defined as the divergences themselves, as in GKD's code: β = 0 is
    exactly the forward KL and β = 1 exactly the reverse KL.

    Args:
      student_logits: float [..., V], unnormalized.
      teacher_logits: float [..., V]; gets no gradient.
      beta: 0..1, the teacher's share in the mixture. Some libraries mean the student's.

    Returns:
      float32 [...], nats.

    Raises:
      ValueError: the shapes differ, or `beta` is outside 0..1.

    Source: Agarwal et al., arXiv 2306.13649, section 3.1 and equation 1.
    """
    _check_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    _check_beta(beta)
    log_s = jax.nn.log_softmax(student_logits.astype(jnp.float32))
    log_t = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits.astype(jnp.float32)))
    return _divergence(log_s, log_t, beta, None)


def _divergence(log_s: jax.Array, log_t: jax.Array, beta: float, axis: str | None) -> jax.Array:
    """The divergence of normalized log-probabilities over the last axis; see `_sum` for `axis`."""
    if beta == 1.0:
        return _kl(log_s, log_t, axis)
    if beta == 0.0:
        return _kl(log_t, log_s, axis)
    # A token banned by both has log m = −inf, where the gradient of logaddexp is NaN. One finite
    # argument prevents that and changes nothing: `_kl` drops the token, whatever its log m.
    possible = (log_s > -jnp.inf) | (log_t > -jnp.inf)
    log_s_finite = jnp.where(possible, log_s, 0.0)
    log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s_finite + jnp.log1p(-beta))
    return beta * _kl(log_t, log_m, axis) + (1 - beta) * _kl(log_s, log_m, axis)


def _kl(log_p: jax.Array, log_q: jax.Array, axis: str | None) -> jax.Array:
    # A banned token (logit −inf) has p = 0 and contributes nothing, where 0 · (−inf) would be NaN.
    # The inner `where` keeps that NaN out of the gradient too.
    possible = log_p > -jnp.inf
    log_ratio = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    bounded = jnp.minimum(log_ratio, _LARGE)
    divergence = _sum(jnp.where(possible, jnp.exp(log_p) * bounded, 0.0), axis)
    # A token that only q bans makes the divergence infinite. This summand has no gradient.
    infinite = jax.lax.stop_gradient(jnp.where(log_ratio == jnp.inf, log_ratio, 0.0))
    return divergence + _sum(infinite, axis)


def _sum(x: jax.Array, axis: str | None) -> jax.Array:
    """Sum over the vocabulary, x's last axis. A mapped `axis` means that each device has a part."""
    total = jnp.sum(x, axis=-1)
    return total if axis is None else jax.lax.psum(total, axis)


def _log_softmax(logits: jax.Array, axis: str | None) -> jax.Array:
    if axis is None:
        return jax.nn.log_softmax(logits)
    shifted = logits - _max(logits, axis)[..., None]
    return shifted - jnp.log(_sum(jnp.exp(shifted), axis))[..., None]


def _max(x: jax.Array, axis: str | None) -> jax.Array:
    """Maximum over the vocabulary, without gradient; see `_sum`."""
    largest = jnp.max(jax.lax.stop_gradient(x), axis=-1)
    return largest if axis is None else jax.lax.pmax(largest, axis)


def sampled_reverse_kl(student_logprob: jax.Array, teacher_logprob: jax.Array) -> jax.Array:
    """The one-sample estimate of the reverse KL: its value, with the policy gradient.

    For a token a sampled from the student, log p_S(a) − log p_T(a) is an unbiased estimate of the
    KL at that position. But the expectation of its own gradient is zero. The gradient of the KL is
    E[(log p_S(a) − log p_T(a)) ∇ log p_S(a)], and this function's gradient is one sample of it. It
    ignores the effect of a token on later positions, as the full divergence does.

    Args:
      student_logprob: float [...], log-probability of the sampled token under the student.
      teacher_logprob: float [...], under the teacher; gets no gradient.

    Returns:
      float32 [...], nats; single values may be negative.

    Raises:
      ValueError: the shapes differ.

    Source: the per-token estimator of on-policy distillation with one teacher log-probability, a
      baseline here; the paper does not state its estimator.
    """
    _check_same_shape("student_logprob", student_logprob, "teacher_logprob", teacher_logprob)
    student_logprob = student_logprob.astype(jnp.float32)
    gap = jax.lax.stop_gradient(student_logprob - teacher_logprob.astype(jnp.float32))
    surrogate = jnp.clip(gap, -_LARGE, _LARGE) * student_logprob
    # In this order the surrogate cancels to an exact 0. Adding it to the gap first would round.
    return gap + (surrogate - jax.lax.stop_gradient(surrogate))


# --- The fused form: never a [N, V] array -------------------------------------------------------


class TokenScores(NamedTuple):
    """Figures of each token from one pass over both models, float32.

    `fused_scores` returns them as [N], `objective.score` as [B, R].

    Attributes:
      divergence: nats; differentiable in the student.
      teacher_top1_prob: max_v p_T(v) at the confidence temperature, in (0, 1].
      student_logprob: log p_S of the target; differentiable in the student.
      teacher_logprob: log p_T of the target.
      student_entropy: nats.
      teacher_entropy: nats.
    """

    divergence: jax.Array
    teacher_top1_prob: jax.Array
    student_logprob: jax.Array
    teacher_logprob: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array


def fused_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    *,
    kind: str,
    chunk_size: int,
    beta: float | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Divergence and the teacher's top-1 probability from hidden states, without any `[N, V]`.

    A checkpointed scan applies the two heads to `chunk_size` positions at a time, and the backward
    pass recomputes a chunk's logits. So memory grows with `chunk_size · V` and not with `N · V`.

    Args:
      student_hidden: float [N, D].
      student_head: float [D, V].
      teacher_hidden: float [N, D'] of the teacher's own width.
      teacher_head: float [D', V].
      kind: "reverse_kl", "forward_kl" or "jsd".
      chunk_size: positions a chunk, ≥ 1; N need not be a multiple of it. On a mesh with explicit
        axes that split the positions, it is a multiple of the number of parts.
      beta: the teacher's share for kind "jsd" (see `jsd`).
      axis_name: under `jax.shard_map`, the mesh axis that splits V: each device has its columns of
        both heads. None where arrays are global; then any sharding of them is fine.

    Returns:
      (divergence [N] in nats, teacher_top1_prob [N]), float32. Gradients flow to `student_hidden`
      and `student_head` only.

    Raises:
      ValueError: positions, widths or vocabularies that do not match, an unknown kind, or a
        `chunk_size` below 1; or under `shard_map` the heads differ along a mesh axis along which
        the hidden states do not, and `axis_name` is None.
    """
    scores = fused_scores(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        None,
        kind=kind,
        beta=beta,
        chunk_size=chunk_size,
        confidence_temperature=1.0,
        axis_name=axis_name,
    )
    return scores.divergence, scores.teacher_top1_prob


def fused_scores(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array | None,
    *,
    kind: str,
    chunk_size: int,
    confidence_temperature: float,
    beta: float | None = None,
    axis_name: str | None = None,
    by_teacher: jax.Array | None = None,
    teacher_kind: str | None = None,
) -> TokenScores:
    """`fused_divergence` with everything else that the same logits tell.

    XLA drops what the caller does not use.

    Args:
      student_hidden, student_head, teacher_hidden, teacher_head: as in `fused_divergence`.
      targets: int [N], the sampled tokens; None leaves out their log-probabilities.
      kind, chunk_size, beta, axis_name: as in `fused_divergence`. The kind may also be
        "sampled_reverse_kl", the estimate from the targets.
      confidence_temperature: temperature of the teacher's softmax for `teacher_top1_prob` only;
        0 makes it 1 everywhere (the paper's sensitivity table names such a setting).
      by_teacher: bool [N], the tokens that the teacher wrote; their divergence is of
        `teacher_kind`. None: there are none.
      teacher_kind: "reverse_kl", "forward_kl" or "jsd", with the same `beta`.

    Raises:
      ValueError: as `fused_divergence`.
    """
    score = _chunk_scorer(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        targets,
        kind=kind,
        beta=beta,
        confidence_temperature=confidence_temperature,
        axis=axis_name,
        teacher_kind=teacher_kind,
    )
    frozen_hidden, frozen_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    # Keep the head in float32 outside the scan, so that its gradient adds up in float32.
    master_head = student_head.astype(jnp.float32)
    return _scan_chunks(
        lambda s, t, *of_token: score(s, master_head.astype(s.dtype), t, frozen_head, *of_token),
        (student_hidden, frozen_hidden, targets, by_teacher),
        chunk_size=chunk_size,
    )


def fused_loss(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    targets: jax.Array | None,
    weight: jax.Array,
    *,
    kind: str,
    chunk_size: int,
    confidence_temperature: float,
    beta: float | None = None,
    by_teacher: jax.Array | None = None,
    teacher_kind: str | None = None,
) -> tuple[jax.Array, TokenScores]:
    """Σ weight · divergence with its gradient from one sweep of the heads, and the scores.

    `fused_scores` learns a token's weight only when its backward pass comes to it, after all
    scores, and makes all logits again: six products with a head. Here weights are given. So a
    chunk's gradient is formed while its logits are there: four products. This needs weights that do
    not depend on the student's scores; those that depend on the teacher's come from
    `fused_teacher_scores`.

    Args:
      student_hidden, student_head, teacher_hidden, teacher_head, targets: as in `fused_scores`.
      weight: float [N]; gets no gradient. A token of weight 0 adds exactly 0 (`weighted_sum`).
      kind, chunk_size, confidence_temperature, beta: as in `fused_scores`. The kind may also be
        "cross_entropy", without a teacher: −log p of the targets.
      by_teacher, teacher_kind: as in `fused_scores`.

    Returns:
      (float32 [], differentiable in the student; the scores [N] of `fused_scores` or
      `fused_cross_entropy`, which have no gradient here).

    Raises:
      ValueError: as `fused_scores`, or `weight` is not [N].
    """
    if kind == "cross_entropy":
        _check_heads("student_hidden", student_hidden, "student_head", student_head)
        score = _score_targets
    else:
        score = _chunk_scorer(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            targets,
            kind=kind,
            beta=beta,
            confidence_temperature=confidence_temperature,
            axis=None,
            teacher_kind=teacher_kind,
        )
    if weight.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"`weight` {weight.shape}: expected one for each of the {student_hidden.shape[0]} "
            "positions of `student_hidden`"
        )
    rest = jax.lax.stop_gradient((teacher_hidden, teacher_head, targets, by_teacher, weight))
    return _one_sweep(score, chunk_size, student_hidden, student_head, *rest)


class TeacherScores(NamedTuple):
    """Those of `TokenScores` that the teacher gives alone, float32."""

    teacher_top1_prob: jax.Array
    teacher_entropy: jax.Array
    teacher_logprob: Any  # None without targets


def fused_teacher_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array | None,
    *,
    chunk_size: int,
    confidence_temperature: float,
) -> TeacherScores:
    """The teacher's scores of each position, of which weights may be made; no gradient.

    Arguments as in `fused_scores`; `targets` None: `teacher_logprob` is not needed.
    """
    _check_heads("hidden", hidden, "head", head)
    hidden, head = jax.lax.stop_gradient((hidden, head))

    def chunk(hidden: jax.Array, target: jax.Array | None) -> TeacherScores:
        logits = _logits(hidden, head)
        logprobs = _log_softmax(logits, None)
        return TeacherScores(
            _top1_prob(logits, confidence_temperature, None),
            _entropy(logprobs, None),
            _pick(logprobs, target, None),
        )

    return _scan_chunks(chunk, (hidden, targets), chunk_size=chunk_size)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one_sweep(
    score: Callable[..., TokenScores],
    chunk_size: int,
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    targets: jax.Array | None,
    by_teacher: jax.Array | None,
    weight: jax.Array,
) -> tuple[jax.Array, TokenScores]:
    """`fused_loss`; `score` is applied to a chunk of positions and whole heads."""
    head = student_head.astype(student_hidden.dtype)
    scores = _scan_chunks(
        lambda s, t, *of_token: score(s, head, t, teacher_head, *of_token),
        (student_hidden, teacher_hidden, targets, by_teacher),
        chunk_size=chunk_size,
    )
    return _weighted_sum(scores.divergence, weight), scores


def _sweep_forward(score, chunk_size, student_hidden, student_head, *rest):
    """The same, and the gradient of the loss: [N, D], and [D, V] if the head is trained."""
    teacher_hidden, teacher_head, targets, by_teacher, weight = (
        jax.tree.map(lambda x: x.value, x) for x in rest
    )
    hidden, head = student_hidden.value, student_head.value
    trains_head = student_head.perturbed  # not with adapters: then its product is left out

    def weighted(h, head, t, target, by_teacher, w):
        scores = score(h, head.astype(h.dtype), t, teacher_head, target, by_teacher)
        return _weighted_sum(scores.divergence, w), scores

    def body(total, chunk):
        argnums = (0, 1) if trains_head else (0,)
        (d_hidden, *d_head), scores = jax.grad(weighted, argnums=argnums, has_aux=True)(
            chunk[0], master_head, *chunk[1:]
        )
        return jax.tree.map(jnp.add, total, d_head), (scores, d_hidden)

    # In float32, so that the gradient adds up in float32.
    master_head = head.astype(jnp.float32)
    zero = [jnp.zeros_like(master_head)] if trains_head else []
    arrays = hidden, teacher_hidden, targets, by_teacher, weight
    d_head, out = jax.lax.scan(body, zero, _chunks(arrays, chunk_size))
    scores, d_hidden = _joined(out, hidden.shape[0])
    loss = _weighted_sum(scores.divergence, weight)
    return (loss, scores), (d_hidden, [x.astype(head.dtype) for x in d_head])


def _sweep_backward(score, chunk_size, gradient, cotangent):
    del score, chunk_size
    factor, _ = cotangent  # of the loss; the scores have no gradient
    if isinstance(factor, SymbolicZero):
        return (None,) * 7
    d_hidden, d_head = jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradient)
    return d_hidden, *(d_head or [None]), None, None, None, None, None


_one_sweep.defvjp(_sweep_forward, _sweep_backward, symbolic_zeros=True)


def _chunk_scorer(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    targets: jax.Array | None,
    *,
    kind: str,
    beta: float | None,
    confidence_temperature: float,
    axis: str | None,
    teacher_kind: str | None,
) -> Callable[..., TokenScores]:
    """`_score_chunk` with its settings, once the arrays are known to fit each other."""
    share = _teacher_share(kind, beta)
    if teacher_kind == "sampled_reverse_kl":
        raise ValueError(
            "`teacher_kind` is 'sampled_reverse_kl', an estimate from tokens that the student drew"
        )
    if teacher_hidden is None or teacher_head is None:
        raise ValueError(f"`kind` is {kind!r}, which needs `teacher_hidden` and `teacher_head`")
    _check_heads("student_hidden", student_hidden, "student_head", student_head)
    _check_heads("teacher_hidden", teacher_hidden, "teacher_head", teacher_head)
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"`teacher_hidden` has {teacher_hidden.shape[0]} positions, expected the "
            f"{student_hidden.shape[0]} of `student_hidden`: both models score the same tokens"
        )
    if student_head.shape[1] != teacher_head.shape[1]:
        raise ValueError(
            f"`teacher_head` has {teacher_head.shape[1]} tokens, expected the "
            f"{student_head.shape[1]} of `student_head`: slice padded vocabularies to equal size"
        )
    if kind == "sampled_reverse_kl" and targets is None:
        raise ValueError("`kind` is 'sampled_reverse_kl', which needs the sampled tokens")
    if axis is None:
        _check_whole_vocabulary(student_hidden, student_head)
    return partial(
        _score_chunk,
        sampled=kind == "sampled_reverse_kl",
        beta=share,
        confidence_temperature=confidence_temperature,
        axis=axis,
        teacher_beta=_teacher_share(teacher_kind, beta) if teacher_kind else None,
    )


def _teacher_share(kind: str, beta: float | None) -> float:
    """The teacher's share β in `jsd`, of which both directions of the KL are the ends."""
    if kind not in KINDS:
        raise ValueError(f"`kind`: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "jsd":
        return 0.0 if kind == "forward_kl" else 1.0
    if beta is None:
        raise ValueError("`kind` is 'jsd', which needs `beta` in 0..1; got None")
    _check_beta(beta)
    return float(beta)


def _score_chunk(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array | None,
    by_teacher: jax.Array | None,
    *,
    sampled: bool,
    beta: float,
    confidence_temperature: float,
    axis: str | None,
    teacher_beta: float | None,
) -> TokenScores:
    logits_t = _logits(teacher_hidden, teacher_head)
    log_s = _log_softmax(_logits(student_hidden, student_head), axis)
    log_t = _log_softmax(logits_t, axis)
    log_s_frozen = jax.lax.stop_gradient(log_s)
    logprobs = _pick(log_s, targets, axis), _pick(log_t, targets, axis)
    divergence = sampled_reverse_kl(*logprobs) if sampled else _divergence(log_s, log_t, beta, axis)
    if by_teacher is not None and teacher_beta is not None:
        on_teachers = _divergence(log_s, log_t, teacher_beta, axis)
        divergence = jnp.where(by_teacher, on_teachers, divergence)
    return TokenScores(
        divergence,
        _top1_prob(logits_t, confidence_temperature, axis),
        *logprobs,
        student_entropy=_entropy(log_s_frozen, axis),
        teacher_entropy=_entropy(log_t, axis),
    )


class Choices(NamedTuple):
    """What two models would say at each position, for people who look at a run.

    Attributes:
      agrees: bool [N], both find the same token most likely.
      tokens: int32 [N, top], the teacher's most likely tokens, best first.
      teacher_prob: float32 [N, top], their probabilities.
      student_prob: float32 [N, top], the student's of the same tokens.
    """

    agrees: jax.Array
    tokens: jax.Array
    teacher_prob: jax.Array
    student_prob: jax.Array


def fused_choices(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    *,
    top: int,
    chunk_size: int,
) -> Choices:
    """The teacher's `top` ≥ 0 most likely tokens and what the student thinks of them; chunked.

    The arrays are those of `fused_divergence`. No gradient.
    """
    student_head = student_head.astype(student_hidden.dtype)

    def chunk(student: jax.Array, teacher: jax.Array) -> Choices:
        logits_s, logits_t = _logits(student, student_head), _logits(teacher, teacher_head)
        agrees = jnp.argmax(logits_s, axis=-1) == jnp.argmax(logits_t, axis=-1)
        prob_t, tokens = jax.lax.top_k(jax.nn.softmax(logits_t), top)
        prob_s = jnp.take_along_axis(jax.nn.softmax(logits_s), tokens, axis=-1)
        return Choices(agrees, tokens, prob_t, prob_s)

    return _scan_chunks(chunk, (student_hidden, teacher_hidden), chunk_size=chunk_size)


def fused_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk_size: int
) -> TokenScores:
    """−log p(target), the objective of SFT, as the divergence; chunked like `fused_divergence`.

    Returns:
      float32 [N] each. Only the divergence and the target's log-probability have gradients. What
      needs a teacher is 0.
    """
    _check_heads("hidden", hidden, "head", head)
    master_head = head.astype(jnp.float32)  # see `fused_scores`
    return _scan_chunks(
        lambda h, target: _score_targets(h, master_head.astype(h.dtype), None, None, target, None),
        (hidden, targets),
        chunk_size=chunk_size,
    )


def _score_targets(
    hidden: jax.Array, head: jax.Array, _: None, __: None, targets: jax.Array, ___: None
) -> TokenScores:
    """As `_score_chunk`, without a teacher."""
    log_p = _log_softmax(_logits(hidden, head), None)
    nll, entropy = -_pick(log_p, targets, None), _entropy(jax.lax.stop_gradient(log_p), None)
    zero = jnp.zeros_like(nll)
    return TokenScores(nll, zero, -nll, zero, entropy, zero)


def _scan_chunks(function, arrays, *, chunk_size: int):
    """Applies `function` to chunks of the leading axis under scan and checkpoint."""
    body = jax.checkpoint(lambda _, chunk: (None, function(*chunk)))
    _, out = jax.lax.scan(body, None, _chunks(arrays, chunk_size))
    return _joined(out, arrays[0].shape[0])


def _chunks(arrays, chunk_size: int):
    """[N, ...] as [chunks, chunk_size, ...], padded with zeros.

    A chunk takes every count-th position, not a run of them. So if positions are sharded, each
    device has its share of every chunk.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size`: expected at least 1, got {chunk_size}")
    size = arrays[0].shape[0]
    chunk_size = min(chunk_size, max(size, 1))
    count = -(-size // chunk_size)

    def chunks(x: jax.Array) -> jax.Array:
        padding = [(0, count * chunk_size - size)] + [(0, 0)] * (x.ndim - 1)
        apart = jnp.pad(x, padding).reshape(chunk_size, count, *x.shape[1:])
        return jnp.moveaxis(apart, 1, 0)

    return jax.tree.map(chunks, arrays)


def _joined(chunks, size: int):
    """The inverse of `_chunks`."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:size],
        chunks,
    )


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def _pick(logprobs: jax.Array, targets: jax.Array | None, axis: str | None) -> Any:
    if targets is None:
        return None
    if axis is None:
        return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]
    # Only one device has the target's column.
    column = targets - jax.lax.axis_index(axis) * logprobs.shape[-1]
    mine = column[:, None] == jnp.arange(logprobs.shape[-1])
    return _sum(jnp.where(mine, logprobs, 0.0), axis)


def _entropy(logprobs: jax.Array, axis: str | None) -> jax.Array:
    return -_sum(jnp.where(logprobs > -jnp.inf, jnp.exp(logprobs) * logprobs, 0.0), axis)


def _top1_prob(logits: jax.Array, temperature: float, axis: str | None) -> jax.Array:
    if temperature == 0.0:
        return jnp.ones(logits.shape[:-1], jnp.float32)
    scaled = logits / temperature
    if axis is None:
        return jnp.exp(jnp.max(scaled, axis=-1) - jax.nn.logsumexp(scaled, axis=-1))
    return 1 / _sum(jnp.exp(scaled - _max(scaled, axis)[..., None]), axis)


# --- Weights ------------------------------------------------------------------------------------


def intervention_weight(
    verdict: jax.Array,
    *,
    weak_weight: float = 0.5,
    skip_weight: float = 0.0,
    fail_weight: float = 1.0,
) -> jax.Array:
    """i = `skip_weight` for SKIP, α for WEAK, 1 for STRONG, `fail_weight` for DET_FAIL.

    Args:
      verdict: int [...], codes of `Verdict`. A compiled program cannot raise, so any other code
        weighs 1, the conservative reading.
      weak_weight: α, 0..1.
      skip_weight: 0..1; the paper's is 0.
      fail_weight: 0..1; the paper's is 1. With 0 nothing is learnt from the teacher's advice where
        the environment rejected the student's action.

    Returns:
      float32 [...].

    Source: arXiv 2606.19659, turn intervention. A judge's unparsable answer comes as STRONG. The
      last two arguments are ours.
    """
    weight = jnp.ones(jnp.shape(verdict), jnp.float32)
    for code, value in (
        (Verdict.SKIP, skip_weight),
        (Verdict.WEAK, weak_weight),
        (Verdict.DET_FAIL, fail_weight),
    ):
        weight = jnp.where(verdict == code, value, weight)
    return weight.astype(jnp.float32)


def turn_confidence(teacher_top1_prob: jax.Array, turn_id: jax.Array, num_turns: int) -> jax.Array:
    """c = mean over a turn's tokens of the teacher's top-1 probability.

    Args:
      teacher_top1_prob: float [B, T]; may hold anything where `turn_id` is `NO_TURN`.
      turn_id: int [B, T].
      num_turns: K, above every turn id; turns k ≥ K would be ignored.

    Returns:
      float32 [B, K], in (0, 1]; 0 for a turn without tokens. No gradient.

    Raises:
      ValueError: the shapes differ.

    Source: arXiv 2606.19659, teacher confidence.
    """
    _check_same_shape("teacher_top1_prob", teacher_top1_prob, "turn_id", turn_id)
    return turn_mean(teacher_top1_prob, turn_id, num_turns)


def turn_mean(x: jax.Array, turn_id: jax.Array, num_turns: int) -> jax.Array:
    """The mean over each turn's tokens: [B, T] to float32 [B, K], 0 for a turn without tokens.

    Arguments as in `turn_confidence`. No gradient.
    """
    in_turn = turn_id[..., None] == jnp.arange(num_turns)
    x = jnp.where(turn_id == NO_TURN, 0.0, jax.lax.stop_gradient(x))
    total = jnp.sum(jnp.where(in_turn, x[..., None].astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(in_turn, axis=1), 1)


def entropy_factor(teacher_entropy: jax.Array, *, bonus: float, threshold: float) -> jax.Array:
    """e = 1 + bonus · 1[H_T > threshold]: weighs tokens at which the teacher is uncertain.

    A bonus of 0 is plain OPD.

    Args:
      teacher_entropy: float [...], nats.
      bonus: > −1; the paper's baseline has 1.
      threshold: nats; the paper's baseline has 0.8.

    Returns:
      float32 [...]. No gradient.

    Source: Entropy-Aware OPD as in arXiv 2606.19659, baselines. There H_T is the entropy over the
      teacher's top-K tokens; here it is that of the whole distribution.
    """
    uncertain = jax.lax.stop_gradient(teacher_entropy) > threshold
    return 1.0 + bonus * uncertain.astype(jnp.float32)


class WeightTotals(NamedTuple):
    """What the scale z depends on; float32, all of one shape.

    The totals of a batch are the sums over its micro-batches and devices.

    Attributes:
      weight: Σ s over the student's tokens.
      tokens: N, the number of student tokens, those of skipped turns included.
      active: the number of student tokens with s > 0.
    """

    weight: jax.Array
    tokens: jax.Array
    active: jax.Array


def raw_weights(
    turn_id: jax.Array,
    verdict: jax.Array | None,
    confidence: jax.Array | None,
    *,
    weak_weight: float,
    token_factor: jax.Array | None,
    scope: str,
    skip_weight: float = 0.0,
    fail_weight: float = 1.0,
) -> tuple[jax.Array, WeightTotals]:
    """s = i · c of each token's turn, times the token's own factor, and the totals of s.

    Arguments as in `sage_weights`. The totals are over the batch, [], or over each row, [B].

    Returns:
      (s float32 [B, T], 0 where `turn_id` is `NO_TURN`; its totals). No gradient.

    Raises:
      ValueError: shapes that do not match, a turn id of K or more, or an unknown `scope`.
    """
    if verdict is not None and confidence is not None:
        _check_same_shape("verdict", verdict, "confidence", confidence)
    turn_weight = None
    if verdict is not None:
        turn_weight = intervention_weight(
            verdict, weak_weight=weak_weight, skip_weight=skip_weight, fail_weight=fail_weight
        )
    if confidence is not None:
        turn_weight = confidence if turn_weight is None else turn_weight * confidence
    s = jnp.ones(turn_id.shape, jnp.float32)
    if turn_weight is not None:
        s = of_each_token(turn_weight, turn_id)
    if token_factor is not None:
        _check_same_shape("token_factor", token_factor, "turn_id", turn_id)
        s *= jax.lax.stop_gradient(token_factor)
    s = jnp.where(turn_id == NO_TURN, 0.0, s)
    return s, weight_totals(s, turn_id, scope=scope)


def weight_totals(s: jax.Array, turn_id: jax.Array, *, scope: str) -> WeightTotals:
    """The totals of raw weights s [B, T], over the batch, [], or over each row, [B].

    Raises:
      ValueError: shapes that do not match, or an unknown `scope`.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope`: expected one of {', '.join(SCOPES)}, got {scope!r}")
    _check_same_shape("s", s, "turn_id", turn_id)
    axis = None if scope == "batch" else 1
    return WeightTotals(
        weight=jnp.sum(s, axis=axis),
        tokens=jnp.sum(turn_id != NO_TURN, axis=axis).astype(jnp.float32),
        active=jnp.sum(s > 0, axis=axis).astype(jnp.float32),
    )


def of_each_token(turn_weight: jax.Array, turn_id: jax.Array) -> jax.Array:
    """Weights of turns as weights of tokens: [B, K] to float32 [B, T], without gradient.

    Args:
      turn_weight: float [B, K].
      turn_id: int [B, T], below K; where it is `NO_TURN` the result means nothing.

    Raises:
      ValueError: another shape, or outside `jit` a turn id of K or more.
    """
    if turn_weight.ndim != 2 or turn_weight.shape[0] != turn_id.shape[0]:
        raise ValueError(
            f"weights of turns: expected [B, K] with B = {turn_id.shape[0]} of `turn_id` "
            f"{turn_id.shape}, got {turn_weight.shape}"
        )
    turns = turn_weight.shape[1]
    if not isinstance(turn_id, jax.core.Tracer):
        # On the host: in a `jit` that only captures the array, `jnp` would trace the comparison.
        most = jax.device_get(turn_id).max(initial=NO_TURN)
        if most >= turns:
            raise ValueError(
                f"`turn_id`: expected turns below K = {turns} of the weights of turns, got {most}"
            )
    turn_weight = jax.lax.stop_gradient(turn_weight).astype(jnp.float32)
    at = jnp.maximum(turn_id, 0)
    return jnp.take_along_axis(turn_weight, at, axis=1, mode="fill", fill_value=0)


def scale(totals: WeightTotals, *, normalize: str, eps: float, max_z: float | None) -> jax.Array:
    """z = N / max(Σ s, ε), which brings the mean token weight to one; 1 if no token has a weight.

    Args:
      totals: those of the whole batch, or of each trajectory.
      normalize: "all_tokens" (the paper's), "active_tokens" (N counts active tokens only; the
        paper's ablation) or "none" (z = 1).
      eps: ε, the least sum to divide by.
      max_z: upper bound on z, or None; ours.

    Returns:
      float32 in the shape of the totals.

    Raises:
      ValueError: an unknown `normalize`.

    Source: arXiv 2606.19659, normalized loss; ε is not stated there.
    """
    if normalize not in NORMALIZERS:
        raise ValueError(
            f"`normalize`: expected one of {', '.join(NORMALIZERS)}, got {normalize!r}"
        )
    if normalize == "none":
        return jnp.ones_like(totals.weight, jnp.float32)
    count = totals.tokens if normalize == "all_tokens" else totals.active
    some = totals.weight > 0
    z = jnp.where(some, count, 1.0) / jnp.where(some, jnp.maximum(totals.weight, eps), 1.0)
    return z if max_z is None else jnp.minimum(z, max_z)


def sage_weights(
    turn_id: jax.Array,
    verdict: jax.Array | None,
    confidence: jax.Array | None,
    *,
    weak_weight: float = 0.5,
    normalize: str = "all_tokens",
    scope: str = "batch",
    eps: float = 1e-8,
    max_z: float | None = None,
    token_factor: jax.Array | None = None,
    skip_weight: float = 0.0,
    fail_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The weight of every token, z · i · c: `raw_weights` times `scale` of their totals.

    Args:
      turn_id: int [B, T], below K. A compiled program cannot raise; there turns of K and more have
        weight 0.
      verdict: int [B, K], codes of `Verdict`; None: i = 1, no intervention.
      confidence: float [B, K], from `turn_confidence`; None: c = 1.
      weak_weight: α, the weight of WEAK.
      normalize: see `scale`.
      scope: "batch": one z for the batch; "trajectory": one for each row.
      eps: see `scale`.
      max_z: see `scale`.
      token_factor: float [B, T], multiplies s; None for 1. May hold anything where `turn_id` is
        `NO_TURN`. The mean weight stays one.
      skip_weight: the weight of SKIP.
      fail_weight: the weight of DET_FAIL.

    Returns:
      (weight float32 [B, T], 0 where `turn_id` is `NO_TURN`; z float32, [] or [B] by scope). No
      gradient. With "all_tokens" the mean weight over student tokens is 1, unless every turn was
      skipped: then all weights are 0.

    Raises:
      ValueError: shapes that do not match, a turn id of K or more, or an unknown `normalize` or
        `scope`.

    Source: arXiv 2606.19659: intervention, confidence and normalized loss.
    """
    s, totals = raw_weights(
        turn_id,
        verdict,
        confidence,
        weak_weight=weak_weight,
        token_factor=token_factor,
        scope=scope,
        skip_weight=skip_weight,
        fail_weight=fail_weight,
    )
    z = scale(totals, normalize=normalize, eps=eps, max_z=max_z)
    return s * (z if scope == "batch" else z[:, None]), z


def weighted_sum(divergence: jax.Array, weight: jax.Array, turn_id: jax.Array) -> jax.Array:
    """Σ weight · divergence over student tokens, float32 []; arguments as in `weighted_loss`.

    A token of weight 0 adds exactly 0 to the sum and to the gradient, even if its divergence is
    infinite (0 · ∞ would be NaN). It is infinite where the teacher bans what the student may say.
    """
    _check_same_shape("divergence", divergence, "weight", weight)
    _check_same_shape("divergence", divergence, "turn_id", turn_id)
    return _weighted_sum(divergence, jnp.where(turn_id == NO_TURN, 0.0, weight))


def _weighted_sum(divergence: jax.Array, weight: jax.Array) -> jax.Array:
    weight = jax.lax.stop_gradient(weight)
    return jnp.sum(weight * jnp.where(weight != 0, divergence, 0.0))


def weighted_loss(divergence: jax.Array, weight: jax.Array, turn_id: jax.Array) -> jax.Array:
    """Σ weight · divergence / N with N the number of student tokens, skipped turns included.

    The denominator does not depend on the weights: halving them halves the loss. A batch without
    student tokens has loss 0.

    Where `turn_id` is `NO_TURN` or the weight is 0, the loss and the gradient to `divergence` are
    safe from NaN and infinity. But the gradient through a logit that is NaN is NaN, even there. If
    logits may be NaN, gather the student's positions first, or replace the other logits.

    Args:
      divergence: float [B, T], nats; may hold anything where `turn_id` is `NO_TURN` or the weight
        is 0.
      weight: float [B, T]; gets no gradient.
      turn_id: int [B, T].

    Returns:
      float32 [], nats a token.

    Raises:
      ValueError: the shapes differ.
    """
    num_tokens = jnp.sum(turn_id != NO_TURN)
    return weighted_sum(divergence, weight, turn_id) / jnp.maximum(num_tokens, 1)


# --- Checks at trace time -----------------------------------------------------------------------


def _check_same_shape(name: str, x: jax.Array, other_name: str, other: jax.Array) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"`{name}` and `{other_name}`: expected equal shapes, got {x.shape} and {other.shape}"
        )


def _check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta`: expected 0..1, the teacher's share, got {beta}")


def _check_heads(name: str, hidden: jax.Array, head_name: str, head: jax.Array) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(
            f"`{name}` {hidden.shape} and `{head_name}` {head.shape}: expected [N, D] and [D, V] "
            "with one D"
        )


def _check_whole_vocabulary(hidden: jax.Array, head: jax.Array) -> None:
    """Raises if each device has only some columns of the head, as under `shard_map`."""
    split = _varies_along(head) - _varies_along(hidden)
    if split:
        raise ValueError(
            f"`student_head` varies along the mesh axis {', '.join(sorted(split))} and "
            "`student_hidden` does not, so each device has a part of the vocabulary: give that "
            "axis as `axis_name`"
        )


def _varies_along(x: jax.Array) -> frozenset[str]:
    """Mesh axes along which devices hold different x, inside `shard_map` (with `check_vma`)."""
    kind: Any = jax.typeof(x)
    return kind.manual_axis_type.varying
