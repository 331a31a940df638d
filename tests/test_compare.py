"""The comparison of methods: its arithmetic, and a small one from end to end."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from scipy.stats import binomtest, sem, t

from opd_jax import compare, evaluate, train
from opd_jax.config import load, to_json


def comparison(*overrides: str) -> FrozenConfigDict:
    return load("quickstart:compare,runlocal", overrides)


def cells(text: str) -> list[list[str]]:
    """A Markdown table as rows of cells, without its rule."""
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines()]
    assert set("".join(rows[1])) <= set("-:")
    return [rows[0], *rows[2:]]


def percent(*values: float) -> list[str]:
    return [f"{value:.1%}" for value in values]


def figures(wins: int, n: int, *, turns: float = 5.0, repeated: float = 0.0) -> dict[str, Any]:
    interval = binomtest(wins, n).proportion_ci(0.95, method="wilson")
    return {
        "success": wins / n,
        "score": wins / n,
        "n": n,
        "ci95": list(interval),
        "turns": turns,
        "repeated": repeated,
    }


# --- One run of many


def test_a_variant_is_its_own_changes_and_its_seed() -> None:
    config = comparison()
    one = compare.variant(config, "opd", 5)
    assert (one.seed, one.compare.methods, one.compare.seeds) == (5, (), ())
    expected = ConfigDict(config.to_dict())
    expected.seed = 5
    expected.compare.methods, expected.compare.seeds = (), ()
    expected.weight.by = "uniform"
    assert one == FrozenConfigDict(expected)
    assert config == comparison(), "the config that it came from should be as it was"


def test_a_method_without_a_variant_is_named() -> None:
    with pytest.raises(ValueError, match=r"`compare.methods`.*sft.*'ppo'"):
        compare.variant(comparison(), "ppo", 0)


def scripted(calls: list, wins: dict[str, list[int]]) -> compare.Run:
    """In place of training: notes what it was asked for and leaves what a run leaves."""

    def run(config: FrozenConfigDict, workdir: Path) -> dict[str, Any]:
        method, seed = workdir.parent.name, config.seed
        calls.append((seed, method, config.eval.who))
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text("")
        others = {who: {"valid_seen": figures(1, 10)} for who in config.eval.who}
        return others | {"after": {"valid_seen": figures(wins[method][seed], 10)}}

    return run


def test_seeds_come_round_by_round_and_references_are_evaluated_once(tmp_path: Path) -> None:
    config = comparison("--config.compare.methods=opd,sage", "--config.compare.seeds=0,1")
    calls: list = []
    wins = {"opd": [1, 2], "sage": [3, 4]}
    text = compare.compare(config, tmp_path, run=scripted(calls, wins))
    who = config.eval.who
    assert calls == [(0, "opd", who), (0, "sage", ()), (1, "opd", ()), (1, "sage", ())]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval"].keys() == set(who)
    assert {
        method: [run["valid_seen"]["success"] for run in runs]
        for method, runs in summary["compare"].items()
    } == {"opd": [0.1, 0.2], "sage": [0.3, 0.4]}
    assert (tmp_path / "comparison.md").read_text() == text + "\n"
    assert [row[0] for row in cells(text)[1:]] == [*who, "opd", "sage"]


@pytest.mark.parametrize("who", ["", "expert"])
def test_a_comparison_with_few_references_or_none_has_its_table(who: str, tmp_path: Path) -> None:
    config = comparison(
        "--config.compare.methods=opd", "--config.compare.seeds=0", f"--config.eval.who={who}"
    )
    text = compare.compare(config, tmp_path, run=scripted([], {"opd": [5]}))
    assert [row[0] for row in cells(text)[1:]] == [*filter(None, [who]), "opd"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["--config.compare.methods=opd,ppo"],
        ["--config.compare.methods=sft,opd", "--config.teacher=", "--config.eval.who="],
    ],
)
def test_a_method_that_cannot_run_is_found_before_the_first_runs(
    overrides: list[str], tmp_path: Path
) -> None:
    calls: list = []
    config = comparison("--config.compare.seeds=0", *overrides)
    with pytest.raises(ValueError, match=r"`compare.methods`|needs a teacher"):
        compare.compare(config, tmp_path, run=scripted(calls, {"opd": [1], "sft": [1]}))
    assert calls == []


def test_a_run_that_cannot_go_on_is_found_before_the_first_runs(tmp_path: Path) -> None:
    flags = ("--config.compare.methods=opd,sage", "--config.compare.seeds=0,1")
    other = compare.variant(comparison(*flags, "--config.optimizer.clip_norm=2.0"), "sage", 1)
    held_by_another = tmp_path / "sage/seed-1"
    (held_by_another / "checkpoints/1").mkdir(parents=True)
    (held_by_another / "config.json").write_text(to_json(other))
    calls: list = []
    with pytest.raises(ValueError, match=r"sage/seed-1` holds a run with another config"):
        compare.compare(comparison(*flags), tmp_path, run=scripted(calls, {}))
    assert calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["sage"]


def test_a_workdir_holds_a_comparison_or_a_run(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("--config.compare.methods=opd", "--config.compare.seeds=0")
    compare.compare(comparison(*flags), tmp_path, run=scripted([], {"opd": [5]}))
    before = (tmp_path / "summary.json").read_bytes()
    for main, more in ((train.main, ()), (evaluate.main, ("--policy=random",))):
        with pytest.raises(SystemExit):
            main([*trained.flags, *more, f"--workdir={tmp_path}"])
        message = capsys.readouterr().err
        assert "holds a comparison; its runs are in METHOD/seed-N below it" in message
        assert message.count("\n") == 1
    assert (tmp_path / "summary.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds a run, and a comparison would mix"):
        compare.compare(comparison(*flags), trained.workdir, run=scripted([], {}))
    compare.compare(
        comparison(*flags), tmp_path, run=lambda *_: {"after": {"valid_seen": figures(5, 10)}}
    )


# --- The table


def test_cells_by_hand() -> None:
    references = {"before": {"seen": figures(3, 10), "unseen": figures(1, 10)}}
    runs = [
        {"seen": figures(6, 10), "unseen": figures(5, 10, turns=4.0, repeated=0.1)},
        {"seen": figures(8, 10), "unseen": figures(6, 10, turns=5.0, repeated=0.3)},
        {"seen": figures(7, 10), "unseen": figures(9, 10, turns=6.0, repeated=0.2)},
    ]
    judge = {"sage": {"skipped": "41.0%", "judge precision": "80.0%", "judge recall": "60.0%"}}
    header, before, sage = cells(compare.comparison_table(references, {"sage": runs}, judge=judge))
    assert header == [
        *("method", "seen", "unseen", "turns, unseen", "repeated, unseen"),
        *("skipped", "judge precision", "judge recall"),
    ]

    low, high = binomtest(3, 10).proportion_ci(0.95, method="wilson")
    assert before[:2] == ["before", "30.0% [{}, {}]".format(*percent(low, high))]
    assert before[3:] == [""] * 5

    # 21 of 30 episodes; over seeds 0.6, 0.8, 0.7: mean 0.7, deviation 0.1.
    low, high = binomtest(21, 30).proportion_ci(0.95, method="wilson")
    half = t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    over_seeds = percent(0.7 - half, 0.7 + half)
    assert sage[1] == "70.0% [{}, {}]; seeds [{}, {}]".format(*percent(low, high), *over_seeds)

    # 20 of 30; over seeds 0.5, 0.6, 0.9: the interval leaves [0, 1] and is cut.
    low, high = binomtest(20, 30).proportion_ci(0.95, method="wilson")
    half = t.ppf(0.975, 2) * sem([0.5, 0.6, 0.9])
    mean = 2 / 3
    assert mean + half > 1
    assert sage[2] == "66.7% [{}, {}]; seeds [{}, 100.0%]".format(*percent(low, high, mean - half))
    # Turns and repetition are those of the last split.
    assert sage[3:] == ["5.0", "20.0%", "41.0%", "80.0%", "60.0%"]


def test_one_seed_has_no_interval_over_seeds() -> None:
    runs = [{"seen": figures(6, 10)}]
    _, row = cells(compare.comparison_table({}, {"opd": runs}, judge={}))
    low, high = binomtest(6, 10).proportion_ci(0.95, method="wilson")
    assert row == ["opd", "60.0% [{}, {}]".format(*percent(low, high)), "5.0", "0.0%", "", "", ""]


def test_scores_stand_where_they_say_more_than_success_and_splits_have_their_labels() -> None:
    generated = figures(6, 10) | {"digest": "generated-01"}
    runs = [{"seen": generated, "unseen": figures(6, 10) | {"score": s}} for s in (-4.0, 9.0)]
    before = {"before": {"seen": generated, "unseen": figures(1, 10) | {"score": -2.0}}}
    rows = cells(compare.comparison_table(before, {"opd": runs}, judge={}))
    assert rows[0][:4] == ["method", "seen (generated)", "unseen", "score, unseen"]
    assert [row[3] for row in rows[1:]] == ["-2.00", "2.50"]


def test_a_cell_without_figures_is_a_dash() -> None:
    # An earlier start played other splits, and the mean over a benchmark's may be missing.
    both = {"seen": figures(6, 10), "unseen": figures(5, 10)}
    before = {"before": {"seen": figures(1, 10)}, "random": {"unseen": None}}
    results = {"opd": [both], "sage": [both, {"seen": figures(6, 10), "unseen": None}]}
    header, *rows = cells(compare.comparison_table(before, results, judge={}))
    assert {row[0]: [header[n] for n, cell in enumerate(row) if cell == "-"] for row in rows} == {
        "before": ["unseen"],
        "random": ["seen", "unseen"],
        "opd": [],
        "sage": ["unseen", "turns, unseen", "repeated, unseen"],
    }
    assert "score, unseen" not in header


def line(skip: float, turns: float, *, right: int, corrected: int, wrong: int) -> dict[str, float]:
    """Of an update in which `right` turns were rightly wanted corrected."""
    shares = {"verdict/skip": skip, "batch/turns": turns, "judge/recall": right / wrong}
    counts = {"judge/corrected": corrected, "judge/wrong": wrong}
    precision = {"judge/precision": right / corrected} if corrected else {}
    return shares | counts | precision


def test_figures_of_the_judge_are_pooled_over_updates_and_seeds(tmp_path: Path) -> None:
    lines = {
        ("sage", 0): [
            line(0.2, 10, right=2, corrected=4, wrong=8),
            line(0.4, 5, right=0, corrected=0, wrong=2),
        ],
        ("sage", 1): [line(0.9, 20, right=6, corrected=6, wrong=10)],
        ("opd", 0): [{"loss": 1.0}],
        ("opd", 1): [{"loss": 1.0}],
    }
    for (method, seed), content in lines.items():
        folder = tmp_path / method / f"seed-{seed}"
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in content)
        (folder / "metrics.jsonl").write_text(text)
    config = comparison("--config.compare.methods=opd,sage", "--config.compare.seeds=0,1")
    assert compare.judge_figures(config, tmp_path) == {
        # (2 + 2 + 18) of 35 turns, 8 of 10 corrected, 8 of 20 wrong.
        "sage": {"skipped": "62.9%", "judge precision": "80.0%", "judge recall": "40.0%"}
    }


# --- End to end


def test_as_a_command_it_says_which_one_to_give(command: Callable) -> None:
    done = command("compare", "--config=quickstart:compare", "--workdir=runs/x")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    config = re.search(r"^error: .*opd_jax.train --config=(\S+) --workdir=", line)[1]
    assert load(config, []).compare.methods


@pytest.mark.slow
def test_a_small_comparison_from_end_to_end_and_again(
    command: Callable, in_process: Callable, is_finished: Callable, small: tuple, tmp_path: Path
) -> None:
    flags = (
        "--config=quickstart:compare,runlocal",
        *small,
        "--config.compare.methods=sft,sage",
        "--config.compare.seeds=3",
        "--config.train.updates=1",
        "--config.eval.tasks=4",
        "--config.eval.who=before,expert",
        f"--workdir={tmp_path}",
    )
    done = command("train", *flags)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "comparison.md").read_text()
    assert done.stdout.endswith(text)
    assert [row[0] for row in cells(text)[1:]] == ["before", "expert", "sft", "sage"]
    assert is_finished(*flags)
    assert not is_finished(*(flag.replace("seeds=3", "seeds=3,4") for flag in flags))

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval"].keys() == {"before", "expert"}
    assert summary["compare"].keys() == {"sft", "sage"}
    losses, kept = set(), {}
    for method, (result,) in summary["compare"].items():
        run = tmp_path / method / "seed-3"
        files = ("metrics.jsonl", "summary.json", "config.json")
        line, figures, config = (json.loads((run / name).read_text()) for name in files)
        assert result == figures["eval"]["after"]
        assert config["seed"] == 3
        losses.add(line["loss"])
        saved = (path for path in (run / "checkpoints").rglob("*") if path.is_file())
        kept |= {path: path.read_bytes() for path in (run / "metrics.jsonl", *saved)}
    assert len(losses) == 2, "the methods should differ"

    again = in_process(train.main, *flags)
    assert again.count("resuming after update 1 of 1") == 2
    assert "tok/s" not in again
    assert {path: path.read_bytes() for path in kept} == kept
    assert (tmp_path / "comparison.md").read_text() == text
