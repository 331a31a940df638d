"""Result files of a table of methods, one a cell, and the table that is made of them alone.

A cell is one method with one seed: `METHOD-SEED.json`. Who is evaluated besides, such as the
untrained student, has a file `WHO.json`. `compare` writes them (docs/table.md).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.report.intervals import mean_interval, wilson_interval
from opd_jax.report.tables import split_label, table
from opd_jax.report.writers import jsonable
from opd_jax.runtime import bucket
from opd_jax.runtime.files import read_json, replace_text

# What all others are compared with.
BASELINE = "opd"
# How a file is mended.
_ADVICE = "delete it, and `train` makes it again"


# --- Files ----------------------------------------------------------------------------------------


def cell_path(folder: Path, method: str, seed: int | None = None) -> Path:
    """The file of a cell; without a seed, of somebody who is evaluated besides."""
    return folder / (f"{method}.json" if seed is None else f"{method}-{seed}.json")


def write_cell(folder: Path, cell: Mapping[str, Any]) -> None:
    """Writes a result file, its keys in alphabetical order.

    Args:
      folder: the table's; it is created.
      cell: `method`, `seed` (None: somebody evaluated besides); `of`, all that the figures depend
        on, by name; `made_by` (`revision`); `final` and `dev`, `{split: figures}` of
        `figures.summarize`; `training` (`training_figures`), None without;
        `sets`, the config fields that the method sets, where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**cell, "digest": digest(cell["of"])}
    text = json.dumps(jsonable(whole), indent=1, sort_keys=True, allow_nan=False)
    path = cell_path(folder, cell["method"], cell["seed"])
    replace_text(path, text + "\n")
    bucket.upload(path)


def digest(of: Mapping[str, Any]) -> str:
    """A hash of what a cell's figures depend on: of the config's fields, models and tasks."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def read_cell(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
      ValueError: it is none, or it was edited.
    """
    cell = read_json(path, advice=_ADVICE)
    needed = {"method", "seed", "of", "made_by", "final", "dev", "training", "digest"}
    if missing := sorted(needed - cell.keys()):
        raise ValueError(f"`{path}` is no result file: it has no `{missing[0]}`; move it away")
    if digest(cell["of"]) != cell["digest"]:
        raise ValueError(f"`{path}`: `of` was edited, its digest is another; {_ADVICE}")
    return cell


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All result files of a folder. They are of one table.

    Raises:
      ValueError: there is none, one is not a result file, or two do not belong in one table: they
        have other tasks, models or budgets, or one method's have other fields.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"`{folder}` has no result file (METHOD-SEED.json); `train` makes them")
    cells = [read_cell(path) for path in paths]
    check_one_table(list(zip(paths, cells, strict=True)))
    return cells


def check_one_table(cells: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Checks that cells, each with its path, belong in one table; ValueError as `read_cells`.

    A field that only one of two cells has came with later code. That is said where cells are run.
    """
    known: dict[tuple[str, str], tuple[Path, Any]] = {}
    for path, cell in cells:
        for name, value in sorted(cell["of"].items()):
            own = name.startswith(_TRAINING) and name in cell.get("sets", ())
            group = "" if name.startswith((*_SHARED, *_TRAINING)) and not own else cell["method"]
            first, before = known.setdefault((group, name), (path, value))
            if before != value:
                raise ValueError(
                    f"`{first}` and `{path}` are not of one table: `{name}` is {before!r} in the "
                    f"first and {value!r} in the second; give one a folder of its own"
                )


# What begins like this is the same in all cells of a table.
_SHARED = ("model.", "tasks.", "eval.", "env.")
# And this, but where a method sets it.
_TRAINING = ("train.", "optimizer.", "rollout.batch")


# --- Figures of a run's training ------------------------------------------------------------------


def training_figures(
    lines: Sequence[Mapping[str, Any]], *, scored: bool, played: bool
) -> dict[str, Any]:
    """What a cell says of its training, from the lines of `metrics.jsonl`.

    Args:
      lines: of all updates; those of evaluations are left out.
      scored: the teacher reads every row to score it. Not so where nobody scores, or where the
        judge has read it.
      played: the teacher plays the episodes.

    Returns:
      updates: their number.
      seconds: of rollouts, judging and updates, without compiling and evaluating.
      active_tokens: share of the student's tokens with a weight above 0.
      teacher_tokens: read by the teacher to score, to judge, and where it plays or takes turns,
        where it also samples; as far as there are metrics.
      precision, recall: of the judge, as (part, whole) over the turns of all updates.
      reliable: share of the weight on turns where the teacher is right; None: nobody has asked.
    """
    lines = [line for line in lines if "loss" in line]

    def total(*names: str) -> float:
        return float(sum(line.get(name) or 0.0 for line in lines for name in names))

    def mean(share: str, whole: str) -> tuple[float, float]:
        pairs = [(line[share], line[whole]) for line in lines if line.get(share) is not None]
        return float(sum(s * n for s, n in pairs)), float(sum(n for _, n in pairs))

    read = [line.get("tokens/teacher", line.get("tokens/sequence", 0.0)) for line in lines]
    by_teacher = ("tokens/by_teacher", "tokens/read_by_teacher")
    own = total(*(("tokens/sequence",) if played else by_teacher))
    return {
        "updates": len(lines),
        "seconds": total("seconds/rollout", "seconds/judge", "seconds/update"),
        "active_tokens": _ratio(*mean("active_tokens", "tokens/student")),
        "teacher_tokens": {
            "scoring": float(sum(read)) if scored else 0.0,
            "judging": total("tokens/judge"),
            "playing": own + sum(map(_own_turns, lines)),
        },
        "precision": mean("judge/precision", "judge/corrected"),
        "recall": mean("judge/recall", "judge/wrong"),
        "reliable": None,
    }


def _own_turns(line: Mapping[str, Any]) -> float:
    """Tokens that the teacher read and sampled for own turns (`reliability`), in one update."""
    asked = line.get("reliability/asked", 0.0) * sum(filter(None, line.get("by_turn/turns", ())))
    return asked * (line.get("reliability/read", 0.0) + line.get("reliability/sampled", 0.0))


# --- The table ------------------------------------------------------------------------------------


def differences(ours: Mapping[int, str], theirs: Mapping[int, str]) -> np.ndarray:
    """How much oftener we succeed, by seed and task.

    Args:
      ours, theirs: `wins` of the same tasks (`figures.summarize`), by seed.

    Returns:
      float [S, T], -1, 0 or 1: of the seeds that both have, and the tasks that broke in none.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = np.array([[list(ours[seed]), list(theirs[seed])] for seed in seeds])
    if not seeds:
        return np.zeros((0, 0))
    whole = (pairs != "-").all(axis=(0, 1))
    won = pairs[:, :, whole] == "1"
    return won[:, 0].astype(float) - won[:, 1]


def difference_cell(found: np.ndarray) -> str | None:
    """A mean difference in points with its intervals; None without a pair.

    The first is over tasks: Student's, of the mean over seeds of each task. It holds for the
    students that were trained. The second, from two seeds on, is over the seeds' means: it holds
    for further seeds, and it is wide.
    """
    if not found.size:
        return None
    cell = f"{100 * found.mean():+.1f} {_points(mean_interval(found.mean(axis=0)))}"
    if len(found) > 1:
        cell += f"; seeds {_points(mean_interval(found.mean(axis=1)))}"
    return cell


def cells_table(cells: Sequence[Mapping[str, Any]], *, methods: Sequence[str] = ()) -> str:
    """A Markdown table with a row for each method, that of most success on dev first.

    Args:
      cells: of one table (`read_cells`).
      methods: those to show; () for all. Who is evaluated besides is always shown.

    Raises:
      ValueError: there is no cell of a method.
    """
    rows = _by_method(cells)
    if unknown := [method for method in methods if method not in rows]:
        raise ValueError(
            f"`--methods`: there is no result of {unknown[0]!r}, only {', '.join(rows)}"
        )
    splits = {split: label for cell in cells for split, label in _labels(cell).items()}
    last = [split for split in splits if any(_wins([cell], split) for cell in cells)][-1]
    baseline = _wins(rows.get(BASELINE, []), last)
    shown = [
        _row(method, own, splits, last=last, baseline=None if method == BASELINE else baseline)
        for method, own in rows.items()
        if not methods or method in methods or own[0]["seed"] is None
    ]
    final = [*splits.values()]
    scored = [f"score, {splits[last]}"] if any(_says_more(cell, last) for cell in cells) else []
    columns = ["method", "seeds", "dev", *final, *scored, f"− {BASELINE}, {splits[last]}"]
    columns += ["on right advice", "precision", "recall", "failed", "repeated", "active tokens"]
    columns += ["teacher tokens", "seconds"]
    return table(shown, columns) + "\n\n" + _makers(cells)


def _by_method(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Cells of each row: first who is evaluated besides, then methods by success on dev."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["method"], cell["seed"] or 0)):
        rows.setdefault(cell["method"], []).append(cell)

    def place(method: str) -> tuple[bool, float, str]:
        return rows[method][0]["seed"] is not None, -(_mean(_dev(rows[method])) or 0.0), method

    return {method: rows[method] for method in sorted(rows, key=place)}


def _row(
    method: str,
    cells: Sequence[Mapping[str, Any]],
    splits: Mapping[str, str],
    *,
    last: str,
    baseline: Mapping[int, str] | None,
) -> dict[str, str | None]:
    trained = [cell["training"] for cell in cells if cell["training"]]
    finals = [cell["final"].get(last) for cell in cells]
    played: list[Mapping[str, Any]] = [figures for figures in finals if figures]
    row: dict[str, str | None] = {
        "method": method,
        "seeds": ", ".join(str(cell["seed"]) for cell in cells) if trained else None,
        "dev": _percent(_mean(_dev(cells))),
        **{label: _success(cells, split) for split, label in splits.items()},
        f"score, {splits[last]}": _decimal(_mean([figures["score"] for figures in played])),
        "failed": _percent(_mean([figures["failed"] for figures in played])),
        "repeated": _percent(_mean([figures["repeated"] for figures in played])),
    }
    if baseline and trained:
        difference = differences(_wins(cells, last), baseline)
        row[f"− {BASELINE}, {splits[last]}"] = difference_cell(difference)
    if trained:
        tokens = [sum(one["teacher_tokens"].values()) for one in trained]
        row |= {
            "on right advice": _percent(_mean([one["reliable"] for one in trained])),
            "active tokens": _percent(_mean([one["active_tokens"] for one in trained])),
            "teacher tokens": f"{np.mean(tokens) / 1e6:.2f} M",
            "seconds": f"{np.mean([one['seconds'] for one in trained]):.0f}",
        }
        for name in ("precision", "recall"):
            part, whole = np.sum([one[name] for one in trained], axis=0)
            row[name] = _percent(_ratio(part, whole))
    return row


def _success(cells: Sequence[Mapping[str, Any]], split: str) -> str | None:
    """Mean success with Wilson's interval for as many episodes as one seed plays.

    Seeds share their tasks, so their episodes are not as many independent ones.
    """
    figures = [cell["final"].get(split) for cell in cells]
    if not all(figures):
        return None
    share = float(np.mean([one["success"] for one in figures]))
    if "wins" not in figures[0]:  # a mean over splits
        return f"{share:.1%}"
    n = min(one["n"] for one in figures)
    low, high = wilson_interval(round(share * n), n)
    return f"{share:.1%} [{low:.1%}, {high:.1%}]"


def _dev(cells: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Success on the split of dev, of each cell."""
    return [next((f["success"] for f in (cell["dev"] or {}).values()), None) for cell in cells]


def _wins(cells: Sequence[Mapping[str, Any]], split: str) -> dict[int, str]:
    """Successes by seed, of the cells that have played the split."""
    found = {cell["seed"]: cell["final"].get(split) or {} for cell in cells}
    return {seed: figures["wins"] for seed, figures in found.items() if "wins" in figures}


def _labels(cell: Mapping[str, Any]) -> dict[str, str]:
    """The splits in the order in which the config names them, then means over them."""
    final = cell["final"]
    order = [*cell["of"]["eval.splits"], *final]
    return {split: split_label(split, final[split]) for split in order if final.get(split)}


def _says_more(cell: Mapping[str, Any], split: str) -> bool:
    figures = cell["final"].get(split)
    return bool(figures) and figures["score"] != figures["success"]


def _makers(cells: Sequence[Mapping[str, Any]]) -> str:
    """What the cells were made by, in lines."""
    counts: dict[str, int] = {}
    for cell in cells:
        made = cell["made_by"]
        code = made["commit"][:12] or f"sources {made['sources']}"
        changed = f" with uncommitted changes (sources {made['sources']})"
        name = f"{code}{changed if made['uncommitted'] else ''}, jax {made['jax']}, "
        name += made["processor"]
        counts[name] = counts.get(name, 0) + 1
    return "\n".join(f"{number} made by {name}." for name, number in sorted(counts.items()))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of all; None if one is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _points(ends: tuple[float, float]) -> str:
    if math.isnan(ends[0]):
        return "[-, -]"
    return f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]"
