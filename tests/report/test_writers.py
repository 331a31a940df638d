"""The files that a run writes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from events import events_in, scalars

import opd_jax
from opd_jax.report.writers import EventWriter, JsonlWriter, read_summary, write_summary


def records(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=None)
    writer.write(1, {"a": math.nan, "b": [1.0, math.inf, None], "c": np.float32(0.5)})
    writer.write(2, {"a": jnp.float32(2), "b": np.arange(2), "c": {"d": -math.inf}})
    # Read before closing: a process that is killed never closes.
    assert records(path) == [
        {"step": 1, "a": None, "b": [1.0, None, None], "c": 0.5},
        {"step": 2, "a": 2.0, "b": [0, 1], "c": {"d": None}},
    ]
    writer.close()


@pytest.mark.parametrize(
    ("last", "resume_step", "kept"),
    [
        ('{"step": 3}\n{"step": 4}\n', 2, [1, 2]),
        ('{"step": 3}\n{"st', 3, [1, 2, 3]),  # cut short by a kill
        ('{"step": 3}', 3, [1, 2, 3]),  # complete, without its newline
        ("", None, []),
    ],
)
def test_resuming_drops_later_lines_and_continues(
    last: str, resume_step: int | None, kept: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + last)
    writer = JsonlWriter(path, resume_step=resume_step)
    writer.write(9, {})
    writer.close()
    assert [line["step"] for line in records(path)] == [*kept, 9]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ["{", "3", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(before)
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl"):
        JsonlWriter(path, resume_step=2)
    assert path.read_text() == before


def test_event_files_hold_the_finite_scalars_and_hide_those_of_later_steps(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "a", resume_step=None)
    writer.write(1, {"loss": 0.5, "kl": [1.0, None, 3.0], "bad": math.nan})
    (file,) = (tmp_path / "a").iterdir()
    # Read before closing: a process that is killed never closes.
    assert scalars(file) == [(1, "loss", 0.5), (1, "kl/0", 1.0), (1, "kl/2", 3.0)]
    writer.close()

    writer = EventWriter(tmp_path / "b", resume_step=7)
    writer.write(8, {"loss": 0.25})
    writer.close()
    (file,) = (tmp_path / "b").iterdir()
    starts = [event.step for event in events_in(file) if event.HasField("session_log")]
    assert (starts, scalars(file)) == ([8], [(8, "loss", 0.25)])


def test_a_broken_torch_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('no libcudart.so')")
    code = f"""if True:
        from pathlib import Path
        from opd_jax.report.writers import EventWriter
        writer = EventWriter(Path({str(tmp_path / "events")!r}), resume_step=None)
        writer.write(1, {{"loss": 0.5}})
        try:
            import torch  # whoever needs it sees what it is
        except OSError as error:
            print(error)
    """
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(opd_jax.__file__).parents[1]}"}
    words = (sys.executable, "-c", code)
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    (file,) = (tmp_path / "events").iterdir()
    assert (scalars(file), done.stdout) == ([(1, "loss", 0.5)], "no libcudart.so\n")


@pytest.mark.parametrize(("resume_step", "kept"), [(None, []), (1, [1]), (2, [1, 2])])
def test_after_a_resumption_every_update_has_its_events_once(
    resume_step: int | None, kept: list[int], tmp_path: Path
) -> None:
    # Two starts: to step 2, and from there to step 3.
    for start, steps in ((None, [1, 2]), (2, [3])):
        writer = EventWriter(tmp_path, resume_step=start)
        for step in steps:
            writer.write(step, {"loss": 1.0})
        writer.close()
        time.sleep(1.1)  # a file is named by the second
    (last,) = (file for file in tmp_path.iterdir() if scalars(file)[-1][0] == 3)
    last.write_bytes(last.read_bytes()[:-5])  # cut short by a kill
    (tmp_path / "7.events.out.tfevents.1.tmp").touch()
    (tmp_path / "notes.txt").write_text("mine")
    writer = EventWriter(tmp_path, resume_step=resume_step)
    writer.write(9, {"loss": 0.5})
    writer.close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    files = [file for file in tmp_path.iterdir() if file.suffix != ".txt"]
    assert all(file.name.startswith("events.out.tfevents.") for file in files)
    found = sorted(point for file in files for point in scalars(file))
    assert found == [*((step, "loss", 1.0) for step in kept), (9, "loss", 0.5)]


def test_summaries_merge_key_by_key_and_figures_replace_figures(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    assert read_summary(path) == {}
    old = {"train": {"success": 0.1, "judge": {"n": 9}}, "valid": {"success": 0.3}}
    write_summary(path, {"eval": {"before": old}})
    new = {"before": {"train": {"success": 0.2, "ci95": (0.1, np.nan)}}, "after": {}}
    write_summary(path, {"eval": new})
    assert read_summary(path)["eval"] == {
        "before": {"train": {"success": 0.2, "ci95": [0.1, None]}, "valid": {"success": 0.3}},
        "after": {},
    }
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ['{"eval"', "[]"])
def test_a_damaged_summary_is_named_and_left(text: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_summary(path, {"a": 1})
    assert path.read_text() == text
