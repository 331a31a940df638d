"""ScienceWorld as an `Env`: experiments of elementary science in a simulated house, in text.

Engine, tasks, texts and scores are the original's (Wang et al., 2022, arXiv:2203.07540; see `jvm`).
This file parses responses, recognizes failed commands, and decides when an episode ends. It differs
from the package's own loop in three ways:

- It counts turns, not the engine's moves (`wait` makes ten moves).
- It neither lists nor carries out `reset task`, which would undo the progress made.
- If the engine dies or hangs, it replaces the engine and plays the episode again. If that fails,
  the episode ends as `broken`, which says nothing about the agent.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest

from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.envs.react import INVENTED, parse_response
from opd_jax.envs.scienceworld import tasks
from opd_jax.envs.scienceworld.engine import Engine
from opd_jax.envs.scienceworld.jvm import EpisodeLost, Reply, check_installed
from opd_jax.envs.scienceworld.prompts import TASK, TELEPORT, held, system_message, turn_message
from opd_jax.envs.scienceworld.record import Record
from opd_jax.envs.turns import TurnClock, encodable

PREAMBLE = "Your task is to "
ELECTRICITY = "noElectricalAction"
SIMPLIFICATIONS = ("easy", TELEPORT, "openDoors", "openContainers", "selfWateringFlowerPots")
SUCCESS_SCORE = 100

NO_ACTION = (
    'Your reply holds no action. Reply in two lines, "Thought: ..." and "Action: ...", with one '
    "command in the second."
)
FAULT = "The environment broke down: %s"

# What the engine answers to a command that it does not carry out; `*` stands for any words. It
# reports failure in no other way. The tests provoke each text. An "Ambiguous request" is not a
# failure: the engine asks which of several things is meant and carries the command out when a
# number follows. Its own paths to the goal do that, too. The judge says whether it was a good turn.
FAILURES = {
    "unknown": (
        "No known action matches that input.",
        # The answer to anything but a number after an ambiguous command.
        "Unknown action. Type 'help' for a list of actions, and 'objects' for a list of possible "
        "object referents.",
    ),
    "already": (
        "The * is already activated.",
        "The * is already deactivated.",
        "The * is already open.",
        "The * is already closed.",
        "That is already flushing.",
        "* is already connected, and must be disconnected before it can be connected to something "
        "else",
    ),
    "impossible": (
        "The * is not something that can be activated.",
        "The * appears broken, and can't be activated or deactivated.",
        "The * is not openable.",
        "The * is not closeable.",
        "The * is not moveable.",
        "The * is not edible.",
        "The * is not open.",
        "The * is not a container.",
        "The * isn't open, so you can't see inside.",
        "The * does not contain any liquids to dunk into.",
        "The * can't be poured out, because it's not open.",
        "The * is in is not movable.",
        "That can't be moved there.",
        "That can't be moved there, because the * isn't open.",
        "That can't be moved there, because it's not a container.",
        "That container is empty, so there are no items to mix.",
        "There is only one thing (*)",
        "That thing doesn't appear to have a temperature that the thermometer can read.",
        "You can't move something into itself.",
        "You can't dunk something into itself.",
        "You can't pick up a gas directly.",
        "You can't pick up a liquid directly. Try pouring it from one container to another, or "
        "dunking empty containers into containers filled with the liquid.",
        "I'm not sure how to pour a solid.",
        "I'm not sure how to use the *.",
        "I'm not sure how to use those two things together.",
        "It's not clear how to flush that.",
        "It's not clear how to get there from here.",
        "It's not clear how to look inside of that.",
        "It's not clear how to read that.",
        "Its not clear how to go to *.",
        "Its not clear how to go to/through a *.",
        "Something can't be connected to itself.",
        "Connections must specify specific points of contact on *",
        "You must disconnect entire objects (such as *) instead of just single terminals",
    ),
}
_PATTERNS = {
    reason: re.compile("|".join(re.escape(text).replace(r"\*", ".+") for text in texts), re.DOTALL)
    for reason, texts in FAILURES.items()
}
_FORBIDDEN = ["reset", "task"]
_ARTICLES = ("a", "an", "the")  # the engine ignores them


def failure(text: str) -> str:
    """Why the engine did not carry out a command (a key of `FAILURES`); "" if it did."""
    text = re.sub(" +", " ", text).strip()
    for reason, pattern in _PATTERNS.items():
        if pattern.fullmatch(text):
            return reason
    return ""


def tidy(text: str) -> str:
    """The engine's text without white space at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def spread(commands: Iterable[str]) -> list[str]:
    """Reorder commands: the first of each verb, then the second of each, and so on.

    The engine lists hundreds in alphabetical order, and the first few of them share one verb.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for command in commands:
        kinds[command.split(" ", 1)[0]].append(command)
    rounds = chain.from_iterable(zip_longest(*kinds.values()))
    return [command for command in rounds if command is not None]


def check_simplifications(simplifications: str) -> None:
    """ValueError unless the engine knows all simplifications and every task allows them."""
    for name in filter(None, simplifications.split(",")):
        if name == ELECTRICITY:
            raise ValueError(
                f"`simplifications`: {ELECTRICITY} makes the tasks about electricity impossible; "
                "easy applies it to the others only"
            )
        if name not in SIMPLIFICATIONS:
            raise ValueError(
                "`simplifications`: expected names joined by commas, of "
                f"{', '.join(SIMPLIFICATIONS)}, or nothing; got {name!r}"
            )


class ScienceWorld:
    """ScienceWorld as an `Env`, one task at a time.

    `Observation.score` is the engine's own, from -100 (a wrong focus, which ends the episode as
    `failed`) to 100 (`success`). It counts partial goals, so it rises on the way and may be above 0
    at the start. The Java process starts with the first episode.

    Args:
      simplifications: names of `SIMPLIFICATIONS` joined by commas; "" for none. Most published
        figures use `easy`: teleporting, open doors, flower pots that water themselves, and no
        electrical commands in tasks that need none.
      max_turns: an episode ends after this many responses.
      list_admissible: how many admissible commands each observation holds, spread over all verbs.
        They are not part of the message. 0 lists none and saves most of a step's time. Listing
        draws from the engine's random numbers, so chance events in an episode may depend on whether
        this is 0, but not on the number.
      heap_mb: most memory of Java's heap, in MiB.
      timeout_s: longest wait for an answer of the engine, in seconds.

    Raises:
      ValueError: an argument is out of range, or the package or Java is missing.
    """

    world = ("heap_mb", "timeout_s")
    labels_turns = False
    invented = INVENTED

    def __init__(
        self,
        *,
        simplifications: str,
        max_turns: int,
        list_admissible: int,
        heap_mb: int,
        timeout_s: float,
    ):
        check_simplifications(simplifications)
        for name, value, least in (
            ("max_turns", max_turns, 1),
            ("list_admissible", list_admissible, 0),
            ("heap_mb", heap_mb, 64),
            ("timeout_s", timeout_s, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}`: expected at least {least}, got {value}")
        check_installed()
        self.system = system_message(simplifications)
        self.waits = False
        self._clock = TurnClock(max_turns)
        self._list_admissible = list_admissible
        self._engine = Engine(simplifications=simplifications, heap_mb=heap_mb, timeout_s=timeout_s)

    @property
    def restarts(self) -> int:
        """Number of Java processes that were lost and replaced."""
        return self._engine.restarts

    def size(self, split: str) -> int:
        """Number of tasks in `split`; ValueError naming the known splits otherwise."""
        return len(tasks.tasks(split))

    def digest(self, split: str) -> str:
        """Identifies the tasks of `split`; see `tasks.digest`."""
        return tasks.digest(split)

    def reset(self, split: str, index: int) -> Observation:
        """Start task `index` of `split`.

        If the episode cannot be started, it is over at once, with `end` = `BROKEN`.

        Raises:
          ValueError: there is no such task, or the package or Java is missing.
        """
        listed = tasks.tasks(split)
        if not 0 <= index < len(listed):
            raise ValueError(
                f"`index`: expected 0..{len(listed) - 1} in split {split!r}, got {index}"
            )
        kind, variation = listed[index]
        name = tasks.task_id(kind, variation)
        self._record = Record()
        self._admissible: tuple[str, ...] = ()
        try:
            description, self._reply = self._engine.load(kind, variation)
            self._list()
        except EpisodeLost as lost:
            self._clock.stop()
            self.task = Task(id=name, type=kind, goal="", scene="")
            return Observation(FAULT % lost, FAULT % lost, (), BROKEN)
        self._clock.start()
        scene = tidy(self._reply.text)
        goal = " ".join(description.split()).removeprefix(PREAMBLE)
        self.task = Task(id=name, type=kind, goal=goal, scene=scene)
        self._record.read("", scene, held=held(self._reply.inventory), failed=False)
        message = TASK % goal + turn_message(scene, self._reply.inventory)
        return Observation(scene, message, self._admissible, score=float(self._reply.score))

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text.

        A response without a command (`empty`, `no_action`) changes nothing. A command that the
        engine does not carry out (a key of `FAILURES`) may still take a moment of its time.

        Raises:
          ValueError: if there is no running episode.
        """
        self._clock.tick()
        command, why = parse_response(response)
        if why:
            return self._observe(NO_ACTION, "", why)
        command = " ".join(encodable(command).split()).rstrip(" .")
        words = [word for word in command.lower().split() if word not in _ARTICLES]
        if words == _FORBIDDEN:
            return self._observe(FAILURES["unknown"][0], command, "unknown")
        try:
            self._reply = self._engine.act(command)
            if not self._end():
                self._list()
        except EpisodeLost as lost:
            self._clock.stop()
            fault = FAULT % lost
            return Observation(fault, fault, (), BROKEN, float(self._reply.score), command)
        text = tidy(self._reply.text.replace("\n\treset task", ""))
        return self._observe(text, command, failure(text))

    def _list(self) -> None:
        if self._list_admissible:
            listed = (c for c in self._engine.admissible() if c.split() != _FORBIDDEN)
            self._admissible = tuple(spread(listed)[: self._list_admissible])

    def _end(self) -> str:
        reply: Reply = self._reply
        over = ""
        if reply.completed or reply.score < 0:
            over = "success" if reply.score >= SUCCESS_SCORE else "failed"
        return self._clock.end(over)

    def record(self) -> Mapping[str, Sequence[str]]:
        """What the agent may know of this episode (`base.Records`)."""
        return self._record.lists()

    def _observe(self, text: str, command: str, why: str) -> Observation:
        if command:
            self._record.read(command, text, held=held(self._reply.inventory), failed=bool(why))
        end = self._end()
        return Observation(
            text=text,
            message=turn_message(text, self._reply.inventory),
            admissible=() if end else self._admissible,
            end=end,
            score=float(self._reply.score),
            action=command,
            failure=why,
        )

    def close(self) -> None:
        """End the Java process; the next `reset` starts another."""
        self._engine.close()
        self._clock.stop()
