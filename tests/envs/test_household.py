"""The household: scenes and tasks, the world, the environment, the oracle and the players."""

import dataclasses
import hashlib
import random
import re
from collections import Counter

import pytest
from processes import run_python

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household import env as household
from opd_jax.envs.household import scenes, tables, thoughts
from opd_jax.envs.household import world as worlds
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert, Memory
from opd_jax.envs.household.habits import Careless, Clumsy, Forgetful, Mistaken, Stubborn
from opd_jax.envs.household.oracle import Learnt, distance, label
from opd_jax.envs.household.world import World
from opd_jax.envs.react import INVENTED, Random, parse_response
from opd_jax.envs.turns import before_invented_turn

SPLITS = tuple(tables.SPLIT_SIZES)
# SHA-256 of fixed playthroughs. If it changes, all tasks have changed: raise `VERSION`.
PLAYTHROUGH = "848483effc8ef38a81afaaa3252e8710dca591260d037b356a781b86b0993468"
DEV_PLAYTHROUGH = "a16bfb2b350f9979fef448b4af306c6acef5f742d89f6edd8a729b4c656a68bc"
HABITS = ("skip_step", "list_order", "ignore_closed", "idle", "forget")


def make_env(size="large", max_turns=30, show_admissible=0):
    return Household(size=size, max_turns=max_turns, show_admissible=show_admissible)


def random_command(world, rng):
    commands = world.admissible()
    return commands[int(rng.random() * len(commands))]


def run_episode(env, split, index, make_player):
    """Observations and responses of one episode, the first observation first."""
    observation = env.reset(split, index)
    player = make_player(env.task, observation)
    observations, responses = [observation], []
    while not observation.done:
        responses.append(player.respond(observation))
        observation = env.step(responses[-1])
        observations.append(observation)
    return observations, responses


def expert(task, first):
    return Expert(task, first, rng=random.Random(0))


def careless(seed, **habits):
    habits = dict.fromkeys(HABITS, 0.0) | habits
    return lambda task, first: Careless(task, first, rng=random.Random(seed), **habits)


def playthrough_digest(*splits):
    """SHA-256 over the texts of an expert's, a careless and a random player's episodes."""
    digest = hashlib.sha256()
    habits = dict.fromkeys(HABITS, 0.4)
    for size in tables.SIZES:
        env = make_env(size=size, show_admissible=5)
        for split in splits:
            for index in range(6):
                last = env.size(split) - 1 - index
                for number, make in (
                    (index, expert),
                    (last, careless(index, **habits)),
                    (index, lambda task, first: Random(random.Random(1))),
                ):
                    observations, responses = run_episode(env, split, number, make)
                    parts = [observation.message for observation in observations]
                    parts += [observation.oracle for observation in observations]
                    digest.update("\n".join([env.task.id, *parts, *responses]).encode())
    return digest.hexdigest()


def spec_of(task_type, wanted, target, places, objects, lamp=""):
    """A hand-made task; `objects` are (name, place name) pairs in order of name."""
    named = {name: (name.split()[0], int(name.split()[1])) for name in (*places, *dict(objects))}
    return scenes.TaskSpec(
        **{"id": "household/test", "type": task_type, "goal": "", "room": "", "scene": 0},
        **{"object": wanted, "target": target, "lamp": lamp},
        places=tuple(named[place] for place in places),
        objects=tuple((*named[name], places.index(place)) for name, place in objects),
    )


# Scenes and tasks


@pytest.mark.parametrize("size", tables.SIZES)
@pytest.mark.parametrize("room", tables.ROOM_KINDS)
def test_unseen_scenes_differ_from_all_training_scenes(room, size):
    numbers = range(1, tables.SCENES + 1)
    layouts = [scenes.scene(room, number, size) for number in numbers]
    train, unseen = layouts[: tables.TRAIN_SCENES], layouts[tables.TRAIN_SCENES :]
    assert not set(train) & set(unseen)
    least, most = tables.ROOM_SIZES[size]
    if (room, size) == ("kitchen", "large"):
        least, most = tables.LARGE_KITCHEN
    for layout in layouts:
        assert least <= sum(count for _, count in layout) <= most
        assert list(layout) == sorted(layout)


def test_splits_use_their_own_scenes():
    drawn = {split: {scenes.task(split, i, "small").scene for i in range(300)} for split in SPLITS}
    assert max(drawn["train"] | drawn["valid_seen"] | drawn["dev"]) <= tables.TRAIN_SCENES
    assert len(drawn["train"]) > 80
    unseen = [drawn[split] for split in ("valid_unseen", "test_unseen")]
    assert min(set.union(*unseen)) > tables.TRAIN_SCENES
    assert not set.intersection(*unseen)
    assert [len(scenes) for scenes in unseen] == [tables.UNSEEN_SCENES] * 2


@pytest.mark.parametrize("size", tables.SIZES)
def test_no_task_of_dev_is_trained_on_or_reported_and_none_of_test_is_used_before(size):
    def drawn(split, count):
        specs = (scenes.task(split, index, size) for index in range(count))
        return {dataclasses.replace(spec, id="") for spec in specs}

    reported = drawn("valid_seen", 400) | drawn("valid_unseen", 400)
    dev, test, train = drawn("dev", 200), drawn("test_unseen", 800), drawn("train", 3000)
    assert (len(dev), len(test)) == (200, 800)
    assert not dev & (reported | train)
    assert not test & (reported | train | dev)


def test_a_digest_names_version_size_and_split(monkeypatch):
    def digests():
        sizes = [Household(size=s, max_turns=9, show_admissible=0) for s in tables.SIZES]
        return {env.digest(split) for env in sizes for split in SPLITS}

    before = digests()
    assert len(before) == len(tables.SIZES) * len(SPLITS)
    assert digests() == before
    monkeypatch.setattr(household, "VERSION", tables.VERSION + 1)
    assert not digests() & before


@pytest.mark.parametrize("size", tables.SIZES)
def test_tasks_are_balanced_solvable_and_not_solved(size):
    specs = [scenes.task("train", i, size) for i in range(600)]
    assert set(Counter(spec.type for spec in specs).values()) == {100}
    combos = {(kind, room) for kind, rooms in tables.TASK_ROOMS.items() for room in rooms}
    assert {(spec.type, spec.room) for spec in specs} == combos
    for spec in specs:
        world = World(spec)
        assert not world.solved
        assert 2 <= distance(world) < 15
        assert len(world.room.wanted) >= (2 if spec.type == tables.TWO else 1)
        least, most = tables.CLUTTER[size]
        clutter = [k for k, _, _ in spec.objects if k not in (spec.object, *tables.LAMPS)]
        assert least <= len(clutter) <= most
        start = Counter(spec.places[place][0] for k, _, place in spec.objects if k == spec.object)
        if spec.type in (tables.SIMPLE, tables.TWO):
            assert spec.target not in start
        for kind, number, place in spec.objects:
            assert spec.places[place][0] in tables.search_order(kind)
            assert number <= tables.MAX_OBJECT_NUMBER
        assert max(number for _, number in spec.places) <= tables.MAX_RECEPTACLE_NUMBER


def test_the_object_table_is_ordered_and_every_word_has_one_role():
    for name, row in tables.OBJECT_TABLE.items():
        keys = [(-weight, place in tables.OPENABLE) for place, weight in row.prior]
        assert keys == sorted(keys), name
        assert len(dict(row.prior)) == len(row.prior), name
        for room in row.rooms:
            assert any(place in tables.ROOMS[room] for place, _ in row.prior)
    assert not set(tables.OBJECTS) & set(tables.RECEPTACLES)
    assert all(re.fullmatch("[a-z]+", name) for name in tables.OBJECTS + tables.RECEPTACLES)
    fixed = re.findall(
        "[a-z]+", " ".join((*household.PHRASES, *worlds.PHRASES, *worlds.COMMANDS)).lower()
    )
    assert not set(fixed) & (set(tables.OBJECTS) | set(tables.RECEPTACLES))


def test_playthroughs_are_pinned_and_independent_of_hash_order():
    splits = SPLITS[:3]
    assert playthrough_digest("dev") == DEV_PLAYTHROUGH
    assert playthrough_digest(*splits) == PLAYTHROUGH
    code = f"import test_household as t; print(t.playthrough_digest(*{splits}))"
    assert run_python(code, PYTHONHASHSEED="12345") == PLAYTHROUGH


# Engine


def kitchen():
    places = ["cabinet 1", "countertop 1", "fridge 1", "microwave 1", "sinkbasin 1"]
    objects = [("apple 1", "countertop 1"), ("bread 1", "countertop 1"), ("egg 1", "fridge 1"),
               ("knife 2", "countertop 1")]  # fmt: skip
    return World(spec_of(tables.HEAT, "apple", "fridge", places, objects))


def test_move_and_put_are_both_understood():
    world = kitchen()
    for step in ("go to countertop 1", "take apple 1 from countertop 1"):
        world.act(step)
    for command in (
        "move apple 1 to countertop 1",
        "put apple 1 in/on countertop 1",
        "put apple 1 in countertop 1",
        "put apple 1 on countertop 1",
        "  PUT   Apple 1  on\tcountertop 1 . ",
    ):
        assert world.act(command) == "You move the apple 1 to the countertop 1."
        world.act("take apple 1 from countertop 1")


def test_commands_of_another_form_change_nothing():
    world = kitchen()
    world.act("go to countertop 1")
    before = state_key(world)
    for command in (
        "", ".", "go", "go to", "go to countertop", "go to countertop 9", "go cabinet 1",
        "take apple 1", "put apple 1 to countertop 1", "look around", "inventory now", "dance",
        "take apple 1 from countertop 1 now",
    ):  # fmt: skip
        assert world.act(command) == worlds.NOTHING, command
        assert state_key(world) == before


def state_key(world):
    return (
        world.at, world.hand, tuple(world.where), tuple(world.is_open), tuple(world.heat),
        tuple(world.clean), world.solved,
    )  # fmt: skip


def every_command(world):
    """All well-formed commands over a world's names; `move` stands for `put`."""
    places, objects = world.room.places, world.room.objects
    for place in places:
        yield from (f"go to {place}", f"open {place}", f"close {place}", f"examine {place}")
        for name in objects:
            yield from (f"take {name} from {place}", f"move {name} to {place}")
            yield from (f"{verb} {name} with {place}" for verb in ("clean", "heat", "cool"))
    for name in objects:
        yield from (f"use {name}", f"examine {name}")
    yield from ("look", "inventory")


@pytest.mark.parametrize("size", tables.SIZES)
def test_admissible_are_the_commands_that_do_something_and_they_are_ordered(size):
    rng = random.Random(2)
    groups = {"go": 1, "examine": 2, "look": 2, "inventory": 2}
    for index in range(6):
        world = World(scenes.task("train", index, size))
        for step in range(12):
            admissible = world.admissible()
            assert len(set(admissible)) == len(admissible)
            order = [groups.get(command.split()[0], 0) for command in admissible]
            assert order == sorted(order)
            going = [command for command in admissible if command.startswith("go to ")]
            assert going == [c for i, c in enumerate(world.room.go) if i != world.at]
            if step % 3 == 2:
                before = state_key(world)
                for command in every_command(world):
                    other = world.copy()
                    impossible = other.act(command) == worlds.NOTHING
                    assert impossible == (command not in admissible)
                    assert not impossible or state_key(other) == before
                assert state_key(world) == before  # copies share no state
            world.act(random_command(world, rng))


def hide(spec, seed):
    """The same task with the content of each closed receptacle moved into another one."""
    closed = [i for i, (kind, _) in enumerate(spec.places) if kind in tables.OPENABLE]
    order = closed.copy()
    random.Random(seed).shuffle(order)
    moved = dict(zip(closed, order, strict=True))
    objects = tuple((kind, number, moved.get(at, at)) for kind, number, at in spec.objects)
    return dataclasses.replace(spec, objects=objects)


def test_nothing_shows_what_is_hidden():
    """Worlds that differ only inside closed receptacles look the same until one is opened.

    The expert then responds the same in both, too.
    """
    opened = 0
    for index in range(60):
        spec = scenes.task("train", index, "large")
        one, two = World(spec), World(hide(spec, index))
        rng = random.Random(index)
        task = Task(id=spec.id, type=spec.type, goal=spec.goal, scene=one.room.start)
        first = Observation(one.room.start, "", one.admissible())
        pair = [expert(task, first), expert(task, first)]
        texts = [one.room.start, two.room.start]
        command = ""
        for _ in range(40):
            assert texts[0] == texts[1]
            assert one.admissible() == two.admissible()
            seen = [Observation(text, "", (), action=command) for text in texts]
            responses = [player.respond(view) for player, view in zip(pair, seen, strict=True)]
            assert responses[0] == responses[1]
            command = parse_response(responses[0])[0]
            if rng.random() < 0.5:
                command = random_command(one, rng)
            if command.startswith("open "):
                opened += 1
                break
            texts = [one.act(command), two.act(command)]
            if one.solved:
                break
    assert opened > 20


# Environment


def test_the_first_action_line_counts():
    for response, parsed in (
        ("Thought: a.\nAction: go to cabinet 1", ("go to cabinet 1", "")),
        ("hm\nACTION:  inventory  \nbye", ("inventory", "")),
        ("action:look\nAction: go to desk 1", ("look", "")),
        ("Action:\nAction: look", ("", "no_action")),
        ("Thought: Action: look", ("", "no_action")),
        ("look", ("", "no_action")),
        ("", ("", "empty")),
        (" \n\t", ("", "empty")),
    ):
        assert parse_response(response) == parsed


def test_nothing_counts_in_an_invented_turn():
    said = "Thought: a.\nAction: look"
    more = "\n**Observation:** The fridge is open.\nThought: b.\nAction: inventory"
    assert parse_response(said + more) == ("look", "")
    assert parse_response(f"Thought: a.{more}") == ("", "no_action")
    assert before_invented_turn(said + more, INVENTED) == (f"{said}\n", True)


def test_thinking_is_not_acted_on():
    draft = "<think>\nAction: look\nObservation: what would I see?\n"
    assert parse_response(draft) == ("", "no_action")
    assert parse_response(f"{draft}</think>\nAction: inventory") == ("inventory", "")
    opened_by_the_prompt = draft.removeprefix("<think>")
    assert parse_response(f"{opened_by_the_prompt}</think>\nAction: go") == ("go", "")
    assert parse_response("<thought>a\nAction: go") == ("go", "")
    late = "Action: look\n<think>x</think>\nAction: inventory"
    assert parse_response(late) == ("look", "")


def test_failed_turns_are_told_apart_and_change_nothing():
    env = make_env()
    start = env.reset("train", 0)
    assert (start.action, start.failure, start.oracle, start.done) == ("", "", "", False)
    for response, action, failure in (
        ("", "", "empty"),
        ("Thought: hm.", "", "no_action"),
        ("Action: fly to moon 1", "fly to moon 1", "rejected"),
    ):
        observation = env.step(response)
        assert (observation.action, observation.failure) == (action, failure)
        assert (observation.text, observation.oracle) == ("Nothing happens.", "")
        assert observation.admissible == start.admissible
    assert env.step("Action: look").failure == ""


def test_episodes_end_at_success_or_after_max_turns():
    env = make_env(max_turns=3)
    env.reset("train", 0)
    assert [env.step("Action: look").end for _ in range(3)] == ["", "", "turn_limit"]
    (*others, last), _ = run_episode(make_env(), "train", 0, expert)
    assert (last.end, last.done, last.success, last.score) == ("success", True, True, 1.0)
    assert {(o.end, o.success, o.score) for o in others} == {("", False, 0.0)}


def test_messages_hold_text_goal_and_admissible_commands():
    envs = [make_env(show_admissible=shown) for shown in (0, 3)]
    plain, short = (env.reset("valid_seen", 4) for env in envs)
    task = envs[0].task
    assert plain.text == task.scene
    assert plain.message == f"{plain.text}\nYour task is to: {task.goal}"
    a, b, c, *rest = short.admissible
    assert short.message == f"{plain.message}\nAdmissible: {a}, {b}, {c} (+{len(rest)} more)"
    plain, short = (env.step(f"Action: {a}") for env in envs)
    assert plain.message == plain.text
    assert short.message.startswith(plain.text + "\nAdmissible: ")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_env(size="huge"), r"`size`.*small, medium, large.*'huge'"),
        (lambda: make_env(max_turns=0), r"`max_turns`.*0"),
        (lambda: make_env(show_admissible=-1), r"`show_admissible`.*-1"),
        (lambda: make_env().size("test"), r"`split`.*valid_unseen.*'test'"),
        (lambda: make_env().digest("test"), r"`split`.*valid_unseen.*'test'"),
        (lambda: make_env().reset("test", 0), "`split`"),
        (lambda: make_env().reset("valid_seen", -1), r"`index`.*999.*-1"),
        (lambda: make_env().reset("valid_seen", 1000), r"`index`.*999.*1000"),
        (lambda: scenes.scene("attic", 1, "small"), r"`room`.*'attic'"),
        (lambda: scenes.scene("kitchen", 151, "small"), r"`number`.*150.*151"),
    ],
)
def test_errors_name_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Oracle


TINY = {
    "simple, two targets": spec_of(
        tables.SIMPLE, "cd", "drawer", ["bed 1", "drawer 1", "drawer 2", "safe 1"],
        [("cd 1", "safe 1"), ("cd 2", "bed 1"), ("pen 1", "drawer 1")],
    ),
    "clean, already at the target": spec_of(
        tables.CLEAN, "cloth", "cabinet", ["cabinet 1", "sinkbasin 1", "sinkbasin 2", "toilet 1"],
        [("cloth 1", "cabinet 1"), ("cloth 2", "sinkbasin 1"), ("candle 1", "toilet 1")],
    ),
    "heat, with a fridge to undo it": spec_of(
        tables.HEAT, "bread", "countertop", ["countertop 1", "fridge 1", "microwave 1"],
        [("bread 1", "countertop 1"), ("bread 2", "fridge 1"), ("knife 1", "countertop 1")],
    ),
    "cool, the target is also a tool": spec_of(
        tables.COOL, "bread", "fridge", ["countertop 1", "fridge 1", "microwave 1"],
        [("bread 1", "microwave 1"), ("bread 2", "fridge 1"), ("knife 1", "countertop 1")],
    ),
    "look, two lamps": spec_of(
        tables.LOOK, "cd", "", ["bed 1", "desk 1", "drawer 1", "shelf 1"],
        [("cd 1", "drawer 1"), ("cd 2", "desk 1"), ("desklamp 1", "desk 1"),
         ("desklamp 2", "shelf 1"), ("pen 1", "bed 1")],
        lamp="desklamp",
    ),
    "two, two targets, three objects": spec_of(
        tables.TWO, "cd", "drawer", ["bed 1", "drawer 1", "drawer 2"],
        [("cd 1", "bed 1"), ("cd 2", "bed 1"), ("cd 3", "drawer 2"), ("pen 1", "bed 1")],
    ),
    "two, objects in closed places": spec_of(
        tables.TWO, "cd", "bed", ["bed 1", "cabinet 1", "safe 1", "shelf 1"],
        [("cd 1", "cabinet 1"), ("cd 2", "safe 1"), ("pen 1", "shelf 1")],
    ),
}  # fmt: skip


def next_worlds(world):
    """The command that leads to each next state, and that state."""
    for command in world.admissible():
        if not command.startswith(("examine", "look", "inventory")):
            other = world.copy()
            other.act(command)
            assert (distance(other) == 0) == other.solved
            yield command, other


# If a state's distance is one more than the least of its next states, and 0 at the goal alone, then
# it is the length of a shortest way.


@pytest.mark.parametrize("name", TINY)
def test_distance_is_exact_in_every_reachable_state(name):
    start = World(TINY[name])
    distances, waiting = {state_key(start): distance(start)}, [start]
    while waiting:
        world, after = waiting.pop(), []
        if world.solved:
            continue
        for _, other in next_worlds(world):
            if state_key(other) not in distances:
                distances[state_key(other)] = distance(other)
                waiting.append(other)
            after.append(distances[state_key(other)])
        assert distances[state_key(world)] == 1 + min(after)
    assert len(distances) > 500


def check_labels(spec, *script):
    """Act out lines of `command: LABEL; command: LABEL` and compare the oracle's labels."""
    world = World(spec)
    learnt = Learnt(world)
    for step in "; ".join(script).split("; "):
        command, expected = step.split(": ")
        before, searching = distance(world), learnt.searching(world)
        assert world.act(command) != worlds.NOTHING, command
        novel = learnt.update(world)
        assert label(before, distance(world), novel=novel, searching=searching) == expected, step


def test_labels_of_a_worked_episode():
    check_labels(
        TINY["two, objects in closed places"],
        "look: STRONG; go to shelf 1: SKIP",  # nothing there, but it was worth a look
        "take pen 1 from shelf 1: STRONG; move pen 1 to shelf 1: SKIP",
        # The cabinet holds one cd, but so does the safe.
        "go to cabinet 1: SKIP; go to safe 1: SKIP; go to shelf 1: STRONG; go to cabinet 1: SKIP",
        "open cabinet 1: SKIP; take cd 1 from cabinet 1: SKIP; inventory: STRONG",
        "go to bed 1: SKIP; move cd 1 to bed 1: SKIP; go to safe 1: SKIP; open safe 1: SKIP",
        "go to bed 1: STRONG; go to safe 1: SKIP; take cd 2 from safe 1: SKIP",
        "close safe 1: STRONG; go to bed 1: SKIP; move cd 2 to bed 1: SKIP",
    )


def test_a_new_place_is_worth_a_visit_only_while_searching():
    spec = TINY["look, two lamps"]
    take = "go to desk 1: SKIP; take cd 2 from desk 1: SKIP"
    # A lamp is at hand: a new place does not matter.
    check_labels(spec, take, "go to bed 1: STRONG")
    # The only lamp is on the shelf. With a cd in hand, one searches for the lamp. With a cd seen
    # but not taken, the next thing is to take it.
    lone = dataclasses.replace(spec, objects=(*spec.objects[:2], ("desklamp", 1, 3)))
    check_labels(lone, take, "go to bed 1: SKIP; go to drawer 1: SKIP")
    check_labels(lone, "go to desk 1: SKIP; go to bed 1: STRONG")
    heat = TINY["heat, with a fridge to undo it"]
    holding = "go to countertop 1: SKIP; take bread 1 from countertop 1: SKIP"
    check_labels(heat, holding, "go to fridge 1: WEAK")


def test_closed_places_are_to_be_opened_not_collected():
    spec = dataclasses.replace(
        TINY["look, two lamps"],
        places=(("bed", 1), ("cabinet", 1), ("cabinet", 2), ("drawer", 1), ("shelf", 1)),
        objects=(("cd", 1, 3), ("desklamp", 1, 4)),
    )
    check_labels(
        spec,
        "go to cabinet 1: SKIP; go to cabinet 2: SKIP",  # not opened, but the second one is new
        "go to cabinet 1: STRONG; go to cabinet 2: STRONG",  # to and fro
        "go to bed 1: SKIP; go to cabinet 1: SKIP",  # comes back to open it
        "look: STRONG; open cabinet 1: SKIP; go to drawer 1: SKIP",
        "go to shelf 1: STRONG",  # leaves the closed drawer with the cd
    )


# Players


@pytest.mark.parametrize("size", tables.SIZES)
def test_memory_agrees_with_the_world_whoever_acts(size):
    rng = random.Random(6)
    for index in range(20):
        world = World(scenes.task("train", index, size))
        room = world.room
        memory = Memory(room.start)
        for _ in range(60):
            command = random_command(world, rng)
            if rng.random() < 0.2:
                command = random_command(World(room.spec), rng)  # often impossible here
            text = world.act(command)
            memory.update(Observation(text, text, (), action=command))
            assert memory.at == (room.places[world.at] if world.at >= 0 else "")
            assert memory.hand == (room.objects[world.hand] if world.hand >= 0 else "")
            for place, names in memory.content.items():
                true = world.content[room.place_index[place]]
                assert sorted(names) == sorted(room.objects[item] for item in true)
            assert memory.shut == {
                p for p, o in zip(room.places, world.is_open, strict=True) if not o
            }
            for i, name in enumerate(room.objects):
                true = {world.heat[i]} - {""} | ({"clean"} if world.clean[i] else set())
                assert memory.states.get(name, set()) == true


@pytest.mark.parametrize("size", tables.SIZES)
def test_the_expert_solves_every_type_and_no_turn_needs_correction(size):
    env = make_env(size=size)
    won, turns, labels = Counter(), [], Counter()
    for split in ("train", "valid_unseen"):
        for index in range(150):
            observations, responses = run_episode(env, split, index, expert)
            won[env.task.type] += observations[-1].success
            turns.append(len(responses))
            labels.update(observation.oracle for observation in observations[1:])
            for response in responses:
                thought, action = response.split("\n")
                assert thought.startswith("Thought: ")
                assert action.startswith("Action: ")
    assert set(won) == set(tables.TASK_TYPES)
    assert set(won.values()) == {50}
    assert set(labels) == {"SKIP"}
    assert sum(turns) / len(turns) < {"small": 8, "medium": 9.5, "large": 12.5}[size]


def claims_of(thought: str, memory: Memory, wanted: str) -> list[bool]:
    """For every claim of a thought, whether the texts so far bear it out."""

    def claims(pattern: str) -> list[str]:
        return re.findall(pattern, thought)

    here = memory.content.get(memory.at, [])
    sought = (claims(r"find (?:another )?(\w+)\.") or [wanted])[-1]
    known = sum(name.startswith(f"{sought} ") for name in here)
    placed = "find another" in thought  # the one placed may be here
    return [
        *(name == memory.hand for name in claims(r"i have (\w+ \d+)\.")),
        *(state in memory.states.get(memory.hand, ()) for state in claims(r"it is (\w+)\.")),
        *(
            state not in memory.states.get(memory.hand, ())
            for state in claims(r"is not (\w+)\. [ig]")
        ),
        *(kind == memory.at.split()[0] for kind in claims(r"i am at (\w+)\.")),
        *(known <= placed for _ in claims("none here")),
        *(name in here for name in claims(r"(\w+ \d+) is here\.")),
        *(name in memory.content[place] for name, place in claims(r"(\w+ \d+) is in (\w+ \d+)\.")),
        *(
            place == memory.at and place in memory.shut
            for place in claims(r"(\w+ \d+) is closed\.")
        ),
        *(place not in memory.places for place in claims(r"(\w+ \d+) is not there\.")),
        *(place in memory.places for place in claims(r"(\w+ \d+) is next\.")),
        *(place not in memory.content for place in claims(r"(\w+ \d+) is next\.")),
    ]


@pytest.mark.parametrize("size", tables.SIZES)
def test_the_expert_recovers_after_others_have_acted_and_thinks_what_is_true(size):
    env, rng = make_env(size=size, max_turns=60), random.Random(7)
    labels, checked = Counter(), 0
    for index in range(60):
        observation = env.reset("valid_seen", index)
        player, memory = expert(env.task, observation), Memory(observation.text)
        turn = 0
        while not observation.done:
            memory.update(observation)
            response = own = player.respond(observation)
            thought, command = response.removeprefix("Thought: ").split("\nAction: ")
            results = claims_of(thought, memory, player.wanted)
            assert results, thought
            assert all(results), (thought, results)
            checked += len(results)
            for place in re.findall(r"(\w+ \d+) is next\.", thought):
                assert command == f"go to {place}"
            if turn < 25 and rng.random() < 0.6:
                response = Random(rng).respond(observation)
            if turn < 25 and rng.random() < 0.1:
                response = "Action: go to moon 1"
            observation = env.step(response)
            labels[observation.oracle] += response == own
            turn += 1
        assert observation.success
    assert labels["SKIP"] >= 0.97 * labels.total()
    assert checked > 1000


@pytest.mark.parametrize(
    ("habits", "won", "skipped"),
    [
        ({}, 90, (1.0, 1.0)),
        ({"skip_step": 1.0}, 45, (0.0, 0.9)),  # clean, heat and cool are half of the types
        ({"forget": 1.0}, 75, (0.0, 0.9)),  # one type in six asks for two objects
        ({"ignore_closed": 1.0}, range(85), (0.0, 0.9)),
        ({"idle": 0.3}, range(91), (0.0, 0.75)),
        ({"list_order": 1.0}, range(90), (0.0, 1.0)),
    ],
)
def test_bad_habits_cost_success_and_the_oracle_sees_them(habits, won, skipped):
    env, wins, labels = make_env(), 0, Counter()
    for index in range(90):
        observations, _ = run_episode(env, "valid_seen", index, careless(index, **habits))
        wins += observations[-1].success
        assert not any(observation.failure for observation in observations)
        labels.update(observation.oracle for observation in observations[1:])
    assert wins == won if isinstance(won, int) else wins in won
    least, most = skipped
    assert least <= labels["SKIP"] / labels.total() <= most


def test_a_forgetful_player_differs_from_the_expert_only_where_a_step_is_forgotten():
    env = make_env()
    for index in range(12):
        played = run_episode(env, "train", index, expert)

        def forgetful(task, first):
            return Forgetful(task, first, rng=random.Random(0), skip_step=1.0, forget=1.0)

        other = run_episode(env, "train", index, forgetful)
        if env.task.type in (*tables.TREATMENTS, tables.TWO):
            assert not other[0][-1].success
        else:
            assert other == played


def test_a_stubborn_player_is_a_mistaken_one_until_something_fails_and_then_says_it_again():
    def mistaken(task, first):
        return Mistaken(task, first, rng=random.Random(0))

    def stubborn(again):
        return lambda task, first: Stubborn(task, first, rng=random.Random(0), again=again)

    stuck = 0
    for index in range(20):
        env = make_env(max_turns=20)
        observations, said = run_episode(env, "train", index, stubborn(1.0))
        other = run_episode(env, "train", index, mistaken)[1]
        failed = [n for n, after in enumerate(observations[1:]) if after.failure]
        first = failed[0] if failed else len(said)
        assert said[: first + 1] == other[: first + 1]
        assert len({*said[first:]}) <= 1
        stuck += len(said) - first > 2
        # A response is drawn after a failure too, so only a player that never repeats is the same.
        assert failed or run_episode(env, "train", index, stubborn(0.0))[1] == other
    assert stuck > 5


@pytest.mark.parametrize("kind", [Clumsy, Mistaken])
def test_most_of_what_others_try_fails_or_does_not_help(kind):
    aims = [aim.partition("%s")[0] for aim in (thoughts.FIND, thoughts.FIND_ANOTHER, thoughts.HAVE)]
    env, labels, same = make_env(max_turns=60), Counter(), set()
    for index in range(60):
        observation = env.reset("train", index)
        player, chance = expert(env.task, observation), random.Random(index)
        strayed = kind(env.task, observation, rng=random.Random(index))
        while not observation.done:
            good, bad = player.respond(observation), strayed.respond(observation)
            same.add(good == bad)
            if kind is Mistaken:  # it speaks as the expert does
                assert any(bad.startswith(f"Thought: {aim}") for aim in aims)
            strays = chance.random() < 0.3
            observation = env.step(bad if strays else good)
            if strays:
                labels[observation.oracle or "failed"] += 1
            # A mistake is forgotten with its turn.
            assert vars(strayed.memory) == vars(player.memory)
        assert observation.success
    assert labels.keys() >= {"failed", "STRONG"}
    assert labels["SKIP"] < 0.5 * labels.total()
    assert same == ({False, True} if kind is Mistaken else {False})  # some mistakes change nothing
