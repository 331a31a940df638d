"""Parameters written as a Hugging Face folder, one parameter on the host at a time."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from opd_jax.hf.config_json import config_json
from opd_jax.hf.layout import (
    INDEX,
    WEIGHTS,
    leaves,
    stack_shape,
    stored_shape,
    tensor_names,
    to_stored,
)
from opd_jax.hf.tokenizer import load_tokenizer, write_tokenizer
from opd_jax.model import ModelConfig, Params, is_spec, param_specs

# The Hub's usual limit; files are cut only between tensors.
MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    dtype: jnp.dtype,
    tokenizer_from: str | Path | Any,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` opens: config.json, weights, tokenizer.

    The folder is written beside its place and renamed into it, so it is whole or absent.

    Args:
      dtype: of the stored tensors.
      tokenizer_from: a folder, whose tokenizer files and generation_config.json are copied as
        they are, or a `transformers` tokenizer. Its special token ids go into config.json.
      max_shard_bytes: weights beyond this are split over several files with an index.

    Raises:
      ValueError: the folder exists and is not empty, `params` and `config` disagree, no
        architecture fits `config`, or `tokenizer_from` holds no tokenizer.
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`{folder}` must be absent or an empty folder; it is not overwritten")
    _check_params(params, config)
    content = config_json(config, dtype_name=dtype.name)
    is_folder = isinstance(tokenizer_from, (str, os.PathLike))
    tokenizer = load_tokenizer(tokenizer_from) if is_folder else tokenizer_from
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        content[name] = getattr(tokenizer, name)

    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_tokenizer(partial, tokenizer_from)
        (partial / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        _write_weights(partial, params, config, dtype, max_shard_bytes)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_params(params: Params, config: ModelConfig) -> None:
    want = {_path(p): s.shape for p, s in _flatten(param_specs(config))}
    got = {_path(p): tuple(a.shape) for p, a in _flatten(params)}
    for name in sorted(want.keys() | got.keys()):
        if want.get(name) != got.get(name):
            raise ValueError(
                f"`params` and `config` must agree: `{name}` should have shape "
                f"{want.get(name, 'none')}, got {got.get(name, 'none')}"
            )


def _flatten(tree: Any) -> list[tuple]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _write_weights(
    folder: Path, params: Params, config: ModelConfig, dtype: np.dtype, max_shard_bytes: int
) -> None:
    files, total = _plan_files(config, dtype.itemsize, max_shard_bytes)
    waiting: dict[str, np.ndarray] = {}
    names = list(files)
    for (name, tensor), following in zip(
        _tensors(params, config, dtype), [*names[1:], None], strict=True
    ):
        waiting[name] = tensor
        if following is None or files[following] != files[name]:
            save_file(waiting, folder / files[name], metadata={"format": "pt"})
            # Written for the owner alone; the folder's other files are as the user wants them.
            shutil.copymode(folder / "config.json", folder / files[name])
            waiting = {}
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _plan_files(
    config: ModelConfig, itemsize: int, max_shard_bytes: int
) -> tuple[dict[str, str], int]:
    """The file of each tensor, in the order of `_tensors`, and the bytes of all."""
    shard, filled, total, shards = 0, 0, 0, {}
    for key, spec in leaves(config):
        size = int(np.prod(stored_shape(key, spec))) * itemsize
        for name in tensor_names(key, spec):
            if filled and filled + size > max_shard_bytes:
                shard, filled = shard + 1, 0
            shards[name], filled, total = shard, filled + size, total + size
    if shard == 0:
        return dict.fromkeys(shards, WEIGHTS), total
    files = {n: f"model-{s + 1:05d}-of-{shard + 1:05d}.safetensors" for n, s in shards.items()}
    return files, total


def _tensors(
    params: Params, config: ModelConfig, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor to write, by name; one parameter is on the host at a time."""
    for (key, spec), leaf in zip(leaves(config), jax.tree.leaves(params), strict=True):
        array = np.asarray(leaf)
        stack = array.reshape(-1, *spec.shape[len(stack_shape(spec)) :])
        for name, part in zip(tensor_names(key, spec), stack, strict=True):
            yield name, to_stored(key, spec, part.astype(dtype))
