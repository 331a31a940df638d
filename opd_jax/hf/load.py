"""Loads the weights of a Hugging Face folder into sharded arrays.

Each device's shard of a parameter is read separately from the memory-mapped files, so a host holds
one parameter at a time.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from opd_jax.hf.config_json import read_config, read_json
from opd_jax.hf.layout import (
    EMBED,
    HEAD,
    INDEX,
    LAYERS,
    WEIGHTS,
    leaves,
    read_slice,
    stack_shape,
    stored_shape,
    tensor_names,
)
from opd_jax.model import ModelConfig, Params, ParamSpec, is_spec, param_specs
from opd_jax.model.int8 import contracted_axes, int8_specs, quantize_weight
from opd_jax.model.projections import Int8Weight
from opd_jax.runtime.exits import reading
from opd_jax.runtime.mesh import TRAINING, Rules, param_shardings

DTYPES = ("float32", "float16", "bfloat16")
_DTYPES = dict(zip(("F32", "F16", "BF16"), DTYPES, strict=True))  # as safetensors calls them
_ROWS = 4096  # of two tensors that are compared, read at a time


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: jnp.dtype,
    int8: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = TRAINING,
) -> Params:
    """Loads the parameters of a Hugging Face folder; each shard is created on its own device.

    All tensors are checked for presence, shape and type before any is read, and a layer must have
    no others. Embedding rows beyond `config.vocab_size` are padding and are not read. So two models
    with one tokenizer but different padding load to the same vocabulary with
    `dataclasses.replace(config, vocab_size=...)`.

    Args:
      folder: has safetensors files of float32, float16 or bfloat16.
      config: `read_config(folder)`, or that with a smaller `vocab_size`.
      int8: quantize the projections of the layers to `projections.Int8Weight`. Each is quantized
        before the next is read, so only one of them at a time exists in `dtype`.
      mesh: None puts everything on the first device.
      rules: over the mesh, `mesh.TRAINING` or `mesh.DECODING`.

    Raises:
      ValueError: a file is missing or truncated, a tensor is missing or has another shape or
        type, or a parameter does not divide over the mesh. The message names it.
      WorldFailed: a file cannot be read now.
    """
    folder, specs = Path(folder), int8_specs(config) if int8 else param_specs(config)
    if mesh is None:
        one: Sharding = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, specs, is_leaf=is_spec)
    else:
        shardings = param_shardings(specs, mesh, rules=rules)
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        _check_tensors(folder, config, tensors)
        _check_tied(folder, config, tensors)

        def load(path: tuple, spec: ParamSpec, sharding: Any) -> Any:
            return _load_leaf(path[-1].key, spec, sharding, tensors, np.dtype(dtype))

        return jax.tree.map_with_path(load, param_specs(config), shardings, is_leaf=is_spec)


def read_dtype(folder: str | Path) -> str:
    """The dtype of a folder's model, from `DTYPES`: as config.json says, else that of its weights.

    Raises:
      ValueError: it is another, or the weights cannot be read.
    """
    raw = read_json(Path(folder) / "config.json")
    name = raw.get("dtype") or raw.get("torch_dtype")  # `transformers` 5 and 4
    if name is None:
        with ExitStack() as stack:
            tensors = open_tensors(Path(folder), stack)
            found = tensors[EMBED].get_dtype() if EMBED in tensors else f"no `{EMBED}`"
            name = _DTYPES.get(found, found)
    if name not in DTYPES:
        raise ValueError(
            f"model folder `{folder}`: expected a dtype of {', '.join(DTYPES)}, got {name!r}"
        )
    return name


def _load_leaf(
    key: str,
    spec: ParamSpec,
    sharding: Sharding | Int8Weight,
    tensors: dict[str, Any],
    dtype: np.dtype,
) -> jax.Array | Int8Weight:
    """Loads one parameter; quantizes it if `sharding` is an `Int8Weight` of two."""
    read = _reader(key, spec, tensors, dtype)
    if not isinstance(sharding, Int8Weight):
        return jax.make_array_from_callback(spec.shape, sharding, read)
    # Quantize on the devices: a channel may be sharded, and its scale needs the maximum of all.
    weight = jax.make_array_from_callback(spec.shape, sharding.values, read)
    quantize = partial(quantize_weight, contracted=contracted_axes(key, spec))
    # Wait, so that the float weight is freed before the next one is read.
    return jax.block_until_ready(jax.jit(quantize, out_shardings=sharding)(weight))


def _weight_files(folder: Path) -> dict[str, list[str]]:
    """Each file of weights, and the tensors that the index looks for there."""
    if (folder / WEIGHTS).is_file():  # beside an index too, as `transformers` does
        return {WEIGHTS: []}
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) or "nothing"
        raise ValueError(
            f"model folder `{folder}` must hold {WEIGHTS} or {INDEX}, got {found}; "
            "convert other weight formats to safetensors"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"`{folder / INDEX}` must hold a `weight_map`; fetch it again")
    files: dict[str, list[str]] = {}
    for tensor, name in sorted(weight_map.items()):
        files.setdefault(name, []).append(tensor)
    return files


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """All tensors of the folder by name, as lazy slices. Only headers are read."""
    tensors: dict[str, Any] = {}
    indexed: dict[str, Any] = {}
    for name, wanted in _weight_files(folder).items():
        path = folder / name
        try:
            with reading(path):
                with path.open("rb") as opened:  # safetensors calls all absent that do not open
                    opened.read(1)
                file = stack.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError:
            raise ValueError(
                f"model folder `{folder}` lacks {path.name}, named by {INDEX}; fetch it again"
            ) from None
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`{path}` is not a complete safetensors file ({error}); fetch it again"
            ) from None
        there = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
        tensors |= there
        indexed |= {tensor: there[tensor] for tensor in wanted if tensor in there}
    return tensors | indexed  # of two tensors of one name, the one that the index means


def _check_tensors(folder: Path, config: ModelConfig, tensors: dict[str, Any]) -> None:
    """ValueError unless every tensor of `config` exists, with its shape and a float type.

    The vocabulary of `config` may be smaller than that of the folder.
    """
    config = replace(config, vocab_size=read_config(folder).vocab_size)
    expected = {
        name: stored_shape(key, spec)
        for key, spec in leaves(config)
        for name in tensor_names(key, spec)
    }
    missing = [name for name in expected if name not in tensors]
    if missing:
        if fused := next((name for name in tensors if "experts.gate_up_proj" in name), None):
            raise ValueError(
                f"model folder `{folder}` holds fused experts (`{fused}`), expected a tensor for "
                "each; open it with transformers 5 and write it again with `save_pretrained`"
            )
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"model folder `{folder}` lacks tensor `{missing[0]}`{more}, which its config.json "
            "asks for; check that the weights and config.json belong together"
        )
    others = (n for n in tensors.keys() - expected if n.startswith(LAYERS))
    surplus = min((n for n in others if not n.endswith("rotary_emb.inv_freq")), default=None)
    if surplus:
        raise ValueError(
            f"model folder `{folder}` holds tensor `{surplus}`, which its config.json knows "
            "nothing of; check that the weights and config.json belong together"
        )
    for name, shape in expected.items():
        got = tuple(tensors[name].get_shape())
        if got != shape:
            raise ValueError(
                f"model folder `{folder}`: tensor `{name}` must have shape {shape}, got {got}; "
                "check that the weights and config.json belong together"
            )
        if tensors[name].get_dtype() not in _DTYPES:
            raise ValueError(
                f"model folder `{folder}`: tensor `{name}` must be one of {', '.join(_DTYPES)}, "
                f"got {tensors[name].get_dtype()}; quantized weights are not supported"
            )


def _check_tied(folder: Path, config: ModelConfig, tensors: dict[str, Any]) -> None:
    """ValueError if a tied model holds another head: `transformers` 4 drops it, 5 uses it."""
    if not config.tied or HEAD not in tensors:
        return
    head, embed = tensors[HEAD], tensors[EMBED]
    rows = head.get_shape()[0]
    parts = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    if head.get_shape() != embed.get_shape() or any(
        not np.array_equal(head[part], embed[part]) for part in parts
    ):
        raise ValueError(
            f"model folder `{folder}`: config.json says `tie_word_embeddings`, but the weights "
            f"hold a `{HEAD}` that is not `{EMBED}`; set it to false, or delete the tensor"
        )


def _reader(
    key: str, spec: ParamSpec, tensors: dict[str, Any], dtype: np.dtype
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """The callback that reads one device's shard of a parameter."""
    stack = stack_shape(spec)
    named = dict(zip(np.ndindex(stack), tensor_names(key, spec), strict=True))
    shards: dict[tuple, np.ndarray] = {}  # devices along `data` hold the same shard

    def assemble(index: tuple[slice, ...]) -> np.ndarray:
        depth = len(stack)
        chosen = [range(size)[part] for size, part in zip(spec.shape, index, strict=True)]
        out = np.empty([len(places) for places in chosen], dtype)
        places = itertools.product(*chosen[:depth])
        for at, place in zip(np.ndindex(out.shape[:depth]), places, strict=True):
            out[at] = read_slice(tensors[named[place]], key, spec, index[depth:])
        return out

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX's type allows None, but JAX never passes it
        bounds = tuple((part.start, part.stop) for part in index)
        if bounds not in shards:
            shards[bounds] = assemble(index)
        return shards[bounds]

    return read
