"""Loads the tokenizer of a model folder, and checks it against a model or another tokenizer."""

import shutil
from pathlib import Path
from typing import Any

from opd_jax.model import ModelConfig

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one is enough
_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the `transformers` tokenizer of a folder; downloads nothing.

    A `tokenizer.json` is read as it is. `AutoTokenizer` would choose by architecture: for a Qwen2
    model it rebuilds a byte-level BPE from the vocabulary and ignores the rest of the file, without
    a warning.

    Raises:
      ValueError: the folder has no tokenizer, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model folder `{folder}` does not exist; check the path")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(
            f"model folder `{folder}` has no tokenizer, expected one of "
            f"{', '.join(_VOCABULARIES)}; copy the tokenizer files of the model there"
        )
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as loader
    else:  # this import takes seconds if torch is installed
        from transformers import AutoTokenizer as loader

    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the tokenizer in `{folder}` cannot be read: {reason}") from error


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the tokenizer files and generation_config.json of the folder `source` unchanged."""
    for name in _FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def check_vocab(folder: str | Path, tokenizer: Any, config: ModelConfig) -> None:
    """Checks that every token has a row in the embedding.

    Rows without a token are padding and harmless. A token without a row would get another token's
    row, since JAX clamps indices that are out of range. The message names `folder`.

    Raises:
      ValueError: the tokenizer has more tokens than the embedding has rows.
    """
    tokens = 1 + max(tokenizer.get_vocab().values())  # ids may have gaps
    if tokens > config.vocab_size:
        raise ValueError(
            f"model folder `{folder}`: the tokenizer has {tokens} tokens and the model a "
            f"`vocab_size` of {config.vocab_size}; the tokenizer of another model may have been "
            "copied there, or tokens added without growing the embedding"
        )


def check_same_tokenizer(student_folder: str | Path, teacher_folder: str | Path) -> None:
    """Checks that student and teacher have the same tokens, special tokens and chat template.

    Divergences compare the two models id by id, and the teacher scores the tokens that the student
    sampled.

    Raises:
      ValueError: they differ. The message names both folders and the first difference.
    """
    student = _views(load_tokenizer(student_folder))
    teacher = _views(load_tokenizer(teacher_folder))
    for what, ours in student.items():
        theirs = teacher[what]
        keys = sorted(ours.keys() | theirs.keys())
        key = next((k for k in keys if _differ(ours, theirs, k)), None)
        if key is not None:
            raise ValueError(
                f"student `{student_folder}` and teacher `{teacher_folder}` must have the same "
                f"tokenizer; {what} {key} is {_show(ours, key)} in the student and "
                f"{_show(theirs, key)} in the teacher; use models of one family"
            )


def _views(tokenizer: Any) -> dict[str, dict]:
    """What has to be equal, keyed by its name in the error message."""
    return {
        "token": {i: token for token, i in tokenizer.get_vocab().items()},
        "special token": dict(tokenizer.special_tokens_map),
        "the": {"chat template": tokenizer.chat_template},
    }


def _differ(ours: dict, theirs: dict, key: object) -> bool:
    return key not in ours or key not in theirs or ours[key] != theirs[key]


def _show(view: dict, key: object) -> str:
    if key not in view:
        return "absent"
    text = repr(view[key])
    return text if len(text) <= 60 else text[:60] + "…"
