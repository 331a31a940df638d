"""The exact distance to the goal of a household task, and the label of a turn.

Both use hidden knowledge. They measure judges and label training data; no model is shown them. The
labels are this project's definition, close to the three verdicts of the paper's judge:

- **SKIP**, no correction needed: the distance falls. Or it stays the same, the turn reveals
  something, and the next thing that the goal needs has not been found yet.
- **STRONG**, wrong or redundant: the distance grows. Or it stays the same and the turn reveals
  nothing (looking around again, going back, examining).
- **WEAK**, sub-optimal but of some use: the distance stays the same and the turn reveals something,
  but the next thing that the goal needs was already known.

A turn *reveals* something in two cases. It shows the content of a receptacle for the first time. Or
it reaches a closed receptacle whose content has not been shown: for the first time, or again if the
player does not come straight from another such receptacle. (Going back to open one is right;
going to and fro between closed ones is not.)

The *next thing needed* is an object of the goal's type that is not yet where it belongs. With such
an object in hand under `look_at_obj_in_light`, it is the lamp. Receptacles are listed at the start
and are never searched for. Leaving a closed receptacle unopened is judged by the place gone to,
unless the distance grows.
"""

from opd_jax.envs.household.tables import LOOK, TWO
from opd_jax.envs.household.world import World


def distance(world: World) -> int:
    """The least number of actions that reach the goal; 0 when it is reached.

    It is a closed form. The only costs are going, opening, taking, one treatment, moving and using
    the lamp. A useless object in hand costs exactly one action more: it can be put down where the
    wanted one is taken.

    Args:
      world: a state of the household; not changed.
    """
    if world.solved:
        return 0
    if world.room.spec.type == TWO:
        return _distance_two(world)
    return min(_distance_one(world, item) for item in world.room.wanted)


def _distance_one(world: World, item: int) -> int:
    """Actions until `item` has fulfilled the goal."""
    cost, at = _fetch(world, item)
    if world.room.spec.type == LOOK:
        return cost + _light(world, at)
    return cost + _treat_and_place(world, item, at)


def _fetch(world: World, item: int) -> tuple[int, int]:
    """Actions until `item` is in hand, and the place where that happens."""
    place = world.where[item]
    if place < 0:
        return 0, world.at
    return (
        (world.at != place) + (not world.is_open[place]) + (world.hand >= 0) + 1,
        place,
    )


def _light(world: World, at: int) -> int:
    """Actions to the lamp and to switch it on, starting at `at` with the object in hand."""
    return 1 if any(world.where[lamp] == at for lamp in world.room.lamps) else 2


def _treat_and_place(world: World, item: int, at: int) -> int:
    """Actions from taking `item` at `at` to having it treated and placed."""
    room = world.room
    opened = -1 if world.where[item] < 0 else at
    if not room.state or world.has_state(item, room.state):
        return _put(world, at, opened)
    return min((tool != at) + 1 + _put(world, tool, opened) for tool in room.tools)


def _put(world: World, at: int, opened: int) -> int:
    """Actions from `at` to put the object in hand into a target; `opened` is open by then."""
    is_open, targets = world.is_open, world.room.targets
    best = 3
    for target in targets:
        if is_open[target] or target == opened:
            best = 2
            break
    if at in targets:
        best = min(best, 1 if is_open[at] or at == opened else 2)
    return best


def _distance_two(world: World) -> int:
    """Actions until two objects are in the same target; those already there count."""
    spots = [world.where[item] for item in world.room.wanted if world.where[item] >= 0]
    return min(_fill(world, target, spots) for target in world.room.targets)


def _fill(world: World, target: int, spots: list[int]) -> int:
    """Actions until `target` holds two; `spots` are the places of wanted objects not in hand."""
    is_open = world.is_open
    # Opening the target and moving the first object into it. Going and taking are added below.
    arrive = (not is_open[target]) + 1
    if world.hand in world.room.wanted:
        cost = (world.at != target) + arrive
        if target in spots:
            return cost
        # For the second object: go, take, go back, move.
        return cost + 4 + min(not is_open[spot] for spot in spots)
    if target in spots:
        return _take_first(world, [spot for spot in spots if spot != target]) + 1 + arrive
    return _take_both(world, spots) + 1 + arrive + 4


def _take_first(world: World, spots: list[int]) -> int:
    """Actions to have one of the objects at `spots` in hand."""
    return min((world.at != s) + (not world.is_open[s]) for s in spots) + (world.hand >= 0) + 1


def _take_both(world: World, spots: list[int]) -> int:
    """As `_take_first`, plus opening the place of the second object; the best pair counts."""
    at, is_open = world.at, world.is_open
    best = 3
    for i, first in enumerate(spots):
        for j, second in enumerate(spots):
            if i != j:
                opening = (not is_open[first]) + (first != second and not is_open[second])
                best = min(best, (at != first) + opening)
    return best + (world.hand >= 0) + 1


class Learnt:
    """What a player has learnt who has read every text of the episode.

    Attributes:
      content: for each receptacle, whether its content has been shown.
      reached: for each receptacle, whether the player has been there.
      objects: for each object, whether it has been seen.
      at: where the player was at the last update; -1 in the middle of the room.
    """

    def __init__(self, world: World):
        self.content = bytearray(len(world.room.places))
        self.reached = bytearray(len(world.room.places))
        self.objects = bytearray(len(world.room.objects))
        self.at = world.at

    def update(self, world: World) -> bool:
        """Read the state after an action; True if the action revealed something."""
        before, at = self.at, world.at
        if at < 0 or self.content[at]:
            self.at = at
            return False
        if world.is_open[at]:
            self.content[at] = self.reached[at] = 1
            for item in world.content[at]:
                self.objects[item] = 1
            self.at = at
            return True
        # A closed receptacle whose content is not known.
        first = not self.reached[at]
        self.reached[at] = 1
        self.at = at
        return first or (before != at and bool(self.content[before]))

    def searching(self, world: World) -> bool:
        """Whether the next thing that the goal needs has not been found yet."""
        room, known = world.room, self.objects
        if world.hand in room.wanted:
            return room.spec.type == LOOK and not any(known[lamp] for lamp in room.lamps)
        spots = [world.where[item] for item in room.wanted if known[item]]
        if room.spec.type != TWO or not spots:
            return not spots
        # What lies in the fullest target stays there; the player needs another one.
        placed = max(spots.count(target) for target in room.targets)
        return len(spots) <= placed


def label(before: int, after: int, *, novel: bool, searching: bool) -> str:
    """Label a turn that did not fail; the module states the rules.

    Args:
      before: distance to the goal before the turn, in actions.
      after: distance after the turn.
      novel: the turn revealed something (`Learnt.update`).
      searching: before the turn, the next thing needed had not been found (`Learnt.searching`).

    Returns:
      `SKIP`, `WEAK` or `STRONG`.
    """
    if after < before:
        return "SKIP"
    if after > before or not novel:
        return "STRONG"
    return "SKIP" if searching else "WEAK"
