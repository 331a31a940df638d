"""Several processes of one run: how they find each other, what they tell each other, how they end.

Every process runs the same program on the same host data. Only two things are divided: devices,
which the arrays' shardings see to, and environments, each of which lives in one process (`owns`).
What an environment says is told to all processes at once (`share`), so that from there on all of
them hold the same conversations, draw the same conclusions and start the same compiled programs.
"""

import atexit
import contextlib
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

from opd_jax.runtime.last_words import LastWords

VARIABLE = "OPD_JAX_DISTRIBUTED"
# A process that dies takes the others with it after about so long at most; where processes are
# connected directly, as on CPUs, a broken connection tells them at once.
HEARTBEAT_TIMEOUT_S = 60
# How long a process that found a mistake waits for the others to find it as well. They have all
# computed the same up to there.
_FAREWELL_S = 10
# Messages are padded to a power of two, since each size is a program to compile.
_LEAST_BYTES = 1024

_BROKEN_CONNECTION = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)

T = TypeVar("T")

# Of this process; None in a run of one process.
_last_words: LastWords | None = None


def start() -> None:
    """Joins the run's other processes, where the environment variable `OPD_JAX_DISTRIBUTED` is set.

    To be called by a command, before anything touches a device.

      auto                        as JAX finds its cluster: Cloud TPU, TPUs on GKE, Slurm
      HOST:PORT,PROCESS,PROCESSES where process 0 listens, this one's number, and how many there are

    Raises:
      ValueError: the variable holds anything else. Where the others do not come in five minutes,
        JAX aborts the process; its last words say so.
    """
    global _last_words
    text = os.environ.get(VARIABLE, "")
    if not text:
        return
    # It would take SIGTERM for itself, with which a run saves and ends.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        where = _where(text)
        _last_words = LastWords(
            f"error: the processes of the run did not come together (`{VARIABLE}` = {text!r}): "
            "process 0 cannot be reached, or another has ended; start all of them again"
        )
        atexit.register(_leave)
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"`{VARIABLE}` = {text!r}: expected auto on a cluster that JAX knows, or "
            f"HOST:PORT,PROCESS,PROCESSES with process 0 at HOST:PORT; {error}"
        ) from None


def _leave() -> None:
    """Waits for the others, as JAX does at an ordinary exit, and only then has nothing to say."""
    jax.distributed.shutdown()
    if _last_words:
        _last_words.say("")


def _where(text: str) -> dict[str, Any]:
    if text == "auto":
        return {}
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
        raise ValueError("it is neither")
    process, processes = map(int, numbers)
    return dict(coordinator_address=address, process_id=process, num_processes=processes)


class LostProcesses(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process has ended, whoever raised it."""
    lost = isinstance(error, LostProcesses) or bool(_BROKEN_CONNECTION.match(str(error)))
    return lost and _last_words is not None


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Around a command: a process that fails ends at once, so that the others notice, and end too.

    An ordinary exit would wait for all processes, of which some wait for this one. One that ends
    because another has ended says so, whether Python noticed first or JAX.
    """
    try:
        if _last_words:
            _last_words.prepare(
                f"error: process {jax.process_index()} of {jax.process_count()} lost the others, "
                "or was killed itself; start all of them again with the same --workdir, and the "
                "run resumes from its last checkpoint"
            )
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _last_words is None:
            raise
        _end(error, _last_words)


def _end(error: BaseException, last_words: LastWords) -> NoReturn:
    sys.stdout.flush()
    status = 1
    if is_lost(error):
        reason = str(error).partition("\n")[0][:200]
        last_words.say(f"{last_words.line} ({reason})")
    elif isinstance(error, ValueError):
        status = 2
        last_words.say(f"error: {error}")
        # Process 0 takes the others with it, who are about to say the same.
        farewell = threading.Thread(target=_farewell, daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_S)
    else:
        traceback.print_exception(error)
        last_words.say("")
    sys.stderr.flush()
    os._exit(status)


def _farewell() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()  # returns when all have called it


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def owns(row: int, rows: int) -> bool:
    """Whether the environment of row `row` of `rows` lives in this process."""
    return row * jax.process_count() // rows == jax.process_index()


def share(own: Mapping[int, T], rows: int) -> list[T]:
    """What all processes have of rows 0 to `rows`, each having its own.

    Raises:
      ValueError: nobody has a row.
    """
    everything: dict[int, T] = {}
    for part in gather(dict(own)):
        everything |= part
    missing = [row for row in range(rows) if row not in everything]
    if missing:
        raise ValueError(f"`own`: expected all rows 0 to {rows - 1}, nobody has {missing}")
    return [everything[row] for row in range(rows)]


def first(value: T) -> T:
    """The value of process 0."""
    return gather(value)[0]


def gather(value: T) -> list[T]:
    """The value of every process, in their order. All processes have to call this.

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
    except Exception as error:  # of several types, among them ValueError
        raise LostProcesses(str(error)) from error
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
