"""The context of a response: the tokens of its episode that it is sampled from and scored on.

With the full history a turn's context is everything before it: an episode is one row, and the cache
only grows. With a limited history the context is the first prompt, which holds the task, and the
last few turns. Such contexts are not prefixes of each other, so each later turn becomes its own
row. Tokens are cut, never rendered or encoded again: a turn is scored on exactly the tokens it was
sampled from.
"""

import dataclasses
from collections.abc import Sequence

from opd_jax.agent.conversation import Conversation


def context(
    conversation: Conversation, *, turns: int, history_turns: int, left_out: Sequence[int]
) -> list[int]:
    """The tokens that the response after the first `turns` is sampled from.

    If turns are left out, the context is the first prompt, then `left_out` as its response, then
    everything after the last response left out.

    Args:
      conversation: the episode, with the tokens after its first `turns` responses.
      turns: number of responses before this one.
      history_turns: most of them that the context shows; 0: all.
      left_out: tokens of a response that says that turns are left out (`ChatFormat.left_out`).
    """
    spans = conversation.spans
    end = spans[turns][0] if turns < len(spans) else len(conversation.tokens)
    if not history_turns or turns <= history_turns:
        return conversation.tokens[:end]
    last = turns - history_turns - 1  # the last one that is left out
    # The tokens after a response start with its end-of-turn token. If that was sampled, it is the
    # response's last token.
    start = spans[last][1] - (conversation.turns[last].stop == "stop_token")
    prompt = conversation.tokens[: spans[0][0]]
    return [*prompt, *left_out, *conversation.tokens[start:end]]


def rows(
    conversations: Sequence[Conversation], *, history_turns: int, left_out: Sequence[int]
) -> tuple[list[Conversation], list[int]]:
    """The sequences that training scores, and which episode each belongs to.

    An episode's first row holds all turns that were sampled from the full history. Every later turn
    is a row of its own, with a context that carries no loss. So each response is scored once.
    Without a limit the rows are the episodes.
    """
    result: list[Conversation] = []
    episodes: list[int] = []
    for number, conversation in enumerate(conversations):
        whole = history_turns + 1 if history_turns else len(conversation.spans)
        parts = [conversation]
        if len(conversation.spans) > whole:
            parts = [_cut(conversation, conversation.spans[whole - 1][1])]
            parts += [
                _turn(conversation, turn, history_turns=history_turns, left_out=left_out)
                for turn in range(whole, len(conversation.spans))
            ]
        result += parts
        episodes += [number] * len(parts)
    return result, episodes


def _cut(conversation: Conversation, end: int) -> Conversation:
    """The first `end` tokens."""
    return dataclasses.replace(
        conversation,
        tokens=conversation.tokens[:end],
        turn_id=conversation.turn_id[:end],
        logprobs=conversation.logprobs[:end],
    )


def _turn(
    conversation: Conversation, turn: int, *, history_turns: int, left_out: Sequence[int]
) -> Conversation:
    """One response after its context."""
    start, end = conversation.spans[turn]
    row = dataclasses.replace(conversation, tokens=[], turn_id=[], logprobs=[], spans=[])
    row.append_given(
        context(conversation, turns=turn, history_turns=history_turns, left_out=left_out)
    )
    row.append_response(
        conversation.tokens[start:end],
        conversation.logprobs[start:end],
        conversation.turn_id[start],
    )
    return row
