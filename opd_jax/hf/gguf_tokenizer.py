"""The tokenizer that a GGUF file describes, as a `transformers` tokenizer.

A GGUF file holds the vocabulary, the merges and the chat template. It only names the split of the
text before the merges. `smollm` is the split in SmolLM's `tokenizer.json`: first split off every
digit, then apply GPT-2's byte-level split to the text between. The order matters: two newlines
before a digit become one token this way, and two tokens in the other order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

SPLITS = ("smollm",)
_CONTROL = 3  # llama.cpp's type for tokens that text never produces


def build_tokenizer(
    *,
    tokens: Sequence[str],
    token_types: Sequence[int],
    merges: Sequence[str],
    special: Mapping[str, int],
    chat_template: str,
    max_length: int,
) -> Any:
    """Builds a byte-level BPE with the split `smollm`.

    SmolLM2 has no token for some control characters. Such a byte is dropped, as by the model's own
    tokenizer. The result is a `transformers` tokenizer that adds no special tokens to a text.

    Args:
      tokens: the text of each id, in the byte-level alphabet.
      token_types: llama.cpp's type of each id; control tokens become special tokens.
      merges: pairs of tokens with a space between, in order of priority.
      special: ids by name: `bos_token`, `eos_token`, ...
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
