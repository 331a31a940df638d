"""Loads and writes the tokenizer of a model folder, and checks it against a model or another."""

import json
from pathlib import Path
from typing import Any

from opd_jax.hf.chat_template import ROLES, render
from opd_jax.hf.folder import check_folder
from opd_jax.model import ModelConfig
from opd_jax.runtime.exits import WorldFailed, reading
from opd_jax.runtime.files import read_json
from opd_jax.runtime.lazy import import_transformers

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one is enough
_CONFIG = "tokenizer_config.json"


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the `transformers` tokenizer of a folder; downloads nothing.

    A `tokenizer.json` is read as it is. `AutoTokenizer` would choose by architecture: for a Qwen2
    model it rebuilds a byte-level BPE from the vocabulary and ignores the rest of the file, without
    a warning. Whatever the folder says, decoding never cleans up spaces, since a response has to be
    what was sampled, and special tokens are read as such, since the template writes them.

    Raises:
      ValueError: the folder has no tokenizer, or it cannot be read.
    """
    folder = Path(folder)
    check_folder(folder)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(
            f"model folder `{folder}` has no tokenizer, expected one of "
            f"{', '.join(_VOCABULARIES)}; copy the tokenizer files of the model there"
        )
    transformers = import_transformers()
    whole = (folder / "tokenizer.json").is_file()
    try:
        loader = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
        with reading(folder):
            tokenizer = loader.from_pretrained(folder, local_files_only=True)
    except WorldFailed:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the tokenizer in `{folder}` cannot be read: {reason}") from error
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.split_special_tokens = False
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes the files of a `transformers` tokenizer, for `transformers` 4 and 5."""
    tokenizer.save_pretrained(folder)
    write_for_both(folder)


def write_for_both(folder: Path) -> None:
    """Rewrites a tokenizer_config.json of `transformers` 5 so that 4 reads it too; else no change.

    5 names a class that 4 lacks, and lists the special tokens that have no role of their own under
    another key. It still reads the class and the key of 4.
    """
    path = folder / _CONFIG
    if not path.is_file():
        return
    content = read_json(path, advice="fetch it again")
    before = dict(content)
    if str(content.get("tokenizer_class")).endswith("Backend"):
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    for key in ("backend", "is_local", "local_files_only"):
        content.pop(key, None)
    if content != before:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vocab(folder: str | Path, tokenizer: Any, config: ModelConfig) -> None:
    """Checks that every token has a row in the embedding.

    Rows without a token are padding (`unused_ids`). A token without a row would get another token's
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


def unused_ids(tokenizer: Any, config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The rows of the embedding that no token has, as ranges [start, stop) in ascending order."""
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i < config.vocab_size)
    edges = zip([-1, *ids], [*ids, config.vocab_size], strict=True)
    return tuple((last + 1, following) for last, following in edges if following > last + 1)


# What has to be equal and advice if it is not, by the name in the error message.
Views = dict[str, tuple[dict[Any, str | None], str]]
_RENDERING = "the chat template's rendering of"

# Every kind of turn that `agent.chat` takes from a template.
_CONVERSATIONS = ("u", "su", "uau", "uauau", "suauau")


def check_same_tokenizer(
    student_from: str | Path | Any, teacher_from: str | Path | Any, *, rows: int | None = None
) -> None:
    """Checks that student and teacher have the same tokens and rendered prompts.

    Divergences compare the two models id by id, and the teacher scores the tokens that the student
    sampled. Templates may differ where what they render does not. Padding is never read, and one
    model may have a special token for it that the other lacks. The end of sequence may differ, as a
    base model's does: each stops at its own (`ChatFormat.stop_ids`).

    Args:
      student_from, teacher_from: a folder with a tokenizer, or a tokenizer.
      rows: of the vocabulary that the two share; every token has to be below. None: any number.

    Raises:
      ValueError: they differ. The message names both folders and the first difference.
    """
    froms = student_from, teacher_from
    folders = [isinstance(where, (str, Path)) for where in froms]
    names = [where if is_folder else "new" for where, is_folder in zip(froms, folders, strict=True)]
    tokenizers = [
        load_tokenizer(where) if is_folder else where
        for where, is_folder in zip(froms, folders, strict=True)
    ]
    student, teacher = map(views, tokenizers)
    unread = _unread(tokenizers[0], student) | _unread(tokenizers[1], teacher)
    unread -= {i for i in unread if rows is not None and i >= rows}
    for what, (ours, advice) in student.items():
        theirs = teacher[what][0]
        apart = (k for k in [*ours, *theirs] if ours.get(k) != theirs.get(k))
        key = next((k for k in apart if k not in unread or (k in ours and k in theirs)), None)
        if key is not None:
            mine, other = _around_difference(ours.get(key), theirs.get(key))
            raise ValueError(
                f"student `{names[0]}` and teacher `{names[1]}` must have the same tokenizer; "
                f"{what} {key} is {mine} in the student and {other} in the teacher; "
                f"use models of one family{advice}"
            )


def _unread(tokenizer: Any, views: Views) -> set[int]:
    """Special tokens that neither end a response nor are written by the template."""
    rendered = "".join(filter(None, views[_RENDERING][0].values()))
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return {i for i, token in special.items() if token not in rendered} - {tokenizer.eos_token_id}


def views(tokenizer: Any) -> Views:
    """What has to be equal and advice if it is not, by the name in the error message."""
    copy = ", or write the student's chat template into a copy of the teacher's folder"
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    rendered = {
        ", ".join(ROLES[r] for r in roles): _said(tokenizer, roles) for roles in _CONVERSATIONS
    }
    return {
        "token": (dict(sorted(tokens.items())), ""),
        _RENDERING: (rendered, copy),
    }


def _said(tokenizer: Any, roles: str) -> str:
    try:
        return render(tokenizer, roles)[0]
    except Exception as error:  # a template may raise anything; both may lack one
        return f"{type(error).__name__}: {error}"


def _around_difference(ours: str | None, theirs: str | None) -> tuple[str, str]:
    """Both texts from a few characters before they differ, for a message."""
    if ours is None or theirs is None:
        return (_shortened(ours, 0), _shortened(theirs, 0))
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return (_shortened(ours, first), _shortened(theirs, first))


def _shortened(text: str | None, first: int) -> str:
    if text is None:
        return "absent"
    start, stop = max(0, first - 20), first + 40
    return "…" * (start > 0) + repr(text[start:stop]) + "…" * (stop < len(text))
