"""Endless supervised batches: demonstrations, and examples of judging them.

Data is generated one window of episodes at a time. The episodes, and judge examples drawn from
their turns, are grouped by length, so that little is padding. The groups are shuffled. Batch b of
window w depends on the seed alone, so a run resumes from (w, b).
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from opd_jax.agent.conversation import Conversation, check_some_played
from opd_jax.experience.histories import HISTORIES
from opd_jax.experience.source import Played, padding
from opd_jax.judge.prompt import FIELDS
from opd_jax.learner.train_state import TrainState
from opd_jax.runtime import processes
from opd_jax.runtime.fields import check_choice, check_within


@dataclass(frozen=True)
class DemonstrationSettings:
    """Which players demonstrate, and how their episodes become batches.

    Attributes:
      sizes: room sizes; each episode draws one.
      sizes_from: number of the first episode that may draw the second size, the third, ...
      player: name of the player whose turns are learnt from.
      distraction: largest share of an episode's turns that a distractor plays.
      head_start: in half of the episodes a distractor plays the first turns alone, at most so many.
      distractors: names of players that disturb; each episode draws one. `HISTORIES` is a model
        whose episodes are in the file `histories`: one of them is played again up to a turn.
      histories: an episode file (docs/episodes.md); "": none.
      habits: player's name to its keyword arguments.
      window: episodes generated together.
      judge_examples: judge examples per window; 0: none.
      judge_contexts: contexts of their questions, in turn (`judge.prompt.FIELDS`).
      proposals: most other responses that an example judges at its turn (`proposals`).
      proposers: names of the players that propose them; one may stand there more than once.
      tokens_per_batch: most tokens of a batch, with padding.
    """

    sizes: tuple[str, ...]
    sizes_from: tuple[int, ...]
    player: str
    distraction: float
    head_start: int
    distractors: tuple[str, ...]
    histories: str
    habits: Mapping[str, Mapping[str, Any]]
    window: int
    judge_examples: int
    judge_contexts: tuple[str, ...]
    proposals: int
    proposers: tuple[str, ...]
    tokens_per_batch: int

    def __post_init__(self):
        check_within(1, window=self.window, tokens_per_batch=self.tokens_per_batch)
        check_within(0, judge_examples=self.judge_examples, head_start=self.head_start)
        check_within(0, proposals=self.proposals)
        check_within(0, 1, distraction=self.distraction)
        for context in self.judge_contexts:
            check_choice(FIELDS, judge_contexts=context)
        if (HISTORIES in self.distractors) != bool(self.histories):
            raise ValueError(
                f"`histories` is the file of the distractor {HISTORIES!r}: expected both or "
                f"neither, got {self.histories!r} and distractors {list(self.distractors)}"
            )
        if self.histories and not self.head_start:
            raise ValueError(
                "`head_start` is the most turns of `histories` that are played again: expected 1 "
                "or more, got 0"
            )
        needs = {
            "sizes": True,
            "distractors": self.distraction > 0 or self.head_start > 0,
            "judge_contexts": self.judge_examples > 0,
            "proposers": self.judge_examples > 0 and self.proposals > 0,
        }
        for name, needed in needs.items():
            if needed and not getattr(self, name):
                raise ValueError(f"`{name}`: expected at least one, got none")
        if len(self.sizes_from) < len(self.sizes) - 1:  # the last sizes would never be drawn
            raise ValueError(
                f"`sizes_from`: expected a number for each of `sizes` after the first, "
                f"{len(self.sizes) - 1}, got {list(self.sizes_from)}"
            )


def judge_example(asked: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Conversation:
    """A judge's questions, each behind the one before, and their answers.

    Only the answers are supervised. Each is a turn of its own.
    """
    example = Conversation(task=None, end="answered")
    for number, (question, answer) in enumerate(asked):
        example.append_given(question)
        example.append_response(answer, [0.0] * len(answer), number)
    return example


def balanced_turns(
    conversations: Sequence[Conversation], count: int, rng: random.Random
) -> list[tuple[Conversation, int]]:
    """Draws `count` turns that have an oracle's label, equally many of each label that occurs.

    Most turns are SKIP: without balance a judge learns to answer SKIP to everything.

    Returns:
      (conversation, index of the turn) of each.
    """
    by_label: dict[str, list[tuple[Conversation, int]]] = {}
    for conversation in conversations:
        for index, turn in enumerate(conversation.turns):
            if turn.oracle and not turn.failure:
                by_label.setdefault(turn.oracle, []).append((conversation, index))
    pools = [by_label[label] for label in sorted(by_label)]
    return [rng.choice(pools[i % len(pools)]) for i in range(count)] if pools else []


def group_by_length(
    conversations: Sequence[Conversation],
    *,
    tokens_per_batch: int,
    length_multiple: int,
    rows_multiple: int,
) -> list[tuple[list[Conversation], int]]:
    """Batches of conversations of similar length, each with the length to pad to.

    Batches of one padded length have the same number of rows: as many as `tokens_per_batch` holds,
    rounded down to a multiple of `rows_multiple`. Empty rows fill up the last batch. So each padded
    length compiles once.

    A conversation of which `rows_multiple` padded rows exceed `tokens_per_batch` is left out.

    Raises:
      ValueError: all are.
    """
    ordered = sorted(conversations, key=lambda c: len(c.tokens))
    most = tokens_per_batch // rows_multiple // length_multiple * length_multiple
    waiting = [c for c in ordered if len(c.tokens) <= most]
    for c in ordered[len(waiting) :]:
        name = c.task.id if c.task else "a judge example"
        processes.warn(
            "`demonstrations.tokens_per_batch` = %d: %s with %d tokens is left out, expected at "
            "most %d",
            *(tokens_per_batch, name, len(c.tokens), most),
        )
    if ordered and not waiting:
        least = -(-len(ordered[0].tokens) // length_multiple) * length_multiple * rows_multiple
        raise ValueError(
            f"`demonstrations.tokens_per_batch`: expected at least {least}, which is "
            f"{rows_multiple} times the shortest example of {len(ordered[0].tokens)} tokens, "
            f"padded; got {tokens_per_batch}"
        )
    batches = []
    while waiting:
        padded = length_multiple
        while True:
            fitting = sum(len(c.tokens) <= padded for c in waiting)
            rows = tokens_per_batch // (padded * rows_multiple) * rows_multiple
            if fitting >= rows or fitting == len(waiting):
                break
            padded += length_multiple
        batch, waiting = waiting[: min(rows, fitting)], waiting[min(rows, fitting) :]
        batches.append((batch + [Conversation(task=None)] * (rows - len(batch)), padded))
    return batches


@dataclass
class Stream:
    """A `Source` of supervised batches.

    Attributes:
      shown: sizes of windows and batches.
      make_episode: makes demonstration number n, from n alone.
      make_example: makes judge example n of a window, from a conversation and the index of a turn;
        None for no judge examples.
      seed: seed of the order of batches and the choice of turns.
      length_multiple: lengths are padded to multiples of this.
      rows_multiple: micro-batches times devices; rows of a batch are a multiple of this.
      cursor: [window, batch] to go on from.
    """

    shown: DemonstrationSettings
    make_episode: Callable[[int], Conversation]
    make_example: Callable[[int, Conversation, int], Conversation] | None
    seed: int
    length_multiple: int
    rows_multiple: int
    cursor: Sequence[int]

    envs = ()  # it has some of its own, in a thread

    def __post_init__(self) -> None:
        # One thread generates the next window while the device trains on this one.
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._batches = self._generate(self.cursor[0])
        self._next = self._pool.submit(self._generate, self.cursor[0] + 1)

    def play(self, state: TrainState) -> Played:
        """The next batch; it does not depend on the state."""
        window, batch = self.cursor
        if batch >= len(self._batches):
            window, batch = window + 1, 0
            self._batches = self._next.result()
            self._next = self._pool.submit(self._generate, window + 1)
        self.cursor = [window, batch + 1]
        conversations, padded = self._batches[batch]
        return Played(
            conversations,
            rows=conversations,
            episode=list(range(len(conversations))),
            length_multiple=padded,
            metrics={
                "tokens/sequence": sum(len(c.tokens) for c in conversations),
                "padded/update": padding(
                    conversations, length_multiple=padded, response_multiple=1, parts=1
                ),
            },
        )

    def close(self) -> None:
        """Ends the generating thread."""
        self._pool.shutdown(cancel_futures=True)

    def _generate(self, window: int) -> list[tuple[list[Conversation], int]]:
        rng = random.Random(f"{self.seed}/window/{window}")
        first = window * self.shown.window
        episodes = [self.make_episode(first + i) for i in range(self.shown.window)]
        check_some_played(episodes)
        examples = []
        if self.make_example is not None:
            turns = balanced_turns(episodes, self.shown.judge_examples, rng)
            examples = [self.make_example(n, *turn) for n, turn in enumerate(turns)]
        batches = group_by_length(
            [c for c in episodes + examples if c.tokens],
            tokens_per_batch=self.shown.tokens_per_batch,
            length_multiple=self.length_multiple,
            rows_multiple=self.rows_multiple,
        )
        rng.shuffle(batches)
        return batches
