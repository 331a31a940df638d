"""Sources of an update's tokens, and the one that plays the training tasks.

A source's `play` depends only on the training state and the source's cursor, so a resumed run plays
what the interrupted one would have played.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from opd_jax.agent import history
from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation, check_some_played
from opd_jax.agent.environments import close
from opd_jax.agent.positions import Positions
from opd_jax.envs.base import Env
from opd_jax.experience.tasks import TaskOrder
from opd_jax.learner.batch import alike, fits_half, padded_length, responses
from opd_jax.learner.train_state import TrainState
from opd_jax.losses import NO_TURN
from opd_jax.report.update import episode_metrics
from opd_jax.runtime.fields import check_choice

# After so many tasks in a row whose first prompts do not fit the context, none will.
_UNFIT = 16

SOURCES = ("on_policy", "teacher", "expert", "players")
# Before the path of a file: its episodes are learnt from, or the student plays on from within them.
RECORDED, PREFIXES = "episodes:", "prefixes:"


@dataclass(frozen=True)
class DataSettings:
    """Who plays, and which tasks.

    Attributes:
      source: who plays: "on_policy" (the student), "teacher", "expert", or "players" (`stream`);
        or `RECORDED` or `PREFIXES` and the path of a file.
      split: the split of the training tasks.
      only_success: learn only from episodes that succeeded: of a file those lines, else those
        rows of a batch (`Episodes`).
    """

    source: str
    split: str
    only_success: bool

    def __post_init__(self):
        if not self.file:
            check_choice((*SOURCES, f"{RECORDED}FILE", f"{PREFIXES}FILE"), source=self.source)
        if self.only_success and self.source == "players":
            raise ValueError(
                "`only_success` chooses among episodes, and with `source` = 'players' batches "
                "hold other examples too: set it to False, or `source` to expert"
            )

    @property
    def file(self) -> str:
        """The file that the source names; "" if it names none."""
        kind = next((kind for kind in (RECORDED, PREFIXES) if self.source.startswith(kind)), None)
        return self.source.removeprefix(kind) if kind else ""

    @property
    def replays(self) -> bool:
        """Whether episodes begin with turns of recorded ones."""
        return self.source.startswith(PREFIXES)

    @property
    def on_policy(self) -> bool:
        """Whether the student plays."""
        return self.source == "on_policy" or self.replays

    @property
    def tasks(self) -> str:
        """The name of the training tasks among all panels: the split's, or the file's."""
        return self.source if self.file else self.split


@dataclass(frozen=True)
class Played:
    """The episodes that one update learns from.

    Attributes:
      conversations: the episodes.
      rows: the sequences to score: the episodes, or with `history_turns` several per episode
        (`history.rows`).
      episode: index of each row's conversation.
      length_multiple: rows are padded to a multiple of this.
      metrics: the episodes' metrics, as (sum, count) or scalars.
      teacher_rows: the rows as the teacher reads them; None: as they are.
    """

    conversations: list[Conversation]
    rows: list[Conversation]
    episode: list[int]
    length_multiple: int
    metrics: dict[str, Any]
    teacher_rows: list[Conversation] | None = None


def padding(
    rows: Sequence[Conversation], *, length_multiple: int, response_multiple: int, parts: int
) -> tuple[int, int]:
    """Positions that an update computes although they hold no token, and all that it computes.

    It computes `parts` micro-batches, each in half its positions if those do (`batch.fits_half`).
    """
    length = padded_length(rows, length_multiple)
    response = responses(rows, length_multiple=length_multiple, response_multiple=response_multiple)
    width = np.full(len(rows), length)
    for part in range(parts if parts > 1 else 0):
        if fits_half(response[part::parts], length):
            width[part::parts] = length // 2
    tokens = np.minimum([len(row.tokens) for row in rows], width)
    return int((width - tokens).sum()), int(width.sum())


class Source(Protocol):
    """Gives the episodes of one update after another."""

    @property
    def cursor(self) -> Sequence[int]:
        """Where the next `play` starts; stored as JSON."""
        ...

    @property
    def envs(self) -> Sequence[Env | None]:
        """Its environments; between two calls of `play` nothing is played in them."""
        ...

    def play(self, state: TrainState) -> Played:
        """The next update's episodes."""
        ...

    def close(self) -> None:
        """Ends background threads and processes."""
        ...


# Plays one episode of each (split, index), with the parameters of a state; counts positions.
Play = Callable[[TrainState, Sequence[tuple[str, int]], Positions], list[Conversation]]


@dataclass
class Episodes:
    """A `Source` that plays the training tasks in order.

    With `only_success` a batch keeps its shape: rows of episodes that did not succeed are read, and
    none of their tokens is learnt. The mean is over the tokens of the others, so an update with few
    successes is a noisy one. Without any the student stays as it was (`no_step`), and the tasks are
    not played again: an update always takes as many.

    Attributes:
      play_tasks: plays the episodes.
      envs: the environments that it plays in; closed with the source.
      tasks: the order of the tasks.
      agent: gives the chat format and `history_turns` of the rows.
      length_multiple: see `Played`.
      response_multiple: see `batch.pack`.
      micro_batches: of a batch in which each episode is one row.
      retell: gives an episode as the teacher reads it (`asides`); None: as it is.
      only_success: learn only from episodes that succeeded.
      cursor: [number of the next task, 0].
    """

    play_tasks: Play
    envs: Sequence[Env | None]
    tasks: TaskOrder
    agent: Agent
    length_multiple: int
    response_multiple: int
    micro_batches: int
    cursor: Sequence[int]
    retell: Callable[[Conversation], Conversation] | None = None
    only_success: bool = False

    def play(self, state: TrainState) -> Played:
        """One episode of each of the next training tasks.

        Tasks of which no episode fits its context are passed over.

        Raises:
          ValueError: no task fits.
          WorldFailed: the environments of all episodes broke, twice.
        """
        start = end = self.cursor[0]
        positions = Positions()
        while True:
            tasks = self.tasks.from_number(end)
            end += self.tasks.count
            conversations = self.play_tasks(state, tasks, positions)
            if not all(c.unfit for c in conversations):
                break
            if end - start >= min(_UNFIT, self.tasks.size):
                check_some_played(conversations)
        if all(c.broken for c in conversations):  # a machine may have hung for a moment
            conversations = self.play_tasks(state, tasks, positions)
        check_some_played(conversations)
        self.cursor = [end, 0]
        rows_of = partial(
            history.rows,
            history_turns=self.agent.decoding.history_turns,
            left_out=self.agent.chat.left_out,
        )
        rows, episode = rows_of(conversations)
        told = rows_of([self.retell(c) for c in conversations])[0] if self.retell else None
        # With `history_turns` the number of rows varies. Padded to multiples of the batch it takes
        # few values, and few programs are compiled.
        missing = [Conversation(task=None)] * (-len(rows) % len(conversations))
        rows, episode = rows + missing, episode + [0] * len(missing)
        parts = self.micro_batches * (len(rows) // len(conversations))
        order = alike(rows, parts)
        rows, episode = [rows[row] for row in order], [episode[row] for row in order]
        if told:
            told += missing
            told = [told[row] for row in order]
        if not self.agent.decoding.history_turns:  # a row is an episode
            conversations, episode = rows, list(range(len(rows)))
        metrics = episode_metrics(conversations, rows)
        if self.only_success:
            won = [conversations[number].success for number in episode]
            rows, told = _only(won, rows), _only(won, told) if told else None
        padded = padding(
            rows,
            length_multiple=self.length_multiple,
            response_multiple=self.response_multiple,
            parts=parts,
        )
        return Played(
            conversations,
            rows,
            episode,
            length_multiple=self.length_multiple,
            metrics=metrics
            | positions.metrics
            | {"padded/update": padded}
            | {"tokens/read_by_teacher": positions.tokens("reading_by_teacher")}
            | ({"tokens/teacher": sum(len(row.tokens) for row in told)} if told else {}),
            teacher_rows=told,
        )

    def close(self) -> None:
        """Ends the environments' processes."""
        close(self.envs)


def _only(won: Sequence[bool], rows: Sequence[Conversation]) -> list[Conversation]:
    """The rows; of those that are not won nothing is learnt."""
    return [
        row if good else replace(row, turn_id=[NO_TURN] * len(row.tokens))
        for good, row in zip(won, rows, strict=True)
    ]
