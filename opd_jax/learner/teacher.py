"""The teacher's pass: one forward over the student's tokens, compiled as its own program.

It depends neither on the weights of tokens nor on the student, so it can run as soon as a batch is
packed. It returns hidden states at the student's tokens. Besides the teacher's head, the update
needs nothing else of the teacher.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax import model
from opd_jax.learner.batch import (
    Array,
    Batch,
    fits_half,
    half,
    merge_rows,
    num_parts,
    split_rows,
)
from opd_jax.model import ModelConfig, Params
from opd_jax.model.lora import specs_like
from opd_jax.runtime.mesh import constrain


@struct.dataclass
class Teacher:
    """What an update needs of the teacher.

    Attributes:
      hidden: float [B, R, D'], the hidden states that predict the response tokens.
      head: the part of the teacher's parameters that `model.head` reads, or `{"head": [D', V]}`.
    """

    hidden: jax.Array
    head: Params


def make_teacher_pass(
    config: ModelConfig, *, micro_batches: int, batch_rows: int | None, query_chunk: int
) -> Callable[[Params, Batch], jax.Array]:
    """The compiled pass `(params, batch) -> hidden` [B, R, D'], for `Teacher.hidden`.

    Micro-batches bound its memory (`batch.num_parts`); one of short rows is computed in half the
    positions (`batch.fits_half`). A teacher that is sharded for decoding is sharded for training
    first.
    """

    @jax.jit
    def teacher_pass(params: Params, batch: Batch) -> jax.Array:
        parts = num_parts(batch, micro_batches=micro_batches, batch_rows=batch_rows)
        run = partial(
            response_hidden,
            sharded_for_training(params, config),
            hidden=model.functions_of(config, query_chunk=query_chunk, remat="none").hidden,
        )

        def of_part(part: Batch) -> jax.Array:
            length, slots = part.tokens.shape[1], part.response.shape[1]
            unfilled = (0, 0), (0, slots - slots // 2), (0, 0)
            return jax.lax.cond(
                fits_half(part.response, length),
                lambda: jnp.pad(run(half(part)), unfilled),
                lambda: run(part),
            )

        return merge_rows(jax.lax.map(of_part if parts > 1 else run, split_rows(batch, parts)))

    return teacher_pass


def sharded_for_training(params: Params, config: ModelConfig) -> Params:
    """The parameters of a teacher, which is sharded as it judges, sharded as a student is."""
    return jax.tree.map(
        lambda spec, p: constrain(p, *spec.axes),
        specs_like(params, config),
        params,
        is_leaf=model.is_spec,
    )


def response_hidden(
    params: Params, batch: Batch, *, hidden: Callable[[Params, jax.Array], jax.Array]
) -> jax.Array:
    """The hidden states that predict the response tokens, [B, R, D]: those one position earlier.

    `hidden` gives those of whole sequences (`model.Model`).

    Unfilled slots get zeros. Hidden states of padding need not be finite, and would reach the
    gradient as 0 · NaN.
    """
    return _before(hidden(params, jnp.asarray(batch.tokens)), batch.response)


def _before(hidden_BTD: jax.Array, response_BR: Array) -> jax.Array:
    T = hidden_BTD.shape[1]
    before = jnp.where(response_BR < T, jnp.maximum(response_BR - 1, 0), T)
    return jnp.take_along_axis(hidden_BTD, before[..., None], axis=1, mode="fill", fill_value=0)
