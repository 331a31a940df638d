"""Writes each update to `metrics.jsonl`, TensorBoard and standard output, and some episodes."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_jax.learner.nonfinite import is_finite
from opd_jax.report.episodes import (
    FOLDER,
    Episode,
    drop_later,
    scaled,
    update_file,
    write_episodes,
)
from opd_jax.report.stopwatch import Stopwatch
from opd_jax.report.update import check_finite, describe, update_metrics
from opd_jax.report.wandb import WandbWriter
from opd_jax.report.writers import EventWriter, JsonlWriter, read_lines
from opd_jax.runtime import processes, startup
from opd_jax.runtime.profile import Profile

_DEV = "eval/dev/"


@dataclass
class _SoFar:
    """What a run has done over all its starts, in the first process.

    Attributes:
      steps: of the optimizer. An update without a weight takes none.
      tokens: student tokens in all updates.
      wall_s: seconds of the starts before this one.
    """

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line; that of an evaluation counts nothing."""
        if "loss" not in line:
            return
        self.steps += not line.get("no_step")
        self.tokens += int(line.get("tokens/student", 0))


class UpdateLog:
    """Writes every update into a workdir and to standard output, in the first process only.

    Args:
      done: updates done before this start; lines of later ones are dropped.
      updates: length of the whole run.
      learning_rate: the rate of a step, by how many came before it (`optimizer.learning_rate`).
      leave_out: names of metrics to leave out (`update.unmeasured`).
      profile: numbers of the updates to trace into `profile/`.
      episodes_every: updates between two files of episodes, the first of update 1; 0: none.
      show: makes lines of a few of an update's episodes; for its arguments see `look`.
      blame: says where an update stops being finite, and makes lines of those episodes; arguments
        as of `show`. The update has to keep its state. None: nobody asks.
      wandb: project of Weights & Biases; "" for none.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        done: int,
        updates: int,
        learning_rate: Callable[[int], Any],
        leave_out: Collection[str],
        profile: Sequence[int],
        wandb: str,
        episodes_every: int,
        show: Callable[..., list[Episode]],
        blame: Callable[..., tuple[str, list[Episode]]] | None,
    ):
        self._workdir, self._updates, self._leave_out = workdir, updates, leave_out
        self._profile = Profile(workdir / "profile", profile, done=done)
        self._episodes_every, self._show, self._shown = episodes_every, show, list[Episode]()
        self._blame, self._of_update = blame, tuple[Any, ...]()
        self._clock, self._is_due, self._is_first = Stopwatch(), False, True
        self._learning_rate, self._so_far = learning_rate, _SoFar()
        self._writers: list[JsonlWriter | EventWriter | WandbWriter] = []
        if processes.is_first():
            resume_step = done or None
            drop_later(workdir / FOLDER, done)
            self._writers = [
                JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step),
                EventWriter(workdir / "events", resume_step=resume_step),
            ]
            if wandb:
                self._writers.append(WandbWriter(workdir, project=wandb, resume_step=resume_step))
            for line in read_lines(workdir / "metrics.jsonl"):
                self._so_far.add(line)
                self._so_far.wall_s = line.get("wall_s", self._so_far.wall_s)

    @contextlib.contextmanager
    def watch(self, update: int) -> Iterator[Stopwatch]:
        """A stopwatch for one update. A `ValueError` raised inside names the update."""
        self._profile.begin(update)
        self._clock = Stopwatch(f"update {update}: ")
        # The first too: it shows the untrained student, and no later update has a new program.
        every = self._episodes_every
        self._is_due = every > 0 and (update == 1 or update % every == 0)
        try:
            yield self._clock
        except ValueError as error:
            raise ValueError(f"update {update}: {error}") from error

    def look(self, *of_update: Any) -> None:
        """Looks at a few episodes if they are due, with the parameters that the update begins with.

        Call it before the update takes them. The arguments are those of `records.Show`.
        """
        if self._blame:
            self._of_update = of_update
        if self._is_due:
            with self._clock.measure("episodes"):
                self._shown = self._show(*of_update)

    def write(
        self, update: int, raw: Mapping[str, Any], played: Mapping[str, Any], clock: Stopwatch
    ) -> None:
        """Writes one update; for the arguments see `update.update_metrics`.

        Raises:
          ValueError: loss or norms are not finite. The line is written first.
        """
        self._profile.end(update)
        startup.reached("update")
        metrics = update_metrics(raw, played, clock, leave_out=self._leave_out) | self._of_start()
        metrics["learning_rate"] = float(self._learning_rate(self._so_far.steps))
        self._so_far.add(metrics)
        metrics["tokens/seen"] = float(self._so_far.tokens)
        metrics["wall_s"] = self._so_far.wall_s + startup.passed()
        for writer in self._writers:
            writer.write(update, metrics)
        where, of_update, self._of_update = "", self._of_update, ()
        file = update_file(self._workdir / FOLDER, update)
        if self._blame and not is_finite(raw):
            where, found = self._blame(*of_update)
            if found:  # in place of the batch's first episodes
                self._is_due, self._shown, where = True, found, f"{where}; see {file}"
        if self._is_due and processes.is_first():
            write_episodes(file, [scaled(line, float(raw["z"])) for line in self._shown])
        saved = (self._workdir / "checkpoints").resolve()
        check_finite(raw, update=update, checkpoints=saved if saved.exists() else None, where=where)
        processes.say(describe(metrics, update=update, updates=self._updates))

    def evaluated(self) -> dict[int, dict[str, Any]]:
        """The figures on dev so far, by update; of earlier starts too. All processes call it."""
        found: dict[int, dict[str, Any]] = {}
        if processes.is_first():
            for line in read_lines(self._workdir / "metrics.jsonl"):
                own = {k.removeprefix(_DEV): v for k, v in line.items() if k.startswith(_DEV)}
                if own:
                    found[own["update"]] = own
        return processes.first(found)

    def write_evaluation(self, update: int, figures: Mapping[str, Any]) -> None:
        """Writes the figures on dev of the student after `update`, as a line of their own."""
        for writer in self._writers:
            writer.write(update, {_DEV + name: value for name, value in figures.items()})
        number = f"{update:>{len(str(self._updates))}}/{self._updates}"
        low, high = figures["ci95"]
        share = f"{figures['success']:.1%} ({low:.1%} to {high:.1%})"
        processes.say(f"{number}  dev: success {share}, {figures['turns']:.1f} turns")

    def _of_start(self) -> dict[str, float]:
        """Seconds to what came first; nothing after the first line of a start."""
        is_first, self._is_first = self._is_first, False
        return startup.seconds() if is_first else {}

    def close(self) -> None:
        """Closes the files."""
        self._profile.close()
        for writer in self._writers:
            writer.close()
