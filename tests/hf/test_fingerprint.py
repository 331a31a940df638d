"""A fingerprint tells models apart, and not the ways in which a folder may be written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import flax
from safetensors.numpy import load_file, save_file

from opd_jax import hf
from opd_jax.config.references import EMBEDDED
from opd_jax.hf.layout import INDEX, WEIGHTS
from opd_jax.hf.tokenizer import write_tokenizer

STUDENT = EMBEDDED / "student"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(STUDENT, tmp_path / "copy")


def edit(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file; those that are None go."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | keys
    left = {key: value for key, value in sorted(content.items()) if value is not None}
    path.write_text(json.dumps(left))


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def save_again(folder: Path) -> None:
    """As `transformers` 5 writes it: other keys and order, the defaults, and its version."""
    config = folder / "config.json"
    edit(config, rope_theta=None, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    edit(config, torch_dtype=None, dtype="float32", transformers_version="5.0.0", use_cache=True)
    edit(folder / "generation_config.json", eos_token_id=[3], do_sample=True, temperature=0.6)


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names, where = sorted(tensors), {}
    for n, part in enumerate((names[1::2], names[::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{n}.safetensors")
        where |= dict.fromkeys(part, f"part-{n}.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def comment(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{# ChatML #}" + path.read_text())


def write_head_of_tied(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(tensors | head, folder / WEIGHTS, metadata={"format": "pt"})


def write_tokenizer_again(folder: Path) -> None:
    tokenizer = hf.load_tokenizer(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    write_tokenizer(folder, tokenizer)
    edit(folder / "tokenizer_config.json", note="x")
    (folder / "README.md").write_text("A model.")


@pytest.mark.parametrize(
    "rewrite", [save_again, shard, comment, write_head_of_tied, write_tokenizer_again]
)
def test_the_same_model_written_otherwise(rewrite: Callable[[Path], None], folder: Path) -> None:
    rewrite(folder)
    assert hf.fingerprint(folder) == hf.fingerprint(STUDENT)


def train(folder: Path) -> None:
    moved = {k: v + np.float32(1e-6) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(moved, folder / WEIGHTS)


def train_all_but_the_embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    moved = {k: v if "embed" in k else v * np.float32(1.01) for k, v in tensors.items()}
    save_file(moved, folder / WEIGHTS)


def narrow(folder: Path) -> None:
    narrowed = {k: jnp.bfloat16(v) for k, v in load_file(folder / WEIGHTS).items()}
    flax.save_file(narrowed, folder / WEIGHTS)


def exchange_two_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["?"] = vocab["?"], vocab["!"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def split_otherwise(folder: Path) -> None:
    """The vocabulary stays, but texts are cut into other tokens."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pattern"] = {"Regex": r"[\s\S]"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        train,
        train_all_but_the_embedding,
        narrow,
        exchange_two_tokens,
        split_otherwise,
        lambda folder: edit(folder / "config.json", rope_theta=2e4),
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[3, 5]),
        lambda folder: edit(folder / "tokenizer_config.json", additional_special_tokens=["\n"]),
        lambda folder: replace(folder / "chat_template.jinja", "assistant", "model"),
    ],
)
def test_another_model(change: Callable[[Path], None], folder: Path) -> None:
    change(folder)
    assert hf.fingerprint(folder) != hf.fingerprint(STUDENT)


def test_student_and_teacher_are_two_models() -> None:
    assert hf.fingerprint(STUDENT) != hf.fingerprint(EMBEDDED / "teacher")


def test_a_folder_without_a_whole_model_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`nowhere` does not exist"):
        hf.fingerprint(Path("nowhere"))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:999])
    with pytest.raises(ValueError, match=r"model\.safetensors` is not a complete safetensors file"):
        hf.fingerprint(folder)
