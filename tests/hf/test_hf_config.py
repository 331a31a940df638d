"""`config.json` of a Hugging Face folder: what is read, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import hf, model
from opd_jax.hf.config_json import config_json


def test_config_is_read(references: dict) -> None:
    config = hf.read_config(references["llama"].folder)
    assert config == model.ModelConfig(
        vocab_size=96,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=64,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=model.RopeScaling(8.0, 1.0, 4.0, 100),
        max_positions=128,
        qk_norm=False,
        qkv_bias=False,
        tied=False,
    )
    kinds = {n: (c.qk_norm, c.qkv_bias, c.tied) for n, c in configs(references).items()}
    assert kinds == {
        "qwen3": (True, False, False),
        "qwen3_tied": (True, False, True),
        "qwen2": (False, True, False),
        "llama": (False, False, False),
        "qwen3_moe": (True, False, False),
        "qwen3_moe_shares": (True, False, False),
    }


def configs(references: dict) -> dict[str, model.ModelConfig]:
    return {name: hf.read_config(reference.folder) for name, reference in references.items()}


def write_config(folder: Path, source: Path, changes: dict) -> Path:
    """A copy of a folder's config.json with keys changed, or dropped where None."""
    raw = json.loads((source / "config.json").read_text()) | changes
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_files_of_transformers_4_and_of_the_hub(references: dict, tmp_path: Path) -> None:
    source = references["llama"].folder
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    old = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": rope}
    assert hf.read_config(write_config(tmp_path, source, old)) == hf.read_config(source)
    older = old | {"rope_scaling": {"type": rope.pop("rope_type")} | rope}
    assert hf.read_config(write_config(tmp_path, source, older)) == hf.read_config(source)
    # Qwen3-30B-A3B on the Hub has another name for the number of experts.
    source = references["qwen3_moe"].folder
    old = {"num_local_experts": None, "num_experts": 8, "mlp_only_layers": []}
    assert hf.read_config(write_config(tmp_path, source, old)) == hf.read_config(source)
    silent = {"norm_topk_prob": None, "decoder_sparse_step": None, "mlp_only_layers": None}
    experts = hf.read_config(write_config(tmp_path, source, silent)).experts
    assert experts == hf.read_config(references["qwen3_moe_shares"].folder).experts


def test_defaults_are_those_of_transformers(references: dict, tmp_path: Path) -> None:
    from transformers import AutoConfig

    absent = dict.fromkeys(
        ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings")
    )
    for name in ("qwen3", "llama"):
        folder = write_config(tmp_path / name, references[name].folder, absent)
        ours, theirs = hf.read_config(folder), AutoConfig.from_pretrained(folder)
        assert ours.head_dim == theirs.head_dim
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied == theirs.tie_word_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads == 4  # llama: as many as queries


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, ()),
        (3, None, (3,)),
        ([3, 10], None, (3, 10)),
        (None, [3, 10], (3, 10)),
        (10, {}, (10,)),
        (3, [10, 11], (10, 11)),  # as in transformers
        ([3, 10], 3, (3,)),
    ],
)
def test_what_ends_a_turn_is_read_from_both_files(
    tmp_path: Path, config: object, generation: object, expected: tuple
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        content = {"eos_token_id": generation} if generation else {}
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert hf.read_end_ids(tmp_path) == expected


def test_the_dtype_of_a_folder(references: dict, tmp_path: Path) -> None:
    source = references["llama"].folder
    for changes, expected in (
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
    ):
        assert hf.read_dtype(write_config(tmp_path, source, changes)) == expected
    folder = write_config(tmp_path, source, {"dtype": None})
    tensors = load_file(source / "model.safetensors")
    low = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    save_file(low, folder / "model.safetensors")
    assert hf.read_dtype(folder) == "bfloat16"


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_no_key_is_null_but_an_id_that_llamas_class_would_fill(
    references: dict, tokenizer: Any, tmp_path: Path, name: str
) -> None:
    folder, out = references[name].folder, tmp_path / "out"
    config = hf.read_config(folder)
    params = hf.load_params(folder, config, dtype=jnp.float32)
    hf.save_model(out, params, config, dtype=jnp.float32, tokenizer_from=tokenizer)
    raw = json.loads((out / "config.json").read_text())
    nulls = [key for key, value in raw.items() if value is None]
    assert nulls == (["bos_token_id"] if name == "llama" else [])


# --- Refusals


# Keys that only a mixture of experts has.
MIXTURE = {
    "decoder_sparse_step",
    "mlp_only_layers",
    "shared_expert_intermediate_size",
    "num_experts_per_tok",
    "num_local_experts",
    "moe_intermediate_size",
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.*Qwen3ForCausalLM, Qwen2"),
        ({"architectures": None}, "`architectures` = None"),
        ({"model_type": "qwen3"}, "`model_type` = 'qwen3' .*: llama for LlamaForCausalLM"),
        ({"attention_bias": True}, "`attention_bias` = True"),
        ({"mlp_bias": True}, "`mlp_bias` = True"),
        ({"hidden_act": "gelu"}, "`hidden_act` = 'gelu'.*supported: 'silu'"),
        ({"use_sliding_window": True}, "`use_sliding_window` = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types`"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "`rope_type` = 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "`factor`.*positive float, got None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor` = 0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "`rope_parameters`.*one rope",
        ),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` = 3.*divisor of.* = 4"),
        ({"hidden_size": None}, "`hidden_size`.*positive int, got None"),
        ({"vocab_size": "many"}, "`vocab_size`.*positive int, got 'many'"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers`.*positive int, got 0"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM'.*Qwen3MoeForCausalLM"),
        ({"decoder_sparse_step": 2}, "`decoder_sparse_step` = 2 .*supported: 1"),
        ({"mlp_only_layers": [0]}, r"`mlp_only_layers` = \[0\] .*supported: \[\]"),
        (
            {"shared_expert_intermediate_size": 16},
            "`shared_expert_intermediate_size` = 16 .*supported: 0",
        ),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` = 9 .*at most num_experts = 8"),
        (
            {"num_local_experts": None, "num_experts": None},
            "`num_experts` in config.json must be a positive int",
        ),
        ({"moe_intermediate_size": 0}, "`moe_intermediate_size` .* positive int, got 0"),
    ],
)
def test_what_is_not_computed_is_refused(
    references: dict, tmp_path: Path, changes: dict, text: str
) -> None:
    mixture = MIXTURE & changes.keys()
    source = references["qwen3_moe" if mixture else "llama"].folder
    folder = write_config(tmp_path, source, changes)
    with pytest.raises(ValueError, match=f"`{tmp_path}`.*{text}"):
        hf.read_config(folder)


def test_a_folder_with_adapters_is_refused(references: dict, tmp_path: Path) -> None:
    folder = write_config(tmp_path, references["llama"].folder, {})
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds adapters .*`merge_and_unload`"):
        hf.read_config(folder)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("x")
    for read in (hf.read_config, hf.load_tokenizer):
        with pytest.raises(ValueError, match=r"m\.gguf` is a file; give the folder that holds"):
            read(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_to_nothing_is_named(references: dict, tmp_path: Path, name: str) -> None:
    folder = write_config(tmp_path, references["llama"].folder, {})
    (folder / "README.md").symlink_to("blobs/readme")  # nothing reads it
    hf.read_config(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("blobs/1f")
    with pytest.raises(ValueError, match=f"{name} is a link to `blobs/1f`, which is not there"):
        hf.read_config(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(references: dict, tmp_path: Path, name: str) -> None:
    folder = write_config(tmp_path, references["llama"].folder, {})
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ValueError, match=f"`{folder}`: {name} is a pointer of Git LFS.*lfs pull"):
        hf.read_config(folder)


def test_the_hubs_cache_is_answered_with_its_snapshot(references: dict, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "9c925d"
    snapshot.mkdir(parents=True)
    write_config(snapshot, references["llama"].folder, {})
    hf.read_config(snapshot)
    with pytest.raises(ValueError, match=f"cache of a model; .* one of .*, such as {snapshot}$"):
        hf.read_config(snapshot.parents[1])


def test_a_model_without_an_architecture_cannot_be_exported(references: dict) -> None:
    changes = {"qwen2": dict(qk_norm=True), "qwen3_moe": dict(qk_norm=False)}
    texts = {"qwen2": "`qk_norm` = True with `qkv_bias` = True and no experts"}
    texts["qwen3_moe"] = "`qk_norm` = False with `qkv_bias` = False and experts; such a model"
    for name, changed in changes.items():
        config = replace(hf.read_config(references[name].folder), **changed)
        with pytest.raises(ValueError, match=texts[name]):
            config_json(config, dtype_name="float32")


@pytest.mark.parametrize("ids", ["</s>", [3, None], [True], 2.0])
def test_what_ends_a_turn_must_be_token_ids(tmp_path: Path, ids: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"`eos_token_id` in config\.json must be token ids, got"):
        hf.read_end_ids(tmp_path)


def test_a_dtype_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float64"}))
    with pytest.raises(ValueError, match=r"expected a dtype of .*'float64'"):
        hf.read_dtype(tmp_path)


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/none` does not exist"):
        hf.read_config(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf.read_config(tmp_path)
    for content, text in (("{", "must hold a JSON object: Exp"), ("[]", "JSON object, got list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            hf.read_config(tmp_path)
