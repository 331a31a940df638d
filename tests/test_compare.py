"""The comparison of methods: which cells run, what their files hold, and the table made of them."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import BUCKET, another_process, served
from episodes import episode, write_episodes
from ml_collections import ConfigDict, FrozenConfigDict
from scipy.stats import binomtest, t

from opd_jax import compare, evaluate, train
from opd_jax.config import load, to_json
from opd_jax.config.references import EMBEDDED
from opd_jax.config.settings import read_settings
from opd_jax.config.workdir import check_may_hold_a_run
from opd_jax.report import cells as report
from opd_jax.report.intervals import mean_interval
from opd_jax.runtime import bucket
from opd_jax.runtime.files import replace_text
from opd_jax.runtime.lease import Held, Owner, held

__all__ = ["served"]


def comparison(*overrides: str) -> FrozenConfigDict:
    return load("quickstart:compare,runlocal", overrides)


def rows_of(text: str) -> list[list[str]]:
    """The table's rows as cells, without its rule and what is below it."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines]
    assert set("".join(rows[1])) <= set("-:")
    return [rows[0], *rows[2:]]


def figures(wins: str, **more: Any) -> dict[str, Any]:
    """What an evaluation with these successes gives, as far as it is read."""
    n, won = len(wins.replace("-", "")), wins.count("1")
    shares = {"success": won / n, "score": won / n, "failed": 0.25, "repeated": 0.5}
    return shares | {"n": n, "broken": wins.count("-"), "wins": wins, "digest": "ab"} | more


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


def test_a_comparison_takes_another_file_of_the_teachers_episodes() -> None:
    flags = ("--config.compare.methods=opd,tcod_b2f", "--config.compare.seeds=0")
    named = "data.source=prefixes:mine.jsonl"
    config = load("quickstart", [*flags, f"--config.compare.variants.tcod_b2f.{named}"])
    assert compare.variant(config, "tcod_b2f", 0).data.source == "prefixes:mine.jsonl"
    with pytest.raises(ValueError, match=r"`--config.data.source`: a comparison sets it itself"):
        load("quickstart", [*flags, f"--config.{named}"])


# --- Which cells run


def scripted(calls: list, meanwhile: Callable[[], object] = lambda: None) -> compare.Run:
    """In place of training: notes what it was asked for and leaves what a run leaves."""

    def run(config: FrozenConfigDict, workdir: Path) -> dict[str, Any]:
        with held(workdir):
            calls.append((config.seed, workdir.parent.name, config.eval.who))
            meanwhile()
            (workdir / "metrics.jsonl").write_text("")
            (workdir / "config.json").write_text(to_json(config))
            wins = format(1 + config.seed, "08b")
            others = {who: {"valid_seen": figures("00000001")} for who in config.eval.who}
            return others | {"after": {"valid_seen": figures(wins, update=4)}}

    return run


TWO = ("--config.compare.methods=opd,sage", "--config.compare.seeds=0,1")


def test_seeds_come_round_by_round_and_references_are_evaluated_once(tmp_path: Path) -> None:
    config, calls = comparison(*TWO), []
    text = compare.compare(config, tmp_path, run=scripted(calls))
    who = config.eval.who
    assert calls == [(0, "opd", who), (0, "sage", ()), (1, "opd", ()), (1, "sage", ())]
    files = {path.name for path in (tmp_path / "results").iterdir()}
    named = {f"{method}-{seed}" for method in ("opd", "sage") for seed in (0, 1)}
    assert files == {f"{name}.json" for name in named | set(who)}
    assert (tmp_path / "comparison.md").read_text() == text + "\n"
    assert {row[0] for row in rows_of(text)[1:]} == {*who, "opd", "sage"}


def test_a_cell_with_a_file_is_not_run_again_though_its_workdir_is_gone(tmp_path: Path) -> None:
    calls: list = []
    text = compare.compare(comparison(*TWO), tmp_path, run=scripted(calls))
    for method in ("opd", "sage"):
        shutil.rmtree(tmp_path / method)
    again: list = []
    assert compare.compare(comparison(*TWO), tmp_path, run=scripted(again)) == text
    assert again == []
    # What is missing is run, and only that.
    (tmp_path / "results/sage-1.json").unlink()
    (tmp_path / "results/expert.json").unlink()
    assert compare.compare(comparison(*TWO), tmp_path, run=scripted(again)) == text
    assert again == [(1, "sage", ("expert",))]


def test_results_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    config = comparison(*TWO, f"--config.compare.results={tmp_path / 'all'}")
    compare.compare(config, tmp_path / "a", run=scripted([]))
    calls: list = []
    compare.compare(config, tmp_path / "b", run=scripted(calls))
    assert calls == []
    assert (tmp_path / "all/opd-0.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.clip_norm=2.0", ["`optimizer.clip_norm` was 1.0, and is now 2.0"]),
        ("train.updates=5", ["`train.updates` was 4, and is now 5"]),
        ("env.size=medium", ["`env.size` was 'small', and is now 'medium'"]),
        ("teacher=embedded:student", ["`model.teacher` was "]),
        ("eval.tasks=9", ["`eval.tasks` was 8, and is now 9"]),
        ("eval.every=2", ["`eval.dev` was 'absent', and is now 'dev'"]),  # there are no figures
        ("mesh.data=2", []),
        ("judge.context=record", []),  # OPD reads no verdict
    ],
)
def test_a_file_of_something_else_is_not_used(
    change: str, words: list[str], tmp_path: Path
) -> None:
    one = ("--config.compare.methods=opd", "--config.compare.seeds=0")
    compare.compare(comparison(*one), tmp_path, run=scripted([]))
    calls: list = []
    changed = comparison(*one, f"--config.{change}")
    if not words:
        compare.compare(changed, tmp_path, run=scripted(calls))
    else:
        with pytest.raises(ValueError, match="is of another table") as error:
            compare.compare(changed, tmp_path, run=scripted(calls))
        said = str(error.value)
        assert "\n" not in said
        assert all(word in said for word in [*words, "results/opd-0.json", "`compare.results`"])
    assert calls == []


def test_a_folder_with_cells_of_another_table_is_refused_before_the_first_runs(
    tmp_path: Path,
) -> None:
    flags = ("--config.compare.seeds=0", f"--config.compare.results={tmp_path / 'all'}")
    small, medium = (
        comparison(*flags, f"--config.compare.methods={method}", f"--config.env.size={size}")
        for method, size in (("opd", "small"), ("sage", "medium"))
    )
    compare.compare(small, tmp_path / "a", run=scripted([]))
    calls: list = []
    with pytest.raises(ValueError, match=r"not of one table: `env.size` is"):
        compare.compare(medium, tmp_path / "b", run=scripted(calls))
    assert calls == []


BUDGETS = [
    ("train.updates", 80, 160),
    ("optimizer.learning_rate", 1e-3, 1e-4),
    ("rollout.batch", 16, 32),
]


@pytest.mark.parametrize(("field", "one", "other"), BUDGETS)
def test_methods_of_one_table_have_one_budget_but_where_a_method_sets_it(
    field: str, one: Any, other: Any, tmp_path: Path
) -> None:
    # The first has no such field, and must not keep the others from being compared.
    report.write_cell(tmp_path, cell("before", None, "10"))
    for method, value in (("opd", one), ("sage", other)):
        written = cell(method, 0, "10")
        written["of"][field] = value
        report.write_cell(tmp_path, written)
    with pytest.raises(ValueError, match=rf"opd-0.*sage-0.* not of one table: `{field}` is"):
        report.read_cells(tmp_path)
    report.write_cell(tmp_path, written | {"sets": [field, "weight.by"]})
    assert len(report.read_cells(tmp_path)) == 3


def test_a_method_that_sets_its_own_rate_joins_the_table(tmp_path: Path) -> None:
    flags = ("--config.compare.methods=opd,sage", "--config.compare.seeds=0")
    changed = ConfigDict(comparison(*flags).to_dict())
    changed.compare.variants.sage.optimizer = dict(learning_rate=1e-4)
    compare.compare(FrozenConfigDict(changed), tmp_path, run=scripted([]))
    found = {one["method"]: one for one in report.read_cells(tmp_path / "results")}
    assert found["sage"]["of"]["optimizer.learning_rate"] == 1e-4
    assert "optimizer.learning_rate" in found["sage"]["sets"]
    assert found["opd"]["of"]["optimizer.learning_rate"] == 1e-3
    # Another rate of all is another table.
    flags = ("--config.compare.methods=failures", "--config.compare.seeds=0")
    results = f"--config.compare.results={tmp_path / 'results'}"
    other = comparison(*flags, results, "--config.optimizer.learning_rate=1e-5")
    with pytest.raises(ValueError, match=r"not of one table: `optimizer.learning_rate` is"):
        compare.compare(other, tmp_path / "b", run=scripted([]))


def test_a_file_from_before_a_field_existed_is_used_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = ("--config.compare.methods=opd", "--config.compare.seeds=0")
    compare.compare(comparison(*one), tmp_path, run=scripted([]))
    path = tmp_path / "results/opd-0.json"
    older = report.read_cell(path)
    del older["of"]["optimizer.clip_norm"]
    report.write_cell(path.parent, older)
    calls: list = []
    compare.compare(comparison(*one), tmp_path, run=scripted(calls))
    assert calls == []
    assert "made before there was `optimizer.clip_norm`: taken for 1.0" in caplog.text


# In its first cell each process waits until the other is in one too.
WORK = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import test_compare as these

workdir, calls = Path(sys.argv[1]), []
log = workdir / "log"

def meanwhile():
    with log.open("a") as file:
        print(*calls[-1], file=file)
    end = time.monotonic() + 120
    while len(log.read_text().splitlines()) < 2 and time.monotonic() < end:
        time.sleep(0.05)

run = these.scripted(calls, meanwhile)
these.compare.compare(these.comparison(*these.TWO), workdir, run=run)
assert calls
"""


def test_two_at_a_time_share_a_table_and_run_no_cell_twice(start: Callable, tmp_path: Path) -> None:
    both = [start("-c", WORK, tmp_path) for _ in range(2)]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    calls = (tmp_path / "log").read_text().splitlines()
    who = comparison().eval.who
    # The first cell alone evaluates the untrained ones.
    assert sorted(calls) == sorted(["0 sage ()", f"0 opd {who}", "1 sage ()", "1 opd ()"])
    assert len(list((tmp_path / "results").iterdir())) == 4 + len(who)
    compare.compare(comparison(*TWO), tmp_path, run=lambda *_: pytest.fail("a cell ran again"))


def test_whoever_finds_all_cells_taken_says_so_and_ends(tmp_path: Path) -> None:
    one = ("--config.compare.methods=opd", "--config.compare.seeds=0")
    calls: list = []
    with held(tmp_path / "results/opd-0.running"):
        text = compare.compare(comparison(*one), tmp_path, run=scripted(calls))
    assert (calls, text) == ([], "Other processes are at: opd 0")


def test_a_cell_that_another_machine_is_at_is_passed_by(tmp_path: Path) -> None:
    owner = asdict(replace(Owner.this_process(), host="elsewhere"))
    path, ended = tmp_path / "results/opd-0.running/lease.json", threading.Event()
    path.parent.mkdir(parents=True)

    def live() -> None:
        while not ended.wait(0.1):
            replace_text(path, json.dumps({"owner": owner, "heartbeat": time.time()}))

    living, calls = threading.Thread(target=live), []
    living.start()
    flags = ("--config.compare.methods=opd,sage", "--config.compare.seeds=0")
    try:
        text = compare.compare(comparison(*flags), tmp_path, run=scripted(calls))
    finally:
        ended.set()
        living.join()
    assert calls == [(0, "sage", ())]
    assert text.endswith("Other processes are at: opd 0")


def test_a_run_whose_own_workdir_is_taken_is_an_error(tmp_path: Path) -> None:
    # Somebody evaluates it. Its cell is nobody's, and nobody else will run it.
    one, calls = ("--config.compare.methods=opd", "--config.compare.seeds=0"), []
    with held(tmp_path / "opd/seed-0"), pytest.raises(Held, match=r"working in `.*opd/seed-0`"):
        compare.compare(comparison(*one), tmp_path, run=scripted(calls))
    assert calls == []
    assert not list(tmp_path.rglob("*.running"))
    compare.compare(comparison(*one), tmp_path, run=scripted(calls))
    assert len(calls) == 1


@pytest.mark.parametrize("results", ["", f"gs://{BUCKET}/all"])
def test_a_table_in_a_bucket_is_seen_by_every_process(
    results: str, served: Any, in_process: Callable, is_finished: Callable
) -> None:
    def compared(calls: list, meanwhile: Callable[[], object] = lambda: None) -> str:
        another_process()
        workdir = bucket.place(url, name="--workdir")
        return compare.compare(config, workdir, run=scripted(calls, meanwhile))

    served.objects.clear()
    url, changes = f"gs://{BUCKET}/table", (*TWO, f"--config.compare.results={results}")
    config, calls, again = comparison(*changes), list[tuple](), list[tuple]()
    text, folder = compared(calls), results or f"{url}/results"
    assert len(calls) == 4
    there = {f"gs://{BUCKET}/{name}": content for name, content in served.contents().items()}
    cells = [f"{method}-{seed}" for method in ("opd", "sage") for seed in (0, 1)]
    files = {f"{folder}/{name}.json" for name in (*cells, *config.eval.who)}
    assert files | {f"{url}/comparison.json", f"{url}/comparison.md"} <= there.keys()
    assert there[f"{url}/comparison.md"].decode() == text + "\n"
    another_process()
    assert in_process(compare.main, f"--results={folder}").endswith(text + "\n")
    if results:
        assert is_finished("--config=quickstart:compare,runlocal", *changes, f"--workdir={url}")
    with pytest.raises(ValueError, match="holds a comparison"):
        check_may_hold_a_run(bucket.place(url, name="--workdir"))

    first, second = (
        bucket._blob(bucket.place(folder, name="compare.results") / f"{method}-1.json")
        for method in ("opd", "sage")
    )
    first.delete(), second.delete()
    finish_second = partial(second.upload_from_string, there[f"{folder}/sage-1.json"])
    assert compared(again, finish_second) == text
    assert again == [(1, "opd", ())]
    another_process()


def test_a_table_in_a_bucket_has_no_results_in_the_checkout(
    served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    another_process()
    workdir, calls = bucket.place(f"gs://{BUCKET}/refused", name="--workdir"), list[tuple]()
    config = comparison(*TWO, "--config.compare.results=docs/results")
    with pytest.raises(ValueError, match=r"--config.compare.results=gs://BUCKET/PATH"):
        compare.compare(config, workdir, run=scripted(calls))
    assert (calls, list(tmp_path.iterdir())) == ([], [])
    another_process()


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
        compare.compare(config, tmp_path, run=scripted(calls))
    assert calls == []


def test_a_run_that_cannot_go_on_is_found_before_the_first_runs(tmp_path: Path) -> None:
    flags = ("--config.compare.methods=opd,sage", "--config.compare.seeds=0,1")
    other = compare.variant(comparison(*flags, "--config.optimizer.clip_norm=2.0"), "sage", 1)
    held_by_another = tmp_path / "sage/seed-1"
    (held_by_another / "checkpoints/1").mkdir(parents=True)
    (held_by_another / "config.json").write_text(to_json(other))
    calls: list = []
    with pytest.raises(ValueError, match=r"sage/seed-1` holds a run with another config"):
        compare.compare(comparison(*flags), tmp_path, run=scripted(calls))
    assert calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["sage"]


def test_a_workdir_holds_a_comparison_or_a_run(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("--config.compare.methods=opd", "--config.compare.seeds=0")
    compare.compare(comparison(*flags), tmp_path, run=scripted([]))
    before = sorted(tmp_path.rglob("*"))
    for main, more in ((train.main, ()), (evaluate.main, ("--policy=random",))):
        with pytest.raises(SystemExit):
            main([*trained.flags, *more, f"--workdir={tmp_path}"])
        message = capsys.readouterr().err
        assert "holds a comparison; its runs are in METHOD/seed-N below it" in message
        assert message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=r"holds a run, and a comparison would mix"):
        compare.compare(comparison(*flags), trained.workdir, run=scripted([]))


# --- What a cell's file holds


def test_a_file_holds_what_made_it_in_a_fixed_order(tmp_path: Path) -> None:
    config = comparison("--config.compare.methods=opd", "--config.compare.seeds=3")
    compare.compare(config, tmp_path, run=scripted([]))
    path = tmp_path / "results/opd-3.json"
    text = path.read_text()
    cell = json.loads(text)
    assert text == json.dumps(cell, indent=1, sort_keys=True) + "\n"
    assert len(text) < 10_000
    assert (cell["method"], cell["seed"]) == ("opd", 3)
    of = cell["of"]
    assert of["weight.by"] == "uniform"
    assert of["train.updates"] == 4
    assert of["eval.splits"] == ["valid_seen", "valid_unseen"]
    assert {"model.student", "model.teacher", "tasks.train", "tasks.valid_unseen"} <= of.keys()
    # Neither what the method does not read, nor layout, paths and names.
    beside = {"judge.by", "weight.skip_weight", "mesh.data", "student", "seed", "compare.seeds"}
    assert not beside & of.keys()
    assert {"commit", "uncommitted", "sources", "jax", "processor"} == cell["made_by"].keys()
    assert cell["final"]["valid_seen"]["wins"] == "00000100"
    # The untrained are of no method.
    others = json.loads((path.parent / "before.json").read_text())["of"]
    assert "weight.by" not in others
    assert others["model.student"] == of["model.student"]


def test_an_audit_of_a_workdir_is_taken_into_the_file(tmp_path: Path) -> None:
    config = comparison("--config.compare.methods=opd,sage,sft", "--config.compare.seeds=0")
    compare.compare(config, tmp_path, run=scripted([]))
    weights = {name: {"reliable": share} for name, share in (("opd", 0.5), ("sage", 0.25))}
    for method, update in (("opd", 4), ("sage", 2), ("sft", 4)):
        audit = {"after": {"dev": {"update": update, "weights": weights}}}
        (tmp_path / method / "seed-0/audit.json").write_text(json.dumps(audit))
    before = report.read_cell(tmp_path / "results/opd-0.json")
    compare.compare(config, tmp_path, run=scripted([]))
    shares = {
        method: report.read_cell(tmp_path / f"results/{method}-0.json")["training"].pop("reliable")
        for method in ("opd", "sage", "sft")
    }
    # That of SAGE was of an earlier checkpoint, and fine-tuning learns from other turns.
    assert shares == {"opd": 0.5, "sage": None, "sft": None}
    before["training"]["reliable"] = 0.5
    assert report.read_cell(tmp_path / "results/opd-0.json") == before


PROMPT = "good = SKIP\nbad = STRONG\n\nGoal: {task.goal}\n{turn.response}?\n"


def test_a_cell_is_the_same_wherever_its_files_lie(tmp_path: Path) -> None:
    def of(folder: str, *, prompt: str = PROMPT, seed: int = 0) -> list[dict[str, Any]]:
        here = tmp_path / folder
        here.mkdir()
        (here / "prompt.txt").write_text(prompt)
        write_episodes(here / "played.jsonl", [episode(seed)])
        shutil.copytree(EMBEDDED / "student", here / "judge")
        config = ConfigDict(load("quickstart:compare,runlocal", []).to_dict())
        config.compare.methods, config.compare.seeds = ("sft", "sage"), (0,)
        config.compare.variants.sft.data.source = f"episodes:{here / 'played.jsonl'}"
        config.judge.update(prompt=str(here / "prompt.txt"), model=str(here / "judge"))
        config.teacher_context.update(by="solved", file=str(here / "played.jsonl"))
        config.compare.variants.sft.teacher_context = dict(by="")
        cells = compare.cells_of(FrozenConfigDict(config), tmp_path)
        return [dict(cell.of) for cell in cells]

    def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}

    sft, sage = here = of("here")
    assert of("there") == here
    assert str(tmp_path) not in json.dumps(here)
    # And other content is another cell.
    other_sft, other_sage = of("other", seed=1)
    assert differing(sft, other_sft) == {"data.source"}
    context = "teacher_context.file"
    assert differing(sage, other_sage) == {context, f"model.{context}"}
    _, asked_otherwise = of("asked", prompt=PROMPT.replace("good", "fine"))
    assert differing(sage, asked_otherwise) == {"judge.prompt", "model.judge.prompt"}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("opd", "opd"), ("opd_two_rollouts", "opd"), ("failures", "sage")),
        *(("sage_fail0", "sage"), ("sage_without_intervention", "confidence"), ("sod", "sod")),
        ("reliability_proxy", "reliability_proxy"),
        # No teacher advises, or at other turns than those of a whole episode of the student.
        *((method, "") for method in ("sft", "sft_success", "rft", "tcod_f2b", "tcod_b2f")),
        *((method, "") for method in ("guided", "take_over", "cut_repeated")),
    ],
)
def test_an_audit_is_taken_for_the_method_whose_turns_it_weighs(method: str, name: str) -> None:
    settings = read_settings(compare.variant(load("quickstart", []), method, 0))
    assert compare._name_in_audit(settings) == name


def test_a_file_that_was_edited_or_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "opd-0.json"
    report.write_cell(tmp_path, cell("opd", 0, "10"))
    path.write_text(path.read_text().replace('"small"', '"large"'))
    with pytest.raises(ValueError, match=r"opd-0.json`: `of` was edited"):
        report.read_cells(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"opd-0.json` is no result file"):
        report.read_cells(tmp_path)


def line(*, right: int, corrected: int, wrong: int, **more: float) -> dict[str, float]:
    """Of an update in which `right` turns were rightly wanted corrected."""
    shares = {"loss": 1.0, "judge/recall": right / wrong}
    counts = {"judge/corrected": corrected, "judge/wrong": wrong}
    precision = {"judge/precision": right / corrected} if corrected else {}
    return shares | counts | precision | more


def test_figures_of_training_are_pooled_over_updates() -> None:
    lines: list[dict[str, Any]] = [
        line(right=2, corrected=4, wrong=8, active_tokens=0.5)
        | {"tokens/student": 100, "tokens/sequence": 700, "tokens/judge": 50}
        | {"seconds/rollout": 1.0, "seconds/judge": 2.0, "seconds/update": 4.0},
        line(right=0, corrected=0, wrong=2, active_tokens=0.25)
        | {"tokens/student": 300, "tokens/sequence": 900, "tokens/judge": 70}
        | {"seconds/rollout": 0.5, "seconds/update": 0.25, "seconds/compile": 9.0},
        {"eval/dev/success": 0.5, "seconds/update": 100.0},  # no update
    ]
    found = report.training_figures(lines, scored=True, played=False)
    assert found == {
        "updates": 2,
        "seconds": 7.75,
        "active_tokens": (50 + 75) / 400,
        "teacher_tokens": {"scoring": 1600, "judging": 120, "playing": 0},
        "precision": (2, 4),
        "recall": (2, 10),
        "reliable": None,
    }
    told = [one | {"tokens/teacher": 1000} for one in lines[:2]]
    assert report.training_figures(told, scored=True, played=False)["teacher_tokens"] == {
        **{"scoring": 2000, "judging": 120, "playing": 0},
    }
    # Three turns of four are asked; each takes 10 tokens to read and 2 to sample.
    own = {"loss": 1.0, "tokens/sequence": 100, "by_turn/turns": [3, 1, None]}
    own |= {"reliability/asked": 0.75, "reliability/read": 10, "reliability/sampled": 2}
    found = report.training_figures([own], scored=False, played=True)
    assert found["teacher_tokens"] == {"scoring": 0, "judging": 0, "playing": 100 + 36}
    assert (found["active_tokens"], found["precision"]) == (None, (0, 0))
    guided = {"loss": 1.0, "tokens/sequence": 100}
    guided |= {"tokens/by_teacher": 20, "tokens/read_by_teacher": 60}
    found = report.training_figures([guided], scored=True, played=False)
    assert found["teacher_tokens"] == {"scoring": 100, "judging": 0, "playing": 80}


# --- The table


def cell(method: str, seed: int | None, wins: str, **more: Any) -> dict[str, Any]:
    """A cell of a table with one split."""
    trained: dict[str, Any] = {
        **{"updates": 4, "seconds": 100.0, "active_tokens": 0.5, "reliable": None},
        **{"precision": (3.0, 4.0), "recall": (3.0, 12.0)},
        "teacher_tokens": {"scoring": 2e6, "judging": 5e5, "playing": 0.0},
    }
    made = {"commit": "c" * 40, "uncommitted": False, "sources": "s", "jax": "1", "processor": "p"}
    return {
        **{"method": method, "seed": seed, "made_by": made},
        "of": {"eval.splits": ["test"], "env.size": "small", "tasks.test": "ab"},
        "final": {"test": figures(wins)},
        "dev": None if seed is None else {"dev": figures("10")},
        "training": None if seed is None else trained,
    } | more


def test_differences_are_of_the_same_task_and_seed() -> None:
    ours = {0: "1100-", 1: "11011", 2: "11111"}
    theirs = {0: "10001", 1: "01-11", 3: "00000"}
    # Seeds 0 and 1, and tasks 0, 1 and 3.
    assert report.differences(ours, theirs).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert report.differences(ours, {}).size == 0


def test_a_difference_by_hand() -> None:
    # Of four tasks, in two seeds. By task 1/2, 1/2, 0, 0; by seed 1/4, 1/4.
    found = np.array([[0, 1, 0, 0], [1, 0, 0, 0]], float)
    mean, deviation = 0.25, np.sqrt((4 * 0.25**2) / 3)
    half = t.ppf(0.975, 3) * deviation / 2
    over_tasks = f"[{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"
    assert report.difference_cell(found) == f"+25.0 {over_tasks}; seeds [+25.0, +25.0]"
    assert report.difference_cell(found[:1]) == "+25.0 [-54.6, +104.6]"  # t(3) = 3.182, s = 1/2
    assert report.difference_cell(found[:0]) is None


def test_the_table_from_files_by_hand(tmp_path: Path) -> None:
    opd = [cell("opd", seed, wins) for seed, wins in enumerate(["1000", "1100"])]
    better = [cell("sage", seed, wins) for seed, wins in enumerate(["1011", "1101"])]
    for one in better:
        one["dev"] = {"dev": figures("11")}
    better[1]["training"] |= {"precision": (1.0, 6.0), "recall": (1.0, 3.0), "seconds": 200.0}
    for one in (*opd, *better, cell("before", None, "1000")):
        report.write_cell(tmp_path, one)
    text = report.cells_table(report.read_cells(tmp_path))
    header, before, sage, base = rows_of(text)  # more success on dev comes first
    assert header == [
        *("method", "seeds", "dev", "test", "− opd, test", "on right advice", "precision"),
        *("recall", "failed", "repeated", "active tokens", "teacher tokens", "seconds"),
    ]

    def wilson(won: int, n: int) -> str:
        low, high = binomtest(won, n).proportion_ci(0.95, method="wilson")
        return f"{won / n:.1%} [{low:.1%}, {high:.1%}]"

    assert before == ["before", "-", "-", wilson(1, 4), *["-"] * 4, "25.0%", "50.0%", *["-"] * 3]
    # Six of eight episodes, but of four tasks. By task the gain is 0, 0, 1/2, 1; by seed 2/4, 1/4.
    gains = np.array([0, 0, 0.5, 1])
    half = t.ppf(0.975, 3) * gains.std(ddof=1) / 2
    seeds = t.ppf(0.975, 1) * np.std([0.5, 0.25], ddof=1) / np.sqrt(2)
    ends = [0.375 - half, 0.375 + half, 0.375 - seeds, 0.375 + seeds]
    low, high, low_of_seeds, high_of_seeds = (f"{100 * end:+.1f}" for end in ends)
    difference = f"+37.5 [{low}, {high}]; seeds [{low_of_seeds}, {high_of_seeds}]"
    assert sage == [
        *("sage", "0, 1", "100.0%", wilson(3, 4), difference, "-"),
        *("40.0%", "26.7%", "25.0%", "50.0%", "50.0%", "2.50 M", "150"),
    ]
    assert base[:5] == ["opd", "0, 1", "50.0%", "37.5%" + wilson(2, 4)[5:], "-"]
    assert text.splitlines()[-1] == "5 made by cccccccccccc, jax 1, p."
    # Some methods; the baseline is still that of the folder.
    some = rows_of(report.cells_table(report.read_cells(tmp_path), methods=["sage"]))
    assert some == [header, before, sage]
    with pytest.raises(ValueError, match=r"no result of 'sgae'.*opd, sage|sage, opd"):
        report.cells_table(report.read_cells(tmp_path), methods=["sgae"])


def test_splits_scores_and_missing_figures_have_their_columns() -> None:
    def final(first: str, second: str | None, **more: Any) -> dict[str, Any]:
        last = figures(second, **more) if second else None
        return {"seen": figures(first, digest="generated-01"), "unseen": last}

    of = {"of": {"eval.splits": ["seen", "unseen"]}}
    played = [
        cell("opd", 0, "1", **of, final=final("10", "01", score=-4.0)),
        cell("sage", 0, "1", **of, final=final("11", None)),
    ]
    header, opd, sage = rows_of(report.cells_table(played))
    assert header[3:7] == ["seen (generated)", "unseen", "score, unseen", "− opd, unseen"]
    assert (opd[5], opd[6]) == ("-4.00", "-")
    assert sage[3].startswith("100.0%")
    assert sage[4:7] == ["-", "-", "-"]


def test_the_interval_over_tasks_covers_what_it_says() -> None:
    # Students of two methods, three seeds each. The second gains on some kinds of tasks and loses
    # on others. What is estimated is the students' mean difference over all tasks there could be.
    rng = np.random.default_rng(0)
    repeats, tasks, seeds = 600, 200, 3
    everything = rng.normal(0, 2, 100_000)  # difficulties
    skill = rng.normal(0, 0.3, (2, seeds))

    def solves(which: int, difficulty: np.ndarray) -> np.ndarray:
        gain = which * np.where(difficulty > 0, 3, -2)
        return 1 / (1 + np.exp(difficulty - gain - skill[which, :, None]))

    truth = (solves(1, everything) - solves(0, everything)).mean()
    covered = independent = 0
    for _ in range(repeats):
        drawn = rng.choice(everything, tasks)
        won = [rng.binomial(1, solves(which, drawn)) for which in (0, 1)]
        ours, theirs = (
            {s: "".join(map(str, w[s])) for s in range(seeds)} for w in (won[1], won[0])
        )
        found = report.differences(ours, theirs)
        low, high = mean_interval(found.mean(axis=0))
        covered += low <= truth <= high
        low, high = mean_interval(found.ravel())
        independent += low <= truth <= high
    assert 0.93 <= covered / repeats <= 0.97
    assert independent / repeats < 0.9, "seeds share their tasks"


# --- The commands


def test_the_command_reads_files_alone(
    tmp_path: Path, in_process: Callable, capsys: pytest.CaptureFixture
) -> None:
    for one in (cell("opd", 0, "10"), cell("sage", 0, "11")):
        report.write_cell(tmp_path, one)
    whole = report.cells_table(report.read_cells(tmp_path))
    assert in_process(compare.main, f"--results={tmp_path}") == whole + "\n"
    some = in_process(compare.main, f"--results={tmp_path}", "--methods=sage")
    assert [row[0] for row in rows_of(some)] == ["method", "sage"]
    for words in ([], [f"--results={tmp_path / 'none'}"]):
        with pytest.raises(SystemExit) as stop:
            compare.main(words)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_small_comparison_from_end_to_end_and_again(
    command: Callable, in_process: Callable, is_finished: Callable, small: tuple, tmp_path: Path
) -> None:
    flags = (
        "--config=quickstart:table=A,runlocal",
        *small,
        "--config.compare.methods=sft,sage",
        "--config.compare.seeds=3",
        "--config.train.updates=1",
        "--config.eval.every=1",
        "--config.eval.tasks=4",
        "--config.eval.dev_tasks=4",
        "--config.eval.who=before,expert",
        f"--workdir={tmp_path}",
    )
    done = command("train", *flags)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "comparison.md").read_text()
    assert done.stdout.endswith(text)
    assert {row[0] for row in rows_of(text)[1:]} == {"before", "expert", "sft", "sage"}
    assert in_process(compare.main, f"--results={tmp_path / 'results'}") == text
    assert is_finished(*flags)
    assert not is_finished(*(flag.replace("seeds=3", "seeds=3,4") for flag in flags))

    losses = set()
    for method in ("sft", "sage"):
        run = tmp_path / method / "seed-3"
        summary, config = (
            json.loads((run / f).read_text()) for f in ("summary.json", "config.json")
        )
        found = report.read_cell(tmp_path / f"results/{method}-3.json")
        assert found["final"] == summary["eval"]["after"]
        assert found["dev"] == summary["eval"]["dev"]
        assert [*found["dev"], *found["final"]] == ["dev", "test_unseen"]
        assert found["dev"]["dev"]["update"] == config["train"]["updates"] == 1
        assert len(found["final"]["test_unseen"]["wins"]) == 4
        assert config["seed"] == 3
        assert found["training"]["seconds"] > 0
        assert found["training"]["teacher_tokens"]["scoring" if method == "sage" else "playing"] > 0
        losses.add(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])
        shutil.rmtree(tmp_path / method)
    assert len(losses) == 2, "the methods should differ"

    again = in_process(train.main, *flags)
    assert again.endswith(text)
    assert "seed 3" not in again
    assert not (tmp_path / "sage").exists()
