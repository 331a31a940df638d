"""A rule that judges a command from the record, with nothing hidden.

It makes the world as far as the record tells of it, acts there, and labels the turn as the oracle
does (`oracle.label`). What the goal needs and nobody has seen lies elsewhere: behind a closed door,
as far away as anything. So while it is searched for, no way leads closer, and a command is judged
by whether it shows something new.
"""

from collections.abc import Mapping, Sequence

from opd_jax.envs.base import Task
from opd_jax.envs.household.expert import NAMED, read_goal
from opd_jax.envs.household.oracle import Learnt, distance, label
from opd_jax.envs.household.record import DONE, read_seen
from opd_jax.envs.household.scenes import TaskSpec
from opd_jax.envs.household.tables import MAX_OBJECT_NUMBER
from opd_jax.envs.household.world import NOTHING, World

_ELSEWHERE = "elsewhere 0"  # no receptacle of any room
# Objects that nobody has seen; the goal needs two at most.
_UNSEEN = (MAX_OBJECT_NUMBER + 1, MAX_OBJECT_NUMBER + 2)


def rule(task: Task, record: Mapping[str, Sequence[str]], command: str) -> str:
    """SKIP, WEAK or STRONG for a command, from what is known before it (`base.Rule`).

    STRONG is also a command that is not possible, as far as is known.
    """
    world, learnt = known_world(task, record)
    before, searching = distance(world), learnt.searching(world)
    if world.act(command) == NOTHING:
        return "STRONG"
    return label(before, distance(world), novel=learnt.update(world), searching=searching)


def known_world(task: Task, record: Mapping[str, Sequence[str]]) -> tuple[World, Learnt]:
    """The world as the record has it, and what has been learnt there."""
    seen = {entry.place: entry for entry in map(read_seen, record["seen"])}
    world = _furnished(task, {place: entry.content or [] for place, entry in seen.items()}, record)
    room = world.room
    for number, name in enumerate(room.places):
        if name in seen:
            world.is_open[number] = not seen[name].closed
    world.is_open[room.place_index[_ELSEWHERE]] = False
    for name, _, states in (entry.partition(": ") for entry in record["changed"]):
        if (item := room.object_index.get(name)) is not None:
            world.clean[item] = "clean" in states
            world.heat[item] = next((heat for heat in ("hot", "cool") if heat in states), "")
    world.at = room.place_index.get(_last_place(record["tried"]), -1)
    learnt = Learnt(world)
    for number, name in enumerate(room.places):
        learnt.reached[number] = name in seen
        learnt.content[number] = name in seen and seen[name].content is not None
    for item, place in enumerate(world.where):
        learnt.objects[item] = place != room.place_index[_ELSEWHERE]
    return world, learnt


def _furnished(
    task: Task, content: Mapping[str, Sequence[str]], record: Mapping[str, Sequence[str]]
) -> World:
    """A world with the objects that have been seen, and with those that the goal may need."""
    wanted, lamp, target = read_goal(task.goal)
    places = [*(f"{kind} {number}" for kind, number in NAMED.findall(task.scene)), _ELSEWHERE]
    where = {name: place for place, names in content.items() for name in names}
    where |= dict.fromkeys([*record["held"], *(f"{wanted} {n}" for n in _UNSEEN)], _ELSEWHERE)
    spec = TaskSpec(
        id=task.id,
        type=task.type,
        goal=task.goal,
        room="",
        scene=0,
        object=wanted,
        target=target,
        lamp=lamp,
        places=tuple(map(_split, places)),
        objects=tuple((*_split(name), places.index(place)) for name, place in where.items()),
    )
    world = World(spec)
    for name in record["held"]:
        world.hand = world.room.object_index[name]
        world.where[world.hand] = -1
        world.content[places.index(_ELSEWHERE)].remove(world.hand)
    return world


def _last_place(tried: Sequence[str]) -> str:
    """Where the last `go to` that was possible has led; "" if there was none."""
    for command, _, how in (entry.rpartition(": ") for entry in reversed(tried)):
        words = command.lower().rstrip(" .\t").split()
        if how == DONE and words[0] == "go":
            return " ".join(words[2:])
    return ""


def _split(name: str) -> tuple[str, int]:
    kind, number = name.split()
    return kind, int(number)
