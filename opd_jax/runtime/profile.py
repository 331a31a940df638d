"""A trace of some updates, written by `jax.profiler` for XProf, TensorBoard or Perfetto."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax

from opd_jax.runtime import processes


def updates_to_profile(text: str, *, updates: int) -> range:
    """The updates that `--profile=FROM:TO` names, the last included; none for "".

    Raises:
      ValueError: they are no updates of a run of so many `updates`.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= updates:
        raise ValueError(
            "flag `--profile` expects FROM:TO, numbers of updates with 1 <= FROM <= TO <= "
            f"`train.updates` = {updates}; got `{text}`"
        )
    return range(first, last + 1)


class Profile:
    """Traces updates of a run, in the first process only: the others run the same programs.

    Python calls are left out. An environment makes millions of them, and they would slow it down.

    Args:
      folder: gets the trace; it is made.
      updates: numbers of the updates, without a gap.
      done: updates done before this start; these cannot be traced any more.
    """

    def __init__(self, folder: Path, updates: Sequence[int], *, done: int):
        self._folder, self._updates, self._is_running = folder, updates, False
        if updates and updates[0] <= done:
            processes.warn("`--profile`: updates up to %d are done already, not traced", done)

    def begin(self, update: int) -> None:
        """Starts the trace, if this is the first of its updates."""
        if update in self._updates and not self._is_running and processes.is_first():
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_running = True

    def end(self, update: int) -> None:
        """Writes the trace, if this is the last of its updates."""
        if update not in self._updates[:-1]:
            self.close()

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
            processes.say(f"the trace is in {self._folder}")
