"""Tables of the household: rooms, receptacles, objects, task types, and where things lie.

Task types, kinds of rooms and vocabulary follow ALFWorld (Shridhar et al., 2021, arXiv:2010.03768).
The tables and placements are this project's own, so results here are not ALFWorld results.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# Raise it with every change of a table or of the order of draws: both change all tasks.
VERSION = 1

SIZES = ("small", "medium", "large")
SPLIT_SIZES = {
    **{"train": 1_000_000, "valid_seen": 1_000, "valid_unseen": 1_000, "dev": 1_000},
    # For figures that are reported once: nothing is trained on it, chosen on it or tried on it.
    "test_unseen": 1_000,
}
TRAIN_SCENES = 100
# So many scenes has each split whose scenes are never trained in, from the given number on.
UNSEEN_SCENES = 25
FIRST_UNSEEN = {
    "valid_unseen": TRAIN_SCENES + 1,
    "test_unseen": TRAIN_SCENES + UNSEEN_SCENES + 1,
}
SCENES = TRAIN_SCENES + UNSEEN_SCENES * len(FIRST_UNSEEN)

SIMPLE = "pick_and_place_simple"
LOOK = "look_at_obj_in_light"
CLEAN = "pick_clean_then_place_in_recep"
HEAT = "pick_heat_then_place_in_recep"
COOL = "pick_cool_then_place_in_recep"
TWO = "pick_two_obj_and_place"

# Task type -> the kinds of rooms that can host it.
TASK_ROOMS = {
    SIMPLE: ("kitchen", "livingroom", "bedroom", "bathroom"),
    LOOK: ("livingroom", "bedroom"),
    CLEAN: ("kitchen", "bathroom"),
    HEAT: ("kitchen",),
    COOL: ("kitchen",),
    TWO: ("kitchen", "livingroom", "bedroom", "bathroom"),
}
TASK_TYPES = tuple(TASK_ROOMS)
# Task type -> (verb, state it gives, receptacle type that does it).
TREATMENTS = {
    CLEAN: ("clean", "clean", "sinkbasin"),
    HEAT: ("heat", "hot", "microwave"),
    COOL: ("cool", "cool", "fridge"),
}
GOALS = {
    SIMPLE: ("put a {object} {prep} {place}.", "put some {object} {prep} {place}."),
    LOOK: ("look at {object} under the {lamp}.", "examine the {object} with the {lamp}."),
    CLEAN: (
        "put a clean {object} {prep} {place}.",
        "clean some {object} and put it {prep} {place}.",
    ),
    HEAT: ("put a hot {object} {prep} {place}.", "heat some {object} and put it {prep} {place}."),
    COOL: ("put a cool {object} {prep} {place}.", "cool some {object} and put it {prep} {place}."),
    TWO: ("put two {object} {prep} {place}.", "find two {object} and put them {prep} {place}."),
}

OPENABLE = ("cabinet", "drawer", "fridge", "laundryhamper", "microwave", "safe")
# Receptacle types with the preposition "in"; all others take "on".
INSIDE = (*OPENABLE, "bathtubbasin", "garbagecan", "sinkbasin")

# Room kind -> receptacle type -> (least number, weight of one more, greatest number in a small,
# medium and large room).
ROOMS: Mapping[str, Mapping[str, tuple[int, float, tuple[int, int, int]]]] = {
    "kitchen": {
        "cabinet": (0, 6.0, (2, 3, 7)),
        "cart": (0, 1.0, (1, 1, 1)),
        "coffeemachine": (0, 1.0, (1, 1, 1)),
        "countertop": (1, 2.0, (2, 2, 3)),
        "diningtable": (0, 2.0, (1, 1, 2)),
        "drawer": (0, 5.0, (2, 3, 6)),
        "fridge": (1, 0.0, (1, 1, 1)),
        "garbagecan": (0, 2.0, (1, 1, 1)),
        "microwave": (1, 0.0, (1, 1, 1)),
        "shelf": (0, 2.0, (1, 2, 4)),
        "sidetable": (0, 1.0, (1, 1, 1)),
        "sinkbasin": (1, 0.0, (1, 1, 1)),
        "stoveburner": (0, 3.0, (1, 2, 4)),
        "toaster": (0, 1.0, (1, 1, 1)),
    },
    "livingroom": {
        "armchair": (0, 2.0, (1, 2, 3)),
        "cabinet": (0, 2.0, (1, 2, 4)),
        "cart": (0, 0.5, (1, 1, 1)),
        "coffeetable": (0, 2.0, (1, 1, 2)),
        "desk": (0, 1.0, (1, 1, 1)),
        "diningtable": (0, 1.5, (1, 1, 1)),
        "drawer": (0, 3.0, (1, 2, 6)),
        "dresser": (0, 1.0, (1, 1, 1)),
        "garbagecan": (0, 1.0, (1, 1, 1)),
        "ottoman": (0, 0.5, (1, 1, 1)),
        "safe": (0, 0.5, (1, 1, 1)),
        "shelf": (0, 2.0, (2, 2, 4)),
        "sidetable": (1, 1.5, (1, 2, 3)),
        "sofa": (1, 0.5, (1, 1, 2)),
        "tvstand": (0, 1.5, (1, 1, 1)),
    },
    "bedroom": {
        "armchair": (0, 1.0, (1, 1, 2)),
        "bed": (1, 0.5, (1, 1, 2)),
        "cabinet": (0, 1.5, (1, 2, 3)),
        "desk": (1, 0.5, (1, 1, 2)),
        "drawer": (0, 4.0, (2, 3, 6)),
        "dresser": (0, 2.0, (1, 1, 2)),
        "garbagecan": (0, 1.0, (1, 1, 1)),
        "laundryhamper": (0, 1.0, (1, 1, 1)),
        "safe": (0, 1.0, (1, 1, 1)),
        "shelf": (0, 3.0, (2, 3, 4)),
        "sidetable": (0, 2.0, (1, 2, 2)),
        "sofa": (0, 0.5, (1, 1, 1)),
    },
    "bathroom": {
        "bathtubbasin": (0, 1.0, (1, 1, 1)),
        "cabinet": (0, 3.0, (2, 3, 5)),
        "cart": (0, 0.5, (1, 1, 1)),
        "countertop": (0, 2.0, (1, 1, 2)),
        "drawer": (0, 2.0, (2, 2, 4)),
        "garbagecan": (0, 1.5, (1, 1, 1)),
        "handtowelholder": (0, 1.5, (1, 2, 2)),
        "laundryhamper": (0, 0.5, (1, 1, 1)),
        "shelf": (0, 1.5, (1, 2, 3)),
        "sidetable": (0, 0.5, (1, 1, 1)),
        "sinkbasin": (1, 0.5, (1, 2, 2)),
        "toilet": (1, 0.0, (1, 1, 1)),
        "toiletpaperhanger": (0, 1.0, (1, 1, 2)),
        "towelholder": (0, 1.5, (1, 2, 2)),
    },
}
ROOM_KINDS = tuple(ROOMS)
# Receptacles in a room, least and most; kitchens are the largest rooms, as in ALFWorld.
ROOM_SIZES = {"small": (5, 7), "medium": (9, 13), "large": (13, 20)}
LARGE_KITCHEN = (22, 28)
# Distractor objects in a room, least and most.
CLUTTER = {"small": (3, 6), "medium": (7, 12), "large": (12, 25)}
MAX_COPIES = 3  # objects of one type in a room, at most

# Receptacle types of a room that are a sensible target for any object there.
SURFACES = {
    "kitchen": ("countertop", "diningtable", "sidetable"),
    "livingroom": ("armchair", "coffeetable", "diningtable", "sidetable", "sofa"),
    "bedroom": ("bed", "desk", "dresser", "sidetable"),
    "bathroom": ("countertop", "garbagecan", "toilet"),
}


@dataclass(frozen=True)
class ObjectKind:
    """One row of the object table.

    Attributes:
      rooms: kinds of rooms in which it is found.
      abilities: those of `clean`, `heat` and `cool` that can be done to it.
      prior: (receptacle type, weight of each receptacle of that type), heaviest first; at equal
        weights, types that need not be opened come first.
    """

    rooms: tuple[str, ...]
    abilities: tuple[str, ...]
    prior: tuple[tuple[str, int], ...]


def _row(rooms: str, abilities: str, prior: str) -> ObjectKind:
    pairs = [entry.split() for entry in prior.split(",")]
    return ObjectKind(
        rooms=tuple(rooms.split()),
        abilities=tuple(abilities.split()),
        prior=tuple((place, int(weight)) for place, weight in pairs),
    )


# The order of the receptacle types is public: the expert searches by it. A weight is that of a
# single receptacle, so likeliest first is the best order.
OBJECT_TABLE: Mapping[str, ObjectKind] = {
    # Food.
    "apple": _row("kitchen", "clean heat cool",
        "fridge 4, diningtable 3, countertop 3, sinkbasin 2, garbagecan 2, sidetable 2"),
    "bread": _row("kitchen", "heat cool",
        "countertop 4, diningtable 3, fridge 3, toaster 2, cabinet 2"),
    "egg": _row("kitchen", "clean heat cool",
        "fridge 4, countertop 3, sinkbasin 2, garbagecan 2, shelf 2"),
    "lettuce": _row("kitchen", "clean heat cool",
        "fridge 4, diningtable 3, countertop 3, sinkbasin 2, garbagecan 2"),
    "potato": _row("kitchen", "clean heat cool",
        "sinkbasin 3, countertop 3, fridge 3, garbagecan 2, cabinet 2"),
    "tomato": _row("kitchen", "clean heat cool",
        "diningtable 3, countertop 3, fridge 3, sinkbasin 2, garbagecan 2, shelf 2"),
    # Kitchenware.
    "bowl": _row("kitchen livingroom bedroom", "clean heat cool",
        "desk 4, diningtable 3, coffeetable 3, dresser 3, cabinet 3, shelf 2, fridge 2"),
    "butterknife": _row("kitchen", "clean", "sinkbasin 3, diningtable 3, countertop 3, drawer 3"),
    "cup": _row("kitchen", "clean heat cool",
        "sinkbasin 3, countertop 3, cabinet 3, diningtable 2, coffeemachine 1"),
    "dishsponge": _row("kitchen", "clean", "sinkbasin 4, countertop 3, drawer 3, cart 2"),
    "fork": _row("kitchen", "clean", "diningtable 3, countertop 3, drawer 3, sinkbasin 2"),
    "glassbottle": _row("kitchen", "",
        "garbagecan 3, countertop 3, cabinet 3, diningtable 2, shelf 2"),
    "kettle": _row("kitchen", "clean", "stoveburner 3, countertop 3, cabinet 3, sinkbasin 2"),
    "knife": _row("kitchen", "clean", "countertop 4, diningtable 3, drawer 3, sinkbasin 2"),
    "ladle": _row("kitchen", "clean", "sinkbasin 3, countertop 3, drawer 3, stoveburner 1"),
    "mug": _row("kitchen bedroom", "clean heat cool",
        "desk 4, coffeemachine 3, dresser 3, countertop 3, cabinet 3, sinkbasin 2, shelf 2"),
    "pan": _row("kitchen", "clean cool",
        "stoveburner 3, countertop 3, cabinet 3, sinkbasin 2, fridge 1"),
    "papertowelroll": _row("kitchen", "",
        "countertop 4, drawer 3, diningtable 2, garbagecan 2, sidetable 2"),
    "peppershaker": _row("kitchen", "", "diningtable 3, countertop 3, drawer 3, shelf 2"),
    "plate": _row("kitchen", "clean heat cool",
        "countertop 3, cabinet 3, diningtable 2, sinkbasin 2"),
    "pot": _row("kitchen", "clean cool",
        "stoveburner 3, countertop 3, sinkbasin 2, fridge 2, cabinet 2"),
    "saltshaker": _row("kitchen", "", "diningtable 3, countertop 3, cabinet 3, shelf 2"),
    "spatula": _row("kitchen", "clean", "countertop 3, drawer 3, sinkbasin 2, stoveburner 2"),
    "spoon": _row("kitchen", "clean", "sinkbasin 3, diningtable 3, countertop 3, drawer 3"),
    "winebottle": _row("kitchen", "",
        "countertop 3, fridge 3, cabinet 3, garbagecan 2, diningtable 2"),
    # Living room and bedroom.
    "alarmclock": _row("bedroom", "", "desk 3, sidetable 3, dresser 3, shelf 2, drawer 2, bed 1"),
    "baseballbat": _row("bedroom", "", "bed 4, armchair 3, sofa 3, safe 2, cabinet 2"),
    "basketball": _row("bedroom", "", "bed 3, armchair 3, dresser 3, laundryhamper 2, cabinet 2"),
    "book": _row("livingroom bedroom", "",
        "desk 3, bed 3, coffeetable 3, sofa 3, diningtable 2, dresser 2, shelf 2, drawer 2"),
    "box": _row("livingroom", "",
        "coffeetable 3, diningtable 3, armchair 3, sofa 3, cabinet 3, ottoman 2, dresser 2"),
    "cd": _row("bedroom", "", "desk 3, safe 3, drawer 3, garbagecan 2, shelf 2"),
    "cellphone": _row("livingroom bedroom", "",
        "bed 3, desk 3, coffeetable 3, sofa 3, drawer 3, dresser 2, armchair 2, safe 2"),
    "creditcard": _row("livingroom bedroom", "",
        "desk 3, coffeetable 3, sidetable 3, drawer 3, dresser 2, armchair 2, shelf 2"),
    "keychain": _row("livingroom bedroom", "",
        "safe 4, sidetable 3, sofa 3, drawer 3, desk 2, ottoman 1"),
    "laptop": _row("livingroom bedroom", "",
        "bed 3, desk 3, sofa 3, coffeetable 3, diningtable 2, dresser 2, armchair 2, cabinet 2"),
    "newspaper": _row("livingroom", "",
        "sofa 3, coffeetable 3, armchair 3, garbagecan 2, drawer 2, cart 1"),
    "pen": _row("livingroom bedroom", "",
        "desk 3, sidetable 3, drawer 3, dresser 2, garbagecan 2, coffeetable 2, shelf 2"),
    "pencil": _row("livingroom bedroom", "",
        "desk 3, drawer 3, coffeetable 2, garbagecan 2, sidetable 2, shelf 2"),
    "pillow": _row("livingroom bedroom", "",
        "bed 4, sofa 3, armchair 3, ottoman 2, laundryhamper 2, cabinet 2"),
    "remotecontrol": _row("livingroom", "",
        "tvstand 3, sofa 3, coffeetable 3, armchair 3, drawer 3, ottoman 1"),
    "statue": _row("livingroom", "",
        "dresser 3, coffeetable 3, sidetable 3, tvstand 2, shelf 2, cabinet 2"),
    "teddybear": _row("bedroom", "", "bed 4, sofa 3, laundryhamper 3, armchair 2, cabinet 2"),
    "tennisracket": _row("bedroom", "", "bed 3, dresser 3, desk 2, safe 2, cabinet 2"),
    "vase": _row("livingroom", "",
        "diningtable 3, dresser 3, sidetable 3, coffeetable 2, shelf 2, cabinet 2"),
    "watch": _row("livingroom bedroom", "",
        "safe 4, dresser 3, sidetable 3, drawer 3, coffeetable 2, shelf 2"),
    # Bathroom.
    "candle": _row("livingroom bathroom", "",
        "toilet 3, coffeetable 3, countertop 3, bathtubbasin 2, shelf 2, drawer 2"),
    "cloth": _row("bathroom", "clean",
        "bathtubbasin 3, countertop 3, laundryhamper 3, cabinet 3, cart 1"),
    "handtowel": _row("bathroom", "",
        "handtowelholder 4, countertop 3, sinkbasin 2, laundryhamper 2, cabinet 2"),
    "plunger": _row("bathroom", "", "toilet 3, cabinet 3, bathtubbasin 2, garbagecan 1"),
    "scrubbrush": _row("bathroom", "", "toilet 3, countertop 3, cabinet 3, bathtubbasin 2"),
    "soapbar": _row("bathroom", "clean",
        "bathtubbasin 3, sinkbasin 3, countertop 3, drawer 3, toilet 2"),
    "soapbottle": _row("kitchen bathroom", "",
        "sinkbasin 3, countertop 3, cabinet 3, toilet 2, garbagecan 2, shelf 2"),
    "spraybottle": _row("bathroom", "", "countertop 3, cabinet 3, toilet 2, garbagecan 2, shelf 2"),
    "tissuebox": _row("livingroom bathroom", "",
        "toilet 3, coffeetable 3, countertop 3, sidetable 3, cabinet 3, cart 2, shelf 2"),
    "toiletpaper": _row("bathroom", "",
        "toilet 3, toiletpaperhanger 3, drawer 3, shelf 2, garbagecan 1"),
    "towel": _row("bathroom", "",
        "towelholder 4, laundryhamper 3, bathtubbasin 2, shelf 2, cabinet 2"),
    # Lamps cannot be taken, only switched on.
    "desklamp": _row("bedroom", "", "desk 3, dresser 3, sidetable 3, shelf 2"),
    "floorlamp": _row("livingroom", "",
        "sidetable 3, armchair 3, sofa 3, coffeetable 2, desk 2, dresser 2"),
}  # fmt: skip
LAMPS = ("desklamp", "floorlamp")

RECEPTACLES = tuple(sorted({name for room in ROOMS.values() for name in room}))
OBJECTS = tuple(sorted(OBJECT_TABLE))
# The highest numbers in names of receptacles and objects.
MAX_RECEPTACLE_NUMBER = max(caps[-1] for room in ROOMS.values() for _, _, caps in room.values())
MAX_OBJECT_NUMBER = MAX_COPIES


def search_order(object_type: str) -> tuple[str, ...]:
    """Receptacle types that may hold `object_type`, likeliest first."""
    return tuple(place for place, _ in OBJECT_TABLE[object_type].prior)


def preposition(receptacle_type: str) -> str:
    """The preposition of a receptacle type, `in` or `on`."""
    return "in" if receptacle_type in INSIDE else "on"
