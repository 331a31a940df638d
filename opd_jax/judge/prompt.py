"""The question that the judge is asked about a turn.

It holds the teacher's role, a rubric for three words, and the fields of the paper's Table 9. With
the context "history" the question follows the conversation, and holds only what the conversation
does not. There the teacher sees what was tried before. Without that, going back to a place looks as
good as going to a new one.
"""

from dataclasses import dataclass, field
from typing import Any

from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.envs.base import Task
from opd_jax.envs.turns import listed
from opd_jax.judge.answer import DECODINGS, LABELS
from opd_jax.model import ModelConfig
from opd_jax.runtime.fields import (
    FIGURES,
    LAYOUT,
    METHOD,
    affects,
    check_choice,
    check_within,
)

# The fixed lines of the prompt. The wording is ours; the fields and the rubric's meaning are the
# paper's (Table 9).
ROLE = (
    "You are a gatekeeper. Decide whether the agent's proposed action needs correction by its "
    "teacher."
)
RUBRIC = (
    "Answer with one word. SKIP: the action is reasonable, as good as what you would prefer, or "
    "too ambiguous to correct. WEAK: it may be suboptimal, but that is uncertain or of low impact. "
    "STRONG: it is clearly wrong, off task, redundant or likely to fail."
)
ADMISSIBLE, FEEDBACK = "Admissible actions: ", "Feedback: "
TABLE_9 = (
    "Task type: ",
    "Goal: ",
    "Scene: ",
    "Observation: ",
    ADMISSIBLE,
    "Agent's response: ",
)
# Which fields each context has.
FIELDS = {
    "table9": TABLE_9,
    "+feedback": (*TABLE_9, FEEDBACK),
    "history": (ADMISSIBLE,),
}

# All fixed text of a prompt, for a tokenizer that is built around it.
PHRASES = ("\n".join([ROLE, RUBRIC, *FIELDS["+feedback"]]), *LABELS)


def judge_prompt(task: Task, turn: Turn, *, admissible_shown: int, context: str) -> str:
    """The question about one turn.

    Args:
      task: the episode's task.
      turn: the turn to judge.
      admissible_shown: most admissible actions to list; the rest are counted.
      context: "table9": what the student saw and wrote; "+feedback": also what the environment
        answered (the paper's section 3.3 mentions it, its Table 9 does not); "history": only what
        the conversation does not hold, for a question that follows it.
    """
    values = {
        "Task type: ": task.type,
        "Goal: ": task.goal,
        "Scene: ": task.scene,
        "Observation: ": turn.observation,
        ADMISSIBLE: listed(turn.admissible, admissible_shown),
        "Agent's response: ": turn.response,
        FEEDBACK: turn.feedback,
    }
    return "\n".join([ROLE, RUBRIC, *(name + values[name] for name in FIELDS[context])])


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is asked.

    Attributes:
      decode: "constrained" or "generate" (`answer`).
      context: see `judge_prompt`.
      admissible_shown: see `judge_prompt`.
      batch: most questions at a time; with "history", most conversations.
      length_multiple: questions are padded to a multiple of this; conversations are read in pieces
        of this length.
      max_new_tokens: longest answer of the `generate` decoding.
      agreement_every: every so many updates the other decoding is asked too; 0: never.
    """

    decode: str = field(metadata=affects(METHOD, FIGURES))
    context: str = field(metadata=affects(METHOD, FIGURES))
    admissible_shown: int = field(metadata=affects(METHOD, FIGURES))
    batch: int = field(metadata=affects(LAYOUT))
    length_multiple: int = field(metadata=affects(LAYOUT))
    max_new_tokens: int = field(metadata=affects(METHOD, FIGURES))
    agreement_every: int = field(metadata=affects(FIGURES))

    def __post_init__(self):
        check_choice(DECODINGS, decode=self.decode)
        check_choice(FIELDS, context=self.context)
        check_within(0, admissible_shown=self.admissible_shown)
        check_within(0, agreement_every=self.agreement_every)
        check_within(
            1,
            batch=self.batch,
            length_multiple=self.length_multiple,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True)
class Judge:
    """Everything but the parameters that turns the teacher into a judge."""

    model: ModelConfig
    tokenizer: Any
    chat: ChatFormat
    settings: JudgeSettings

    def question(self, conversation: Conversation, index: int) -> list[int]:
        """The tokens of the question about one turn, up to where the answer starts.

        With "history" they are the conversation's next message, else a conversation of their own.
        """
        task, turn = conversation.task, conversation.turns[index]
        assert task is not None  # a row that only fills a batch has no turns
        how = self.settings
        text = judge_prompt(task, turn, admissible_shown=how.admissible_shown, context=how.context)
        if how.context != "history":
            return self.chat.first("", text)
        return self.chat.follow(text, ended=turn.stop == "stop_token")

    def prefix(self, conversation: Conversation, index: int) -> list[int]:
        """The tokens before the question: with "history" all up to the turn's end, else none."""
        if self.settings.context != "history":
            return []
        return conversation.tokens[: conversation.spans[index][1]]
