"""Generates games in ALFWorld's format, for work without its download.

    python -m opd_jax.envs.alfworld.games --out=DIR --games=N --seed=0

The installed `alfworld` package supplies domain, grammar, goals, rooms with their receptacles, the
kinds of objects in each room and what fits where. Which objects there are and where they lie is
drawn here. So these are not ALFWorld's games and scores on them are not ALFWorld scores; each game
says so in its file and its id. As in ALFWorld, only `valid_unseen` has the rooms held out for it.
The package leaves two things open. Here a receptacle without a listed place gets its own, one of
each kind, and lamps stand on tables, desks and dressers.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from opd_jax.envs.alfworld.engine import alfworld_module
from opd_jax.envs.alfworld.panel import SPLITS, TASK_TYPES, digest, panel
from opd_jax.envs.alfworld.problem import (
    Goal,
    Receptacle,
    Thing,
    names,
    problem,
    write_game,
)
from opd_jax.envs.household.scenes import Draw
from opd_jax.envs.household.tables import CLEAN, COOL, HEAT, LOOK, SIMPLE, TREATMENTS, TWO
from opd_jax.runtime.exits import reported
from opd_jax.runtime.files import local_path

SUMMARY = "Generates games in ALFWorld's format; they are not ALFWorld's games."
# Raise it with every change of what is drawn.
VERSION = 1

# Task type -> (key of the package's table of abilities, kind of receptacle that treats).
_TOOLS = {
    CLEAN: ("Cleanable", "SinkBasin"),
    HEAT: ("Heatable", "Microwave"),
    COOL: ("Coolable", "Fridge"),
}
_LAMPS = ("DeskLamp", "FloorLamp")
_LAMP_PLACES = ("CoffeeTable", "Desk", "DiningTable", "Dresser", "SideTable")
# Number of objects of a kind in a room, each entry equally likely.
_COPIES = (0, 1, 1, 1, 2, 3)


@dataclass(frozen=True)
class Scene:
    """A room as the package describes it.

    Attributes:
      number: its number in ALFWorld.
      receptacles: in order of id.
      fits: kind of object in the room -> kinds of receptacles in the room that can hold it, at
        least one.
      lamps: kinds of lamps in the room.
    """

    number: int
    receptacles: tuple[Receptacle, ...]
    fits: dict[str, tuple[str, ...]]
    lamps: tuple[str, ...]

    def of_kind(self, kind: str) -> list[Receptacle]:
        """Receptacles of a kind."""
        return [receptacle for receptacle in self.receptacles if receptacle.kind == kind]


@dataclass(frozen=True)
class Room:
    """A scene with a goal and objects."""

    scene: Scene
    goal: Goal
    things: tuple[Thing, ...]


def _constants() -> ModuleType:
    return alfworld_module("alfworld.gen.constants")


@cache
def read_scene(number: int) -> Scene:
    """The room of a floor plan; raises as `alfworld_module`."""
    constants = _constants()
    layouts = Path(str(constants.__file__)).parent / "layouts"
    listed = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text("utf-8"))
    present = set(json.loads((layouts / f"FloorPlan{number}-objects.json").read_text("utf-8")))
    holds = constants.VAL_RECEPTACLE_OBJECTS
    fixed = set(holds) - set(constants.MOVABLE_RECEPTACLES)
    # The id of a basin ends in its kind; every other id begins with it.
    kinds = {name: _kind(name) for name in listed}
    places = {name: "loc|" + "|".join(map(str, pose)) for name, pose in listed.items()}
    for kind in fixed & present - set(kinds.values()):
        name = _numbered_id(kind, 0, 0, 0)
        kinds[name], places[name] = kind, f"loc|{kind}"
    receptacles = tuple(
        Receptacle(name, kind, places[name], kind in constants.OPENABLE_CLASS_SET)
        for name, kind in sorted(kinds.items())
        if kind in fixed
    )
    standing = sorted({receptacle.kind for receptacle in receptacles})
    fits = {
        kind: tuple(home for home in standing if kind in holds[home])
        for kind in sorted(present - fixed)
    }
    fits |= {lamp: tuple(home for home in standing if home in _LAMP_PLACES) for lamp in _LAMPS}
    fits = {kind: homes for kind, homes in fits.items() if homes and kind in present}
    return Scene(number, receptacles, fits, tuple(lamp for lamp in _LAMPS if lamp in fits))


def _kind(name: str) -> str:
    parts = name.split("|")
    return parts[0] if len(parts) == 4 else parts[0] + "Basin"


def _numbered_id(kind: str, *position: int) -> str:
    """An id as in ALFWorld; positions are in hundredths."""
    digits = "|".join(f"{'-' if p < 0 else '+'}{abs(p) / 100:05.2f}" for p in position)
    if kind.endswith("Basin"):
        return f"{kind.removesuffix('Basin')}|{digits}|{kind}"
    return f"{kind}|{digits}"


def scene_numbers(split: str, task_type: str) -> list[list[int]]:
    """The scenes that can host a task type in a split, a list for each kind of room."""
    constants = _constants()
    unseen = split == "valid_unseen"
    numbers = set(constants.TEST_SCENE_NUMBERS if unseen else constants.TRAIN_SCENE_NUMBERS)
    rooms = sorted(constants.GOALS_VALID[task_type])
    return [sorted(numbers & set(constants.SCENE_TYPE[room])) for room in rooms]


def goals(task_type: str, scene: Scene) -> list[Goal]:
    """Every goal of a type that is possible in a scene."""
    if task_type == LOOK:
        kinds = [kind for kind in scene.fits if kind not in _LAMPS]
        return [Goal(task_type, kind, "", lamp) for kind in kinds for lamp in scene.lamps]
    ability, tool = _TOOLS.get(task_type, ("", ""))
    if tool and not scene.of_kind(tool):
        return []
    able = _constants().VAL_ACTION_OBJECTS[ability] if ability else scene.fits
    return [
        Goal(task_type, kind, target, "")
        for kind, homes in scene.fits.items()
        if kind in able and kind not in _LAMPS
        for target in homes
        # The objects must have another place to start from.
        if target != tool and (tool or len(homes) > 1)
    ]


def draw_room(split: str, index: int, *, seed: int) -> Room:
    """Room `index` of `split`. Each block of six rooms has the six task types in random order."""
    text = f"alfworld-games/{VERSION}/{seed}/{split}"
    block, place = divmod(index, len(TASK_TYPES))
    task_type = Draw(f"{text}/block/{block}").shuffled(TASK_TYPES)[place]
    draw = Draw(f"{text}/{index}")
    possible: list[Goal] = []
    while not possible:  # not every room has what the type needs
        chosen = read_scene(draw.choice(draw.choice(scene_numbers(split, task_type))))
        possible = goals(task_type, chosen)
    wanted = draw.choice(sorted({goal.object for goal in possible}))
    goal = draw.choice([goal for goal in possible if goal.object == wanted])
    counts = {kind: draw.choice(_COPIES) for kind in chosen.fits}
    counts |= dict.fromkeys(_LAMPS, 0) | ({goal.lamp: 1} if goal.lamp else {})
    counts[wanted] = (2 if task_type == TWO else 1) + (draw.below(8) == 0)
    used: set[str] = set()
    things = [
        _thing(draw, chosen, goal, kind, used)
        for kind in sorted(chosen.fits)
        for _ in range(counts[kind])
    ]
    return Room(chosen, goal, tuple(things))


def _thing(draw: Draw, scene: Scene, goal: Goal, kind: str, used: set[str]) -> Thing:
    """An object of a kind where it fits, with an id that is not in `used` yet."""
    homes = scene.fits[kind]
    if kind == goal.object and goal.type in (SIMPLE, TWO):
        homes = tuple(home for home in homes if home != goal.target)
    place = draw.choice(scene.of_kind(draw.choice(homes)))
    name = ""
    while not name or name in used:
        name = _numbered_id(kind, *(draw.between(-500, 500) for _ in range(3)))
    used.add(name)
    constants = _constants()
    abilities = [
        ability.lower() for ability, kinds in constants.VAL_ACTION_OBJECTS.items() if kind in kinds
    ]
    if kind not in _LAMPS:
        abilities.append("pickupable")
    if kind in constants.MOVABLE_RECEPTACLES:
        abilities.append("isReceptacleObject")
    return Thing(name, kind, place, tuple(sorted(abilities)))


class _Walk:
    """Collects the commands of a player who knows everything."""

    def __init__(self, room: Room):
        self.shown = names(room.scene.receptacles, room.things)
        self.commands: list[str] = []
        self.location = ""
        self.opened: set[str] = set()

    def go(self, place: Receptacle) -> str:
        """Go to a receptacle unless it can be reached from here; return its name."""
        if place.location != self.location:
            self.commands.append(f"go to {self.shown[place.id]}")
            self.location = place.location
        return self.shown[place.id]

    def reach_into(self, place: Receptacle) -> str:
        """Go to a receptacle and open it if it is closed; return its name."""
        name = self.go(place)
        if place.openable and place.id not in self.opened:
            self.commands.append(f"open {name}")
            self.opened.add(place.id)
        return name


def walkthrough(room: Room) -> list[str]:
    """Commands that reach the goal."""
    walk, goal, scene = _Walk(room), room.goal, room.scene
    wanted = [thing for thing in room.things if thing.kind == goal.object]
    for thing in wanted[: 2 if goal.type == TWO else 1]:
        name = walk.shown[thing.id]
        walk.commands.append(f"take {name} from {walk.reach_into(thing.place)}")
        if goal.lamp:
            lamp = next(thing for thing in room.things if thing.kind == goal.lamp)
            walk.go(lamp.place)
            walk.commands.append(f"use {walk.shown[lamp.id]}")
            continue
        if goal.type in _TOOLS:
            tool = walk.go(scene.of_kind(_TOOLS[goal.type][1])[0])
            walk.commands.append(f"{TREATMENTS[goal.type][0]} {name} with {tool}")
        target = walk.reach_into(scene.of_kind(goal.target)[0])
        walk.commands.append(f"move {name} to {target}")
    return walk.commands


def write(out: Path, split: str, index: int, *, seed: int) -> Path:
    """Write game `index` of `split` below `out`, and return its folder."""
    room = draw_room(split, index, seed=seed)
    goal, scene = room.goal, room.scene
    fits = [(home, kind) for kind, homes in scene.fits.items() for home in homes]
    text = problem(goal, scene.receptacles, room.things, fits=fits)
    instruction = Draw(f"alfworld-games/{VERSION}/{seed}/{split}/{index}/words").choice(
        goal.instructions()
    )
    # The mark makes the id, and so the place in a panel, change with the content.
    mark = hashlib.sha256(f"{instruction}\n{text}".encode()).hexdigest()[:8]
    folder = out / split
    folder /= f"{goal.type}-{goal.object}-None-{goal.target or goal.lamp}-{scene.number}"
    folder /= f"trial_{seed}_{index:05d}_{mark}"
    source = {"generator": "opd_jax.envs.alfworld.games", "version": VERSION, "seed": seed}
    write_game(folder, goal, instruction, text, walkthrough=walkthrough(room), source=source)
    return folder


def main(arguments: Sequence[str]) -> None:
    """The command `python -m opd_jax.envs.alfworld.games`."""
    parser = argparse.ArgumentParser(prog="opd_jax.envs.alfworld.games", description=SUMMARY)
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("--games", type=int, required=True, help="games in each split")
    parser.add_argument("--seed", type=int, required=True)
    flags = parser.parse_args(arguments)
    if flags.games < 1:
        parser.error(f"`--games`: expected at least 1, got {flags.games}")
    with reported():
        out = local_path(flags.out, name="--out")
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"`--out`: expected a new or an empty folder, got {flags.out!r}")
        for split in SPLITS:
            for index in range(flags.games):
                write(out, split, index, seed=flags.seed)
            games = panel(out.resolve(), split)
            print(f"{split}: {len(games)} games, {digest(games)}")


if __name__ == "__main__":
    main(sys.argv[1:])
