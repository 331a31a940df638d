"""Prints the table of a comparison of methods, from its result files alone.

    python -m opd_jax.compare --results=docs/results/80-updates
    python -m opd_jax.compare --results=runs/mine/results --methods=opd,failures,sage

`train` runs a comparison, where `compare.methods` of its config names methods. A cell is one method
with one seed, and one result file. A cell whose file exists is not run again. Several processes may
work on one table: each takes the next cell that is free (docs/table.md).
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config import parse_command_line
from opd_jax.config.build import panels
from opd_jax.config.loading import flatten
from opd_jax.config.references import fingerprints
from opd_jax.config.settings import (
    Settings,
    binds_a_result,
    binds_an_evaluation,
    read_settings,
)
from opd_jax.config.workdir import check_comparison, check_run, store_comparison
from opd_jax.report.cells import (
    cell_path,
    cells_table,
    check_one_table,
    read_cell,
    read_cells,
    training_figures,
    write_cell,
)
from opd_jax.report.writers import read_lines, read_summary
from opd_jax.runtime import bucket, processes
from opd_jax.runtime.exits import print_line, reported
from opd_jax.runtime.files import replace_text
from opd_jax.runtime.lease import Held, held
from opd_jax.runtime.revision import revision

# Trains and evaluates one config in one workdir; gives `{who: {split: figures}}`.
Run = Callable[[FrozenConfigDict, Path], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
      method, seed: which.
      config, settings: the run's.
      workdir: where it is trained.
      folder: of the result files.
      of: all that its figures depend on, by name: config fields, digests of models and tasks.
    """

    method: str
    seed: int
    config: FrozenConfigDict
    settings: Settings
    workdir: Path
    folder: Path
    of: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its result file."""
        return cell_path(self.folder, self.method, self.seed)

    @property
    def running(self) -> Path:
        """A folder that whoever runs it holds (`runtime.lease`)."""
        return self.path.with_suffix(".running")

    def is_done(self) -> bool:
        """Whether it has a result file. All processes call it.

        Raises:
          ValueError: the file is of another config, model or panel of tasks.
        """
        return _has_result(self.path, self.of)

    @property
    def sets(self) -> list[str]:
        """The config fields that its method sets."""
        return sorted(flatten(self.config.compare.variants[self.method]))

    @property
    def of_others(self) -> dict[str, Any]:
        """What the figures of untrained models and players depend on."""
        binds = binds_an_evaluation(self.settings, teacher=True)
        panels = [f"tasks.{split}" for split in self.settings.eval.splits]
        named = ("model.student", "model.teacher", *panels)
        return {
            name: value
            for name, value in self.of.items()
            if binds(name) or name in named or (name[:5] == "eval." and name[:8] != "eval.dev")
        }


def variant(config: FrozenConfigDict, method: str, seed: int) -> FrozenConfigDict:
    """The config of one run of the comparison."""
    if method not in config.compare.variants:
        raise ValueError(
            f"`compare.methods`: expected of {', '.join(config.compare.variants)}, got {method!r}"
        )
    changed = ConfigDict(config.to_dict())
    changed.update(ConfigDict(config.compare.variants[method].to_dict()))
    changed.seed = seed
    changed.compare.methods, changed.compare.seeds = (), ()
    return FrozenConfigDict(changed)


def cells_of(config: FrozenConfigDict, workdir: Path) -> list[Cell]:
    """The cells of a comparison, seed by seed: an interrupted one has all methods equally often.

    Each is trained in `METHOD/seed-N` of the workdir.

    Raises:
      ValueError: the workdir is in a bucket, and the results would be in this machine's checkout.
    """
    folder = workdir / "results"
    if results := config.compare.results:
        folder = bucket.place(results, name="compare.results")
        if bucket.url_of(workdir) and not folder.is_absolute():
            raise ValueError(
                f"`compare.results`: the workdir is in a bucket, and `{results}` is a folder of "
                "this machine; give `--config.compare.results=gs://BUCKET/PATH`"
            )
    found, models = [], dict[str, dict[str, str]]()
    for seed in config.compare.seeds:
        for method in config.compare.methods:
            one = variant(config, method, seed)
            settings, at = read_settings(one), workdir / method / f"seed-{seed}"
            of = _depends_on(one, settings, models)
            found.append(Cell(method, seed, one, settings, at, folder, of))
    return found


def compare(config: FrozenConfigDict, workdir: Path, *, run: Run) -> str:
    """Runs every cell that has no result file and that nobody else runs; returns the table.

    An interrupted cell resumes in its workdir, which is not needed any more once there is a result
    file. Untrained models and players are evaluated once, with the first cell.

    Raises:
      ValueError: the workdir holds a run, a result file is of something else, or one of the runs
        cannot begin or go on (`check_run`).
    """
    check_comparison(workdir)
    cells = cells_of(config, workdir)
    for cell in cells:
        if not cell.is_done():
            check_run(cell.config, cell.settings, cell.workdir)
    if processes.is_first():
        others = [(path, read_cell(path)) for path in sorted(cells[0].folder.glob("*.json"))]
        check_one_table(
            [
                (cell.path, {"method": cell.method, "of": cell.of, "sets": cell.sets})
                for cell in cells
            ]
            + others
        )
    workdir.mkdir(parents=True, exist_ok=True)
    store_comparison(config, workdir)
    for cell in cells:
        if cell.is_done() and processes.is_first():
            _add_audit(cell)
    made_by = revision()  # before the first cell: the code on the disk may change meanwhile
    while _run_next(cells, run, made_by):
        pass
    return _tell(cells, workdir)


def _run_next(cells: Sequence[Cell], run: Run, made_by: Mapping[str, Any]) -> bool:
    """Runs the first cell that has no result and that nobody else runs; whether there was one."""
    is_first = True
    for cell in cells:
        if cell.is_done():
            continue
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_empty, cell.running)  # a killed process left it
            try:
                stack.enter_context(held(cell.running, name="compare.results", wait=False))
            except Held:  # that of a run's own workdir is an error, and is not caught
                is_first = False
                continue
            if not cell.is_done():  # somebody may have finished it just now
                _run_cell(cell, run, made_by, with_others=is_first)
            return True
    return False


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else holds it, or has removed it
        folder.rmdir()


def _run_cell(cell: Cell, run: Run, made_by: Mapping[str, Any], *, with_others: bool) -> None:
    """Runs a cell and writes its result file, and those of who is evaluated besides."""
    config = ConfigDict(cell.config.to_dict())
    of_others = cell.of_others
    missing = [
        who for who in config.eval.who if not _has_result(cell_path(cell.folder, who), of_others)
    ]
    config.eval.who = tuple(missing) if with_others else ()
    processes.say(f"--- {cell.method}, seed {cell.seed}")
    found = run(FrozenConfigDict(config), cell.workdir)
    if not processes.is_first():
        return
    for who in config.eval.who:
        others = {"method": who, "seed": None, "of": of_others, "made_by": made_by}
        write_cell(cell.folder, {**others, "final": found[who], "dev": None, "training": None})
    write_cell(cell.folder, _result(cell, found["after"], made_by))


def _result(cell: Cell, after: Mapping[str, Any], made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of a finished run."""
    settings, workdir = cell.settings, cell.workdir
    dev = read_summary(workdir / "summary.json").get("eval", {}).get("dev") or {}
    updates = settings.train.updates
    dev = {split: figures for split, figures in dev.items() if figures["update"] == updates}
    for split, figures in (*after.items(), *dev.items()):
        if figures and figures.get("digest") and "wins" not in figures:
            raise ValueError(
                f"`{workdir / 'summary.json'}`: the figures of {split!r} are of an older version, "
                "which did not store the success of each task; delete it, and the same command "
                "evaluates again"
            )
    return {
        **{"method": cell.method, "seed": cell.seed, "of": cell.of, "made_by": made_by},
        "sets": cell.sets,
        **{"final": after, "dev": dev or None},
        "training": training_figures(
            read_lines(workdir / "metrics.jsonl"),
            scored=settings.objective.needs_teacher and not settings.judges_what_it_scores,
            played=settings.data.source == "teacher",
        ),
    }


def _add_audit(cell: Cell) -> None:
    """Adds to a result what an audit of its workdir on dev says of the method's own weights."""
    settings, updates = cell.settings, cell.settings.train.updates
    found = read_summary(cell.workdir / "audit.json").get("after", {}).get(settings.eval.dev, {})
    share = found.get("weights", {}).get(_name_in_audit(settings), {}).get("reliable")
    if share is None or found["update"] != updates:
        return
    stored = read_cell(cell.path)
    if stored["training"]["reliable"] != share:
        write_cell(cell.folder, {**stored, "training": {**stored["training"], "reliable": share}})


def _name_in_audit(settings: Settings) -> str:
    """The name of a method's own weights in an audit; "" where they are of other turns.

    The turns of an audit are of whole episodes that the student alone plays from their beginning.
    """
    rollout, by = settings.rollout, settings.weight.by
    is_advised = settings.objective.needs_teacher and settings.data.source == "on_policy"
    is_whole = not (rollout.depth_start or rollout.teacher_plays or rollout.cut_repeated_failure)
    if not (is_advised and is_whole) or settings.data.only_success:
        return ""
    if by == "reliability" and settings.weight.teacher_labels == "record":
        return "reliability_proxy"
    return {"uniform": "opd", "intervention": "sage"}.get(by, by)


def _tell(cells: Sequence[Cell], workdir: Path) -> str:
    """The table so far, which is also written to `comparison.md`."""
    done = [cell for cell in cells if cell.is_done()]
    text = ""
    if done and processes.is_first():
        bucket.fetch(cells[0].folder)
        text = cells_table(read_cells(cells[0].folder), methods=[cell.method for cell in done])
        replace_text(workdir / "comparison.md", text + "\n")
        bucket.upload(workdir / "comparison.md")
    if missing := [f"{cell.method} {cell.seed}" for cell in cells if cell not in done]:
        text += f"\n\nOther processes are at: {', '.join(missing)}"
    return text.strip()


# --- What a result is of ------------------------------------------------------------------------


def _depends_on(
    config: FrozenConfigDict, settings: Settings, models: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """All that a result depends on, by name, as JSON holds it. All processes call it.

    `models` keeps what was read of models: the methods of a comparison have the same.
    """
    binds = binds_a_result(settings)
    judge = (settings.judge.model, settings.judge.prompt) if settings.asks_teacher else None
    key = repr((settings.student, settings.teacher, judge, settings.teacher_context))
    if key not in models:
        models[key] = fingerprints(settings)
    digests = {name: panel.digest for name, panel in panels(settings).items()}
    # A field that names a file or a model has its digest: a path is one machine's.
    of_files = dict(models[key])
    if settings.data.file:
        kind = settings.data.source.partition(":")[0]
        of_files["data.source"] = f"{kind}:{digests.pop(settings.data.source)}"
    given = {name: value for name, value in flatten(config).items() if binds(name)}
    fields = {name: of_files.get(name, value) for name, value in given.items()}
    named = {f"model.{who}": found for who, found in models[key].items()}
    tasks = {f"tasks.{split}": digest for split, digest in digests.items()}
    return json.loads(json.dumps(fields | named | tasks))


# What begins like this never was without a value. Other fields may be newer than a result.
ALWAYS = ("eval.", "model.", "tasks.")


def _has_result(path: Path, of: Mapping[str, Any]) -> bool:
    """Whether there is a result file; checks that it is of what `of` says."""
    problem, warning, there = "", "", False
    if processes.is_first():
        bucket.fetch(path)  # somebody else may have written it
    if processes.is_first() and path.exists():
        there, had = True, read_cell(path)["of"]
        for name in sorted(of):
            if name not in had and not name.startswith(ALWAYS):
                warning = f"`{path}` was made before there was `{name}`: taken for {of[name]!r}"
            elif (before := had.get(name, "absent")) != of[name]:
                problem = (
                    f"`{path}` is of another table: `{name}` was {before!r}, and is now "
                    f"{of[name]!r}; give another `compare.results`, or delete the file to run the "
                    "cell again"
                )
                break
    there, problem, warning = processes.first((there, problem, warning))
    if problem:
        raise ValueError(problem)
    if warning:
        processes.warn("%s", warning)
    return there


# --- The command --------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.compare`."""
    with reported():
        own: dict[str, Any] = dict(results=str, methods="")
        *_, flags = parse_command_line(
            argv, usage=__doc__, needs_config=False, needs_workdir=False, **own
        )
        cells = read_cells(bucket.place(flags["results"], name="--results"))
        chosen = [name.strip() for name in flags["methods"].split(",") if name.strip()]
        print_line(cells_table(cells, methods=chosen), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
