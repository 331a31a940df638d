"""A tokenizer in which a word between spaces is a token."""

from collections.abc import Sequence
from typing import Any


def word_tokenizer(words: Sequence[str]) -> Any:
    """Its tokens are these words, among them <unk>, <system>, <user> and <end>.

    The template adds nothing behind a user message. So a response depends on the message's last
    word, and the model needs no attention.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<end>",
        extra_special_tokens=["<system>", "<user>"],
    )
    made.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content }} <end> "
        "{% else %}<{{ m.role }}> {{ m.content }} {% endif %}{% endfor %}"
    )
    return made
