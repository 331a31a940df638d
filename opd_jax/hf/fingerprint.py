"""Tells whether two folders hold the same model, whatever they are called and however written."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from opd_jax.hf.config_json import read_config, read_end_ids
from opd_jax.hf.layout import leaves, tensor_names
from opd_jax.hf.load import open_tensors
from opd_jax.hf.tokenizer import load_tokenizer, views

# Reading all of a large model takes minutes. Weights that were trained differ nearly everywhere.
_TENSORS = 32
_TOKENS = 256


def fingerprint(folder: Path) -> str:
    """A hash of what a run reads of a model folder; the weights are sampled.

    Equal for folders that were written by another version of a library, with other shards, or with
    a chat template that renders the same. Another dtype of the weights is another model.

    Raises:
      ValueError: there is no such folder, or no whole model in it.
      WorldFailed: a file cannot be read now.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    end_ids = sorted({*read_end_ids(folder), tokenizer.eos_token_id} - {None})
    found = hashlib.sha256(repr((config, end_ids, _reading(tokenizer))).encode())
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        names = {tensor for key, spec in leaves(config) for tensor in tensor_names(key, spec)}
        names &= tensors.keys()  # what is missing or too much is an error when weights are loaded
        for name in sorted(names):
            found.update(repr((name, _kind(tensors[name]))).encode())
        for name in sorted(names, key=_shuffled)[:_TENSORS]:
            found.update(_sample(tensors[name]))
    return found.hexdigest()[:16]


def _reading(tokenizer: Any) -> tuple[Any, ...]:
    """Its vocabulary, the prompts that it renders, and how it decodes and encodes some tokens."""
    facts = [(what, sorted(facts.items())) for what, (facts, _) in views(tokenizer).items()]
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    ids = sorted(tokenizer.get_vocab().values())
    text = tokenizer.decode(ids[:: -(-len(ids) // _TOKENS)])
    return facts, special, text, tokenizer.encode(text, add_special_tokens=False)


def _kind(tensor: Any) -> tuple[str, list[int]]:
    return tensor.get_dtype(), list(tensor.get_shape())


def _sample(tensor: Any) -> bytes:
    """The middle row of a matrix; a vector whole."""
    rows = tensor.get_shape()[0]
    vector = len(tensor.get_shape()) == 1
    return tensor[:].tobytes() if vector else tensor[rows // 2 : rows // 2 + 1].tobytes()


def _shuffled(name: str) -> bytes:
    """An order that mixes layers and kinds of tensors."""
    return hashlib.sha256(name.encode()).digest()
