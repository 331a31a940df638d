"""An environment in its own process: if it hangs or dies, only its episode is lost."""

import base64
import contextlib
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from opd_jax.envs.base import Env, Observation, Task
from opd_jax.envs.faults import broken, checked
from opd_jax.envs.turns import NOT_RUNNING
from opd_jax.envs.worker_process import defining_module, encode, receive, send
from opd_jax.runtime.exits import WorldFailed

# What `Worker.breaks` counts.
TIMEOUT, DIED, EXCEPTION, GARBAGE = "timeout", "died", "exception", "garbage"

Read = TypeVar("Read")


class Worker:
    """An `Env` that runs in its own process, where `make` makes the environment.

    Four faults end the running episode and nothing else: a call takes too long, the process dies,
    an exception escapes the environment, or an answer is malformed. The worker then kills the
    process with its group (an engine that starts its own group has to end by itself). The call
    returns an `Observation` with `end` = `BROKEN` and a text that says what happened. The next
    `reset` starts a new process. A `reset` that breaks is tried once more before it returns such an
    observation.

    A user's mistake is raised here as a `ValueError` with the environment's message. Two errors
    count as mistakes if a call other than `step` raises them: a `ValueError` of the environment's
    own package, and an `ImportError`. Where the environment could be made before, a failure to make
    it again is a fault.

    Workers run side by side if each is called from its own thread; one worker serves one thread at
    a time. The first call starts the process. The process ends when the worker is collected, and
    when the run ends, however it ends. JAX in the process sees only the CPU. POSIX only.

    Args:
      make: makes the environment. It is pickled: for example a `functools.partial` of the
        environment's class. Its module is imported in every process, so keep JAX out of it.
      start_timeout_s: seconds for starting the process and making the environment; also the limit
        of each `reset`, `size` and `digest`.
      step_timeout_s: seconds for each `step`.

    Attributes:
      system: the environment's; "" before the first `reset`.
      task: the task of the current episode; if `reset` broke, only its `id` is set.
      breaks: number of faults by kind: `TIMEOUT`, `DIED`, `EXCEPTION` or `GARBAGE`.
      restarts: number of processes started to replace one that broke.

    Raises:
      ValueError: `make` cannot be pickled or is defined in the main module, or a time is not
        positive.
    """

    def __init__(self, make: Callable[[], Env], *, start_timeout_s: float, step_timeout_s: float):
        self._limits = {"start_timeout_s": start_timeout_s, "step_timeout_s": step_timeout_s}
        check_limits(**self._limits)
        self.system = ""
        self.waits = True
        self.task = Task(id="", type="", goal="", scene="")
        self.breaks: Counter[str] = Counter()
        self.restarts = 0
        self._factory = _pickled(make)
        self._process: _Process | None = None
        self._running = self._broke = self._closed = self._made = False

    @property
    def pid(self) -> int | None:
        """The id of the process and of its group; None while there is none."""
        return self._process.pid if self._process else None

    def size(self, split: str) -> int:
        """Number of tasks in `split`; WorldFailed if it breaks twice."""
        return self._query("size", split, read=_whole_number)

    def digest(self, split: str) -> str:
        """The environment's digest of `split`; WorldFailed if it breaks twice."""
        return self._query("digest", split, read=_text)

    def reset(self, split: str, index: int) -> Observation:
        """Start task `index` of `split`; the first observation may be `BROKEN`."""
        self._running = False
        self.task = Task(id=f"{split}/{index}", type="", goal="", scene="")
        try:
            found = self._ask_twice("reset", split, index, read=_first_observation)
        except _BreakError as why:
            return broken("reset", str(why))
        observation, self.task, self.system = found
        self._running = not observation.done
        return observation

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text; the observation may be `BROKEN`.

        Raises:
          ValueError: if there is no running episode.
        """
        if not self._running:
            raise ValueError(NOT_RUNNING)
        self._running = False
        try:
            observation = self._ask("step", response, read=_observation)
        except _BreakError as why:
            return broken("step", str(why))
        self._running = not observation.done
        return observation

    def close(self) -> None:
        """Kill the process, if there is one. A closed worker starts no new one."""
        self._closed = True
        self._drop()

    def _query(self, name: str, split: str, *, read: Callable[[Any], Read]) -> Read:
        try:
            return self._ask_twice(name, split, read=read)
        except _BreakError as why:
            raise WorldFailed(f"the environment broke in `{name}`, twice: {why}") from why

    def _ask_twice(self, name: str, *arguments: Any, read: Callable[[Any], Read]) -> Read:
        try:
            return self._ask(name, *arguments, read=read)
        except _BreakError:
            return self._ask(name, *arguments, read=read)

    def _ask(self, name: str, *arguments: Any, read: Callable[[Any], Read]) -> Read:
        """Call a method of the environment and read its answer.

        Raises:
          _BreakError: a fault; the process is gone.
          ValueError: the user's mistake; the process goes on.
        """
        limit = "step_timeout_s" if name == "step" else "start_timeout_s"
        try:
            process = self._process or self._start()
            return process.ask(name, *arguments, limit=(limit, self._limits[limit]), read=read)
        except _BreakError as why:
            self.breaks[why.kind] += 1
            self._broke = True
            self._drop()
            task = self.task.id if name == "step" else "/".join(map(str, arguments))
            logging.getLogger(__name__).warning(
                "the environment broke in `%s` of %s: %s", name, task, why
            )
            raise
        except ValueError:
            raise
        except BaseException:  # interrupted: the answer would be taken for the next call's
            self._drop()
            raise

    def _start(self) -> "_Process":
        if self._closed:
            raise ValueError("this worker is closed; make another")
        self.restarts += self._broke
        self._broke = False
        # Set before the first request, so that any error drops the process.
        self._process = process = _Process()
        limit = ("start_timeout_s", self._limits["start_timeout_s"])
        try:
            process.ask("make", self._factory, limit=limit, read=_nothing)
        except ValueError as error:  # there is no environment in it
            self._drop()
            if self._made:  # with the same settings
                raise _BreakError(EXCEPTION, str(error)) from None
            raise
        self._made = True
        return process

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()


def check_limits(**limits_s: float) -> None:
    """ValueError unless each limit is a positive number of seconds."""
    for name, seconds in limits_s.items():
        if not 0 < seconds < math.inf:
            raise ValueError(f"`{name}`: expected seconds above 0, got {seconds}")


def _pickled(make: Callable[[], Env]) -> str:
    if defining_module(make) == "__main__":
        raise ValueError(
            f"`make`: expected a factory that another process can import, got {make!r} of the main "
            "module; define it in a module of its own"
        )
    try:
        return base64.b64encode(pickle.dumps(make)).decode()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "`make`: expected something that pickles, such as a `functools.partial` of an "
            f"environment's class, got {make!r}: {error}"
        ) from error


# --- What can break


class _BreakError(Exception):
    """A fault: what went wrong, and its kind as in `Worker.breaks`. The process is useless now."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


# Not `multiprocessing`: it would import the run's main module in every process, and JAX with it.
# The process gets our `sys.path`, so that it finds the factory's modules.
_MAIN = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from opd_jax.envs.worker_process import serve; serve(int(sys.argv[1]))"
)
# A killed process that is still there after so many seconds waits for a device; we leave it.
_REAP_S = 5.0


class _Process:
    """A process that serves one environment, and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, str(theirs.fileno()), *sys.path],
                    # Some packages use JAX if it is there, and it would take the accelerator.
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # to stderr: what engines print is not the run's output
                    pass_fds=[theirs.fileno()],
                    # Its own group, so that killing it also kills what the engine has started, and
                    # Ctrl-C at the terminal reaches the run alone.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise _BreakError(DIED, f"its process does not start: {error}") from error
        self._channel = ours
        self.pid = self._popen.pid
        self.kill = weakref.finalize(self, _kill, self._popen, ours)

    def ask(
        self, name: str, *arguments: Any, limit: tuple[str, float], read: Callable[[Any], Read]
    ) -> Read:
        """The answer to one call within a limit (setting, seconds); raises as `Worker._ask`."""
        setting, seconds = limit
        request = encode({"name": name, "arguments": arguments, "limit_s": seconds})
        deadline = time.monotonic() + seconds
        try:
            send(self._channel, request, deadline=deadline)
            answer = receive(self._channel, deadline=deadline)
        except TimeoutError:
            raise _BreakError(TIMEOUT, f"no answer within {seconds:g} s (`{setting}`)") from None
        except (OSError, EOFError):
            raise _BreakError(DIED, self._how_it_ended()) from None
        except (ValueError, RecursionError) as error:
            raise _BreakError(GARBAGE, f"what it sent is no message: {error}") from error
        match answer:
            case {"mistake": str(text)}:
                raise ValueError(text)
            case {"exception": str(text)}:
                raise _BreakError(EXCEPTION, text)
        try:
            return read(answer["value"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _BreakError(GARBAGE, f"what it sent is no answer: {error!r}") from error

    def _how_it_ended(self) -> str:
        self.kill()
        status = self._popen.returncode
        if status is None:
            return "its process has closed its socket and cannot be killed"
        if status >= 0:
            return f"its process ended with status {status}"
        hint = ", as when memory runs out" if -status == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-status).name}{hint}"


def _kill(popen: subprocess.Popen, channel: socket.socket) -> None:
    """Kill the group and wait for its leader. A leader that was dead keeps its own exit status."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(_REAP_S)
    channel.close()


# --- Answers: each function checks one and raises if it is malformed


def _observation(fields: Any) -> Observation:
    record = {name: tuple(texts) for name, texts in fields.get("record", {}).items()}
    tuples = {"admissible": tuple(fields["admissible"]), "record": record}
    return checked(Observation(**{**fields, **tuples}))


def _first_observation(value: Any) -> tuple[Observation, Task, str]:
    for text in value["task"].values():
        _text(text)
    return _observation(value["observation"]), Task(**value["task"]), _text(value["system"])


def _exactly(kind: type[Read]) -> Callable[[Any], Read]:
    """Reads a value of this type and no other."""

    def read(value: Any) -> Read:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {value!r}")
        return value

    return read


_whole_number, _text, _nothing = _exactly(int), _exactly(str), _exactly(type(None))
