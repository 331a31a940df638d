r"""A tokenizer for the household world, in which most tokens are whole phrases.

The household speaks in fixed sentences around a few names, so a sentence's fixed part, a
receptacle with its number and an object's name are one token each, and an episode has fewer tokens
than words, chat marks included. The vocabulary is enumerated from the tables and templates of the
environment and its players; no text is sampled or learnt from.

A text is cut by one regular expression: the phrases, longest first, then single words, digits and
marks. A space belongs to the word behind it (` apple`), so joining the tokens gives back the text
exactly. Phrases, digits, ASCII punctuation, spaces and line ends are always known; any other word
that is not in the vocabulary becomes `<|unk|>`.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from opd_jax.envs.household import env, thoughts, world
from opd_jax.envs.household.tables import GOALS, OBJECTS, ROOMS, TASK_TYPES, TREATMENTS
from opd_jax.envs.react import RESPONSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_WORD = r" ?[A-Za-z]+| ?[0-9]|[\s\S]"
_PLACEHOLDER = re.compile(r"%[sd]|\{\w*\}")


def build(*, phrases: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer; the same arguments give the same file.

    Args:
      phrases: fixed texts of whoever else talks to the model, such as the judge's prompt. Each
        is cut at its placeholders (`%s`, `%d`, `{name}`) and line ends, and each piece becomes
        one token.

    Returns:
      A `transformers` tokenizer with a ChatML template; a response ends with `<|im_end|>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = _pieces([*_texts(), *phrases])
    words = {word for piece in pieces for word in re.findall(_WORD, piece)}
    # Longest first, since the first alternative that matches is taken.
    fused = sorted({p for p in pieces if not re.fullmatch(_WORD, p)}, key=lambda p: (-len(p), p))
    special = (PAD, UNKNOWN, START, END)
    tokens = (*special, *sorted({*_alphabet(), *words, *fused}))
    pattern = "|".join([*map(_whole, fused), _WORD])

    backend = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> list[str]:
    """Templates of everything that the environment and its players say, as it is spaced there."""
    seen = ("a %s", world.NOTHING_SEEN)
    content = [world.CLOSED]
    for template in (world.OPEN, world.ON):
        content += [template.replace("see %s", f"see {what}") for what in seen]
    leads = (world.ARRIVE, world.FACING, world.OPENED)
    texts = [lead + text for lead in leads for text in content]
    texts += [
        *content,
        world.START.replace("see %s", "see a %s"),
        ", a",
        *env.PHRASES,
        *world.PHRASES,
    ]
    for verb, state, _ in TREATMENTS.values():
        texts += [world.TREATED.replace("%s", verb, 1), f" {state}"]
    texts += [f"{role}\n" for role in ("system", "user", "assistant")]
    texts.append(RESPONSE)
    texts += [f" {thought}" for thought in thoughts.THOUGHTS]
    for command in world.COMMANDS:
        texts += [command, f", {command}"]
    texts += [goal for goals in GOALS.values() for goal in goals]
    texts += [*TASK_TYPES, *OBJECTS]
    for room in ROOMS.values():
        for name, (_, _, most) in room.items():
            texts.append(name)
            # One more than there are, since a search asks for the number after the last.
            texts += [f" {name} {number}" for number in range(1, max(most) + 2)]
    return texts


def _pieces(texts: Iterable[str]) -> set[str]:
    """The fixed parts of templates; those that start a text also as they follow a label."""
    pieces = set()
    for text in texts:
        for part in _PLACEHOLDER.split(text):
            # A space before a placeholder belongs to what is filled in, and line ends to the line
            # that they begin, except at the end of a text.
            for line in re.split(r"(?<=[^\n])(?=\n+[^\n])", part):
                line = line.rstrip(" ")
                pieces.add(line)
                if line[:1].isalpha() and not line.endswith("\n"):
                    pieces.add(f" {line}")
    return pieces - {""}


def _alphabet() -> list[str]:
    """Marks and digits that any text may hold."""
    return [*string.punctuation, " ", "\n", *string.digits, *(f" {d}" for d in string.digits)]


def _whole(piece: str) -> str:
    """A pattern for `piece` that does not end inside a word."""
    return re.escape(piece) + (r"(?!\w)" if re.match(r"\w", piece[-1]) else "")
