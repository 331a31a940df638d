"""The hand-coded expert of the `alfworld` package, as a player.

The package's expert reads all facts of the engine, hidden ones included. Here it gets only what a
player may know: the facts that the texts of the episode have told so far.

These faults of the package's expert are mended:
- It notices that something was put down when it reads "put". Since version 0.4 its own command is
  "move", so it would go on believing that it holds what it has placed.
- It takes cups, bowls and other objects that hold things for receptacles of the room, and so does
  not search the likely places first.
- It wants to go to a receptacle that is reached from where it stands. That is impossible and would
  set it wandering. Here it examines the receptacle instead, which shows the same.
- It closes whatever it has opened, which costs a third of a search. Here it does not.
- It draws from Python's global generator. Here it draws from its own.

When it does not know how to go on, it draws an admissible command.
"""

import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from opd_jax.envs.alfworld.engine import LOCK, alfworld_module
from opd_jax.envs.alfworld.env import canonical
from opd_jax.envs.alfworld.record import TREATMENTS, Record
from opd_jax.envs.base import Observation, Task
from opd_jax.envs.react import RESPONSE

# A limit of steps that the package's expert never reaches; the environment has its own limit.
_ENDLESS = 10**9

HOLDING = "I have %s. "
AIMS = {
    "find": "I am looking for %s. ",
    "goto": "I need %s now. ",
    "take": "I need %s. ",
    "heat": "It has to be hot. ",
    "cool": "It has to be cool. ",
    "clean": "It has to be clean. ",
    "put": "It belongs here. ",
    "use": "I need its light. ",
}
PLANS = {
    "go": "I go to %s next.",
    "open": "%s is closed, so I open it.",
    "close": "I am done with %s and close it.",
    "take": "%s is here, so I take it.",
    "move": "I put %s down.",
    "put": "I put %s down.",
    "heat": "I heat %s here.",
    "cool": "I cool %s here.",
    "clean": "I clean %s here.",
    "use": "I turn on %s.",
    "examine": "I check %s.",
}
LOST = "I look around again."

_MOVE = re.compile(r"^move (.+) to (.+)$")
_PUT = re.compile(r"^put (.+) in/on (.+)$")
_NUMBERED = re.compile(r"\w+ \d+")


class Fact(NamedTuple):
    """A fact in the engine's form."""

    name: str
    names: tuple[str, ...]


def facts(known: Record) -> list[Fact]:
    """What the texts have told, in the engine's form."""
    told = [Fact("inreceptacle", pair) for pair in known.place.items()]
    states = dict(TREATMENTS.values())
    told += [
        Fact(f"is{word}", (name,)) for (name, kind), word in known.changed.items() if kind in states
    ]
    return [*told, Fact("holds", ("agent1", known.hand))] if known.hand else told


def parameters(task: Task) -> dict[str, Any]:
    """The task's parameters for the package's expert, read from the instruction.

    Raises:
      ValueError: the instruction is not in a wording of the package.
    """
    library = alfworld_module("alfworld.gen.goal_library").gdict
    for template in library[task.type]["templates"]:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template))
        if match := re.fullmatch(pattern, task.goal.rstrip(".")):
            named = match.groupdict()
            return {
                "task_type": task.type,
                "object_target": named["obj"],
                "parent_target": named.get("recep", ""),
                "toggle_target": named.get("toggle", ""),
                "mrecep_target": "",
                "object_sliced": False,
            }
    raise ValueError(
        f"the expert reads instructions in the wordings of the alfworld package; got {task.goal!r} "
        f"for {task.id}"
    )


class Expert:
    """The package's hand-coded expert: searches likely places, and never plans with hidden facts.

    Args:
      task: the task; its type and goal are read.
      first: the observation that `reset` returned.
      rng: source of randomness.

    Raises:
      ValueError: see `parameters`; or the extra is missing.
    """

    def __init__(self, task: Task, first: Observation, *, rng: random.Random):
        wanted = parameters(task)
        self._rng = rng
        self._known = Record()
        self._first = first
        self._agent = alfworld_module("alfworld.agents.expert").HandCodedTWAgent()
        self._policy = self._agent.get_task_policy(wanted)(wanted, max_steps=_ENDLESS)
        self._agent.task_params, self._agent.policy = wanted, self._policy
        self._policy.RECEPTACLES = _fixed_receptacles(self._policy.RECEPTACLES)
        self._meant = ("", "")  # the last command, and the one that the package's expert chose
        self._track = self._policy.update_state_tracking
        self._policy.update_state_tracking = self._track_moves

    def respond(self, observation: Observation) -> str:
        """Read an observation and return `Thought: ...`, newline, `Action: ...`."""
        self._known.read(observation.action, observation.text, failed=bool(observation.failure))
        command = self._decide(observation)
        return RESPONSE % (self._thought(command), command)

    def _decide(self, observation: Observation) -> str:
        admissible = observation.admissible
        given, meant = self._meant
        last = meant if observation.action == given else observation.action
        text = observation.text
        if observation is self._first:
            text = f"Welcome! {text}"  # so that it recognizes the list of receptacles
        state = {
            "feedback": text,
            "facts": facts(self._known),
            "admissible_commands": [_PUT.sub(r"move \1 to \2", c) for c in admissible],
        }
        failed = alfworld_module("alfworld.agents.expert").HandCodedAgentFailed
        try:
            with _drawing_from(self._rng):
                meant = self._agent.act(state, 0, False, last or "look")
        except (failed, IndexError):  # no subgoal is left, or no place to search
            meant = self._rng.choice(admissible)
        instead = re.sub("^go to ", "examine ", meant)
        for command in (canonical(meant, admissible), instead):
            if command in admissible:
                self._meant = (command, meant)
                return command
        self._meant = ("look", "look")
        return "look"

    def _track_moves(self, state: dict[str, Any], command: str) -> None:
        self._track(state, _MOVE.sub(r"put \1 in/on \2", command))
        self._policy.action_backlog.clear()

    def _thought(self, command: str) -> str:
        holding = HOLDING % self._known.hand if self._known.hand else ""
        plan = PLANS.get(command.split()[0], LOST)
        if plan == LOST:
            return holding + LOST
        goal = self._policy.subgoals[min(self._policy.subgoal_idx, len(self._policy.subgoals) - 1)]
        aim = AIMS.get(goal["action"], "")
        aim = aim % goal["param"] if "%s" in aim else aim
        named = _NUMBERED.findall(command)
        return holding + aim + plan % (named[0] if named else "it")


def _fixed_receptacles(kinds: Iterable[str]) -> list[str]:
    movable = alfworld_module("alfworld.gen.constants").MOVABLE_RECEPTACLES
    return [kind for kind in kinds if kind not in {other.lower() for other in movable}]


@contextmanager
def _drawing_from(rng: random.Random) -> Iterator[None]:
    """Let the package's expert draw from `rng`; keep other threads away meanwhile."""
    expert: Any = alfworld_module("alfworld.agents.expert.handcoded_expert")
    with LOCK:
        before = expert.random
        expert.random = rng
        try:
            yield
        finally:
            expert.random = before
