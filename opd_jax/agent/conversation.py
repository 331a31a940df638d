"""The contract between rollout, teacher and objective.

Written once, when tokens are sampled, and never edited: which token belongs to which turn is
recorded at that moment and not re-derived from text. What the teacher adds is a second pytree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flax import struct

from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.losses import NO_TURN


@dataclass
class Turn:
    """One turn of one conversation, on the host.

    Attributes:
      observation: the environment's words that the student reacts to.
      admissible: the commands admissible then.
      response: the student's whole response text.
      stop: why sampling ended: "stop_token", "turn_budget" or "context".
      action: the action parsed from the response; "" if none.
      failure: deterministic failure in the environment's terms; "" if none.
      feedback: the environment's answer.
      oracle: the environment's own label of the turn, where it has one; for measuring only.
    """

    observation: str
    admissible: tuple[str, ...]
    response: str
    stop: str
    action: str
    failure: str
    feedback: str
    oracle: str


@dataclass
class Conversation:
    """One episode while it grows: tokens in, tokens out.

    Attributes:
      task: what is played; None for a row that only fills a batch.
      tokens: every token so far.
      turn_id: the turn each token was sampled in, or `NO_TURN`.
      logprobs: of sampled tokens as sampled; 0 for others.
      spans: of each response, whoever wrote it, the positions where it starts and ends.
      turns: finished turns.
      end: why the episode ended: as the environment said (`Observation.end`), `BROKEN` included,
        or "context" where the agent's context was full; "" while it runs.
      score: the environment's score.
      measures: the environment's further figures (`Observation.measures`).
    """

    task: Task | None
    tokens: list[int] = field(default_factory=list)
    turn_id: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    end: str = ""
    score: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """The goal was reached."""
        return self.end == "success"

    @property
    def broken(self) -> bool:
        """The environment failed: the record is kept, and nothing is learnt or measured from it."""
        return self.end == BROKEN

    @property
    def repeated_actions(self) -> int:
        """Number of turns whose action was already taken earlier in the episode."""
        actions = [turn.action for turn in self.turns if turn.action]
        return len(actions) - len(set(actions))

    def append_given(self, tokens: Sequence[int]) -> None:
        """Tokens that the student did not sample: prompts, observations, headers."""
        self.tokens.extend(tokens)
        self.turn_id.extend([NO_TURN] * len(tokens))
        self.logprobs.extend([0.0] * len(tokens))

    def append_response(self, tokens: Sequence[int], logprobs: Sequence[float], turn: int) -> None:
        """Tokens sampled in turn `turn`, exactly as sampled; `NO_TURN` if the student did not."""
        self.spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens.extend(tokens)
        self.turn_id.extend([turn] * len(tokens))
        self.logprobs.extend(logprobs)


def open_conversation(task: Task, prompt: Sequence[int], *, context_tokens: int) -> Conversation:
    """An episode of which only the first prompt is known.

    Raises:
      ValueError: the prompt leaves no room for a token within `context_tokens`.
    """
    if len(prompt) >= context_tokens:
        raise ValueError(
            f"`context_tokens`: the first prompt of {task.id} has {len(prompt)} tokens, expected "
            f"fewer than {context_tokens}; raise it"
        )
    conversation = Conversation(task=task)
    conversation.append_given(prompt)
    return conversation


def record_turn(
    conversation: Conversation, before: Observation, response: str, stop: str, after: Observation
) -> None:
    """Add a finished turn to its conversation; end the conversation if the environment did.

    Args:
      conversation: changed in place.
      before: what the agent reacted to.
      response: what it wrote.
      stop: see `Turn`.
      after: the environment's answer.
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
        )
    )
    conversation.score = after.score
    conversation.measures = after.measures
    conversation.end = after.end


@struct.dataclass
class Trajectory:
    """A batch of episodes, padded on the right.

    Attributes:
      tokens: int32 [B, T]; padding is 0.
      turn_id: int32 [B, T]; k for a token sampled in the k-th turn, else `NO_TURN`; `NO_TURN`
        throughout an episode whose environment broke, which therefore carries no loss.
      sampled_logprobs: float32 [B, T], nats; 0 where `turn_id` is `NO_TURN`.
      lengths: int32 [B], tokens before the padding.
      num_turns: int32 [B].
      failed: bool [B, K], deterministic failure of each turn; False where the environment broke.
      success: bool [B].
      score: float32 [B].
    """

    tokens: np.ndarray
    turn_id: np.ndarray
    sampled_logprobs: np.ndarray
    lengths: np.ndarray
    num_turns: np.ndarray
    failed: np.ndarray
    success: np.ndarray
    score: np.ndarray


def pack(
    conversations: Sequence[Conversation], *, max_turns: int, length_multiple: int
) -> Trajectory:
    """Conversations as arrays `[B, T]`, T the longest rounded up to a multiple.

    Rounding bounds the number of shapes, and so of compiled programs, that training meets.

    Args:
      conversations: B of them, at least one.
      max_turns: K.
      length_multiple: T is a multiple of this.

    Raises:
      ValueError: a conversation has more turns than `max_turns`.
    """
    longest = max(len(c.tokens) for c in conversations)
    T = -(-longest // length_multiple) * length_multiple
    B = len(conversations)
    out = Trajectory(
        tokens=np.zeros((B, T), np.int32),
        turn_id=np.full((B, T), NO_TURN, np.int32),
        sampled_logprobs=np.zeros((B, T), np.float32),
        lengths=np.array([len(c.tokens) for c in conversations], np.int32),
        num_turns=np.array([len(c.turns) for c in conversations], np.int32),
        failed=np.zeros((B, max_turns), bool),
        success=np.array([c.success for c in conversations]),
        score=np.array([c.score for c in conversations], np.float32),
    )
    for row, c in enumerate(conversations):
        if len(c.turns) > max_turns:
            raise ValueError(
                f"`max_turns`: trajectory {row} has {len(c.turns)} turns, expected at most "
                f"{max_turns}"
            )
        out.tokens[row, : len(c.tokens)] = c.tokens
        if c.broken:
            continue
        out.turn_id[row, : len(c.tokens)] = c.turn_id
        out.sampled_logprobs[row, : len(c.tokens)] = c.logprobs
        out.failed[row, : len(c.turns)] = [bool(t.failure) for t in c.turns]
    return out


def check(trajectory: Trajectory, *, vocab_size: int) -> None:
    """Host-side check of everything the compiled world takes for granted.

    Args:
      trajectory: a batch, on the host.
      vocab_size: of the model that will read it.

    Raises:
      ValueError: naming the field and the first offending row.
    """
    t = trajectory
    T = t.tokens.shape[1]
    K = t.failed.shape[1]
    padding = np.arange(T) >= t.lengths[:, None]
    rules = {
        "tokens": ((t.tokens < 0) | (t.tokens >= vocab_size), f"expected 0..{vocab_size - 1}"),
        "turn_id": ((t.turn_id < NO_TURN) | (t.turn_id >= K), f"expected {NO_TURN}..{K - 1}"),
        "turn_id[:, 0]": (t.turn_id[:, :1] != NO_TURN, "nothing precedes the first token"),
        "turn_id in padding": (padding & (t.turn_id != NO_TURN), f"expected {NO_TURN}"),
        "sampled_logprobs": (
            ~(np.isfinite(t.sampled_logprobs) & (t.sampled_logprobs <= 0)),
            "expected finite log-probabilities, at most 0",
        ),
    }
    for name, (wrong, expected) in rules.items():
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(f"`{name}` of trajectory {row}, position {column}: {expected}")
