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
from opd_jax.runtime.mesh import shard_batch, shards

# (conversations, updates done) to `Verdict` codes int32 [B, K] and metrics as (sum, count).
Labeller = Callable[[Sequence[Conversation], int], tuple[np.ndarray, dict[str, Any]]]


def no_judge(*, max_turns: int) -> Labeller:
    """Every turn is STRONG, as in plain OPD and fine-tuning."""

    def label(conversations: Sequence[Conversation], update: int):
        return np.full((len(conversations), max_turns), Verdict.STRONG, np.int32), {}

    return label


def teacher_judge(params: Params, *, by: Judge, max_turns: int) -> Labeller:
    """The teacher's verdicts. Every `agreement_every` updates the other decoding is asked too."""
    how = by.settings
    (other,) = DECODINGS.keys() - {how.decode}
    by_other = replace(by, settings=replace(how, decode=other))

    def label(conversations: Sequence[Conversation], update: int):
        labels = env_labels(conversations, max_turns=max_turns)
        judgement = judge_turns(params, conversations, labels, by=by)
        metrics = judge_metrics(judgement, labels)
        if how.agreement_every and update % how.agreement_every == 0:
            second = judge_turns(params, conversations, labels, by=by_other)
            answered = judgement.asked & ~judgement.unparsable & ~second.unparsable
            same = (second.verdict == judgement.verdict) & answered
            metrics["judge/decodings_agree"] = (same.sum(), answered.sum())
            metrics[f"judge/unparsable_{other}"] = (second.unparsable.sum(), second.asked.sum())
        return judgement.verdict, metrics

    return label


def judge_turns(
    params: Params, conversations: Sequence[Conversation], labels: EnvLabels, *, by: Judge
) -> Judgement:
    """Verdicts for every turn of every conversation; `labels` are the environment's of the same.

    Raises:
      ValueError: a question and its answer exceed the teacher's positions.

    Source: arXiv 2606.19659, section 3.3. Constrained decoding is ours.
    """
    asked = labels.played & ~labels.failed
    verdict = np.where(labels.failed, Verdict.DET_FAIL, Verdict.SKIP).astype(np.int32)
    unparsable = np.zeros_like(asked)
    ask = _after_conversations if by.settings.context == "history" else _one_by_one
    for place, label in ask(params, conversations, asked, by=by):
        unparsable[place] = label == UNPARSABLE
        verdict[place] = Verdict.STRONG if label == UNPARSABLE else label
    return Judgement(verdict, asked, unparsable)


Place = tuple[int, int]  # (row of the batch, turn)


def _one_by_one(
    params: Params, conversations: Sequence[Conversation], asked: np.ndarray, *, by: Judge
) -> Iterator[tuple[Place, int]]:
    """A label for each turn asked about; questions of similar length share a batch."""
    questions = {
        (row, index): by.question(conversations[row], index)
        for row, index in np.argwhere(asked).tolist()
    }
    order = sorted(questions, key=lambda place: len(questions[place]))
    size, answer = by.settings.batch, DECODINGS[by.settings.decode]
    for start in range(0, len(order), size):
        places = order[start : start + size]
        rows = [questions[place] for place in places] + [[]] * (size - len(places))
        longest = max(map(len, rows))
        width = _multiple(longest, by.settings.length_multiple)
        slots = width + _answer_room(longest, by)
        cache = empty_cache(params, by.model, rows=size, slots=slots)
        labels, _ = answer(params, cache, *padded(rows, width=width), by=by)
        yield from zip(places, labels, strict=False)


def _after_conversations(
    params: Params, conversations: Sequence[Conversation], asked: np.ndarray, *, by: Judge
) -> Iterator[tuple[Place, int]]:
    """A label for each turn asked about; each conversation is prefilled once.

    Turns go from the last to the first: the cache is rolled back to the end of a turn, and the
    question is written over what followed.
    """
    rows = [row for row in range(len(conversations)) if asked[row].any()]
    size = min(by.settings.batch, _multiple(len(conversations), shards("batch")))
    answer = DECODINGS[by.settings.decode]
    for start in range(0, len(rows), size):
        slots = {row: slot for slot, row in enumerate(rows[start : start + size])}
        turns = {row: np.flatnonzero(asked[row]).tolist() for row in slots}
        questions = {(r, n): by.question(conversations[r], n) for r in slots for n in turns[r]}
        ends = {(r, n): conversations[r].spans[n][1] for r, n in questions}
        prefixes = [by.prefix(conversations[row], turns[row][-1]) for row in slots]
        width = _multiple(max(map(len, questions.values())), by.settings.length_multiple)
        longest = max(ends[place] + len(question) for place, question in questions.items())
        room = max(map(len, prefixes)) + width + _answer_room(longest, by)
        cache = _read(params, prefixes, rows=size, room=room, by=by)
        while places := [(row, turns[row].pop()) for row in slots if turns[row]]:
            lengths = np.zeros(size, np.int32)
            asking: list[list[int]] = [[] for _ in range(size)]
            for place in places:
                slot = slots[place[0]]
                lengths[slot], asking[slot] = ends[place], questions[place]
            cache = replace(cache, lengths=shard_batch(lengths))
            labels, cache = answer(params, cache, *padded(asking, width=width), by=by)
            yield from ((place, labels[slots[place[0]]]) for place in places)


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


def _answer_room(longest: int, by: Judge) -> int:
    """Slots for an answer; raises if the `longest` prompt leaves too few positions for them."""
    room = by.answer_tokens
    if longest + room > by.model.max_positions:
        raise ValueError(
            f"`judge`: a prompt of {longest} tokens and {room} more exceed the teacher's "
            f"{by.model.max_positions} positions; lower `judge.admissible_shown`, or "
            "`rollout.context_tokens` with `judge.context` = history"
        )
    return room


def _multiple(length: int, of: int) -> int:
    """The least multiple of `of` that is not below `length`."""
    return -(-length // of) * of
