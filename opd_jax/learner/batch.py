"""What one update consumes, as arrays: tokens, turns, verdicts, the places of student tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax.agent.conversation import Trajectory
from opd_jax.losses import NO_TURN
from opd_jax.runtime.mesh import constrain

# What a batch holds: numpy's on the host, jax's under `jit`.
Array = jax.Array | np.ndarray


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
