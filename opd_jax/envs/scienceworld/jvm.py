"""One Java process with ScienceWorld's simulator, with limits on its memory and its answers' time.

The simulator (Wang et al., 2022, arXiv:2203.07540) is a Java archive in the `scienceworld` package.
This file calls it directly, as the package's own Python class does, with three differences:

- It lists the admissible commands only on request. The list is most of the cost of a step.
- Memory is limited, and so is the time of every answer.
- The same commands give the same texts and scores in every process. The simulator iterates over
  hash sets of objects without a hash of their own, for which Java draws one at random. So lists,
  the numbers in ambiguous requests and sometimes a score would differ from run to run. Here all
  objects get the same hash, and sets keep the order in which they were filled.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import subprocess
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opd_jax.envs.scienceworld.tasks import VARIATIONS
from opd_jax.runtime.exits import WorldFailed

T = TypeVar("T")

INVENTORY = "In your inventory, you see:"


class EngineLost(Exception):
    """The Java process died, or did not answer in time."""


class EpisodeLost(Exception):
    """The episode cannot go on: a replay failed, or the simulator itself went wrong."""


@dataclass(frozen=True)
class Reply:
    """The engine's answer to a command.

    Attributes:
      text: its words.
      score: -100..100.
      completed: the task is over, solved or failed.
      inventory: what the player carries, in the engine's words.
    """

    text: str
    score: int
    completed: bool
    inventory: str


class Jvm:
    """One Java process with one simulator.

    Args:
      heap_mb: most memory of Java's heap, in MiB; the process needs about 120 more.
      timeout_s: longest wait for the process to start, and for each of its answers, in seconds.

    Attributes:
      process: the Java process. It ends with this object, and with the Python process.

    Raises:
      ValueError: the package or Java is missing.
      WorldFailed: Java does not start.
    """

    def __init__(self, *, heap_mb: int, timeout_s: float):
        archive, java = _archive(), _java()
        from py4j.java_gateway import find_jar_path

        py4j = find_jar_path()  # "" if there is none; the simulator's archive holds one too
        path = os.pathsep.join([os.path.abspath(py4j), str(archive)] if py4j else [str(archive)])
        self.process = subprocess.Popen(
            [
                java,
                f"-Xmx{heap_mb}m",
                "-XX:+UseSerialGC",
                "-XX:+ExitOnOutOfMemoryError",
                "-XX:+IgnoreUnrecognizedVMOptions",
                "-XX:+UnlockExperimentalVMOptions",
                "-XX:hashCode=2",
                *("-classpath", path, "py4j.GatewayServer"),
                *("--die-on-broken-pipe", "--enable-auth", "0"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=archive.parent,  # it reads a file of types there; elsewhere it would write one
            start_new_session=True,  # Ctrl-C at the terminal reaches Python alone
        )
        self._end = weakref.finalize(self, _end, self.process)
        port, token = self._first_lines(heap_mb=heap_mb, timeout_s=timeout_s)
        self._gateway = _connect(int(port), token, timeout_s=timeout_s)
        self._server = self._call(self._make_server)

    def _make_server(self) -> Any:
        jvm = self._gateway.jvm
        # The simulator prints a comment on everything it does, which nobody reads.
        silence = jvm.java.io.PrintStream(os.devnull)
        jvm.java.lang.System.setOut(silence)
        jvm.java.lang.System.setErr(silence)
        return jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def _first_lines(self, *, heap_mb: int, timeout_s: float) -> tuple[str, str]:
        """Port and token, which the process prints when it listens."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        said: list[str] = []
        found: list[str] = []

        def read() -> None:
            # Java may print warnings of its own first.
            for line in self.process.stdout:  # type: ignore[union-attr]
                said.append(line.decode(errors="replace").strip())
                if len(said) > 1 and said[-2].isdecimal():
                    found.extend(said[-2:])
                    return

        waiting = threading.Thread(target=read, daemon=True)
        waiting.start()
        waiting.join(timeout_s)
        if found:
            return found[0], found[1]
        self.process.kill()
        waiting.join()
        said += self.process.stderr.read().decode(errors="replace").split()
        raise WorldFailed(
            f"ScienceWorld's Java process did not start within {timeout_s:g} s with a heap of "
            f"{heap_mb} MiB: {' '.join(said) or 'it said nothing'}"
        )

    def _call(self, ask: Callable[[], T]) -> T:
        """Java's answer; EngineLost if it does not answer or raises."""
        from py4j.protocol import Py4JError

        try:
            return ask()
        except (Py4JError, OSError) as error:
            status = self.process.poll()
            why = "does not answer" if status is None else f"has ended with status {status}"
            raise EngineLost(f"the Java process {why} ({type(error).__name__})") from error

    def load(self, kind: str, variation: int, simplifications: str, *, gold: bool = False) -> None:
        """Start a task; with `gold` also find a path through it, which may take seconds.

        Raises:
          ValueError: the package is of another version.
          EngineLost: no answer.
        """
        count = self._call(lambda: self._server.getTaskMaxVariations(kind))
        if count != VARIATIONS[kind]:
            raise ValueError(
                f"`scienceworld`: expected {VARIATIONS[kind]} variations of {kind}, got {count}; "
                "install scienceworld==1.2.3, or figures will be of other tasks"
            )
        self._call(lambda: self._server.load(kind, variation, simplifications, gold))

    def act(self, command: str) -> Reply:
        """Carry out a command.

        Raises:
          EngineLost: no answer.
          EpisodeLost: the simulator itself went wrong.
        """
        server = self._server
        text, score, completed, inventory = self._call(
            lambda: (
                server.step(command),
                server.getScore(),
                server.getCompleted(),
                server.freeActionInventory(),
            )
        )
        # After a fault inside the simulator, every answer is the name of a Java exception.
        if not inventory.startswith(INVENTORY):
            raise EpisodeLost(f"the simulator went wrong after `{command}`: {inventory}")
        return Reply(text, round(100 * score), completed, inventory)

    def description(self) -> str:
        """The task in words."""
        return self._call(lambda: self._server.getTaskDescription())

    def admissible(self) -> list[str]:
        """Every command that the simulator lists as possible now, in alphabetical order."""
        return self._texts(lambda: self._server.getValidActionObjectCombinations())

    def gold_path(self) -> list[str]:
        """The path found by `load`."""
        return self._texts(lambda: self._server.getGoldActionSequence())

    def _texts(self, ask: Callable[[], Any]) -> list[str]:
        # Joined in Java: py4j would fetch a list item by item.
        text = self._call(lambda: self._gateway.jvm.java.lang.String.join("\n", ask()))
        return text.split("\n") if text else []

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(Exception):
            self._gateway.close()
        self._end()


def _archive() -> Path:
    spec = importlib.util.find_spec("scienceworld")
    if spec is None or spec.origin is None or importlib.util.find_spec("py4j") is None:
        raise ValueError(
            "ScienceWorld needs the package `scienceworld`: pip install -e '.[scienceworld]' in "
            "the repository"
        )
    return Path(spec.origin).parent / "scienceworld.jar"


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = (home and shutil.which(os.path.join(home, "bin", "java"))) or shutil.which("java")
    if java is None:
        raise ValueError(
            "ScienceWorld runs on Java: there is no `java` on PATH or under `JAVA_HOME`; install "
            "a Java runtime (8 or later)"
        )
    return java


def check_installed() -> None:
    """ValueError if the package or Java is missing; says which, and what to do."""
    _archive()
    _java()


def _connect(port: int, token: str, *, timeout_s: float) -> Any:
    """A py4j gateway to a process that neither retries nor logs failures."""
    from py4j.java_gateway import GatewayClient, GatewayParameters, JavaGateway
    from py4j.protocol import Py4JNetworkError

    class Client(GatewayClient):
        # The original logs a traceback to the root logger for every failure, and retries some of
        # them. Here `Engine` decides about retries.
        def send_command(self, command: str, retry: bool = False, binary: bool = False) -> str:
            connection = self._get_connection()
            try:
                response = connection.send_command(command)
            except Py4JNetworkError:
                connection.close(reset=True)
                raise
            self._give_back_connection(connection)
            return response

    logging.getLogger("py4j").setLevel(logging.CRITICAL)
    parameters = GatewayParameters(port=port, auth_token=token, read_timeout=timeout_s)
    gateway = JavaGateway(gateway_parameters=parameters)
    gateway.set_gateway_client(Client(gateway_parameters=parameters))
    return gateway


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
