"""Methods as raw weights: what each student token's divergence is multiplied by, before the scale.

A method is a pure function `(turn_id, *, …) -> s [B, R]`. Its keyword arguments say what it reads,
and each is one of

    labels of turns, [B, K]     `verdict` (codes of `losses.Verdict`), `reliability`, and `repeats`
                                (1 if the action is that of the turn before)
    of the tokens, [B, R]       `sampled_logprobs`, `teacher_logprob`, `teacher_top1_prob`,
                                `teacher_entropy`; and, now, of the student that is trained,
                                `student_logprob`, `student_entropy`, `divergence`
    a size                      `num_turns`, K
    a setting                   any other, a field of the config's section `weight`

`turn_id` [B, R] is the turn k of each token, and `losses.NO_TURN` where a row has no token. There
the arrays hold 0, and what a method returns does not matter. Weights are at least 0 and get no
gradient. The mean weight of a batch is brought to one by `losses.scale`, where
`objective.normalize` says so. Each method has a neutral setting, with which every weight is 1, as
in plain OPD.

What reads one of the last three token arrays depends on the student's scores. Then an update makes
the logits twice (`losses.fused_loss`).

This file imports JAX and `losses` only.
"""

import jax
import jax.numpy as jnp

from opd_jax import losses
from opd_jax.losses import NO_TURN

METHODS = {
    name: f"opd_jax.learner.weights:{name}"
    for name in (
        *("uniform", "sage", "intervention", "confidence", "reliability"),
        *("entropy_aware", "sod", "iw_opd", "return_to_go"),
    )
}

# They compare the turns of an episode, so it has to be one row.
COMPARE_TURNS = ("sod", "iw_opd", "return_to_go")


def uniform(turn_id: jax.Array) -> jax.Array:
    """s = 1: plain OPD."""
    return jnp.ones(turn_id.shape, jnp.float32)


def sage(
    turn_id: jax.Array,
    *,
    verdict: jax.Array,
    teacher_top1_prob: jax.Array,
    skip_weight: float,
    weak_weight: float,
    fail_weight: float,
) -> jax.Array:
    """s = i · c: the turn's intervention times the teacher's confidence over the turn.

    The paper has `skip_weight` 0 and `fail_weight` 1. Neutral: all three weights 1, and
    `weight.confidence_temperature` 0, with which c = 1.

    Source: arXiv 2606.19659. `skip_weight` and `fail_weight` are ours.
    """
    c = losses.turn_confidence(teacher_top1_prob, turn_id, verdict.shape[1])
    how = dict(skip_weight=skip_weight, weak_weight=weak_weight, fail_weight=fail_weight)
    return losses.of_each_token(losses.intervention_weight(verdict, **how) * c, turn_id)


def intervention(
    turn_id: jax.Array,
    *,
    verdict: jax.Array,
    skip_weight: float,
    weak_weight: float,
    fail_weight: float,
) -> jax.Array:
    """s = i: SAGE without the teacher's confidence. Neutral: all three weights 1.

    Source: arXiv 2606.19659, ablation; see `losses.intervention_weight`.
    """
    how = dict(skip_weight=skip_weight, weak_weight=weak_weight, fail_weight=fail_weight)
    return losses.of_each_token(losses.intervention_weight(verdict, **how), turn_id)


def confidence(turn_id: jax.Array, *, teacher_top1_prob: jax.Array, num_turns: int) -> jax.Array:
    """s = c: SAGE without the verdicts. Neutral: `weight.confidence_temperature` 0.

    Source: arXiv 2606.19659, ablation; see `losses.turn_confidence`.
    """
    c = losses.turn_confidence(teacher_top1_prob, turn_id, num_turns)
    return losses.of_each_token(c, turn_id)


def reliability(turn_id: jax.Array, *, reliability: jax.Array) -> jax.Array:
    """s = r, the share of the teacher's own turns at this history that are accepted.

    Where the teacher itself would be rejected or wrong, its advice has little weight. Neutral: a
    teacher that is always accepted.

    Args:
      turn_id: int [B, R].
      reliability: r, float [B, K], 0..1. NaN where nobody asked; such a turn weighs 0.

    Source: ours.
    """
    return losses.of_each_token(jnp.nan_to_num(reliability), turn_id)


def entropy_aware(
    turn_id: jax.Array,
    *,
    teacher_entropy: jax.Array,
    entropy_bonus: float,
    entropy_threshold: float,
) -> jax.Array:
    """s = 1 + bonus · 1[H_T > threshold]. Neutral: a bonus of 0.

    Source: Entropy-Aware OPD as in arXiv 2606.19659, baselines; see `losses.entropy_factor`.
    """
    del turn_id
    return losses.entropy_factor(teacher_entropy, bonus=entropy_bonus, threshold=entropy_threshold)


def sod(
    turn_id: jax.Array,
    *,
    sampled_logprobs: jax.Array,
    teacher_logprob: jax.Array,
    num_turns: int,
    most_weight: float,
    discrepancy_eps: float,
) -> jax.Array:
    """s_k = min((d_1 + ε) / (d_k + ε), most), with d_k the mean of |ℓ_S − ℓ_T| over turn k.

    Turns on which the models disagree more than on the first weigh less. The paper's product of
    ratios of one turn's d to the next one's telescopes to this. Neutral: turns of equal d.

    Source: SOD, arXiv 2605.07725; there `most` is 1 + δ, with δ = 0.2 and ε = 1e-6. Its reward is
      left out.
    """
    d = losses.turn_mean(jnp.abs(sampled_logprobs - teacher_logprob), turn_id, num_turns)
    first = jnp.min(jnp.where(turn_id == NO_TURN, num_turns, turn_id), axis=1, keepdims=True)
    d_first = jnp.take_along_axis(d, jnp.minimum(first, num_turns - 1), axis=1)
    ratio = (d_first + discrepancy_eps) / (d + discrepancy_eps)
    return losses.of_each_token(jnp.minimum(ratio, most_weight), turn_id)


def iw_opd(
    turn_id: jax.Array,
    *,
    sampled_logprobs: jax.Array,
    teacher_logprob: jax.Array,
    early_bonus: float,
) -> jax.Array:
    """s_t = 1 + γ (1 − Σ_{u<t} |A_u| / Σ_u |A_u|) with A = ℓ_T − ℓ_S; γ is `early_bonus`.

    Early tokens weigh more, by the share of a row's discrepancy that is still to come. Neutral: a
    bonus of 0.

    Source: IW-OPD, arXiv 2606.22600, γ = 0.5; there a row is one answer, here all turns of it.
    """
    gap = jnp.where(turn_id == NO_TURN, 0.0, jnp.abs(teacher_logprob - sampled_logprobs))
    before = jnp.cumsum(gap, axis=1) - gap
    total = jnp.sum(gap, axis=1, keepdims=True)
    spent = before / jnp.where(total > 0, total, 1.0)
    return 1.0 + early_bonus * (1.0 - spent)


def return_to_go(
    turn_id: jax.Array,
    *,
    sampled_logprobs: jax.Array,
    teacher_logprob: jax.Array,
    num_turns: int,
    discount: float,
) -> jax.Array:
    """s_k = 1 + Σ_{j>k} γ^{j−k} max(d_j, 0), with d_j the mean of ℓ_S − ℓ_T over turn j, nats.

    A turn after which the teacher disagrees more weighs more: early mistakes bend later
    observations. In the gradient of the divergence of whole sequences a token is multiplied by the
    log-ratios after it; here they are only a weight. Neutral: γ = 0.

    Source: ours.
    """
    d = losses.turn_mean(sampled_logprobs - teacher_logprob, turn_id, num_turns)
    k = jnp.arange(num_turns)
    ahead = k[:, None] - k[None, :]  # [j, k]: j − k
    factor = jnp.where(ahead > 0, discount ** jnp.maximum(ahead, 0).astype(jnp.float32), 0.0)
    return losses.of_each_token(1.0 + jnp.maximum(d, 0.0) @ factor, turn_id)
