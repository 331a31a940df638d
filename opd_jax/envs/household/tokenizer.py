r"""A tokenizer for the household, in which most tokens are whole phrases.

The household's texts are fixed sentences with a few names in them. The fixed part of a sentence, a
receptacle with its number, and the name of an object are one token each. So an episode has fewer
tokens than words, chat marks included. The vocabulary is enumerated from the tables and templates
of the environment and its players; nothing is sampled or learnt from texts.

One regular expression splits a text: phrases, longest first, then single words, digits and
punctuation. A space belongs to the word after it (` apple`), so joining the tokens gives back the
exact text. Phrases, digits, ASCII punctuation, spaces and line ends are always known; any other
word that is not in the vocabulary becomes `<|unk|>`.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from opd_jax.envs.household import env, thoughts, world
from opd_jax.envs.household.tables import GOALS, OBJECTS, ROOMS, TASK_TYPES, TREATMENTS
from opd_jax.envs.react import RESPONSE
from opd_jax.runtime.lazy import import_transformers

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
    """Build the tokenizer; the same arguments give the same file.

    Args:
      phrases: other fixed texts that the model will read, such as the judge's prompt. Each is split
        at placeholders (`%s`, `%d`, `{name}`) and line ends; each piece becomes one token.

    Returns:
      A `transformers` tokenizer with a ChatML template; a response ends with `<|im_end|>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = _pieces([*_texts(), *phrases])
    words = {word for piece in pieces for word in re.findall(_WORD, piece)}
    # Longest first, since the first matching alternative wins.
    fused = sorted({p for p in pieces if not re.fullmatch(_WORD, p)}, key=lambda p: (-len(p), p))
    special = (PAD, UNKNOWN, START, END)
    tokens = (*special, *sorted({*_alphabet(), *words, *fused}))
    pattern = "|".join([*map(_as_pattern, fused), _WORD])

    backend = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> list[str]:
    """Templates of everything that the environment and its players write, with its spaces."""
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
            # One number more, since a search asks for the one after the last.
            texts += [f" {name} {number}" for number in range(1, max(most) + 2)]
    return texts


def _pieces(texts: Iterable[str]) -> set[str]:
    """The fixed parts of templates; those that begin with a letter also with a space before."""
    pieces = set()
    for text in texts:
        for part in _PLACEHOLDER.split(text):
            # A space before a placeholder belongs to what is filled in. A line end belongs to the
            # line after it, except at the end of a text.
            for line in re.split(r"(?<=[^\n])(?=\n+[^\n])", part):
                line = line.rstrip(" ")
                pieces.add(line)
                if line[:1].isalpha() and not line.endswith("\n"):
                    pieces.add(f" {line}")
    return pieces - {""}


def _alphabet() -> list[str]:
    """Punctuation, spaces and digits, which any text may hold."""
    return [*string.punctuation, " ", "\n", *string.digits, *(f" {d}" for d in string.digits)]


def _as_pattern(piece: str) -> str:
    """A pattern for `piece` that does not end inside a word."""
    return re.escape(piece) + (r"(?!\w)" if re.match(r"\w", piece[-1]) else "")
