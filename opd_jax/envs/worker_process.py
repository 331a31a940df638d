"""The process of a `Worker`, seen from inside, and the messages between the two.

A message is its length, then JSON. JSON cannot become code in the run, whatever an engine writes;
the length shows when half a message is missing. Only the environment's factory is a pickle, and
only the run sends one.
"""

import base64
import contextlib
import faulthandler
import functools
import json
import numbers
import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from opd_jax.envs.base import Env
from opd_jax.envs.faults import answered, last_line

_LENGTH = struct.Struct(">Q")
_LONGEST = 1 << 26  # bytes; `send` never announces more
_PIECE = 1 << 16  # bytes read at once


def encode(message: Any) -> bytes:
    """A message as bytes for `send`; TypeError unless it is plain data.

    Mappings become dicts, and numbers of other libraries Python's: rewards are often NumPy's.
    """
    return json.dumps(message, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else dict(value)


def send(channel: socket.socket, body: bytes, *, deadline: float | None) -> None:
    """Send one message; raises as sockets do, `TimeoutError` past the deadline (monotonic)."""
    _set_timeout(channel, deadline)
    channel.sendall(_LENGTH.pack(len(body)) + body)


def receive(channel: socket.socket, *, deadline: float | None) -> Any:
    """The next message.

    Args:
      channel: the socket.
      deadline: monotonic time in seconds; None waits for ever.

    Raises:
      TimeoutError: the message was not complete at the deadline.
      EOFError: the other end is closed.
      OSError: other trouble with the socket.
      ValueError, RecursionError: what came is not a message.
    """
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size, deadline))
    if length > _LONGEST:
        raise ValueError(f"{length} bytes are announced, expected at most {_LONGEST}")
    return json.loads(_exactly(channel, length, deadline))


def _exactly(channel: socket.socket, count: int, deadline: float | None) -> bytes:
    received = bytearray()
    while len(received) < count:
        _set_timeout(channel, deadline)
        part = channel.recv(min(count - len(received), _PIECE))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def _set_timeout(channel: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        return
    left = deadline - time.monotonic()
    if left <= 0:  # `settimeout(0)` would mean "do not block", and a trickle would never end
        raise TimeoutError
    channel.settimeout(left)


def defining_module(make: Callable[[], Env]) -> str:
    """The module that defines a factory, or the function that a `functools.partial` calls."""
    while isinstance(make, functools.partial):
        make = make.func
    return getattr(make, "__module__", None) or type(make).__module__


def serve(fd: int) -> None:
    """The main function of a worker's process: serve one environment over the socket `fd`.

    The first request makes the environment, every other one calls a method of it. The process dies
    when the other end closes.
    """
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    threading.Thread(target=_die_with_the_run, args=(fd,), daemon=True).start()
    served = _Served()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = receive(channel, deadline=None)
            # The run enforces the limit. But if the run is dead and an engine never releases the
            # interpreter's lock, the thread above cannot act. `faulthandler` needs no lock.
            faulthandler.dump_traceback_later(2 * request["limit_s"], exit=True, file=2)
            answer = served.answer(request["name"], request["arguments"])
            faulthandler.cancel_dump_traceback_later()
            send(channel, answer, deadline=None)
    _die_with_the_run(fd)


def _die_with_the_run(fd: int) -> None:
    # `poll` always reports that the other end has closed, even when it is asked for no event.
    # Linux could send a signal when the parent dies, but it would do so when the thread that
    # started this process ends.
    hangup = select.poll()
    hangup.register(fd, 0)
    hangup.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)


class _Served:
    """The environment, and the name of its package."""

    _env: Env
    _package = ""

    def answer(self, name: str, arguments: list[Any]) -> bytes:
        """The encoded answer to one call: its value, the user's mistake, or an exception."""
        try:
            return encode({"value": self._call(name, arguments)})
        except Exception as error:
            if name != "step" and self._is_mistake(error):
                return encode({"mistake": str(error)})
            traceback.print_exc()
            return encode({"exception": last_line(error)})

    def _call(self, name: str, arguments: list[Any]) -> Any:
        if name == "make":
            make = _loaded(*arguments)
            self._package = _package(defining_module(make))
            self._env = make()
            return None
        value = getattr(self._env, name)(*arguments)
        if name in ("reset", "step"):
            # Here, where the answer is still what the environment gave.
            value = answered(self._env, value)
        if name == "reset":
            task = vars(self._env.task)
            return {"observation": vars(value), "task": task, "system": self._env.system}
        return vars(value) if name == "step" else value

    def _is_mistake(self, error: Exception) -> bool:
        """Whether the user can mend it: a missing package, or a `ValueError` of our own code.

        A `ValueError` that an engine raises is a fault of the engine.
        """
        if isinstance(error, ImportError):
            return True
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        raised_by = _package(frame.f_globals.get("__name__", ""))
        return type(error) is ValueError and raised_by in (self._package, _package(__name__))


def _loaded(factory: str) -> Callable[[], Env]:
    try:
        return pickle.loads(base64.b64decode(factory))
    except Exception as error:
        raise ValueError(
            "`make`: expected a factory that another process can import; importing it there "
            f"failed: {type(error).__name__}: {error}"
        ) from error


def _package(module: str) -> str:
    return module.partition(".")[0]
