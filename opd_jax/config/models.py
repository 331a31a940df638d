"""Loads the models that settings name, or reads their sizes."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import hf
from opd_jax.agent.chat import ChatFormat
from opd_jax.config.settings import Settings
from opd_jax.judge.prompt import PHRASES
from opd_jax.model import ModelConfig, Params, attention_on, init_params, param_specs
from opd_jax.runtime import progress
from opd_jax.runtime.files import local_path
from opd_jax.runtime.mesh import DECODING, TRAINING, Rules, param_shardings

EMBEDDED = Path(__file__).parents[1] / "pair"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
      folder: the folder.
      config: the model's sizes.
      params: the model's parameters.
      tokenizer: a `transformers` tokenizer.
      chat: the tokenizer's chat format.
    """

    folder: Path
    config: ModelConfig
    params: Params
    tokenizer: Any
    chat: ChatFormat


def model_folder(reference: str) -> Path:
    """The folder of a model reference: a path, or `embedded:NAME` for a model of the package.

    ValueError if the package has no such model, or the path is an address of another kind.
    """
    if not reference.startswith("embedded:"):
        return local_path(reference, name="student` or `teacher")
    folder = EMBEDDED / (name := reference.removeprefix("embedded:"))
    if not name or not folder.is_dir():
        known = ", ".join(f"embedded:{path.name}" for path in sorted(EMBEDDED.iterdir()))
        raise ValueError(f"the package has no model `{reference}`, only {known}")
    return folder


def load_model(
    reference: str,
    *,
    dtype: str,
    mesh: jax.sharding.Mesh,
    rules: Rules = TRAINING,
    vocab_size: int | None = None,
) -> LoadedModel:
    """Read a model folder; errors as in `hf`.

    Args:
      reference: names a folder of Hugging Face safetensors; see `model_folder`.
      dtype: dtype of the parameters; "int8" is `int8.quantize_params` over bfloat16.
      mesh: the devices over which they are sharded.
      rules: `mesh.TRAINING` or `mesh.DECODING`.
      vocab_size: rows of the vocabulary to read; the rest is padding. None: all.
    """
    folder = model_folder(reference)
    config = hf.read_config(folder)
    tokenizer = hf.load_tokenizer(folder)
    if vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=vocab_size)
    hf.check_vocab(folder, tokenizer, config)
    config = dataclasses.replace(config, unused_ids=hf.unused_ids(tokenizer, config))
    return LoadedModel(
        folder=folder,
        config=config,
        params=hf.load_params(
            folder,
            config,
            dtype=jnp.dtype("bfloat16" if dtype == "int8" else dtype),
            int8=dtype == "int8",
            mesh=mesh,
            rules=rules,
        ),
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(tokenizer, end_ids=hf.read_end_ids(folder)),
    )


def load_student(
    settings: Settings, mesh: jax.sharding.Mesh, *, vocab_size: int | None = None
) -> LoadedModel:
    """The student before any update.

    Its vocabulary has `vocab_size` rows, and nothing is read of the teacher. None: those that it
    shares with its teacher.

    Raises:
      ValueError: its tokenizer differs from the teacher's (found before any weight is read), the
        folder has errors that `hf` names, or `attention` is for another platform.
    """
    if settings.student == "new":
        return _attending(new_model(settings, mesh), settings)
    if settings.teacher and vocab_size is None:
        hf.check_same_tokenizer(
            model_folder(settings.student),
            model_folder(settings.teacher),
            rows=_shared_vocab(settings),
        )
    with progress.doing("loading the student"):
        loaded = load_model(
            settings.student,
            dtype=student_dtype(settings),
            mesh=mesh,
            vocab_size=vocab_size or _shared_vocab(settings),
        )
    return _attending(loaded, settings)


def load_teacher(settings: Settings, mesh: jax.sharding.Mesh) -> LoadedModel | None:
    """The teacher, or None if the settings have none. It is sharded as it judges."""
    if not settings.teacher:
        return None
    with progress.doing("loading the teacher"):
        loaded = load_model(
            settings.teacher,
            dtype=settings.teacher_dtype,
            mesh=mesh,
            rules=DECODING,
            vocab_size=_shared_vocab(settings),
        )
    return _attending(loaded, settings)


def _attending(loaded: LoadedModel, settings: Settings) -> LoadedModel:
    """The model with what computes attention here."""
    how = attention_on(jax.default_backend(), settings.attention)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, attention=how))


MODELS = ("student", "teacher")


def named_folders(settings: Settings, who: Collection[str] = MODELS) -> dict[str, Path]:
    """The folders of `student` and `teacher`, of those in `who` that have one."""
    named = {name: getattr(settings, name) for name in who}
    return {name: model_folder(where) for name, where in named.items() if where not in ("", "new")}


def named_sizes(settings: Settings, who: Collection[str] = MODELS) -> dict[str, ModelConfig]:
    """Sizes of `student` and `teacher`, of those in `who` that there are; no weight is read."""
    sizes = {name: hf.read_config(path) for name, path in named_folders(settings, who).items()}
    return sizes | ({"student": new_sizes(settings)[0]} if settings.student == "new" else {})


def student_dtype(settings: Settings) -> str:
    """The student's dtype. Frozen weights are kept in the compute dtype."""
    if not settings.lora.rank:
        return settings.dtype
    return "int8" if settings.lora.int8 else settings.compute_dtype


def _shared_vocab(settings: Settings) -> int:
    """The smaller of the vocabularies: models of one tokenizer may be padded differently."""
    return min(sizes.vocab_size for sizes in named_sizes(settings).values())


def new_model(settings: Settings, mesh: jax.sharding.Mesh) -> LoadedModel:
    """A random model with the household's tokenizer."""
    sizes, tokenizer = new_sizes(settings)
    init = jax.jit(
        partial(init_params, sizes, dtype=jnp.dtype(settings.dtype)),
        out_shardings=param_shardings(param_specs(sizes), mesh),
    )
    return LoadedModel(
        folder=EMBEDDED,
        config=sizes,
        params=init(jax.random.key(settings.seed)),
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(tokenizer),
    )


def new_sizes(settings: Settings) -> tuple[ModelConfig, Any]:
    """Sizes of `new_model`, and its tokenizer."""
    from opd_jax.envs.household.tokenizer import build

    assert settings.new_model is not None  # as settings are checked
    tokenizer = build(phrases=PHRASES)
    return dataclasses.replace(settings.new_model, vocab_size=len(tokenizer)), tokenizer
