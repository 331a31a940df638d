"""Hugging Face model folders: read lazily into sharded arrays, and written back.

Only this file knows how checkpoints name and lay out tensors. A projection is stored as
`[out, in]`, with the heads and the head size merged; ours are `[in, ...]` with them apart, and
stacked over layers (`model.param_specs`). Reading goes slice by slice: each device's part of each
parameter is cut from the memory-mapped files, so a host holds one parameter at a time.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opd_jax.mesh import param_shardings
from opd_jax.model import ModelConfig, Params, ParamSpec, RopeScaling, is_spec, param_specs


@dataclass(frozen=True)
class _Family:
    """What the architecture's name implies and `config.json` does not say."""

    model_type: str
    qk_norm: bool
    qkv_bias: bool
    head_dim: int | None  # where `config.json` has none; None is hidden_size / heads


FAMILIES = {
    "Qwen3ForCausalLM": _Family("qwen3", qk_norm=True, qkv_bias=False, head_dim=128),
    "Qwen2ForCausalLM": _Family("qwen2", qk_norm=False, qkv_bias=True, head_dim=None),
    "LlamaForCausalLM": _Family("llama", qk_norm=False, qkv_bias=False, head_dim=None),
}

# Our parameter -> tensor. The families differ in which of these they have, never in a name.
_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}

# Settings that would change the model and that it does not have: key -> the value it stands for.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}

_DTYPES = ("F32", "F16", "BF16")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one is enough
_TOKENIZER_FILES = (
    *_TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# The Hub's usual limit; files are cut only between tensors.
MAX_SHARD_BYTES = 5 * 10**9


# --- Configuration ------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    if not path.parent.is_dir():
        raise ValueError(f"model folder `{path.parent}` does not exist; check the path")
    if not path.is_file():
        raise ValueError(
            f"model folder `{path.parent}` has no {path.name}; give a Hugging Face folder with "
            f"config.json and {_WEIGHTS} or {_INDEX}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` cannot be read as JSON: {error}; fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got {type(content).__name__}")
    return content


def _number(folder: Path, raw: dict, key: str, kind: type) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise ValueError(
            f"model folder `{folder}`: `{key}` in config.json must be a positive {kind.__name__}, "
            f"got {value!r}"
        )
    return kind(value)


def _refuse(folder: Path, key: str, got: object, supported: str) -> NoReturn:
    raise ValueError(
        f"model folder `{folder}`: unsupported `{key}` = {got!r} in config.json; "
        f"supported: {supported}"
    )


def _read_rope(folder: Path, raw: dict) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes `rope_parameters`; before it, `rope_theta` and `rope_scaling`.
    rope = {"rope_theta": raw.get("rope_theta") or 10_000.0}
    rope |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if any(isinstance(value, dict) for value in rope.values()):
        _refuse(folder, "rope_parameters", rope, "one rope for all layers")
    if kind not in ("default", "llama3"):
        _refuse(folder, "rope_type", kind, "default, llama3")
    if partial not in (None, 1.0):
        _refuse(folder, "partial_rotary_factor", partial, "1.0")
    theta = _number(folder, rope, "rope_theta", float)
    if kind == "default":
        return theta, None
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return theta, RopeScaling(
        factor=_number(folder, rope, "factor", float),
        low_freq_factor=_number(folder, rope, "low_freq_factor", float),
        high_freq_factor=_number(folder, rope, "high_freq_factor", float),
        original_max_positions=_number(folder, rope, "original_max_position_embeddings", int),
    )


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face folder, from its `config.json` alone.

    Keys that are absent take the defaults of `transformers`, for files written by its versions 4
    and 5.

    Raises:
      ValueError: the folder or file is missing or unreadable, the architecture is none of
        `FAMILIES`, or a setting asks for something that `model` does not compute.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    architecture = next(iter(raw.get("architectures") or ()), None)
    if architecture not in FAMILIES:
        _refuse(folder, "architectures", architecture, ", ".join(FAMILIES))
    for key, value in _FIXED.items():
        if raw.get(key, value) not in (None, value):
            _refuse(folder, key, raw[key], repr(value))
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        _refuse(folder, "layer_types", raw["layer_types"], "full_attention in every layer")
    family = FAMILIES[architecture]
    integer = lambda key: _number(folder, raw, key, int)  # noqa: E731
    d_model, num_heads = integer("hidden_size"), integer("num_attention_heads")
    if raw.get("head_dim") is None:
        raw["head_dim"] = family.head_dim or d_model // num_heads
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = num_heads
    if num_heads % integer("num_key_value_heads"):
        supported = f"a divisor of num_attention_heads = {num_heads}"
        _refuse(folder, "num_key_value_heads", raw["num_key_value_heads"], supported)
    rope_theta, rope_scaling = _read_rope(folder, raw)
    return ModelConfig(
        vocab_size=integer("vocab_size"),
        d_model=d_model,
        num_layers=integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=integer("num_key_value_heads"),
        head_dim=integer("head_dim"),
        d_ff=integer("intermediate_size"),
        norm_eps=_number(folder, raw, "rms_norm_eps", float),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=integer("max_position_embeddings"),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tied=bool(raw.get("tie_word_embeddings")),
    )


def _config_json(config: ModelConfig, dtype: np.dtype) -> dict:
    """`config.json` in the keys that `transformers` 4 and 5 both read."""
    c = config
    kinds = {(f.qk_norm, f.qkv_bias): name for name, f in FAMILIES.items()}
    architecture = kinds.get((c.qk_norm, c.qkv_bias))
    if architecture is None:
        raise ValueError(
            f"no Hugging Face architecture among {', '.join(FAMILIES)} has `qk_norm` = {c.qk_norm} "
            f"with `qkv_bias` = {c.qkv_bias}; such a model cannot be exported"
        )
    scaling = c.rope_scaling and {
        "rope_type": "llama3",
        "factor": c.rope_scaling.factor,
        "low_freq_factor": c.rope_scaling.low_freq_factor,
        "high_freq_factor": c.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": c.rope_scaling.original_max_positions,
    }
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "torch_dtype": dtype.name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied,
        **_FIXED,
    }


# --- Layout -------------------------------------------------------------------------------------


def _leaves(config: ModelConfig) -> list[tuple[str, ParamSpec]]:
    """Name and spec of each parameter, in the order of `jax.tree.leaves`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)
    return [(path[-1].key, spec) for path, spec in paths]


def _tensor_names(key: str, spec: ParamSpec) -> list[str]:
    """The tensor that holds each layer of a parameter; a single one where it has no layers."""
    return [_NAMES[key].format(i) for i in range(spec.shape[0] if _stacked(spec) else 1)]


def _stacked(spec: ParamSpec) -> bool:
    return spec.axes[0] == "layer"


def _head_dim_axis(spec: ParamSpec) -> int | None:
    """Axis, within one layer, of the head size that is stored merged into the heads before it."""
    axes = spec.axes[_stacked(spec) :]
    return axes.index("head_dim") if "head_dim" in axes[1:] else None


def _merge_heads(sizes: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return sizes
    return (*sizes[: axis - 1], sizes[axis - 1] * sizes[axis], *sizes[axis + 1 :])


def _stored_shape(key: str, spec: ParamSpec) -> tuple[int, ...]:
    merged = _merge_heads(spec.shape[_stacked(spec) :], _head_dim_axis(spec))
    return merged if key == "embed" else merged[::-1]


def _to_stored(key: str, spec: ParamSpec, layer: np.ndarray) -> np.ndarray:
    """One layer of a parameter as its tensor."""
    merged = layer.reshape(_merge_heads(layer.shape, _head_dim_axis(spec)))
    return np.ascontiguousarray(merged if key == "embed" else merged.T)


def _read_slice(tensor: Any, key: str, spec: ParamSpec, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of one layer of a parameter, reading little more than that part.

    Args:
      tensor: the safetensors slice of its tensor.
      index: a slice for each dimension of our layout, without the layers.
    """
    shape, axis = spec.shape[_stacked(spec) :], _head_dim_axis(spec)
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    sizes = [stop - start for start, stop in bounds]
    if axis is not None:  # Whole heads are read, then cut: they are rarely split.
        start, stop = bounds[axis - 1]
        bounds[axis - 1 : axis + 1] = [(start * shape[axis], stop * shape[axis])]
        sizes[axis] = shape[axis]
    stored = bounds if key == "embed" else bounds[::-1]
    block = tensor[tuple(slice(*bound) for bound in stored)]
    part = (block if key == "embed" else block.T).reshape(sizes)
    return part if axis is None else part[(slice(None),) * axis + (index[axis],)]


# --- Reading ------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        if (folder / _WEIGHTS).is_file():
            return [folder / _WEIGHTS]
        found = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) or "nothing"
        raise ValueError(
            f"model folder `{folder}` must hold {_WEIGHTS} or {_INDEX}, got {found}; "
            "convert other weight formats to safetensors"
        )
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"`{folder / _INDEX}` must hold a `weight_map`; fetch it again")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor of the folder by name, as a lazy slice; nothing but headers is read."""
    tensors = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError:
            raise ValueError(
                f"model folder `{folder}` lacks {path.name}, named by {_INDEX}; fetch it again"
            ) from None
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`{path}` is not a whole safetensors file ({error}); fetch it again"
            ) from None
        tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _check_tensors(folder: Path, config: ModelConfig, tensors: dict[str, Any]) -> None:
    """Every tensor that `config` asks for is there, in its shape and a float type."""
    expected = {
        name: (_stored_shape(key, spec), "vocab" in spec.axes)
        for key, spec in _leaves(config)
        for name in _tensor_names(key, spec)
    }
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"model folder `{folder}` lacks tensor `{missing[0]}`{more}, which its config.json "
            "asks for; check that the weights and config.json belong together"
        )
    for name, (shape, vocab) in expected.items():
        got = tuple(tensors[name].get_shape())
        # Rows beyond the vocabulary are padding, and are left out.
        fits = got[:1] >= shape[:1] and got[1:] == shape[1:] if vocab else got == shape
        if not fits:
            raise ValueError(
                f"model folder `{folder}`: tensor `{name}` must have shape {shape}"
                f"{' or more rows' if vocab else ''}, got {got}; "
                "check that the weights and config.json belong together"
            )
        if tensors[name].get_dtype() not in _DTYPES:
            raise ValueError(
                f"model folder `{folder}`: tensor `{name}` must be one of {', '.join(_DTYPES)}, "
                f"got {tensors[name].get_dtype()}; quantized weights are not supported"
            )


def _reader(
    key: str, spec: ParamSpec, tensors: dict[str, Any], dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """The callback that reads one device's part of a parameter."""
    layers = [tensors[name] for name in _tensor_names(key, spec)]
    parts: dict[tuple, np.ndarray] = {}  # devices along `data` hold the same part

    def stack(index: tuple[slice, ...]) -> np.ndarray:
        if not _stacked(spec):
            return _read_slice(layers[0], key, spec, index).astype(dtype)
        chosen = layers[index[0]]
        first = _read_slice(chosen[0], key, spec, index[1:])
        out = np.empty((len(chosen), *first.shape), dtype)
        out[0] = first
        for i, tensor in enumerate(chosen[1:], 1):
            out[i] = _read_slice(tensor, key, spec, index[1:])
        return out

    def read(index: tuple[slice, ...]) -> np.ndarray:
        seen = tuple((part.start, part.stop) for part in index)
        if seen not in parts:
            parts[seen] = stack(index)
        return parts[seen]

    return read


def load_params(
    folder: str | Path, config: ModelConfig, *, dtype: jnp.dtype, mesh: Mesh | None = None
) -> Params:
    """The parameters of a Hugging Face folder, each created where it will live.

    Every tensor's presence, shape and type is checked before any is read. Embedding rows beyond
    `config.vocab_size` are padding and are left out, so models that share a tokenizer but pad
    it differently load to one vocabulary with `dataclasses.replace(config, vocab_size=...)`.

    Args:
      config: what `read_config` gave for the folder.
      dtype: of the arrays; the file may hold float32, float16 or bfloat16.
      mesh: shardings follow `mesh.RULES`; None puts everything on the first device.

    Raises:
      ValueError: a file is missing or truncated, a tensor is missing or has another shape or
        type, or a parameter does not divide over the mesh. The message names it.
    """
    folder, specs = Path(folder), param_specs(config)
    if mesh is None:
        one: Sharding = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, specs, is_leaf=is_spec)
    else:
        shardings = param_shardings(specs, mesh)
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_tensors(folder, config, tensors)
        arrays = [
            jax.make_array_from_callback(
                spec.shape, sharding, _reader(key, spec, tensors, np.dtype(dtype))
            )
            for (key, spec), sharding in zip(
                _leaves(config), jax.tree.leaves(shardings), strict=True
            )
        ]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), arrays)


# --- Writing ------------------------------------------------------------------------------------


def _tensors(params: Params, config: ModelConfig, dtype: np.dtype) -> Iterator[tuple[str, Any]]:
    """Each tensor to write, by name; one parameter is on the host at a time."""
    for (key, spec), leaf in zip(_leaves(config), jax.tree.leaves(params), strict=True):
        array = np.asarray(leaf)
        layers = array if _stacked(spec) else array[None]
        for name, layer in zip(_tensor_names(key, spec), layers, strict=True):
            yield name, _to_stored(key, spec, layer.astype(dtype))


def _plan_files(
    config: ModelConfig, itemsize: int, max_shard_bytes: int
) -> tuple[dict[str, str], int]:
    """The file of each tensor, in the order of `_tensors`, and the bytes of all."""
    shard, filled, total, shards = 0, 0, 0, {}
    for key, spec in _leaves(config):
        size = int(np.prod(_stored_shape(key, spec))) * itemsize
        for name in _tensor_names(key, spec):
            if filled and filled + size > max_shard_bytes:
                shard, filled = shard + 1, 0
            shards[name], filled, total = shard, filled + size, total + size
    if shard == 0:
        return dict.fromkeys(shards, _WEIGHTS), total
    files = {n: f"model-{s + 1:05d}-of-{shard + 1:05d}.safetensors" for n, s in shards.items()}
    return files, total


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
            waiting = {}
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


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
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`{folder}` must be absent or an empty folder; it is not overwritten")
    _check_params(params, config)
    content = _config_json(config, np.dtype(dtype))
    is_folder = isinstance(tokenizer_from, (str, os.PathLike))
    tokenizer = load_tokenizer(tokenizer_from) if is_folder else tokenizer_from
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        content[name] = getattr(tokenizer, name)

    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        if is_folder:
            for name in _TOKENIZER_FILES:
                if (Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(Path(tokenizer_from) / name, partial / name)
        else:
            tokenizer.save_pretrained(partial)
        (partial / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        _write_weights(partial, params, config, np.dtype(dtype), max_shard_bytes)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# --- Tokenizers ---------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> Any:
    """The `transformers` tokenizer of a folder; nothing is downloaded.

    A `tokenizer.json` is taken as it stands. `AutoTokenizer` goes by the architecture instead: in
    the folder of a Qwen2 model it rebuilds a byte-level BPE from the vocabulary, whatever
    the file says, without a warning.

    Raises:
      ValueError: the folder has none, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model folder `{folder}` does not exist; check the path")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"model folder `{folder}` has no tokenizer, expected one of {', '.join(_TOKENIZERS)}; "
            "copy the tokenizer files of the model there"
        )
    # Takes seconds where torch is installed.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    whole = (folder / "tokenizer.json").is_file()
    try:
        loader = PreTrainedTokenizerFast if whole else AutoTokenizer
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the tokenizer in `{folder}` cannot be read: {reason}") from error


def check_same_tokenizer(student_folder: str | Path, teacher_folder: str | Path) -> None:
    """Teacher and student must read the same token ids the same way.

    Compares the token of every id, the special tokens, and the chat template. Divergences
    compare the two models id by id, and the teacher scores the very tokens the student sampled.

    Raises:
      ValueError: they differ; names both folders and the first difference.
    """
    student, teacher = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    for what, view in _TOKENIZER_VIEWS.items():
        ours, theirs = view(student), view(teacher)
        keys = sorted(ours.keys() | theirs.keys())
        key = next((k for k in keys if _differ(ours, theirs, k)), None)
        if key is not None:
            raise ValueError(
                f"student `{student_folder}` and teacher `{teacher_folder}` must have the same "
                f"tokenizer; {what} {key} is {_show(ours, key)} in the student and "
                f"{_show(theirs, key)} in the teacher; use models of one family"
            )


_TOKENIZER_VIEWS: dict[str, Callable[[Any], dict]] = {
    "token": lambda tokenizer: {i: token for token, i in tokenizer.get_vocab().items()},
    "special token": lambda tokenizer: dict(tokenizer.special_tokens_map),
    "the": lambda tokenizer: {"chat template": tokenizer.chat_template},
}


def _differ(ours: dict, theirs: dict, key: object) -> bool:
    return key not in ours or key not in theirs or ours[key] != theirs[key]


def _show(view: dict, key: object) -> str:
    if key not in view:
        return "absent"
    text = repr(view[key])
    return text if len(text) <= 60 else text[:60] + "…"
