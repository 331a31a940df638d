"""A model that acts: its tokenizer and chat format, and how it is sampled from."""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from opd_jax.agent import history
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.generate import Sampling
from opd_jax.envs.turns import before_invented_turn
from opd_jax.model import Model, ModelConfig
from opd_jax.runtime.fields import LAYOUT, affects, check_choice, check_widths, check_within

# Tokens of what opens an invented turn (`### **tool response 3**:`): most have far fewer.
_OPENING = 32


@dataclass(frozen=True)
class Decoding:
    """How responses are sampled.

    Attributes:
      temperature, top_k, top_p: see `generate.Sampling`.
      turn_tokens: most tokens sampled in one turn.
      context_tokens: most tokens in a context, prompts and observations included.
      extend_widths: ascending widths in which new tokens are appended; one compiled program each.
      prefill_rows: rows of each device whose new tokens are appended at a time.
      chunk: tokens sampled before the host looks which responses have ended.
      join_after: chunks that a row sits out while its environment answers. With 0 the device waits
        for the answers, which is best if they take less time than a chunk.
      int8_cache: keep keys and values in 8 bits, half the bytes that a token reads of bfloat16. The
        update recomputes log-probabilities without it.
      history_turns: most earlier turns in the context of a response; 0: all. With a limit each turn
        prefills its context again (`history`).
    """

    temperature: float
    top_k: int
    top_p: float
    turn_tokens: int
    context_tokens: int
    extend_widths: tuple[int, ...] = field(metadata=affects(LAYOUT))
    prefill_rows: int = field(metadata=affects(LAYOUT))
    chunk: int = field(metadata=affects(LAYOUT))
    join_after: int = field(metadata=affects(LAYOUT))
    int8_cache: bool
    history_turns: int

    def __post_init__(self):
        _ = self.sampling  # checks its own values
        check_within(
            1, turn_tokens=self.turn_tokens, prefill_rows=self.prefill_rows, chunk=self.chunk
        )
        check_within(0, join_after=self.join_after, history_turns=self.history_turns)
        if self.turn_tokens >= self.context_tokens:
            raise ValueError(
                f"`turn_tokens` = {self.turn_tokens}: expected less than the cache, "
                f"`context_tokens` = {self.context_tokens}"
            )
        check_widths(self.extend_widths)

    @property
    def sampling(self) -> Sampling:
        """How a token is drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class RolloutSettings(Decoding):
    """How the episodes of an update are played.

    Attributes:
      batch: episodes of an update.
      rows: most episodes at a time; 0: all. A row whose episode is over takes the next.
      gather_weights: sample with weights all-gathered along `fsdp`; faster, more memory.
      per_task: episodes of each task.
      depth_start: most turns of an episode in the first update; 0: no limit.
      depth_every: updates after which the limit rises by one turn.
      depth_from: whether these are an episode's first turns, "front", or a recorded one's last,
        "back"; those before are then replayed, and the student plays to the end.
      teacher_share: probability with which a turn is the teacher's, in the first update.
      teacher_share_for: share of the run's updates in which it falls to 0; 0: it stays.
      take_over_after: failed turns in a row after which the teacher plays the rest; 0: never.
      cut_repeated_failure: end an episode at the first failed turn whose action is that of the turn
        before.
    """

    batch: int
    rows: int = field(metadata=affects(LAYOUT))
    gather_weights: bool = field(metadata=affects(LAYOUT))
    per_task: int
    depth_start: int
    depth_every: int
    depth_from: str
    teacher_share: float
    teacher_share_for: float
    take_over_after: int
    cut_repeated_failure: bool

    def __post_init__(self):
        super().__post_init__()
        check_within(1, batch=self.batch, per_task=self.per_task, depth_every=self.depth_every)
        check_within(
            0, rows=self.rows, depth_start=self.depth_start, take_over_after=self.take_over_after
        )
        check_within(
            0, 1, teacher_share=self.teacher_share, teacher_share_for=self.teacher_share_for
        )
        check_choice(("front", "back"), depth_from=self.depth_from)
        if self.batch % self.per_task:
            raise ValueError(
                f"`batch` = {self.batch} is not a multiple of `per_task` = {self.per_task}; choose "
                "a divisor"
            )

    @property
    def at_once(self) -> int:
        """Episodes that are played at the same time."""
        return min(self.rows or self.batch, self.batch)

    def depth(self, update: int) -> int:
        """Most turns of an episode in update n: start + ⌊n / every⌋; 0 for no limit.

        Late turns of an untrained student follow histories that a trained one never sees.

        Source: TCOD (arXiv 2604.24005). From the front it is a baseline of arXiv 2606.19659, where
          every = 1.
        """
        return self.depth_start and self.depth_start + update // self.depth_every

    @property
    def teacher_plays(self) -> bool:
        """Whether the teacher may take turns of the student's episodes."""
        return self.teacher_share > 0 or self.take_over_after > 0

    def share_of_teacher(self, update: int, *, updates: int) -> float:
        """β_n = β_0 (1 + cos π n / N) / 2 in update n, and 0 from N on: the share of its turns.

        N is `teacher_share_for` times the run's `updates`; with 0 the share stays β_0.

        Source: Guided-OPD (arXiv 2606.15912), where β_0 = 1 and N is 0.8 of the updates.
        """
        most = self.teacher_share_for * updates
        if not most:
            return self.teacher_share
        falling = (1 + math.cos(math.pi * min(update / most, 1))) / 2
        return self.teacher_share * falling if update < most else 0.0


@dataclass(frozen=True)
class Agent:
    """Everything but the parameters that turns a model into an agent.

    `model` are the sizes of ours, or the functions of another.

    The `transformers` tokenizer decodes responses and never encodes them again. `invented`
    finds where a response pretends to be the environment or the user (`Env.invented`); None: its
    text may say anything.
    """

    model: ModelConfig | Model
    tokenizer: Any
    chat: ChatFormat
    decoding: Decoding
    invented: re.Pattern[str] | None = None

    def context(self, conversation: Conversation, turn: int | None = None) -> list[int]:
        """The tokens that a turn's response is sampled from, by default the next one's."""
        return history.context(
            conversation,
            turns=len(conversation.spans) if turn is None else turn,
            history_turns=self.decoding.history_turns,
            left_out=self.chat.left_out,
        )

    def text(self, tokens: list[int]) -> str:
        """The text of a response, without the stop token or turn mark that ended it."""
        last = tokens[-1] if tokens else None
        ended = last in self.chat.stop_ids or last in self.chat.turn_marks
        return self.tokenizer.decode(tokens[:-1] if ended else tokens)

    def invented_in(self, tokens: list[int], *, new: int) -> int | None:
        """`invented_at` of a response that goes on after `new` more tokens.

        It decodes only these and a few before them, else a long response would be decoded again in
        every chunk. What they show is looked for in the whole. An opening that is longer than these
        few is found when the response has ended.
        """
        tail = tokens[-new - _OPENING :]
        if not self.chat.turn_marks.isdisjoint(tail):
            return self.invented_at(tokens)
        if self.invented is None:
            return None
        text = self.text(tail)
        shown = self.invented.search(text) or before_invented_turn(text, self.invented)[1]
        return self.invented_at(tokens) if shown else None

    def invented_at(self, tokens: list[int]) -> int | None:
        """How many tokens a response has when an invented turn has begun in it; None: none has.

        The token with which it has begun is the response's last. It is a turn mark, or the text up
        to it shows an invented turn.
        """
        marks = self.chat.turn_marks
        count = next((n for n, token in enumerate(tokens, 1) if token in marks), None)
        if self.invented is None:
            return count
        invented, opened = self.invented, self.chat.opened_thinking

        def begun(count: int) -> bool:
            return before_invented_turn(opened + self.text(tokens[:count]), invented)[1]

        if not begun(count or len(tokens)):
            return count
        return bisect_left(range(count or len(tokens)), True, key=begun)
