"""Hugging Face model folders: read lazily into sharded arrays, and written back.

- `config_json`: `config.json` as a `ModelConfig`, and back.
- `layout`: names and shapes of tensors, and how a parameter is cut into them.
- `load`: safetensors files to arrays, each device's part read on its own.
- `save`: a folder that `transformers` opens.
- `gguf`: a Llama model in a GGUF file as such a folder.
- `tokenizer`: the folder's tokenizer, and whether it fits a model or another tokenizer.
"""

from opd_jax.hf.config_json import FAMILIES, read_config
from opd_jax.hf.load import load_params
from opd_jax.hf.save import MAX_SHARD_BYTES, save_model
from opd_jax.hf.tokenizer import check_same_tokenizer, check_vocab, load_tokenizer

__all__ = [
    "FAMILIES",
    "MAX_SHARD_BYTES",
    "check_same_tokenizer",
    "check_vocab",
    "load_params",
    "load_tokenizer",
    "read_config",
    "save_model",
]
