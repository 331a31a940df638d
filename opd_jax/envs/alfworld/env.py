"""ALFWorld (Shridhar et al., 2021, arXiv:2010.03768) on its own engine, as an `Env`.

Games come from a folder, ALFWorld's own or generated ones (see `panel`). Scores on generated games
are not ALFWorld scores, and the ids of these games say so.

Turns follow the SAGE-OPD paper (arXiv 2606.19659): the message holds task, observation and the
first admissible commands; the response holds "Thought:" and "Action:". Two things the paper leaves
open. Admissible commands are listed most specific first: in the engine's alphabetical order,
`examine` and `go to` would crowd out `take` and `open` in a large kitchen. And `move X to Y`, `put
X in/on Y`, `put X in Y` and `put X on Y` all mean the form that the game knows, since version 0.4
of the engine changed it.
"""

import re
from collections.abc import Mapping, Sequence

from opd_jax.envs.alfworld.engine import Engine
from opd_jax.envs.alfworld.panel import Game, data_folder, digest, game, panel
from opd_jax.envs.alfworld.record import Record
from opd_jax.envs.base import Observation, Task
from opd_jax.envs.react import INVENTED, RESPONSE, parse_response
from opd_jax.envs.turns import TurnClock, listed

RULES = (
    "You act in a house that is described in text. Every turn you are told the task, what you "
    "observe, and what you can do now. Reply in two lines and nothing else:\n"
    "Thought: what you know and what to do next\n"
    "Action: one command\n"
    "\n"
    "Commands: go to PLACE, open PLACE, close PLACE, take OBJECT from PLACE, move OBJECT to PLACE, "
    "clean OBJECT with SINKBASIN, heat OBJECT with MICROWAVE, cool OBJECT with FRIDGE, use LAMP, "
    "examine PLACE, look, inventory. Every name ends in its number, as in apple 1. You can hold "
    "one object at a time, and see what a place holds only while you stand there. "
    '"Nothing happens." means that a command was not possible.\n'
)
# A whole episode; a turn is (thought, command, observation after it). A test plays it.
EXAMPLE_TASK = "put a cool tomato in sidetable."
EXAMPLE_SCENE = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, "
    "a countertop 1, a fridge 1, and a sidetable 1."
)
EXAMPLE_TURNS = (
    (
        "I have to find a tomato first. The countertop is a likely place.",
        "go to countertop 1",
        "You arrive at countertop 1. On the countertop 1, you see a bread 1, and a knife 1.",
    ),
    (
        "There is no tomato here. The fridge is the next likely place.",
        "go to fridge 1",
        "You arrive at fridge 1. The fridge 1 is closed.",
    ),
    (
        "The fridge is closed, so I open it to see what is in it.",
        "open fridge 1",
        "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1, and a tomato 1.",
    ),
    (
        "Here is tomato 1. I take it.",
        "take tomato 1 from fridge 1",
        "You pick up the tomato 1 from the fridge 1.",
    ),
    (
        "I hold tomato 1 and stand at the fridge, so I cool it now.",
        "cool tomato 1 with fridge 1",
        "You cool the tomato 1 using the fridge 1.",
    ),
    (
        "The tomato is cool. It belongs on the sidetable.",
        "go to sidetable 1",
        "You arrive at sidetable 1. On the sidetable 1, you see nothing.",
    ),
    (
        "I am at the sidetable with the cool tomato and put it down to finish.",
        "move tomato 1 to sidetable 1",
        "You move the tomato 1 to the sidetable 1.",
    ),
)
MESSAGE = "Task: %s\nObservation: %s"
ADMISSIBLE_LINE = "\nAdmissible actions: "

NOTHING = "Nothing happens."
# What the engine says of a failed turn -> the failure. Responses without a command (`empty`,
# `no_action`) are answered with `NOTHING` as well, but do not reach the engine.
FAILURES = {NOTHING: "rejected"}

_GOAL = re.compile(r"Your task is to: (.*)")
_PUT = re.compile(r"(?:put|move) (.+?) (?:in/on|in|on|to) (.+)")
# First words of general commands, in listed order. All others are more specific and come first.
_GENERAL = ("go", "examine", "look", "inventory", "help")


def system_message() -> str:
    """Rules and one demonstration, whose turns leave out the admissible commands."""
    lines = [RULES, "An example of a whole task:", MESSAGE % (EXAMPLE_TASK, EXAMPLE_SCENE)]
    for thought, command, observation in EXAMPLE_TURNS:
        lines += [RESPONSE % (thought, command), f"Observation: {observation}"]
    return "\n".join(lines)


def canonical(command: str, admissible: Sequence[str]) -> str:
    """The command in the engine's spelling, if it is a spelling of an admissible one.

    Args:
      command: as written; case, spaces and a full stop at the end do not matter.
      admissible: the engine's admissible commands.
    """
    command = " ".join(command.lower().rstrip(" .\t").split())
    if match := _PUT.fullmatch(command):
        for form in ("move %s to %s", "put %s in/on %s"):
            if form % match.groups() in admissible:
                return form % match.groups()
    return command


def most_specific_first(commands: Sequence[str]) -> tuple[str, ...]:
    """Commands on things at hand first, then `go to`, then examining and looking. Stable."""
    order = {word: rank for rank, word in enumerate(_GENERAL, 1)}
    return tuple(sorted(commands, key=lambda command: order.get(command.split()[0], 0)))


class AlfWorld:
    """ALFWorld as an `Env`, one game at a time.

    A reset takes about 0.8 s, a step 40 ms. The engine is not thread-safe, so the environments of a
    process take turns; use worker processes to run them side by side.

    Args:
      data: a folder with games; "" for the environment variable `ALFWORLD_DATA`.
      max_turns: an episode ends after this many responses.
      show_admissible: how many admissible commands each message lists; 0 shows none.

    Raises:
      ValueError: the extra or the data is missing, `max_turns` is below 1 or `show_admissible` is
        below 0.
    """

    system = system_message()
    waits = False
    world = ("data",)
    labels_turns = False
    invented = INVENTED

    def __init__(self, *, data: str, max_turns: int, show_admissible: int):
        self._clock = TurnClock(max_turns)
        if show_admissible < 0:
            raise ValueError(
                f"`show_admissible` must be 0 (show none) or more; got {show_admissible}."
            )
        self._folder = data_folder(data)
        self._engine = Engine()
        self._show_admissible = show_admissible

    def games(self, split: str) -> tuple[Game, ...]:
        """The games of `split` in the order of their index; raises as `panel`."""
        return panel(self._folder, split)

    def size(self, split: str) -> int:
        """Number of games in `split`; ValueError naming the known splits otherwise."""
        return len(self.games(split))

    def digest(self, split: str) -> str:
        """The digest of the games of `split`; see `panel.digest`."""
        return digest(self.games(split))

    def reset(self, split: str, index: int) -> Observation:
        """Start game `index` of `split`; ValueError if there is no such game."""
        played = game(self._folder, split, index)
        reply = self._engine.start(played.path)
        scene, goal = parse_intro(reply.text)
        self.task = Task(id=played.id, type=played.type, goal=goal, scene=scene)
        self._clock.start()
        self._record = Record()
        self._admissible = most_specific_first(reply.admissible)
        return Observation(scene, self._message(scene), self._admissible)

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text.

        A response without a command (`empty`, `no_action`) or with an impossible one (`rejected`)
        changes nothing. The answer is then `Nothing happens.`.

        Raises:
          ValueError: if there is no running episode.
        """
        self._clock.tick()
        command, failure = parse_response(response)
        text, won = NOTHING, False
        if not failure:
            command = canonical(command, self._admissible)
            reply = self._engine.act(command)
            text, won = reply.text, reply.won
            failure = FAILURES.get(text, "")
            self._admissible = most_specific_first(reply.admissible)
        self._record.read(command, text, failed=bool(failure))
        end = self._clock.end("success" if won else "")
        score = 1.0 if won else 0.0
        return Observation(
            text, self._message(text), self._admissible, end, score, command, failure
        )

    def record(self) -> Mapping[str, Sequence[str]]:
        """What the agent may know of this episode (`base.Records`)."""
        return self._record.lists()

    def _message(self, text: str) -> str:
        message = MESSAGE % (self.task.goal, text)
        if not self._show_admissible:
            return message
        return message + ADMISSIBLE_LINE + listed(self._admissible, self._show_admissible)


def parse_intro(feedback: str) -> tuple[str, str]:
    """Scene and goal from the engine's first text: welcome, scene and task, a paragraph each.

    Raises:
      ValueError: the text holds no scene or no task.
    """
    goal = _GOAL.search(feedback)
    scenes = [part.strip() for part in feedback.split("\n\n") if "you see" in part]
    if not goal or not scenes:
        raise ValueError(f"the game's introduction has no scene or no task: {feedback!r}")
    return scenes[0], goal[1].strip()
