"""Weights in Hugging Face folders: what is read, what is written, and what is refused."""

import dataclasses
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from opd_jax import hf, model
from opd_jax.hf.save import MAX_SHARD_BYTES
from opd_jax.runtime.exits import WorldFailed
from opd_jax.runtime.mesh import make_mesh


def assert_trees_equal(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def load(folder: Path, **options: Any) -> model.Params:
    return hf.load_params(folder, hf.read_config(folder), **{"dtype": jnp.float32} | options)


# --- Reading ------------------------------------------------------------------------------------


def test_every_tensor_lands_in_its_place(reference: Any) -> None:
    params = load(reference.folder)
    state = {k: v.numpy() for k, v in reference.model.state_dict().items()}
    layers = params["layers"]
    np.testing.assert_array_equal(params["embed"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.head(params), state["lm_head.weight"].T)
    for i in range(2):
        prefix = f"model.layers.{i}."
        for ours, theirs in {"gate": "mlp.gate_proj", "o": "self_attn.o_proj"}.items():
            expected = state[f"{prefix}{theirs}.weight"].T
            np.testing.assert_array_equal(
                np.asarray(layers[ours][i]).reshape(expected.shape), expected
            )
        H = layers["k"].shape[-1]
        second_head = state[f"{prefix}self_attn.k_proj.weight"][H : 2 * H]
        np.testing.assert_array_equal(layers["k"][i, :, 1], second_head.T)


@pytest.mark.parametrize(
    ("name", "sizes"), [("qwen3", (1, 4, 2)), ("qwen2", (2, 2, 2)), ("qwen3_moe", (2, 2, 2))]
)
def test_each_shard_is_read_once_and_nothing_else(
    references: dict, name: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = references[name]
    plain = load(reference.folder)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(plain)} == {1}
    read = record_reads(monkeypatch)
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    params = load(reference.folder, mesh=mesh)
    assert_trees_equal(params, plain)
    part = sizes[1] * sizes[2]
    down = params["layers"].get("down", params["layers"].get("expert_down"))
    for leaf in (params["embed"], params["layers"]["q"], down):
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // part}
    # Once also where `data` replicates it.
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        with safe_open(reference.folder / "model.safetensors", "numpy") as file:
            whole = int(np.prod(file.get_slice(name).get_shape()))
        assert read[name] == [whole // part] * part


def record_reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Elements of every read from a safetensors file, by tensor."""
    read: dict[str, list[int]] = {}

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

        def __getitem__(self, index: Any) -> np.ndarray:
            block = self.inner[index]
            read.setdefault(self.name, []).append(block.size)
            return block

    class File:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.inner = safe_open(*args, **options)

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *_: object) -> None: ...

        def keys(self) -> list[str]:
            return self.inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

    monkeypatch.setattr("opd_jax.hf.load.safe_open", File)
    return read


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_files_in_half_precision(references: dict, tmp_path: Path, stored: str) -> None:
    import torch

    reference = references["qwen2"]
    state = {k: v.to(getattr(torch, stored)) for k, v in reference.model.state_dict().items()}
    expected = state["model.layers.1.mlp.up_proj.weight"].T.float().numpy()
    reference.model.save_pretrained(tmp_path, state_dict=state)
    for dtype in (jnp.float32, jnp.dtype(stored)):
        params = load(tmp_path, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        np.testing.assert_array_equal(params["layers"]["up"][1].astype(jnp.float32), expected)


def test_float32_file_is_rounded_to_bfloat16(references: dict) -> None:
    exact, low = (load(references["qwen3"].folder, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    assert_trees_equal(low, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_rows_beyond_the_vocabulary_are_not_read(references: dict) -> None:
    for name in ("qwen3", "qwen3_tied"):
        folder = references[name].folder
        config = dataclasses.replace(hf.read_config(folder), vocab_size=90)
        params, whole = hf.load_params(folder, config, dtype=jnp.float32), load(folder)
        np.testing.assert_array_equal(params["embed"], whole["embed"][:90])
        np.testing.assert_array_equal(model.head(params), model.head(whole)[:, :90])


def test_a_single_file_comes_before_an_index_as_in_transformers(
    references: dict, tmp_path: Path
) -> None:
    source = references["llama"].folder
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    old = {name: 2 * tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(old, tmp_path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_trees_equal(load(tmp_path), load(source))
    (tmp_path / "model.safetensors").unlink()
    doubled = jax.tree.map(lambda x: 2 * x, load(source))
    assert_trees_equal(load(tmp_path), doubled)
    # And all of a file is read, whatever part of it the index names.
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_trees_equal(load(tmp_path), doubled)


def test_a_tensor_in_two_files_is_read_from_the_one_that_the_index_names(
    references: dict, tmp_path: Path
) -> None:
    source = references["llama"].folder
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "b.safetensors")
    weight_map = {name: "b.safetensors" if "head" in name else "a.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = load(source)
    assert_trees_equal(load(tmp_path), expected | {"head": 2 * expected["head"]})


def test_a_tied_model_may_hold_its_embedding_twice_but_no_other_head(
    references: dict, tmp_path: Path
) -> None:
    shutil.copytree(references["qwen3_tied"].folder, tmp_path, dirs_exist_ok=True)
    expected = load(tmp_path)
    embed = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    _put("lm_head.weight", embed)(tmp_path)
    assert_trees_equal(load(tmp_path), expected)
    other = embed.copy()
    other[-1, -1] += 1
    for head in (other, embed[:-1]):
        _put("lm_head.weight", head)(tmp_path)
        with pytest.raises(ValueError, match=r"says `tie_word_embeddings`, but .*`lm_head.weight`"):
            load(tmp_path)


def test_fused_experts_are_refused_by_name(references: dict, tmp_path: Path) -> None:
    shutil.copytree(references["qwen3_moe"].folder, tmp_path, dirs_exist_ok=True)
    shape = (8, 48, 32)
    fused = {f"model.layers.{n}.mlp.experts.gate_up_proj": np.ones(shape) for n in range(2)}
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(kept | fused, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds fused experts \(`model\.layers\.\d\.mlp\.exp"):
        load(tmp_path)


# --- Writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [("qwen3", 1), ("qwen3_tied", 1), ("qwen2", 1), ("llama", 1), ("qwen3_moe", 1), ("qwen2", 2)],
)
def test_an_export_is_the_folder_that_was_read(
    references: dict, tokenizer: Any, tmp_path: Path, name: str, files: int
) -> None:
    from transformers import AutoModelForCausalLM

    source = references[name]
    config = hf.read_config(source.folder)
    limit = MAX_SHARD_BYTES if files == 1 else 20_000
    params = load(source.folder, mesh=make_mesh(data=1, fsdp=4, tensor=2))
    out = tmp_path / "new" / "model"
    hf.save_model(
        out, params, config, dtype=jnp.float32, tokenizer_from=tokenizer, max_shard_bytes=limit
    )
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    written = sorted(out.glob("*.safetensors"))
    assert (len(written) > 1) == (files > 1)
    assert all(p.stat().st_size < limit + 10_000 for p in written)
    assert all(p.stat().st_mode == (out / "config.json").stat().st_mode for p in written)
    tensors = {k: v for p in written for k, v in load_file(p).items()}
    expected = load_file(source.folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert_trees_equal(tensors, expected)
    assert hf.read_config(out) == config
    assert_trees_equal(load(out), params)
    opened, problems = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    assert type(opened) is type(source.model)
    for key in ("rope_parameters", "norm_topk_prob"):
        assert getattr(opened.config, key, None) == getattr(source.model.config, key, None)
    assert_trees_equal(opened.state_dict(), source.model.state_dict())


def test_export_in_bfloat16(references: dict, tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = references["qwen3_tied"].folder
    params = load(folder)
    out = tmp_path / "model"
    hf.save_model(out, params, hf.read_config(folder), dtype=jnp.bfloat16, tokenizer_from=tokenizer)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_trees_equal(load(out, dtype=jnp.bfloat16), low)


def test_an_export_holds_the_content_of_one_file(
    references: dict, tokenizer: Any, tmp_path: Path, random_params: Callable
) -> None:
    config = dataclasses.replace(hf.read_config(references["qwen3"].folder), num_layers=40)
    config = dataclasses.replace(config, d_ff=2048)
    params = random_params(config, seed=0)
    largest = 4 * config.d_ff * config.d_model
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 100 * largest
    save = partial(hf.save_model, config=config, dtype=jnp.float32, tokenizer_from=tokenizer)
    save = partial(save, max_shard_bytes=2 * largest)
    save(tmp_path / "imports", params)
    tracemalloc.start()
    save(tmp_path / "out", params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Names of tensors and the tokenizer take the rest.
    assert largest < peak < 8 * largest


def test_tokenizer_travels_with_the_model(references: dict, tokenizer: Any, tmp_path: Path) -> None:
    folder = references["qwen2"].folder
    save = partial(
        hf.save_model, params=load(folder), config=hf.read_config(folder), dtype=jnp.bfloat16
    )
    save(tmp_path / "a", tokenizer_from=tokenizer)
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "a" / "LICENSE").write_text("as you like")
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "tool.jinja").write_text("{{ 1 }}")
    for name in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".cache"):
        (tmp_path / "a" / name).write_text("weights, or nobody's business")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (raw["eos_token_id"], raw["pad_token_id"]) == (2, 0)
    raw |= {"eos_token_id": [2, 7], "bos_token_id": 5}  # a list, as Llama 3 has it
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "b").mkdir()  # an empty folder may be filled
    save(tmp_path / "b", tokenizer_from=str(tmp_path / "a"))
    hf.check_same_tokenizer(tmp_path / "a", tmp_path / "b")
    assert hf.load_tokenizer(tmp_path / "b").encode("word3 <|im_end|>") == [6, 2]
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == raw
    copied = {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*")}
    assert {Path("LICENSE"), Path("additional_chat_templates", "tool.jinja")} <= copied
    assert not copied & {Path("pytorch_model.bin"), Path("model.gguf"), Path(".cache")}
    assert Path("pytorch_model.bin.index.json") not in copied
    for name in copied - {Path("additional_chat_templates"), Path("config.json")}:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_a_failed_export_leaves_nothing(references: dict, tmp_path: Path) -> None:
    folder = references["qwen2"].folder
    config, params = hf.read_config(folder), load(folder)
    save = partial(hf.save_model, config=config, dtype=jnp.float32, tokenizer_from=folder)
    out = tmp_path / "model"
    with pytest.raises(ValueError, match="has no tokenizer"):
        save(out, params)
    with pytest.raises(ValueError, match=r"`final_norm` should have shape \(32,\), got none"):
        save(out, {k: v for k, v in params.items() if k != "final_norm"})

    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(out, params, tokenizer_from=Broken())
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "kept.txt").write_text("kept")
    with pytest.raises(ValueError, match="not overwritten"):
        save(out, params)
    assert (out / "kept.txt").read_text() == "kept"


# --- Refusals -----------------------------------------------------------------------------------


def _drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder, lambda t: {k: t[k] for k in t.keys() - set(names)})


def _put(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder, lambda tensors: tensors | {name: array})


def _rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(weight_map: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def _more_experts(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    # Versions of transformers write one name or the other.
    (folder / "config.json").write_text(re.sub('(num_(local_)?experts": )8', r"\g<1>9", text))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_more_experts, r"lacks tensor `model\.layers\.0\.mlp\.experts\.8\.down_proj"),
        (_drop("model.norm.weight"), r"lacks tensor `model\.norm\.weight`, which"),
        (
            _drop("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
            r"lacks tensor `model\.layers\.0\.mlp\.up_proj\.weight` and 1 more",
        ),
        (
            _put("model.layers.1.self_attn.k_proj.weight", np.zeros((32, 32), np.float32)),
            r"`model\.layers\.1\.self_attn\.k_proj\.weight` .*\(16, 32\), got \(32, 32\)",
        ),
        (
            _put("lm_head.weight", np.zeros((90, 32), np.float32)),
            r"`lm_head\.weight` must have shape \(96, 32\), got \(90, 32\)",
        ),
        (
            _put("model.embed_tokens.weight", np.zeros((98, 32), np.float32)),
            r"`model\.embed_tokens\.weight` must have shape \(96, 32\), got \(98, 32\)",
        ),
        (
            _put("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32)),
            r"holds tensor `model\.layers\.0\.self_attn\.q_proj\.bias`, which its config",
        ),
        (
            _put("model.layers.2.input_layernorm.weight", np.zeros(32, np.float32)),
            r"holds tensor `model\.layers\.2\.input_layernorm\.weight`, which its config",
        ),
        (_put("model.norm.weight", np.zeros(32, np.int8)), r"`model\.norm\.weight`.*BF16, got I8"),
        (_truncate, r"model\.safetensors` is not a complete safetensors file"),
        (_only_bin, r"must hold model\.safetensors or .*, got config\.json.*pytorch_model\.bin"),
        (_index({"a": "model-00002-of-00002.safetensors"}), r"lacks model-00002-of-00002"),
        (_index(None), r"index\.json` must hold a `weight_map`"),
    ],
)
def test_bad_weights(
    references: dict, tmp_path: Path, damage: Callable[[Path], None], text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(references["qwen3_moe" if damage is _more_experts else "llama"].folder, folder)
    damage(folder)
    config = hf.read_config(folder)
    with pytest.raises(ValueError, match=text) as caught:
        hf.load_params(folder, config, dtype=jnp.float32)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file of Linux")
def test_weights_that_cannot_be_read_now_are_not_called_broken(
    references: dict, tmp_path: Path
) -> None:
    shutil.copytree(references["llama"].folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # reading its start fails with EIO
    with pytest.raises(WorldFailed, match=rf"`{weights}` cannot be read now"):
        hf.load_params(tmp_path, hf.read_config(tmp_path), dtype=jnp.float32)


def test_nothing_is_read_before_all_is_checked(
    references: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(references["llama"].folder, tmp_path, dirs_exist_ok=True)
    _put("model.norm.weight", np.zeros(31, np.float32))(tmp_path)
    read = record_reads(monkeypatch)
    with pytest.raises(ValueError, match=r"`model\.norm\.weight`"):
        load(tmp_path)
    assert read == {}
