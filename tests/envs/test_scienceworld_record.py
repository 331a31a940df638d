"""ScienceWorld's record: what the engine's texts tell, and nothing else."""

import random
import re

from opd_jax.envs.scienceworld.record import Record

ORANGE, POT = "an orange", "a metal pot (containing a substance called water)"
HALLWAY = """\
This room is called the hallway. In it, you see:
	the agent
	a substance called air
	a picture
You also see:
	A door to the art studio (that is open)
	A door to the kitchen (that is closed)"""
KITCHEN = """\
This room is called the kitchen. In it, you see:
	the agent
	a substance called air
	a chair. On the chair is: nothing.
	a counter. On the counter is: a bowl (containing a red apple, an orange), a drawer.
	a fridge. The fridge door is closed.
	a oven, which is turned off. The oven door is closed.
	a sink, which is turned off. In the sink is: nothing.
	a thermometer, currently reading a temperature of 10 degrees celsius
You also see:
	A door to the hallway (that is open)"""
STUDIO = """\
This room is called the art studio. In it, you see:
	a substance called air
You also see:
	A door to the hallway (that is open)"""  # without the agent: it looks through the door
ASKED = """\
Ambiguous request: Please enter the number for the action you intended (or blank to cancel):
0:	eat orange (in bowl, in counter, in kitchen)
1:	eat orange (in inventory, in agent, in kitchen)"""
# Commands, what the engine answered, and what the inventory listed in the same message.
TURNS = (
    ("", HALLWAY, [ORANGE]),
    ("look at art studio", STUDIO, [ORANGE]),
    ("open door to kitchen", "The door is now open.", [ORANGE]),
    ("go to kitchen", "You move to the kitchen.", [ORANGE]),
    ("look around", KITCHEN, [ORANGE]),
    ("open fridge", "The fridge is now open.", [ORANGE]),
    ("open fridge", "The fridge is already open.", [ORANGE]),
    ("look in fridge", "Inside the fridge is:\n\ta wood cup (containing orange juice)", [ORANGE]),
    ("move metal pot to sink", "You move the metal pot to the sink.", [ORANGE]),
    ("activate sink", "The sink is now activated.", [ORANGE]),
    (
        "look in sink",
        f"Inside the sink is:\n\t{POT}\n\n You also see: A drain, which is open.",
        [ORANGE],
    ),
    ("pick up metal pot", "You move the metal pot to the inventory.", [POT, ORANGE]),
    (
        "look at counter",
        "a counter. On the counter is:\n\ta bowl (containing a red apple, an orange)\n\ta drawer",
        [POT, ORANGE],
    ),
    (
        "use thermometer on water in metal pot",
        "the thermometer measures a temperature of 20 degrees celsius",
        [POT, ORANGE],
    ),
    ("focus on metal pot", "You focus on the metal pot.", [POT, ORANGE]),
    ("put down metal pot", "You move the metal pot to the kitchen.", [ORANGE]),
    ("eat orange", ASKED, [ORANGE]),
    ("1", "The orange was delicious.", []),
    ("inventory", "In your inventory, you see:", []),
    ("look in inventory", "Inside the inventory is:\n\tnothing", []),
)
WIRES = (
    "anode on battery is now connected to terminal 1 on black wire",
    "terminal 2 on black wire is now connected to cathode on red light bulb",
    "cathode on battery is now connected to terminal 1 on blue wire",
)


def read(turns):
    record = Record()
    for command, text, held in turns:
        record.read(command, text, held=held, failed=" is already " in text)
    return record


def assert_said(lists, texts):
    """Each thing comes from a text that names its place; changes are of things that were named."""
    for line in lists["seen"]:
        name, _, content = line.partition(": ")
        place = name.split(" in ")[0]
        parts = [re.sub(r"^door to the (.+) \((\w+)\)$", r"\1 (that is \2", thing)
                 for thing in content.split("; ")]  # fmt: skip
        assert any(
            re.search(rf"\b{re.escape(place)}\b", text) and all(part in text for part in parts)
            for text in texts
        ), line
    told = " ".join(texts)
    assert all(thing in told for thing in lists["held"])
    for line in lists["changed"]:
        assert all(word in told for word in {*re.findall(r"\w+", line)} - {"moved", "in"}), line


def test_rooms_and_containers_hold_what_was_last_seen_there():
    lists = read(TURNS).lists()
    assert lists["seen"] == [
        "hallway: a substance called air; a picture; door to the art studio (open); "
        "door to the kitchen (closed)",
        "art studio: a substance called air; door to the hallway (open)",
        "kitchen: a substance called air; a chair. On the chair is: nothing; a counter. On the "
        "counter is: a bowl (containing a red apple, an orange), a drawer; a fridge. The fridge "
        "door is closed; a oven, which is turned off. The oven door is closed; a sink, which is "
        "turned off. In the sink is: nothing; a thermometer, currently reading a temperature of "
        "10 degrees celsius; door to the hallway (open)",
        "fridge in kitchen: a wood cup (containing orange juice)",
        f"sink in kitchen: {POT}",
        "counter in kitchen: a bowl (containing a red apple, an orange); a drawer",
    ]
    assert lists["held"] == []
    assert read(TURNS[:-3]).lists()["held"] == [ORANGE]
    assert lists["changed"] == [
        "door to kitchen in hallway: open",
        "fridge in kitchen: open",
        "sink in kitchen: activated",
        "water in metal pot: 20 degrees celsius",
        "focus: metal pot",
        "metal pot: moved to kitchen",
    ]
    pot_in_hand = read(TURNS[:12]).lists()
    assert pot_in_hand["held"] == [POT, ORANGE]
    assert not any("moved" in line for line in pot_in_hand["changed"])
    again = [("look in sink", "Inside the sink is:\n\tnothing", []), ("look around", HALLWAY, [])]
    after = read([*TURNS, *again]).lists()["seen"]
    assert after[:4] + after[5:] == lists["seen"][:4] + lists["seen"][5:]
    assert after[4] == "sink in kitchen: nothing"


def test_a_container_is_named_with_its_room_and_a_room_is_not():
    turns = [
        *TURNS[:1],
        ("teleport to kitchen", "You teleport to the kitchen.", []),
        ("open fridge", "The fridge is now open.", []),
        ("look in fridge", "Inside the fridge is:\n\tnothing", []),
        (
            "look in hallway",
            "Inside the hallway is:\n\ta picture\n\n You also see: A door to the kitchen (that is "
            "open), A door to the workshop (that is closed).",
            [],
        ),
    ]
    lists = read(turns).lists()
    assert lists["changed"] == ["fridge in kitchen: open"]
    assert lists["seen"] == [
        "hallway: a picture; door to the kitchen (open); door to the workshop (closed)",
        "fridge in kitchen: nothing",
    ]


def test_commands_are_listed_with_how_they_ended():
    said = read(TURNS).lists()["tried"]
    assert len(said) == len(TURNS) - 1
    assert said[:2] == [
        "look at art studio: This room is called the art studio.",
        "open door to kitchen: The door is now open.",
    ]
    assert "open fridge: Nothing happens. The fridge is already open." in said
    # A number stands for what the engine has offered under it, in the next turn alone.
    assert "eat orange (in inventory, in agent, in kitchen): The orange was delicious." in said
    later = read([*TURNS, ("1", "No known action matches that input.", [])]).lists()["tried"]
    assert later[-1] == "1: No known action matches that input."


def test_wires_are_connected_until_they_are_not():
    moved = ("move black wire to table", "You move the black wire to the table.", [])
    turns = [moved, *(("connect a to b", text, []) for text in WIRES)]
    assert read(turns).lists()["changed"] == [
        "black wire: moved to table",
        "anode on battery: connected to terminal 1 on black wire",
        "terminal 2 on black wire: connected to cathode on red light bulb",
        "cathode on battery: connected to terminal 1 on blue wire",
    ]
    turns.append(("disconnect black wire", "black wire has been disconnected", []))
    assert read(turns).lists()["changed"] == [
        "black wire: moved to table",
        "cathode on battery: connected to terminal 1 on blue wire",
    ]


def test_a_record_says_only_what_was_said_whatever_comes_first():
    rng = random.Random(0)
    for _ in range(200):
        turns = rng.choices(TURNS[1:], k=rng.randint(1, 12))
        lists = read([TURNS[0], *turns]).lists()
        texts = [f"{command}\n{text}\n{held}" for command, text, held in [TURNS[0], *turns]]
        assert_said(lists, texts)
        assert len(lists["tried"]) == len(turns)
        assert lists == read([TURNS[0], *turns]).lists()
