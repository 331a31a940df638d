"""What every environment looks like to the agent loop.

An environment owns its prompts, its action parser and its failure test: it receives the raw text
that the model wrote and returns the next user message. The loop knows nothing of action grammars.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

# `Observation.end` of an episode that the environment, not the agent, has spoilt: it hung or died.
BROKEN = "broken"


@dataclass(frozen=True)
class Task:
    """One task: what the judge is told about it (paper Table 9), and its name in records.

    Attributes:
      id: unique and stable name, for example `household/train/17`.
      type: the task's type, for example `pick_heat_then_place`.
      goal: the instruction in words.
      scene: the first observation, which describes the scene.
    """

    id: str
    type: str
    goal: str
    scene: str


@dataclass(frozen=True)
class Observation:
    """What one step of an environment returns.

    Attributes:
      text: the environment's own words.
      message: the user message shown to the agent; contains `text`.
      admissible: commands that would succeed now, most specific first.
      end: why the episode is over: "success" where the goal is reached, `BROKEN` where the
        environment failed, else the environment's word for it, such as "turn_limit"; "" while it
        goes on.
      score: the environment's score so far.
      action: the action parsed from the response that led here; "" if there was none.
      failure: why the turn that led here failed deterministically, in the environment's own
        terms; "" if it did not. Such a turn is never sent to the judge (paper section 3.3).
      oracle: "SKIP", "WEAK" or "STRONG" for the turn that led here, computed with hidden
        knowledge where the environment can; "" otherwise. For measuring the judge, and for
        labelling training data of the embedded teacher; never shown to a model.
      measures: further figures of the episode so far by name, for example `f1`; reported beside
        the score.
    """

    text: str
    message: str
    admissible: tuple[str, ...]
    end: str = ""
    score: float = 0.0
    action: str = ""
    failure: str = ""
    oracle: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """The episode is over."""
        return bool(self.end)

    @property
    def success(self) -> bool:
        """The goal is reached."""
        return self.end == "success"


class Env(Protocol):
    """An environment that plays one episode at a time.

    Attributes:
      system: the system message of the conversation; "" for none.
      task: the task of the current episode; set by `reset`.
      waits: its answers come from elsewhere, a process or a server: many environments may be waited
        for at once, each in a thread.
    """

    system: str
    task: Task
    waits: bool

    def size(self, split: str) -> int:
        """Number of tasks in `split`; ValueError naming the known splits otherwise."""
        ...

    def digest(self, split: str) -> str:
        """Identifies the tasks of `split`: equal digests, equal tasks.

        A hash; behind `LABEL-` where every table has to say what the tasks are, since figures of
        them could be taken for others'.
        """
        ...

    def reset(self, split: str, index: int) -> Observation:
        """Start task `index` of `split`, a pure function of the two."""
        ...

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text."""
        ...


class Player(Protocol):
    """Answers observations in text, from what a player may know."""

    def respond(self, observation: Observation) -> str:
        """The whole response to the latest observation."""
        ...


MakePlayer = Callable[[Task, Observation, random.Random], Player]
