"""Where an update's tokens come from: episodes of the student, the teacher or the expert.

A source's `play` is a function of the training state and of the source's cursor, so a resumed run
plays what the interrupted one would have played.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opd_jax.agent import history
from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.rollout import close, everywhere
from opd_jax.envs.base import Env
from opd_jax.experience.tasks import train_tasks
from opd_jax.learner.train_state import TrainState
from opd_jax.report.update import episode_metrics
from opd_jax.runtime.fields import check_choice, check_within

SOURCES = ("on_policy", "teacher", "expert", "players")


@dataclass(frozen=True)
class DataSettings:
    """Who plays, and which tasks.

    Attributes:
      source: "on_policy" for the student, "teacher", "expert", or "players" for the mix of
        `stream`.
      split: of the training tasks.
    """

    source: str
    split: str

    def __post_init__(self):
        check_choice(SOURCES, source=self.source)


@dataclass(frozen=True)
class Played:
    """The episodes that one update learns from.

    Attributes:
      conversations: the episodes.
      rows: the sequences that are scored: the episodes, or with part of the history several a
        conversation (`history.rows`).
      episode: the conversation that each row is of.
      length_multiple: rows are padded to a multiple of this.
      metrics: of the episodes, as (sum, count) or scalars.
    """

    conversations: list[Conversation]
    rows: list[Conversation]
    episode: list[int]
    length_multiple: int
    metrics: dict[str, Any]


class Source(Protocol):
    """Plays the episodes of one update after another."""

    @property
    def cursor(self) -> list[int]:
        """Where the next call starts; JSON-able."""
        ...

    def play(self, state: TrainState) -> Played:
        """The next update's episodes."""
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


@dataclass(frozen=True)
class TaskOrder:
    """The training tasks in the order in which they are played.

    Attributes:
      split: that they are of.
      size: number of tasks in it.
      seed: of the shuffled epochs.
      count: tasks of an update.
      per_task: episodes of each.
    """

    split: str
    size: int
    seed: int
    count: int
    per_task: int

    def __post_init__(self):
        check_within(1, size=self.size, count=self.count, per_task=self.per_task)

    def from_number(self, start: int) -> list[tuple[str, int]]:
        """The tasks of an update that starts with task number `start` of the series."""
        numbers = train_tasks(self.size, seed=self.seed, start=start, count=self.count)
        return [(self.split, number) for number in numbers for _ in range(self.per_task)]


# Plays one episode of each task, with the parameters of a state.
Play = Callable[[TrainState, Sequence[tuple[str, int]]], list[Conversation]]


class Episodes:
    """Episodes of the next training tasks, whoever plays them.

    Args:
      play: see `Play`.
      envs: that it plays in; closed with the source.
      tasks: which are next.
      agent: whose chat format and part of the history the rows have.
      length_multiple: see `Played`.
      cursor: (number of the next task, 0).
    """

    def __init__(
        self,
        play: Play,
        *,
        envs: Sequence[Env | None],
        tasks: TaskOrder,
        agent: Agent,
        length_multiple: int,
        cursor: Sequence[int],
    ):
        self._play, self._envs, self._tasks, self._agent = play, envs, tasks, agent
        self._length_multiple = length_multiple
        self.cursor = list(cursor)

    def play(self, state: TrainState) -> Played:
        """One episode of each of the next training tasks.

        Raises:
          ValueError: the environments of all episodes broke.
        """
        start, order = self.cursor[0], self._tasks
        conversations = self._play(state, order.from_number(start))
        self.cursor = [start + order.count, 0]
        if all(c.broken for c in conversations):
            raise ValueError(
                f"`env`: the environments of all {len(conversations)} episodes broke; the warnings "
                "above say how"
            )
        rows, episode = history.rows(
            conversations,
            history_turns=self._agent.decoding.history_turns,
            left_out=self._agent.chat.left_out,
        )
        # With part of the history the number of rows varies. Multiples of the batch are few, and so
        # are the programs to compile.
        missing = -len(rows) % len(conversations)
        rows += [Conversation(task=None)] * missing
        return Played(
            conversations,
            rows,
            episode=episode + [0] * missing,
            length_multiple=self._length_multiple,
            metrics=episode_metrics(conversations, rows),
        )

    def close(self) -> None:
        """Ends the environments' processes."""
        close(self._envs)


def play_expert(
    demonstrate: Callable[[Env, str, int], Conversation], envs: Sequence[Env | None]
) -> Play:
    """`Play` of an environment's expert, who needs no parameters.

    Args:
      demonstrate: one episode: (environment, split, index).
      envs: one a row.
    """
    return lambda _, tasks: everywhere(lambda env, task: demonstrate(env, *task), envs, tasks)
