"""The rule that judges a household's turns by their records, without hidden knowledge."""

import random
from collections import Counter

import pytest

from opd_jax.envs.base import Task
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.household.habits import Careless
from opd_jax.envs.household.rule import rule
from opd_jax.envs.household.tables import HEAT, LOOK, OPENABLE, SIMPLE, TASK_TYPES, TWO

HABITS = dict(skip_step=0.5, list_order=0.5, ignore_closed=0.5, idle=0.3, forget=0.5)
GOALS = {
    SIMPLE: "put a mug on desk.",
    TWO: "put two mug on desk.",
    HEAT: "put a hot mug on desk.",
    LOOK: "examine the mug with the desklamp.",
}
SCENE = (
    "You are in the middle of a room. Looking quickly around you, you see a desk 1, a desk 2, a "
    "drawer 1, a microwave 1, a shelf 1, and a shelf 2."
)


def judged(kind: str, command: str, *, seen=(), held=(), changed=(), at="") -> str:
    task = Task("t", kind, GOALS[kind], SCENE)
    tried = ("look: done", f"go to {at}: done", "take mug 9 from desk 1: Nothing happens.")
    record = {"seen": seen, "held": held, "changed": changed, "tried": tried if at else ()}
    return rule(task, record, command)


# What is known, and the verdict on each command.
SITUATIONS = {
    "nothing is known": (
        dict(kind=SIMPLE),
        {"go to shelf 1": "SKIP", "go to drawer 1": "SKIP", "look": "STRONG"},
    ),
    "searched here": (
        dict(kind=SIMPLE, seen=("shelf 1: cd 1", "desk 1: nothing"), at="shelf 1"),
        {
            "go to shelf 2": "SKIP",
            "go to desk 1": "STRONG",  # seen, and nothing there
            "examine shelf 1": "STRONG",
            "take cd 1 from shelf 1": "STRONG",  # off task
            "take mug 1 from shelf 1": "STRONG",  # not there
            "go to shelf 7": "STRONG",  # no such place
            "open drawer 1": "STRONG",  # not here
            "move mug 1 to shelf 1": "STRONG",  # not held
        },
    ),
    "before a closed drawer": (
        dict(kind=SIMPLE, seen=("drawer 1, closed",), at="drawer 1"),
        {"open drawer 1": "SKIP", "close drawer 1": "STRONG", "look": "STRONG"},
    ),
    "the drawer was empty": (
        dict(kind=SIMPLE, seen=("drawer 1, closed: nothing", "shelf 1: nothing"), at="shelf 1"),
        {"go to drawer 1": "STRONG", "go to shelf 2": "SKIP"},
    ),
    "the mug was seen": (
        dict(kind=SIMPLE, seen=("shelf 1: mug 2", "desk 1: nothing"), at="desk 1"),
        {"go to shelf 1": "SKIP", "go to shelf 2": "WEAK", "go to drawer 1": "WEAK"},
    ),
    "the mug was shut in": (
        dict(kind=SIMPLE, seen=("drawer 1, closed: mug 2", "shelf 1: nothing"), at="shelf 1"),
        {"go to drawer 1": "SKIP", "go to shelf 2": "WEAK"},
    ),
    "the mug is here": (
        dict(kind=SIMPLE, seen=("shelf 1: mug 2",), at="shelf 1"),
        {"take mug 2 from shelf 1": "SKIP", "go to shelf 2": "STRONG"},
    ),
    "the mug is in hand": (
        dict(kind=SIMPLE, seen=("shelf 1: nothing",), held=("mug 2",), at="shelf 1"),
        {
            "go to desk 2": "SKIP",
            "go to microwave 1": "WEAK",
            "move mug 2 to shelf 1": "STRONG",
            "Put mug 2 on shelf 1.": "STRONG",
        },
    ),
    "at the desk with it": (
        dict(kind=SIMPLE, seen=("desk 1: nothing",), held=("mug 2",), at="desk 1"),
        {"move mug 2 to desk 1": "SKIP", "go to desk 2": "WEAK", "go to shelf 1": "STRONG"},
    ),
    "the mug is cold": (
        dict(kind=HEAT, seen=("desk 1: nothing",), held=("mug 2",), at="desk 1"),
        {"go to microwave 1": "SKIP", "move mug 2 to desk 1": "STRONG"},
    ),
    "the mug is hot": (
        dict(
            kind=HEAT, seen=("desk 1: nothing",), held=("mug 2",), changed=("mug 2: hot",),
            at="desk 1",
        ),
        {"move mug 2 to desk 1": "SKIP", "go to microwave 1": "STRONG"},
    ),
    "one of two is placed": (
        dict(kind=TWO, seen=("desk 1: mug 1", "shelf 1: nothing"), at="shelf 1"),
        {"go to shelf 2": "SKIP", "go to desk 1": "STRONG"},
    ),
    "both were seen": (
        dict(kind=TWO, seen=("desk 1: mug 1", "shelf 1: mug 2"), at="desk 1"),
        {"go to shelf 1": "SKIP", "take mug 1 from desk 1": "STRONG", "go to shelf 2": "WEAK"},
    ),
    "it lacks light": (
        dict(kind=LOOK, seen=("shelf 1: nothing",), held=("mug 2",), at="shelf 1"),
        {"go to desk 1": "SKIP", "move mug 2 to shelf 1": "STRONG"},
    ),
    "the lamp is here": (
        dict(kind=LOOK, seen=("desk 1: desklamp 1",), held=("mug 2",), at="desk 1"),
        {"use desklamp 1": "SKIP", "go to desk 2": "STRONG"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations_by_hand(name: str) -> None:
    known, verdicts = SITUATIONS[name]
    kind = known["kind"]
    rest = {field: value for field, value in known.items() if field != "kind"}
    assert {command: judged(kind, command, **rest) for command in verdicts} == verdicts


@pytest.mark.parametrize("size", ["small", "large"])
def test_where_nothing_is_hidden_it_labels_as_the_environment_does(size: str) -> None:
    """After a tour of all places the record holds all that there is."""
    env, labels, kinds = Household(size=size, max_turns=200, show_admissible=0), Counter(), set()
    for index in range(24):
        last = env.reset("train", index)
        rng, expert = random.Random(index), Expert(env.task, last, rng=random.Random(0))
        tour = [command for command in last.admissible if command.startswith("go to ")]
        for go in tour:
            place = go.removeprefix("go to ")
            for command in (go, f"open {place}") if place.split()[0] in OPENABLE else (go,):
                last = env.step(f"Action: {command}")
                expert.memory.update(last)
        for _ in range(60):
            if last.done:
                break
            record, wise = env.record(), expert.respond(last)
            last = env.step(
                wise if rng.random() < 0.4 else f"Action: {rng.choice(last.admissible)}"
            )
            if last.oracle:
                assert rule(env.task, record, last.action) == last.oracle
                labels[last.oracle] += 1
        kinds.add(env.task.type)
    assert kinds == set(TASK_TYPES)
    assert set(labels) == {"SKIP", "STRONG"}  # nothing is new any more, so nothing is WEAK
    assert min(labels.values()) > 100


def test_where_much_is_hidden_it_seldom_errs() -> None:
    """Of what a careless player does right and wrong, nearly all is seen without a hint."""
    env, right, whole = (
        Household(size="medium", max_turns=30, show_admissible=0),
        Counter(),
        Counter(),
    )
    for index in range(60):
        last = env.reset("valid_unseen", index)
        player = Careless(env.task, last, rng=random.Random(index), **HABITS)
        while not last.done:
            record = env.record()
            last = env.step(player.respond(last))
            if last.oracle:
                fine = last.oracle == "SKIP"
                whole[fine] += 1
                right[fine] += (rule(env.task, record, last.action) == "SKIP") == fine
    assert min(whole.values()) > 200
    assert right[True] > 0.95 * whole[True]
    assert right[False] > 0.95 * whole[False]
