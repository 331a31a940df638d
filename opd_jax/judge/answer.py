"""A judge, and how it answers a question with one of three words: two decodings over a kept cache.

`score_labels` compares the likelihoods of the words. It always gives a label and needs no loop over
tokens. `generate_labels` is the paper's literal procedure: it searches greedy text for a word. Both
find the questions in a cache, except their last tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.contexts import ContextCache, padded
from opd_jax.agent.conversation import Conversation
from opd_jax.judge.prompt import FIELDS, LABELS, Prompt
from opd_jax.model import KVCache, ModelConfig, Params
from opd_jax.runtime.fields import (
    FIGURES,
    LAYOUT,
    METHOD,
    affects,
    check_choice,
    check_widths,
    check_within,
)
from opd_jax.runtime.mesh import DECODING, replicate, shard_batch

UNPARSABLE = -1
OURS = Prompt()


class Answer(NamedTuple):
    """A judge's answer: its verdict, or `UNPARSABLE`, and a score of each verdict.

    Scores are log-probabilities in nats, float32 [3] (`prompt.LABELS`); None if words were not
    compared.
    """

    label: int
    scores: np.ndarray | None


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how the teacher is asked.

    Attributes:
      by: "teacher"; "oracle", the environment's labels; "record", its rule over the record;
        "failures", what it rejects; or `module:function` (`others`).
      decode: "constrained" or "generate" (`answer`).
      model: a reference to another model that is asked instead of the teacher; "": the teacher.
      prompt: a file with another question and other words (`prompt.read_prompt`); "": the paper's.
      context: see `judge_prompt`; of a file's question it says only whether it follows the history.
      admissible_shown: see `judge_prompt`.
      batch: most questions at a time, each about another conversation.
      extend_widths: ascending widths in which questions are read; one compiled program each.
      prefill_rows: rows of each device that read at a time.
      max_new_tokens: longest answer of the `generate` decoding.
      agreement_every: every so many updates the other decoding is asked too; 0: never.
      agreement_turns: most turns that it is asked about then.
      options: keyword arguments of the function that `by` names, as pairs.
    """

    by: str = field(metadata=affects(METHOD, FIGURES))
    decode: str = field(metadata=affects(METHOD, FIGURES))
    model: str = field(metadata=affects(METHOD, FIGURES))
    prompt: str = field(metadata=affects(METHOD, FIGURES))
    context: str = field(metadata=affects(METHOD, FIGURES))
    admissible_shown: int = field(metadata=affects(METHOD, FIGURES))
    batch: int = field(metadata=affects(LAYOUT))
    extend_widths: tuple[int, ...] = field(metadata=affects(LAYOUT))
    prefill_rows: int = field(metadata=affects(LAYOUT))
    max_new_tokens: int = field(metadata=affects(METHOD, FIGURES))
    agreement_every: int = field(metadata=affects(FIGURES))
    agreement_turns: int = field(metadata=affects(FIGURES))
    options: tuple[Any, ...] = ()

    def __post_init__(self):
        check_choice(DECODINGS, decode=self.decode)
        check_choice(FIELDS, context=self.context)
        check_within(
            0, admissible_shown=self.admissible_shown, agreement_every=self.agreement_every
        )
        check_within(
            1,
            batch=self.batch,
            prefill_rows=self.prefill_rows,
            max_new_tokens=self.max_new_tokens,
            agreement_turns=self.agreement_turns,
        )
        check_widths(self.extend_widths)


@dataclass(frozen=True)
class Judge:
    """Everything but the parameters that turns the teacher into a judge."""

    model: ModelConfig
    tokenizer: Any
    chat: ChatFormat
    settings: JudgeSettings
    prompt: Prompt = OURS

    def __post_init__(self):
        if not isinstance(self.model, ModelConfig):
            raise ValueError(
                "`model`: a judge goes back in its cache, so it is a `ModelConfig`, got a "
                f"`{type(self.model).__name__}`"
            )

    def question(self, conversation: Conversation, index: int) -> list[int]:
        """The tokens of the question about one turn, up to where the answer starts.

        With "history" they are the conversation's next message, else a conversation of their own.
        """
        task, turn = conversation.task, conversation.turns[index]
        assert task is not None  # a row that only fills a batch has no turns
        how = self.settings
        shown: dict[str, Any] = dict(admissible_shown=how.admissible_shown, context=how.context)
        text = self.prompt.question(task, turn, **shown)
        if how.context != "history":
            return self.chat.first("", text)
        return self.chat.follow(text, ended=turn.stop == "stop_token")

    def prefix(self, conversation: Conversation, index: int) -> list[int]:
        """The tokens before the question: with "history" all up to the turn's end, else none."""
        if self.settings.context != "history":
            return []
        return conversation.tokens[: conversation.spans[index][1]]

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer."""
        if self.settings.decode == "generate":
            return self.settings.max_new_tokens
        return label_tokens(self.chat, self.prompt.words)[0].shape[1]


def parse_label(answer: str, prompt: Prompt = OURS) -> int:
    """The verdict whose word an answer names, in upper or lower case.

    `UNPARSABLE` if it names no word, or several.
    """
    words = re.findall(rf"\b({'|'.join(prompt.words)})\b", answer, re.IGNORECASE)
    found = {word.upper() for word in words}
    if len(found) != 1:
        return UNPARSABLE
    return prompt.verdicts[[word.upper() for word in prompt.words].index(found.pop())]


def label_tokens(chat: ChatFormat, words: Sequence[str] = LABELS) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of an answer's words, int32 [words, W] padded with 0, and how many each has."""
    tokens = [chat.response(word) for word in words]
    return padded(tokens, width=max(map(len, tokens)))


def score_labels(
    cache: ContextCache, last: np.ndarray, asked: np.ndarray, *, by: Judge
) -> list[Answer]:
    """The verdict whose word the teacher finds most likely after each question, and the scores.

    The score of a word is the sum of the log-probabilities of its own tokens; the end of the
    answer is not scored.

    Args:
      cache: the questions without their last tokens. It needs room for these and a label.
      last: int32 [B], the last token of each question.
      asked: int32 [B], 1 or 0; a row with 0 asks nothing, and its label is meaningless.

    Returns:
      An answer for each row. Slots after a row's length hold leftovers.
    """
    words, lengths = label_tokens(by.chat, by.prompt.words)
    scores, given = label_scores(
        cache.params,
        cache.take(),
        *shard_batch((last, asked), rules=DECODING),
        words,
        lengths,
        config=by.model,
        sharded=cache.sharded,
    )
    cache.give(given)
    # The model reads the last token, then each label's tokens but the last.
    read, computed = 1 + int((lengths - 1).sum()), 1 + words[:, :-1].size
    cache.count(tokens=int(asked.sum()) * read, computed=len(asked) * computed)
    given = np.asarray(scores)
    return [Answer(by.prompt.verdicts[row.argmax()], _by_verdict(row, by.prompt)) for row in given]


def _by_verdict(scores: np.ndarray, prompt: Prompt) -> np.ndarray:
    """The best score of each verdict's words, float32 [3]; NaN for one without a word."""
    best = np.full(len(LABELS), np.nan, np.float32)
    np.fmax.at(best, list(prompt.verdicts), scores)
    return best


@partial(jax.jit, static_argnames=("config", "sharded"), donate_argnames="cache")
def label_scores(
    params: Params,
    cache: KVCache,
    last: jax.Array,
    asked: jax.Array,
    word_tokens: jax.Array,
    word_lengths: jax.Array,
    *,
    config: ModelConfig,
    sharded: bool,
) -> tuple[jax.Array, KVCache]:
    """log p(label | cache, last token), float32 [B, labels], and the cache with these tokens."""
    rows, (labels, width) = last.shape[0], word_tokens.shape
    append = partial(model.forward_cached, model.unstack(params), config=config, sharded=sharded)
    hidden, cache = append(cache, last[:, None], asked)
    after = jnp.broadcast_to(hidden[:, None], (rows, labels, 1, hidden.shape[-1]))

    def read(cache: KVCache, word: jax.Array) -> tuple[KVCache, jax.Array]:
        fed = jnp.broadcast_to(word, (rows, width - 1))
        hidden, grown = append(cache, fed, jnp.full(rows, width - 1, jnp.int32))
        return replace(grown, lengths=cache.lengths), hidden

    if width > 1:
        # One word after another, each written over the last. In parallel, each would need its own
        # copy of the cache.
        cache, later = jax.lax.scan(read, cache, word_tokens[:, :-1])
        after = jnp.concatenate([after, jnp.moveaxis(later, 0, 1)], axis=2)
    logits = model.logits(params, after, sharded=sharded)
    each = jnp.take_along_axis(
        jax.nn.log_softmax(logits), word_tokens[None, :, :, None], axis=-1
    ).squeeze(-1)
    scores = jnp.where(jnp.arange(width) < word_lengths[:, None], each, 0.0).sum(axis=-1)
    return replicate(scores), cache


def generate_labels(
    cache: ContextCache, last: np.ndarray, asked: np.ndarray, *, by: Judge
) -> list[Answer]:
    """The label in the teacher's greedy answer to each question, or `UNPARSABLE`.

    Arguments as in `score_labels`; the cache needs room for `max_new_tokens` of each answer.
    """
    longest = by.settings.max_new_tokens
    given, out = gen.generate(
        cache.params,
        cache.take(),
        *shard_batch((last, asked * np.int32(longest)), rules=DECODING),
        jax.random.split(jax.random.key(0), len(last)),  # unused: decoding is greedy
        jnp.asarray(by.chat.stop_ids, jnp.int32),
        config=by.model,
        sampling=gen.Sampling(temperature=0.0, top_k=0, top_p=1.0),
        chunk=longest,
        sharded=cache.sharded,
    )
    cache.give(given)
    out = jax.device_get(out)
    cache.count(tokens=int(out.counts.sum()), computed=out.computed)
    texts = [by.tokenizer.decode(row[:n]) for row, n in zip(out.tokens, out.counts, strict=True)]
    return [Answer(parse_label(text, by.prompt), None) for text in texts]


# How `judge.decode` names them.
DECODINGS = {"constrained": score_labels, "generate": generate_labels}
