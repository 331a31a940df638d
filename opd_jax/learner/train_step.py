"""One update as one compiled program: student forward, teacher forward, objective, optimizer.

Micro-batches are exact. Each contributes the sums Σ s·d, Σ s and N with its gradient of Σ s·d; the
normalizer Z and the division by N, which need the sums of the whole batch, are applied once, to
the accumulated gradient. Any split of a batch gives the same update up to rounding.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax import losses
from opd_jax.learner.batch import Batch, split
from opd_jax.learner.objective import Objective, Sums, objective_sums, score
from opd_jax.learner.train_state import TrainState
from opd_jax.model import ModelConfig, Params
from opd_jax.model.lora import Lora, with_adapters
from opd_jax.runtime.mesh import replicate


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
        return new, replicate(metrics)

    return train_step


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
