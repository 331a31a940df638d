"""Where a loss or a gradient stops being finite, for `debug.nans`.

One NaN spreads over its row: attention multiplies the values of later tokens by 0, and 0 · NaN is
NaN. So the numbers of a whole row do not say where it began. Here a row is cut, the rest is read as
padding, and bisection finds the shortest cut whose loss or gradient is not finite. That takes some
ten passes over one row, which only a run that ends anyway pays for.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Objective, loss_and_sums, objective_sums, score
from opd_jax.learner.teacher import Teacher, response_hidden, sharded_for_training
from opd_jax.model import ModelConfig, Params
from opd_jax.model.lora import Lora, with_adapters
from opd_jax.model.projections import cast
from opd_jax.runtime.fields import FIGURES, affects
from opd_jax.runtime.mesh import replicate, shard_batch, shards


@dataclass(frozen=True)
class DebugSettings:
    """How a run that fails is looked at.

    Attributes:
      nans: where the loss or the gradient is not finite, save the student of before, name the first
        token to blame, and write its episode. An update then works on a copy of the state, so
        there are two.
    """

    nans: bool = field(metadata=affects(FIGURES))


class Place(NamedTuple):
    """The token with which a row stops being finite.

    Attributes:
      row: of the batch.
      position: of the token in its row; -1 if the row is not finite before it has any token.
      what: which value is the first that is not finite, in words.
    """

    row: int
    position: int
    what: str


# (trained, base, the teacher's parameters, batch on the host, most places) to a place a row.
Find = Callable[[Params, Params | None, Params | None, Batch, int], list[Place]]


def is_finite(metrics: Mapping[str, Any]) -> bool:
    """Whether the loss and the gradient of an update are finite."""
    return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))


def make_find(
    *,
    student: ModelConfig,
    teacher: ModelConfig | None,
    objective: Objective,
    lora: Lora | None,
    query_chunk: int,
    remat: str,
    **how: Any,
) -> Find:
    """The function that finds the first places of a batch, at most one a row, in order of rows.

    `how` are `dtype` and `loss_chunk` of `make_train_step`. All processes of a run take part, and
    each gets all of the result, which is empty where no row alone is to blame.
    """
    functions = partial(model.functions_of, query_chunk=query_chunk, remat=remat)
    of_student = functions(student)
    how |= dict(student=of_student, objective=objective)

    @jax.jit
    def program(
        trained: Params, base: Params | None, judging: Params | None, batch: Batch, count: jax.Array
    ) -> tuple[list[jax.Array], Params]:
        inside = jnp.arange(batch.tokens.shape[1]) < count
        tokens = jnp.where(inside, batch.tokens, 0)
        whole = batch.response < count
        if batch.teacher_tokens is not None and batch.teacher_response is not None:
            end = batch.teacher_tokens.shape[1]
            batch = replace(batch, teacher_response=jnp.where(whole, batch.teacher_response, end))
        response = jnp.where(whole, batch.response, inside.size)
        batch = replace(batch, tokens=tokens, response=response)
        params, scorer = with_adapters(base, trained, lora), None

        def read(hidden: jax.Array) -> jax.Array:
            return jnp.where(inside[:, None], hidden, 0)

        reads = [read(of_student.hidden(cast(params, how["dtype"]), tokens))]
        if teacher and judging is not None:
            judging = sharded_for_training(judging, teacher)
            of_teacher = functions(teacher).hidden
            hidden = response_hidden(judging, batch.for_teacher(), hidden=of_teacher)
            # Of a sequence of its own it is looked at where it scores the student's tokens.
            shared = batch.teacher_tokens is None
            reads.append(read(of_teacher(judging, tokens)) if shared else hidden)
            scorer = Teacher(hidden, model.head_params(judging))
        scores = score(params, scorer, batch, **how)
        sums = objective_sums(scores, batch, objective=objective)
        gradient = jax.grad(
            lambda x: loss_and_sums(with_adapters(base, x, lora), scorer, batch, **how)[0]
        )(trained)
        values = [
            *reads,
            *(scores.student_logprob, scores.teacher_logprob, scores.divergence),
            sums.weight_by_turn,
        ]
        return replicate(jax.tree.map(lambda x: jnp.isfinite(x).all(), (values, gradient)))

    readers = ("student", "teacher")[: 2 if teacher else 1]
    names = [f"the {who}'s hidden state" for who in readers]
    names += [f"the {who}'s log-probability" for who in ("student", "teacher")]
    names += ["the divergence", "the weight"]

    def find(
        trained: Params, base: Params | None, judging: Params | None, batch: Batch, most: int
    ) -> list[Place]:
        found: list[Place] = []
        B, T = batch.tokens.shape

        def first(row: int, count: int) -> str:
            """The first value that is not finite in a row's first tokens; "" if all are finite."""
            copies = jax.tree.map(lambda x: np.repeat(x[row][None], shards("batch"), axis=0), batch)
            checked = program(trained, base, judging, shard_batch(copies), np.int32(count))
            values, gradient = jax.device_get(checked)
            for name, fine in zip(names, values, strict=True):
                if not fine:
                    return name
            bad = [path for path, fine in jax.tree.leaves_with_path(gradient) if not fine]
            leaves = [f"`{jax.tree_util.keystr(p, simple=True, separator='/')}`" for p in bad]
            return f"only the gradient, of {', '.join(leaves)}" if leaves else ""

        for row in range(B):
            if len(found) < most and first(row, T):
                # The fewest tokens that are not finite; with more the row is not either.
                count = bisect_right(range(T), "", key=partial(first, row))
                found.append(Place(row, count - 1, first(row, count or T)))
        return found

    return find
