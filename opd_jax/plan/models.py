"""Sizes of the models that a config names; no weights are read."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from opd_jax import hf
from opd_jax.agent.chat import ChatFormat
from opd_jax.config.models import student_dtype
from opd_jax.config.references import find_model, model_folder, new_sizes
from opd_jax.config.settings import Settings
from opd_jax.hf.published import PUBLISHED
from opd_jax.judge.answer import label_tokens
from opd_jax.model import ModelConfig, attention_on
from opd_jax.runtime import bucket

# "SKIP", "WEAK" and "STRONG" take at most so many tokens in large vocabularies.
_USUAL_LABEL_WIDTH = 2


@dataclass(frozen=True)
class PlannedModel:
    """What is known of a model before it is loaded."""

    sizes: ModelConfig
    dtype: str  # that it is loaded in; may be "int8"
    source: str  # where they are from, in words
    label_width: int  # most tokens of a label's word; without a tokenizer the usual number


def planned_pair(settings: Settings, *, platform: str) -> tuple[PlannedModel, PlannedModel | None]:
    """Student and teacher of a config on a platform (JAX's name).

    Raises:
      ValueError: a model is neither a folder nor one of `hf.published`, or `attention` is for
        another platform; else as in `hf`.
    """
    attention = attention_on(platform, settings.attention)
    if attention == "cudnn" and jax.default_backend() != platform:
        attention = "plain"  # only where cuDNN is can a program with it be traced
    student, teacher = _pair(settings)
    return _attending(student, attention), teacher and _attending(teacher, attention)


def _attending(model: PlannedModel, attention: str) -> PlannedModel:
    return replace(model, sizes=replace(model.sizes, attention=attention))


def _pair(settings: Settings) -> tuple[PlannedModel, PlannedModel | None]:
    """Student and teacher with the vocabulary that they share."""
    if settings.student == "new":
        sizes, tokenizer = new_sizes(settings)
        width = label_tokens(ChatFormat.from_tokenizer(tokenizer))[0].shape[1]
        source = "sizes from `new_model`"
        return PlannedModel(sizes, student_dtype(settings), source, width), None
    student = _planned(settings.student, student_dtype(settings), "student")
    if not settings.teacher:
        return student, None
    teacher = _planned(settings.teacher, settings.teacher_dtype, "teacher")
    # As they are loaded: models with one tokenizer may pad its vocabulary differently.
    vocab = min(student.sizes.vocab_size, teacher.sizes.vocab_size)
    student, teacher = (
        replace(model, sizes=replace(model.sizes, vocab_size=vocab)) for model in (student, teacher)
    )
    return student, teacher


def _planned(name: str, dtype: str, field: str) -> PlannedModel:
    if name.startswith("workdir:"):
        found = find_model(name, field=field)
        width = label_tokens(ChatFormat.from_tokenizer(found.tokenizer()))[0].shape[1]
        return PlannedModel(found.sizes, dtype, f"sizes of the student in `{name}`", width)
    # From a bucket the weights would come too.
    folder = Path(name) if name.startswith(bucket.SCHEME) else model_folder(name)
    if folder.is_dir():
        width = _USUAL_LABEL_WIDTH
        if (folder / "tokenizer.json").is_file():
            chat = ChatFormat.from_tokenizer(hf.load_tokenizer(folder))
            width = label_tokens(chat)[0].shape[1]
        source = f"sizes from config.json in `{name}`"
        return PlannedModel(hf.read_config(folder), dtype, source, width)
    if folder.name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise ValueError(f"`{field}`: expected a folder, or one of {known}; got `{name}`")
    source = f"published sizes of {folder.name}; the folder `{name}` is not here"
    return PlannedModel(PUBLISHED[folder.name], dtype, source, _USUAL_LABEL_WIDTH)
