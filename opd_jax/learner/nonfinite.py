"""Where a loss or a gradient stops being finite, for `debug.nans`.

One NaN spreads over its row: attention multiplies the values of later tokens by 0, and 0 · NaN is
NaN. So the numbers of a whole row do not say where it began. Here a row is cut, the rest is read as
padding, and bisection finds the shortest cut whose loss or gradient is not finite. That takes some
ten passes over one row, which only a run that ends anyway pays for.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Objective, loss_and_sums, objective_sums, score
from opd_jax.learner.teacher import Teacher, response_hidden, sharded_for_training
from opd_jax.losses import NO_TURN
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
        params, scorer, reads = with_adapters(base, trained, lora), None, []
        tokens = jnp.asarray(batch.tokens)
        reads.append(of_student.hidden(cast(params, how["dtype"]), tokens))
        if teacher and judging is not None:
            judging = sharded_for_training(judging, teacher)
            of_teacher = functions(teacher).hidden
            hidden = response_hidden(judging, batch.for_teacher(), hidden=of_teacher)
            # Of a sequence of its own it is looked at where it scores the student's tokens.
            shared = batch.teacher_tokens is None
            reads.append(of_teacher(judging, tokens) if shared else hidden)
            scorer = Teacher(hidden, model.head_params(judging))
        scores = score(params, scorer, batch, **how)
        sums = objective_sums(scores, batch, objective=objective)
        gradient = jax.grad(
            lambda x: loss_and_sums(with_adapters(base, x, lora), scorer, batch, **how)[0]
        )(trained)
        values = [
            *(jnp.where(jnp.arange(x.shape[1])[:, None] < count, x, 0) for x in reads),
            *(scores.student_logprob, scores.teacher_logprob, scores.divergence),
            sums.weight_by_turn,
        ]
        return replicate(jax.tree.map(lambda x: jnp.isfinite(x).all(), (values, gradient)))

    readers = ("student", "teacher")[: 2 if teacher else 1]
    names = [f"the {who}'s hidden state" for who in readers]
    names += [f"the {who}'s log-probability" for who in ("student", "teacher")]
    names += ["the divergence", "the weight"]

    def first(trained, base, judging, batch: Batch, row: int, count: int) -> str:
        """The first value that is not finite in a row's first tokens; "" if all are finite."""
        part = shard_batch(_cut(batch, row, count))
        checked = program(trained, base, judging, part, np.int32(count))
        values, gradient = jax.device_get(checked)
        for name, fine in zip(names, values, strict=True):
            if not fine:
                return name
        bad = [path for path, fine in jax.tree.leaves_with_path(gradient) if not fine]
        leaves = [f"`{jax.tree_util.keystr(p, simple=True, separator='/')}`" for p in bad]
        return f"only the gradient, of {', '.join(leaves)}" if leaves else ""

    def find(
        trained: Params, base: Params | None, judging: Params | None, batch: Batch, most: int
    ) -> list[Place]:
        found: list[Place] = []
        B, T = batch.tokens.shape
        for row in range(B):
            struck = partial(first, trained, base, judging, batch, row)
            if len(found) < most and struck(T):
                count = _shortest(struck, T)
                found.append(Place(row, count - 1, struck(count or T)))
        return found

    return find


def _shortest(struck: Callable[[int], str], longest: int) -> int:
    """The fewest tokens that are struck, given that `longest` are; more are too."""
    return bisect_left(range(longest), True, key=lambda count: bool(struck(count)))


def _cut(batch: Batch, row: int, count: int) -> Batch:
    """The first `count` tokens of a row, in a batch that has nothing else: a row a device."""
    rows, T = shards("batch"), batch.tokens.shape[1]

    def alone(x: Any, empty: int) -> np.ndarray:
        part = np.full((rows, *x.shape[1:]), empty, x.dtype)
        part[0] = x[row]
        return part

    response = alone(batch.response, T)
    part = Batch(
        tokens=alone(batch.tokens, 0),
        turn_id=alone(batch.turn_id, NO_TURN),
        sampled_logprobs=alone(batch.sampled_logprobs, 0),
        verdict=alone(batch.verdict, 0),
        response=np.where(response < count, response, T).astype(np.int32),
        labels={name: alone(label, 0) for name, label in batch.labels.items()},
    )
    if batch.teacher_tokens is not None and batch.teacher_response is not None:
        length = batch.teacher_tokens.shape[1]
        told = np.where(response < count, alone(batch.teacher_response, length), length)
        part = dataclasses.replace(
            part,
            teacher_tokens=alone(batch.teacher_tokens, 0),
            teacher_response=told.astype(np.int32),
        )
    part.tokens[:, count:], part.turn_id[:, count:] = 0, NO_TURN
    return part
