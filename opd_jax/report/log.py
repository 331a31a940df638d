"""What a run says of each update: in `metrics.jsonl`, to TensorBoard and on standard output."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_jax.report.stopwatch import Stopwatch
from opd_jax.report.update import check_finite, describe, update_metrics
from opd_jax.report.writers import EventWriter, JsonlWriter
from opd_jax.runtime import processes


class UpdateLog:
    """Writes every update into a workdir and to standard output.

    Args:
      workdir: of the run.
      done: updates that the run resumes after; lines of later ones are dropped.
      updates: of the whole run.
      leave_out: metrics that are not measured; see `update.unmeasured`.
    """

    def __init__(self, workdir: Path, *, done: int, updates: int, leave_out: Collection[str]):
        self._workdir, self._updates, self._leave_out = workdir, updates, leave_out
        how: dict[str, Any] = dict(resume_step=done or None, write=processes.is_first())
        self._lines = JsonlWriter(workdir / "metrics.jsonl", **how)
        self._events = EventWriter(workdir / "events", **how)

    @contextlib.contextmanager
    def watch(self, update: int) -> Iterator[Stopwatch]:
        """A stopwatch for one update. A `ValueError` raised inside names the update."""
        try:
            yield Stopwatch()
        except ValueError as error:
            raise ValueError(f"update {update}: {error}") from error

    def write(
        self, update: int, raw: Mapping[str, Any], played: Mapping[str, Any], clock: Stopwatch
    ) -> None:
        """Writes one update; arguments as of `update.update_metrics`.

        Raises:
          ValueError: the update left the finite numbers. Its line is written all the same.
        """
        metrics = update_metrics(raw, played, clock, leave_out=self._leave_out)
        self._lines.write(update, metrics)
        self._events.write(update, metrics)
        check_finite(raw, update=update, checkpoints=(self._workdir / "checkpoints").resolve())
        processes.say(describe(metrics, update=update, updates=self._updates))

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._events.close()
