"""The processes of one run: how they start, what they exchange, how they end.

Every process runs the same program on the same host data. Only two things are divided among them:
devices, through the arrays' shardings, and environments, each of which lives in one process
(`owns`). `share` gives the environments' answers to all processes. So all of them hold the same
conversations, make the same decisions and start the same compiled programs.
"""

import contextlib
import functools
import logging
import os
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from opd_jax.runtime.exits import (
    INTERRUPTED,
    MISTAKE,
    WORLD,
    Stopped,
    WorldFailed,
    explain,
    print_error,
)

VARIABLE = "OPD_JAX_DISTRIBUTED"
# If a process dies, the others end within about this time. CPU processes have direct connections
# and notice at once.
HEARTBEAT_TIMEOUT_S = 60
# How long a process that found a user's mistake waits for the others to find the same one.
_FAREWELL_S = 10
# Messages are padded to a power of two of at least this, since each size compiles a program.
_LEAST_BYTES = 1024

# How JAX's errors begin when another process has ended.
_BROKEN_CONNECTION = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)

T = TypeVar("T")


def start() -> None:
    """Joins the run's other processes if the environment variable `OPD_JAX_DISTRIBUTED` is set.

    A command calls this before anything touches a device. The variable holds

      auto                        on a cluster that JAX knows: Cloud TPU, TPUs on GKE, Slurm
      HOST:PORT,PROCESS,PROCESSES process 0's address, this process's number, the number of all

    If the others do not join within five minutes, JAX prints its own message and ends the process.

    Raises:
      ValueError: the variable holds anything else.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return
    # This service would catch SIGTERM, on which a run has to save and end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        where = _where(text)
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"`{VARIABLE}` = {text!r}: expected auto on a cluster that JAX knows, or "
            f"HOST:PORT,PROCESS,PROCESSES with process 0 at HOST:PORT; {error}"
        ) from None


def _where(text: str) -> dict[str, Any]:
    if text == "auto":
        return {}
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
        raise ValueError("it is neither")
    process, processes = map(int, numbers)
    return dict(coordinator_address=address, process_id=process, num_processes=processes)


class LostProcesses(WorldFailed):
    """Another process of the run has ended or cannot be reached."""


def is_lost(error: BaseException) -> bool:
    """Whether an error, our own or JAX's, may mean that another process has ended."""
    lost = isinstance(error, LostProcesses) or bool(_BROKEN_CONNECTION.match(str(error)))
    return lost and jax.distributed.is_initialized()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Runs a command so that no process of a run outlives another.

    A process that fails ends at once; the others notice and end too. An ordinary exit would wait
    for all processes, and some of them wait for this one. If Python is first to notice that another
    process is lost, we print one line that says what to do. If JAX's client is first, it prints its
    own message ("another task died") and aborts the process.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        _end(error)


def _end(error: BaseException) -> NoReturn:
    sys.stdout.flush()
    known, status = explain(error), 1
    if isinstance(error, KeyboardInterrupt):
        known = "interrupted", INTERRUPTED
    if is_lost(error):
        status = WORLD
        if not isinstance(error, LostProcesses):  # a computation's: it may have failed by itself
            traceback.print_exception(error)
        reason = str(error).partition("\n")[0][:200]
        print_error(
            f"process {jax.process_index()} of {jax.process_count()} lost the others ({reason}); "
            "start all of them again with the same --workdir, and the run resumes from its last "
            "checkpoint"
        )
    elif known:
        message, status = known
        print_error(message)
    else:
        traceback.print_exception(error)
    if status == MISTAKE:
        # If process 0 ended at once, the others would be aborted before they print the same.
        farewell = threading.Thread(target=_farewell, daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_S)
    sys.stderr.flush()
    os._exit(status)


def _farewell() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()  # returns when every process has called it


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


@functools.cache
def warn(text: str) -> None:
    """Logs a warning, once for all processes and however often it is given."""
    if is_first():
        logging.getLogger(__name__).warning(text)


def owns(row: int, rows: int) -> bool:
    """Whether the environment of row `row` of `rows` lives in this process."""
    return row * jax.process_count() // rows == jax.process_index()


def share(own: Mapping[int, T] | str, rows: int) -> list[T]:
    """The values of rows 0 to `rows` - 1; each process passes those of its own rows.

    A process whose work was cut short passes the name of the signal.

    Raises:
      Stopped: one did.
      ValueError: no process has one of the rows.
    """
    everything: dict[int, T] = {}
    for part in gather(own if isinstance(own, str) else dict(own)):
        if isinstance(part, str):
            say(f"stopped by {part}; what is finished is kept")
            raise Stopped
        everything |= part
    missing = [row for row in range(rows) if row not in everything]
    if missing:
        raise ValueError(f"`own`: expected all rows 0 to {rows - 1}, nobody has {missing}")
    return [everything[row] for row in range(rows)]


def first(value: T) -> T:
    """The value of process 0."""
    return gather(value)[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by process number. Every process has to call this.

    Raises:
      LostProcesses: one of them has ended.
    """
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    try:
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        padded = np.zeros(max(_LEAST_BYTES, 1 << (int(sizes.max()) - 1).bit_length()), np.uint8)
        padded[: len(data)] = data
        everyone = multihost_utils.process_allgather(padded)
    except Exception as error:  # JAX raises several types, even ValueError
        raise LostProcesses(str(error)) from error
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
