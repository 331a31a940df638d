"""The processes of one run: how they start, what they exchange, how they end.

Every process runs the same program on the same host data. Only two things are divided among them:
devices, through the arrays' shardings, and environments, each of which lives in one process
(`owns`). `share` gives the environments' answers to all processes. So all of them hold the same
conversations, make the same decisions and start the same compiled programs.
"""

import contextlib
import json
import logging
import os
import pickle
import re
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from opd_jax.runtime.exits import (
    INTERRUPTED,
    WORLD,
    Stopped,
    WorldFailed,
    explain,
    print_error,
    print_line,
)

VARIABLE = "OPD_JAX_DISTRIBUTED"
# If a process dies, the others end within about this time. CPU processes have direct connections
# and notice at once.
HEARTBEAT_TIMEOUT_S = 60
# How often a process looks whether another one has told of its failure.
_LOOK_S = 1.0
# How long it then goes on: it may be about to find the same failure, and to end in its own words.
_GRACE_S = 3.0
# How long a process that failed waits for the others to end; more than the two above.
_FAREWELL_S = 15.0
# How long a process waits for the others before they save together.
_MEETING_S = 10.0
# Where the first process that fails tells the others why, among what the coordinator keeps.
_FAILURE = "opd_jax/failure"
# What a message has room for, its length in front. What is longer goes on in a second one, padded
# to a power of two: each size compiles a program.
_MESSAGE_BYTES, _LENGTH_BYTES = 16384, 8

# How JAX's errors begin when another process has ended.
_BROKEN_CONNECTION = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)

# What JAX says of devices that another process holds, or that come up later.
_BUSY_DEVICES = re.compile(
    "in use|busy|ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|OUT_OF_MEMORY"
)

_MOST_ALIKE = 10
_warned: defaultdict[str, set[str]] = defaultdict(set)  # by template

# Held by the thread that ends the process. A second one waits for the end.
_ending = threading.Lock()

T = TypeVar("T")


def start() -> None:
    """Joins the run's other processes if the environment variable `OPD_JAX_DISTRIBUTED` is set.

    A command calls this before anything touches a device. The variable holds

      auto                        on a cluster that JAX knows: Cloud TPU, TPUs on GKE, Slurm
      HOST:PORT,PROCESS,PROCESSES process 0's address, this process's number, the number of all

    If the others do not join within five minutes, JAX prints its own message and ends the process.

    Raises:
      ValueError: the variable holds anything else, or JAX has no such devices.
      WorldFailed: they do not open now.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        open_devices()
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


def open_devices() -> None:
    """Opens JAX's devices. Where there are none, JAX raises errors of several types."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise without_devices(error) from error


def without_devices(error: Exception) -> Exception:
    """What it means that JAX's devices do not open: whether they are busy, or not there."""
    asked = f"JAX_PLATFORMS = {jax.config.values['jax_platforms'] or ''!r}"
    text = str(error) or "there are none"
    if _BUSY_DEVICES.search(text):
        return WorldFailed(f"JAX's devices do not open now ({asked}): {text}")
    return ValueError(
        f"JAX has no such devices ({asked}): {text}; install JAX for this accelerator and its "
        "driver, or set JAX_PLATFORMS=cpu"
    )


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
    """Runs a command so that all processes of a run end together, with one status and one line.

    A process that fails tells the others why, through the coordinator in process 0, and waits until
    they have ended. A thread of each process listens: the process itself may be waiting in a
    computation or in a save for the one that failed. A process that is killed tells nothing. If
    Python is first to notice that it is gone, we print one line that says what to do. If JAX's
    client is first, it prints its own message ("another task died") and aborts the process.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    over = threading.Event()
    listening = threading.Thread(target=_listen, args=(over,), daemon=True)
    listening.start()
    try:
        open_devices()
        yield
    except (Exception, KeyboardInterrupt) as error:
        end(error)
    finally:
        over.set()
        listening.join()


def _listen(over: threading.Event) -> None:
    """Ends the process soon after another one has told of its failure."""
    while not over.wait(_LOOK_S):
        if failure := _told():
            if not over.wait(_GRACE_S):
                with _ending:
                    print_error(failure[0])
                    _leave(failure[1])
            return


def end(error: BaseException) -> NoReturn:
    """Ends this process with an error, and the others with it. Any thread may call it."""
    with _ending:
        sys.stdout.flush()
        if not is_lost(error):
            status = _tell(*_explained(error))
        elif failure := _told():
            print_error(failure[0])
            status = failure[1]
        else:
            if not isinstance(error, LostProcesses):  # a computation's: it may have failed itself
                print_line("".join(traceback.format_exception(error)), sys.stderr)
            reason = str(error).partition("\n")[0][:200]
            print_error(
                f"process {jax.process_index()} of {jax.process_count()} lost the others "
                f"({reason}); start all of them again with the same --workdir, and the run resumes "
                "from its last checkpoint"
            )
            sys.stderr.flush()
            os._exit(WORLD)
        _leave(status)


def _explained(error: BaseException) -> tuple[str, int]:
    """Prints an error; returns the line for the other processes, and the status."""
    known = explain(error)
    if isinstance(error, KeyboardInterrupt):
        known = "interrupted", INTERRUPTED
    if known:
        print_error(known[0])
        return known
    print_line("".join(traceback.format_exception(error)), sys.stderr)
    what = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    return f"process {jax.process_index()} failed ({what}); its own output has the traceback", 1


def _tell(line: str, status: int) -> int:
    """Tells the other processes of a failure; returns the status of the first that was told."""
    with contextlib.suppress(Exception):  # another was first, or the coordinator is gone
        _coordinator().key_value_set(_FAILURE, json.dumps([line, status]))
    first_told = _told()
    return first_told[1] if first_told else status


def _told() -> tuple[str, int] | None:
    """The line and the status of the first failure that a process told of."""
    with contextlib.suppress(Exception):  # there is none, or the coordinator is gone
        line, status = json.loads(_coordinator().key_value_try_get(_FAILURE))
        return line, status
    return None


def _coordinator() -> Any:
    """The client of the service that all processes reach. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def _leave(status: int) -> NoReturn:
    """Ends the process, when the others end too; an ordinary exit may wait for them for ever."""
    farewell = threading.Thread(target=_farewell, daemon=True)
    farewell.start()
    # If process 0 ended at once, the others would be aborted before they know why.
    farewell.join(_FAREWELL_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _farewell() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()  # returns when every process has called it


def are_all_here() -> bool:
    """Whether every process calls this now: nobody waits for ever for one that goes on elsewhere.

    For what only all of them can do after an error, which may be that of one process alone.
    """
    if jax.process_count() == 1:
        return True
    try:
        _coordinator().wait_at_barrier("opd_jax/all_here", int(1000 * _MEETING_S))
    except Exception:  # JAX's, of several kinds
        return False
    return True


def can_save(error: BaseException) -> bool:
    """Whether all processes are here to save after an error, which may be that of one alone."""
    return not is_lost(error) and are_all_here()


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


# Its own lock is one of `multiprocessing`, which needs semaphores of the system.
tqdm.set_lock(threading.RLock())
_spoke = time.monotonic()


def say(text: str) -> None:
    """Prints a line, once for all processes; above the bar if there is one (`progress`)."""
    spoke()
    if is_first():
        with tqdm.external_write_mode(file=sys.stdout):
            print_line(text, sys.stdout)


def spoke() -> None:
    """Notes that something was printed."""
    global _spoke
    _spoke = time.monotonic()


def silent_s() -> float:
    """Seconds since something was printed."""
    return time.monotonic() - _spoke


def warn(template: str, *values: object) -> None:
    """Logs `template % values` as a warning, once for all processes and however often it is given.

    Of one template at most `_MOST_ALIKE` are logged: a run may leave out a million tasks.
    """
    text, told = template % values, _warned[template]
    if text in told or len(told) == _MOST_ALIKE:
        return
    told.add(text)
    if is_first():
        last = "; more of this kind are not logged" if len(told) == _MOST_ALIKE else ""
        logging.getLogger(__name__).warning("%s%s", text, last)


def owns(row: int, rows: int) -> bool:
    """Whether the environment of row `row` of `rows` lives in this process."""
    return row * jax.process_count() // rows == jax.process_index()


def share(own: Mapping[int, T] | str | WorldFailed, rows: int) -> list[T]:
    """The values of rows 0 to `rows` - 1; each process passes those of its own rows.

    A process whose work was cut short passes the name of the signal, or how the world failed. All
    processes then leave at the same place, and can still save what is finished.

    Raises:
      Stopped: one passed a signal.
      WorldFailed: one passed it.
      ValueError: no process has one of the rows.
    """
    passed: dict[int, T] | str | WorldFailed
    if isinstance(own, WorldFailed):
        passed = WorldFailed(str(own))  # a class of the user's may not pickle
    else:
        passed = own if isinstance(own, str) else dict(own)
    everything: dict[int, T] = {}
    for part in gather(passed):
        if isinstance(part, WorldFailed):
            raise own if isinstance(own, WorldFailed) else part
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

    data = pickle.dumps(value)
    message = len(data).to_bytes(_LENGTH_BYTES, "little") + data
    try:
        everyone = multihost_utils.process_allgather(_padded(message[:_MESSAGE_BYTES]))
        sizes = [int.from_bytes(row[:_LENGTH_BYTES].tobytes(), "little") for row in everyone]
        if (longest := _LENGTH_BYTES + max(sizes)) > _MESSAGE_BYTES:
            room = 1 << (longest - _MESSAGE_BYTES - 1).bit_length()
            rest = multihost_utils.process_allgather(_padded(message[_MESSAGE_BYTES:], room))
            everyone = np.concatenate([everyone, rest], axis=1)
    except Exception as error:  # JAX raises several types, even ValueError
        raise LostProcesses(str(error)) from error
    return [
        pickle.loads(row[_LENGTH_BYTES : _LENGTH_BYTES + size].tobytes())
        for row, size in zip(everyone, sizes, strict=True)
    ]


def _padded(part: bytes, room: int = _MESSAGE_BYTES) -> np.ndarray:
    return np.frombuffer(part.ljust(room, b"\0"), np.uint8)
