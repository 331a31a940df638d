"""Finished or running runs, read back from their workdirs and grouped over seeds."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd_jax.report.intervals import average_interval
from opd_jax.report.writers import read_lines, read_summary
from opd_jax.runtime.exits import printed
from opd_jax.runtime.files import read_json


class Evaluation(NamedTuple):
    """A success rate with its 95 % interval, after so many updates."""

    update: int
    success: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      workdir: where it lies.
      name: its method in a comparison, else the workdir's name.
      config: the stored config, flat: dotted field to value.
      lines: its `metrics.jsonl`.
      results: `{who: {split: figures}}` of its `summary.json`.
    """

    workdir: Path
    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    results: dict[str, Any]

    def evaluations(self) -> Iterator[tuple[str, Evaluation]]:
        """(split, evaluation) of the student: before training, during it, and after it."""
        for who in ("before", "after"):
            for split, figures in self.results.get(who, {}).items():
                if figures:
                    yield split, _evaluation(figures.get("update", 0), figures)
        for line in self.lines:
            for name in line:
                room, _, rest = name.partition("/")
                split, _, figure = rest.rpartition("/")
                if room == "eval" and figure == "success":
                    found = {key: line.get(f"eval/{split}/{key}") for key in ("success", "ci95")}
                    yield split, _evaluation(line["step"], found)


def _evaluation(update: int, figures: Mapping[str, Any]) -> Evaluation:
    low, high = figures.get("ci95") or (math.nan, math.nan)
    return Evaluation(update, figures["success"], low, high)


@dataclass(frozen=True)
class Group:
    """Runs that differ only by their seed.

    Attributes:
      label: what a legend calls them.
      runs: one a seed.
    """

    label: str
    runs: list[Run]

    @cached_property
    def updates(self) -> np.ndarray:
        """Numbers of the updates of the longest run, [U]."""
        return np.arange(1, 1 + max(line["step"] for run in self.runs for line in run.lines))

    def curve(self, key: str) -> np.ndarray:
        """A metric by seed and update, [runs, U]; NaN where there is none."""
        found = np.full((len(self.runs), len(self.updates)), np.nan)
        for row, run in enumerate(self.runs):
            for line in run.lines:
                if (value := line.get(key)) is not None:
                    found[row, line["step"] - 1] = value
        return found

    def by_turn(self, key: str) -> np.ndarray:
        """`by_turn/KEY`, averaged over seeds, [K, U]; NaN where no episode got that far."""
        name = f"by_turn/{key}"
        lists = [line.get(name) or [] for run in self.runs for line in run.lines]
        found = np.full((len(self.runs), max(map(len, lists)), len(self.updates)), np.nan)
        for row, run in enumerate(self.runs):
            for line in run.lines:
                values = line.get(name) or []
                found[row, : len(values), line["step"] - 1] = np.array(values, np.float64)
        return mean(found)

    def evaluations(self) -> dict[str, list[Evaluation]]:
        """Each split's evaluations by update. Seeds count alike, also for the interval."""
        found: dict[str, dict[int, list[Evaluation]]] = {}
        for run in self.runs:
            for split, one in run.evaluations():
                found.setdefault(split, {}).setdefault(one.update, []).append(one)
        return {
            split: [_pooled(by_update[update]) for update in sorted(by_update)]
            for split, by_update in found.items()
        }


def _pooled(seeds: Sequence[Evaluation]) -> Evaluation:
    success = float(np.mean([one.success for one in seeds]))
    return Evaluation(seeds[0].update, success, *average_interval([one[1:] for one in seeds]))


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0).sum(axis=0)
    return np.where(there.any(axis=0), total / np.maximum(there.sum(axis=0), 1), np.nan)


def read_groups(workdirs: Sequence[Path]) -> list[Group]:
    """The runs of workdirs, those of a comparison too, in order, grouped over seeds.

    Raises:
      ValueError: a workdir holds no update of a run.
    """
    groups: dict[str, list[Run]] = {}
    for workdir in workdirs:
        for run in _read(workdir):
            # A comparison evaluates the untrained ones only once.
            alike = {k: v for k, v in run.config.items() if k not in ("seed", "eval.who")}
            groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    return _labelled(list(groups.values()))


def _read(workdir: Path) -> list[Run]:
    """The run of a workdir, or the runs of a comparison."""
    files = [workdir / "metrics.jsonl"]
    if is_comparison := not files[0].exists():
        files = sorted(workdir.glob("*/seed-*/metrics.jsonl"))
    runs = []
    for file in files:
        at = file.parent
        lines = read_lines(file)
        if not lines:
            continue
        results = read_summary(at / "summary.json").get("eval", {})
        config = _flat(read_json(at / "config.json"))
        runs.append(Run(at, (at.parent if is_comparison else at).name, config, lines, results))
    if not runs:
        raise ValueError(
            f"`--workdir`: `{workdir}` holds no run with a finished update; expected its "
            "metrics.jsonl, or METHOD/seed-N of a comparison"
        )
    others = {who: found for run in runs for who, found in run.results.items() if who != "after"}
    for run in runs:  # seeds and methods of a comparison begin with the same student
        run.results.update(others | run.results)
    return runs


def _labelled(groups: Sequence[list[Run]]) -> list[Group]:
    """Groups named by their runs; where two would be alike, by the folder above too."""
    names = [runs[0].name for runs in groups]
    for place, runs in enumerate(groups):
        if len({run.name for run in runs}) > 1:  # such as `opd-0` and `opd-1`
            names[place] = _common(runs) or names[place]
    labels = []
    for place, runs in enumerate(groups):
        at = runs[0].workdir
        above = (at.parents[1] if at.parent.name == names[place] else at.parent).name
        labels.append(names[place] if names.count(names[place]) == 1 else f"{above}/{names[place]}")
    for place, label in enumerate(labels):
        if labels.count(label) > 1:
            labels[place] = printed(str(groups[place][0].workdir))
    return [Group(label, runs) for label, runs in zip(labels, groups, strict=True)]


def _common(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    same = next((n for n in range(len(names[0]), 0, -1) if len({x[:n] for x in names}) == 1), 0)
    return names[0][:same].rstrip("-_. ")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changed_fields(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The config fields in which groups differ, as rows of a table: `field` and each label."""
    configs = [group.runs[0].config for group in groups]
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        {"field": name}
        | {g.label: str(c.get(name, "")) for g, c in zip(groups, configs, strict=True)}
        for name in names
        if name not in ("seed", "eval.who")
        and len({json.dumps(config.get(name)) for config in configs}) > 1
    ]
