"""One update as one compiled program: the student's forward pass, the objective, the optimizer.

Micro-batches are exact. Each adds its sums Σ s·d, Σ s and N, and its gradient of Σ s·d. The scale z
and the division by N need the sums of the whole batch, so they are applied once, to the accumulated
gradient. Any split of a batch gives the same update up to rounding.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax.learner.batch import Batch, fits_half, half, num_parts, split_rows
from opd_jax.learner.objective import Objective, Sums, loss_and_sums
from opd_jax.learner.teacher import Teacher
from opd_jax.learner.train_state import TrainState
from opd_jax.losses import WeightTotals
from opd_jax.model import REMAT, Model, Params
from opd_jax.model.lora import Lora, with_adapters
from opd_jax.runtime.fields import EXTENT, LAYOUT, affects, check_choice, check_within
from opd_jax.runtime.mesh import replicate


@dataclass(frozen=True)
class TrainSettings:
    """How many updates there are, and how one is computed.

    Attributes:
      updates: length of the run.
      micro_batches: equal parts of a batch. Bounds memory, and changes results by rounding only.
      query_chunk: queries attended at a time.
      loss_chunk: positions whose logits exist at a time.
      remat: what the backward pass rematerializes (`model.REMAT`).
      length_multiple: T of a batch is a multiple of this.
      response_multiple: R of a batch is a multiple of this.
    """

    updates: int = field(metadata=affects(EXTENT))
    micro_batches: int = field(metadata=affects(LAYOUT))
    query_chunk: int = field(metadata=affects(LAYOUT))
    loss_chunk: int = field(metadata=affects(LAYOUT))
    remat: str = field(metadata=affects(LAYOUT))
    length_multiple: int = field(metadata=affects(LAYOUT))
    response_multiple: int = field(metadata=affects(LAYOUT))

    def __post_init__(self):
        check_choice(REMAT, remat=self.remat)
        counts = {k: v for k, v in dataclasses.asdict(self).items() if k != "remat"}
        check_within(1, **counts)


def make_train_step(
    *,
    student: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    placement: Any,
    micro_batches: int,
    batch_rows: int | None,
    dtype: jnp.dtype,
    loss_chunk: int,
    lora: Lora | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted update `(state, teacher, batch) -> (state, metrics)`; donates `state`.

    `teacher` is a `Teacher`, or None if the objective needs none. With `lora` the update is
    `(state, teacher, batch, base) -> (state, metrics)`: it trains adapters of `base`, the student's
    own parameters, which are only read.

    Args:
      student: the trained model's functions: `model.functions_of` our transformer, or a `Model` of
        your own.
      objective: what is minimized.
      optimizer: e.g. from `make_optimizer`.
      placement: the sharding of every array of the new state, from `placement_of` the old one.
        None leaves it to the compiler. On several devices the compiler may then all-gather the
        parameters, and the next update compiles again.
      micro_batches: equal parts of a batch. Bounds memory, and changes results by rounding only.
      batch_rows: rows of a batch in which each episode is one row. A batch of n times the rows has
        n times the parts. None: every batch has `micro_batches` parts.
      dtype: the student computes in it; its parameters, gradient and optimizer keep their own.
      loss_chunk: positions whose logits exist at a time.
      lora: how the adapters in `state.params` were made; None if those are the student's own
        parameters.

    Returns:
      The update. Its metrics are `loss`, `z`, `sums` (`objective.Sums`), `grad_norm`, `update_norm`
      (of new minus old parameters) and `no_step`, replicated. If no token has a weight, parameters
      and optimizer stay as they are, and `no_step` is 1.

    Raises:
      ValueError: when the update is traced: the batch does not divide into the micro-batches, the
        objective needs a teacher and there is none, or only one of `base` and `lora` is given.
    """
    of_part = partial(
        loss_and_sums, student=student, objective=objective, dtype=dtype, loss_chunk=loss_chunk
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=placement and (placement, None))
    def train_step(
        state: TrainState, teacher: Teacher | None, batch: Batch, base: Params | None = None
    ):
        def loss_and_sums(trained: Params, part: tuple[Batch, Any]):
            rows, hidden = part
            read = Teacher(hidden, teacher.head) if teacher else None
            return of_part(with_adapters(base, trained, lora), read, rows)

        parts = num_parts(batch, micro_batches=micro_batches, batch_rows=batch_rows)
        rows = (batch, None if teacher is None else teacher.hidden)
        gradient, sums = _accumulate(loss_and_sums, state.params, split_rows(rows, parts))
        # A trajectory's own scale is in its weights already.
        z = objective.scale(sums.totals) if objective.scope == "batch" else jnp.ones(())
        factor = z / jnp.maximum(sums.totals.tokens, 1)
        gradient = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), gradient, state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        # Momentum and weight decay would move the student even if no token had a weight.
        weighs = sums.totals.weight > 0
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(weighs, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        metrics = {
            "loss": sums.loss * factor,
            "z": z,
            "sums": sums,
            "grad_norm": optax.global_norm(gradient),
            "update_norm": optax.global_norm(jax.tree.map(_change, params, state.params)),
            "no_step": 1 - weighs.astype(jnp.float32),
        }
        new = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
        return new, replicate(metrics)

    return train_step


def _change(new: jax.Array, old: jax.Array) -> jax.Array:
    """How far a parameter moves once it is rounded to its dtype, in float32."""
    stored = jnp.finfo(new.dtype)
    # XLA may cancel a conversion to bfloat16 and back, but not this.
    rounded = jax.lax.reduce_precision(new.astype(jnp.float32), stored.nexp, stored.nmant)
    return rounded - old.astype(jnp.float32)


def _accumulate(loss_and_sums, params: Params, parts: tuple) -> tuple[Params, Sums]:
    """The float32 gradient of `loss_and_sums(params, part)`, and the sums, over micro-batches."""

    of_part = jax.grad(loss_and_sums, has_aux=True)
    batch, _ = parts

    def of_any(rows: Batch, hidden: jax.Array | None) -> tuple[Params, Sums]:
        """A micro-batch of short rows is computed in half the positions."""
        slots = rows.response.shape[1] // 2
        return jax.lax.cond(
            fits_half(rows.response, rows.tokens.shape[1]),
            lambda: of_part(params, (half(rows), None if hidden is None else hidden[:, :slots])),
            lambda: of_part(params, (rows, hidden)),
        )

    def one(carry: tuple[Params, Sums], part: tuple):
        gradient, sums = of_any(*part) if len(batch.tokens) > 1 else of_part(params, part)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), carry[0], gradient)
        return (total, _add(carry[1], sums)), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.scan(one, (zero, _zeros(batch.verdict.shape[-1])), parts)[0]


def _zeros(turns: int) -> Sums:
    zero, by_turn = jnp.zeros((), jnp.float32), jnp.zeros(turns, jnp.float32)
    return Sums(
        loss=zero,
        totals=WeightTotals(zero, zero, zero),
        divergence=by_turn,
        tokens_by_turn=by_turn,
        weight_by_turn=by_turn,
        confidence=by_turn,
        turns=by_turn,
        student_entropy=zero,
        teacher_entropy=zero,
        logprob_error=zero,
    )


def _add(total: Sums, part: Sums) -> Sums:
    added = jax.tree.map(jnp.add, total, part)
    largest = jnp.maximum(total.logprob_error, part.logprob_error)
    return dataclasses.replace(added, logprob_error=largest)
