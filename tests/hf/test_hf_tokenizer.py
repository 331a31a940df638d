"""The tokenizer of a folder: loaded, and checked against a model and another tokenizer."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_jax import hf


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        hf.load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no tokenizer, expected one of tokenizer\.json"):
        hf.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"tokenizer in `{tmp_path}` cannot be read") as caught:
        hf.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_token_needs_a_row_and_a_row_may_lack_a_token(
    references: dict, tokenizer: Any
) -> None:
    folder = references["qwen3"].folder
    assert len(tokenizer) == 89
    config = hf.read_config(folder)
    for rows in (89, 96):
        hf.check_vocab(folder, tokenizer, dataclasses.replace(config, vocab_size=rows))
    with pytest.raises(ValueError, match=f"folder `{folder}`.* 89 tokens .*`vocab_size` of 88;"):
        hf.check_vocab(folder, tokenizer, dataclasses.replace(config, vocab_size=88))


def test_token_ids_may_have_gaps(references: dict) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"a": 0, "b": 95, "<unk>": 2}, unk_token="<unk>")
    sparse = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    config = hf.read_config(references["qwen3"].folder)
    hf.check_vocab("here", sparse, config)
    with pytest.raises(ValueError, match=r"`here`.* 96 tokens .* 95;"):
        hf.check_vocab("here", sparse, dataclasses.replace(config, vocab_size=95))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: None, None),
        (lambda t: t.add_tokens(["<think>"]), "token 89 is absent .*'<think>' in the teacher"),
        (lambda t: setattr(t, "eos_token", "word1"), "special token eos_token is '<.im_end.>' in"),
        (lambda t: setattr(t, "chat_template", "{{ 1 }}"), "the chat template is .*'{{ 1 }}' in"),
    ],
)
def test_student_and_teacher_must_have_the_same_tokenizer(
    tokenizer: Any, tmp_path: Path, change: Callable[[Any], None], text: str | None
) -> None:
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    tokenizer.save_pretrained(student)
    other = hf.load_tokenizer(student)
    change(other)
    other.save_pretrained(teacher)
    if text is None:
        hf.check_same_tokenizer(student, teacher)
        return
    with pytest.raises(ValueError, match=f"student `{student}` and teacher `{teacher}`.*{text}"):
        hf.check_same_tokenizer(student, teacher)
