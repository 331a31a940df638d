"""Tokens of the messages appended to a conversation; nothing is ever rendered again.

A rollout is token in, token out: sampled tokens stay as they are, and a new user message only adds
tokens after them. Rendering the whole conversation again could change its tokens. Some templates
rewrite earlier turns (Qwen3 strips their think blocks), and decoded text need not encode to the
tokens it came from. The kept cache and log-probabilities would then belong to other tokens. So the
template is rendered a few times with sentinels as contents, and cut at the sentinels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opd_jax.envs.turns import encodable
from opd_jax.hf.chat_template import ROLES, render

# The response that stands for earlier ones in a context that shows only the last few turns.
LEFT_OUT = "(Earlier turns are left out.)"


@dataclass(frozen=True)
class ChatFormat:
    """A chat template cut into the texts around message contents, thinking switched off.

    Contents are not changed, even if the template would trim them; only a lone surrogate becomes
    `?`. The text of a special token inside a content is encoded as ordinary text, so an observation
    cannot end a turn. Added tokens that are not declared special (Qwen3's `<think>`) stay single
    tokens.

    Attributes:
      tokenizer: the `transformers` tokenizer that the texts came from.
      special_ids: its special tokens.
      opening: text before and after the first user content if no system message is given. It
        includes the template's default system message.
      system_opening: text before the system content, between it and the user content, and after;
        None if the template has no system role.
      following: text between an assistant content and the next user content, and after the latter.
      lead: text that the template puts between the prompt and an assistant content, such as the
        blank of Llama 2; most have none.
      stop_ids: tokens that end a response: the one that follows an assistant content in the
        template, then the tokenizer's end-of-sequence token, then those of the model's folder.
      turn_marks: other special tokens, and added ones that the template writes, such as one that
        opens a turn. In a response they begin an invented turn. Marks of thinking are not among
        them.
    """

    tokenizer: Any
    special_ids: frozenset[int]
    opening: tuple[str, ...]
    system_opening: tuple[str, ...] | None
    following: tuple[str, ...]
    lead: str
    stop_ids: tuple[int, ...]
    turn_marks: frozenset[int]

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """Tokens of `LEFT_OUT` as a response."""
        return tuple(self.response(LEFT_OUT))

    @property
    def opened_thinking(self) -> str:
        """`<think>` if the template opens a response with it, else nothing."""
        return "<think>" if self.following[-1].rstrip().endswith("<think>") else ""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, end_ids: Sequence[int] = ()) -> "ChatFormat":
        """Derives the format from the chat template of a `transformers` tokenizer.

        `end_ids` are further tokens that end a response (`hf.read_end_ids`).

        Raises:
          ValueError: the template is missing, fails, drops or repeats a content, renders later
            turns differently, or does not close a response with a special token.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`tokenizer` must have a chat template, got none; set `tokenizer.chat_template` "
                "or use the tokenizer of an instruction-tuned model"
            )
        _, answered, *following = _around(tokenizer, "uau")
        lead = answered.removeprefix(following[1]) if answered.startswith(following[1]) else ""
        longer = [_around(tokenizer, "uauau")]
        try:
            system_opening = _around(tokenizer, "su")
        except ValueError:  # Some templates refuse the role (Gemma) or leave it out.
            system_opening = None
        else:
            longer.append(_around(tokenizer, "suauau"))
        for texts in longer:
            if list(texts[-2:]) != following or texts[-4] != following[0]:
                raise ValueError(
                    "the chat template of `tokenizer` must render every turn after the first "
                    f"alike, got {following} in two turns and {texts[-4:]} in three; "
                    "use a template that does not depend on the number of turns"
                )
        added = tokenizer.added_tokens_decoder
        special = frozenset(i for i, token in added.items() if token.special)
        ids = tokenizer.encode(following[0], add_special_tokens=False)
        cut = next((n for n, i in enumerate(ids) if i in special), None)
        if cut is None or tokenizer.decode(ids[:cut]).strip():
            raise ValueError(
                "the chat template of `tokenizer` must close a response with a special token, "
                f"got {following[0]!r}; declare its end-of-turn token special"
            )
        eos = tokenizer.eos_token_id
        stop_ids = dict.fromkeys([ids[cut], *([] if eos is None else [eos]), *end_ids])
        opening = _around(tokenizer, "u")
        # Some models do not declare special what opens their turns (DeepSeek's distilled ones).
        written = "".join([*following, *opening, *(system_opening or ())])
        marks = special.union(tokenizer.encode(written, add_special_tokens=False)) & added.keys()
        thinking = (i for i in marks if "think" in added[i].content.lower())
        return cls(
            tokenizer,
            special,
            opening,
            system_opening,
            tuple(following),
            lead,
            stop_ids=tuple(stop_ids),
            turn_marks=marks.difference(stop_ids, thinking),
        )

    def first(self, system: str, user: str) -> list[int]:
        """Token ids of the opening prompt, up to where the first response starts.

        With `system` "" the template's default applies, which may be none.

        Raises:
          ValueError: `system` is given and the template has no system role.
        """
        if not system:
            return self._join(self.opening, (user,))
        if self.system_opening is None:
            raise ValueError(
                '`system` must be "" because the chat template has no system role, '
                f"got {system!r}; put the text at the start of the user message"
            )
        return self._join(self.system_opening, (system, user))

    def follow(self, user: str, *, ended: bool) -> list[int]:
        """Token ids appended after a response, up to where the next response starts.

        `ended` says that the response already ends with a stop token, so none is added.
        """
        ids = self._join(self.following, (user,))
        # Dropped as a token and not as text: a special token may swallow the space after it.
        return ids[ids.index(self.stop_ids[0]) + 1 :] if ended else ids

    def response(self, text: str) -> list[int]:
        """Token ids of a response after a prompt, without a stop token.

        Encoded behind the end of a prompt: alone, SentencePiece would put a blank before it.
        """
        prompt = self.following[-1]
        before = self._join((prompt,), ())
        ids = self._join((prompt + self.lead, ""), (text,))
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self._join((self.lead, ""), (text,))  # the two have merged at the edge

    def _join(self, texts: tuple[str, ...], contents: tuple[str, ...]) -> list[int]:
        """Token ids of texts and contents in turn; special tokens are read in `texts` only."""
        contents = tuple(encodable(content) for content in contents)
        parts = [texts[0]]
        for content, text in zip(contents, texts[1:], strict=True):
            parts += [content, text]
        encode = self.tokenizer.encode
        # Encoded as one string, so that tokens merge across edges as in a full rendering.
        whole = encode("".join(parts), add_special_tokens=False)
        if self._special_in(whole) == self._special_in_texts(texts):  # none in a content
            return whole
        split = [
            encode(part, add_special_tokens=False, split_special_tokens=n % 2 == 1)
            for n, part in enumerate(parts)
        ]
        return [i for ids in split for i in ids]

    def _special_in(self, ids: Sequence[int]) -> int:
        return sum(i in self.special_ids for i in ids)

    def _special_in_texts(self, texts: tuple[str, ...]) -> int:
        """Special tokens in the template's own texts."""
        if texts not in self._counts:
            encoded = (self.tokenizer.encode(text, add_special_tokens=False) for text in texts)
            self._counts[texts] = sum(map(self._special_in, encoded))
        return self._counts[texts]

    @cached_property
    def _counts(self) -> dict[tuple[str, ...], int]:
        return {}


def _around(tokenizer: Any, roles: str) -> tuple[str, ...]:
    """Renders one sentinel for each letter of `roles` and returns the texts around them."""
    error, marks = None, [r"(?!)"]  # matches nothing
    try:
        text, marks = render(tokenizer, roles)
    except Exception as caught:  # a template may raise anything
        text, error = f"{type(caught).__name__}: {caught}", caught
    if re.findall("|".join(marks), text) != marks:
        said = ", ".join(ROLES[role] for role in roles)
        raise ValueError(
            f"the chat template of `tokenizer` must show messages of {said} once each and in "
            f"order, got {text!r}; use a template that takes these roles and keeps all messages"
        ) from error
    return tuple(re.split("|".join(marks), text))
