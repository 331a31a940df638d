"""Writes parameters as a Hugging Face folder, one file of weights after another."""

import errno
import glob
import itertools
import json
import operator
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from opd_jax.hf.config_json import TOKEN_IDS, config_json, read_token_ids
from opd_jax.hf.folder import copy_beside_weights
from opd_jax.hf.layout import (
    INDEX,
    WEIGHTS,
    leaves,
    stack_shape,
    stored_shape,
    tensor_names,
    to_stored,
)
from opd_jax.hf.tokenizer import load_tokenizer, write_for_both, write_tokenizer
from opd_jax.model import ModelConfig, Params, ParamSpec, is_spec, param_specs
from opd_jax.model.int8 import contracted_axes
from opd_jax.model.lora import merged
from opd_jax.model.projections import Int8Weight, LoraWeight

# The Hub's usual limit. A tensor is never divided between files.
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
    """Writes a folder that `transformers` 4.51 and later open: config.json, weights, tokenizer.

    It is written under another name and then renamed, so it is complete or absent. A folder that
    exists cannot be replaced if something is mounted there. So it is filled, with config.json last:
    without that, nobody takes it for a model. The host holds `params` and the content of one file
    at a time.

    Args:
      folder: absent or empty, or a link to such a folder. What killed exports left does not count.
      params: arrays of jax or numpy. A `LoraWeight` is written as W + (α / r) · A B and an
        `Int8Weight` as values · scale, computed in float32 and rounded once.
      tokenizer_from: a `transformers` tokenizer, or a model folder. All its files beside the
        weights are copied (generation_config.json, chat template, licence, …), and the special
        token ids of its config.json are kept.
      max_shard_bytes: largest file of weights. More weights are split into several files with an
        index.

    Raises:
      ValueError: the folder is in use or cannot be written, `params` and `config` disagree, no
        architecture fits `config`, or `tokenizer_from` holds no tokenizer.
    """
    folder, dtype = check_new_folder(Path(folder)), np.dtype(dtype)
    _check_params(params, config)
    content = config_json(config, dtype_name=dtype.name)
    is_folder = isinstance(tokenizer_from, (str, os.PathLike))
    tokenizer: Any = load_tokenizer(tokenizer_from) if is_folder else tokenizer_from
    content |= _token_ids(tokenizer, content["model_type"])
    if is_folder and (Path(tokenizer_from) / "config.json").is_file():
        content |= read_token_ids(tokenizer_from)

    partial = _partial_folder(folder)
    try:
        if is_folder:
            copy_beside_weights(Path(tokenizer_from), partial)
            write_for_both(partial)
        else:
            write_tokenizer(partial, tokenizer)
        (partial / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        _write_weights(partial, params, config, dtype, max_shard_bytes)
        if partial.parent == folder:
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)
            partial.rmdir()
        else:
            partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _token_ids(tokenizer: Any, model_type: str) -> dict[str, int | None]:
    """The special token ids of a tokenizer.

    An absent one is left out. Only Llama's class would fill it with an id of its own, so there it
    is null.
    """
    ids = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    return {name: i for name, i in ids.items() if i is not None or model_type == "llama"}


def check_new_folder(folder: Path) -> Path:
    """The folder to write, with links followed; ValueError if it is in use."""
    try:
        target = folder.resolve()
        used = target.exists() and (
            not target.is_dir()
            # The root of a disk has a `lost+found`.
            or any(not _is_leftover(p) for p in target.iterdir() if p.name != "lost+found")
        )
    except (OSError, RuntimeError) as error:  # a loop of links, a folder that cannot be read
        raise ValueError(f"`{folder}` cannot be used: {type(error).__name__}") from None
    if used:
        raise ValueError(f"`{folder}` must be absent or an empty folder; it is not overwritten")
    return target


def _partial_folder(folder: Path) -> Path:
    """A new folder to write in: inside `folder` if that exists, else beside it."""
    where = folder if folder.exists() else folder.parent
    partial = where / f".{folder.name}.{os.getpid()}.partial"
    for path in where.glob(f".{glob.escape(folder.name)}.*.partial"):
        if _is_leftover(path):
            shutil.rmtree(path, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        code = errno.errorcode.get(error.errno or 0, type(error).__name__)
        raise ValueError(
            f"`{folder}` cannot be made or written ({code}); choose another folder"
        ) from None
    return partial


def _is_leftover(path: Path) -> bool:
    """Whether a process of this machine that is dead left it half-written."""
    found = re.fullmatch(r"\..+\.(\d+)\.partial", path.name)
    if not found:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return int(found[1]) == os.getpid()


def _check_params(params: Params, config: ModelConfig) -> None:
    want, got = _shapes(param_specs(config)), _shapes(params)
    for name in sorted(want.keys() | got.keys()):
        if want.get(name) != got.get(name):
            raise ValueError(
                f"`params` and `config` must agree: `{name}` should have shape "
                f"{want.get(name, 'none')}, got {got.get(name, 'none')}"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    paths = jax.tree.leaves_with_path(tree, is_leaf=_is_parameter)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): _shape(w) for p, w in paths}


def _is_parameter(node: object) -> bool:
    return is_spec(node) or isinstance(node, (Int8Weight, LoraWeight))


def _shape(weight: Any) -> tuple[int, ...]:
    weight = weight.base if isinstance(weight, LoraWeight) else weight
    return tuple((weight.values if isinstance(weight, Int8Weight) else weight).shape)


def _write_weights(
    folder: Path, params: Params, config: ModelConfig, dtype: np.dtype, max_shard_bytes: int
) -> None:
    files, total = _plan_files(config, dtype.itemsize, max_shard_bytes)
    tensors = _tensors(params, config, dtype)
    for file, group in itertools.groupby(tensors, key=lambda named: files[named[0]]):
        save_file(dict(group), folder / file, metadata={"format": "pt"})
        # safetensors writes files that only the owner can read; other files follow the umask.
        shutil.copymode(folder / "config.json", folder / file)
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _plan_files(
    config: ModelConfig, itemsize: int, max_shard_bytes: int
) -> tuple[dict[str, str], int]:
    """The file of each tensor, in the order of `_tensors`, and the total number of bytes."""
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
    """Yields each tensor to write with its name, one at a time."""
    weights = jax.tree.leaves(params, is_leaf=_is_parameter)
    for (key, spec), weight in zip(leaves(config), weights, strict=True):
        stack = np.ndindex(stack_shape(spec))
        for name, place in zip(tensor_names(key, spec), stack, strict=True):
            # Slice on the device: a jax array caches its host copy, so a whole stack would stay.
            part = jax.tree.map(operator.itemgetter(place), weight)
            yield name, to_stored(key, spec, _plain(key, spec, part).astype(dtype, copy=False))


def _plain(key: str, spec: ParamSpec, weight: Any) -> np.ndarray:
    """A weight without its stack, merged or dequantized, as an array on the host."""
    if isinstance(weight, (Int8Weight, LoraWeight)):
        depth = len(stack_shape(spec))
        contracted = tuple(axis - depth for axis in contracted_axes(key, spec))
        weight = merged(weight, contracted=contracted)
    return np.asarray(weight)
