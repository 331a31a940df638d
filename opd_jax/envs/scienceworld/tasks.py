"""The tasks of ScienceWorld: 30 types, their variations, and the splits.

A task is a type and the number of a variation; variations differ in things and rooms. As in the
engine, the first half of a type's variations is for training, the next quarter for development and
the rest for testing. The counts are those of scienceworld 1.2.3; `Jvm.load` checks them.
"""

import hashlib
from functools import lru_cache

# Type -> number of its variations; 7,207 in all.
VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
TYPES = tuple(sorted(VARIATIONS))
SPLITS = ("train", "dev", "test", "panel", "dev_panel")
PANEL_VARIATIONS = 5


def variations(split: str, kind: str) -> tuple[int, ...]:
    """The variations of one type in a split, ascending.

    `panel` is the paper's evaluation: five variations of each type. The paper does not say which
    five. Here they are spread evenly over the type's test variations. `identify-life-stages-2` has
    only four of those; the last of its dev variations is the fifth. `dev_panel` is dev without it.

    Raises:
      ValueError: there is no such split.
    """
    count = VARIATIONS[kind]
    quarter = count // 4
    ranges = {
        "train": range(2 * quarter),
        "dev": range(2 * quarter, 3 * quarter),
        "test": range(3 * quarter, count),
    }
    if split in ranges:
        return tuple(ranges[split])
    if split == "dev_panel":
        return tuple(v for v in ranges["dev"] if v not in variations("panel", kind))
    if split != "panel":
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    pool = ranges["test"]
    if len(pool) < PANEL_VARIATIONS:
        pool = range(count - PANEL_VARIATIONS, count)
    return tuple(pool[i * len(pool) // PANEL_VARIATIONS] for i in range(PANEL_VARIATIONS))


@lru_cache(maxsize=len(SPLITS))
def tasks(split: str) -> tuple[tuple[str, int], ...]:
    """Every task of a split as (type, variation).

    The first variation of each type comes first, then the second of each, and so on. So the first
    n tasks hold all types as evenly as possible.

    Raises:
      ValueError: there is no such split.
    """
    ranked = [
        (rank, kind, variation)
        for kind in TYPES
        for rank, variation in enumerate(variations(split, kind))
    ]
    return tuple((kind, variation) for _, kind, variation in sorted(ranked))


def task_id(kind: str, variation: int) -> str:
    """The name of a task, for example `scienceworld/boil/21`."""
    return f"scienceworld/{kind}/{variation}"


def parse_id(name: str) -> tuple[str, int]:
    """Type and variation of a task's name.

    Raises:
      ValueError: it is not the name of a ScienceWorld task.
    """
    parts = name.split("/")
    if len(parts) == 3 and parts[0] == "scienceworld" and parts[2].isdecimal():
        kind, variation = parts[1], int(parts[2])
        if variation < VARIATIONS.get(kind, 0):
            return kind, variation
    raise ValueError(
        f"expected the name of a ScienceWorld task, such as {task_id('boil', 21)}, got {name!r}"
    )


def digest(split: str) -> str:
    """SHA-256 over the names of a split's tasks in order, one a line.

    Raises:
      ValueError: there is no such split.
    """
    names = "".join(task_id(*task) + "\n" for task in tasks(split))
    return hashlib.sha256(names.encode()).hexdigest()
