"""Weights & Biases beside a run: a process that copies `metrics.jsonl` (`wandb_copy`)."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opd_jax.runtime import processes

# In the workdir: what W&B says.
LOG = "wandb.log"
# After so long without an answer it is said that there is none.
SILENT_S = 60.0
# How long the end of a run waits for the last lines to be taken.
FAREWELL_S = 20.0


def check_installed(project: str) -> None:
    """Checks that W&B can be used, if it is asked for; ValueError otherwise."""
    if project and find_spec("wandb") is None:
        raise ValueError(
            f"`wandb` = {project!r} needs the package wandb, which is not installed: pip install "
            "'opd-jax[wandb]', or set `wandb` to ''"
        )


class WandbWriter:
    """Has a run's lines copied to Weights & Biases; a resumed run goes on in the same W&B run.

    Nothing here waits, except `close` for at most `FAREWELL_S`. If the service fails or hangs, that
    is said once and the run goes on: `metrics.jsonl` has everything.

    Args:
      workdir: where `metrics.jsonl` is, which exists.
      project: W&B's name for what a run belongs to.
      resume_step: the update that the run goes on from; None begins a new W&B run.
    """

    def __init__(self, workdir: Path, *, project: str, resume_step: int | None):
        self._workdir, self._has_said = workdir, False
        self._taken = resume_step or 0
        self._waits_since: float | None = None
        words = [workdir, project, resume_step or 0]
        with (workdir / LOG).open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opd_jax.report.wandb_copy", *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"WANDB_SILENT": "true", **os.environ},
                start_new_session=True,  # Ctrl-C is the run's, which then closes this
            )
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        """The thread: notes which updates were taken."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # W&B's own words
                self._taken = max(self._taken, int(line))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Looks whether the copy keeps up with what was written before."""
        now = time.monotonic()
        if self._process.poll() is not None:
            self._say(f"ended with status {self._process.returncode}")
        elif self._taken >= step - 1 or self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since > SILENT_S:
            self._say(f"has taken nothing for {now - self._waits_since:.0f} s")

    def close(self) -> None:
        """Waits until the service has taken everything, but not for long."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            if self._process.wait(FAREWELL_S):
                self._say(f"ended with status {self._process.returncode}")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say(f"did not take the last lines within {FAREWELL_S:.0f} s")

    def _say(self, what: str) -> None:
        if not self._has_said:
            self._has_said = True
            processes.say(
                f"Weights & Biases {what}: the run goes on without it. metrics.jsonl has every "
                f"line, and {self._workdir / LOG} says more"
            )
