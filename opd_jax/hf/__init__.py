"""Hugging Face model folders: read into sharded arrays, and written back.

- `config_json`: `config.json` as a `ModelConfig`, and back.
- `layout`: names and shapes of the tensors that store each parameter.
- `load`: safetensors files to arrays; reads each device's shard on its own.
- `save`: arrays to a folder that `transformers` opens.
- `fingerprint`: tells whether two folders hold the same model.
- `folder`: what lies there beside the weights.
- `chat_template`: renders a conversation, always on the same day.
- `tokenizer`: loads a folder's tokenizer, and checks it against a model or another tokenizer.
- `published`: sizes of well-known models.
"""

from opd_jax.hf.config_json import read_config, read_end_ids
from opd_jax.hf.fingerprint import fingerprint
from opd_jax.hf.folder import is_needed
from opd_jax.hf.load import DTYPES, load_params, read_dtype
from opd_jax.hf.save import check_new_folder, save_model
from opd_jax.hf.tokenizer import check_same_tokenizer, check_vocab, load_tokenizer, unused_ids
