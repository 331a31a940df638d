"""What is minimized: divergences of the student's tokens from the teacher, times their weights.

The objective of a micro-batch is returned as sums. They add up over any split (`train_step`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax import losses
from opd_jax.agent.conversation import Actor
from opd_jax.learner.batch import Array, Batch
from opd_jax.learner.teacher import Teacher, response_hidden
from opd_jax.learner.weighing import Weight
from opd_jax.losses import NO_TURN, TokenScores, WeightTotals
from opd_jax.model import Model, Params, head
from opd_jax.model.projections import cast
from opd_jax.runtime.fields import check_choice, check_within
from opd_jax.runtime.mesh import constrain


@dataclass(frozen=True)
class Objective:
    """What is minimized: Σ z · s · d / N. Static under `jit`.

    Attributes:
      divergence: d: "reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl" (one-sample estimate),
        or "cross_entropy" with the tokens themselves (fine-tuning without a teacher).
      beta: the teacher's share in the mixture of "jsd"; ignored by the others.
      teacher_turns: d of turns that the teacher took of the student's episodes: "reverse_kl",
        "forward_kl" or "jsd"; "": nothing is learnt from them.
      weight: s, the method's raw weight; in a config a section of its own.
      normalize: see `losses.scale`.
      scope: see `losses.sage_weights`.
      eps: see `losses.scale`.
      max_z: see `losses.scale`; 0 for no bound.
    """

    divergence: str
    beta: float
    teacher_turns: str
    weight: Weight
    normalize: str
    scope: str
    eps: float
    max_z: float

    def __post_init__(self):
        check_choice((*losses.KINDS, "cross_entropy"), divergence=self.divergence)
        check_choice(("", "reverse_kl", "forward_kl", "jsd"), teacher_turns=self.teacher_turns)
        check_choice(losses.NORMALIZERS, normalize=self.normalize)
        check_choice(losses.SCOPES, scope=self.scope)
        check_within(0, 1, beta=self.beta)
        check_within(0, max_z=self.max_z)
        check_within(1e-30, 1, eps=self.eps)
        if not self.needs_teacher and (self.weight.labels or self.weight.reads_teacher):
            raise ValueError(
                f"`divergence` = 'cross_entropy' has no teacher and no labels, which `weight.by` = "
                f"{self.weight.by!r} reads: set that to uniform"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher scores the student's tokens."""
        return self.divergence != "cross_entropy"

    def scale(self, totals: WeightTotals) -> jax.Array:
        """`losses.scale` of totals."""
        return losses.scale(
            totals, normalize=self.normalize, eps=self.eps, max_z=self.max_z or None
        )


@struct.dataclass
class Sums:
    """Sums over student tokens (or turns) of a micro-batch; float32, additive over splits.

    Attributes:
      loss: Σ s·d; with the scope "trajectory" Σ z·s·d, where z is the trajectory's own.
      totals: totals of s.
      divergence: [K], Σ d by turn index.
      tokens_by_turn: [K], number of tokens.
      weight_by_turn: [K], Σ s.
      confidence: [K], Σ c over turns.
      turns: [K], number of turns.
      student_entropy: Σ of the entropy, nats.
      teacher_entropy: the same for the teacher; 0 without one.
      logprob_error: the largest |sampled − recomputed| log-probability of a token that the student
        sampled, not a sum.
    """

    loss: jax.Array
    totals: WeightTotals
    divergence: jax.Array
    tokens_by_turn: jax.Array
    weight_by_turn: jax.Array
    confidence: jax.Array
    turns: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    logprob_error: jax.Array


def loss_and_sums(
    params: Params,
    teacher: Teacher | None,
    batch: Batch,
    *,
    student: Model,
    objective: Objective,
    dtype: jnp.dtype,
    loss_chunk: int,
) -> tuple[jax.Array, Sums]:
    """`Sums.loss` of a micro-batch, differentiable in `params`, and all its sums.

    Arguments and errors as in `score`.
    """
    body: dict[str, Any] = dict(student=student, objective=objective, dtype=dtype)
    if objective.weight.reads_student:
        # Weights are known after all scores, so the backward pass makes the logits again.
        scores = score(params, teacher, batch, loss_chunk=loss_chunk, **body)
        sums = objective_sums(scores, batch, objective=objective)
        return sums.loss, sums
    heads = _head_inputs(params, teacher, batch, **body)
    read = None
    if objective.weight.reads_teacher:
        read = losses.fused_teacher_scores(
            heads.teacher_hidden,
            heads.teacher_head,
            heads.targets if "teacher_logprob" in objective.weight.reads else None,
            chunk_size=loss_chunk,
            confidence_temperature=objective.weight.confidence_temperature,
        )
    weights = _weights(_by_row(read, batch), batch, objective)
    loss, scores = losses.fused_loss(
        *heads, weights.token.reshape(-1), **_score_settings(objective, batch, loss_chunk)
    )
    return loss, _sums(loss, _by_row(scores, batch), weights, batch)


def score(
    params: Params,
    teacher: Teacher | None,
    batch: Batch,
    *,
    student: Model,
    objective: Objective,
    dtype: jnp.dtype,
    loss_chunk: int,
) -> TokenScores:
    """Divergence and all other scores of the response tokens, float32 [B, R].

    One forward pass of the student over the exact tokens. Only `divergence` and `student_logprob`
    carry gradients, and only to `params`. The student computes in `dtype`, whatever the dtype of
    its parameters. The other arguments are those of `make_train_step`.

    Raises:
      ValueError: the objective needs a teacher and there is none.
    """
    heads = _head_inputs(params, teacher, batch, student=student, objective=objective, dtype=dtype)
    if objective.needs_teacher:
        scores = losses.fused_scores(*heads, **_score_settings(objective, batch, loss_chunk))
    else:
        scores = losses.fused_cross_entropy(
            heads.student_hidden, heads.student_head, heads.targets, chunk_size=loss_chunk
        )
    return _by_row(scores, batch)


@struct.dataclass
class Seen:
    """What is told of response tokens to people who look at a run: arrays [B, R] unless said.

    Attributes:
      scores: see `losses.TokenScores`.
      choices: see `losses.Choices`, [B, R] and [B, R, top].
      weight: s, times z where each trajectory has its own; None if what it reads is not known.
      intervention: i, float32 [B, K]; None if the method has no such factor.
      confidence: c, float32 [B, K]; None if the method does not read the teacher's.
      z: each trajectory's own scale, float32 [B]; None if there is one for the batch.
    """

    scores: TokenScores
    choices: losses.Choices
    weight: jax.Array | None
    intervention: jax.Array | None
    confidence: jax.Array | None
    z: jax.Array | None


def look(
    params: Params,
    teacher: Teacher,
    batch: Batch,
    *,
    student: Model,
    objective: Objective,
    dtype: jnp.dtype,
    loss_chunk: int,
    top: int,
) -> Seen:
    """What an update with these parameters computes of each token, and `top` of `fused_choices`.

    The other arguments are those of `score`. The objective needs a teacher.
    """
    heads = _head_inputs(params, teacher, batch, student=student, objective=objective, dtype=dtype)
    scores, choices = (
        _by_row(found, batch)
        for found in (
            losses.fused_scores(*heads, **_score_settings(objective, batch, loss_chunk)),
            losses.fused_choices(*heads[:4], top=top, chunk_size=loss_chunk),
        )
    )
    weights = _weights(scores, batch, objective)
    intervention = confidence = None
    if objective.weight.takes("skip_weight"):
        intervention = objective.weight.intervention(jnp.asarray(batch.verdict))
    if objective.weight.reads_confidence:
        turn_id, turns = _turn_id(batch), batch.verdict.shape[1]
        confidence = losses.turn_confidence(scores.teacher_top1_prob, turn_id, turns)
    return Seen(scores, choices, weights.token, intervention, confidence, weights.z)


def _score_settings(objective: Objective, batch: Batch, loss_chunk: int) -> dict[str, Any]:
    settings = dict(
        kind=objective.divergence,
        beta=objective.beta,
        chunk_size=loss_chunk,
        confidence_temperature=objective.weight.confidence_temperature,
    )
    if objective.teacher_turns and (by_teacher := _by_teacher(batch)) is not None:
        settings |= dict(teacher_kind=objective.teacher_turns, by_teacher=by_teacher.reshape(-1))
    return settings


class _HeadInputs(NamedTuple):
    """The first arguments of `losses.fused_scores`."""

    student_hidden: jax.Array
    student_head: jax.Array
    teacher_hidden: Any
    teacher_head: Any
    targets: jax.Array


def _head_inputs(
    params: Params,
    teacher: Teacher | None,
    batch: Batch,
    *,
    student: Model,
    objective: Objective,
    dtype: jnp.dtype,
) -> _HeadInputs:
    hidden = response_hidden(cast(params, dtype), batch, hidden=student.hidden)
    teacher_hidden = teacher_head = None
    if objective.needs_teacher:
        if teacher is None:
            raise ValueError(
                f"`objective.divergence` = {objective.divergence!r} compares the student with a "
                "teacher: expected `teacher`, got None; give one, or choose cross_entropy"
            )
        frozen = jax.lax.stop_gradient(teacher)
        teacher_hidden = _positions(frozen.hidden)
        teacher_head = _gathered(head(frozen.head))
    return _HeadInputs(
        student_hidden=_positions(hidden),
        student_head=_gathered(student.head(params)),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        targets=_take(batch.tokens, batch.response, fill=0).reshape(-1),
    )


def _by_row(scores: Any, batch: Batch) -> Any:
    """[B·R, ...] as [B, R, ...]."""
    return jax.tree.map(lambda x: x.reshape(*batch.response.shape, *x.shape[1:]), scores)


def _positions(hidden_BRD: jax.Array) -> jax.Array:
    """[B, R, D] as [B·R, D], sharded over the rows."""
    return constrain(hidden_BRD.reshape(-1, hidden_BRD.shape[-1]), "batch", None)


def _take(x_BT: Array, index_BR: Array, *, fill: float) -> jax.Array:
    return jnp.take_along_axis(x_BT, index_BR, axis=1, mode="fill", fill_value=fill)


def _turn_id(batch: Batch) -> jax.Array:
    """The turn of each response token, [B, R]; `NO_TURN` in unfilled slots."""
    return _take(batch.turn_id, batch.response, fill=NO_TURN)


def _by_teacher(batch: Batch) -> jax.Array | None:
    """The response tokens that the teacher wrote, bool [B, R]; None: the batch does not say."""
    if batch.actor is None:
        return None
    turn_id = _turn_id(batch)
    actor = jnp.take_along_axis(jnp.asarray(batch.actor), jnp.maximum(turn_id, 0), axis=1)
    return (turn_id != NO_TURN) & (actor == Actor.TEACHER)


def _gathered(head_DV: jax.Array) -> jax.Array:
    """A head, all-gathered along `fsdp` once. The compiler would gather it for every chunk.

    The constraint also holds for the gradient, which is then summed over devices once, after all
    chunks. With the head's own sharding it would be summed for every chunk: in a plan of a 1.7B
    student on 32 chips that sends 116 GB an update instead of 5.
    """
    return constrain(head_DV, None, "vocab")


class _Weights(NamedTuple):
    """Weights of a micro-batch, before the scale of the whole batch; no gradient."""

    token: jax.Array  # [B, R]: s, or z·s if the scale is each trajectory's own
    totals: WeightTotals  # of s
    z: jax.Array | None = None  # [B], each trajectory's own scale


def _weights(
    scores: TokenScores | losses.TeacherScores | None, batch: Batch, objective: Objective
) -> _Weights:
    """Weights from scores [B, R]; None if the method reads none of them."""
    turn_id = _turn_id(batch)
    weight = objective.weight(
        turn_id,
        **batch.labels,
        verdict=jnp.asarray(batch.verdict),
        num_turns=batch.verdict.shape[1],
        sampled_logprobs=_take(batch.sampled_logprobs, batch.response, fill=0.0),
        **(scores._asdict() if scores else {}),
    )
    totals = losses.weight_totals(weight, turn_id, scope=objective.scope)
    z = None
    if objective.scope == "trajectory":  # one row, so its totals are complete
        z = objective.scale(totals)
        weight = weight * z[:, None]
        totals = jax.tree.map(jnp.sum, totals)
    return _Weights(weight, totals, z)


def objective_sums(scores: TokenScores, batch: Batch, *, objective: Objective) -> Sums:
    """The weighted objective of a micro-batch, as sums; differentiate `loss`.

    `scores` are those of the same `batch`, [B, R].
    """
    weights = _weights(scores, batch, objective)
    loss = losses.weighted_sum(scores.divergence, weights.token, _turn_id(batch))
    return _sums(loss, scores, weights, batch)


def _sums(loss: jax.Array, scores: TokenScores, weights: _Weights, batch: Batch) -> Sums:
    turn_id, K = _turn_id(batch), batch.verdict.shape[1]
    in_turn = turn_id[..., None] == jnp.arange(K)  # [B, R, K]
    exists = jnp.any(in_turn, axis=1)
    confidence = losses.turn_confidence(scores.teacher_top1_prob, turn_id, K)
    mine = turn_id != NO_TURN

    def clean(x: jax.Array) -> jax.Array:
        return jnp.where(mine, jax.lax.stop_gradient(x), 0.0)

    def by_turn(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(in_turn, x[..., None], 0.0), axis=(0, 1))

    sampled = _take(batch.sampled_logprobs, batch.response, fill=0.0)
    error = clean(jnp.abs(scores.student_logprob - sampled))
    if (by_teacher := _by_teacher(batch)) is not None:
        error = jnp.where(by_teacher, 0.0, error)
    return Sums(
        loss=loss,
        totals=weights.totals,
        divergence=by_turn(clean(scores.divergence)),
        tokens_by_turn=by_turn(mine.astype(jnp.float32)),
        weight_by_turn=by_turn(weights.token),
        confidence=jnp.sum(jnp.where(exists, confidence, 0.0), axis=0),
        turns=jnp.sum(exists, axis=0).astype(jnp.float32),
        student_entropy=jnp.sum(clean(scores.student_entropy)),
        teacher_entropy=jnp.sum(clean(scores.teacher_entropy)),
        logprob_error=jnp.max(error),
    )
