"""The household's record of an episode, its copies, and labels without acting."""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest

from opd_jax.envs.base import Observation
from opd_jax.envs.faults import act, begin
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.household.record import Record, read_seen
from opd_jax.envs.household.tables import OPENABLE
from opd_jax.envs.workers import Worker

MAKE = partial(Household, size="medium", max_turns=40, show_admissible=0)
ODD = ("", "Thought: I wait.", "Action: go to the moon", "Action: Take apple 1 from table 1.")


def said(command: str) -> str:
    return f"Thought: so.\nAction: {command}"


class Played(NamedTuple):
    """A response, what was said after it, and the environment as it is then."""

    response: str
    after: Observation
    env: Household


def episode(index: int, *, greed: float = 0.5) -> Iterator[Played]:
    """Turns of the expert, of a random player, and ones that fail, in one episode."""
    env, rng = MAKE(), random.Random(index)
    last = env.reset("valid_unseen", index)
    expert = Expert(env.task, last, rng=rng)
    yield Played("", last, env)
    while not last.done:
        wise = expert.respond(last)
        choice = rng.random()
        response = rng.choice(ODD) if choice > 0.9 else said(rng.choice(last.admissible))
        response = wise if choice < greed else response
        last = env.step(response)
        yield Played(response, last, env)


@pytest.mark.parametrize("greed", [0.0, 0.6])
def test_the_record_says_nothing_that_the_texts_have_not_said(greed: float) -> None:
    for index in range(30):
        heard, commands, reader = "", [], None
        for turn in episode(index, greed=greed):
            heard += turn.after.text + "\n"
            record = turn.env.record()
            # A reader that gets the texts alone, and none of what else is in an observation.
            told = Observation(
                turn.after.text, "", (), action=turn.after.action, failure=turn.after.failure
            )
            if reader is None:
                reader = Record(told)
            else:
                reader.update(told)
                commands.append(turn.after.action or "no command")
            assert record == reader.lists()
            for seen in map(read_seen, record["seen"]):
                assert f"You arrive at {seen.place}." in heard
                assert all(thing in heard for thing in seen.content or ())
                if seen.closed:
                    assert (
                        f"{seen.place} is closed." in heard or f"close the {seen.place}." in heard
                    )
            for name in record["held"]:
                assert f"You pick up the {name} from" in heard
            for name, _, how in (entry.partition(": ") for entry in record["changed"]):
                assert name in heard
                verbs = {"hot": "heat", "cool": "cool", "clean": "clean", "open": "open"}
                assert all(f"You {verbs[word]} the {name}" in heard for word in how.split(" and "))
            assert [entry.rpartition(": ")[0] for entry in record["tried"]] == commands
            assert {entry.rpartition(": ")[2] for entry in record["tried"]} <= {
                "done",
                "Nothing happens.",
            }


def test_what_the_record_says_is_true_and_all_that_was_seen() -> None:
    changed = set()
    for index in range(30):
        shown = set()
        for turn in episode(index, greed=0.6):
            world, record = turn.env._world, turn.env.record()
            if world.at >= 0 and world.is_open[world.at]:
                shown.add(world.at)
            names = {place: number for number, place in enumerate(world.room.places)}
            for seen in map(read_seen, record["seen"]):
                number = names[seen.place]
                assert seen.closed == (not world.is_open[number])
                assert (seen.content is not None) == (number in shown)
                if seen.content is not None:
                    there = {world.room.objects[item] for item in world.content[number]}
                    assert set(seen.content) == there
            assert {names[read_seen(entry).place] for entry in record["seen"]} >= shown
            held = (world.room.objects[world.hand],) if world.hand >= 0 else ()
            assert record["held"] == held
            states = {
                f"{name}: {' and '.join(filter(None, [heat, 'clean' * clean]))}"
                for name, heat, clean in zip(
                    world.room.objects, world.heat, world.clean, strict=True
                )
                if heat or clean
            }
            opened = {
                f"{place}: open"
                for place, is_open in zip(world.room.places, world.is_open, strict=True)
                if is_open and place.split()[0] in OPENABLE
            }
            assert set(record["changed"]) == states | opened
            changed |= {entry.partition(": ")[2] for entry in record["changed"]}
    assert changed >= {"hot", "cool", "clean", "open"}


def test_a_copy_goes_its_own_way_and_a_label_is_that_of_the_step() -> None:
    labels = set()
    for index in range(12):
        for turn, alone in zip(episode(index), episode(index), strict=True):
            # `alone` is never copied: what follows leaves `turn` as it is.
            assert (turn.after, turn.env.record()) == (alone.after, alone.env.record())
            if turn.after.done:
                continue
            first, second = turn.env.copy(), turn.env.copy()
            for command in itertools.islice(turn.after.admissible, 3):
                said_so = first.label(said(command))
                one, other = act(first, said(command)), act(second, said(command))
                assert one == other
                assert one.oracle == said_so
                labels.add(said_so)
                if one.done:
                    break
            assert turn.env.label(ODD[0]) == ""
    assert labels == {"SKIP", "WEAK", "STRONG", ""}


def test_a_record_travels_with_the_observation_and_out_of_a_process_alike() -> None:
    here, there = MAKE(), Worker(MAKE, start_timeout_s=60.0, step_timeout_s=10.0)
    try:
        heard = [[begin(env, "train", 5).observation] for env in (here, there)]
        assert heard[0][0].record == {"seen": (), "held": (), "changed": (), "tried": ()}
        expert = Expert(here.task, heard[0][0], rng=random.Random(0))
        while not heard[0][-1].done:
            response = expert.respond(heard[0][-1])
            for env, own in zip((here, there), heard, strict=True):
                own.append(act(env, response))
            assert heard[0][-1].record == here.record()
        assert heard[0] == heard[1]
        assert heard[0][-1].record["tried"]
    finally:
        there.close()


def test_a_record_in_words() -> None:
    """The expert's turns of one task, as a judge is shown them."""
    env = MAKE()
    last = env.reset("valid_unseen", 21)
    assert env.task.goal == "cool some tomato and put it in garbagecan."
    expert = Expert(env.task, last, rng=random.Random(0))
    env.step(ODD[1])
    while not last.done:
        last = env.step(expert.respond(last))
    assert env.record() == {
        "seen": (
            "diningtable 1: cup 1",
            "countertop 1: peppershaker 1",
            "fridge 1, closed",
            "garbagecan 1: glassbottle 1, tomato 1",
        ),
        "held": (),
        "changed": ("tomato 1: cool",),
        "tried": (
            "no command: Nothing happens.",
            "go to diningtable 1: done",
            "go to countertop 1: done",
            "take tomato 1 from countertop 1: done",
            "go to fridge 1: done",
            "cool tomato 1 with fridge 1: done",
            "go to garbagecan 1: done",
            "move tomato 1 to garbagecan 1: done",
        ),
    }
