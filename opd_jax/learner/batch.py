"""The arrays that one update consumes: tokens, turns, verdicts, positions of student tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax.agent.conversation import Conversation
from opd_jax.losses import NO_TURN
from opd_jax.runtime.mesh import constrain

# A batch holds numpy arrays on the host and jax arrays under `jit`.
Array = jax.Array | np.ndarray


@struct.dataclass
class Batch:
    """What one update consumes: B rows, padded on the right.

    Attributes:
      tokens: int32 [B, T]; padding is 0.
      turn_id: int32 [B, T]; k for a token to learn that was sampled in turn k, else `NO_TURN`.
      sampled_logprobs: float32 [B, T], nats, as sampled; compared with the recomputed ones.
      verdict: int32 [B, K], codes of `Verdict`.
      response: int32 [B, R], positions of the student's tokens, ascending; T where a row has
        fewer. Most tokens are observations. Gathering the student's tokens first saves most of the
        vocabulary-sized work.
      labels: what else is said of turns, name to float32 [B, K] (`weighing.LABELS`).
      actor: int32 [B, K], who wrote a turn, codes of `Actor`; None: the student wrote all that is
        learnt.
      teacher_tokens: int32 [B, T'], the rows as the teacher reads them; None: the same as the
        student.
      teacher_response: int32 [B, R], where the student's tokens are in those; T' where a row has
        fewer.
    """

    tokens: Array
    turn_id: Array
    sampled_logprobs: Array
    verdict: Array
    response: Array
    labels: dict[str, Array] = struct.field(default_factory=dict)
    actor: Array | None = None
    teacher_tokens: Array | None = None
    teacher_response: Array | None = None

    def for_teacher(self) -> "Batch":
        """The batch as the teacher reads it."""
        if self.teacher_tokens is None or self.teacher_response is None:
            return self
        own = self.for_student()
        return dataclasses.replace(own, tokens=self.teacher_tokens, response=self.teacher_response)

    def for_student(self) -> "Batch":
        """The batch without what only the teacher reads."""
        return dataclasses.replace(self, teacher_tokens=None, teacher_response=None)


def pack(
    conversations: Sequence[Conversation],
    verdict: np.ndarray,
    *,
    length_multiple: int,
    response_multiple: int,
    vocab_size: int,
    labels: Mapping[str, np.ndarray] | None = None,
    actor: np.ndarray | None = None,
    teacher_rows: Sequence[Conversation] | None = None,
) -> Batch:
    """Conversations and their verdicts as a batch.

    T and R are the longest lengths, at least 1, rounded up to a multiple: few shapes, few compiled
    programs (`responses` gives R alone). An episode whose environment broke carries no loss.

    Args:
      conversations: B of them, at least one.
      verdict: int32 [B, K].
      length_multiple: T is a multiple of this.
      response_multiple: R is a multiple of this, but at most T.
      vocab_size: every token has to be below it.
      labels: what else is said of turns, name to float32 [B, K].
      actor: see `Batch`.
      teacher_rows: the conversations as the teacher reads them, with the same student's tokens;
        None: as they are.

    Raises:
      ValueError: tokens, turns or log-probabilities that are out of range. The message names the
        field and the first row.
    """
    shape = len(conversations), padded_length(conversations, length_multiple)
    tokens = np.zeros(shape, np.int32)
    turn_id = np.full(shape, NO_TURN, np.int32)
    logprobs = np.zeros(shape, np.float32)
    for row, c in enumerate(conversations):
        tokens[row, : len(c.tokens)] = c.tokens
        if not c.broken:
            turn_id[row, : len(c.tokens)] = c.turn_id
            logprobs[row, : len(c.tokens)] = c.logprobs
    response = _response(turn_id != NO_TURN, response_multiple)
    batch = Batch(tokens, turn_id, logprobs, verdict, response, dict(labels or {}), actor)
    if teacher_rows is not None:
        batch = _with_teacher_rows(batch, teacher_rows, length_multiple)
    _check(batch, vocab_size)
    return batch


def _with_teacher_rows(batch: Batch, rows: Sequence[Conversation], multiple: int) -> Batch:
    """Adds what the teacher reads, in as many slots for the student's tokens."""
    length = max(padded_length(rows, multiple), batch.tokens.shape[1])
    tokens, student = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for row, c in enumerate(rows):
        tokens[row, : len(c.tokens)] = c.tokens
        student[row, : len(c.tokens)] = np.array(c.turn_id) != NO_TURN if not c.broken else False
    response = _positions(student, batch.response.shape[1])
    mine, theirs = (_taken(*read) for read in ((batch.tokens, batch.response), (tokens, response)))
    if not np.array_equal(mine, theirs):
        row = int(np.argwhere(mine != theirs)[0, 0])
        raise ValueError(
            f"`teacher_rows`: row {row} has other tokens of the student's than the conversation"
        )
    return dataclasses.replace(batch, teacher_tokens=tokens, teacher_response=response)


def _taken(tokens: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The tokens in the response slots, −1 in unfilled ones."""
    padded = np.pad(tokens, [(0, 0), (0, 1)], constant_values=-1)
    return np.take_along_axis(padded, response, axis=1)


def responses(
    conversations: Sequence[Conversation], *, length_multiple: int, response_multiple: int
) -> np.ndarray:
    """The `Batch.response` of conversations, before they have verdicts; arguments as in `pack`."""
    student = np.zeros((len(conversations), padded_length(conversations, length_multiple)), bool)
    for row, c in zip(student, conversations, strict=True):
        if not c.broken:
            row[: len(c.turn_id)] = np.array(c.turn_id) != NO_TURN
    return _response(student, response_multiple)


def padded_length(conversations: Sequence[Conversation], multiple: int) -> int:
    """T of packed conversations."""
    longest = max(1, *(len(c.tokens) for c in conversations))  # all may have ended at `reset`
    return -(-longest // multiple) * multiple


def _response(student: np.ndarray, multiple: int) -> np.ndarray:
    """The positions where `student` [B, T] is true, int32 [B, R], filled up with T."""
    most = max(int(student.sum(axis=1).max()), 1)
    return _positions(student, min(-(-most // multiple) * multiple, student.shape[1]))


def _positions(student: np.ndarray, R: int) -> np.ndarray:
    """The positions where `student` [B, T] is true, in R slots."""
    T, counts = student.shape[1], student.sum(axis=1)
    # A stable sort brings the student's positions to the front in their order.
    order = np.argsort(~student, axis=1, kind="stable")[:, :R]
    return np.where(np.arange(R) < counts[:, None], order, T).astype(np.int32)


def _check(batch: Batch, vocab_size: int) -> None:
    """Checks on the host what the compiled update takes for granted."""
    tokens, turn_id, logprobs = batch.tokens, batch.turn_id, batch.sampled_logprobs
    K = batch.verdict.shape[1]
    rules = {
        "tokens": ((tokens < 0) | (tokens >= vocab_size), f"expected 0..{vocab_size - 1}"),
        "turn_id": ((turn_id < NO_TURN) | (turn_id >= K), f"expected {NO_TURN}..{K - 1}"),
        "turn_id[:, 0]": (turn_id[:, :1] != NO_TURN, "nothing precedes the first token"),
        "sampled_logprobs": (
            ~(np.isfinite(logprobs) & (logprobs <= 0)),
            "expected finite log-probabilities, at most 0",
        ),
    }
    if (told := batch.teacher_tokens) is not None:
        rules["teacher_tokens"] = (told < 0) | (told >= vocab_size), rules["tokens"][1]
    for name, (wrong, expected) in rules.items():
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(f"`{name}` of row {row}, position {column}: {expected}")


def split_rows(tree: Any, parts: int) -> Any:
    """Splits every array into micro-batches: [B, ...] -> [parts, B/parts, ...].

    A part takes every parts-th row, so that each device has its share of every part.

    Raises:
      ValueError: B is not a multiple of `parts`.
    """

    def part(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        if rows % parts:
            raise ValueError(
                f"`train.micro_batches`: a batch of {rows} rows does not divide into {parts} "
                f"micro-batches; choose a divisor of {rows}"
            )
        apart = jnp.moveaxis(jnp.reshape(x, (rows // parts, parts, *x.shape[1:])), 1, 0)
        return constrain(apart, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(part, tree)


def alike(rows: Sequence[Conversation], parts: int) -> list[int]:
    """An order in which each of so many micro-batches has rows of like length, the longest first.

    Rows that are one micro-batch, or do not divide into them, stay where they are.
    """
    if parts == 1 or len(rows) % parts:
        return list(range(len(rows)))
    longest = sorted(range(len(rows)), key=lambda row: -len(rows[row].tokens))
    return np.reshape(longest, (parts, -1)).T.ravel().tolist()  # `split_rows` deals them out again


def half(batch: Batch) -> Batch:
    """The first half of all positions and of all response slots."""
    T, R = batch.tokens.shape[1] // 2, batch.response.shape[1] // 2
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[:, :T],
        turn_id=batch.turn_id[:, :T],
        sampled_logprobs=batch.sampled_logprobs[:, :T],
        response=batch.response[:, :R],
    )


def fits_half(response: Array, length: int) -> Any:
    """Whether `half` keeps every token in `response` [..., b, R], of rows of `length` positions.

    The model is causal, so nothing after a micro-batch's last response token has to be computed.
    """
    slots = response.shape[-1]
    late = (response >= length // 2) | (np.arange(slots) >= slots // 2)
    return ~((response < length) & late).any(axis=(-2, -1))


def merge_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows` for one array: [parts, B/parts, ...] -> [B, ...]."""
    parts, rows = x.shape[:2]
    together = jnp.reshape(jnp.moveaxis(x, 0, 1), (parts * rows, *x.shape[2:]))
    return constrain(together, "batch", *(None,) * (x.ndim - 2))


def num_parts(batch: Batch, *, micro_batches: int, batch_rows: int | None) -> int:
    """How many micro-batches a batch has: `micro_batches` for `batch_rows` rows.

    n times the rows give n times the parts. `batch_rows` are the rows of a batch in which each
    episode is one row; None gives every batch `micro_batches` parts.
    """
    return micro_batches * (len(batch.tokens) // batch_rows if batch_rows else 1)
