"""ALFWorld: panels of games, the generator, the adapter on the real engine, its players."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from opd_jax.envs.alfworld import env as alfworld
from opd_jax.envs.alfworld import games as alfworld_games
from opd_jax.envs.alfworld import panel as alfworld_panel
from opd_jax.envs.alfworld.engine import Engine, alfworld_module
from opd_jax.envs.alfworld.env import AlfWorld
from opd_jax.envs.alfworld.expert import Expert, parameters
from opd_jax.envs.alfworld.panel import GAME_FILE, SPLITS, TASK_FILE, TASK_TYPES, data_folder, panel
from opd_jax.envs.alfworld.problem import Goal, Receptacle, Thing, names, problem, write_game
from opd_jax.envs.base import Task
from opd_jax.envs.household.tables import LOOK, SIMPLE, TWO
from opd_jax.envs.household.world import NOTHING
from opd_jax.envs.react import RESPONSE, Random, parse_response

ROOT = Path(__file__).parents[2]
needs_engine = pytest.mark.skipif(
    find_spec("alfworld") is None or find_spec("fast_downward") is None,
    reason="needs the extra alfworld",
)
GAMES = 6  # of each split: one of each type
# Games of seed 0 with alfworld 0.4.2. Changing this means changing every game: raise `VERSION`.
PANEL = "generated-ee0d82ea2ead35152a34c4562c5ac0e9eb7af664c2a397e23dbbd2644f7e6481"


def answer(command):
    return f"Thought: so.\nAction: {command}"


def make_env(folder, max_turns=60, show_admissible=0):
    return AlfWorld(data=str(folder), max_turns=max_turns, show_admissible=show_admissible)


def run_python(code, *arguments, **environment):
    """Runs code in a process of its own, and returns what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The panel of games


def put_game(folder, place, task_type=SIMPLE, **game):
    """A file that lists as a game; nothing plays it."""
    folder = folder / place
    folder.mkdir(parents=True)
    (folder / TASK_FILE).write_text(json.dumps({"task_type": task_type}))
    (folder / GAME_FILE).write_text(json.dumps({"solvable": True, **game}))


def test_the_panel_does_not_depend_on_the_order_of_the_file_system(tmp_path):
    places = [f"train/task-{i % 7}/trial_{i}" for i in range(40)]
    for name, order in (("a", places), ("b", places[::-1])):
        for place in order:
            put_game(tmp_path / name, place)
    one, other = (panel(tmp_path / name, "train") for name in "ab")
    assert [game.id for game in one] == [game.id for game in other]
    assert {game.id for game in one} == {f"alfworld/{place}" for place in places}
    digests = [hashlib.sha256(game.id.encode()).hexdigest() for game in one]
    assert digests == sorted(digests)
    assert alfworld_panel.digest(one) == alfworld_panel.digest(other)
    assert alfworld_panel.digest(one) != alfworld_panel.digest(one[1:])


def test_the_digest_is_of_the_games_and_not_only_of_their_names(tmp_path):
    digests = {}
    for version, content in (("a", "here"), ("b", "there")):
        put_game(tmp_path / version, "train/task/trial", pddl_problem=content)
        (game,) = panel(tmp_path / version, "train")
        file = hashlib.sha256(game.path.read_bytes()).hexdigest()
        line = f"alfworld/train/task/trial {SIMPLE} {file}\n"
        digests[version] = alfworld_panel.digest((game,))
        assert digests[version] == hashlib.sha256(line.encode()).hexdigest()
    assert digests["a"] != digests["b"]


def test_what_alfworld_leaves_out_is_left_out(tmp_path):
    put_game(tmp_path, "train/kept/trial")
    put_game(tmp_path, "train/pick_and_place_with_movable_recep-Apple/trial")
    put_game(tmp_path, "train/pick_two_obj_and_place-AppleSliced/trial")
    put_game(tmp_path, "train/unsolved/trial", solvable=False)
    put_game(tmp_path, "train/unknown/trial", solvable=None)
    put_game(tmp_path, "train/other/trial", task_type="pick_three_obj_and_place")
    (tmp_path / "train/no_game").mkdir()
    (tmp_path / "train/no_game" / TASK_FILE).write_text("{}")
    assert [game.id for game in panel(tmp_path, "train")] == ["alfworld/train/kept/trial"]


@pytest.mark.parametrize(("split", "size"), [("valid_seen", 140), ("valid_unseen", 134)])
def test_alfworlds_own_evaluation_panels_are_complete_or_refused(split, size, tmp_path):
    for name, count in (("whole", size), ("part", size - 1)):
        for i in range(count):
            put_game(tmp_path / name / "json_2.1.1", f"{split}/task/trial_{i}")
    games = panel(data_folder(str(tmp_path / "whole")), split)
    assert len(games) == size
    assert all(game.id.startswith(f"alfworld/{split}/") for game in games)
    assert not alfworld_panel.digest(games).startswith("generated")
    with pytest.raises(ValueError, match=f"expected the {size} games .* got {size - 1}"):
        panel(data_folder(str(tmp_path / "part")), split)


def test_generated_games_say_so(tmp_path):
    put_game(tmp_path, "valid_seen/task/trial", generated={"seed": 0})
    (game,) = panel(tmp_path, "valid_seen")
    assert game.generated
    assert game.id == "alfworld-generated/valid_seen/task/trial"
    assert alfworld_panel.digest((game,)).startswith("generated-")


def test_data_comes_from_the_argument_or_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ValueError, match=r"`data`.*ALFWORLD_DATA"):
        data_folder("")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "downloaded"))
    with pytest.raises(ValueError, match="downloaded"):
        data_folder("")
    (tmp_path / "downloaded" / "json_2.1.1" / "valid_seen").mkdir(parents=True)
    assert data_folder("") == (tmp_path / "downloaded" / "json_2.1.1").resolve()
    (tmp_path / "own" / "train").mkdir(parents=True)
    assert data_folder(str(tmp_path / "own")) == (tmp_path / "own").resolve()
    assert panel(tmp_path / "own", "valid_seen") == ()
    with pytest.raises(ValueError, match="train, valid_seen, valid_unseen; got 'test'"):
        panel(tmp_path / "own", "test")


@pytest.mark.parametrize("broken", [GAME_FILE, TASK_FILE])
def test_a_game_that_cannot_be_read_is_named(broken, tmp_path):
    put_game(tmp_path, "train/broken_game/trial")
    (tmp_path / "train/broken_game/trial" / broken).write_text('{"task')
    with pytest.raises(ValueError, match=r"broken_game.*JSONDecodeError"):
        panel(tmp_path, "train")
    (tmp_path / "train/broken_game/trial" / broken).write_text("[]")
    with pytest.raises(ValueError, match="broken_game"):
        panel(tmp_path, "train")


# What stays out until it is used


def test_the_packages_are_imported_when_an_engine_is_made_and_not_before():
    modules = [path.stem for path in (ROOT / "opd_jax/envs/alfworld").glob("[a-z]*.py")]
    assert len(modules) == 6
    lines = [f"import opd_jax.envs.alfworld.{name}" for name in modules]
    lines.append("import sys; print({n.partition('.')[0] for n in sys.modules})")
    loaded = run_python("\n".join(lines))
    for name in ("alfworld", "textworld", "fast_downward", "jericho", "jax"):
        assert f"'{name}'" not in loaded


@pytest.mark.parametrize("missing", ["fast_downward", "textworld", "alfworld"])
def test_a_missing_package_is_one_line_that_names_the_extra(missing, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # as Python marks what cannot be imported
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"pip install -e '\.\[alfworld\]' in the") as error:
        make_env(tmp_path)
    assert "\n" not in str(error.value)


@needs_engine
def test_importing_leaves_home_and_environment_alone(tmp_path):
    code = (
        "import os; os.environ.pop('ALFWORLD_DATA', None); "
        "from opd_jax.envs.alfworld.engine import Engine; Engine(); "
        "print(os.environ.get('ALFWORLD_DATA'), os.listdir(os.environ['HOME']))"
    )
    assert run_python(code, HOME=str(tmp_path)) == "None []"


# The generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Generated games, one of each type in each split."""
    folder = tmp_path_factory.mktemp("games")
    alfworld_games.main([f"--out={folder}", f"--games={GAMES}", "--seed=0"])
    return folder


def rooms(split, count=60):
    return [alfworld_games.draw_room(split, index, seed=1) for index in range(count)]


@needs_engine
def test_unseen_rooms_are_never_trained_on():
    scenes = {split: {room.scene.number for room in rooms(split)} for split in SPLITS}
    assert scenes["valid_unseen"].isdisjoint(scenes["train"] | scenes["valid_seen"])
    constants = alfworld_module("alfworld.gen.constants")
    assert scenes["train"] | scenes["valid_seen"] <= set(constants.TRAIN_SCENE_NUMBERS)
    assert scenes["valid_unseen"] <= set(constants.TEST_SCENE_NUMBERS)
    assert len(scenes["train"]) > 20


@needs_engine
@pytest.mark.parametrize("split", ["train", "valid_unseen"])
def test_rooms_are_balanced_and_make_sense(split):
    drawn = rooms(split)
    assert Counter(room.goal.type for room in drawn) == dict.fromkeys(TASK_TYPES, 10)
    constants = alfworld_module("alfworld.gen.constants")
    for room in drawn:
        goal, wanted = room.goal, [t for t in room.things if t.kind == room.goal.object]
        assert len(wanted) >= (2 if goal.type == TWO else 1)
        if goal.type in (SIMPLE, TWO):
            assert goal.target not in {thing.place.kind for thing in wanted}
        if goal.type == LOOK:
            assert sum(thing.kind == goal.lamp for thing in room.things) == 1
        else:
            assert goal.object in constants.VAL_RECEPTACLE_OBJECTS[goal.target]
            assert room.scene.of_kind(goal.target)
        for thing in room.things:
            assert thing.place in room.scene.receptacles
            fits = constants.VAL_RECEPTACLE_OBJECTS[thing.place.kind]
            assert thing.kind in fits or "toggleable" in thing.abilities
        ids = [entity.id for entity in (*room.scene.receptacles, *room.things)]
        assert len(set(ids)) == len(ids)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*-*")}


@needs_engine
def test_games_depend_on_the_seed_and_on_nothing_else(folder, tmp_path):
    code = "import sys; from opd_jax.envs.alfworld.games import main; main(sys.argv[1:])"
    flags = [f"--out={tmp_path / 'again'}", f"--games={GAMES}"]
    printed = run_python(code, *flags, "--seed=0", PYTHONHASHSEED="7")
    assert len(files_of(folder)) == GAMES * len(SPLITS)
    assert files_of(tmp_path / "again") == files_of(folder)
    digests = [alfworld_panel.digest(panel(folder, split)) for split in SPLITS]
    assert re.findall(r"generated-[0-9a-f]{64}", printed) == digests
    assert digests[0] == PANEL
    run_python(code, f"--out={tmp_path / 'other'}", f"--games={GAMES}", "--seed=1")
    assert not files_of(folder).keys() & files_of(tmp_path / "other").keys()


@needs_engine
@pytest.mark.parametrize("flags", [("--games=0", "new"), ("--games=2", "full")])
def test_the_generator_refuses_what_it_cannot_do(flags, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit):
        alfworld_games.main([flags[0], f"--out={tmp_path / flags[1]}", "--seed=0"])
    assert "expected" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@needs_engine
@pytest.mark.parametrize("index", range(GAMES))
def test_every_game_can_be_won_as_its_walkthrough_says(index, folder):
    """Which shows, too, that things are called what `names` says."""
    env = make_env(folder)
    observation = env.reset("train", index)
    (game,) = [game for game in env.games("train") if game.id == env.task.id]
    commands = json.loads(game.path.read_text())["walkthrough"]
    for command in commands:
        assert not observation.done
        assert command in observation.admissible
        observation = env.step(answer(command))
        assert not observation.failure
    assert observation.success
    assert observation.score == 1.0


# The adapter


def smallest(folder, split):
    """Index of the game that takes least time to start."""
    games = panel(folder.resolve(), split)
    return min(range(len(games)), key=lambda index: games[index].path.stat().st_size)


@pytest.fixture(scope="module")
def env(folder):
    return make_env(folder, show_admissible=5)


def plain_engine():
    """TextWorld's environment and alfworld's names, with nothing of ours around them."""
    textworld = alfworld_module("textworld")
    wrapper = alfworld_module("alfworld.agents.environment.alfred_tw_env").AlfredDemangler
    infos = textworld.EnvInfos(admissible_commands=True, won=True)
    return wrapper(alfworld_module("textworld.envs").PddlEnv(infos))


@needs_engine
@pytest.mark.parametrize("split", ["train", "valid_unseen"])
def test_the_engine_says_what_textworld_says(split, folder):
    """What is kept between steps and resets changes nothing."""
    path = panel(folder.resolve(), split)[smallest(folder, split)].path
    ours, plain = Engine(), plain_engine()
    plain.load(str(path))
    reply, state = ours.start(path), plain.reset()
    rng = random.Random(split)
    for turn in range(16):
        expected = (state["feedback"].strip(), tuple(state["admissible_commands"]), state["won"])
        assert tuple(reply) == expected
        command = rng.choice(reply.admissible) if turn % 4 else "go to moon 1"
        reply, (state, _, _) = ours.act(command), plain.step(command)


def playthrough(env, index, turns):
    """Every message of an episode with a random player."""
    observation = env.reset("valid_seen", index)
    player, messages = Random(random.Random(index)), [observation.message]
    while not observation.done and len(messages) <= turns:
        observation = env.step(player.respond(observation))
        messages.append(observation.message)
    return hashlib.sha256("\n".join(messages).encode()).hexdigest()


@needs_engine
def test_an_episode_is_a_pure_function_of_its_task_and_its_responses(env, folder):
    expected = [playthrough(env, index, 12) for index in (0, 1)]
    assert playthrough(env, 0, 12) == expected[0]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_alfworld as t; "
        "env = t.make_env(sys.argv[2], show_admissible=5); "
        "print([t.playthrough(env, index, 12) for index in (0, 1)])"
    )
    assert run_python(code, ROOT / "tests", folder, PYTHONHASHSEED="11") == str(expected)


@needs_engine
def test_environments_in_threads_do_not_disturb_each_other(folder):
    envs = [make_env(folder, show_admissible=5) for _ in range(2)]
    expected = [playthrough(env, index, 6) for index, env in enumerate(envs)]
    results = {}

    def play(index):
        results[index] = playthrough(envs[index], index, 6)

    threads = [threading.Thread(target=play, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[0], results[1]] == expected


@needs_engine
def test_messages_hold_task_observation_and_the_first_admissible_commands(env):
    first = env.reset("valid_unseen", 0)
    task = env.task
    assert task.id.startswith("alfworld-generated/valid_unseen/")
    assert task.type in TASK_TYPES
    assert task.scene == first.text
    assert task.scene.startswith("You are in the middle of a room.")
    game = json.loads(env.games("valid_unseen")[0].path.read_text())
    assert f"Your task is to: {task.goal}" in game["grammar"]
    player = Random(random.Random(0))
    observation = first
    for _ in range(6):
        shown, more = ", ".join(observation.admissible[:5]), len(observation.admissible) - 5
        assert observation.message == (
            f"Task: {task.goal}\nObservation: {observation.text}\n"
            f"Admissible actions: {shown} (+{more} more)"
        )
        observation = env.step(player.respond(observation))


@needs_engine
def test_messages_without_and_with_all_admissible_commands(folder):
    for shown in (0, 999):
        env = make_env(folder, show_admissible=shown)
        observation = env.reset("valid_seen", 0)
        for command in observation.admissible:
            assert (command in observation.message) == bool(shown)
        assert "more)" not in observation.message


def test_admissible_commands_come_most_specific_first():
    commands = ["close safe 1", "examine safe 1", "go to bed 1", "go to sofa 1", "help",
                "inventory", "look", "move pen 1 to safe 1", "use lamp 1"]  # fmt: skip
    assert alfworld.most_specific_first(commands) == (
        "close safe 1", "move pen 1 to safe 1", "use lamp 1", "go to bed 1", "go to sofa 1",
        "examine safe 1", "look", "inventory", "help",
    )  # fmt: skip


@needs_engine
def test_the_table_of_failures_is_the_engines(folder):
    """Admissible commands never fail, and all others do, with a text of the table."""
    rng, env = random.Random(5), make_env(folder, max_turns=999)
    observation = env.reset("train", 1)
    names = re.findall(r"[a-z]+ \d+", observation.text)
    failures = Counter()
    for _ in range(12):
        admissible = observation.admissible
        wrong = [
            "dance",
            "go",
            "go to",
            "go to moon 1",
            "take",
            "open sesame",
            "help me",
            "x" * 999,
        ]
        place, other = rng.sample(names, 2)
        wrong += [f"go to {place}", f"open {place}", f"take {place} from {other}", f"use {place}"]
        for command in set(wrong) - set(admissible):
            observation = env.step(answer(command))
            failures[observation.failure] += 1
            assert observation.text in alfworld.FAILURES
            assert observation.failure == alfworld.FAILURES[observation.text]
            assert observation.admissible == admissible
        for response, failure in (("", "empty"), ("I go.\nThought: on.", "no_action")):
            before, observation = observation, env.step(response)
            assert (observation.failure, observation.action) == (failure, "")
            assert observation.text == NOTHING
            assert observation.admissible == before.admissible
        command = rng.choice(admissible)
        observation = env.step(answer(command))
        assert not observation.failure
        assert observation.action == command
        assert observation.text not in alfworld.FAILURES
    assert failures.keys() == set(alfworld.FAILURES.values())


def as_version(version, game, folder):
    """The game alone in a folder, as versions since 0.4 have it ("new") or those before ("old")."""
    target = folder / "train/task/trial"
    target.mkdir(parents=True)
    (target / TASK_FILE).write_text((game.path.parent / TASK_FILE).read_text())
    content = json.loads(game.path.read_text())
    if version == "old":
        for new, old in (
            ('"move {o} to {r}"', '"put {o} in/on {r}"'),
            ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        ):
            assert new in content["grammar"]
            content["grammar"] = content["grammar"].replace(new, old)
    (target / GAME_FILE).write_text(json.dumps(content))
    return folder


def carry(env):
    """Plays until something is in hand at a place that it fits; the two names."""
    observation, turn = env.reset("train", 0), 0
    while True:
        commands = {c.partition(" ")[0]: c for c in observation.admissible}
        if placing := commands.get("move") or commands.get("put"):
            return re.findall(r"[a-z]+ \d+", placing)
        going = [c for c in observation.admissible if c.startswith("go to ")]
        observation = env.step(answer(commands.get("take") or going[turn % len(going)]))
        turn += 1


@needs_engine
@pytest.mark.parametrize("version", ["new", "old"])
def test_move_and_put_are_both_understood(version, folder, tmp_path):
    (game,) = [game for game in panel(folder.resolve(), "train") if game.type == LOOK]
    env = make_env(as_version(version, game, tmp_path), max_turns=99)
    thing, place = carry(env)
    command, text = {
        "new": (f"move {thing} to {place}", f"You move the {thing} to the {place}."),
        "old": (f"put {thing} in/on {place}", f"You put the {thing} in/on the {place}."),
    }[version]
    for words in ("move {} to {}", "put {} in/on {}", "put {} in {}", "put {} on {}",
                  "  Put {}  in/on {} ."):  # fmt: skip
        observation = env.step(answer(words.format(thing, place)))
        assert (observation.action, observation.text) == (command, text)
        assert not observation.failure
        env.step(answer(f"take {thing} from {place}"))


@needs_engine
def test_episodes_end_at_the_turn_limit(folder):
    env, index, argv = make_env(folder, max_turns=2), smallest(folder, "train"), list(sys.argv)
    with pytest.raises(ValueError, match="reset"):
        env.step(answer("look"))
    env.reset("train", index)
    assert sys.argv == argv  # which the translator of problems replaces
    assert not env.step("").done
    last = env.step(answer("look"))
    assert (last.end, last.success, last.score) == ("turn_limit", False, 0.0)
    with pytest.raises(ValueError, match="reset"):
        env.step(answer("look"))
    assert not env.reset("train", index).done


@needs_engine
def test_wrong_arguments_are_named(folder, tmp_path):
    env = make_env(folder)
    assert [env.size(split) for split in SPLITS] == [GAMES] * 3
    assert env.digest("train") == alfworld_panel.digest(env.games("train"))
    for index in (-1, GAMES):
        with pytest.raises(ValueError, match=f"`index` must be from 0 to {GAMES - 1}"):
            env.reset("train", index)
    with pytest.raises(ValueError, match="`split`"):
        env.size("test")
    with pytest.raises(ValueError, match="`max_turns`"):
        make_env(folder, max_turns=0)
    with pytest.raises(ValueError, match="`show_admissible`"):
        make_env(folder, show_admissible=-1)
    with pytest.raises(ValueError, match="`data`"):
        make_env(tmp_path)


def test_an_introduction_without_task_is_refused():
    welcome = "-= Welcome =-\n\nYou are in a room and you see a bed 1.\n\n"
    scene, goal = alfworld.parse_intro(welcome + "Your task is to: sleep.")
    assert (scene, goal) == ("You are in a room and you see a bed 1.", "sleep.")
    with pytest.raises(ValueError, match="introduction"):
        alfworld.parse_intro(welcome)


@needs_engine
def test_the_demonstration_of_the_prompt_is_what_the_engine_says(tmp_path):
    places = {
        kind: Receptacle(f"{kind}|1", kind, f"loc|{kind}", kind in ("Cabinet", "Fridge"))
        for kind in ("Cabinet", "CounterTop", "Fridge", "SideTable")
    }
    things = [
        Thing(f"{kind}|1", kind, places[place], ("pickupable", "coolable"))
        for kind, place in (("Bread", "CounterTop"), ("Knife", "CounterTop"),
                            ("Egg", "Fridge"), ("Tomato", "Fridge"))
    ]  # fmt: skip
    goal = Goal("pick_cool_then_place_in_recep", "Tomato", "SideTable", "")
    text = problem(goal, list(places.values()), things, fits=[("SideTable", "Tomato")])
    (words,) = [w for w in goal.instructions() if f"{w}." == alfworld.EXAMPLE_TASK]
    write_game(tmp_path / "train/a/b", goal, words, text, walkthrough=None, source={"test": True})
    env = make_env(tmp_path)
    observation = env.reset("train", 0)
    assert (env.task.goal, env.task.scene) == (alfworld.EXAMPLE_TASK, alfworld.EXAMPLE_SCENE)
    assert observation.message in env.system
    for thought, command, expected in alfworld.EXAMPLE_TURNS:
        response = RESPONSE % (thought, command)
        assert response in env.system
        assert parse_response(response) == (command, "")
        observation = env.step(response)
        assert observation.text == expected
        assert expected in env.system
    assert observation.success


@needs_engine
def test_names_count_down_in_order_of_id():
    shelf = Receptacle("Shelf|-00.10|+01.00|+00.00", "Shelf", "loc|1", False)
    basin = Receptacle("Sink|+00.10|+01.00|+00.00|SinkBasin", "SinkBasin", "loc|2", False)
    things = [Thing(f"Cup|{x}", "Cup", shelf, ()) for x in ("+00.50", "-00.50", "+00.40")]
    shown = names([shelf, basin], things)
    assert [shown[thing.id] for thing in things] == ["cup 1", "cup 3", "cup 2"]
    assert (shown[shelf.id], shown[basin.id]) == ("shelf 1", "sinkbasin 1")


# The players


def play(env, split, index, seed, strays=0.0):
    """Observations and the expert's responses; with chance `strays` somebody else acts."""
    observation = env.reset(split, index)
    rng, chance = random.Random(seed), random.Random(seed)
    player, other = Expert(env.task, observation, rng=rng), Random(chance)
    observations, responses = [observation], []
    while not observation.done:
        responses.append(player.respond(observation))
        stray = len(responses) < 15 and chance.random() < strays
        observation = env.step(other.respond(observation) if stray else responses[-1])
        observations.append(observation)
    return observations, responses


@needs_engine
@pytest.mark.parametrize("index", range(GAMES))
def test_the_expert_wins_and_its_thoughts_come_in_two_lines(index, folder):
    env = make_env(folder)
    before = random.getstate()
    observations, responses = play(env, "valid_seen", index, seed=0)
    assert observations[-1].success
    assert random.getstate() == before
    holding = ""
    for seen, response in zip(observations, responses, strict=False):
        if match := re.match(r"You pick up the (\w+ \d+)", seen.text):
            holding = match[1]
        if seen.text.startswith("You move "):
            holding = ""
        assert re.fullmatch(r"Thought: \S.*\nAction: \S.*", response)
        command, failure = parse_response(response)
        assert not failure
        assert command in seen.admissible
        assert ("I have" in response) == bool(holding)
        assert not holding or f"I have {holding}." in response


@needs_engine
def test_the_expert_draws_from_its_own_generator_only(folder):
    env, index = make_env(folder), smallest(folder, "valid_unseen")
    random.seed(1)
    first = play(env, "valid_unseen", index, seed=3)
    random.seed(2)
    assert play(env, "valid_unseen", index, seed=3) == first


@needs_engine
def test_the_expert_goes_on_from_what_others_do(folder):
    env = make_env(folder, max_turns=120)
    index = smallest(folder, "train")
    won = [play(env, "train", index, seed=seed, strays=0.3)[0][-1].success for seed in range(6)]
    assert sum(won) >= 5


@needs_engine
def test_the_expert_plays_games_of_older_versions(folder, tmp_path):
    (game,) = [game for game in panel(folder.resolve(), "valid_seen") if game.type == TWO]
    for version in ("new", "old"):
        env = make_env(as_version(version, game, tmp_path / version))
        observations, _ = play(env, "train", 0, seed=0)
        assert observations[-1].success
        placed = [observation.text.split()[1] for observation in observations].count("put")
        assert placed == (2 if version == "old" else 0)


@needs_engine
@pytest.mark.slow
def test_the_expert_wins_95_of_100_games_within_30_turns(tmp_path):
    for index in range(100):
        alfworld_games.write(tmp_path, "valid_seen", index, seed=7)
    env = make_env(tmp_path, max_turns=30)
    won = [play(env, "valid_seen", index, seed=index)[0][-1].success for index in range(100)]
    assert sum(won) >= 95


@needs_engine
def test_what_the_expert_reads_of_a_task_is_what_was_asked(folder):
    for game in panel(folder.resolve(), "train"):
        grammar = json.loads(game.path.read_text())["grammar"]
        goal = re.search(r"Your task is to: (.*?\.)", grammar)[1]
        asked = json.loads((game.path.parent / TASK_FILE).read_text())["pddl_params"]
        read = parameters(Task(game.id, game.type, goal, ""))
        assert read.pop("task_type") == game.type
        assert read == {k: v.lower() if isinstance(v, str) else v for k, v in asked.items()}
    with pytest.raises(ValueError, match="wordings"):
        parameters(Task("alfworld/a", SIMPLE, "tidy up.", ""))
