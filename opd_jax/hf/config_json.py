"""`config.json` of a Hugging Face folder as a `ModelConfig`, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from opd_jax.hf.folder import check_folder
from opd_jax.model import ModelConfig, RopeScaling
from opd_jax.model.moe import Experts
from opd_jax.runtime import files

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class _Family:
    """What an architecture implies that `config.json` does not say."""

    model_type: str
    qk_norm: bool
    qkv_bias: bool
    head_dim: int | None  # the default if `config.json` has none; None is hidden_size / heads
    experts: bool = False


FAMILIES = {
    "Qwen3ForCausalLM": _Family("qwen3", qk_norm=True, qkv_bias=False, head_dim=128),
    "Qwen2ForCausalLM": _Family("qwen2", qk_norm=False, qkv_bias=True, head_dim=None),
    "LlamaForCausalLM": _Family("llama", qk_norm=False, qkv_bias=False, head_dim=None),
    "Qwen3MoeForCausalLM": _Family(
        "qwen3_moe", qk_norm=True, qkv_bias=False, head_dim=None, experts=True
    ),
}

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys that would change the model, and the only value that `model` supports.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
# The same for mixtures of experts: every layer is a mixture, and no expert is shared by all tokens.
_FIXED_EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": 0,
}


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the `ModelConfig` of a Hugging Face folder from its `config.json`.

    It reads files of `transformers` 4 and 5. Absent keys get the defaults of `transformers`.

    Raises:
      ValueError: the folder or file is missing or unreadable, the architecture is not in
        `FAMILIES`, or a key asks for something that `model` does not support.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    family = _read_family(folder, raw)

    def integer(key: str) -> int:
        return _number(folder, raw, key, int)

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
        experts=_read_experts(folder, raw) if family.experts else None,
    )


def read_json(path: Path) -> dict:
    """The JSON object in a file of a model folder; ValueError if missing or not an object."""
    check_folder(path.parent)
    if not path.is_file():
        raise ValueError(
            f"model folder `{path.parent}` has no {path.name}; give a Hugging Face folder with "
            "config.json and safetensors files"
        )
    return files.read_json(path, advice="fetch it again")


def read_end_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a response: `eos_token_id` of generation_config.json or config.json.

    As in `transformers`, the former wins if both name any.

    Raises:
      ValueError: it is neither an integer nor a list of integers.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = ids if isinstance(ids, list) else [ids]
        if ids in ([], [None]):
            continue
        if any(type(i) is not int for i in ids):
            raise ValueError(
                f"model folder `{folder}`: `eos_token_id` in {name} must be token ids, got {ids}"
            )
        return tuple(ids)
    return ()


def read_token_ids(folder: str | Path) -> dict[str, Any]:
    """The special token ids that config.json names."""
    raw = read_json(Path(folder) / "config.json")
    return {name: raw[name] for name in TOKEN_IDS if raw.get(name) is not None}


def _read_family(folder: Path, raw: dict) -> _Family:
    """The family of the architecture; refuses every key that would change the model."""
    architecture = next(iter(raw.get("architectures") or ()), None)
    if architecture is None and "rollout" in raw:
        raise ValueError(
            f"`{folder}` is the workdir of a run, not a model folder; export its student with "
            f"`python -m opd_jax.export --workdir={folder} --out=DIR` and give DIR"
        )
    if architecture not in FAMILIES:
        _refuse(folder, "architectures", architecture, ", ".join(FAMILIES))
    model_type = FAMILIES[architecture].model_type
    if raw.get("model_type", model_type) != model_type:  # `transformers` goes by this one
        _refuse(folder, "model_type", raw["model_type"], f"{model_type} for {architecture}")
    fixed = _FIXED | _FIXED_EXPERTS if FAMILIES[architecture].experts else _FIXED
    for key, value in fixed.items():
        if raw.get(key, value) not in (None, value):
            _refuse(folder, key, raw[key], repr(value))
    if raw.get("quantization_config") is not None:
        _refuse(folder, "quantization_config", raw["quantization_config"], "none")
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        _refuse(folder, "layer_types", raw["layer_types"], "full_attention in every layer")
    return FAMILIES[architecture]


def _read_rope(folder: Path, raw: dict) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`.
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


def _read_experts(folder: Path, raw: dict) -> Experts:
    # transformers 5 writes `num_local_experts`; transformers 4 and files on the Hub `num_experts`.
    if raw.get("num_experts") is None:
        raw["num_experts"] = raw.get("num_local_experts")
    count = _number(folder, raw, "num_experts", int)
    per_token = _number(folder, raw, "num_experts_per_tok", int)
    if per_token > count:
        _refuse(folder, "num_experts_per_tok", per_token, f"at most num_experts = {count}")
    return Experts(
        count=count,
        per_token=per_token,
        d_ff=_number(folder, raw, "moe_intermediate_size", int),
        normalized=bool(raw.get("norm_topk_prob")),
    )


def _number(folder: Path, raw: dict, key: str, kind: type[Number]) -> Number:
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


def config_json(config: ModelConfig, *, dtype_name: str) -> dict:
    """The content of `config.json`, with keys that both `transformers` 4 and 5 read, none null.

    ValueError if no architecture in `FAMILIES` fits the config.
    """
    c = config
    kinds = {(f.qk_norm, f.qkv_bias, f.experts): name for name, f in FAMILIES.items()}
    architecture = kinds.get((c.qk_norm, c.qkv_bias, c.experts is not None))
    if architecture is None:
        raise ValueError(
            f"no Hugging Face architecture among {', '.join(FAMILIES)} has `qk_norm` = {c.qk_norm} "
            f"with `qkv_bias` = {c.qkv_bias} and {'' if c.experts else 'no '}experts; such a model "
            "cannot be exported"
        )
    experts = {} if c.experts is None else _experts_json(c.experts)
    rope = {} if c.rope_scaling is None else {"rope_scaling": _rope_json(c.rope_scaling)}
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "torch_dtype": dtype_name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        **rope,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied,
        **_FIXED,
        **experts,
    }


def _rope_json(scaling: RopeScaling) -> dict:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _experts_json(experts: Experts) -> dict:
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.d_ff,
        "norm_topk_prob": experts.normalized,
        **_FIXED_EXPERTS,
    }
