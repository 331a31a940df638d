"""Whole runs by the command: what they leave, and that no interruption changes how they end.

One of the three tests to read first: it shows what a run promises.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from events import scalars
from safetensors.numpy import load_file, save_file
from settings import one_device

from opd_jax import evaluate, train
from opd_jax.config import build, differences, load, read_stored
from opd_jax.config.models import load_model, load_student
from opd_jax.config.references import EMBEDDED, find_step
from opd_jax.config.settings import read_settings
from opd_jax.envs.make import make_env
from opd_jax.learner.train_state import abstract_state
from opd_jax.report import keys
from opd_jax.report.episodes import read_episodes
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import Stopped
from opd_jax.view import view

pytestmark = pytest.mark.usefixtures("compile_quickly")

UPDATES = 4

# Nothing but training: the evaluations of an interrupted run show nothing more.
NO_EVALUATION = ("--config.eval.who=", "--config.eval.tasks=1")


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def files_of(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def steps_of(workdir: Path) -> list[int]:
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def saved(workdir: Path) -> tuple[int, list[tuple], dict]:
    """Step of the newest checkpoint, every array of it as raw bytes, and its cursors."""
    settings = read_settings(read_stored(workdir / "config.json"))
    student = load_student(settings, one_device())
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    restored = checkpoints.restore_latest(abstract_state(student.params, build.optimizer(settings)))
    checkpoints.close()
    assert restored is not None
    step, state, meta = restored
    state = state.replace(rng=jax.random.key_data(state.rng))
    return step, raw_arrays(state), meta


def raw_arrays(tree: Any) -> list[tuple]:
    return [
        (jax.tree_util.keystr(path), x.dtype, x.shape, np.asarray(x).tobytes())
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


# What no two runs have alike: times and memory.
MEASURED_ANEW = ("first/", "seconds/", "tokens_per_s/", "peak_gib/", "wall_s")


def assert_ended_alike(workdir: Path, uninterrupted: Path) -> None:
    assert saved(workdir) == saved(uninterrupted)
    assert files_of(workdir / "episodes") == files_of(uninterrupted / "episodes")

    def untimed(directory: Path) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in line.items() if not name.startswith(MEASURED_ANEW)}
            for line in lines_of(directory)
        ]

    def points(directory: Path) -> list[tuple[int, str, float]]:
        """Of all event files: each start of a run writes one."""
        found = [point for file in (directory / "events").iterdir() for point in scalars(file)]
        return sorted(point for point in found if not point[1].startswith(MEASURED_ANEW))

    assert untimed(workdir) == untimed(uninterrupted)
    assert points(workdir) == points(uninterrupted)
    assert "loss" in {tag for _, tag, _ in points(workdir)}


# --- What a run leaves


def test_config_tasks_and_events_are_there(trained: Any) -> None:
    stored = read_stored(trained.workdir / "config.json")
    config = load(trained.flags[0].removeprefix("--config="), trained.flags[1:])
    assert differences(stored, config, binds=lambda field: True) == []
    env = make_env(read_settings(config).env)
    assert any((trained.workdir / "events").iterdir())
    digests = json.loads((trained.workdir / "tasks.json").read_text())
    assert digests == {s: env.digest(s) for s in ("train", "valid_seen", "valid_unseen")}
    for split, digest in digests.items():
        assert f"\n{split}: {env.size(split)} tasks, digest {digest}\n" in "\n" + trained.stdout


MEASURED = (
    *("loss", "divergence", "z", "raw_weight", "active_tokens", "confidence"),
    *("student_entropy", "teacher_entropy", "grad_norm", "update_norm", "no_step"),
    "logprob_error",
    *("verdict/skip", "verdict/weak", "verdict/strong", "verdict/det_fail"),
    *("batch/success", "batch/score", "batch/turns", "batch/repeated", "batch/failed"),
    *("tokens/sampled", "tokens/sequence", "tokens/student", "judge/asked"),
    *("tokens_per_s/rollout", "tokens_per_s/update"),
    *("seconds/rollout", "seconds/judge", "seconds/update", "seconds/compile"),
    *("padded/reading", "padded/sampling", "padded/judging", "padded/update"),
    *("peak_gib/host", "learning_rate", "wall_s"),
)
BY_TURN = ("divergence", "raw_weight", "confidence", "turns", "skip", "weak", "strong", "det_fail")


def test_every_update_has_its_line_and_its_figures_fit_together(trained: Any) -> None:
    lines = lines_of(trained.workdir)
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    for line in lines:
        assert all(isinstance(line[name], float) for name in MEASURED)
        for name in BY_TURN:
            assert len(line[f"by_turn/{name}"]) == 3  # turns
            assert isinstance(line[f"by_turn/{name}"][0], float)
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
        # Z makes the mean weight one, unless all turns were skipped.
        mean_weight = line["z"] * line["raw_weight"]
        assert mean_weight == pytest.approx(1, abs=1e-4) or line["raw_weight"] == 0
        assert sum(t or 0 for t in line["by_turn/turns"]) == 4 * line["batch/turns"]
    # Every program is known by the second update, that of the episodes of update 4 too.
    assert lines[0]["seconds/compile"] > 0
    assert [line["seconds/compile"] for line in lines[2:]] == [0, 0]


def test_the_episodes_of_a_batch_say_what_the_update_reports(trained: Any) -> None:
    student = load_student(
        read_settings(read_stored(trained.workdir / "config.json")), one_device()
    )
    updates = {line["step"]: line for line in lines_of(trained.workdir)}
    files = sorted((trained.workdir / "episodes").iterdir())
    assert [file.name for file in files] == ["update-000001.jsonl", "update-000004.jsonl"]
    for step, file in zip((1, 4), files, strict=True):
        line, episodes = updates[step], read_episodes(file)
        assert len(episodes) == 4  # the whole batch
        columns = [episode["student_tokens"] for episode in episodes]

        def joined(name: str, columns: list = columns) -> np.ndarray:
            return np.concatenate([column[name] for column in columns])

        divergence, weight = joined("divergence"), joined("weight")
        assert len(divergence) == line["tokens/student"]
        assert divergence.mean() == pytest.approx(line["divergence"], rel=1e-4)
        assert (weight * divergence).mean() == pytest.approx(line["loss"], rel=1e-4)
        assert weight.mean() == pytest.approx(line["z"] * line["raw_weight"], rel=1e-4)
        assert (weight > 0).mean() == pytest.approx(line["active_tokens"])
        turns = [turn for episode in episodes for turn in episode["turns"]]
        assert np.mean([t["confidence"] for t in turns]) == pytest.approx(line["confidence"], 1e-4)
        for name in ("skip", "weak", "strong", "det_fail"):
            share = np.mean([turn["verdict"] == name.upper() for turn in turns])
            assert share == pytest.approx(line[f"verdict/{name}"])
        assert np.mean([e["success"] for e in episodes]) == line["batch/success"]
        for episode in episodes:
            assert (episode["who"], episode["update"]) == ("train", step - 1)
            assert episode["z"] == pytest.approx(line["z"], rel=1e-4)
            tokens, own = episode["tokens"], episode["student_tokens"]
            sampled = np.array(tokens["sampled_logprob"])[own["position"]]
            np.testing.assert_allclose(own["student_logprob"], sampled, rtol=1e-4, atol=1e-4)
            said = [m["content"] for m in episode["messages"] if m["role"] == "assistant"]
            for k, (text, turn) in enumerate(zip(said, episode["turns"], strict=True)):
                ids = [i for i, of in zip(tokens["id"], tokens["turn"], strict=True) if of == k]
                places = enumerate(own["position"])
                pieces = [own["text"][n] for n, at in places if tokens["turn"][at] == k]
                assert "".join(pieces) == student.tokenizer.decode(ids)
                assert "".join(pieces).startswith(text)
                if "judge" in turn:
                    assert turn["verdict"] == max(turn["judge"], key=turn["judge"].get)
                i = {"SKIP": 0.0, "WEAK": 0.5, "STRONG": 1.0, "DET_FAIL": 1.0}[turn["verdict"]]
                assert turn["intervention"] == i


def test_the_viewer_takes_what_a_run_wrote(trained: Any, tmp_path: Path) -> None:
    files = (trained.workdir / "episodes").iterdir()
    count = sum(len(read_episodes(file)) for file in files)
    assert view(trained.workdir, tmp_path / "a.html").startswith(f"{count} episodes written")


def test_the_page_on_episodes_has_every_key_that_is_written(trained: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "episodes.md").read_text()
    shown = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[1])

    def keys(line: dict[str, Any]) -> set[str]:
        parts = {"": line, "task.": line["task"], "tokens.": line["tokens"]}
        parts |= {"student_tokens.": line["student_tokens"]}
        parts |= {f"turns.{k}.": turn for k, turn in enumerate(line["turns"])}
        return {re.sub(r"\d+", "", name + key) for name, part in parts.items() for key in part}

    lines = [
        line for file in (trained.workdir / "episodes").iterdir() for line in read_episodes(file)
    ]
    assert set.union(*map(keys, lines)) == keys(shown)


def test_the_time_to_the_first_token_and_update_is_told_once(trained: Any) -> None:
    told = re.findall(r"^first (\w+) after ([\d.]+) s$", trained.stdout, re.M)
    first, *later = lines_of(trained.workdir)
    found = {name: value for name, value in first.items() if name.startswith("first/")}
    assert [(f"first/{what}", float(seconds)) for what, seconds in told] == [
        (name, round(value, 1)) for name, value in found.items()
    ]
    assert 0 < found["first/token"] < found["first/update"]
    assert not any(name.startswith("first/") for line in later for name in line)


def test_a_run_writes_what_the_table_of_keys_defines(trained: Any) -> None:
    written = {name for line in lines_of(trained.workdir) for name in line} - {"step"}
    assert [name for name in sorted(written) if not keys.defined(name)] == []
    elsewhere = ("eval/dev/", "reliability/")
    of_rows = [
        set(keys.expanded(key.names)) for key in keys.KEYS if not key.names.startswith(elsewhere)
    ]
    assert [names for names in of_rows if written.isdisjoint(names)] == []


def test_what_adds_up_adds_up_and_the_rate_is_that_of_the_schedule(trained: Any) -> None:
    lines = lines_of(trained.workdir)
    seen = np.cumsum([line["tokens/student"] for line in lines])
    assert [line["tokens/seen"] for line in lines] == seen.tolist()
    walls = [line["wall_s"] for line in lines]
    assert lines[0]["first/update"] <= walls[0] < walls[1] < walls[2] < walls[3]
    # Four updates are all within the five of the warm-up, from a sixth of the rate on.
    expected = [1e-3 * (1 + n) / 6 for n in range(UPDATES)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)


def test_checkpoints_are_those_asked_for_and_hold_a_student_that_moved(trained: Any) -> None:
    assert steps_of(trained.workdir) == [2, 4]
    step, arrays, meta = saved(trained.workdir)
    assert (step, meta) == (UPDATES, {"cursor": [4 * UPDATES, 0]})
    settings = read_settings(read_stored(trained.workdir / "config.json"))
    before = {
        f".params{name}": raw
        for name, _, _, raw in raw_arrays(load_student(settings, one_device()).params)
    }
    after = {name: raw for name, _, _, raw in arrays if name.startswith(".params")}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)


def test_everybody_is_evaluated_on_every_split_and_a_person_is_told(trained: Any) -> None:
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
        assert who == "after" or re.search(rf"^{who}: success valid_seen", trained.stdout, re.M)
    for step in range(1, UPDATES + 1):
        assert re.search(rf"^{step}/{UPDATES}  loss .* tok/s  .* left$", trained.stdout, re.M)
    assert len(table(trained.stdout)) == 2 + 5 * 2


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def parts_traced(workdir: Path) -> list[str]:
    """Names of our own spans in a run's trace, in the order of time."""
    (file,) = (workdir / "profile").rglob("*.xplane.pb")
    events = [
        (event.start_ns, event.name)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if re.match(r"update \d+: ", event.name)
    ]
    return [name for _, name in sorted(events)]


def test_the_updates_asked_for_are_traced_and_no_bit_changes(
    trained: Any, tmp_path: Path, command: Callable
) -> None:
    flags = (*trained.flags, *NO_EVALUATION, "--profile=3:4", f"--workdir={tmp_path}")
    done = command("train", *flags)
    assert done.returncode == 0, done.stderr
    parts = {3: ("rollout", "judge", "update"), 4: ("rollout", "judge", "episodes", "update")}
    assert parts_traced(tmp_path) == [f"update {n}: {part}" for n in parts for part in parts[n]]
    assert f"the trace is in {tmp_path / 'profile'}\n" in done.stdout
    assert_ended_alike(tmp_path, trained.workdir)


# --- Started again


@pytest.fixture
def copy(trained: Any, tmp_path: Path) -> Path:
    """A workdir that looks as `trained` left its own."""
    return Path(shutil.copytree(trained.workdir, tmp_path / "copy"))


def test_a_finished_run_trains_no_more_and_keeps_its_figures(
    trained: Any, copy: Path, in_process: Callable, is_finished: Callable
) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    for splits in summary["eval"].values():
        splits["valid_seen"]["turns"] = 1234.0
    (copy / "summary.json").write_text(json.dumps(summary))
    before = files_of(copy)
    # The layout and the world may be others than those it was trained in.
    elsewhere = ("mesh.data=2", "train.micro_batches=2", "env.step_timeout_s=5", "judge.batch=8")
    for flags in ((), tuple(f"--config.{word}" for word in elsewhere)):
        printed = in_process(train.main, *trained.flags, *flags, f"--workdir={copy}")
        assert f"resuming after update {UPDATES} of {UPDATES}" in printed
        assert "tok/s" not in printed
        assert printed.count("| 1234.0 |") == 5
        after = files_of(copy)
        assert after.keys() >= before.keys()
        changed = {name for name in before if after[name] != before[name]}
        assert changed <= {"config.json", "summary.json"}
        assert json.loads(after["summary.json"]) == summary
    stored = read_settings(read_stored(copy / "config.json"))
    assert (stored.mesh.data, stored.train.micro_batches) == (2, 2)

    flags = (*trained.flags, f"--workdir={copy}")
    assert is_finished(*flags)
    assert not is_finished(*flags, f"--config.train.updates={UPDATES + 1}")


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


def killed_in_save(start: Callable, step: int, flags: tuple[str, ...]) -> None:
    """Trains until the save after update `step` is about to be committed."""
    process = start("-c", KILLED_AT, "os.rename", rf"checkpoints/{step}\..*tmp.*/?$", *flags)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def test_killed_in_its_saves_it_goes_on_from_the_last_one_and_ends_with_the_same_bits(
    trained: Any, tmp_path: Path, start: Callable, command: Callable
) -> None:
    workdir = tmp_path / "killed"
    flags = (*trained.flags, *NO_EVALUATION, f"--workdir={workdir}")
    for step, saved_before in ((2, []), (4, [2])):
        killed_in_save(start, step, flags)
        assert steps_of(workdir) == saved_before
        assert len(lines_of(workdir)) == step
    done = command("train", *flags)
    assert done.returncode == 0, done.stderr
    assert "resuming after update 2" in done.stdout
    assert_ended_alike(workdir, trained.workdir)


# Sends itself a signal at call N of FUNCTION, a public one of opd_jax.MODULE, and writes when it
# leaves what it has called since.
SIGNALLED_AT = """
import importlib, os, signal, sys
module, function, number, name, *words = sys.argv[1:]
module, calls = importlib.import_module(f"opd_jax.{module}"), []
plain = getattr(module, function)
def counted(*arguments, **named):
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), getattr(signal, name))
    return plain(*arguments, **named)
setattr(module, function, counted)
from opd_jax.train import main
try:
    main(words)
finally:
    print("calls after the signal:", len(calls) - int(number))
"""


# All rows sample a turn in one chunk, and the runs have three turns. The first update's judge is
# asked twice, once with the other decoding.
@pytest.mark.parametrize(
    ("place", "at", "name"),
    [
        (("agent.session", "_turn_keys", 7), 2, "SIGTERM"),  # the first turn of the third rollout
        (("judge.verdicts", "judge_turns", 3), 1, "SIGINT"),  # the tasks of update 2 are played
    ],
)
def test_a_signal_between_turns_keeps_what_is_finished_and_changes_no_bit(
    place: tuple,
    at: int,
    name: str,
    trained: Any,
    tmp_path: Path,
    start: Callable,
    command: Callable,
    is_finished: Callable,
) -> None:
    workdir = tmp_path / "stopped"
    flags = (*trained.flags, *NO_EVALUATION, f"--workdir={workdir}")
    # A checkpoint is there only because of the signal.
    process = start("-c", SIGNALLED_AT, *place, name, *flags, "--config.checkpoint.every=1000")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert f"stopped by {name}; what is finished is kept\n" in output
    assert f"update {at} is saved in {workdir}\n" in output
    assert "calls after the signal: 0\n" in output
    assert steps_of(workdir) == [at]
    assert [line["step"] for line in lines_of(workdir)] == list(range(1, at + 1))
    assert not (workdir / "summary.json").exists()
    assert not (workdir / "lease.json").exists()
    assert not is_finished(*flags)

    done = command("train", *flags)
    assert done.returncode == 0, done.stderr
    assert f"resuming after update {at} of {UPDATES}" in done.stdout
    assert_ended_alike(workdir, trained.workdir)


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_and_it_goes_on_later(
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
    assert table(done.stdout) == table(trained.stdout)


# --- Evaluated while it trains

DEV = ("--config.eval.every=1", "--config.eval.dev_tasks=4", "--config.checkpoint.keep=1")


def dev_figures(workdir: Path) -> dict[int, dict[str, Any]]:
    return {
        line["step"]: {name: value for name, value in line.items() if name != "step"}
        for line in lines_of(workdir)
        if "eval/dev/success" in line
    }


def test_a_run_that_is_evaluated_while_it_trains_ends_alike_interrupted_or_not(
    small: tuple[str, ...], in_process: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plain, best_by = tmp_path / "whole", tmp_path / "plain", "failed"
    words = ("--config=quickstart:runlocal", *small, *NO_EVALUATION)
    in_process(train.main, *words, f"--workdir={plain}")
    words = (*words, *DEV, f"--config.checkpoint.best={best_by}")
    printed = in_process(train.main, *words, f"--workdir={whole}")
    # Training does not notice.
    updates = [line for line in lines_of(whole) if "loss" in line]
    assert [line["loss"] for line in updates] == [line["loss"] for line in lines_of(plain)]
    assert saved(whole) == saved(plain)
    # What is measured is in the log, and no table reports it.
    figures = dev_figures(whole)
    assert list(figures) == list(range(1, UPDATES + 1))
    summary = json.loads((whole / "summary.json").read_text())
    last = {name.removeprefix("eval/dev/"): value for name, value in figures[UPDATES].items()}
    assert summary["eval"]["dev"] == {"dev": last}
    assert "dev" in json.loads((whole / "tasks.json").read_text())
    assert not any("dev" in line for line in table(printed))
    # The best is kept besides the newest.
    shares = {step: one[f"eval/dev/{best_by}"] for step, one in figures.items()}
    best = min(shares, key=lambda step: (shares[step], step))
    assert summary["best"] == {"step": best, "figure": best_by, "value": shares[best]}
    assert steps_of(whole) == sorted({best, UPDATES})
    assert find_step(whole, "best", name="--step") == best
    # Continued from there, and stopped once in the middle of an evaluation.
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    for step in steps_of(again)[1:]:
        shutil.rmtree(again / "checkpoints" / str(step))
    plays, measure = [], evaluate.evaluate_model

    def stopped(*given: Any, **named: Any) -> Any:
        plays.append(named["update"])
        if len(plays) == 1:
            raise Stopped
        return measure(*given, **named)

    monkeypatch.setattr(evaluate, "evaluate_model", stopped)
    config = load("quickstart:runlocal", words[1:])
    (again / "summary.json").unlink()
    with pytest.raises(Stopped):
        train.run(config, again)
    train.run(config, again)
    assert plays[:2] == [best + 1, best + 1] or best == UPDATES
    assert_ended_alike(again, whole)
    assert json.loads((again / "summary.json").read_text())["best"] == summary["best"]
    assert steps_of(again) == steps_of(whole)


# --- Building the pair


def test_the_config_of_the_pair_trains_a_teacher(built: Any) -> None:
    lines = lines_of(built.workdir)
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    for line in lines:
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)
        assert line["z"] == line["raw_weight"] == 1
        assert line["tokens_per_s/update"] > 0
        # Whether it learns shows in a longer run, which test_pair makes.
        assert line["update_norm"] > 0
        # There is no teacher, no confidence and no rollout: nothing is said of them.
        for name in ("teacher_entropy", "confidence", "by_turn/confidence", "logprob_error"):
            assert name not in line
        assert not any(name.startswith(("batch/", "judge/", "verdict/")) for name in line)
    # From random parameters: about even over the vocabulary.
    student = load_model("embedded:student", dtype="float32", mesh=one_device())
    assert lines[0]["loss"] == pytest.approx(np.log(len(student.tokenizer)), rel=0.2)
    summary = json.loads((built.workdir / "summary.json").read_text())["eval"]
    assert summary.keys() == {"expert", "after"}
    assert summary["expert"]["valid_seen"]["n"] == 4


# --- Many devices


@pytest.mark.slow
def test_on_many_devices_a_continued_run_ends_with_the_same_bits_and_one_device_exports_it(
    small: tuple[str, ...], start: Callable, tmp_path: Path
) -> None:
    changes = (
        *("mesh.data=4", "mesh.fsdp=2", "rollout.batch=8", "eval.batch=8"),
        *("demonstrations.sizes=small", "demonstrations.window=8", "eval.splits=valid_seen"),
        "demonstrations.tokens_per_batch=1536",  # eight rows, one a device
        *("new_model.d_model=32", "new_model.num_layers=1"),
        *("train.updates=3", "checkpoint.every=1"),
    )
    on_eight = load(
        "household_pair:runlocal,who=student",
        [*small, *NO_EVALUATION, *(f"--config.{change}" for change in changes)],
    )
    whole = tmp_path / "whole"
    train.run(on_eight, whole)
    shutil.copytree(whole, tmp_path / "continued")
    shutil.rmtree(tmp_path / "continued" / "checkpoints" / "3")
    train.run(on_eight, tmp_path / "continued")
    assert_ended_alike(tmp_path / "continued", whole)
    # One shape of batch, one program: what an update returns is placed as what it was given.
    lines = lines_of(whole)
    assert lines[0]["seconds/compile"] > 0
    assert [line["seconds/compile"] for line in lines[1:]] == [0, 0]

    # The accelerator of the exporting machine is not asked for. Here there is none.
    words = ("-m", "opd_jax.export", f"--workdir={whole}", f"--out={tmp_path / 'model'}")
    exporting = start(*words, JAX_PLATFORMS="cuda")
    _, errors = exporting.communicate()
    assert exporting.returncode == 0, errors
    exported = load_model(str(tmp_path / "model"), dtype="float32", mesh=one_device())
    params = {n.removeprefix(".params"): raw for n, _, _, raw in saved(whole)[1]}
    assert raw_arrays(exported.params)
    assert all(params[name] == raw for name, _, _, raw in raw_arrays(exported.params))


# --- Errors


# Raises an error at call N of FUNCTION of opd_jax.MODULE.
RAISED_AT = """
import builtins, importlib, sys
module, function, number, error, *words = sys.argv[1:]
module, calls = importlib.import_module(f"opd_jax.{module}"), []
plain = getattr(module, function)
def counted(*arguments, **named):
    calls.append(1)
    if len(calls) == int(number):
        raise getattr(builtins, error)("row 17 of the data is malformed")
    return plain(*arguments, **named)
setattr(module, function, counted)
from opd_jax.train import main
main(words)
"""


@pytest.mark.parametrize(
    ("place", "error", "status", "last"),
    [
        # In the third update: its rollout, its judge (the first asks twice), and where it begins.
        (("config.build", "rollout", 3), "ValueError", 2, "error: update 3: row 17 of the data is"),
        (("judge.verdicts", "judge_turns", 4), "KeyError", 1, "KeyError: 'row 17 of the data is"),
        (
            ("config.build", "shard_batch", 3),
            "RuntimeError",
            1,
            "RuntimeError: row 17 of the data is",
        ),
    ],
)
def test_whatever_ends_a_run_what_is_finished_is_saved(
    place: tuple,
    error: str,
    status: int,
    last: str,
    trained: Any,
    tmp_path: Path,
    start: Callable,
    command: Callable,
) -> None:
    flags = (*trained.flags, *NO_EVALUATION, f"--workdir={tmp_path}")
    process = start("-c", RAISED_AT, *place, error, *flags, "--config.checkpoint.every=1000")
    output, errors = process.communicate()
    assert process.returncode == status, errors
    assert errors.splitlines()[-1].startswith(last)
    assert f"update 2 is saved in {tmp_path}\n" in output
    assert steps_of(tmp_path) == [2]
    assert len(lines_of(tmp_path)) == 2
    if error == "ValueError":
        done = command("train", *flags)
        assert done.returncode == 0, done.stderr
        assert_ended_alike(tmp_path, trained.workdir)


# --- One reading


def test_a_run_whose_judge_reads_the_conversations_has_no_teachers_pass(
    tmp_path: Path, trained: Any, command: Callable
) -> None:
    flags = ("--config.judge.context=history", "--config.train.updates=1")
    done = command("train", *trained.flags, *NO_EVALUATION, *flags, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for what, stands in (("what is judged and scored", True), ("the teacher's pass", False)):
        assert (what in done.stdout) == stands
    (line,) = lines_of(tmp_path)
    assert line["divergence"] > 0


# --- Not finite


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1e30", "`update_norm` is inf at update 1: nothing was saved from it"),
        # The next update samples with what is not finite any more.
        ("1e15", "update 2: the logits of the model that plays are not finite"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    rate: str, message: str, tmp_path: Path, trained: Any, command: Callable
) -> None:
    flags = (f"--config.optimizer.learning_rate={rate}", "--config.checkpoint.every=1")
    done = command("train", *trained.flags, *NO_EVALUATION, *flags, f"--workdir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    # The line that the message points to is there.
    (line,) = lines_of(tmp_path)
    assert isinstance(line["loss"], float)
    if rate == "1e30":
        assert str(tmp_path) not in done.stderr  # there is no checkpoint
        assert line["update_norm"] is None
        assert not (tmp_path / "checkpoints").exists()
    else:
        newest, arrays, _ = saved(tmp_path)
        assert newest == 1
        floats = [np.frombuffer(raw, kind) for _, kind, _, raw in arrays if kind == np.float32]
        assert floats
        assert all(np.isfinite(array).all() for array in floats)


@pytest.fixture
def untied_teacher(tmp_path: Path) -> Path:
    """The embedded teacher with a head of its own, so that an embedding can be spoilt alone."""
    folder = Path(shutil.copytree(EMBEDDED / "teacher", tmp_path / "teacher"))
    sizes = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(sizes))
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].copy()
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    return folder


def test_a_token_that_makes_a_loss_not_finite_is_named_and_what_came_before_is_kept(
    tmp_path: Path, untied_teacher: Path, trained: Any, command: Callable
) -> None:
    flags = (
        "--config=quickstart:method=opd,runlocal",
        *trained.flags[1:],
        *NO_EVALUATION,
        *("--config.train.updates=2", "--config.optimizer.schedule=constant"),
        *("--config.checkpoint.every=1", "--config.episodes.every=1"),
        f"--config.teacher={untied_teacher}",
    )
    fine, debugged, failed = (tmp_path / name for name in ("fine", "debugged", "failed"))
    for workdir, nans in ((fine, False), (debugged, True)):
        done = command("train", *flags, f"--config.debug.nans={nans}", f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
    assert_ended_alike(debugged, fine)  # to the bit

    # A token that update 2 has read and update 1 has not.
    first, second = (read_episodes(fine / "episodes" / f"update-{n:06d}.jsonl") for n in (1, 2))
    known = {token for line in first for token in line["tokens"]["id"]}
    row, at = next(
        (row, at)
        for row, line in enumerate(second)
        for at, token in enumerate(line["tokens"]["id"])
        if token not in known
    )
    line = second[row]
    token, turns = line["tokens"]["id"][at], line["tokens"]["turn"]
    weights = load_file(untied_teacher / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, untied_teacher / "model.safetensors")

    # Saved at the second update only, so that what is there was saved because it failed.
    flags = (*flags, "--config.checkpoint.every=2", f"--workdir={failed}")
    done = command("train", *flags)
    assert done.returncode == 2, done.stderr
    assert "`loss` is nan at update 2: nothing was saved from it; " in done.stderr
    assert "`debug.nans`" in done.stderr
    assert not (failed / "checkpoints").exists()

    done = command("train", *flags, "--config.debug.nans=True")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    later = [turn for turn in turns[at:] if turn >= 0]
    turn = f"before turn {later[0]}" if later else "after its last turn"
    if turns[at] >= 0:
        turn = f"in turn {turns[at]}"
    text = load_student(read_settings(read_stored(fine / "config.json")), one_device())
    task, file = line["task"]["index"], failed / "episodes" / "update-000002.jsonl"
    assert (
        f"row {row} (task {task} of train) stops being finite {turn} at token {at}, "
        f"{text.tokenizer.decode([token])!r}: the teacher's hidden state; see {file}; lower"
    ) in done.stderr
    # The student of before is there, as without the fault, and the episodes that are not finite.
    assert steps_of(failed) == [1]
    shutil.rmtree(fine / "checkpoints" / "2")
    assert saved(failed) == saved(fine)
    told = read_episodes(file)
    spoilt = [line for line in second if token in line["tokens"]["id"]]
    assert [line["tokens"] for line in told] == [line["tokens"] for line in spoilt]
    assert told[0]["student_tokens"]["teacher_logprob"][-1] is None
    assert told[0]["student_tokens"]["student_logprob"] == line["student_tokens"]["student_logprob"]
    assert view(failed, tmp_path / "page.html")


# --- Mistakes


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
) -> Callable[..., str]:
    """Runs the command in this process; returns its error, which came before any compilation."""

    def refuse(*flags: str, workdir: Path = tmp_path / "new") -> str:
        words = [*flags] if flags[0].startswith("--config=") else ["--config=quickstart", *flags]
        with pytest.raises(SystemExit) as stop:
            train.main([*words, f"--workdir={workdir}"])
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
        assert compilations == []
        assert not (tmp_path / "new").exists()
        return printed.err

    return refuse


def test_the_listener_hears_compilations(compilations: list[str]) -> None:
    jax.jit(lambda x: x * 3.5 + len(compilations))(np.ones(7))
    assert compilations


# One for each place that refuses; what settings refuse is in config/test_settings.py.
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--workdr=x", ["`--workdr`", "`workdir`"]),
        ("--profile=3", ["`--profile`", "FROM:TO", "`3`"]),
        ("--profile=0:2", ["`--profile`", "1 <= FROM", "`0:2`"]),
        ("--profile=3:2", ["`--profile`", "FROM <= TO", "`3:2`"]),
        ("--profile=79:81", ["`--profile`", "`train.updates` = 80", "`79:81`"]),
        ("--config=quickstrat", ["quickstrat", "`quickstart`"]),
        ("--config=quickstart:metod=opd", ["`metod`", "`method`"]),
        ("--config.train.updatess=3", ["`train.updatess`", "`train.updates`"]),
        ("--config.train.updates=three", ["`train.updates`", "int", "three"]),
        ("--config.train.updates=0", ["`train.updates`", "at least 1", "0"]),
        ("--config.mesh.tensor=16", ["`mesh.data`", "1 × 1 × 16", "8 devices"]),
        ("--config.eval.splits=train,tests", ["`eval.splits`", "valid_unseen", "'tests'"]),
        ("--config.env.size=vast", ["`size`", "small", "'vast'"]),
        ("--config.env.by=office", ["`env.by`", "household", "'office'"]),
        ("--config.student=some/where", ["`some/where`", "does not exist"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    flag: str, words: list[str], refused: Callable
) -> None:
    message = refused(flag)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_folder_that_cannot_be_read_is_named(
    who: str, tmp_path: Path, refused: Callable
) -> None:
    folder = Path(shutil.copytree(EMBEDDED / who, tmp_path / who))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    message = refused(f"--config.{who}={folder}")
    assert str(weights) in message


def test_a_mistake_that_is_corrected_is_forgotten(tmp_path: Path, refused: Callable) -> None:
    # Whatever is refused leaves no config.json that the corrected command would be held to.
    workdir = tmp_path / "reused"
    assert "does not exist" in refused("--config.student=some/where", workdir=workdir)
    message = refused("--config.teacher=some/where", workdir=workdir)
    assert "some/where" in message
    assert "another config" not in message


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate: 0.001 -> 0.5"),
        ("train.updates=5", "train.updates: 4 -> 5"),
        ("env.size=large", "env.size: 'small' -> 'large'"),
    ],
)
def test_a_run_is_not_continued_under_another_config(
    flag: str, difference: str, trained: Any, copy: Path, refused: Callable
) -> None:
    before = files_of(copy)
    message = refused(*trained.flags, f"--config.{flag}", "--config.mesh.data=2", workdir=copy)
    assert f"({difference})" in message
    assert str(copy) in message
    assert files_of(copy) == before


def test_a_run_is_not_continued_on_other_tasks_or_beside_files_that_cannot_be_read(
    trained: Any, copy: Path, refused: Callable
) -> None:
    digests = json.loads((copy / "tasks.json").read_text())
    (copy / "tasks.json").write_text(json.dumps(digests | {"train": "another-0123"}))
    before = files_of(copy)
    message = refused(*trained.flags, workdir=copy)
    for word in ("`data.split`", "another-0123", digests["train"], str(copy)):
        assert word in message
    assert files_of(copy) == before
    for name, text in (("tasks.json", "[]"), ("config.json", "{")):
        (copy / name).write_text(text)
        assert str(copy / name) in refused(*trained.flags, workdir=copy)
    assert files_of(copy) == before | {"tasks.json": b"[]", "config.json": b"{"}


def test_a_run_learns_from_the_episodes_of_another_or_plays_on_from_within_them(
    trained: Any, small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (file,) = (trained.workdir / "episodes").glob("update-000004.jsonl")
    own = Path(shutil.copy(file, tmp_path / "own.jsonl"))
    for kind, arg in (("episodes", "method=sft,runlocal"), ("prefixes", "runlocal")):
        workdir, source = tmp_path / kind, f"{kind}:{own}"
        flags = (f"--config=quickstart:{arg}", *small, *NO_EVALUATION, "--config.train.updates=2")
        flags = (*flags, f"--config.data.source={source}")
        flags = (*flags, f"--workdir={workdir}")
        train.main(flags)
        printed = capsys.readouterr().out
        assert f"\n{source}: 4 tasks, digest " in "\n" + printed
        assert source in json.loads((workdir / "tasks.json").read_text())
        assert steps_of(workdir) == [2]
        for line in lines_of(workdir):
            assert line["loss"] > 0
            assert ("logprob_error" in line) == ("judge/asked" in line) == (kind == "prefixes")
        turns = [
            t
            for e in read_episodes(workdir / "episodes" / file.name.replace("4", "1"))
            for t in e["turns"]
        ]
        assert ("student" in {t["actor"] for t in turns}) == (kind == "prefixes")
        # The file is part of the run.
        whole = own.read_text()
        own.write_text(whole.partition("\n")[0])
        with pytest.raises(SystemExit):
            train.main(flags)
        assert f"the tasks of '{source}' are not those that the run" in capsys.readouterr().err
        own.write_text(whole)
