"""The interface between environments and the agent loop.

An environment receives the text that the model wrote and returns the next user message. It owns its
prompts, its action parser and its test for failed turns; the loop knows no action grammar.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# `Observation.end` of an episode that ended because the environment hung or died.
BROKEN = "broken"


class NoTasks(ValueError):
    """The tasks of a known split are not on this machine."""


@dataclass(frozen=True)
class Task:
    """One task: its name in records, and what the judge is told about it (paper Table 9).

    Attributes:
      id: unique and stable, for example `household/small/train/17`.
      type: for example `pick_heat_then_place_in_recep`.
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
      end: why the episode is over; "" while it goes on. "success" if the goal is reached, `BROKEN`
        if the environment failed, otherwise the environment's own word, such as "turn_limit".
      score: the environment's score so far.
      action: the action parsed from the response that led here; "" if there was none.
      failure: why the turn that led here failed, if the environment can tell for certain; "" if it
        did not fail. The judge never sees failed turns (paper section 3.3).
      oracle: "SKIP", "WEAK" or "STRONG" for the turn that led here, from hidden knowledge; "" if
        the environment cannot tell. It measures the judge and labels training data of the embedded
        teacher; no model is shown it.
      measures: other figures of the episode so far by name, for example `f1`; reported with the
        score.
      record: what `record()` says after this step, where there is one (`Records`). The agent loop
        fills it in.
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
    record: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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

    These members are all that a run needs. `python -m opd_jax.envs.check` checks them.

    Its class (or the function that makes it) may also have these attributes:

    - `world` names the arguments that change neither tasks nor answers, such as a timeout or a
      folder, and `figures` those that change only tasks to evaluate: a run may be resumed with
      others.
    - `labels_turns` = False says that no observation has an `oracle`.
    - `invented`, a compiled pattern, finds where a response pretends to be the environment or the
      user (`turns.invented_turn` makes one): such a response is sampled no further.
    - `players` maps names to functions that make a player (`MakePlayer`): its `expert`, and another
      `random` where responses are not those of `react`.
    - `rule` judges a command from the record (`Rule`). It may be the judge (`judge.by=record`).
    - `parse` finds the command in a response (`Parse`), as `step` does. With `rule` it judges a
      response that nobody carries out (`weight.teacher_labels=record`).

    It may also have the methods of `Records`, `Copies` and `Labels`; a function that makes the
    environment has them as attributes too. A judge can be shown the record, and examples of judging
    are made of responses that were labelled without acting (`experience.proposals`). No run copies
    an environment: the teacher's own turn is tried where the episode is played again.

    Attributes:
      system: the system message of the conversation; "" for none.
      task: the task of the current episode; set by `reset`.
      waits: its answers come from another process or a server, so the loop waits for many
        environments at once, each in a thread.
    """

    system: str
    task: Task
    waits: bool

    def size(self, split: str) -> int:
        """Number of tasks in `split`; ValueError naming the known splits otherwise.

        `NoTasks` for a known split whose data is missing.
        """
        ...

    def digest(self, split: str) -> str:
        """Identifies the tasks of `split`: equal digests mean equal tasks.

        It is a hash. An environment whose results could be mistaken for another's puts `LABEL-`
        before it, so that every table says what was played.
        """
        ...

    def reset(self, split: str, index: int) -> Observation:
        """Start task `index` of `split`. The task depends on these two alone.

        A ValueError refuses the task, and is a mistake in the settings if all tasks have it.
        """
        ...

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text.

        Any text has an answer: one that holds no action is a failed turn. The episode ends after
        `max_turns` at the latest. ValueError if no episode is running (`turns.TurnClock`).
        """
        ...


# --- Optional members ---------------------------------------------------------------------------


class Records(Protocol):
    """An environment that keeps a record of the episode, from what it has said.

    It is asked after each `reset` and `step`, in its own process, and the answer travels as
    `Observation.record`: that of the observation before a turn is the turn's (`Turn.record`).
    """

    def record(self) -> Mapping[str, Sequence[str]]:
        """What the agent may know by now, in words.

        Four lists: `seen`, places and what they were last seen to hold; `held`, what the agent
        holds; `changed`, what is no longer as it was; `tried`, commands so far and how they ended,
        oldest first. Nothing in it is hidden from the agent.
        """
        ...


class Copies(Protocol):
    """An environment whose state can be copied.

    Without `copy` a state is reached again by `reset` and the same responses, if equal responses
    have equal answers (a replay).
    """

    def copy(self) -> Env:
        """Another environment in the same state. A step of one leaves the other as it is."""
        ...


class Labels(Protocol):
    """An environment that can label a response without acting on it."""

    def label(self, response: str) -> str:
        """The `Observation.oracle` that `step(response)` would have now. Changes nothing."""
        ...


class Player(Protocol):
    """Answers observations in text, from what a player may know."""

    def respond(self, observation: Observation) -> str:
        """The whole response to the latest observation."""
        ...


MakePlayer = Callable[[Task, Observation, random.Random], Player]
# From the task, the record before a command, and the command: SKIP, WEAK or STRONG.
Rule = Callable[[Task, Mapping[str, Sequence[str]], str], str]
# From a response: its command and "", or "" and why there is none.
Parse = Callable[[str], tuple[str, str]]
