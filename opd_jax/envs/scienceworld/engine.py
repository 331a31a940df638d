"""ScienceWorld's episodes, which outlive their Java process.

If the process dies or hangs, a new one plays the episode again up to the same point. The simulator
gives the same replies to the same commands (see `jvm`); each reply is checked.
"""

from collections.abc import Callable
from typing import TypeVar

from opd_jax.envs.scienceworld.jvm import EngineLost, EpisodeLost, Jvm, Reply
from opd_jax.envs.scienceworld.tasks import task_id
from opd_jax.runtime.exits import WorldFailed

T = TypeVar("T")

LOOK = "look around"


class Engine:
    """Plays one episode at a time, any number of them in one Java process.

    A lost process is replaced once in each call. So a command that kills or hangs every process
    ends the episode.

    Args:
      simplifications: names joined by commas, as the simulator takes them.
      heap_mb, timeout_s: see `Jvm`.

    Attributes:
      restarts: number of processes that were replaced.
    """

    def __init__(self, *, simplifications: str, heap_mb: int, timeout_s: float):
        self._simplifications = simplifications
        self._heap_mb, self._timeout_s = heap_mb, timeout_s
        self._jvm: Jvm | None = None
        self._task: tuple[str, int] | None = None
        # The commands of this episode with their replies. (None, None) is a request for the
        # admissible commands: it draws from the simulator's random numbers, so it is replayed too.
        self._log: list[tuple[str | None, Reply | None]] = []
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The id of the Java process; None before the first episode."""
        return self._jvm.process.pid if self._jvm else None

    def load(self, kind: str, variation: int) -> tuple[str, Reply]:
        """Start an episode: the task in words, and the first look around.

        Raises:
          ValueError: the package or Java is missing, or has the wrong version.
          EpisodeLost: it could not be started in two processes.
        """
        self._begin()

        def load(jvm: Jvm) -> tuple[str, Reply]:
            jvm.load(kind, variation, self._simplifications)
            return jvm.description(), jvm.act(LOOK)

        description, first = self._ask(load)
        self._task, self._log = (kind, variation), [(LOOK, first)]
        return description, first

    def act(self, command: str) -> Reply:
        """Carry out a command.

        Raises:
          EpisodeLost: the episode cannot go on.
        """
        reply = self._ask(lambda jvm: jvm.act(command))
        self._log.append((command, reply))
        return reply

    def admissible(self) -> list[str]:
        """Every command that the simulator lists as possible now, in alphabetical order.

        Raises:
          EpisodeLost: the episode cannot go on.
        """
        commands = self._ask(lambda jvm: jvm.admissible())
        self._log.append((None, None))
        return commands

    def gold_path(self, kind: str, variation: int) -> list[str]:
        """The simulator's own path to the goal of a task; ends the running episode.

        Raises:
          ValueError, EpisodeLost: as for `load`.
        """
        self._begin()

        def find(jvm: Jvm) -> list[str]:
            jvm.load(kind, variation, self._simplifications, gold=True)
            return jvm.gold_path()

        return self._ask(find)

    def close(self) -> None:
        """End the Java process; the next episode starts another."""
        if self._jvm is not None:
            self._jvm.close()
            self._jvm = None

    def _begin(self) -> None:
        self._task, self._log = None, []
        if self._jvm is None:
            try:
                self._jvm = self._start()
            except WorldFailed as error:
                raise EpisodeLost(str(error)) from error

    def _start(self) -> Jvm:
        return Jvm(heap_mb=self._heap_mb, timeout_s=self._timeout_s)

    def _ask(self, ask: Callable[[Jvm], T]) -> T:
        """Ask the process; if it is lost, ask its replacement."""
        if self._jvm is None:
            raise EpisodeLost("there is no running episode")
        try:
            return ask(self._jvm)
        except EngineLost as lost:
            self.close()
            self.restarts += 1
            try:
                self._jvm = self._start()
                self._replay(self._jvm)
                return ask(self._jvm)
            except (EngineLost, EpisodeLost, WorldFailed, ValueError) as again:
                self.close()
                raise EpisodeLost(f"{lost}; its replacement did not help: {again}") from again

    def _replay(self, jvm: Jvm) -> None:
        if self._task is None:
            return
        jvm.load(*self._task, self._simplifications)
        for number, (command, reply) in enumerate(self._log):
            if command is None:
                jvm.admissible()
            elif jvm.act(command) != reply:
                raise EpisodeLost(
                    f"{task_id(*self._task)} went another way at command {number}, `{command}`"
                )
