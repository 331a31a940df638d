"""Writes rooms as problems of ALFWorld's PDDL domain, and as game files that TextWorld plays.

Domain, text grammar and goals are read from the installed `alfworld` package (MIT).

TextWorld names an entity by the part of its id before the first `|`, in lower case, and a number.
Numbers count down in order of id: of n entities of a kind, the first is number n and the last is
number 1. A basin has its own kind: `Sink|...|SinkBasin` is a sinkbasin.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_jax.envs.alfworld.engine import alfworld_module
from opd_jax.envs.alfworld.panel import GAME_FILE, GENERATED, TASK_FILE

# Characters that Fast Downward's parser does not accept in a name.
_ESCAPES = {"|": "_bar_", "-": "_minus_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}
_AGENT = "agent1"
_START = "loc|start"  # in the middle of the room; no receptacle can be reached from there


@dataclass(frozen=True)
class Receptacle:
    """Something that stands in the room and holds objects.

    Attributes:
      id: for example `Cabinet|+00.68|+00.50|-02.20`; its name follows from it (see the module).
      kind: for example `Cabinet`.
      location: where one stands to reach it; several receptacles may share one.
      openable: it can be opened and closed, and starts closed.
    """

    id: str
    kind: str
    location: str
    openable: bool


@dataclass(frozen=True)
class Thing:
    """An object in a receptacle.

    Attributes:
      id, kind: as in `Receptacle`.
      place: the receptacle that holds it.
      abilities: predicates of the domain, such as `pickupable` and `heatable`.
    """

    id: str
    kind: str
    place: Receptacle
    abilities: tuple[str, ...]


@dataclass(frozen=True)
class Goal:
    """The goal of a task.

    Attributes:
      type: a key of `alfworld.gen.goal_library.gdict`, such as `pick_and_place_simple`.
      object: the kind of object.
      target: the kind of receptacle; "" for none.
      lamp: the kind of lamp; "" for none.
    """

    type: str
    object: str
    target: str
    lamp: str

    def instructions(self) -> list[str]:
        """The package's wordings of the instruction, without a full stop."""
        words = {"obj": self.object, "recep": self.target, "toggle": self.lamp}
        lower = {name: word.lower() for name, word in words.items()}
        return [template.format(**lower) for template in _goal(self.type)["templates"]]


def _goal(task_type: str) -> dict[str, Any]:
    return alfworld_module("alfworld.gen.goal_library").gdict[task_type]


def problem(
    goal: Goal,
    receptacles: Sequence[Receptacle],
    things: Sequence[Thing],
    *,
    fits: Iterable[tuple[str, str]],
) -> str:
    """The text of a PDDL problem; the player starts in the middle of the room with empty hands.

    Args:
      goal: its kinds must occur in the room.
      receptacles: the receptacles of the room.
      things: the objects in them.
      fits: pairs of a kind of receptacle and a kind of object that it can hold.
    """
    pairs = sorted(set(fits))
    kinds = {thing.kind for thing in things} | {kind for _, kind in pairs}
    homes = {receptacle.kind for receptacle in receptacles} | {kind for kind, _ in pairs}
    locations = sorted({_START, *(receptacle.location for receptacle in receptacles)})
    objects = [
        f"{_AGENT} - agent",
        *(f"{_escape(location)} - location" for location in locations),
        *(f"{_escape(receptacle.id)} - receptacle" for receptacle in receptacles),
        *(f"{_escape(thing.id)} - object" for thing in things),
        *(f"{kind}Type - rtype" for kind in sorted(homes)),
        *(f"{kind}Type - otype" for kind in sorted(kinds)),
    ]
    facts = [
        f"(atLocation {_AGENT} {_escape(_START)})",
        *(f"(canContain {home}Type {kind}Type)" for home, kind in pairs),
        *(fact for receptacle in receptacles for fact in _receptacle_facts(receptacle)),
        *(fact for thing in things for fact in _thing_facts(thing)),
        "(= (total-cost) 0)",
    ]
    # The package's goals write `#` for the dash before a type, and close the problem.
    wanted = _goal(goal.type)["pddl"].format(obj=goal.object, recep=goal.target, toggle=goal.lamp)
    return "\n".join(
        [
            "(define (problem alfred-room)",
            "(:domain alfred)",
            *("(:objects", *objects, ")"),
            *("(:init", *facts, ")"),
            wanted.replace("#", "-"),
        ]
    )


def names(receptacles: Sequence[Receptacle], things: Sequence[Thing]) -> dict[str, str]:
    """Id -> the name that the engine shows for it (see the module)."""
    kinds: dict[str, list[str]] = {}
    for name in [*(place.id for place in receptacles), *(thing.id for thing in things)]:
        kind = name.partition("|")[0].lower() + ("basin" if "basin" in name.lower() else "")
        kinds.setdefault(kind, []).append(name)
    shown: dict[str, str] = {}
    for kind, ids in kinds.items():
        ids.sort(key=lambda name: _escape(name).lower(), reverse=True)
        shown |= {name: f"{kind} {number}" for number, name in enumerate(ids, 1)}
    return shown


def _escape(name: str) -> str:
    for character, word in _ESCAPES.items():
        name = name.replace(character, word)
    return name


def _receptacle_facts(receptacle: Receptacle) -> list[str]:
    name = _escape(receptacle.id)
    facts = [
        f"(receptacleType {name} {receptacle.kind}Type)",
        f"(receptacleAtLocation {name} {_escape(receptacle.location)})",
    ]
    return [*facts, f"(openable {name})"] if receptacle.openable else facts


def _thing_facts(thing: Thing) -> list[str]:
    name = _escape(thing.id)
    return [
        f"(objectType {name} {thing.kind}Type)",
        f"(inReceptacle {name} {_escape(thing.place.id)})",
        f"(objectAtLocation {name} {_escape(thing.place.location)})",
        *(f"({ability} {name})" for ability in thing.abilities),
    ]


def write_game(
    folder: Path,
    goal: Goal,
    instruction: str,
    problem_text: str,
    *,
    walkthrough: Sequence[str] | None,
    source: dict[str, Any],
) -> None:
    """Write the two files of a game, marked as generated.

    Args:
      folder: created if it does not exist.
      goal: the goal of the problem.
      instruction: the goal in words, without a full stop.
      problem_text: see `problem`.
      walkthrough: commands that solve it; None if not known.
      source: says where the game comes from; stored as the mark.
    """
    info = alfworld_module("alfworld.info")
    grammar = Path(info.ALFRED_TWL2_PATH).read_text("utf-8")
    game = {
        "pddl_domain": Path(info.ALFRED_PDDL_PATH).read_text("utf-8"),
        "grammar": grammar.replace("UNKNOWN GOAL", instruction),
        "pddl_problem": problem_text,
        "solvable": True,
        "walkthrough": walkthrough,
        GENERATED: source,
    }
    parameters = {
        "object_target": goal.object,
        "parent_target": goal.target,
        "toggle_target": goal.lamp,
        "mrecep_target": "",
        "object_sliced": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    task = {"task_type": goal.type, "pddl_params": parameters, GENERATED: source}
    (folder / TASK_FILE).write_text(json.dumps(task), "utf-8")
    (folder / GAME_FILE).write_text(json.dumps(game), "utf-8")
