"""The question that the judge is asked about a turn.

It holds the teacher's role, a rubric for three words, and the fields of the paper's Table 9. With
the context "history" the question follows the conversation, and holds only what the conversation
does not. There the teacher sees what was tried before. Without that, going back to a place looks as
good as going to a new one.
"""

import re

from opd_jax.agent.conversation import Turn
from opd_jax.envs.base import Task
from opd_jax.envs.turns import listed

# The words of an answer.
LABELS = ("SKIP", "WEAK", "STRONG")
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
TABLE_9 = (
    "Task type: {task.type}\n"
    "Goal: {task.goal}\n"
    "Scene: {task.scene}\n"
    "Observation: {turn.observation}\n"
    "Admissible actions: {admissible}\n"
    "Agent's response: {turn.response}"
)
# Which fields each context has.
FIELDS = {
    "table9": TABLE_9,
    "+feedback": TABLE_9 + "\nFeedback: {turn.feedback}",
    "history": "Admissible actions: {admissible}",
}

# All fixed text of a prompt, for a tokenizer that is built around it.
PHRASES = ("\n".join([ROLE, RUBRIC, re.sub("{.*?}", "", FIELDS["+feedback"])]), *LABELS)


def judge_prompt(task: Task, turn: Turn, *, admissible_shown: int, context: str) -> str:
    """The question about one turn.

    Args:
      admissible_shown: most admissible actions to list; the rest are counted.
      context: "table9": what the student saw and wrote; "+feedback": also what the environment
        answered (the paper's section 3.3 mentions it, its Table 9 does not); "history": only what
        the conversation does not hold, for a question that follows it.
    """
    admissible = listed(turn.admissible, admissible_shown)
    fields = FIELDS[context].format(task=task, turn=turn, admissible=admissible)
    return "\n".join([ROLE, RUBRIC, fields])
