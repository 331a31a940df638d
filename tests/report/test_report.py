"""The report: runs grouped over seeds, curves against plain arithmetic, and a page by itself."""

import json
import re
import struct
import sys
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from opd_jax.report import __main__ as command
from opd_jax.report import curves
from opd_jax.report.curves import LEARNING, smooth
from opd_jax.report.runs import changed_fields, read_groups


def figures(wins: int, n: int, update: int) -> dict[str, Any]:
    ends = binomtest(wins, n).proportion_ci(0.95, method="wilson")
    return {"success": wins / n, "ci95": list(ends), "n": n, "update": update}


def line(step: int, seed: int) -> dict[str, Any]:
    """A line with figures that tell its update and its seed."""
    return {
        "step": step,
        "loss": 1.0 / step + seed,
        "divergence": 2.0 / step,
        "batch/success": 0.5,
        "verdict/skip": 0.25,
        "seconds/rollout": 1.5,
        "seconds/compile": 9.0 if step == 1 else 0.0,
        "by_turn/divergence": [2.0 / step, 4.0 + seed, None],
        "by_turn/skip": [1.0, 0.5, None],
    }


def write_run(
    workdir: Path, *, seed: int = 0, rate: float = 1e-3, updates: int = 3, who: Sequence[str] = ()
) -> Path:
    workdir.mkdir(parents=True)
    config = {"seed": seed, "eval": {"who": [*who]}, "optimizer": {"learning_rate": rate}}
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(line(step, seed)) for step in range(1, updates + 1)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    results = {"after": {"seen": figures(4 + seed, 10, updates)}}
    results |= {name: {"seen": figures(2, 10, 0)} for name in who}
    (workdir / "summary.json").write_text(json.dumps({"eval": results}))
    return workdir


def write_comparison(workdir: Path) -> Path:
    for method, rate in (("opd", 1e-3), ("sage", 2e-3)):
        for seed in (0, 1):
            # As `compare` does: who else is evaluated once, with the first run.
            who = ("before", "teacher") if (method, seed) == ("opd", 0) else ()
            write_run(workdir / method / f"seed-{seed}", seed=seed, rate=rate, who=who)
    return workdir


# --- Which runs belong together


def test_runs_of_a_comparison_are_grouped_by_method(tmp_path: Path) -> None:
    groups = read_groups([write_comparison(tmp_path / "all")])
    assert [(group.label, len(group.runs)) for group in groups] == [("opd", 2), ("sage", 2)]
    for group in groups:
        # Before training all are the one student that was evaluated once.
        before, after = group.evaluations()["seen"]
        assert (before.update, before.success) == (0, 0.2)
        assert (after.update, after.success) == (3, pytest.approx((0.4 + 0.5) / 2))
        assert after.low < after.success < after.high
    rows = changed_fields(groups)
    assert rows == [{"field": "optimizer.learning_rate", "opd": "0.001", "sage": "0.002"}]


def test_workdirs_whose_configs_differ_only_by_the_seed_are_one_group(tmp_path: Path) -> None:
    workdirs = [write_run(tmp_path / f"opd-{seed}", seed=seed) for seed in (0, 1)]
    other = write_run(tmp_path / "high", rate=1.0)
    groups = read_groups([workdirs[0], other, workdirs[1]])
    assert [(group.label, len(group.runs)) for group in groups] == [("opd", 2), ("high", 1)]


def test_labels_are_never_the_same(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a" / "run", rate=1.0)
    b = write_run(tmp_path / "b" / "run", rate=2.0)
    assert [group.label for group in read_groups([a, b])] == ["a/run", "b/run"]


def test_the_interval_of_one_seed_is_the_stored_one(tmp_path: Path) -> None:
    (group,) = read_groups([write_run(tmp_path / "run", who=("before",))])
    _, after = group.evaluations()["seen"]
    stored = binomtest(4, 10).proportion_ci(0.95, method="wilson")
    assert (after.low, after.high) == pytest.approx((stored.low, stored.high))


def test_evaluations_during_training_are_points_too(tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "run")
    during = {"step": 4, "eval/dev/success": 0.3, "eval/dev/ci95": [0.2, 0.5]}
    with (workdir / "metrics.jsonl").open("a") as file:
        for more in (line(4, 0), during):  # an update's, and an evaluation's of its own
            file.write(json.dumps(more) + "\n")
    (group,) = read_groups([workdir])
    assert not np.isnan(group.curve("loss")).any()
    assert group.evaluations()["dev"] == [(4, 0.3, pytest.approx(0.2), pytest.approx(0.5))]


# --- Curves


def test_curves_have_a_row_a_seed_and_turns_are_averaged(tmp_path: Path) -> None:
    workdirs = [write_run(tmp_path / f"x-{s}", seed=s, updates=3 - s) for s in (0, 1)]
    (group,) = read_groups(workdirs)
    expected = [[1, 1 / 2, 1 / 3], [2, 1 / 2 + 1, np.nan]]  # the second seed is behind
    np.testing.assert_allclose(group.curve("loss"), expected)
    by_turn = [[2, 1, 2 / 3], [4.5, 4.5, 4], [np.nan] * 3]
    np.testing.assert_allclose(group.by_turn("divergence"), by_turn)
    assert np.isnan(group.curve("z")).all()


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_running_mean_is_the_mean_of_what_is_near(width: int) -> None:
    values = np.random.default_rng(0).normal(size=(2, 9))
    values[0, 4] = np.nan
    found = smooth(values, width)
    for row in range(2):
        for at in range(9):
            near = values[row, max(0, at - width // 2) : at + width // 2 + 1]
            if np.isnan(values[row, at]):
                assert np.isnan(found[row, at])
            else:
                assert found[row, at] == pytest.approx(np.nanmean(near))


def test_others_are_lines_whose_names_do_not_overlap_from_the_run_with_most_tasks(
    tmp_path: Path,
) -> None:
    for name, rate, teacher in (("a", 1.0, (9, 10)), ("b", 2.0, (20, 20)), ("c", 3.0, (20, 20))):
        path = write_run(tmp_path / name, rate=rate, who=("expert",)) / "summary.json"
        found = json.loads(path.read_text())
        found["eval"] |= {"expert": {"seen": figures(20, 20, 0)}}
        found["eval"] |= {"teacher": {"seen": figures(*teacher, 0)}}
        path.write_text(json.dumps(found))
    figure, _ = curves.figures(read_groups([tmp_path / name for name in "abc"]))["success"]
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[1].texts}
    assert boxes.keys() == {"expert", "teacher"}
    assert not boxes["expert"].overlaps(boxes["teacher"])


# --- The command


def png_size(data: bytes) -> tuple[int, ...]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_the_page_is_whole_by_itself(tmp_path: Path, in_process: Callable) -> None:
    odd = write_run(tmp_path / "<b>&run", rate=0.5)
    workdirs = [write_comparison(tmp_path / "all"), odd]
    out = tmp_path / "out"
    words = [f"--workdir={workdir}" for workdir in workdirs]
    printed = in_process(command.main, *words, f"--out={out}").splitlines()
    names = ["index.html", "success.png", "learning.png", "judge.png", "seconds.png", "turns.png"]
    assert printed == [str(out / name) for name in names]
    for name in names[1:]:
        assert min(png_size((out / name).read_bytes())) > 200
    page = (out / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    assert "<script" not in page
    assert "<b>" not in page
    cells = [unescape(cell) for cell in re.findall("<td>(.*?)</td>", page)]
    assert {"opd", "sage", odd.name, str(odd), "45.0%"} <= set(cells)


def test_a_run_that_is_still_training_has_a_report(tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "run", updates=1)
    (workdir / "summary.json").unlink()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(command.report([workdir], tmp_path / "out")) == 6


def test_methods_without_a_judge_have_no_figure_of_it(tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "run")
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in found.items() if "skip" not in k} for found in lines]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    names = [path.name for path in command.report([workdir], tmp_path / "out")]
    assert "judge.png" not in names
    assert "turns.png" in names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --workdir; see --help"),
        (["--workdir=HERE", "--wat=3"], "unrecognized arguments: --wat=3; see --help"),
        (["--workdir=HERE"], "`--workdir`: `HERE` holds no run with a finished update"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main([word.replace("HERE", str(tmp_path)) for word in words])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message.replace('HERE', str(tmp_path))}")
    assert errors.count("\n") == 1


def test_without_matplotlib_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python does with what is not there
    with pytest.raises(SystemExit) as stop:
        command.main([f"--workdir={write_run(tmp_path / 'run')}"])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "pip install 'opd-jax[report]'" in errors
    assert errors.count("\n") == 1


def test_every_panel_has_a_title_of_its_own() -> None:
    assert len({panel.title for panel in LEARNING}) == len({p.key for p in LEARNING})
