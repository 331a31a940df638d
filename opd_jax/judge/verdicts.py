"""The verdict on every turn of a batch of conversations: the judge's, or STRONG without a judge.

A turn that failed deterministically gets `Verdict.DET_FAIL`, and the judge is not asked. The
teacher judges the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.session import empty_cache, padded
from opd_jax.judge.agreement import judge_metrics
from opd_jax.judge.answer import DECODINGS, UNPARSABLE, Judge
from opd_jax.judge.labels import EnvLabels, Judgement, env_labels
from opd_jax.losses import Verdict
from opd_jax.model import KVCache, Params
from opd_jax.runtime import processes
from opd_jax.runtime.mesh import shard_batch, shards

# (conversations, updates done) to `Verdict` codes int32 [B, K] and metrics as (sum, count).
Labeller = Callable[[Sequence[Conversation], int], tuple[np.ndarray, dict[str, Any]]]


def no_judge(*, max_turns: int) -> Labeller:
    """Every turn is STRONG, as in plain OPD and fine-tuning."""

    def label(conversations: Sequence[Conversation], update: int):
        return np.full((len(conversations), max_turns), Verdict.STRONG, np.int32), {}

    return label


def teacher_judge(
    params: Params, *, by: Judge, max_turns: int, between: Callable[[], None] | None = None
) -> Labeller:
    """The teacher's verdicts. Every `agreement_every` updates the other decoding is asked too.

    For `between` see `judge_turns`.
    """
    how = by.settings
    (other,) = DECODINGS.keys() - {how.decode}
    by_other = replace(by, settings=replace(how, decode=other))

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        judgement = judge_turns(params, conversations, labels, by=by, between=between)
        if update == 0:  # later it is one bad batch, and a resumed run is to go on like any other
            check_some_fit(judgement)
        metrics = judge_metrics(judgement, labels)
        if how.agreement_every and update % how.agreement_every == 0:
            second = judge_turns(params, conversations, labels, by=by_other, between=between)
            both = judgement.asked & ~judgement.unparsable & ~second.unparsable
            same = (second.verdict == judgement.verdict) & both
            metrics["judge/decodings_agree"] = (same.sum(), both.sum())
            metrics[f"judge/unparsable_{other}"] = (second.unparsable.sum(), second.asked.sum())
        return judgement.verdict, metrics

    return label


def judge_turns(
    params: Params,
    conversations: Sequence[Conversation],
    labels: EnvLabels,
    *,
    by: Judge,
    between: Callable[[], None] | None = None,
) -> Judgement:
    """Verdicts for every turn of every conversation; `labels` are the environment's of the same.

    A question that, with its answer, exceeds the teacher's positions is not asked; it counts as
    unparsable. `between` is called after every batch of questions; what it raises ends the judging.

    Source: arXiv 2606.19659, section 3.3. Constrained decoding is ours.
    """
    asked = labels.played & ~labels.failed
    verdict = np.where(labels.failed, Verdict.DET_FAIL, Verdict.SKIP).astype(np.int32)
    unparsable, too_long = np.zeros_like(asked), np.zeros_like(asked)
    questions: Questions = {}
    room = by.model.max_positions - by.answer_tokens
    for row, turn in np.argwhere(asked).tolist():
        question = by.question(conversations[row], turn)
        length = len(by.prefix(conversations[row], turn)) + len(question)
        if length <= room:
            questions[row, turn] = question
        else:
            too_long[row, turn] = True
            _warn(conversations[row], length, by=by)
    ask = _after_conversations if by.settings.context == "history" else _one_by_one
    for answers in ask(params, conversations, questions, by=by):
        for place, label in answers:
            unparsable[place] = label == UNPARSABLE
            verdict[place] = label
        if between:
            between()
    unparsable |= too_long
    verdict[unparsable] = Verdict.STRONG
    return Judgement(verdict, asked, unparsable, too_long)


def check_some_fit(judgement: Judgement) -> None:
    """Checks that not every question was too long; ValueError otherwise."""
    if judgement.asked.any() and (judgement.too_long == judgement.asked).all():
        raise ValueError(
            f"`judge`: none of {judgement.asked.sum()} questions fits the teacher's positions; "
            f"{REMEDY}"
        )


REMEDY = (
    "lower `judge.admissible_shown`, or `rollout.context_tokens` with `judge.context` = history"
)


def _warn(conversation: Conversation, length: int, *, by: Judge) -> None:
    name = conversation.task.id if conversation.task else ""
    processes.warn(
        f"`judge`: turns of {name} count as unparsable, since a question of {length} tokens and "
        f"{by.answer_tokens} more exceed the teacher's {by.model.max_positions} positions; {REMEDY}"
    )


Place = tuple[int, int]  # (row of the batch, turn)
Questions = dict[Place, list[int]]
Answers = list[tuple[Place, int]]  # a batch of labels


def _one_by_one(
    params: Params, conversations: Sequence[Conversation], questions: Questions, *, by: Judge
) -> Iterator[Answers]:
    """A label for each question; those of similar length share a batch."""
    order = sorted(questions, key=lambda place: len(questions[place]))
    size, answer = by.settings.batch, DECODINGS[by.settings.decode]
    for start in range(0, len(order), size):
        places = order[start : start + size]
        rows = [questions[place] for place in places] + [[]] * (size - len(places))
        width = _multiple(max(map(len, rows)), by.settings.length_multiple)
        cache = empty_cache(params, by.model, rows=size, slots=width + by.answer_tokens)
        labels, _ = answer(params, cache, *padded(rows, width=width), by=by)
        yield list(zip(places, labels, strict=False))


def _after_conversations(
    params: Params, conversations: Sequence[Conversation], questions: Questions, *, by: Judge
) -> Iterator[Answers]:
    """A label for each question; each conversation is prefilled once.

    Turns go from the last to the first: the cache is rolled back to the end of a turn, and the
    question is written over what followed.
    """
    rows = sorted({row for row, _ in questions})
    size = min(by.settings.batch, _multiple(len(conversations), shards("batch")))
    answer = DECODINGS[by.settings.decode]
    for start in range(0, len(rows), size):
        slots = {row: slot for slot, row in enumerate(rows[start : start + size])}
        places_of = {row: sorted(place for place in questions if place[0] == row) for row in slots}
        prefixes = [by.prefix(conversations[row], places_of[row][-1][1]) for row in slots]
        here = [len(questions[place]) for row in slots for place in places_of[row]]
        width = _multiple(max(here), by.settings.length_multiple)
        room = max(map(len, prefixes)) + width + by.answer_tokens
        cache = _read(params, prefixes, rows=size, room=room, by=by)
        while places := [places_of[row].pop() for row in slots if places_of[row]]:
            lengths = np.zeros(size, np.int32)
            asking: list[list[int]] = [[] for _ in range(size)]
            for row, turn in places:
                slot = slots[row]
                lengths[slot] = conversations[row].spans[turn][1]
                asking[slot] = questions[row, turn]
            cache = replace(cache, lengths=shard_batch(lengths))
            labels, cache = answer(params, cache, *padded(asking, width=width), by=by)
            yield [(place, labels[slots[place[0]]]) for place in places]


def _read(
    params: Params, prefixes: Sequence[Sequence[int]], *, rows: int, room: int, by: Judge
) -> KVCache:
    """A cache of at least `room` slots a row, with a prefix in each of its first rows."""
    width, sharded = by.settings.length_multiple, model.is_sharded(params)
    # Few cache sizes, since each is a program to compile.
    cache = empty_cache(params, by.model, rows=rows, slots=_multiple(room, 4 * width))
    filled = [*prefixes, *[[]] * (rows - len(prefixes))]
    for start in range(0, max(map(len, prefixes)), width):
        new = shard_batch(padded([row[start : start + width] for row in filled], width=width))
        cache = gen.extend(params, cache, *new, config=by.model, sharded=sharded)
    return cache


def _multiple(length: int, of: int) -> int:
    """The least multiple of `of` that is not below `length`."""
    return -(-length // of) * of
