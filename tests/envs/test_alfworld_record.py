"""ALFWorld's record: what the engine's texts tell, and nothing else."""

import random
import re

from opd_jax.envs.alfworld.record import Record

NOTHING = "Nothing happens."
REJECTED = "Nothing happens."
# Commands and what the engine answered, of two games.
TURNS = (
    ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed."),
    (
        "open drawer 1",
        "You open the drawer 1. The drawer 1 is open. In it, you see nothing.",
    ),
    ("go to drawer 2", "You arrive at drawer 2. The drawer 2 is closed."),
    ("take sofa 1 from drawer 2", NOTHING),
    (
        "go to diningtable 1",
        "You arrive at diningtable 1. On the diningtable 1, you see a creditcard 1, a keychain 2, "
        "a keychain 1, and a remotecontrol 1.",
    ),
    (
        "take keychain 1 from diningtable 1",
        "You pick up the keychain 1 from the diningtable 1.",
    ),
    ("look", "You are facing the diningtable 1. Next to it, you see nothing."),
    ("go to dresser 1", "You arrive at dresser 1. On the dresser 1, you see a laptop 1."),
    ("move keychain 1 to dresser 1", "You move the keychain 1 to the dresser 1."),
    (
        "go to fridge 1",
        "You arrive at fridge 1. The fridge 1 is open. In it, you see a bread 1, and a cup 1.",
    ),
    ("take bread 1 from fridge 1", "You pick up the bread 1 from the fridge 1."),
    ("cool bread 1 with fridge 1", "You cool the bread 1 using the fridge 1."),
    ("close fridge 1", "You close the fridge 1."),
    ("use desklamp 1", "You turn on the desklamp 1."),
)


def read(turns):
    record = Record()
    record.read("", "You are in the middle of a room. You see a bed 1, and a desk 1.", failed=False)
    for command, text in turns:
        record.read(command, text, failed=text == NOTHING)
    return record


def assert_said(lists, texts):
    """Names come from the texts; a thing and its place from one text."""
    names = re.compile(r"\w+ \d+")
    for line in lists["seen"]:
        place, *things = names.findall(line)
        assert any(f"The {place} is" in text or f"the {place}" in text for text in texts), line
        for thing in things:
            assert any({place, thing} <= set(names.findall(text)) for text in texts), line
    for line in [*lists["held"], *lists["changed"]]:
        assert any(set(names.findall(line)) <= set(names.findall(text)) for text in texts), line


def test_places_hold_what_was_last_told_of_them():
    assert read(TURNS).lists() == {
        "seen": [
            "drawer 1: nothing",
            "drawer 2, closed",
            "diningtable 1: creditcard 1, keychain 2, remotecontrol 1",
            "dresser 1: laptop 1, keychain 1",
            "fridge 1, closed: cup 1",
        ],
        "held": ["bread 1"],
        "changed": [
            "drawer 1: open",
            "keychain 1: moved to dresser 1",
            "bread 1: cool",
            "fridge 1: closed",
            "desklamp 1: on",
        ],
        "tried": [
            f"{command}: {text.split('.')[0]}." if text != NOTHING else f"{command}: {REJECTED}"
            for command, text in TURNS
        ],
    }
    assert read(TURNS[:9]).lists()["held"] == []
    emptied = ("examine dresser 1", "On the dresser 1, you see nothing.")
    assert read([*TURNS, emptied]).lists()["seen"][3] == "dresser 1: nothing"
    assert read(()).lists() == {"seen": [], "held": [], "changed": [], "tried": []}


def test_what_is_changed_back_is_as_it_was():
    more = [
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a cup 1."),
        ("put bread 1 in/on fridge 1", "You put the bread 1 in/on the fridge 1."),  # before 0.4
        ("take keychain 1 from dresser 1", "You pick up the keychain 1 from the dresser 1."),
        ("heat keychain 1 with microwave 1", "You heat the keychain 1 using the microwave 1."),
        ("cool keychain 1 with fridge 1", "You cool the keychain 1 using the fridge 1."),
        ("clean keychain 1 with sinkbasin 1", "You clean the keychain 1 using the sinkbasin 1."),
        ("use desklamp 1", "You turn off the desklamp 1."),
    ]
    lists = read([*TURNS, *more]).lists()
    assert lists["seen"][-2:] == ["dresser 1: laptop 1", "fridge 1: cup 1, bread 1"]
    assert lists["held"] == ["keychain 1"]
    assert lists["changed"] == [
        "drawer 1: open",
        "bread 1: cool and moved to fridge 1",
        "keychain 1: cool and clean",
    ]


def test_a_record_says_only_what_was_said_whatever_comes_first():
    rng = random.Random(0)
    for _ in range(200):
        turns = rng.choices(TURNS, k=rng.randint(1, 12))
        lists = read(turns).lists()
        assert_said(lists, [text for _, text in turns])
        assert len(lists["tried"]) == len(turns)
        assert lists == read(turns).lists()


def test_long_commands_and_texts_are_cut():
    record = Record()
    record.read("go " * 5000, NOTHING, failed=True)
    record.read("help", "\nAvailable commands:\n  look:   look around", failed=False)
    record.read("", NOTHING, failed=True)  # a response without a command
    long, short = record.lists()["tried"]
    assert re.fullmatch(r"(go )+\.\.\.: Nothing happens\.", long)
    assert len(long) < 110
    assert short == "help: Available commands:"
