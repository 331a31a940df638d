"""The files a run writes and what a person reads."""

import json
import math
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.report.writers import (
    EventWriter,
    JsonlWriter,
    progress_line,
    table,
    write_summary,
)


def records(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- JSON lines


def test_lines_are_json_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=None, write=True)
    writer.write(1, {"a": math.nan, "b": [1.0, math.inf, None], "c": np.float32(0.5)})
    writer.write(2, {"a": jnp.float32(2), "b": np.arange(2), "c": {"d": -math.inf}})
    writer.close()
    assert records(path) == [
        {"step": 1, "a": None, "b": [1.0, None, None], "c": 0.5},
        {"step": 2, "a": 2.0, "b": [0, 1], "c": {"d": None}},
    ]


def test_resuming_drops_later_lines_and_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=None, write=True)
    for step in range(1, 6):
        writer.write(step, {"run": 1})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "ru')
    writer = JsonlWriter(path, resume_step=3, write=True)
    for step in range(4, 7):
        writer.write(step, {"run": 2})
    writer.close()
    assert [(line["step"], line["run"]) for line in records(path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writer = JsonlWriter(path, resume_step=2, write=True)
    writer.write(3, {})
    writer.close()
    assert [line["step"] for line in records(path)] == [1, 2, 3]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    JsonlWriter(path, resume_step=None, write=True).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{", "3", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    before = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(before)
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl"):
        JsonlWriter(path, resume_step=2, write=True)
    assert path.read_text() == before


def test_what_was_written_survives_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys\n"
        "from opd_jax.report.writers import JsonlWriter\n"
        "writer = JsonlWriter(sys.argv[1], resume_step=None, write=True)\n"
        "for step in range(1, 4): writer.write(step, {'x': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in records(path)] == [1, 2, 3]


def test_only_the_writing_process_touches_files(tmp_path):
    JsonlWriter(tmp_path / "m.jsonl", resume_step=None, write=False).write(1, {"a": 1})
    events = EventWriter(tmp_path / "events", resume_step=None, write=False)
    events.write(1, {"a": 1})
    events.close()
    write_summary(tmp_path / "summary.json", {"a": 1}, write=False)
    assert list(tmp_path.iterdir()) == []


# --- TensorBoard


def events_in(file: Path) -> list:
    """Reads the record format of event files: length, its checksum, payload, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, start, events = file.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        events.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += length + 16
    return events


def scalars(file: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events_in(file)
        for value in event.summary.value
    ]


def test_event_files_hold_the_finite_scalars_and_a_resumed_run_purges(tmp_path):
    writer = EventWriter(tmp_path / "a", resume_step=None, write=True)
    writer.write(1, {"loss": 0.5, "kl": [1.0, None, 3.0], "bad": math.nan})
    (file,) = (tmp_path / "a").iterdir()
    # Read before closing: a killed run must have its events on disk too.
    assert scalars(file) == [(1, "loss", 0.5), (1, "kl/0", 1.0), (1, "kl/2", 3.0)]
    writer.close()

    writer = EventWriter(tmp_path / "b", resume_step=7, write=True)
    writer.write(8, {"loss": 0.25})
    writer.close()
    (file,) = (tmp_path / "b").iterdir()
    starts = [event.step for event in events_in(file) if event.HasField("session_log")]
    assert (starts, scalars(file)) == ([8], [(8, "loss", 0.25)])


# --- progress


def test_the_progress_line_says_where_the_run_is():
    line = progress_line(
        step=12,
        total_steps=200,
        loss=0.43214,
        success=0.25,
        verdicts={"skip": 0.5, "weak": 0.25},
        tokens_per_s=1234.0,
        seconds_per_step=1.0,
    )
    assert line == " 12/200  loss 0.4321  success 25%  skip 50% weak 25%  1.2k tok/s  3m08s left"


def test_the_progress_line_leaves_out_what_was_not_measured():
    figures = dict(step=1, total_steps=2, loss=1.0, success=None, verdicts=None)
    line = progress_line(**figures, tokens_per_s=None, seconds_per_step=1.0)
    assert line == "1/2  loss 1.0000  1s left"


@pytest.mark.parametrize(
    ("seconds_per_step", "left"), [(0.1, "1s"), (6.0, "1m00s"), (725.0, "2h00m")]
)
def test_time_left_is_shown_in_its_unit(seconds_per_step, left):
    line = progress_line(
        step=0,
        total_steps=10,
        loss=1.0,
        success=None,
        verdicts=None,
        tokens_per_s=10.0,
        seconds_per_step=seconds_per_step,
    )
    assert line.endswith(f"10 tok/s  {left} left")
    assert "success" not in line


# --- summary


def test_summaries_merge_key_by_key_and_figures_replace_figures(tmp_path):
    path = tmp_path / "run" / "summary.json"
    old = {"train": {"success": 0.1, "judge": {"n": 9}}, "valid": {"success": 0.3}}
    write_summary(path, {"eval": {"before": old}}, write=True)
    write_summary(
        path,
        {"eval": {"before": {"train": {"success": 0.2, "ci95": (0.1, np.nan)}}, "after": {}}},
        write=True,
    )
    assert json.loads(path.read_text()) == {
        "eval": {
            "before": {
                "train": {"success": 0.2, "ci95": [0.1, None]},
                "valid": {"success": 0.3},
            },
            "after": {},
        }
    }
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_summary_is_named_and_left(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text('{"eval"')
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_summary(path, {"a": 1}, write=True)
    assert path.read_text() == '{"eval"'


# --- tables


def test_a_table_is_aligned_markdown():
    rows = [{"who": "a|b", "rate": 0.123456, "n": 400}, {"who": "c", "rate": None}]
    assert table(rows, ["who", "rate", "n"]).splitlines() == [
        "| who  |   rate |   n |",
        "| ---- | -----: | --: |",
        "| a\\|b | 0.1235 | 400 |",
        "| c    |      - |   - |",
    ]
    assert table([], ["who"]).splitlines() == ["| who |", "| --: |"]
