"""One update as one compiled program: student forward, teacher forward, objective, optimizer.

Micro-batches are exact. Each contributes the sums Σ s·d, Σ s and N with its gradient of Σ s·d; the
normalizer Z and the division by N, which need the sums of the whole batch, are applied once, to
the accumulated gradient. Any split of a batch gives the same update up to rounding.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding

from opd_jax import losses, model
from opd_jax.linear import cast
from opd_jax.lora import Lora, with_adapters
from opd_jax.losses import NO_TURN, TokenScores, Verdict
from opd_jax.mesh import constrain, replicated, whole
from opd_jax.model import ModelConfig, Params
from opd_jax.trajectory import Trajectory

# What a batch holds: numpy's on the host, jax's under `jit`.
Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Objective:
    """What is minimized: Σ z · i · c · e · d / N. Static under `jit`.

    Attributes:
      divergence: d: "reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl" (one-sample estimate),
        or "cross_entropy" with the tokens themselves (fine-tuning; there is no teacher).
      beta: for "jsd", the teacher's share in the mixture.
      intervention: use the turns' verdicts; else i = 1.
      confidence: use the teacher's confidence; else c = 1.
      confidence_temperature: of the teacher's softmax in c only.
      weak_weight: α.
      entropy_bonus: of e, for tokens at which the teacher is uncertain; 0: e = 1.
      entropy_threshold: of e, nats (`losses.entropy_factor`).
      normalize: see `losses.normalizer`.
      scope: see `losses.sage_weights`.
      eps: see `losses.normalizer`.
      max_z: see `losses.normalizer`.
    """

    divergence: str
    beta: float | None
    intervention: bool
    confidence: bool
    confidence_temperature: float
    weak_weight: float
    entropy_bonus: float
    entropy_threshold: float
    normalize: str
    scope: str
    eps: float
    max_z: float | None

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's forward pass is part of the step."""
        return self.divergence != "cross_entropy"


@struct.dataclass
class TrainState:
    """Everything an update changes, and all that resuming needs on the device.

    Attributes:
      params: the student's, in the dtype they are trained in; of a student with adapters those
        alone (`lora`).
      opt_state: optax state.
      step: int32 [], updates done; the cursor into the tasks follows from it.
      rng: the run's PRNG key; randomness of update n is this key folded with n.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    rng: jax.Array


@struct.dataclass
class Batch:
    """What one update consumes.

    Attributes:
      tokens: int32 [B, T].
      turn_id: int32 [B, T].
      sampled_logprobs: float32 [B, T]; compared with the recomputed ones as a check.
      verdict: int32 [B, K].
      response: int32 [B, R], positions of the student's tokens, ascending; T where a row has
        fewer. Most tokens of an agent's trajectory are observations: gathering the others before
        the vocabulary-sized part saves most of its cost.
    """

    tokens: Array
    turn_id: Array
    sampled_logprobs: Array
    verdict: Array
    response: Array


def make_batch(trajectory: Trajectory, verdict: np.ndarray, *, response_multiple: int) -> Batch:
    """The compiled step's view of a `Trajectory` and its verdicts.

    Args:
      trajectory: a batch.
      verdict: int32 [B, K].
      response_multiple: R is rounded up to a multiple of this, which bounds recompilation.
    """
    student = trajectory.turn_id != NO_TURN
    T = student.shape[1]
    most = max(int(student.sum(axis=1).max()), 1)
    R = min(-(-most // response_multiple) * response_multiple, T)
    # Stable sort brings the student's positions to the front in their order.
    order = np.argsort(~student, axis=1, kind="stable")[:, :R].astype(np.int32)
    response = np.where(np.arange(R) < student.sum(axis=1)[:, None], order, T).astype(np.int32)
    return Batch(
        trajectory.tokens, trajectory.turn_id, trajectory.sampled_logprobs, verdict, response
    )


@struct.dataclass
class Sums:
    """Sums over student tokens (or turns) of a micro-batch; float32, additive over splits.

    Attributes:
      loss: Σ s·d, or Σ z·s·d where z is a trajectory's own.
      weight: Σ s, or Σ z·s.
      tokens: N.
      active: tokens with s > 0.
      divergence: Σ d by turn index [K].
      tokens_by_turn: [K].
      weight_by_turn: `weight` by turn index [K].
      confidence: Σ c over turns, by turn index [K].
      turns: number of turns, by turn index [K].
      student_entropy: Σ, nats.
      teacher_entropy: Σ, nats; 0 without a teacher.
      logprob_error: largest |sampled − recomputed| log-probability of the student.
    """

    loss: jax.Array
    weight: jax.Array
    tokens: jax.Array
    active: jax.Array
    divergence: jax.Array
    tokens_by_turn: jax.Array
    weight_by_turn: jax.Array
    confidence: jax.Array
    turns: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    logprob_error: jax.Array


def _take(x_BT: Array, index_BR: Array, *, fill: float) -> jax.Array:
    return jnp.take_along_axis(x_BT, index_BR, axis=1, mode="fill", fill_value=fill)


def _gather_hidden(hidden_BTD: jax.Array, response_BR: Array) -> jax.Array:
    """Hidden states that predict the response tokens, [B·R, D]: those one position earlier.

    Zeros for slots that hold no response: what stands at the last position, which may be padding,
    would reach the gradient as 0 · NaN where it is not finite.
    """
    T = hidden_BTD.shape[1]
    before = jnp.where(response_BR < T, jnp.maximum(response_BR - 1, 0), T)
    gathered = jnp.take_along_axis(hidden_BTD, before[..., None], axis=1, mode="fill", fill_value=0)
    return constrain(gathered.reshape(-1, hidden_BTD.shape[-1]), "batch", None)


def score(
    params: Params,
    teacher_params: Params | None,
    batch: Batch,
    *,
    student: ModelConfig,
    teacher: ModelConfig | None,
    objective: Objective,
    dtype: jnp.dtype,
    query_chunk: int,
    loss_chunk: int,
    remat: str,
) -> TokenScores:
    """Divergence and all other scores of the response tokens, float32 [B, R].

    One forward pass of each model over the exact tokens; only `divergence` and `student_logprob`
    carry gradients, and only to `params`. The student computes in `dtype`, whatever its parameters
    are kept in.

    Args:
      params: the student's.
      teacher_params: the teacher's; None where the objective needs none.
      batch: [B, T] tokens, of which [B, R] are scored.
      student, teacher: sizes of the two.
      objective: whose divergence, and whose temperature of confidence.
      dtype: that the student computes in.
      query_chunk: see `model.causal_self_attention`.
      loss_chunk: positions whose logits exist at a time (`losses.fused_scores`).
      remat: recompute the student's layers in the backward pass.

    Raises:
      ValueError: the objective needs a teacher and there is none.
    """
    targets = _take(batch.tokens, batch.response, fill=0).reshape(-1)
    run = partial(model.forward, tokens=jnp.asarray(batch.tokens), query_chunk=query_chunk)
    hidden = _gather_hidden(run(cast(params, dtype), config=student, remat=remat), batch.response)
    head = _gathered_head(params)
    if not objective.needs_teacher:
        scores = _fine_tuning_scores(hidden, head, targets, loss_chunk=loss_chunk)
    elif teacher is None or teacher_params is None:
        raise ValueError(
            f"`objective.divergence` = {objective.divergence!r} compares the student with a "
            "teacher: expected `teacher` and `teacher_params`, got None; give both, or choose "
            "cross_entropy"
        )
    else:
        frozen = jax.lax.stop_gradient(teacher_params)
        scores = _distillation_scores(
            hidden,
            head,
            _gather_hidden(run(frozen, config=teacher, remat="none"), batch.response),
            _gathered_head(frozen),
            targets,
            objective=objective,
            loss_chunk=loss_chunk,
        )
    return jax.tree.map(lambda x: x.reshape(batch.response.shape), scores)


def _gathered_head(params: Params) -> jax.Array:
    """The head whole along `fsdp`, once: left alone it would be gathered for every chunk."""
    return constrain(model.head(params), None, "vocab")


def _distillation_scores(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    *,
    objective: Objective,
    loss_chunk: int,
) -> TokenScores:
    """Scores of the objective's divergence at N positions; arguments as in `fused_scores`."""
    sampled = objective.divergence == "sampled_reverse_kl"
    kind = "reverse_kl" if sampled else objective.divergence
    scores = losses.fused_scores(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        targets,
        beta=losses.kind_to_beta(kind, objective.beta),
        chunk_size=loss_chunk,
        confidence_temperature=objective.confidence_temperature,
    )
    if not sampled:
        return scores
    estimate = losses.sampled_reverse_kl(scores.student_logprob, scores.teacher_logprob)
    return scores._replace(divergence=estimate)


def _fine_tuning_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, loss_chunk: int
) -> TokenScores:
    """Scores at N positions where the divergence is the tokens' own cross-entropy."""
    nll, entropy = losses.fused_cross_entropy(hidden, head, targets, chunk_size=loss_chunk)
    zero = jnp.zeros_like(nll)
    return TokenScores(nll, zero, -nll, zero, entropy, zero)


def objective_sums(scores: TokenScores, batch: Batch, *, objective: Objective) -> Sums:
    """The weighted objective of a micro-batch, as sums; differentiate `loss`.

    Args:
      scores: float32 [B, R].
      batch: the same trajectories.
      objective: which factors the weight has.
    """
    turn_id = _take(batch.turn_id, batch.response, fill=NO_TURN)
    K = batch.verdict.shape[1]
    in_turn = turn_id[..., None] == jnp.arange(K)  # [B, R, K]
    exists = jnp.any(in_turn, axis=1)
    if objective.confidence:
        confidence = losses.turn_confidence(scores.teacher_top1_prob, turn_id, K)
    else:
        confidence = exists.astype(jnp.float32)
    verdict = jnp.asarray(batch.verdict)
    weight = _token_weights(
        turn_id, verdict, confidence, scores.teacher_entropy, objective=objective
    )
    mine = turn_id != NO_TURN

    def clean(x: jax.Array) -> jax.Array:
        return jnp.where(mine, jax.lax.stop_gradient(x), 0.0)

    def by_turn(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(in_turn, x[..., None], 0.0), axis=(0, 1))

    sampled = _take(batch.sampled_logprobs, batch.response, fill=0.0)
    return Sums(
        loss=losses.weighted_sum(scores.divergence, weight, turn_id),
        weight=jnp.sum(weight),
        tokens=jnp.sum(mine).astype(jnp.float32),
        active=jnp.sum(weight > 0).astype(jnp.float32),
        divergence=by_turn(clean(scores.divergence)),
        tokens_by_turn=by_turn(mine.astype(jnp.float32)),
        weight_by_turn=by_turn(weight),
        confidence=jnp.sum(jnp.where(exists, confidence, 0.0), axis=0),
        turns=jnp.sum(exists, axis=0).astype(jnp.float32),
        student_entropy=jnp.sum(clean(scores.student_entropy)),
        teacher_entropy=jnp.sum(clean(scores.teacher_entropy)),
        logprob_error=jnp.max(clean(jnp.abs(scores.student_logprob - sampled))),
    )


def _token_weights(
    turn_id: jax.Array,
    verdict: jax.Array,
    confidence: jax.Array,
    teacher_entropy: jax.Array,
    *,
    objective: Objective,
) -> jax.Array:
    """i · c · e of every token, [B, R]; with z where each trajectory has a Z of its own."""
    if not objective.intervention:
        verdict = jnp.full_like(verdict, Verdict.STRONG)
    factor = None
    if objective.entropy_bonus:
        bonus, threshold = objective.entropy_bonus, objective.entropy_threshold
        factor = losses.entropy_factor(teacher_entropy, bonus=bonus, threshold=threshold)
    factors: dict[str, Any] = dict(weak_weight=objective.weak_weight, token_factor=factor)
    if objective.scope != "trajectory":
        return losses.raw_weights(turn_id, verdict, confidence, **factors)
    weight, _ = losses.sage_weights(
        turn_id,
        verdict,
        confidence,
        **factors,
        normalize=objective.normalize,
        scope="trajectory",
        eps=objective.eps,
        max_z=objective.max_z,
    )
    return weight


def _zeros(turns: int) -> Sums:
    by_turn = {"divergence", "tokens_by_turn", "weight_by_turn", "confidence", "turns"}
    return Sums(
        **{
            name: jnp.zeros((turns,) if name in by_turn else (), jnp.float32)
            for name in Sums.__dataclass_fields__
        }
    )


def _add(total: Sums, part: Sums) -> Sums:
    added = jax.tree.map(jnp.add, total, part)
    largest = jnp.maximum(total.logprob_error, part.logprob_error)
    return dataclasses.replace(added, logprob_error=largest)


def _accumulate(loss_and_sums, params: Params, parts: Batch) -> tuple[Params, Sums]:
    """Σ over micro-batches of the gradient, in float32, and of the sums.

    Args:
      loss_and_sums: (params, batch) to what is differentiated, and `Sums`.
      params: what is differentiated with respect to.
      parts: micro-batches along a leading axis.
    """

    def one(carry: tuple[Params, Sums], part: Batch):
        gradient, sums = jax.grad(loss_and_sums, has_aux=True)(params, part)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), carry[0], gradient)
        return (total, _add(carry[1], sums)), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.scan(one, (zero, _zeros(parts.verdict.shape[-1])), parts)[0]


def make_train_step(
    *,
    student: ModelConfig,
    teacher: ModelConfig | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    placement: Any,
    micro_batches: int,
    batch_rows: int | None,
    dtype: jnp.dtype,
    query_chunk: int,
    loss_chunk: int,
    remat: str,
    lora: Lora | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted update `(state, teacher_params, batch) -> (state, metrics)`; donates `state`.

    With `lora` it is `(state, teacher_params, batch, base) -> (state, metrics)`: what is trained
    are the adapters of `base`, which are the student's own parameters, only read.

    Args:
      student: sizes of the trained model.
      teacher: sizes of the frozen one; None where the objective needs none.
      objective: what is minimized.
      optimizer: e.g. from `make_optimizer`.
      placement: the sharding of every array of the new state: that of the old one, as from
        `placement_of`. None leaves it to the compiler, which on several devices may gather the
        parameters and compile a second time for what came out.
      micro_batches: into how many equal parts a batch is split; bounds memory, changes nothing.
      batch_rows: rows of a batch of whole episodes; one with a multiple of them, where episodes
        have several rows, is split into as many times more parts. None: no batch is.
      dtype: that the student computes in; its parameters, gradient and optimizer keep theirs.
      query_chunk: see `model.forward`.
      loss_chunk: positions whose logits exist at a time (`losses.fused_scores`).
      remat: see `model.forward`; for the student.
      lora: what the state's parameters adapt; None where they are the student's own.

    Raises:
      ValueError: at trace time, when the batch does not divide into the micro-batches, the
        objective needs a teacher and there is none, or `base` is there without `lora` or the other
        way round.
    """
    score_with = partial(
        score,
        student=student,
        teacher=teacher,
        objective=objective,
        dtype=dtype,
        query_chunk=query_chunk,
        loss_chunk=loss_chunk,
        remat=remat,
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=placement and (placement, None))
    def train_step(
        state: TrainState, teacher_params: Params | None, batch: Batch, base: Params | None = None
    ):
        def loss_and_sums(trained: Params, part: Batch):
            params = with_adapters(base, trained, lora)
            scores = score_with(params, teacher_params, part)
            sums = objective_sums(scores, part, objective=objective)
            return sums.loss, sums

        parts = micro_batches * (len(batch.tokens) // batch_rows if batch_rows else 1)
        gradient, sums = _accumulate(loss_and_sums, state.params, split(batch, parts))
        z = _batch_normalizer(sums, objective)
        scale = z / jnp.maximum(sums.tokens, 1)
        gradient = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradient, state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": sums.loss * scale,
            "z": z,
            "sums": sums,
            "grad_norm": optax.global_norm(gradient),
            "update_norm": optax.global_norm(updates),
        }
        new = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            step=state.step + 1,
        )
        return new, whole(metrics)

    return train_step


def _batch_normalizer(sums: Sums, objective: Objective) -> jax.Array:
    """Z of the whole batch; 1 where each trajectory has been given its own."""
    if objective.scope != "batch":
        return jnp.ones(())
    return losses.normalizer(
        sums.weight,
        sums.tokens,
        sums.active,
        normalize=objective.normalize,
        eps=objective.eps,
        max_z=objective.max_z,
    )


def split(batch: Batch, parts: int) -> Batch:
    """A leading axis of micro-batches on every array: [B, ...] -> [parts, B/parts, ...].

    A part takes every parts-th row: each device then has its share of every part.

    Args:
      batch: of B rows.
      parts: how many micro-batches.

    Raises:
      ValueError: B does not divide by `parts`.
    """
    rows = batch.tokens.shape[0]
    if rows % parts:
        raise ValueError(
            f"`train.micro_batches`: a batch of {rows} trajectories does not divide into {parts} "
            f"micro-batches; choose a divisor of {rows}"
        )

    def part(x: jax.Array) -> jax.Array:
        apart = jnp.moveaxis(jnp.reshape(x, (rows // parts, parts, *x.shape[1:])), 1, 0)
        return constrain(apart, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(part, batch)


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str,
    warmup_updates: int,
    total_updates: int,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW with a warm-up, behind a clip of the gradient's global norm.

    Weight decay spares norms and biases.

    Args:
      learning_rate: peak.
      schedule: after the warm-up: "constant", "cosine" or "linear" to 0 at `total_updates`.
      warmup_updates: linear, reaching the peak after so many.
      total_updates: length of the run.
      weight_decay: AdamW's.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: AdamW's.
      clip_norm: 0 switches clipping off.

    Raises:
      ValueError: an unknown schedule.
    """
    decay_updates = max(total_updates - warmup_updates, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay_updates),
        "linear": optax.linear_schedule(learning_rate, 0.0, decay_updates),
    }
    if schedule not in after:
        raise ValueError(
            f"`optimizer.schedule`: expected one of {', '.join(after)}, got {schedule!r}"
        )
    # From the first update on the rate is above 0: an update at rate 0 would be lost.
    first = learning_rate / (warmup_updates + 1)
    warmup = optax.linear_schedule(first, learning_rate, max(warmup_updates, 1))
    rate = optax.join_schedules([warmup, after[schedule]], [warmup_updates])
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def _decayed(params: Params) -> Params:
    """True for matrices: every parameter that is neither a norm's scale nor a bias."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1].key).endswith(("norm", "bias")), params
    )


def init_state(params: Params, optimizer: optax.GradientTransformation, *, seed: int) -> TrainState:
    """The state before the first update, placed as `abstract_state` says.

    Args:
      params: the student's; copied.
      optimizer: whose state starts at its beginning.
      seed: of the run's PRNG key.
    """

    def fresh(params: Params) -> TrainState:
        # Copied: the state is donated by the first update, and `params` belongs to the caller.
        return _first_state(jax.tree.map(jnp.copy, params), optimizer, seed)

    placement = placement_of(abstract_state(params, optimizer))
    return jax.jit(fresh, out_shardings=placement)(params)


def abstract_state(params: Params, optimizer: optax.GradientTransformation) -> Any:
    """Shapes, dtypes and shardings of `init_state`: what a checkpoint is restored into.

    Optimizer moments are placed like their parameters, everything else on all devices of theirs.

    Args:
      params: arrays, or `ShapeDtypeStruct`s with shardings.
      optimizer: gives the shapes of the moments.

    Returns:
      A `TrainState` of `ShapeDtypeStruct`s.
    """
    state = jax.eval_shape(partial(_first_state, optimizer=optimizer, seed=0), params)
    everywhere = _everywhere(jax.tree.leaves(params)[0].sharding)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, parameter: _placed(moment, parameter.sharding),
        state.opt_state,
        params,
        transform_non_params=lambda x: _placed(x, everywhere),
    )
    return dataclasses.replace(
        state,
        params=jax.tree.map(lambda x, p: _placed(x, p.sharding), state.params, params),
        opt_state=opt_state,
        step=_placed(state.step, everywhere),
        rng=_placed(state.rng, everywhere),
    )


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def placement_of(state: Any) -> Any:
    """The sharding of every array of a `TrainState`, or of every leaf of `abstract_state`."""
    return jax.tree.map(lambda x: x.sharding, state)


def _everywhere(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """A whole copy on each device of a parameter's mesh."""
    if isinstance(sharding, NamedSharding):
        return replicated(sharding.mesh)
    return sharding


def _first_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key(seed),
    )
