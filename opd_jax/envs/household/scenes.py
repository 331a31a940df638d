"""Scenes and tasks of the household, drawn from the tables.

A scene says which receptacles stand in a room. It depends on the kind of room, the scene's number
and the size. A task adds a goal and objects with their places. It depends on the split, the index
and the size. Both draw from a generator seeded with the SHA-256 of a text such as
`household/1/large/train/17`. They call only its `random()`, which Python keeps stable between
versions, and nothing depends on hash order.
"""

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_jax.envs.household.tables import (
    CLUTTER,
    FIRST_UNSEEN,
    GOALS,
    LAMPS,
    LARGE_KITCHEN,
    LOOK,
    MAX_COPIES,
    OBJECT_TABLE,
    ROOM_KINDS,
    ROOM_SIZES,
    ROOMS,
    SCENES,
    SIMPLE,
    SIZES,
    SPLIT_SIZES,
    SURFACES,
    TASK_ROOMS,
    TASK_TYPES,
    TRAIN_SCENES,
    TREATMENTS,
    TWO,
    UNSEEN_SCENES,
    VERSION,
    preposition,
    search_order,
)


@dataclass(frozen=True)
class TaskSpec:
    """Everything hidden and visible about one task.

    Attributes:
      id: `household/<size>/<split>/<index>`.
      type: one of `TASK_TYPES`.
      goal: the instruction, with a full stop.
      room: kind of room.
      scene: scene number; those above `TRAIN_SCENES` belong to the splits of `FIRST_UNSEEN`.
      object: the object type that the goal asks for.
      target: the receptacle type of the goal; "" for `look_at_obj_in_light`.
      lamp: the lamp type of the goal; "" for all other types.
      places: (type, number) of the receptacles in listed order.
      objects: (type, number, index into `places`) in order of type and number.
    """

    id: str
    type: str
    goal: str
    room: str
    scene: int
    object: str
    target: str
    lamp: str
    places: tuple[tuple[str, int], ...]
    objects: tuple[tuple[str, int, int], ...]


class Draw:
    """Draws from a generator seeded by a text; the same on every machine and Python version."""

    def __init__(self, seed: str):
        digest = hashlib.sha256(seed.encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def below(self, bound: int) -> int:
        """A uniform integer in `[0, bound)`."""
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """A uniform integer in `[low, high]`."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence):
        """A uniform item."""
        return items[self.below(len(items))]

    def weighted(self, pairs: Sequence[tuple[str, float]]) -> str:
        """The first member of a pair, drawn in proportion to the second."""
        point = self._random() * sum(weight for _, weight in pairs)
        for name, weight in pairs:
            point -= weight
            if point < 0:
                return name
        return pairs[-1][0]

    def shuffled(self, items: Sequence) -> list:
        """A uniform permutation."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


def _held_out(counts: tuple[tuple[str, int], ...]) -> bool:
    """Whether a multiset of receptacles is reserved for scenes that are never trained on."""
    text = ",".join(f"{name}:{count}" for name, count in counts)
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def _draw_counts(draw: Draw, room: str, size: str) -> tuple[tuple[str, int], ...]:
    table, column = ROOMS[room], SIZES.index(size)
    bounds = LARGE_KITCHEN if (room, size) == ("kitchen", "large") else ROOM_SIZES[size]
    total = draw.between(*bounds)
    counts = {name: least for name, (least, _, _) in table.items()}
    while sum(counts.values()) < total:
        open_types = [
            (name, weight)
            for name, (_, weight, most) in table.items()
            if weight and counts[name] < most[column]
        ]
        counts[draw.weighted(open_types)] += 1
    return tuple((name, count) for name, count in sorted(counts.items()) if count)


@functools.cache
def scene(room: str, number: int, size: str) -> tuple[tuple[str, int], ...]:
    """Receptacle types of a scene, in order of type, each with its count.

    Scenes up to `TRAIN_SCENES` and scenes above it never have the same receptacles: the digest of a
    multiset of receptacles decides to which side it belongs, and draws from the other side are
    rejected.

    Args:
      room: one of `ROOM_KINDS`.
      number: 1 to `SCENES`.
      size: one of `SIZES`.

    Raises:
      ValueError: the size, room or number is unknown.
    """
    check_size(size)
    if room not in ROOMS:
        raise ValueError(f"`room` must be one of {', '.join(ROOM_KINDS)}; got {room!r}.")
    if not 1 <= number <= SCENES:
        raise ValueError(f"`number` must be from 1 to {SCENES}; got {number}.")
    draw = Draw(f"household/{VERSION}/scene/{size}/{room}/{number}")
    while True:
        counts = _draw_counts(draw, room, size)
        if _held_out(counts) == (number > TRAIN_SCENES):
            return counts


def check_size(size: str) -> None:
    """ValueError unless `size` is one of `SIZES`."""
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}; got {size!r}.")


def split_size(split: str) -> int:
    """Number of tasks in `split`; ValueError naming the known splits otherwise."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"`split` must be one of {', '.join(SPLIT_SIZES)}; got {split!r}.")
    return SPLIT_SIZES[split]


def _task_type(split: str, index: int, size: str) -> str:
    # Each block of six tasks holds each type once, in its own order. So neither the first n tasks
    # nor every n-th task prefer a type.
    block, place = divmod(index, len(TASK_TYPES))
    draw = Draw(f"household/{VERSION}/{size}/{split}/block/{block}")
    return draw.shuffled(TASK_TYPES)[place]


@functools.cache
def _choices(
    task_type: str, room: str, present: tuple[str, ...]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Objects that a task may ask for in a room, each with its possible target types."""
    verb, _, tool = TREATMENTS.get(task_type, ("", "", ""))
    choices = []
    for name, row in OBJECT_TABLE.items():
        homes = [place for place in search_order(name) if place in present]
        if room not in row.rooms or name in LAMPS or not homes:
            continue
        if verb and verb not in row.abilities:
            continue
        targets = {place for place in (*homes, *SURFACES[room]) if place in present}
        targets.discard(tool)
        if task_type in (SIMPLE, TWO):
            # The objects must have another place to start from.
            targets = {target for target in targets if any(home != target for home in homes)}
        if task_type == LOOK:
            targets = {""}
        if targets:
            choices.append((name, tuple(sorted(targets))))
    return tuple(choices)


def _place(draw: Draw, name: str, counts: Mapping[str, int], avoid: str) -> tuple[str, int]:
    """Receptacle type and number for one object, never of the type `avoid`."""
    homes = [
        (place, weight * counts[place])
        for place, weight in OBJECT_TABLE[name].prior
        if place in counts and place != avoid
    ]
    place = draw.weighted(homes)
    return place, draw.between(1, counts[place])


def _clutter(
    draw: Draw, room: str, wanted: str, lamp: str, counts: Mapping[str, int], size: str
) -> list[str]:
    """Types of the distractor objects."""
    kinds = [
        name
        for name, row in OBJECT_TABLE.items()
        if room in row.rooms and name not in (wanted, *LAMPS)
        if any(place in counts for place in search_order(name))
    ]
    chosen: list[str] = []
    for _ in range(min(draw.between(*CLUTTER[size]), MAX_COPIES * len(kinds))):
        name = draw.choice([kind for kind in kinds if chosen.count(kind) < MAX_COPIES])
        chosen.append(name)
    return [*chosen, lamp] if lamp else chosen


def _goal(draw: Draw, task_type: str, wanted: str, target: str, lamp: str) -> str:
    template = draw.choice(GOALS[task_type])
    return template.format(object=wanted, place=target, prep=preposition(target), lamp=lamp)


def _room_lamp(room: str) -> str:
    return next((lamp for lamp in LAMPS if room in OBJECT_TABLE[lamp].rooms), "")


def task(split: str, index: int, size: str) -> TaskSpec:
    """Task `index` of `split`. The result depends on the arguments alone.

    Every block of six tasks holds each type once. The kind of room is uniform over those that can
    host the type. The goal is never reached at the start: for `pick_and_place_simple` and
    `pick_two_obj_and_place`, no wanted object starts in a receptacle of the target type.

    Args:
      split: one of `SPLIT_SIZES`; those of `FIRST_UNSEEN` have scenes that no other uses.
      index: 0 to the size of the split less one.
      size: one of `SIZES`.

    Raises:
      ValueError: the split or size is unknown, or the index is out of range.
    """
    check_size(size)
    if not 0 <= index < split_size(split):
        raise ValueError(
            f"`index` must be from 0 to {split_size(split) - 1} for split {split!r}; got {index}."
        )
    task_type = _task_type(split, index, size)
    draw = Draw(f"household/{VERSION}/{size}/{split}/{index}")
    room = draw.choice(TASK_ROOMS[task_type])
    while True:
        number = 1 + draw.below(TRAIN_SCENES)
        if split in FIRST_UNSEEN:
            number = FIRST_UNSEEN[split] + draw.below(UNSEEN_SCENES)
        counts = dict(scene(room, number, size))
        choices = _choices(task_type, room, tuple(counts))
        if choices:  # else the room has no place for any suitable object: draw another room
            break
    wanted, targets = draw.choice(choices)
    target = draw.choice(targets)
    room_lamp = _room_lamp(room)
    lamp = room_lamp if task_type == LOOK else ""
    copies = (2 if task_type == TWO else 1) + (draw.below(8) == 0)
    avoid = target if task_type in (SIMPLE, TWO) else ""
    located = [(wanted, *_place(draw, wanted, counts, avoid)) for _ in range(copies)]
    for name in _clutter(draw, room, wanted, room_lamp, counts, size):
        located.append((name, *_place(draw, name, counts, "")))
    return TaskSpec(
        id=f"household/{size}/{split}/{index}",
        type=task_type,
        goal=_goal(draw, task_type, wanted, target, lamp),
        room=room,
        scene=number,
        object=wanted,
        target=target,
        lamp=lamp,
        places=(places := _listed(counts)),
        objects=_numbered(located, places),
    )


def _listed(counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for name in counts for number in range(1, counts[name] + 1))


def _numbered(
    located: Sequence[tuple[str, str, int]], places: Sequence[tuple[str, int]]
) -> tuple[tuple[str, int, int], ...]:
    index = {place: i for i, place in enumerate(places)}
    seen: dict[str, int] = {}
    objects = []
    # The sort is stable: numbers follow the order of the draws and do not depend on places.
    for name, place, number in sorted(located, key=lambda item: item[0]):
        seen[name] = seen.get(name, 0) + 1
        objects.append((name, seen[name], index[place, number]))
    return tuple(objects)
