"""What the teacher is told and the student is not: text in the conversation that only it reads.

An aside is added to the user's message before a turn. The student's tokens stay as they were
sampled, and the teacher scores them in its own sequence, at positions of its own. If the teacher is
the student itself, this is self-distillation from a context.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation
from opd_jax.judge import prompt
from opd_jax.report.episodes import Episode, read_episodes
from opd_jax.runtime import bucket, processes
from opd_jax.runtime import by as named
from opd_jax.runtime.fields import check_within

# What `teacher_context.by` may be, besides `module:function` and "" for nothing.
KNOWN = {name: f"opd_jax.experience.asides:{name}" for name in ("record", "solved")}

# An episode to its asides: the text before the first turn, the second, …; "" for none. There may be
# fewer than turns.
Asides = Callable[[Conversation], Sequence[str]]


@dataclass(frozen=True)
class TeacherContext:
    """What the teacher is told besides the conversation.

    Attributes:
      by: a name of `KNOWN` or `module:function`; "": nothing.
      tokens: most tokens that it adds to a conversation. Beyond, the teacher reads the conversation
        as it is.
      file: of `solved`, an episode file.
      options: further keyword arguments of the function, as pairs, so that settings hash.
    """

    by: str
    tokens: int
    file: str
    options: tuple[Any, ...] = ()

    def __post_init__(self):
        check_within(1, tokens=self.tokens)
        if self.by == "solved" and not self.file:
            raise ValueError(
                "`teacher_context.by` = 'solved' shows episodes of a file: name it in "
                "`teacher_context.file`"
            )
        if not self.asides() and self.options:
            names = ", ".join(f"`teacher_context.{name}`" for name, _ in self.options)
            raise ValueError(f"{names}: nothing takes it, since `teacher_context.by` is empty")

    def asides(self) -> Asides | None:
        """The function that `by` names, with its options; None if the teacher is told nothing.

        Raises:
          ValueError: there is none, or it takes other arguments.
        """
        if not self.by:
            return None
        found = named.find(self.by, KNOWN, section="teacher_context")
        rest = partial(found, None)
        try:
            takes = inspect.signature(rest).parameters
        except (TypeError, ValueError):
            raise ValueError(
                f"`teacher_context.by` = {self.by!r}: expected a function of a conversation, got "
                f"{found!r}"
            ) from None
        options = {"file": self.file} if "file" in takes else {}
        options |= dict(self.options)
        named.check_arguments(self.by, rest, options, section="teacher_context")
        return partial(found, **options)


def with_asides(
    conversation: Conversation, asides: Sequence[str], *, chat: ChatFormat, most: int
) -> Conversation:
    """The conversation as the teacher reads it.

    A user's message with an aside is encoded again, with the aside behind it; all other tokens stay
    as they are, responses always. If more than `most` tokens are added, nothing is.

    Raises:
      ValueError: an aside is no text.
    """
    if any(not isinstance(aside, str) for aside in asides):
        raise ValueError(
            f"`teacher_context.by`: expected a text for each turn, got {list(asides)!r:.200}"
        )
    told = dataclasses.replace(conversation, tokens=[], turn_id=[], logprobs=[], spans=[])
    said = [m.content for m in conversation.messages if m.role == "user"]
    system = "".join(m.content for m in conversation.messages[:1] if m.role == "system")
    end = 0
    for k, (start, stop) in enumerate(conversation.spans):
        given = conversation.tokens[end:start]
        if aside := asides[k] if k < len(asides) else "":
            message = f"{said[k]}\n{aside}"
            if k:
                ended = conversation.turns[k - 1].stop == "stop_token"
                given = chat.follow(message, ended=ended)
            else:
                given = chat.first(system, message)
        told.append_given(given)
        told.append_response(
            conversation.tokens[start:stop],
            conversation.logprobs[start:stop],
            conversation.turn_id[start],
        )
        end = stop
    added = len(told.tokens) - end
    if added > most:
        processes.warn(
            "`teacher_context.tokens` = %d: the teacher would read %d tokens more in %s, so it "
            "reads the conversation as it is",
            *(most, added, conversation.task.id if conversation.task else "an episode"),
        )
        return conversation
    return told


def record(conversation: Conversation) -> Sequence[str]:
    """What the environment had recorded before each turn, as the judge's question shows it.

    The conversation says it too, but over many messages. The whole record is told at every turn, so
    the tokens grow with the square of the turns.
    """
    return [prompt.RECORD.format(record=prompt.told(turn)) for turn in conversation.turns]


def solved(conversation: Conversation, *, file: str) -> Sequence[str]:
    """An episode in which a task of the same type was solved, before the first turn.

    Which one depends on the task alone. It is never an episode of the same task.

    Args:
      conversation: whose teacher reads it.
      file: an episode file (docs/episodes.md), in a bucket too.

    Raises:
      ValueError: the file has no episode that succeeded.

    Source: ours, after GC-OPD, whose teacher reads executions that it retrieves.
    """
    task, found = conversation.task, _solved(file)
    if task is None:
        return ()
    others = [text for name, text in found.get(task.type, ()) if name != task.id]
    if not others:
        return ()
    number = int.from_bytes(hashlib.sha256(task.id.encode()).digest()[:8], "big")
    return (others[number % len(others)],)


@cache
def _solved(file: str) -> Mapping[str, Sequence[tuple[str, str]]]:
    """Type of task to (task, text) of its episodes that succeeded."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in read_episodes(bucket.place(file, name="teacher_context.file")):
        if line.get("success") is True:
            task = line.get("task", {})
            found.setdefault(task.get("kind", ""), []).append((task.get("id", ""), _text(line)))
    if not found:
        raise ValueError(f"`teacher_context.file` = {file!r}: it has no episode that succeeded")
    return found


def _text(line: Episode) -> str:
    said = [m["content"] for m in line["messages"] if m["role"] != "system"]
    return "\n".join(["Such a task was solved so:", *said])
