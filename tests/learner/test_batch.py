"""Packing conversations into the arrays of an update, and splitting those into micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_batch import B, K, T, conversations, make_batch

from opd_jax.agent.conversation import Conversation
from opd_jax.envs.base import BROKEN
from opd_jax.learner.batch import (
    Batch,
    alike,
    fits_half,
    half,
    merge_rows,
    num_parts,
    pack,
    split_rows,
)
from opd_jax.losses import NO_TURN

VERDICT = np.array([[1, 2, 0], [2, 0, 0]], np.int32)


def two_turns() -> Conversation:
    """Three given tokens, two sampled, one given, one sampled."""
    c = Conversation(None)
    c.append_given([5, 6, 7])
    c.append_response([8, 9], [-0.5, -0.25], 0)
    c.append_given([4])
    c.append_response([3], [-1.0], 1)
    return c


def one_turn() -> Conversation:
    c = Conversation(None)
    c.append_given([1])
    c.append_response([2], [-2.0], 0)
    return c


def packed(*conversations: Conversation, vocab_size: int = 10) -> Batch:
    return pack(
        conversations or (two_turns(), one_turn()),
        VERDICT,
        length_multiple=4,
        response_multiple=2,
        vocab_size=vocab_size,
    )


def test_what_the_teacher_reads_by_hand() -> None:
    told = two_turns()
    told.tokens[:0], told.turn_id[:0] = [1, 1], [NO_TURN] * 2
    told.logprobs[:0] = [0.0] * 2
    batch = pack(
        (two_turns(), one_turn()),
        VERDICT,
        length_multiple=4,
        response_multiple=2,
        vocab_size=10,
        labels={"reliability": np.float32([[1, 0], [0, 1]])},
        teacher_rows=(told, one_turn()),
    )
    np.testing.assert_array_equal(
        batch.teacher_tokens, [[1, 1, 5, 6, 7, 8, 9, 4, 3, 0, 0, 0], [1, 2, *[0] * 10]]
    )
    np.testing.assert_array_equal(batch.teacher_response, [[5, 6, 8, 12], [1, 12, 12, 12]])
    np.testing.assert_array_equal(batch.labels["reliability"], [[1, 0], [0, 1]])
    theirs, mine = batch.for_teacher(), batch.for_student()
    np.testing.assert_array_equal(theirs.tokens, batch.teacher_tokens)
    np.testing.assert_array_equal(theirs.response, batch.teacher_response)
    assert mine.tokens is batch.tokens
    assert theirs.teacher_tokens is None is mine.teacher_tokens


def test_a_batch_by_hand() -> None:
    want = {
        # The longest has 7 tokens; the next multiple of 4 is 8.
        "tokens": np.int32([[5, 6, 7, 8, 9, 4, 3, 0], [1, 2, 0, 0, 0, 0, 0, 0]]),
        "turn_id": np.int32([[-1, -1, -1, 0, 0, -1, 1, -1], [-1, 0, -1, -1, -1, -1, -1, -1]]),
        "sampled_logprobs": np.float32([[0, 0, 0, -0.5, -0.25, 0, -1, 0], [0, -2, *[0] * 6]]),
        "verdict": VERDICT,
        # Three student tokens at most, rounded up to 4; 8 is one past the end.
        "response": np.int32([[3, 4, 6, 8], [1, 8, 8, 8]]),
    }
    got = vars(packed())
    # Nothing else is said of turns, and the teacher reads what the student does.
    rest = {"labels": {}, "actor": None, "teacher_tokens": None, "teacher_response": None}
    assert {name: got[name] for name in got.keys() - want.keys()} == rest
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert got[name].dtype == array.dtype, name


@pytest.mark.parametrize(("multiple", "width"), [(1, 7), (7, 7), (4, 8), (16, 16)])
def test_the_length_is_rounded_up(multiple: int, width: int) -> None:
    assert make_batch(["......0", ".0"], length_multiple=multiple).tokens.shape == (2, width)


@pytest.mark.parametrize(("multiple", "width"), [(1, 7), (5, 10), (8, 8), (64, 12)])
def test_the_response_is_rounded_up_within_the_length(multiple: int, width: int) -> None:
    assert make_batch(response_multiple=multiple).response.shape == (4, width)


def test_a_row_without_student_tokens_points_past_the_end() -> None:
    assert make_batch([".0__", "...."], response_multiple=1).response.tolist() == [[1], [12]]
    assert make_batch(["....", "...."], response_multiple=1).response.tolist() == [[12], [12]]


def test_a_broken_episode_keeps_its_tokens_and_carries_no_loss() -> None:
    broken = replace(two_turns(), end=BROKEN)
    got, want = packed(broken, one_turn()), packed()
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert (got.turn_id[0] == -1).all()
    assert not got.sampled_logprobs[0].any()
    assert got.response.tolist() == [[8, 8], [1, 8]]


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("tokens", 1, -1, r"`tokens` of row 1, position 1: expected 0\.\.9"),
        ("tokens", 0, 10, r"`tokens` of row 1, position 0: expected 0\.\.9"),
        ("turn_id", 1, 3, r"`turn_id` of row 1, position 1: expected -1\.\.2"),
        ("turn_id", 1, -2, r"`turn_id` of row 1, position 1: expected -1\.\.2"),
        ("turn_id", 0, 0, r"`turn_id\[:, 0\]` of row 1, position 0: nothing precedes"),
        ("logprobs", 1, 0.5, "`sampled_logprobs` of row 1, position 1"),
        ("logprobs", 1, np.nan, "`sampled_logprobs` of row 1, position 1"),
        ("logprobs", 1, -np.inf, "expected finite log-probabilities, at most 0"),
    ],
)
def test_what_an_update_must_not_see_is_named(
    name: str, position: int, value: float, message: str
) -> None:
    wrong = one_turn()
    getattr(wrong, name)[position] = value
    with pytest.raises(ValueError, match=message):
        packed(two_turns(), wrong, wrong)  # the first of the wrong rows is named


def test_the_largest_token_is_within_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"`tokens` of row 0, position 4: expected 0\.\.8"):
        packed(vocab_size=9)  # the largest token is 9


def test_micro_batches_take_the_rows_in_turn() -> None:
    batch = make_batch()
    parts = split_rows(batch, 2)
    assert parts.verdict.shape == (2, 2, K)
    np.testing.assert_array_equal(parts.tokens[0], batch.tokens[::2])
    np.testing.assert_array_equal(parts.tokens[1], batch.tokens[1::2])
    for part in (1, 2, 4):
        np.testing.assert_array_equal(
            merge_rows(split_rows(batch.tokens, part)), batch.tokens, err_msg=f"{part} parts"
        )
    with pytest.raises(ValueError, match=r"`train.micro_batches`: a batch of 4 .* into 3"):
        split_rows(batch, 3)


def test_a_batch_of_twice_the_rows_has_twice_the_parts() -> None:
    for batch_rows, parts in ((None, 3), (B, 3), (2, 6), (1, 12)):
        assert num_parts(make_batch(), micro_batches=3, batch_rows=batch_rows) == parts


def test_micro_batches_of_rows_in_order_have_rows_of_like_length() -> None:
    rows = conversations(("....0", "...0", ".0", "..0", ".....0", "......0"))
    for parts in (1, 4):  # one part, or rows that do not divide: as they were
        assert alike(rows, parts) == [0, 1, 2, 3, 4, 5]
    for parts, lengths in ((2, [[7, 6, 5], [4, 3, 2]]), (3, [[7, 6], [5, 4], [3, 2]])):
        order = alike(rows, parts)
        assert sorted(order) == [0, 1, 2, 3, 4, 5]
        got = split_rows(np.array([len(rows[row].tokens) for row in order]), parts)
        assert got.tolist() == lengths
    assert alike(rows[:1] * 4, 2) == [0, 2, 1, 3]  # of equal length: in their order


@pytest.mark.parametrize(
    ("rows", "fits"),
    [
        ((".0.1", "..0..."), True),
        (("..0..0...", "."), True),  # what follows the last response token is not needed
        (("..0...0.", "."), False),  # a response token in the second half
        ((".00000", "."), False),  # more response tokens than half the slots
    ],
)
def test_rows_fit_half_if_their_responses_do(rows: tuple[str, ...], fits: bool) -> None:
    batch = make_batch(rows)
    assert batch.response.shape == (2, 8)
    assert fits_half(batch.response, T) == fits
    part = half(batch)
    assert (part.tokens.shape, part.response.shape) == ((2, T // 2), (2, 4))
    kept = (part.response < T // 2).sum()
    assert ((batch.response < T).sum() == kept) == fits
