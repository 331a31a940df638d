"""The tokenizer that a GGUF file describes, as a `transformers` tokenizer.

A GGUF file holds the vocabulary, the merges and the chat template, but how text is split before
the merges only as a name. `smollm` stands for what SmolLM's own `tokenizer.json` says: every digit
apart, then GPT-2's byte-level split of what lies between. The order matters: two newlines before a
digit are one token where digits are cut off first, and two where they are not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

SPLITS = ("smollm",)
_CONTROL = 3  # the token type of llama.cpp that is never made from text


def build_tokenizer(
    *,
    tokens: Sequence[str],
    token_types: Sequence[int],
    merges: Sequence[str],
    special: Mapping[str, int],
    chat_template: str,
    max_length: int,
) -> Any:
    """A byte-level BPE with the split `smollm`.

    A byte without a token (SmolLM2 has none for some control characters) is left out of the ids, as
    the model's own tokenizer does it; there is no id that it could become.

    Args:
      tokens: the text of each id, in the byte-level alphabet.
      token_types: the type of each id, as llama.cpp numbers them; control tokens become special.
      merges: two tokens with a space between, the first merge first.
      special: `bos_token`, `eos_token`, ... and its id.
      chat_template: in jinja.
      max_length: tokens that the model was made for.

    Returns:
      A `transformers` tokenizer, which adds no token of its own to a text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in special.items()},
    )
    tokenizer.chat_template = chat_template
    return tokenizer
