"""What is told of a few rows' tokens: a program of its own that reads and changes nothing.

It is apart from the update, so that looking at a run changes no bit of it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Objective, Seen, look
from opd_jax.learner.teacher import Teacher, response_hidden, sharded_for_training
from opd_jax.losses import NO_TURN
from opd_jax.model import ModelConfig, Params
from opd_jax.model.lora import Lora, with_adapters
from opd_jax.runtime.mesh import replicate, shard_batch, shards

# (trained, base, the teacher's parameters, batch, some of its rows) to what is told of these rows.
Look = Callable[[Params, Params | None, Params, Batch, Sequence[int]], Seen]


def make_look(
    *,
    student: ModelConfig,
    teacher: ModelConfig,
    objective: Objective,
    dtype: jnp.dtype,
    query_chunk: int,
    loss_chunk: int,
    lora: Lora | None,
    top: int,
) -> Look:
    """The function that looks at some rows of a batch, one a device at a time.

    `top` is the number of the teacher's tokens; the other arguments are those of `make_train_step`.
    All processes of a run take part, and each gets all of the result.
    """
    functions = partial(model.functions_of, query_chunk=query_chunk, remat="none")

    @jax.jit
    def program(trained: Params, base: Params | None, judging: Params, batch: Batch) -> Seen:
        judging = sharded_for_training(judging, teacher)
        hidden = response_hidden(judging, batch.for_teacher(), hidden=functions(teacher).hidden)
        seen = look(
            with_adapters(base, trained, lora),
            Teacher(hidden, model.head_params(judging)),
            batch.for_student(),
            student=functions(student),
            objective=objective,
            dtype=dtype,
            loss_chunk=loss_chunk,
            top=top,
        )
        return replicate(seen)

    def look_at(
        trained: Params, base: Params | None, judging: Params, batch: Batch, rows: Sequence[int]
    ) -> Seen:
        at_once = shards("batch")
        starts = range(0, len(rows), at_once)
        parts = [_rows(batch, rows[start : start + at_once], at_once) for start in starts]
        run = partial(program, trained, base, judging)
        seen = [jax.device_get(run(shard_batch(part))) for part in parts]
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *seen)

    return look_at


def _rows(batch: Batch, rows: Sequence[int], count: int) -> Batch:
    """Rows of a batch on the host, filled up to `count` with rows without a student's token."""
    filled = [*rows] + [rows[0]] * (count - len(rows))
    part = jax.tree.map(lambda x: np.asarray(x)[filled], batch)
    part.turn_id[len(rows) :] = NO_TURN
    part.response[len(rows) :] = batch.tokens.shape[1]
    if part.teacher_tokens is not None:
        part.teacher_response[len(rows) :] = part.teacher_tokens.shape[1]
    return part
