"""Writes each update to `metrics.jsonl`, to TensorBoard and to standard output."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.report.stopwatch import Stopwatch
from opd_jax.report.update import check_finite, describe, update_metrics
from opd_jax.report.writers import EventWriter, JsonlWriter
from opd_jax.runtime import processes, startup
from opd_jax.runtime.profile import Profile


class UpdateLog:
    """Writes every update into a workdir and to standard output, in the first process only.

    Args:
      done: updates done before this start; lines of later ones are dropped.
      updates: length of the whole run.
      leave_out: names of metrics to leave out (`update.unmeasured`).
      profile: numbers of the updates to trace into `profile/`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        done: int,
        updates: int,
        leave_out: Collection[str],
        profile: Sequence[int],
    ):
        self._workdir, self._updates, self._leave_out = workdir, updates, leave_out
        self._profile = Profile(workdir / "profile", profile, done=done)
        self._is_first = True
        self._writers: list[JsonlWriter | EventWriter] = []
        if processes.is_first():
            resume_step = done or None
            self._writers = [
                JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step),
                EventWriter(workdir / "events", resume_step=resume_step),
            ]

    @contextlib.contextmanager
    def watch(self, update: int) -> Iterator[Stopwatch]:
        """A stopwatch for one update. A `ValueError` raised inside names the update."""
        self._profile.begin(update)
        try:
            yield Stopwatch(f"update {update}: ")
        except ValueError as error:
            raise ValueError(f"update {update}: {error}") from error

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
        for writer in self._writers:
            writer.write(update, metrics)
        check_finite(raw, update=update, checkpoints=(self._workdir / "checkpoints").resolve())
        processes.say(describe(metrics, update=update, updates=self._updates))

    def _of_start(self) -> dict[str, float]:
        """Seconds to what came first; nothing after the first line of a start."""
        is_first, self._is_first = self._is_first, False
        return startup.seconds() if is_first else {}

    def close(self) -> None:
        """Closes the files."""
        self._profile.close()
        for writer in self._writers:
            writer.close()
