"""An episode, token by token: what rollout, judge and objective share.

The turn of a token is recorded when the token is sampled. It is never edited, and never derived
again from text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from opd_jax.agent.chat import ChatFormat
from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.envs.faults import Begun
from opd_jax.losses import NO_TURN
from opd_jax.runtime import processes
from opd_jax.runtime.exits import WorldFailed


class Message(NamedTuple):
    """What was said, and by whom: "system", "user" (the environment) or "assistant"."""

    role: str
    content: str


class Actor(IntEnum):
    """Who wrote a turn.

    STUDENT is whoever the rollout is of, in an evaluation of the teacher too. TEACHER took a turn
    of the student's episode. REPLAY: the turn is an earlier episode's.
    """

    STUDENT = 0
    TEACHER = 1
    REPLAY = 2


@dataclass
class Turn:
    """One turn of one conversation, on the host.

    Attributes:
      observation: the environment's text that the student reacts to.
      admissible: the commands admissible at that point.
      response: the student's whole response text.
      stop: why sampling ended (`session.Response`).
      action: the action parsed from the response; "" if none.
      failure: the environment's name for a deterministic failure; "" if none.
      feedback: the environment's answer.
      oracle: the environment's own label of the turn, used for measuring only; "" if none.
      record: what the environment had told before the turn (`base.Records`), lists by name; empty
        where it keeps no record.
      actor: who wrote it.
    """

    observation: str
    admissible: tuple[str, ...]
    response: str
    stop: str
    action: str
    failure: str
    feedback: str
    oracle: str
    record: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    actor: Actor = Actor.STUDENT


@dataclass
class Conversation:
    """One episode while it grows.

    Attributes:
      task: what is played; None for a row that only fills a batch.
      split, index: the environment's task; "" and -1 if there is none.
      messages: the conversation in text. The k-th of the assistant is the k-th turn's response; the
        last one may be the environment's.
      tokens: every token so far.
      turn_id: the turn that each token was sampled in, or `NO_TURN` if it is not learnt from.
      logprobs: each token's log-probability as sampled; 0 if it was not sampled.
      spans: start and end position of each response, whoever wrote it.
      turns: finished turns.
      end: why the episode ended: what the environment said (`Observation.end`, e.g. `BROKEN`),
        "context" if the agent's context was full, "depth" if its turns were limited, "cut" at a
        repeated failure; "" while it runs.
      score: the environment's score.
      measures: the environment's further figures (`Observation.measures`).
      refused: what the environment said when it refused to begin (`faults.Begun`).
    """

    task: Task | None
    split: str = ""
    index: int = -1
    messages: list[Message] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    turn_id: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    end: str = ""
    score: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)
    refused: str = ""

    @property
    def success(self) -> bool:
        """The goal was reached."""
        return self.end == "success"

    @property
    def unfit(self) -> bool:
        """The context has no room for a first turn."""
        return self.end == "context" and not self.turns

    @property
    def broken(self) -> bool:
        """The environment failed, or nothing fits: nothing is learnt or measured here."""
        return self.end == BROKEN or self.unfit

    @property
    def repeated_actions(self) -> int:
        """Number of turns whose action was already taken earlier in the episode."""
        actions = [turn.action for turn in self.turns if turn.action]
        return len(actions) - len(set(actions))

    @property
    def repeats_failure(self) -> bool:
        """The last turn failed, and its action is that of the turn before."""
        if len(self.turns) < 2:
            return False
        before, last = self.turns[-2:]
        return bool(last.failure and last.action) and last.action == before.action

    def is_given(self, turn: int) -> bool:
        """Whether a turn's tokens carry no loss, such as replayed ones."""
        if turn >= len(self.spans):  # an episode without tokens
            return False
        return self.turn_id[self.spans[turn][0]] == NO_TURN

    def append_given(self, tokens: Sequence[int]) -> None:
        """Appends tokens that the student did not sample: prompts, observations, headers."""
        self.tokens.extend(tokens)
        self.turn_id.extend([NO_TURN] * len(tokens))
        self.logprobs.extend([0.0] * len(tokens))

    def append_response(self, tokens: Sequence[int], logprobs: Sequence[float], turn: int) -> None:
        """Appends a response as sampled. `turn` is `NO_TURN` if nothing is learnt from it."""
        self.spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens.extend(tokens)
        self.turn_id.extend([turn] * len(tokens))
        self.logprobs.extend(logprobs)


def opening(begun: Begun, split: str, index: int) -> Conversation:
    """An episode of a task that so far has no token; it is over if the environment broke."""
    observation, task, system, refused = begun
    conversation = Conversation(task, split, index, end=observation.end, refused=refused)
    if not observation.done:
        said = [Message("system", system), Message("user", observation.message)]
        conversation.messages = said if system else said[1:]
    return conversation


def open_conversation(
    begun: Begun, split: str, index: int, *, chat: ChatFormat, context_tokens: int
) -> Conversation:
    """An episode that so far has only its first prompt.

    It is over, and empty, if the environment broke, or if the prompt leaves no room for a token
    within `context_tokens`.
    """
    conversation = opening(begun, split, index)
    if conversation.end:
        return conversation
    prompt = chat.first(begun.system, begun.observation.message)
    if len(prompt) >= context_tokens:
        processes.warn(
            "`rollout.context_tokens`: the first prompt of %s has %d tokens, expected fewer than "
            "%d; its episodes are left out",
            *(begun.task.id, len(prompt), context_tokens),
        )
        conversation.end = "context"
    else:
        conversation.append_given(prompt)
    return conversation


def check_some_played(conversations: Sequence[Conversation]) -> None:
    """Checks that not all episodes are `broken`; warns of tasks that their environment refused.

    Raises:
      ValueError: none fits its context, or the environment refused all of them: a mistake in the
        settings.
      WorldFailed: environments failed.
    """
    number = len(conversations)
    if all(c.unfit for c in conversations):
        raise ValueError(
            f"`rollout.context_tokens`: none of {number} episodes fits; raise it above the lengths "
            "in the warnings"
        )
    if all(c.refused for c in conversations):
        raise ValueError(f"`env`: {conversations[0].refused}")
    for c in conversations:
        if c.refused and c.task:
            processes.warn("`env`: %s is left out: %s", c.task.id, c.refused)
    if all(c.broken for c in conversations):
        raise WorldFailed(
            f"`env`: the environments of all {number} episodes broke; the warnings above say how"
        )


def record_turn(
    conversation: Conversation,
    before: Observation,
    response: str,
    stop: str,
    after: Observation,
    *,
    actor: Actor = Actor.STUDENT,
) -> None:
    """Adds a finished turn to its conversation; ends the conversation if the environment did.

    The agent reacted to `before`, and the environment answered `after`. For the others see `Turn`.
    """
    conversation.turns.append(
        Turn(
            observation=before.text,
            admissible=before.admissible,
            response=response,
            stop=stop,
            action=after.action,
            failure=after.failure,
            feedback=after.text,
            oracle=after.oracle,
            record=before.record,
            actor=actor,
        )
    )
    conversation.messages.append(Message("assistant", response))
    if after.message or not after.done:
        conversation.messages.append(Message("user", after.message))
    conversation.score = after.score
    conversation.measures = after.measures
    conversation.end = after.end
