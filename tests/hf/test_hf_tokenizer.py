"""The tokenizer of a folder: loaded, and checked against a model and another tokenizer."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_jax import hf
from opd_jax.envs.household.tokenizer import build
from opd_jax.hf.tokenizer import write_for_both, write_tokenizer


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        hf.load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no tokenizer, expected one of tokenizer\.json"):
        hf.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"tokenizer in `{tmp_path}` cannot be read") as caught:
        hf.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_here_is_told_how_it_is_downloaded(tmp_path: Path) -> None:
    for load in (hf.load_tokenizer, hf.read_config):
        with pytest.raises(ValueError, match=r"`hf download Qwen/Qwen3-8B --local-dir models/Qwen"):
            load("Qwen/Qwen3-8B")
        for path in (tmp_path / "none", "models/Qwen3-8B", "tests/none"):
            with pytest.raises(ValueError, match=f"`{path}` does not exist.* OWNER/NAME"):
                load(path)


def test_nobody_is_told_that_there_is_no_torch(start: Callable) -> None:
    code = "import sys; sys.modules['torch'] = None; from opd_jax import hf; "
    loading = start("-c", code + "hf.load_tokenizer('opd_jax/pair/student')")
    assert loading.communicate() == ("", "")
    assert loading.returncode == 0


def test_decoding_cleans_up_no_spaces(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    cleans = {"clean_up_tokenization_spaces": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | cleans))
    loaded = hf.load_tokenizer(tmp_path)
    loaded.add_tokens(["don", "n't", "."])
    ids = loaded.convert_tokens_to_ids(["don", "n't", "word1", "."])
    assert loaded.decode(ids) == "don n't word1 ."
    assert loaded.decode(ids, clean_up_tokenization_spaces=True) == "donn't word1."


def test_special_tokens_are_read_whatever_the_folder_says(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": True}))
    text = "word1<|im_end|>"
    ids = hf.load_tokenizer(tmp_path).encode(text, add_special_tokens=False)
    assert ids == tokenizer.convert_tokens_to_ids(["word1", "<|im_end|>"])


def test_a_tokenizer_is_written_for_transformers_4_and_5(tmp_path: Path) -> None:
    made = build(phrases=[])
    write_tokenizer(tmp_path, made)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert not written.keys() & {"extra_special_tokens", "backend", "is_local"}
    again = hf.load_tokenizer(tmp_path)
    assert again.get_vocab() == made.get_vocab()
    assert again.all_special_ids == made.all_special_ids
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    write_for_both(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


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


def test_token_ids_may_have_gaps(references: dict, tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"a": 0, "b": 95, "<unk>": 2}, unk_token="<unk>")
    sparse = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    config = hf.read_config(references["qwen3"].folder)
    hf.check_vocab("here", sparse, config)
    assert hf.unused_ids(sparse, config) == ((1, 2), (3, 95))
    assert hf.unused_ids(tokenizer, config) == ((89, 96),)
    assert hf.unused_ids(tokenizer, dataclasses.replace(config, vocab_size=89)) == ()
    with pytest.raises(ValueError, match=r"`here`.* 96 tokens .* 95;"):
        hf.check_vocab("here", sparse, dataclasses.replace(config, vocab_size=95))


def edit_template(tokenizer: Any, before: str, after: str) -> None:
    tokenizer.chat_template = before + tokenizer.chat_template + after


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: None, None),
        (lambda t: t.add_tokens(["<think>"]), "token 89 is absent .*'<think>' in the teacher"),
        (lambda t: setattr(t, "eos_token", "word1"), None),
        (lambda t: setattr(t, "pad_token", "word1"), None),
        (lambda t: setattr(t, "unk_token", "word1"), None),
        (lambda t: t.add_special_tokens({"pad_token": "<|PAD|>"}), None),
        (lambda t: t.add_special_tokens({"eos_token": "<|END|>"}), "89 is absent .*'<.END.>' in"),
        (lambda t: t.add_special_tokens({"pad_token": "user"}), "89 is absent .*'user' in"),
        (lambda t: edit_template(t, "{# of another year #}", ""), None),
        (lambda t: edit_template(t, "", "{{ '' }}"), None),
        (lambda t: setattr(t, "chat_template", "{{ 1 }}"), "rendering of user is .* and '1' in"),
        (
            lambda t: edit_template(t, "", "{% if messages[1:] %}END{% endif %}"),
            "rendering of system, user is …'.*> ' in .* and …'.*> END' in .* student's chat",
        ),
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


def test_a_token_for_padding_needs_a_row_in_both_models(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "teacher")
    student = hf.load_tokenizer(tmp_path / "teacher")
    student.add_special_tokens({"pad_token": "<|PAD|>"})
    student.save_pretrained(tmp_path / "student")
    hf.check_same_tokenizer(tmp_path / "student", tmp_path / "teacher", rows=90)
    with pytest.raises(ValueError, match=r"token 89 is '<\|PAD\|>' in the student and absent in"):
        hf.check_same_tokenizer(tmp_path / "student", tmp_path / "teacher", rows=89)
