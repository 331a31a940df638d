"""Loads the models that settings name."""

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import hf
from opd_jax.agent.chat import ChatFormat
from opd_jax.config.references import (
    EMBEDDED,
    Checkpoint,
    FoundModel,
    find_model,
    find_models,
    named_sizes,
    new_sizes,
)
from opd_jax.config.settings import Settings
from opd_jax.model import ModelConfig, Params, attention_on, init_params, is_spec, param_specs
from opd_jax.model.int8 import int8_specs, quantize_params
from opd_jax.model.lora import lora_specs, plain_params, with_adapters
from opd_jax.runtime import progress
from opd_jax.runtime.mesh import DECODING, TRAINING, Rules, param_shardings


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
      folder: the folder with its tokenizer.
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


def load_model(
    reference: str,
    *,
    dtype: str,
    mesh: jax.sharding.Mesh,
    rules: Rules = TRAINING,
    vocab_size: int | None = None,
) -> LoadedModel:
    """Loads a model; errors as in `find_model` and `hf`.

    Args:
      reference: see `references`.
      dtype: dtype of the parameters; "int8" is `int8.quantize_params` over bfloat16.
      mesh: the devices over which they are sharded.
      rules: `mesh.TRAINING` or `mesh.DECODING`.
      vocab_size: rows of the vocabulary to read; the rest is padding. None: all.
    """
    found = find_model(reference, field="student` or `teacher")
    return load_found(found, dtype=dtype, mesh=mesh, rules=rules, vocab_size=vocab_size)


def load_found(
    found: FoundModel,
    *,
    dtype: str,
    mesh: jax.sharding.Mesh,
    rules: Rules = TRAINING,
    vocab_size: int | None = None,
) -> LoadedModel:
    """As `load_model`, of a model that is found already."""
    config, tokenizer = found.sizes, found.tokenizer()
    if vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=vocab_size)
    hf.check_vocab(found.name, tokenizer, config)
    config = dataclasses.replace(config, unused_ids=hf.unused_ids(tokenizer, config))
    whole, int8 = jnp.dtype("bfloat16" if dtype == "int8" else dtype), dtype == "int8"
    how: dict[str, Any] = dict(dtype=whole, int8=int8, mesh=mesh, rules=rules)
    if found.checkpoint:
        params = load_trained(found.sizes, found.checkpoint, config, **how)
    else:
        params = hf.load_params(found.tokenizer_from(), config, **how)
    return LoadedModel(
        folder=found.folder or EMBEDDED,
        config=config,
        params=params,
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(
            tokenizer, end_ids=hf.read_end_ids(found.folder) if found.folder else ()
        ),
    )


def load_trained(
    sizes: ModelConfig,
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: jnp.dtype,
    int8: bool,
    mesh: jax.sharding.Mesh,
    rules: Rules,
) -> Params:
    """The parameters of a run's student at a checkpoint, adapters merged in float32.

    They are those of an exported folder; where adapters are split over devices, to rounding.

    Args:
      sizes: those of the checkpoint.
      config: `sizes`, or with a smaller vocabulary.
      dtype, int8, mesh, rules: as in `hf.load_params`.
    """
    run = checkpoint.settings
    lora = run.lora if run.lora.rank else None
    specs = lora_specs(sizes, lora) if lora else param_specs(sizes)
    wanted = jax.tree.map(
        lambda spec, at: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(run.dtype), sharding=at),
        specs,
        param_shardings(specs, mesh, rules=rules),
        is_leaf=is_spec,
    )
    with closing(checkpoint.open()) as checkpoints:
        state, _ = checkpoints.restore(checkpoint.step, {"params": wanted}, partial=True)
    base = None
    if lora:
        base = load_found(checkpoint.base, dtype=student_dtype(run), mesh=mesh, rules=rules).params

    def finish(params: Params) -> Params:
        params = jax.tree.map(
            lambda spec, x: jax.lax.slice(x, (0,) * x.ndim, spec.shape).astype(dtype),
            param_specs(config),
            plain_params(params, sizes),
            is_leaf=is_spec,
        )
        return quantize_params(params, config) if int8 else params

    final = int8_specs(config) if int8 else param_specs(config)
    placed = jax.jit(finish, out_shardings=param_shardings(final, mesh, rules=rules))
    return placed(with_adapters(base, state["params"], lora))


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
        pair = find_models(settings)
        hf.check_same_tokenizer(
            pair["student"].tokenizer_from(),
            pair["teacher"].tokenizer_from(),
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


def load_judge(settings: Settings, teacher: LoadedModel | None) -> LoadedModel | None:
    """The model that is asked for verdicts: `judge.model`, with its own tokenizer, or the teacher.

    It is read once, over the current mesh, and kept.
    """
    if not settings.judge_model:
        return teacher
    dtype, mesh = settings.teacher_dtype, jax.sharding.get_mesh()
    return _attending(_kept(settings.judge_model, dtype, mesh), settings)


@cache
def _kept(reference: str, dtype: str, mesh: jax.sharding.Mesh) -> LoadedModel:
    return load_model(reference, dtype=dtype, mesh=mesh, rules=DECODING)


def _attending(loaded: LoadedModel, settings: Settings) -> LoadedModel:
    """The model with what computes attention here."""
    how = attention_on(jax.default_backend(), settings.attention)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, attention=how))


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
