"""Episodes from a file, as conversations to learn from (docs/episodes.md)."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation, open_conversation, record_turn
from opd_jax.agent.rollout import beginning
from opd_jax.agent.session import Response
from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.envs.faults import Begun
from opd_jax.experience.tasks import Panel
from opd_jax.losses import NO_TURN
from opd_jax.report.episodes import Episode, read_episodes


def recorded_panel(path: Path) -> Panel:
    """The number of a file's episodes, and a digest of its content. Errors as `read_episodes`."""
    size = len(read_episodes(path))
    return Panel(size, hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def read_conversations(
    path: Path, *, agent: Agent, only_success: bool, max_turns: int
) -> list[Conversation]:
    """The episodes of a file that there is something to learn from.

    Args:
      path: the file.
      agent: who learns. It gives the chat format, and the limit of a context.
      only_success: leave out episodes that did not succeed.
      max_turns: most turns of an episode.

    Raises:
      ValueError: a line is no episode, an episode has more turns, or none is left.
    """
    lines = [line for line in read_episodes(path) if line.get("end") != BROKEN]
    if only_success:
        lines = [line for line in lines if line.get("success") is True]
    found = []
    for line in lines:
        try:
            conversation = recorded(line, agent=agent)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            name = line["messages"][0]["content"][:40]
            raise ValueError(
                f"`{path}`: an episode, which begins with {name!r}, has fields of another form: "
                f"{type(error).__name__}: {error}; see docs/episodes.md"
            ) from None
        if len(conversation.turns) > max_turns:
            raise ValueError(
                f"`env.max_turns` = {max_turns}: an episode of `{path}` has "
                f"{len(conversation.turns)} turns; raise it"
            )
        if any(turn != NO_TURN for turn in conversation.turn_id):
            found.append(conversation)
    if not found:
        kind = "that succeeded and has" if only_success else "with"
        raise ValueError(
            f"`data.source`: `{path}` has no episode {kind} a response to learn from that fits "
            "`rollout.context_tokens`"
        )
    return found


def beginnings(
    conversations: Sequence[Conversation], *, seed: str, last: int = 0
) -> tuple[list[tuple[str, int]], list[list[Response]]]:
    """The tasks of episodes, and of each the responses with which it is to begin again.

    Args:
      conversations: the episodes.
      seed: draws how many: from none to all but the last.
      last: all but so many instead; 0: they are drawn.
    """
    rng = random.Random(seed)
    tasks, replay = [], []
    for c in conversations:
        turns = rng.randrange(max(len(c.turns), 1))
        turns = max(len(c.turns) - last, 0) if last else turns
        tasks.append((c.split, c.index))
        replay.append(beginning(c, turns=turns))
    return tasks, replay


def recorded(line: Episode, *, agent: Agent) -> Conversation:
    """The conversation that a line holds, up to the last turn that fits the agent's context.

    Its tokens are those of the line if they are this agent's, else the messages' as its chat format
    writes them. Nothing is learnt from a turn that is a replay.
    """
    chat, context_tokens = agent.chat, agent.decoding.context_tokens
    system, seen, said = _parts(line)
    told = line.get("task", {})
    task = Task(told.get("id", "recorded"), told.get("kind", ""), goal="", scene="")
    end = line.get("end") or ("success" if line.get("success") else "unknown")
    # What the environment said before each turn, and after the last.
    heard = [
        _observation(line, seen, k, "" if k < len(said) else end) for k in range(len(said) + 1)
    ]
    begun = Begun(heard[0], task, system)
    conversation = open_conversation(
        begun,
        *(told.get("split", ""), told.get("index", -1)),
        chat=chat,
        context_tokens=context_tokens,
    )
    if conversation.end:
        return conversation
    responses = _stored(line, agent)
    for k, text in enumerate(said):
        turn = _turn(line, k)
        if responses:
            response, stop = responses[k], turn.get("stop", "stop_token")
        else:
            tokens = [*chat.response(text), chat.stop_ids[0]]
            response, stop = _Sampled(tokens, [0.0] * len(tokens)), "stop_token"
        if len(conversation.tokens) + len(response.tokens) > context_tokens:
            conversation.end = "context"
            break
        own = NO_TURN if turn.get("actor") == "replay" else k
        conversation.append_response(*response, own)
        after = heard[k + 1]
        record_turn(conversation, heard[k], text, stop, after)
        if after.done:
            break
        follow = chat.follow(after.message, ended=response.tokens[-1] in chat.stop_ids)
        if len(conversation.tokens) + len(follow) >= context_tokens:
            conversation.end = "context"
            break
        conversation.append_given(follow)
    return conversation


class _Sampled(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


def _parts(line: Episode) -> tuple[str, list[str], list[str]]:
    """The system's message, those of the user, and those of the assistant."""
    by: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for message in line["messages"]:
        by[message["role"]].append(message["content"])
    return "".join(by["system"]), by["user"], by["assistant"]


def _turn(line: Episode, k: int) -> dict[str, Any]:
    turns = line.get("turns", [])
    return turns[k] if k < len(turns) else {}


def _observation(line: Episode, seen: Sequence[str], k: int, end: str) -> Observation:
    """What the environment said before turn k, and of the turn before."""
    turn = _turn(line, k - 1) if k else {}
    record = _turn(line, k).get("record", {})
    text = seen[k] if k < len(seen) else ""
    return Observation(
        text=text,
        message=text,
        admissible=(),
        end=end,
        score=line.get("score") or 0.0,
        action=turn.get("action", ""),
        failure=turn.get("failure", ""),
        oracle=turn.get("label", ""),
        measures=line.get("measures", {}),
        record={name: tuple(texts) for name, texts in record.items()},
    )


def _stored(line: Episode, agent: Agent) -> list[_Sampled] | None:
    """The responses in the line's own tokens; None if there are none, or not this agent's.

    They are if its chat format writes what is between the responses as it is there, and its
    tokenizer decodes the responses to the texts of the messages.
    """
    if "tokens" not in line:
        return None
    ids, of_turn = line["tokens"]["id"], line["tokens"]["turn"]
    logprobs = [x or 0.0 for x in line["tokens"]["sampled_logprob"]]
    if not len(ids) == len(of_turn) == len(logprobs):
        raise ValueError("`tokens`: expected `id`, `turn` and `sampled_logprob` of one length")
    chat, (system, seen, said) = agent.chat, _parts(line)
    given, at, found = chat.first(system, seen[0]), 0, []
    for k, text in enumerate(said):
        start = at + len(given)
        if ids[at:start] != given:
            return None
        at = start
        if at < len(ids) and of_turn[at] != k:  # it carried no loss
            # Its own stop token ends it, or the one that the chat format puts behind it.
            at = next((n for n in range(start, len(ids)) if ids[n] in chat.stop_ids), len(ids))
            at += _turn(line, k).get("stop", "stop_token") == "stop_token"
        while at < len(ids) and of_turn[at] == k:
            at += 1
        tokens = ids[start:at]
        if not tokens or agent.text(tokens) != text:
            return None
        found.append(_Sampled(tokens, logprobs[start:at]))
        if k + 1 < len(said):
            given = chat.follow(seen[k + 1], ended=tokens[-1] in chat.stop_ids)
    return found
