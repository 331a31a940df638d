"""An environment that does what a test of workers asks, and every fault that it may have.

Workers' processes import this file, so it imports little.
"""

import contextlib
import ipaddress
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

from opd_jax.envs.base import Env, Observation, Task
from opd_jax.envs.workers import DIED, EXCEPTION, GARBAGE, TIMEOUT


def sockets() -> Iterator[int]:
    for fd in range(3, 100):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                yield fd


def write(data: bytes) -> None:
    for fd in sockets():
        os.write(fd, data)


def message(body: bytes) -> bytes:
    return struct.pack(">Q", len(body)) + body


def hang() -> None:
    time.sleep(3600)


def send_half() -> None:
    write(message(b"{" + b" " * 100)[:50])
    hang()


def trickle() -> None:
    write(struct.pack(">Q", 1 << 20))
    while True:
        write(b" ")
        time.sleep(0.01)


def send_a_field(name: str, value: str) -> None:
    fields = {"text": "", "message": "", "admissible": [], name: json.loads(value)}
    write(message(json.dumps({"value": fields}).encode()))


def close_the_socket() -> None:
    for fd in list(sockets()):
        os.close(fd)
    hang()


def burn() -> None:
    raise RuntimeError("the engine is in flames")


# Name -> what happens, the kind under which it is counted, what the observation says.
FAULTS: dict[str, tuple[Callable[[], object], str, str]] = {
    "die": (lambda: os.kill(os.getpid(), signal.SIGKILL), DIED, "killed by SIGKILL"),
    "exit": (lambda: sys.exit(3), DIED, "ended with status 3"),
    "burn": (burn, EXCEPTION, r"RuntimeError: the engine is in flames \(telling.py, l"),
    "scribble": (lambda: write(b"\xff" * 64), GARBAGE, "bytes are announced"),
    "prose": (lambda: write(message(b"You see a desk.")), GARBAGE, "is no message"),
    "list": (lambda: write(message(b"[]")), GARBAGE, "is no answer"),
    "form": (lambda: write(message(b'{"value": {"text": ""}}')), GARBAGE, "no answer: KeyError"),
    "nan": (lambda: send_a_field("score", "NaN"), GARBAGE, "a finite number"),
    "text": (lambda: send_a_field("score", '"high"'), GARBAGE, "a finite number"),
    "f1": (lambda: send_a_field("measures", '{"f1": null}'), GARBAGE, "a finite number"),
}
SLOW_FAULTS: dict[str, Callable[[], object]] = {
    "hang": hang,
    "hold": lambda: re.match("(a+)+$", "a" * 60 + "b"),  # never releases the interpreter's lock
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "half": send_half,
    "trickle": trickle,
    "close": close_the_socket,
}
LATE = r"no answer within 3 s \(`step_timeout_s`\)"
FAULTS |= {name: (fault, TIMEOUT, LATE) for name, fault in SLOW_FAULTS.items()}
QUICK_FAULTS = [name for name in FAULTS if name not in SLOW_FAULTS]


class Telling:
    """An environment that makes one of `CALLS` and tells what it returns."""

    system = "Tell."
    waits = False

    def size(self, split: str) -> int:
        return int(self._call(split))

    def digest(self, split: str) -> str:
        return f"digest of {split}"

    def reset(self, split: str, index: int) -> Observation:
        self.task = Task(id=f"telling/{index}", type="telling", goal="", scene="")
        text = self._call(split)
        return Observation(text, text, ())

    def step(self, response: str) -> Observation:
        if response.startswith("measure "):
            measures = MappingProxyType({"f1": float(response.split()[1]), "em": 0.0})
            return Observation("", "", (), measures=measures)
        if response == "reward":
            import numpy as np

            measures = {"seen": np.int64(3)}
            return Observation("", "", (), score=np.float32(0.5), measures=measures)
        text = self._call(response)
        return Observation(text, text, (response,))

    def _call(self, words: str) -> str:
        name, _, argument = words.partition(" ")
        return str(CALLS[name](argument))


def fail_once(words: str) -> str:
    """Fail if the file is not there yet, and leave it."""
    name, file = words.split()
    if not os.path.exists(file):
        Path(file).touch()
        FAULTS[name][0]()
    return "at last"


def devices_of_jax(_: str) -> str:
    import jax

    return " ".join(device.platform for device in jax.devices())


def meet(argument: str) -> str:
    """Wait until the expected number have arrived; tells when the wait began and ended."""
    place, name, expected = argument.split()
    start = time.monotonic()
    Path(place, name).touch()
    while len(os.listdir(place)) < int(expected):
        time.sleep(0.01)
    return f"{start} {time.monotonic()}"


def linger(path: str) -> None:
    Path(path).touch()
    hang()


def refuse(text: str) -> None:
    raise ValueError(text)


CALLS: dict[str, Callable[[str], object]] = {
    "echo": str,
    "fail": lambda name: FAULTS[name][0](),
    "fail_once": fail_once,
    "modules": lambda _: " ".join(sorted({name.partition(".")[0] for name in sys.modules})),
    "devices_of_jax": devices_of_jax,
    "speak": lambda text: print(text, flush=True),
    # A process that survives the death of its parent.
    "start_an_engine": lambda _: (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid
    ),
    "meet": meet,
    "linger": linger,
    "refuse": refuse,
    "read_json": lambda _: json.loads("{"),  # raises a subclass of ValueError
    "read_an_address": ipaddress.ip_address,  # raises a plain ValueError, in another package
}


def starting(words: str) -> Env:
    """An environment that makes one of `CALLS` before it starts."""
    env = Telling()
    env.reset(words, 0)
    return env


def no_extra() -> Env:
    raise ValueError("Tell needs an engine; pip install 'opd-jax[telling]'")


def while_there(file: str) -> Env:
    """An environment whose data may vanish."""
    if not Path(file).exists():
        raise ValueError(f"`data`: no file {file}")
    return Telling()


def no_module() -> Env:
    import an_engine_that_is_not_installed  # noqa: F401

    return Telling()
