"""Models that settings name: dtypes, vocabularies, a new one."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from settings import one_device, read

from opd_jax import model
from opd_jax.config.models import LoadedModel, load_model, load_student, load_teacher
from opd_jax.config.references import EMBEDDED, model_folder, new_sizes
from opd_jax.model.projections import Int8Weight


def logits(loaded: LoadedModel) -> np.ndarray:
    tokens = np.arange(24, dtype=np.int32)[None]
    hidden = model.forward(
        loaded.params, tokens, config=loaded.config, query_chunk=64, remat="none"
    )
    return np.asarray(hidden @ model.head(loaded.params))


def test_names_stand_for_folders() -> None:
    assert (model_folder("embedded:student") / "config.json").is_file()
    assert model_folder("some/where") == Path("some/where")
    assert model_folder("~/where") == Path.home() / "where"
    for reference in ("embedded:", "embedded:studnet"):
        known = "only embedded:recovering, embedded:student, embedded:teacher"
        with pytest.raises(ValueError, match=f"no model `{reference}`, {known}"):
            model_folder(reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_in_the_dtype_asked_for(dtype: str) -> None:
    loaded = load_model("embedded:student", dtype=dtype, mesh=one_device())
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
    assert loaded.config.vocab_size == len(loaded.tokenizer)


def test_a_teacher_in_int8_computes_in_bfloat16() -> None:
    teacher = load_teacher(read("quickstart", "teacher_dtype=int8"), one_device())
    assert teacher is not None
    dtypes = {
        key: jax.tree.map(lambda x: x.dtype, x) for key, x in teacher.params["layers"].items()
    }
    assert dtypes["q"] == dtypes["down"] == Int8Weight(jnp.int8, jnp.float32)
    assert dtypes["q_norm"] == teacher.params["embed"].dtype == jnp.bfloat16
    assert logits(teacher).dtype == jnp.bfloat16


def with_padded_vocabulary(source: Path, target: Path, rows: int) -> Path:
    """A copy of a model folder whose embedding has `rows` more rows, as large models have."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    more = np.full((rows, tensors[name].shape[1]), 3.0, tensors[name].dtype)
    save_file(tensors | {name: np.concatenate([tensors[name], more])}, file, {"format": "pt"})
    sizes = json.loads((target / "config.json").read_text())
    sizes["vocab_size"] += rows
    (target / "config.json").write_text(json.dumps(sizes))
    return target


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_rows_that_pad_one_vocabulary_are_cut(who: str, dtype: str, tmp_path: Path) -> None:
    folder = with_padded_vocabulary(EMBEDDED / who, tmp_path / who, rows=10)
    plain = read("quickstart", f"teacher_dtype={dtype}")
    padded = read("quickstart", f"teacher_dtype={dtype}", f"{who}={folder}")
    for load_one in (load_student, load_teacher):
        ours, theirs = load_one(padded, one_device()), load_one(plain, one_device())
        assert ours is not None
        assert theirs is not None
        assert ours.config == theirs.config
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        np.testing.assert_array_equal(logits(ours), logits(theirs))


def test_rows_that_no_token_has_are_known(tmp_path: Path) -> None:
    folder = with_padded_vocabulary(EMBEDDED / "student", tmp_path / "student", rows=10)
    loaded = load_model(str(folder), dtype="float32", mesh=one_device())
    assert loaded.config.vocab_size == loaded.params["embed"].shape[0] == 675
    assert loaded.config.unused_ids == ((665, 675),)
    plain = load_model("embedded:student", dtype="float32", mesh=one_device())
    assert plain.config.unused_ids == ()


def test_a_turn_ends_where_the_folder_says(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED / "student", tmp_path / "student"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [12, 3]}')
    assert load_model(str(folder), dtype="float32", mesh=one_device()).chat.stop_ids == (3, 12)


def test_without_a_teacher_none_is_loaded() -> None:
    alone = read("quickstart:method=sft", "data.source=expert", "teacher=", "eval.who=")
    assert load_teacher(alone, one_device()) is None
    assert load_student(alone, one_device()).folder == EMBEDDED / "student"


def test_a_new_model_is_a_function_of_the_seed() -> None:
    def embedding(seed: int) -> np.ndarray:
        tiny = (f"seed={seed}", "new_model.d_model=32", "new_model.num_layers=1")
        settings = read("household_pair", *tiny)
        assert load_teacher(settings, one_device()) is None
        made = load_student(settings, one_device())
        assert made.config == new_sizes(settings)[0]
        assert made.config.vocab_size == len(made.tokenizer)
        assert (made.config.d_model, made.config.num_layers) == (32, 1)
        return np.asarray(made.params["embed"])

    np.testing.assert_array_equal(embedding(1), embedding(1))
    assert not np.array_equal(embedding(1), embedding(2))
