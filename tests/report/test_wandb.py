"""Weights & Biases beside a run, by a module in its place that works, fails, hangs or is slow."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_jax.report import wandb
from opd_jax.report.wandb import WandbWriter, check_installed
from opd_jax.report.writers import JsonlWriter

# Of the service only what is used, and what it is given goes to a file.
SERVICE = """
import json, os, sys, time

def note(**what):
    with open(os.environ["SERVICE_NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def log(self, values, *, step):
        note(step=step, **values)

    def finish(self):
        note(finished=True)

def init(*, project, id, resume, dir, name, config):
    if os.environ["SERVICE"] == "hangs":
        time.sleep(600)
    if os.environ["SERVICE"] == "fails":
        raise ConnectionError("nobody is there")
    print("Tracking run with the service")
    note(project=project, id=id, resume=resume, config=config)
    return Run()
"""


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[], list[dict]]:
    """What the service was given so far."""
    path = tmp_path / "notes"
    path.touch()
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workdir, and a service that works."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(SERVICE)
    path = os.pathsep.join([str(tmp_path / "modules"), str(Path(__file__).parents[2])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("SERVICE", "works")
    monkeypatch.setenv("SERVICE_NOTES", str(tmp_path / "notes"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"seed": 7}')
    return tmp_path / "run"


def write(workdir: Path, updates: range, *, resume_step: int | None = None) -> None:
    """The lines of a start of a run."""
    lines = JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step)
    copy = WandbWriter(workdir, project="p", resume_step=resume_step)
    for step in updates:
        values = {"loss": step / 4, "by_turn/kl": [0.5, None], "none": None}
        for writer in (lines, copy):
            writer.write(step, values)
    lines.close()
    copy.close()


def test_every_line_is_given_once_and_a_resumed_run_goes_on_in_the_same_one(
    workdir: Path, notes: Callable[[], list[dict]], capsys: pytest.CaptureFixture
) -> None:
    write(workdir, range(1, 4))
    first, *lines, last = notes()
    assert (first["project"], first["resume"], first["config"]) == ("p", "allow", {"seed": 7})
    assert lines == [{"step": s, "loss": s / 4, "by_turn/kl/0": 0.5} for s in (1, 2, 3)]
    assert last == {"finished": True}
    # It goes on from the checkpoint of update 2. W&B has update 3 already.
    write(workdir, range(3, 6), resume_step=2)
    again, *lines, last = notes()[5:]
    assert again["id"] == first["id"]
    assert [line["step"] for line in lines] == [4, 5]
    # Begun anew, it is another run.
    write(workdir, range(1, 2))
    anew, *lines, last = notes()[9:]
    assert anew["id"] != first["id"]
    assert [line["step"] for line in lines] == [1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("service", "said"),
    [
        ("fails", "Weights & Biases ended with status 1: the run goes on without it."),
        ("hangs", "Weights & Biases did not take the last lines within 1 s: the run goes on"),
    ],
)
def test_a_service_that_fails_or_hangs_is_told_of_once_and_costs_nothing(
    service: str,
    said: str,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("SERVICE", service)
    monkeypatch.setattr(wandb, "FAREWELL_S", 1.0 if service == "hangs" else 60.0)
    write(workdir, range(1, 2000))
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 1999
    output = capsys.readouterr().out
    assert output.startswith(said)
    assert output.count("\n") == 1
    log = (workdir / "wandb.log").read_text()
    assert ("nobody is there" in log) == (service == "fails")


def test_a_service_that_takes_nothing_is_told_of_while_the_run_goes_on(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SERVICE", "hangs")
    monkeypatch.setattr(wandb, "SILENT_S", 0.0)
    monkeypatch.setattr(wandb, "FAREWELL_S", 0.1)
    write(workdir, range(1, 20))
    assert capsys.readouterr().out.startswith("Weights & Biases has taken nothing for 0 s: the run")


def test_where_it_is_not_installed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "find_spec", lambda name: None)
    check_installed("")
    with pytest.raises(ValueError, match=r"`wandb` = 'p' .*pip install 'opd-jax\[wandb\]'"):
        check_installed("p")


def test_the_real_one_takes_it_without_a_network(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "FAREWELL_S", 60.0)
    write(workdir, range(1, 4))
    assert capsys.readouterr().out == ""
    state = json.loads((workdir / "wandb.json").read_text())
    assert state["step"] == 3
    (folder,) = (workdir / "wandb").glob(f"offline-run-*-{state['id']}")
    (file,) = folder.glob("*.wandb")
    assert b"by_turn/kl/0" in file.read_bytes()
