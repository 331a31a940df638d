"""Sizes of the models that a config names; no weight is read."""

import dataclasses
from dataclasses import dataclass

from ml_collections import FrozenConfigDict

from opd_jax import hf
from opd_jax.config.build import model_folder, new_sizes
from opd_jax.hf.published import PUBLISHED
from opd_jax.judge.answer import label_tokens
from opd_jax.model import ModelConfig


@dataclass(frozen=True)
class PlannedModel:
    """What is known of a model before it is loaded.

    Attributes:
      name: as in the config.
      sizes: its `ModelConfig`.
      source: where they are from, in words.
      label_width: tokens of the longest of the judge's words.
      has_tokenizer: whether that was counted; else it is assumed.
    """

    name: str
    sizes: ModelConfig
    source: str
    label_width: int
    has_tokenizer: bool


def planned_pair(config: FrozenConfigDict) -> tuple[PlannedModel, PlannedModel | None]:
    """Student and teacher of a config, with the vocabulary that they share.

    Raises:
      ValueError: a model is neither a folder nor one of `hf.published`; else as in `hf`.
    """
    if config.student == "new":
        return _new_model(config), None
    student = _planned(config.student, "student")
    if not config.teacher:
        return student, None
    teacher = _planned(config.teacher, "teacher")
    # As they are loaded: models of one tokenizer may be padded to different sizes.
    vocab = min(student.sizes.vocab_size, teacher.sizes.vocab_size)
    return _cut(student, vocab), _cut(teacher, vocab)


def _cut(model: PlannedModel, vocab_size: int) -> PlannedModel:
    sizes = dataclasses.replace(model.sizes, vocab_size=vocab_size)
    return dataclasses.replace(model, sizes=sizes)


def _planned(name: str, field: str) -> PlannedModel:
    folder = model_folder(name)
    if folder.is_dir():
        has_tokenizer = (folder / "tokenizer.json").is_file()
        return PlannedModel(
            name,
            hf.read_config(folder),
            f"sizes from config.json in `{name}`",
            _label_width(hf.load_tokenizer(folder)) if has_tokenizer else _USUAL_LABEL_WIDTH,
            has_tokenizer,
        )
    if folder.name not in PUBLISHED:
        raise ValueError(
            f"`{field}`: the folder `{folder}` does not exist, and no published sizes are known "
            f"for `{folder.name}`; give a folder with a config.json, or one that is named as one "
            f"of {', '.join(PUBLISHED)}"
        )
    source = f"published sizes of {folder.name}; the folder `{name}` is not here"
    return PlannedModel(name, PUBLISHED[folder.name], source, _USUAL_LABEL_WIDTH, False)


# "SKIP", "WEAK" and "STRONG" are words that large vocabularies split once.
_USUAL_LABEL_WIDTH = 2


def _label_width(tokenizer: object) -> int:
    return label_tokens(tokenizer)[0].shape[1]


def _new_model(config: FrozenConfigDict) -> PlannedModel:
    sizes, tokenizer = new_sizes(config)
    return PlannedModel("new", sizes, "sizes from `new_model`", _label_width(tokenizer), True)
