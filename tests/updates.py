"""One update of a tiny student, or of its adapters, for tests that compare gradients."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opd_jax import model
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Objective
from opd_jax.learner.teacher import Teacher, make_teacher_pass
from opd_jax.learner.train_step import make_train_step
from opd_jax.losses import NO_TURN
from opd_jax.model import Model, ModelConfig, Params
from opd_jax.model.lora import Lora, lora_specs

# Its state is the gradient itself.
KEEPER = optax.trace(decay=0.0)


def train_step(
    student: ModelConfig | Model,
    objective: Objective,
    *,
    query_chunk: int = 16,
    remat: str = "none",
    **options: Any,
) -> Callable:
    """`make_train_step` in float32, by default on one device and with all rows at once."""
    defaults: dict[str, Any] = dict(
        optimizer=KEEPER,
        placement=None,
        micro_batches=1,
        batch_rows=None,
        dtype=jnp.dtype("float32"),
        loss_chunk=16,
    )
    if isinstance(student, ModelConfig):
        student = model.functions_of(student, query_chunk=query_chunk, remat=remat)
    return make_train_step(student=student, objective=objective, **(defaults | options))


def two_turns(rows: int, *, vocab: int) -> Batch:
    """Rows of 16 random tokens, of which two turns of four are the student's."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocab, (rows, 16)).astype(np.int32)
    turn_id = np.full((rows, 16), NO_TURN, np.int32)
    turn_id[:, 3:7], turn_id[:, 10:14] = 0, 1
    response = np.tile(np.r_[3:7, 10:14], (rows, 1)).astype(np.int32)
    verdict = rng.integers(0, 4, (rows, 2)).astype(np.int32)
    return Batch(tokens, turn_id, np.zeros((rows, 16), np.float32), verdict, response)


def random_adapters(config: ModelConfig, lora: Lora, *, scale: float) -> Params:
    """Adapters as after many updates, neither factor zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(0, scale, spec.shape), jnp.float32),
        lora_specs(config, lora),
        is_leaf=model.is_spec,
    )


def teacher_of(
    config: ModelConfig, params: Params, batch: Batch, *, micro_batches: int = 1
) -> Teacher:
    """The teacher's pass over a batch."""
    run = _teacher_pass(config, micro_batches)
    return Teacher(run(params, batch), model.head_params(params))


@cache
def _teacher_pass(config: ModelConfig, micro_batches: int) -> Callable:
    return make_teacher_pass(config, micro_batches=micro_batches, batch_rows=None, query_chunk=16)
