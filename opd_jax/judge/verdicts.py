"""The judge's verdict on every turn of a batch of conversations.

A turn that failed deterministically gets `Verdict.DET_FAIL`, and the judge is not asked. The
teacher judges the others. `prompt` writes the question, and `answer` reads the reply.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.conversation import Conversation
from opd_jax.judge.answer import UNPARSABLE, generate_labels, label_tokens, score_labels
from opd_jax.judge.labels import env_labels
from opd_jax.judge.prompt import Judge
from opd_jax.losses import Verdict
from opd_jax.model import KVCache, Params
from opd_jax.runtime.mesh import shard_batch, shards


@dataclass(frozen=True)
class Judgement:
    """What the judge said of a batch of conversations.

    Attributes:
      verdict: int32 [B, K], `Verdict` codes; SKIP if there is no turn or the environment broke. An
        unparsable answer is STRONG, the conservative reading.
      asked: bool [B, K], turns that reached the judge.
      unparsable: bool [B, K], answers with none or several of the three words.
    """

    verdict: np.ndarray
    asked: np.ndarray
    unparsable: np.ndarray


def judge_turns(
    params: Params,
    conversations: Sequence[Conversation],
    *,
    by: Judge,
    max_turns: int,
    decode: str,
) -> Judgement:
    """Verdicts for every turn of every conversation.

    `decode`, "constrained" or "generate", replaces `by.settings.decode`. `max_turns` is K.

    Raises:
      ValueError: a question and its answer exceed the teacher's positions.

    Source: arXiv 2606.19659, section 3.3. Constrained decoding is ours.
    """
    labels = env_labels(conversations, max_turns=max_turns)
    asked = labels.played & ~labels.failed
    verdict = np.where(labels.failed, Verdict.DET_FAIL, Verdict.SKIP).astype(np.int32)
    unparsable = np.zeros_like(asked)
    ask = _after_conversations if by.settings.context == "history" else _one_by_one
    for place, label in ask(params, conversations, asked, by=by, decode=decode):
        unparsable[place] = label == UNPARSABLE
        verdict[place] = Verdict.STRONG if label == UNPARSABLE else label
    return Judgement(verdict, asked, unparsable)


Place = tuple[int, int]  # (row of the batch, turn)


def _one_by_one(
    params: Params,
    conversations: Sequence[Conversation],
    asked: np.ndarray,
    *,
    by: Judge,
    decode: str,
) -> Iterator[tuple[Place, int]]:
    """A label for each turn asked about; questions of similar length share a batch."""
    questions = {
        (int(row), int(index)): by.question(conversations[row], int(index))
        for row, index in np.argwhere(asked)
    }
    order = sorted(questions, key=lambda place: len(questions[place]))
    for start in range(0, len(order), by.settings.batch):
        places = order[start : start + by.settings.batch]
        rows: list[list[int]] = [[] for _ in range(by.settings.batch)]
        rows[: len(places)] = [questions[place] for place in places]
        tokens, counts = _padded(rows, by)
        _check_room(int(counts.max()), by, decode)
        slots = tokens.shape[1] + _answer_tokens(by, decode)
        cache = _empty_cache(params, by, rows=by.settings.batch, slots=slots)
        labels, _ = _answer(params, cache, tokens, counts, by=by, decode=decode)
        yield from zip(places, labels, strict=False)


def _after_conversations(
    params: Params,
    conversations: Sequence[Conversation],
    asked: np.ndarray,
    *,
    by: Judge,
    decode: str,
) -> Iterator[tuple[Place, int]]:
    """A label for each turn asked about; each conversation is prefilled once.

    Turns go from the last to the first: the cache is rolled back to the end of a turn, and the
    question is written over what followed.
    """
    rows = [row for row in range(len(conversations)) if asked[row].any()]
    size = min(by.settings.batch, -(-len(conversations) // shards("batch")) * shards("batch"))
    for start in range(0, len(rows), size):
        slots = {row: slot for slot, row in enumerate(rows[start : start + size])}
        turns = {row: np.flatnonzero(asked[row]).tolist() for row in slots}
        questions = {(r, n): by.question(conversations[r], n) for r in slots for n in turns[r]}
        prefixes = [by.prefix(conversations[row], turns[row][-1]) for row in slots]
        width = _padded(list(questions.values()), by)[0].shape[1]
        ends = {(r, n): conversations[r].spans[n][1] for r, n in questions}
        _check_room(max(ends[place] + len(q) for place, q in questions.items()), by, decode)
        room = max(map(len, prefixes)) + width + _answer_tokens(by, decode)
        cache = _read(params, prefixes, rows=size, room=room, by=by)
        while places := [(row, turns[row].pop()) for row in slots if turns[row]]:
            lengths = np.zeros(size, np.int32)
            asking: list[list[int]] = [[] for _ in range(size)]
            for row, index in places:
                lengths[slots[row]] = ends[row, index]
                asking[slots[row]] = questions[row, index]
            tokens, counts = _padded(asking, by, width=width)
            cache = replace(cache, lengths=shard_batch(lengths))
            labels, cache = _answer(params, cache, tokens, counts, by=by, decode=decode)
            yield from ((place, labels[slots[place[0]]]) for place in places)


def _read(
    params: Params, prefixes: Sequence[Sequence[int]], *, rows: int, room: int, by: Judge
) -> KVCache:
    """A cache of at least `room` slots a row, with a prefix in each of its first rows."""
    width, sharded = by.settings.length_multiple, model.is_sharded(params)
    coarse = 4 * width  # few shapes, since each is a program to compile
    cache = _empty_cache(params, by, rows=rows, slots=-(-room // coarse) * coarse)
    for start in range(0, max(map(len, prefixes)), width):
        tokens = np.zeros((rows, width), np.int32)
        counts = np.zeros(rows, np.int32)
        for row, prefix in enumerate(prefixes):
            piece = prefix[start : start + width]
            tokens[row, : len(piece)], counts[row] = piece, len(piece)
        new = shard_batch((tokens, counts))
        cache = gen.extend(params, cache, *new, config=by.model, sharded=sharded)
    return cache


def _answer(
    params: Params,
    cache: KVCache,
    tokens: np.ndarray,
    counts: np.ndarray,
    *,
    by: Judge,
    decode: str,
) -> tuple[list[int], KVCache]:
    """A label for each row's question; the cache is donated."""
    if decode == "constrained":
        return score_labels(params, cache, tokens, counts, config=by.model, tokenizer=by.tokenizer)
    return generate_labels(
        params,
        cache,
        tokens,
        counts,
        config=by.model,
        tokenizer=by.tokenizer,
        stop_ids=by.chat.stop_ids,
        max_new_tokens=by.settings.max_new_tokens,
    )


def _answer_tokens(by: Judge, decode: str) -> int:
    """Slots that an answer takes."""
    if decode == "generate":
        return by.settings.max_new_tokens
    return label_tokens(by.tokenizer)[0].shape[1]


def _check_room(longest: int, by: Judge, decode: str) -> None:
    """Raises if the `longest` question, with what precedes it, leaves no room for its answer."""
    room = _answer_tokens(by, decode)
    if longest + room > by.model.max_positions:
        raise ValueError(
            f"`judge`: a prompt of {longest} tokens and {room} more exceed the teacher's "
            f"{by.model.max_positions} positions; lower `judge.admissible_shown`, or "
            "`rollout.context_tokens` with `judge.context` = history"
        )


def _padded(
    questions: Sequence[Sequence[int]], by: Judge, *, width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Questions as int32 [rows, width], and their lengths; by default the width fits all."""
    counts = np.array([len(question) for question in questions], np.int32)
    width = (
        width or -(-int(counts.max()) // by.settings.length_multiple) * by.settings.length_multiple
    )
    tokens = np.zeros((len(questions), width), np.int32)
    for row, question in enumerate(questions):
        tokens[row, : len(question)] = question
    return tokens, counts


def _empty_cache(params: Params, by: Judge, *, rows: int, slots: int) -> KVCache:
    return model.init_cache(
        by.model,
        batch=rows,
        slots=slots,
        dtype=params["embed"].dtype,
        layout=model.backend_cache_layout(),
    )
