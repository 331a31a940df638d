"""Whole runs by the command: what they leave, and that no interruption changes how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from opd_jax import train
from opd_jax.config import build as experiment
from opd_jax.config import differences, load, read_stored
from opd_jax.experience import environments
from opd_jax.experience.source import make_source
from opd_jax.learner.train_state import abstract_state, init_state
from opd_jax.learner.train_step import make_train_step
from opd_jax.report.stopwatch import Stopwatch
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIGS = Path(__file__).parents[1] / "configs"
PAIR = experiment.EMBEDDED
UPDATES = 4

# Nothing but training: what a run that is to be interrupted evaluates tells nothing more.
NO_EVALUATION = ("--config.eval.who=", "--config.eval.tasks=1")


def one_device() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def files_of(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def saved(workdir: Path) -> tuple[int, list[tuple], dict]:
    """Step of the newest checkpoint, every array of it as raw bytes, and its cursors."""
    config = read_stored(workdir / "config.json")
    student, _ = experiment.load_pair(config, one_device())
    abstract = abstract_state(student.params, experiment.make_optimizer(config))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    step, state, meta = checkpoints.restore_latest(abstract)
    checkpoints.close()
    state = state.replace(rng=jax.random.key_data(state.rng))
    arrays = [
        (jax.tree_util.keystr(path), x.dtype, x.shape, np.asarray(x).tobytes())
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    ]
    return step, arrays, meta


def assert_ended_alike(workdir: Path, uninterrupted: Path) -> None:
    assert saved(workdir) == saved(uninterrupted)
    ours, theirs = lines_of(workdir), lines_of(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        timed = [name for name in one if name.startswith(("seconds/", "tokens_per_s/"))]
        assert {n: v for n, v in one.items() if n not in timed} == {
            n: v for n, v in other.items() if n not in timed
        }


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line a command ended with."""
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# --- What a run leaves


def test_the_config_is_stored(trained: Any) -> None:
    config = load(trained.flags[0].removeprefix("--config="), trained.flags[1:])
    assert differences(read_stored(trained.workdir / "config.json"), config, ignore=()) == []


def test_the_tasks_are_stored_and_told(trained: Any) -> None:
    config = read_stored(trained.workdir / "config.json")
    env = environments.make_env(config.env)
    stored = json.loads((trained.workdir / "tasks.json").read_text())
    assert stored == {s: env.digest(s) for s in ("train", "valid_seen", "valid_unseen")}
    for split, digest in stored.items():
        assert f"\n{split}: {env.size(split)} tasks, digest {digest}\n" in "\n" + trained.stdout


BY_TURN = ("divergence", "raw_weight", "confidence", "turns", "skip", "weak", "strong", "det_fail")


def test_every_update_has_its_line_with_everything_measured(trained: Any) -> None:
    lines = lines_of(trained.workdir)
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    turns = read_stored(trained.workdir / "config.json").env.max_turns
    for line in lines:
        numbers = (
            *("loss", "divergence", "z", "raw_weight", "active_tokens", "confidence"),
            *("student_entropy", "teacher_entropy", "grad_norm", "update_norm", "logprob_error"),
            *("verdict/skip", "verdict/weak", "verdict/strong", "verdict/det_fail"),
            *("batch/success", "batch/score", "batch/turns", "batch/repeated", "batch/failed"),
            *("tokens/sampled", "tokens/sequence", "tokens/student", "judge/asked"),
            *("tokens_per_s/rollout", "tokens_per_s/update"),
            *("seconds/rollout", "seconds/judge", "seconds/update", "seconds/compile"),
        )
        assert all(isinstance(line[name], float) for name in numbers)
        for name in BY_TURN:
            values = line[f"by_turn/{name}"]
            assert len(values) == turns
            assert isinstance(values[0], float)


def test_the_figures_of_a_line_fit_together(trained: Any) -> None:
    for line in lines_of(trained.workdir):
        verdicts = [line[f"verdict/{name}"] for name in ("skip", "weak", "strong", "det_fail")]
        assert sum(verdicts) == pytest.approx(1)
        ends = [share for name, share in line.items() if name.startswith("end/")]
        assert sum(ends) == pytest.approx(1)
        for share in (*verdicts, line["active_tokens"], line["confidence"], line["batch/success"]):
            assert 0 <= share <= 1
        assert line["verdict/det_fail"] == line["batch/failed"]
        # Every sampled token is trained on: none is lost between rollout and loss.
        assert line["tokens/student"] == line["tokens/sampled"] < line["tokens/sequence"]
        # The tokens that are scored are the ones that were sampled, by the same model.
        assert line["logprob_error"] < 1e-4
        # Turns weigh by Z so that the mean weight is one (or all were skipped).
        mean_weight = line["z"] * line["raw_weight"]
        assert mean_weight == pytest.approx(1, abs=1e-4) or line["raw_weight"] == 0
        assert sum(t or 0 for t in line["by_turn/turns"]) == 4 * line["batch/turns"]


def test_checkpoints_are_those_that_were_asked_for(trained: Any) -> None:
    assert sorted(int(p.name) for p in (trained.workdir / "checkpoints").iterdir()) == [2, 4]
    step, _, meta = saved(trained.workdir)
    assert (step, meta) == (UPDATES, {"cursor": [4 * UPDATES, 0]})


def test_training_moved_the_student(trained: Any) -> None:
    _, arrays, _ = saved(trained.workdir)
    student, _ = experiment.load_pair(read_stored(trained.workdir / "config.json"), one_device())
    after = {name: raw for name, _, _, raw in arrays if name.startswith(".params")}
    before = {
        ".params" + jax.tree_util.keystr(path): np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(student.params)
    }
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)


def test_events_hold_the_updates(trained: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (trained.workdir / "events").iterdir()
    raw, found = file.read_bytes(), {}
    while raw:  # a record: length (8), its checksum (4), data, checksum of the data (4)
        length = int.from_bytes(raw[:8], "little")
        event = Event.FromString(raw[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
        raw = raw[12 + length + 4 :]
    losses = {line["step"]: line["loss"] for line in lines_of(trained.workdir)}
    assert found["loss"] == pytest.approx(losses)
    assert {"z", "by_turn/divergence/0", "verdict/skip", "tokens_per_s/update"} <= found.keys()


def test_the_summary_has_everybody_on_every_split(trained: Any) -> None:
    summary = json.loads((trained.workdir / "summary.json").read_text())
    assert summary.keys() == {"eval"}
    assert summary["eval"].keys() == {"before", "after", "teacher", "expert", "random"}
    for who, splits in summary["eval"].items():
        assert splits.keys() == {"valid_seen", "valid_unseen"}, who
        for figures in splits.values():
            assert {"success", "score", "turns", "repeated", "n", "ci95"} <= figures.keys()
            low, high = figures["ci95"]
            assert 0 <= low <= figures["success"] <= high <= 1
            assert figures["n"] == 4
            assert 1 <= figures["turns"] <= 3


def test_a_person_is_told_how_it_goes(trained: Any) -> None:
    for step in range(1, UPDATES + 1):
        assert re.search(rf"^{step}/{UPDATES}  loss .* tok/s  .* left$", trained.stdout, re.M)
    for who in ("before", "teacher", "expert", "random"):
        assert re.search(rf"^{who}: success valid_seen", trained.stdout, re.M)
    table = [line for line in trained.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5 * 2


# --- Started again


@pytest.fixture
def copy(trained: Any, tmp_path: Path) -> Path:
    """A workdir that looks as `trained` left its own."""
    return Path(shutil.copytree(trained.workdir, tmp_path / "copy"))


def test_a_finished_run_trains_no_more_and_says_the_same(
    trained: Any, copy: Path, command: Callable
) -> None:
    checkpoints = files_of(copy / "checkpoints")
    summary, lines = ((copy / name).read_text() for name in ("summary.json", "metrics.jsonl"))
    done = command("train", *trained.flags, f"--workdir={copy}")
    assert done.returncode == 0, done.stderr
    assert f"resuming after update {UPDATES} of {UPDATES}" in done.stdout
    assert "tok/s" not in done.stdout
    assert files_of(copy / "checkpoints") == checkpoints
    assert (copy / "metrics.jsonl").read_text() == lines
    assert json.loads((copy / "summary.json").read_text()) == json.loads(summary)
    tables = [
        [line for line in text.splitlines() if line.startswith("|")]
        for text in (done.stdout, trained.stdout)
    ]
    assert tables[0] == tables[1]


def test_a_run_is_finished_when_it_is_evaluated_after_the_last_update(
    trained: Any, tmp_path: Path, is_finished: Callable
) -> None:
    flags = (*trained.flags, f"--workdir={trained.workdir}")
    assert is_finished(*flags)
    assert not is_finished(*flags, f"--config.train.updates={UPDATES + 1}")
    assert not is_finished(*trained.flags, f"--workdir={tmp_path}")  # it never started


def test_figures_of_a_finished_run_are_kept_unless_asked_for_otherwise(
    trained: Any, copy: Path, command: Callable
) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    marked = json.loads(json.dumps(summary))
    for splits in marked["eval"].values():
        splits["valid_seen"]["turns"] = 1234.0
    (copy / "summary.json").write_text(json.dumps(marked))
    done = command("train", *trained.flags, f"--workdir={copy}")
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "summary.json").read_text()) == marked
    done = command("train", *trained.flags, "--config.eval.seed=7", f"--workdir={copy}")
    assert done.returncode == 0, done.stderr
    again = json.loads((copy / "summary.json").read_text())["eval"]
    marked = {who for who, r in again.items() if r["valid_seen"]["turns"] == 1234.0}
    assert marked == {"expert", "random"}  # a player's episodes depend on no seed of ours
    assert again["after"]["valid_seen"]["seed"] == 7


# Ends its own process with SIGKILL at the first `EVENT` (an audit event of Python) on a path that
# matches: a moment inside a save, met every time, that no waiting from outside would meet.
KILLED_AT = """
import os, re, signal, sys
event, pattern, *words = sys.argv[1:]
def watch(name, details):
    if name == event and any(isinstance(d, str) and re.search(pattern, d) for d in details):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from opd_jax.train import main
main(words)
"""


# Sends itself SIGTERM as it writes which tasks it plays, which is before anything is evaluated.
TERMINATED = """
import os, signal, sys
def watch(name, details):
    if name == "open" and str(details[0]).endswith("tasks.json.tmp"):
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(watch)
from opd_jax.train import main
main(sys.argv[1:])
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.005)
    assert condition(), process.communicate()[1]


def has_lines(workdir: Path, count: int) -> Callable[[], bool]:
    path = workdir / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def test_killed_at_any_moment_it_ends_with_the_same_bits(
    trained: Any, tmp_path: Path, start: Callable, command: Callable
) -> None:
    workdir = tmp_path / "killed"
    flags = (*trained.flags, *NO_EVALUATION, f"--workdir={workdir}")
    checkpoints = workdir / "checkpoints"

    def steps() -> set[str]:
        return {path.name for path in checkpoints.iterdir() if path.name.isdigit()}

    # With no checkpoint yet, after the first line.
    process = start("-m", "opd_jax.train", *flags)
    wait_for(has_lines(workdir, 1), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    # As the first save is about to be committed.
    process = start("-c", KILLED_AT, "os.rename", r"checkpoints/2\..*tmp.*/?$", *flags)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert steps() == set()

    # In the second save, with one checkpoint to go on from.
    process = start("-c", KILLED_AT, "os.rename", r"checkpoints/4\..*tmp.*/?$", *flags)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert steps() == {"2"}
    assert len(lines_of(workdir)) == UPDATES

    done = command("train", *flags)
    assert done.returncode == 0, done.stderr
    assert "resuming after update 2" in done.stdout
    assert_ended_alike(workdir, trained.workdir)


def stopped(start: Callable, flags: tuple[str, ...], workdir: Path) -> str:
    """Starts a run, sends SIGTERM in its first update, returns what it printed."""
    # A checkpoint is there only because of the signal.
    seldom = "--config.checkpoint.every=1000"
    process = start("-m", "opd_jax.train", *flags, seldom, f"--workdir={workdir}")
    wait_for((workdir / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return output


@pytest.mark.parametrize("run", ["trained", "built"])
def test_stopped_by_sigterm_it_ends_with_the_same_bits(
    run: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    start: Callable,
    command: Callable,
    is_finished: Callable,
) -> None:
    uninterrupted = request.getfixturevalue(run)
    workdir = tmp_path / "stopped"
    flags = (*uninterrupted.flags, *NO_EVALUATION)
    output = stopped(start, flags, workdir)
    at = int(re.search(r"stopped by SIGTERM; update (\d+) is saved", output)[1])
    assert [int(path.name) for path in (workdir / "checkpoints").iterdir()] == [at]
    assert [line["step"] for line in lines_of(workdir)] == list(range(1, at + 1))
    assert not (workdir / "summary.json").exists()
    assert not is_finished(*flags, f"--workdir={workdir}")

    done = command("train", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"resuming after update {at} of {UPDATES}" in done.stdout
    assert_ended_alike(workdir, uninterrupted.workdir)


def test_sigterm_ends_an_evaluation_after_its_split(
    trained: Any, copy: Path, start: Callable, command: Callable
) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").unlink()
    # The signal has come before the first split is done.
    process = start("-c", TERMINATED, *trained.flags, f"--workdir={copy}")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM" in output
    assert "success" not in output
    assert not (copy / "summary.json").exists()
    done = command("train", *trained.flags, f"--workdir={copy}")
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "summary.json").read_text()) == summary


# --- Building the pair


def test_the_config_of_the_pair_trains_a_teacher(built: Any) -> None:
    lines = lines_of(built.workdir)
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    for line in lines:
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)
        assert line["z"] == line["raw_weight"] == 1
        assert line["tokens_per_s/update"] > 0
        # There is no teacher, no confidence and no rollout: nothing is said of them.
        for name in ("teacher_entropy", "confidence", "by_turn/confidence", "logprob_error"):
            assert name not in line
        assert not any(name.startswith(("batch/", "judge/", "verdict/")) for name in line)
    # From random parameters: about even over the vocabulary.
    vocabulary = len(
        experiment.load_model("embedded:student", dtype="float32", mesh=one_device()).tokenizer
    )
    assert lines[0]["loss"] == pytest.approx(np.log(vocabulary), rel=0.2)
    # That it learns shows in a longer run, which test_pair makes.
    assert all(line["update_norm"] > 0 for line in lines)
    summary = json.loads((built.workdir / "summary.json").read_text())["eval"]
    assert summary.keys() == {"expert", "after"}
    assert summary["expert"]["valid_seen"]["n"] == 4


def test_the_config_of_the_pair_trains_a_student(
    tmp_path: Path, small: tuple, command: Callable
) -> None:
    flags = (
        "--config=configs/household_pair.py:runlocal,who=student",
        *small,
        *NO_EVALUATION,
        "--config.train.updates=1",
        "--config.data.window=4",
        "--config.new_model.num_layers=1",
    )
    done = command("train", *flags, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (line,) = lines_of(tmp_path)
    assert line["loss"] > 0
    step, _, meta = saved(tmp_path)
    assert (step, meta) == (1, {"cursor": [0, 1]})


# --- Many devices


@pytest.fixture(scope="module")
def on_eight(small: tuple[str, ...]) -> FrozenConfigDict:
    """A run on a mesh of 4 × 2 devices."""
    return load(
        str(CONFIGS / "household_pair.py:runlocal,who=student"),
        [
            *(*small, *NO_EVALUATION, "--config.eval.splits=valid_seen"),
            *("--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.eval.batch=8"),
            *("--config.data.sizes=small", "--config.data.window=8"),
            "--config.data.tokens_per_batch=1536",  # eight rows, one a device
            *("--config.new_model.d_model=32", "--config.new_model.num_layers=1"),
            *("--config.train.updates=3", "--config.checkpoint.every=1"),
        ],
    )


@pytest.fixture(scope="module")
def whole(on_eight: FrozenConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its workdir."""
    workdir = tmp_path_factory.mktemp("many") / "whole"
    handler = signal.getsignal(signal.SIGTERM)
    train.run(on_eight, workdir)
    signal.signal(signal.SIGTERM, handler)
    return workdir


def test_on_many_devices_a_continued_run_ends_with_the_same_bits(
    on_eight: FrozenConfigDict, whole: Path, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    shutil.copytree(whole, tmp_path / "continued")
    shutil.rmtree(tmp_path / "continued" / "checkpoints" / "3")
    train.run(on_eight, tmp_path / "continued")
    signal.signal(signal.SIGTERM, handler)
    assert_ended_alike(tmp_path / "continued", whole)
    # One shape of batch, one program: what an update returns is placed as what it was given.
    lines = lines_of(whole)
    assert lines[0]["seconds/compile"] > 0
    assert [line["seconds/compile"] for line in lines[1:]] == [0, 0]


def test_a_machine_with_one_device_exports_what_many_have_trained(
    on_eight: FrozenConfigDict, whole: Path, start: Callable, tmp_path: Path
) -> None:
    words = ("-m", "opd_jax.export", f"--workdir={whole}", f"--out={tmp_path / 'model'}")
    # Its accelerator may be taken, or not be there as here: it is not asked for.
    exporting = start(*words, JAX_PLATFORMS="cuda")
    _, errors = exporting.communicate()
    assert exporting.returncode == 0, errors
    here = experiment.load_student(on_eight, make_mesh(**on_eight.mesh))
    abstract = abstract_state(here.params, experiment.make_optimizer(on_eight))
    _, state, _ = Checkpoints(whole / "checkpoints", keep=2).restore_latest(abstract)
    exported = experiment.load_model(str(tmp_path / "model"), dtype="float32", mesh=one_device())
    for mine, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(exported.params), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


# --- Not finite


def poisoned(folder: Path) -> Path:
    shutil.copytree(PAIR / "student", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_a_model_that_is_nan_is_found_in_the_first_update(
    tmp_path: Path, trained: Any, command: Callable
) -> None:
    student = poisoned(tmp_path / "student")
    done = command(
        *("train", *trained.flags, *NO_EVALUATION),
        *(f"--config.student={student}", f"--workdir={tmp_path / 'run'}"),
    )
    assert "update 1" in error_of(done)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("rate", ["1e30", "1e15"])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    rate: str, tmp_path: Path, trained: Any, command: Callable
) -> None:
    flags = (
        *(*trained.flags, *NO_EVALUATION, f"--workdir={tmp_path}"),
        *(f"--config.optimizer.learning_rate={rate}", "--config.checkpoint.every=1"),
    )
    message = error_of(command("train", *flags))
    step = int(re.search(r"update (\d+)", message)[1])
    assert step == {"1e30": 1, "1e15": 2}[rate]
    if step > 1:
        newest, arrays, _ = saved(tmp_path)
        assert newest == step - 1
        floats = [np.frombuffer(raw, d) for _, d, _, raw in arrays if d == np.float32]
        assert floats
        assert all(np.isfinite(array).all() for array in floats)
    else:
        assert "`update_norm` is inf" in message
        assert not (tmp_path / "checkpoints").exists()
        # The line that the message points to.
        (line,) = lines_of(tmp_path)
        assert line["update_norm"] is None
        assert isinstance(line["loss"], float)


# --- Objectives, in this process and without the command

OBJECTIVES = {
    "sage": (),
    "opd": (),
    "sft": (),
    "sage_without_intervention": (),
    "sage_without_confidence": (),
    "sage_without_normalizer": (),
    "sampled_reverse_kl": ("--config.objective.divergence=sampled_reverse_kl",),
    "forward_kl": ("--config.objective.divergence=forward_kl",),
    "jsd": ("--config.objective.divergence=jsd",),
    "trajectory": ("--config.objective.scope=trajectory",),
}


def argument(name: str) -> str:
    if name in ("opd", "sft"):
        return f"method={name}"
    return f"ablate={name.removeprefix('sage_without_')}" if "_without_" in name else ""


def first_update(config: FrozenConfigDict) -> dict[str, Any]:
    """The line of the first update of a run."""
    mesh = one_device()
    student, teacher = experiment.load_pair(config, mesh)
    optimizer = experiment.make_optimizer(config)
    step = make_train_step(
        student=student.config,
        teacher=teacher.config,
        objective=experiment.make_objective(config.objective),
        optimizer=optimizer,
        placement=None,
        micro_batches=config.train.micro_batches,
        batch_rows=None,
        dtype=jnp.dtype("float32"),
        query_chunk=config.train.query_chunk,
        loss_chunk=config.train.loss_chunk,
        remat=config.train.remat,
    )
    source = make_source(config, student=student, teacher=teacher, cursor=[0, 0])
    state = init_state(student.params, optimizer, seed=config.seed)
    clock = Stopwatch()
    drawn = source.draw(state, clock)
    state, raw = step(state, teacher.params, drawn.batch)
    assert int(state.step) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    return train.update_metrics(jax.device_get(raw), drawn.metrics, clock)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str, small: tuple[str, ...]) -> None:
    path = f"{CONFIGS / 'quickstart.py'}:runlocal,{argument(name)}"
    config = load(path, [*small, *OBJECTIVES[name]])
    line = first_update(config)
    assert np.isfinite(line["loss"])
    assert line["grad_norm"] > 0
    assert line["update_norm"] > 0
    if name in ("opd", "sft"):
        assert line["z"] == line["raw_weight"] == line["active_tokens"] == 1
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)
        assert "verdict/skip" not in line
    if name == "sft":
        assert line["teacher_entropy"] == 0
    else:
        assert line["teacher_entropy"] > 0
        assert line["logprob_error"] < 1e-4
    if name in ("sage", "sage_without_intervention", "sage_without_confidence"):
        assert line["z"] * line["raw_weight"] == pytest.approx(1, abs=1e-4)
    if name == "sage_without_intervention":
        assert "verdict/skip" not in line
        assert line["active_tokens"] == 1
    if name == "sage_without_confidence":
        assert line["confidence"] == 1
    if name == "sage_without_normalizer":
        assert line["z"] == 1
        assert 0 < line["raw_weight"] < 1
        assert 0 <= line["loss"] < line["divergence"]
    if name == "jsd":
        assert 0 <= line["divergence"] <= np.log(2)


def test_two_halves_of_a_batch_are_the_batch(small: tuple[str, ...]) -> None:
    path = f"{CONFIGS / 'quickstart.py'}:runlocal"
    whole = load(path, small)
    halves = load(path, [*small, "--config.train.micro_batches=2"])
    one, other = first_update(whole), first_update(halves)
    for name in ("loss", "z", "grad_norm", "divergence", "update_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-5), name


# --- Mistakes

# One row a device of this process, so that what is wrong is nothing else.
EIGHT = ("--config.mesh.data=8", "--config.rollout.batch=8", "--config.eval.batch=8")


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What is compiled, as it is compiled."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, compilations: list[str]
) -> Iterator[Callable[..., str]]:
    """Runs the command in this process; returns its error, which came before any compilation."""
    handler = signal.getsignal(signal.SIGTERM)

    def refuse(*flags: str, workdir: Path = tmp_path / "new") -> str:
        words = [flag for flag in flags if flag.startswith("--config=")]
        words = words or ["--config=" + str(CONFIGS / "quickstart.py") + ":runlocal"]
        words += [*EIGHT, *(flag for flag in flags if flag not in words)]
        with pytest.raises(SystemExit) as stop:
            train.main([*words, f"--workdir={workdir}"])
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
        assert compilations == []
        assert not (tmp_path / "new").exists()
        return printed.err

    yield refuse
    signal.signal(signal.SIGTERM, handler)


def test_the_listener_hears_compilations(compilations: list[str]) -> None:
    jax.jit(lambda x: x * 3.5 + len(compilations))(np.ones(7))
    assert compilations


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.train.updatess=3"], ["`train.updatess`", "`train.updates`"]),
        (["--config.train.updates=three"], ["`train.updates`", "int", "three"]),
        (["--config.train.updates=0"], ["`train.updates`", "at least 1", "0"]),
        (["--config.checkpoint.keep=0"], ["`checkpoint.keep`", "at least 1"]),
        (["--config.mesh.data=0"], ["`mesh.data`", "at least 1"]),
        (["--config.mesh.data=3", "--config.rollout.batch=9"], ["`eval.batch`", "`mesh.data`"]),
        (
            [f"--config.{name}=16" for name in ("mesh.data", "rollout.batch", "eval.batch")],
            ["`mesh.data`", "16 × 1 × 1", "8 devices"],
        ),
        (["--workdr=x"], ["`--workdr`", "`workdir`"]),
        (["--config=configs/quickstrat.py"], ["quickstrat.py", "quickstart.py"]),
        (
            ["--config.train.micro_batches=3"],
            ["`rollout.batch` = 8", "`train.micro_batches` = 3", "divisor"],
        ),
        (
            ["--config.rollout.turn_tokens=384"],
            ["`rollout.turn_tokens` = 384", "`rollout.context_tokens` = 384"],
        ),
        (["--config.rollout.extend_widths=64,16"], ["`rollout.extend_widths`", "ascending"]),
        (["--config.data.split=tests"], ["`data.split`", "valid_unseen", "'tests'"]),
        (["--config.eval.splits=train,tests"], ["`eval.splits`", "valid_unseen", "'tests'"]),
        (["--config.eval.splits="], ["`eval.splits`", "at least one"]),
        (["--config.eval.who=nobody"], ["`eval.who`", "expert", "'nobody'"]),
        (["--config.dtype=float31"], ["`dtype`", "bfloat16", "'float31'"]),
        (["--config.data.source=books"], ["`data.source`", "on_policy", "'books'"]),
        (["--config.objective.divergence=l2"], ["`objective.divergence`", "reverse_kl", "'l2'"]),
        (["--config.objective.normalize=l2"], ["`objective.normalize`", "all_tokens", "'l2'"]),
        (["--config.objective.scope=token"], ["`objective.scope`", "trajectory", "'token'"]),
        (["--config.objective.beta=2"], ["`objective.beta`", "0..1", "2"]),
        (["--config.judge.decode=vote"], ["`judge.decode`", "constrained", "'vote'"]),
        (["--config.judge.context=all"], ["`judge.context`", "table9", "'all'"]),
        (["--config.optimizer.schedule=step"], ["`optimizer.schedule`", "cosine", "'step'"]),
        (["--config.env.size=vast"], ["`size`", "small", "'vast'"]),
        (["--config.env.name=office"], ["`env.name`", "household", "'office'"]),
        (["--config.env.name=alfworld"], ["`env.size`", "`env.data`", "'alfworld'"]),
        (["--config.teacher="], ["`teacher` is empty"]),
        (["--config.student=new"], ["`student` = 'new'", "teacher"]),
        (["--config.objective.divergence=cross_entropy"], ["cross_entropy", "`objective."]),
        (["--config.data.source=players"], ["`data.source`", "cross_entropy"]),
        (["--config.student=some/where"], ["`some/where`", "does not exist"]),
        (["--config.compare.methods=sage"], ["`compare.seeds`", "at least one"]),
        (
            ["--config.compare.methods=sage,ppo", "--config.compare.seeds=0"],
            ["`compare.methods`", "sft", "'ppo'"],
        ),
    ],
    ids=lambda value: value[0] if str(value[0]).startswith("--") else "",
)
def test_a_mistake_is_one_line_that_names_it(
    flags: list[str], words: list[str], refused: Callable
) -> None:
    message = refused(*flags)
    assert all(word in message for word in words), message


def test_an_unknown_argument_is_named(refused: Callable) -> None:
    message = refused(f"--config={CONFIGS / 'quickstart.py'}:runlocal,metod=opd")
    assert "`metod`" in message
    assert "`method`" in message


def test_a_teacher_nobody_has_cannot_be_evaluated(refused: Callable) -> None:
    pair = f"--config={CONFIGS / 'household_pair.py'}:runlocal"
    assert "`eval.who` names the teacher" in refused(pair, "--config.eval.who=expert,teacher")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_the_weights(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_broken_settings(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (without_weights, "safetensors"),
        (with_half_the_weights, "model.safetensors"),
        (without_a_tensor, "model.norm.weight"),
        (with_broken_settings, "config.json"),
        (without_a_tokenizer, "tokenizer"),
    ],
)
def test_a_model_folder_that_cannot_be_read_is_named(
    who: str, damage: Callable, word: str, tmp_path: Path, refused: Callable
) -> None:
    folder = Path(shutil.copytree(PAIR / who, tmp_path / who))
    damage(folder)
    message = refused(f"--config.{who}={folder}")
    assert str(folder) in message
    assert word in message


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path, refused: Callable) -> None:
    folder = Path(shutil.copytree(PAIR / "teacher", tmp_path / "other"))
    settings = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    message = refused(f"--config.teacher={folder}")
    assert str(folder) in message
    assert "same tokenizer" in message
    assert repr(one) in message


def test_a_mistake_that_is_corrected_is_forgotten(tmp_path: Path, refused: Callable) -> None:
    # Whatever is refused leaves no config.json that the corrected command would be held to.
    workdir = tmp_path / "reused"
    assert "does not exist" in refused("--config.student=some/where", workdir=workdir)
    message = refused("--config.teacher=some/where", workdir=workdir)
    assert "some/where" in message
    assert "another config" not in message


def test_a_run_is_not_continued_under_another_config(
    trained: Any, copy: Path, refused: Callable
) -> None:
    before = files_of(copy)
    message = refused(*trained.flags, "--config.mesh.data=1", "--config.seed=5", workdir=copy)
    assert "seed: 0 -> 5" in message
    assert str(copy) in message
    assert files_of(copy) == before


def test_a_run_is_not_continued_on_other_tasks(trained: Any, copy: Path, command: Callable) -> None:
    digests = json.loads((copy / "tasks.json").read_text())
    (copy / "tasks.json").write_text(json.dumps(digests | {"train": "another-0123"}))
    before = files_of(copy)
    message = error_of(command("train", *trained.flags, f"--workdir={copy}"))
    for word in ("`data.split`", "another-0123", digests["train"], str(copy)):
        assert word in message
    (copy / "tasks.json").write_text("[]")
    message = error_of(command("train", *trained.flags, f"--workdir={copy}"))
    assert str(copy / "tasks.json") in message
    assert files_of(copy) == before | {"tasks.json": b"[]"}


def test_a_stored_config_that_cannot_be_read_is_named(copy: Path, refused: Callable) -> None:
    (copy / "config.json").write_text("{")
    assert str(copy / "config.json") in refused(workdir=copy)


def test_a_checkpoint_that_cannot_be_read_is_named_and_nothing_is_lost(
    trained: Any, copy: Path, command: Callable
) -> None:
    for file in (copy / "checkpoints" / str(UPDATES)).rglob("d/*"):
        os.truncate(file, 8)
    before = files_of(copy)
    message = error_of(command("train", *trained.flags, f"--workdir={copy}"))
    assert str(copy / "checkpoints" / str(UPDATES)) in message
    assert str(copy / "checkpoints" / "2") in message, "the older one should be offered"
    assert files_of(copy) == before
