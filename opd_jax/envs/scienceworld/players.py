"""ScienceWorld's expert: it follows the engine's own path to the goal.

The engine computes this path ("gold path") with full knowledge of the task, so the expert never
explores. It shows what success looks like and how long it takes, not how to find the way.
"""

import threading
from collections.abc import Sequence
from functools import cache

from opd_jax.envs.base import Observation
from opd_jax.envs.react import RESPONSE
from opd_jax.envs.scienceworld.engine import Engine
from opd_jax.envs.scienceworld.env import failure
from opd_jax.envs.scienceworld.jvm import EpisodeLost
from opd_jax.envs.scienceworld.tasks import parse_id
from opd_jax.runtime.exits import WorldFailed

# First word of a command -> the thought that goes with it; %s is the rest of the command.
THOUGHTS = {
    "activate": "It has to be switched on: %s.",
    "close": "It should be shut: %s.",
    "connect": "The circuit needs this connection: %s.",
    "deactivate": "It is no longer needed: %s.",
    "disconnect": "This connection has to go: %s.",
    "drop": "I no longer need to carry %s.",
    "dunk": "This fills one thing from the other: %s.",
    "eat": "I can eat %s.",
    "examine": "I want to know how this is now: %s.",
    "flush": "It can be flushed: %s.",
    "focus": "This is what the task asks me to point out: %s.",
    "go": "What I need next is elsewhere: %s.",
    "inventory": "I want to know what I carry.",
    "look": "I want to see what is here.",
    "mix": "The ingredients are together, so I mix: %s.",
    "move": "This has to be in its place: %s.",
    "open": "The way or the content is behind it: %s.",
    "pick": "I will need this: %s.",
    "pour": "The content has to get there: %s.",
    "put": "I no longer need to carry this: %s.",
    "read": "It may tell me what to do: %s.",
    "teleport": "What I need next is elsewhere: %s.",
    "use": "This tool tells or does what I need: %s.",
    "wait": "It takes time, so I wait.",
    "wait1": "It takes a moment, so I wait.",
}
CHOOSE = "Any of the things listed will do."
NOTHING_LEFT = "I have done all that I know of."


def thought(command: str) -> str:
    """A sentence that gives a reason for a command."""
    if command.isdecimal():
        return CHOOSE
    verb, _, rest = command.partition(" ")
    sentence = THOUGHTS[verb]
    return sentence % rest if "%s" in sentence else sentence


class GoldPaths:
    """The engine's paths to the goals of tasks, found in a Java process of its own.

    Args:
      simplifications, heap_mb, timeout_s: as for `ScienceWorld`. Paths found under one set of
        simplifications may not work under another.
    """

    def __init__(self, *, simplifications: str, heap_mb: int, timeout_s: float):
        self._engine = Engine(simplifications=simplifications, heap_mb=heap_mb, timeout_s=timeout_s)
        self._paths: dict[str, tuple[str, ...]] = {}
        self._searching = threading.Lock()

    def __call__(self, name: str) -> tuple[str, ...]:
        """The commands that solve the task with this id.

        Commands after the end of the episode are dropped. So are those that the engine does not
        carry out, if the rest still reaches the goal. Takes up to a few seconds for a new task, one
        at a time: threads share the process.

        Raises:
          ValueError: as `Engine.load`.
          WorldFailed: the engine was lost, and so was its replacement.
        """
        with self._searching:
            if name not in self._paths:
                try:
                    self._paths[name] = self._find(name)
                except EpisodeLost as lost:
                    raise WorldFailed(f"ScienceWorld's path for {name}: {lost}") from lost
            return self._paths[name]

    def _find(self, name: str) -> tuple[str, ...]:
        path = self._engine.gold_path(*parse_id(name))
        needed, _ = self._played(name, path)
        shorter, solved = self._played(name, needed)
        return tuple(shorter if solved else path)

    def _played(self, name: str, path: Sequence[str]) -> tuple[list[str], bool]:
        """The commands of a path that were carried out, and whether they reach the goal."""
        self._engine.load(*parse_id(name))
        needed = []
        for command in path:
            reply = self._engine.act(command)
            if not failure(reply.text):
                needed.append(command)
            if reply.completed:
                return needed, reply.score == 100
        return needed, False

    def close(self) -> None:
        """End the Java process."""
        self._engine.close()


@cache  # shared by all callers: a Java process for each, and seconds for each path
def gold_paths(*, simplifications: str, heap_mb: int, timeout_s: float) -> GoldPaths:
    """The shared `GoldPaths` of these settings; its process ends with the calling one."""
    return GoldPaths(simplifications=simplifications, heap_mb=heap_mb, timeout_s=timeout_s)


class Expert:
    """Follows a path whatever it sees, then looks around.

    Args:
      path: commands, such as those of `GoldPaths`.
    """

    def __init__(self, path: Sequence[str]):
        self._commands = iter(path)

    def respond(self, observation: Observation) -> str:
        """Return a response with the path's next command."""
        command = next(self._commands, None)
        if command is None:
            return RESPONSE % (NOTHING_LEFT, "look around")
        return RESPONSE % (thought(command), command)
