"""Exports: what they are made of, and that every `transformers` since 4.51 opens them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from settings import one_device

from opd_jax import export, hf, model
from opd_jax.config import build, load, to_json
from opd_jax.config.models import LoadedModel, load_model, load_student
from opd_jax.config.references import EMBEDDED
from opd_jax.config.settings import read_settings
from opd_jax.model.lora import with_adapters
from opd_jax.runtime.checkpoint import Checkpoints

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "open_export.py"
QUESTION = "You are in a room. Your task is to: put apple in fridge."


def save_run(workdir: Path, *changes: str) -> tuple[model.Params, model.Params]:
    """Writes a run of the quickstart as its third update left it.

    Returns what was trained, drawn at random, and the student of the run that it makes.
    """
    config = load("quickstart", [f"--config.{change}" for change in changes])
    settings = read_settings(config)
    student = load_student(settings, one_device())
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.02, x.dtype),
        build.initial_params(student, settings, one_device()),
    )
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(config))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(3, {"params": trained}, {})
    checkpoints.close()
    lora = build.adapters(settings)
    return trained, with_adapters(student.params if lora else None, trained, lora)


def copy_model(who: str, folder: Path, *, dtype: str = "float32", padding: int = 0) -> Path:
    """A model of the pair in another dtype, with `padding` more rows in its embedding."""
    shutil.copytree(EMBEDDED / who, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": dtype, "vocab_size": config["vocab_size"] + padding}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.pad(embed, ((0, padding), (0, 0)))
    low = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    save_file(low, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("rank", [0, 4])
def test_an_export_needs_the_run_and_the_student_alone(rank: int, tmp_path: Path) -> None:
    teacher = copy_model("teacher", tmp_path / "teacher")
    student = copy_model("student", tmp_path / "student", padding=10)
    (student / "LICENSE").write_text("as you like")
    changes = (f"teacher={teacher}", f"student={student}", f"lora.rank={rank}")
    _, whole = save_run(tmp_path / "run", *changes)
    shutil.rmtree(teacher)
    assert export.export(tmp_path / "run", tmp_path / "out") == 3
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    # Training cut the padding, adapters did not touch it.
    sizes = hf.read_config(tmp_path / "out")
    assert sizes.vocab_size == (675 if rank else 665)
    got = hf.load_params(
        tmp_path / "out", dataclasses.replace(sizes, vocab_size=665), dtype=jnp.float32
    )
    tokens = np.arange(24, dtype=np.int32)[None]

    def hidden(params: model.Params) -> jax.Array:
        return model.forward(params, tokens, config=sizes, query_chunk=64, remat="none")

    np.testing.assert_allclose(hidden(got), hidden(whole), rtol=0, atol=1e-5)


def test_a_student_that_lies_elsewhere_now_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    there, run = copy_model("student", tmp_path / "student"), tmp_path / "run"
    monkeypatch.chdir(tmp_path)  # the config names it relative to this folder
    trained, _ = save_run(run, "student=student")
    (run / "models.json").write_text(json.dumps({"student": hf.fingerprint(there)}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = [f"--workdir={run}", f"--out={tmp_path / 'out'}"]
    other = copy_model("teacher", tmp_path / "other")
    for more, said in (
        ([], "`student` does not exist; give where it lies now as `--student=DIR`"),
        ([f"--student={other}"], "is not the model that the run in"),
    ):
        with pytest.raises(SystemExit):
            export.main([*words, *more])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    export.main([*words, f"--student={there}"])
    assert "update 3 of" in capsys.readouterr().out
    got = hf.load_params(tmp_path / "out", hf.read_config(tmp_path / "out"), dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, got, trained)


def test_an_export_has_the_dtype_of_the_students_folder_or_the_one_asked_for(
    tmp_path: Path, in_process: Callable
) -> None:
    student = copy_model("student", tmp_path / "student", dtype="bfloat16")
    trained, _ = save_run(tmp_path / "run", f"student={student}")
    for name, flags in {"bfloat16": (), "float32": ("--dtype=float32",)}.items():
        out = tmp_path / name
        in_process(export.main, f"--workdir={tmp_path / 'run'}", f"--out={out}", *flags)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == name
        assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {jnp.dtype(name)}
        got = hf.load_params(out, hf.read_config(out), dtype=jnp.dtype(name))
        want = jax.tree.map(lambda x, name=name: x.astype(name), trained)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    # A dtype that is asked for needs none of the folder.
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "torch_dtype": "auto"}))
    with pytest.raises(ValueError, match="got 'auto'"):
        export.export(tmp_path / "run", tmp_path / "out")
    export.export(tmp_path / "run", tmp_path / "out", dtype="bfloat16")


def test_an_export_ends_a_turn_where_the_student_does(tmp_path: Path) -> None:
    student = copy_model("student", tmp_path / "student")
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 10]}))
    save_run(tmp_path / "run", f"student={student}")
    export.export(tmp_path / "run", tmp_path / "out")
    for folder in (student, tmp_path / "out"):
        loaded = load_model(str(folder), dtype="float32", mesh=one_device())
        assert loaded.chat.stop_ids == (3, 10)


def test_the_example_opens_an_export_which_answers_as_here(tmp_path: Path) -> None:
    out, episodes = tmp_path / "out", tmp_path / "episodes.jsonl"
    save_run(tmp_path / "run")
    export.export(tmp_path / "run", out)
    said = [("system", "Reply."), ("user", QUESTION), ("assistant", "Action: look")]
    messages = [{"role": role, "content": content} for role, content in said]
    episodes.write_text(json.dumps({"messages": messages}) + "\n")
    words = [sys.executable, EXAMPLE, out, episodes]
    answer = subprocess.run(words, check=True, capture_output=True, text=True).stdout

    ours = load_model(str(out), dtype="float32", mesh=one_device())
    tokens = list(ours.chat.first("Reply.", QUESTION))
    begin, row = len(tokens), np.zeros((1, 128), np.int32)
    while len(tokens) < begin + 64 and tokens[-1] not in ours.chat.stop_ids:
        row[0, : len(tokens)] = tokens
        hidden = model.forward(ours.params, row, config=ours.config, query_chunk=128, remat="none")
        tokens.append(int(jnp.argmax(hidden[0, len(tokens) - 1] @ model.head(ours.params))))
    want = ours.tokenizer.decode(tokens[begin:], skip_special_tokens=True)
    assert (answer, want.count("\n")) == (want + "\n", 1)  # thought and action


# --- Versions of transformers, each in an environment of its own

TOKENS = list(range(3, 60, 2))

OPEN = """
import json, sys, torch, transformers

question, tokens, *folders = map(json.loads, sys.argv[1:])
for folder, tokenizer_class in folders:
    tokenizer = getattr(transformers, tokenizer_class).from_pretrained(folder)
    asked = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    opened, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        logits = opened.eval()(torch.tensor([tokens])).logits[0]
    said = {
        "version": transformers.__version__,
        "prompt": tokenizer.encode(text, add_special_tokens=False),
        "special": sorted(tokenizer.all_special_ids),
        "end": opened.generation_config.eos_token_id,
        "problems": [name for name, found in problems.items() if found],
        "logits": logits.tolist(),
    }
    print("said", json.dumps(said))
"""


@pytest.fixture(scope="module", params=["==4.51.3", ">=5,<6"])
def other_python(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A Python with another version of `transformers`, which pip installs; and that version."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=True)
    # What is not installed there comes from here: torch is large.
    paths = {"base": str(place), "platbase": str(place)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
    python = place / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--upgrade", f"transformers{request.param}")
    subprocess.run(pip, check=True, capture_output=True)
    return python, request.param.strip("=>")[:1]


@pytest.mark.slow
def test_other_versions_open_exports_and_the_pair(
    other_python: tuple[Path, str], tmp_path: Path, references: dict, tokenizer: Any
) -> None:
    folders = {EMBEDDED / who: "AutoTokenizer" for who in ("student", "teacher")}
    # Of a student as transformers 5 writes it, with two tokens that end a turn.
    student = copy_model("student", tmp_path / "student")
    hf.load_tokenizer(student).save_pretrained(student)
    written = json.loads((student / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "TokenizersBackend"
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 10]}))
    for rank in (0, 4):
        run, out = tmp_path / f"run{rank}", tmp_path / f"out{rank}"
        save_run(run, f"student={student}", f"lora.rank={rank}")
        export.export(run, out)
        folders[out] = "AutoTokenizer"
    # Every architecture. For Qwen2 the AutoTokenizer of transformers 5 rebuilds a BPE from a file
    # that says otherwise.
    for name, reference in references.items():
        sizes = hf.read_config(reference.folder)
        params = hf.load_params(reference.folder, sizes, dtype=jnp.float32)
        out = tmp_path / name
        hf.save_model(out, params, sizes, dtype=jnp.float32, tokenizer_from=tokenizer)
        folders[out] = "PreTrainedTokenizerFast"

    python, version = other_python
    asked = (json.dumps((str(folder), loader)) for folder, loader in folders.items())
    words = (python, "-c", OPEN, json.dumps(QUESTION), json.dumps(TOKENS), *asked)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("said ")]
    for folder, line in zip(folders, lines, strict=True):
        said = json.loads(line.removeprefix("said "))
        assert said["version"].startswith(version)
        assert_read_alike(said, load_model(str(folder), dtype="float32", mesh=one_device()))


def assert_read_alike(said: dict[str, Any], ours: LoadedModel) -> None:
    assert said["problems"] == []
    assert said["prompt"] == ours.chat.first("", QUESTION)
    assert said["special"] == sorted(ours.tokenizer.all_special_ids)
    ends = said["end"] if isinstance(said["end"], list) else [said["end"]]
    assert tuple(ends) == ours.chat.stop_ids
    hidden = model.forward(
        ours.params, np.array([TOKENS]), config=ours.config, query_chunk=64, remat="none"
    )
    want = np.asarray(hidden[0] @ model.head(ours.params))
    np.testing.assert_allclose(said["logits"], want, rtol=0, atol=1e-5 * np.abs(want).max())
