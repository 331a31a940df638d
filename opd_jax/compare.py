"""Runs several methods over several seeds from one config, and makes one table of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config.settings import read_settings
from opd_jax.config.workdir import check_comparison, check_run, store_comparison
from opd_jax.report.intervals import mean_interval, wilson_interval
from opd_jax.report.tables import split_label, table
from opd_jax.report.writers import write_summary
from opd_jax.runtime import processes
from opd_jax.runtime.exits import reported
from opd_jax.runtime.files import replace_text
from opd_jax.runtime.lease import held

Run = Callable[[FrozenConfigDict, Path], dict[str, Any]]


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


def compare(config: FrozenConfigDict, workdir: Path, *, run: Run) -> str:
    """Runs every method with every seed, then writes and returns the table.

    Runs go seed by seed, so an interrupted comparison has all methods equally often. Each has its
    own workdir `METHOD/seed-N` and resumes there. Untrained models and players are evaluated once.

    `run` trains and evaluates one config in one workdir and returns `{who: {split: figures}}`.

    Raises:
      ValueError: the workdir holds a run, or one of the runs cannot begin or go on (`check_run`).
    """
    check_comparison(workdir)
    for method in config.compare.methods:
        for seed in config.compare.seeds:
            one = variant(config, method, seed)
            check_run(one, read_settings(one), workdir_of(workdir, method, seed))
    with held(workdir) as workdir:
        store_comparison(config, workdir)
        return _compare(config, workdir, run)


def workdir_of(workdir: Path, method: str, seed: int) -> Path:
    """The workdir of one run of the comparison."""
    return workdir / method / f"seed-{seed}"


def _compare(config: FrozenConfigDict, workdir: Path, run: Run) -> str:
    references: dict[str, Any] = {}
    results: dict[str, list[dict]] = {method: [] for method in config.compare.methods}
    for seed in config.compare.seeds:
        for method in config.compare.methods:
            one = ConfigDict(variant(config, method, seed).to_dict())
            if references:
                one.eval.who = ()
            processes.say(f"--- {method}, seed {seed}")
            found = run(FrozenConfigDict(one), workdir_of(workdir, method, seed))
            references = references or {w: r for w, r in found.items() if w != "after"}
            results[method].append(found["after"])
    write_summary(workdir / "summary.json", {"eval": references, "compare": results})
    text = comparison_table(references, results, judge=judge_figures(config, workdir))
    if processes.is_first():
        replace_text(workdir / "comparison.md", text + "\n")
    return text


def comparison_table(
    references: Mapping[str, Any], results: Mapping[str, Sequence[dict]], *, judge: Mapping
) -> str:
    """A Markdown table with a row for each reference and each method.

    A method has two intervals. Wilson's is over all episodes and takes them as independent,
    although seeds share their tasks. Student's is over seeds; it is wide with few of them. A cell
    is `-` where figures are missing: an earlier start may have played other splits.

    Args:
      references: `{who: {split: figures}}`, with figures from `figures.summarize`.
      results: method to `{split: figures}` of each seed; at least one method and one seed.
      judge: method to further cells, from `judge_figures`.
    """
    figures = next(iter(results.values()))[0]
    labels = {split: split_label(split, figures[split]) for split in figures if figures[split]}
    last = list(labels)[-1]
    score, turns, repeated = (f"{name}, {labels[last]}" for name in ("score", "turns", "repeated"))
    rows = []
    for who, result in references.items():
        row: dict[str, str | None] = dict.fromkeys((*labels.values(), score))
        row["method"] = who
        for split, label in labels.items():
            if one := result.get(split):
                row[label] = f"{one['success']:.1%} {_interval(one['ci95'])}"
        if one := result.get(last):
            row[score] = f"{one['score']:.2f}"
        rows.append(row)
    for method, runs in results.items():
        row = dict.fromkeys((*labels.values(), score, turns, repeated))
        row["method"] = method
        for split, label in labels.items():
            if not all(run.get(split) for run in runs):
                continue
            shares = [run[split]["success"] for run in runs]
            n = sum(run[split]["n"] for run in runs)
            wins = round(sum(s * n / len(runs) for s in shares))
            cell = f"{np.mean(shares):.1%} {_interval(wilson_interval(wins, n))}"
            if len(shares) > 1:
                cell += f"; seeds {_interval(mean_interval(shares))}"
            row[label] = cell
        if all(run.get(last) for run in runs):
            row[score] = f"{np.mean([run[last]['score'] for run in runs]):.2f}"
            row[turns] = f"{np.mean([run[last]['turns'] for run in runs]):.1f}"
            row[repeated] = f"{np.mean([run[last]['repeated'] for run in runs]):.1%}"
        row |= judge.get(method, {})
        rows.append(row)
    lasts = [run[last] for runs in results.values() for run in runs if run.get(last)]
    # Scores are shown where they say more than success.
    scored = [score] if any(found["score"] != found["success"] for found in lasts) else []
    columns = ["method", *labels.values(), *scored, turns, repeated]
    columns += ["skipped", "judge precision", "judge recall"]
    return table([{c: row.get(c, "") for c in columns} for row in rows], columns)


def _interval(ends: Sequence[float]) -> str:
    """An interval of a share, cut to [0, 1]."""
    return f"[{max(ends[0], 0):.1%}, {min(ends[1], 1):.1%}]"


def judge_figures(config: FrozenConfigDict, workdir: Path) -> dict[str, dict[str, str]]:
    """Method to `{column: cell}`: skipped turns, and the judge's precision and recall.

    They are pooled over the turns of all updates and seeds, from `METHOD/seed-N/metrics.jsonl` in
    the workdir. Methods that ask no judge are left out.
    """
    # Column: name of a share in an update's line, and of the count that it is a share of.
    names = {
        "skipped": ("verdict/skip", "batch/turns"),
        "judge precision": ("judge/precision", "judge/corrected"),
        "judge recall": ("judge/recall", "judge/wrong"),
    }
    figures = {}
    for method in config.compare.methods:
        lines = [
            json.loads(line)
            for seed in config.compare.seeds
            for line in (workdir_of(workdir, method, seed) / "metrics.jsonl").open()
        ]
        pooled = {}
        for column, (share, whole) in names.items():
            pairs = [(line[share], line[whole]) for line in lines if share in line]
            if total := sum(count for _, count in pairs):
                pooled[column] = f"{sum(part * count for part, count in pairs) / total:.1%}"
        if pooled:
            figures[method] = pooled
    return figures


if __name__ == "__main__":
    with reported():
        raise ValueError(
            "`train` runs a comparison, where `compare.methods` names methods: "
            "python -m opd_jax.train --config=quickstart:compare --workdir=DIR"
        )
