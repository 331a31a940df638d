"""ALFWorld: panels of games, the generator, the environment on the real engine, the expert."""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from processes import run_python
from test_alfworld_record import assert_said

from opd_jax.envs.alfworld import env as alfworld
from opd_jax.envs.alfworld import games as alfworld_games
from opd_jax.envs.alfworld import panel as alfworld_panel
from opd_jax.envs.alfworld.engine import Engine, alfworld_module
from opd_jax.envs.alfworld.env import AlfWorld
from opd_jax.envs.alfworld.expert import Expert, parameters
from opd_jax.envs.alfworld.panel import (
    GAME_FILE,
    SPLITS,
    TASK_FILE,
    TASK_TYPES,
    data_folder,
    game,
    listed,
    panel,
)
from opd_jax.envs.alfworld.problem import Goal, Receptacle, Thing, problem, write_game
from opd_jax.envs.base import Task
from opd_jax.envs.household.tables import LOOK, SIMPLE, TWO
from opd_jax.envs.household.world import NOTHING
from opd_jax.envs.react import RESPONSE, Random, parse_response

HAVE_ENGINE = all(map(find_spec, ("alfworld", "fast_downward")))
needs_engine = pytest.mark.skipif(not HAVE_ENGINE, reason="needs the extra alfworld")
GAMES = 6  # of each split: one of each type
# Games of seed 0 with alfworld 0.4.2. If it changes, all games have changed: raise `VERSION`.
PANEL = "generated-ee0d82ea2ead35152a34c4562c5ac0e9eb7af664c2a397e23dbbd2644f7e6481"


def answer(command):
    return f"Thought: so.\nAction: {command}"


def make_env(folder, max_turns=60, show_admissible=0):
    return AlfWorld(data=str(folder), max_turns=max_turns, show_admissible=show_admissible)


# The panel of games


def put_game(folder, place, task_type=SIMPLE, **game):
    """Write files that count as a game; nobody can play it."""
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
    hashes = [hashlib.sha256(game.id.encode()).hexdigest() for game in one]
    assert hashes == sorted(hashes)
    assert alfworld_panel.digest(one) == alfworld_panel.digest(other)


def test_the_digest_covers_ids_types_and_the_content_of_game_files(tmp_path):
    for place, content in (("train/a/trial", "here"), ("train/b/trial", "there")):
        put_game(tmp_path, place, pddl_problem=content)
    games = panel(tmp_path, "train")
    lines = [
        f"{game.id} {SIMPLE} {hashlib.sha256(game.path.read_bytes()).hexdigest()}\n"
        for game in games
    ]
    for count in (1, 2):
        text = "".join(lines[:count])
        expected = hashlib.sha256(text.encode()).hexdigest()
        assert alfworld_panel.digest(games[:count]) == expected


def test_games_that_alfworld_leaves_out_are_left_out(tmp_path):
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


def test_no_game_of_dev_is_trained_on(tmp_path):
    for name in ("train/a/trial_0", "valid_train/a/trial_0", "valid_train/a/trial_1"):
        put_game(tmp_path, name)
    assert [game.id for game in panel(tmp_path, "valid_train")] == [
        "alfworld/valid_train/a/trial_1"
    ]


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
    splits = "train, valid_seen, valid_unseen, valid_train"
    with pytest.raises(ValueError, match=f"{splits}; got 'test'"):
        panel(tmp_path / "own", "test")


@pytest.mark.parametrize("broken", [GAME_FILE, TASK_FILE])
def test_a_game_that_cannot_be_read_is_named(broken, tmp_path):
    put_game(tmp_path, "train/broken_game/trial")
    for text, message in (('{"task', r"broken_game.*JSONDecodeError"), ("[]", "broken_game")):
        (tmp_path / "train/broken_game/trial" / broken).write_text(text)
        with pytest.raises(ValueError, match=message):
            panel(tmp_path, "train")


def test_the_list_of_games_is_read_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = tmp_path / "data"
    for n in range(5):
        put_game(data, f"train/task/trial_{n}", generated={} if n % 2 else {"seed": n})
    read_again = panel.__wrapped__  # as another process would
    games = panel(data, "train")
    file, times = games[0].path, games[0].path.stat()
    content = file.read_text()
    file.write_text("x" * len(content))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_again(data, "train") == games  # nobody opened the file

    os.utime(file)
    with pytest.raises(ValueError, match="cannot read"):
        read_again(data, "train")
    file.write_text(content)
    put_game(data, "train/task/trial_9")
    assert len(read_again(data, "train")) == 6
    (data / "train/task/trial_9" / GAME_FILE).unlink()
    assert read_again(data, "train") == games


def test_a_worker_looks_at_the_games_that_it_plays_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = tmp_path / "data"
    for n in range(5):
        put_game(data, f"train/task/trial_{n}")
    games = panel(data, "train")
    panel.cache_clear()  # as in another process
    listed.cache_clear()
    content = games[1].path.read_text()
    games[1].path.write_text("{")  # whoever reads all games fails
    assert [game(data, "train", n) for n in (0, 2, 4)] == [games[n] for n in (0, 2, 4)]
    for index in (1, 5, -1):
        with pytest.raises(ValueError, match="cannot read"):
            game(data, "train", index)
    games[1].path.write_text(content)
    assert game(data, "train", 1) == games[1]
    for index in (5, -1):
        with pytest.raises(ValueError, match=rf"`index` must be from 0 to 4 .*got {index}"):
            game(data, "train", index)
    # A game that has changed is read again, also if it no longer counts.
    panel.cache_clear()
    games[1].path.write_text(json.dumps({"solvable": False}))
    assert game(data, "train", 1) == games[2]


def test_a_list_that_is_damaged_or_cannot_be_left_is_no_loss(tmp_path, monkeypatch):
    put_game(tmp_path / "data", "train/task/trial")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    games = panel(tmp_path / "data", "train")
    (stored,) = tmp_path.glob("opd_jax-*/*.json")
    for text in ("", "[]", "{}", '{"state": 1, "games": 2}'):
        stored.write_text(text)
        assert game(tmp_path / "data", "train", 0) == games[0]
        assert panel.__wrapped__(tmp_path / "data", "train") == games
        listed.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(stored))  # no folder
    assert panel.__wrapped__(tmp_path / "data", "train") == games


# The optional packages


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
def test_importing_alfworld_leaves_home_and_environment_alone(tmp_path):
    code = (
        "import os; os.environ.pop('ALFWORLD_DATA', None); "
        "from opd_jax.envs.alfworld.engine import Engine; Engine(); "
        "print(os.environ.get('ALFWORLD_DATA'), os.listdir(os.environ['HOME']))"
    )
    assert run_python(code, HOME=str(tmp_path)) == "None []"


# The generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Generated games, one of each type in each split, where there is an engine."""
    if not HAVE_ENGINE:
        pytest.skip("needs the extra alfworld")
    folder = tmp_path_factory.mktemp("games")
    alfworld_games.main([f"--out={folder}", f"--games={GAMES}", "--seed=0"])
    return folder


@needs_engine
def test_rooms_are_balanced_make_sense_and_those_of_valid_unseen_are_never_trained_on():
    constants = alfworld_module("alfworld.gen.constants")
    scenes = {}
    for split in SPLITS:
        drawn = [alfworld_games.draw_room(split, index, seed=1) for index in range(60)]
        assert Counter(room.goal.type for room in drawn) == dict.fromkeys(TASK_TYPES, 10)
        for room in drawn:
            check_room(room, constants.VAL_RECEPTACLE_OBJECTS)
        scenes[split] = {room.scene.number for room in drawn}
    assert scenes["train"] | scenes["valid_seen"] | scenes["valid_train"] <= set(
        constants.TRAIN_SCENE_NUMBERS
    )
    assert scenes["valid_unseen"] <= set(constants.TEST_SCENE_NUMBERS)
    assert not set(constants.TRAIN_SCENE_NUMBERS) & set(constants.TEST_SCENE_NUMBERS)
    assert len(scenes["train"]) > 20


def check_room(room, fits):
    goal, wanted = room.goal, [t for t in room.things if t.kind == room.goal.object]
    assert len(wanted) >= (2 if goal.type == TWO else 1)
    if goal.type in (SIMPLE, TWO):
        assert goal.target not in {thing.place.kind for thing in wanted}
    if goal.type == LOOK:
        assert sum(thing.kind == goal.lamp for thing in room.things) == 1
    else:
        assert goal.object in fits[goal.target]
        assert room.scene.of_kind(goal.target)
    for thing in room.things:
        assert thing.place in room.scene.receptacles
        assert thing.kind in fits[thing.place.kind] or "toggleable" in thing.abilities
    ids = [entity.id for entity in (*room.scene.receptacles, *room.things)]
    assert len(set(ids)) == len(ids)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*-*")}


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
def test_games_are_written_into_no_folder_that_nobody_means(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for out in ("gs://bucket/games", "~no-such-user/games", "file/games"):
        with pytest.raises(SystemExit) as stopped:
            alfworld_games.main([f"--out={out}", "--games=1", "--seed=0"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("index", range(GAMES))
def test_every_game_can_be_won_as_its_walkthrough_says(index, folder):
    """This also shows that things have the names that `names` gives them."""
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


# The environment


def smallest(folder, split):
    """Index of the game that starts soonest."""
    games = panel(folder.resolve(), split)
    return min(range(len(games)), key=lambda index: games[index].path.stat().st_size)


@pytest.fixture(scope="module")
def env(folder):
    return make_env(folder, show_admissible=5)


def plain_engine():
    """TextWorld's environment with alfworld's names, and nothing of ours."""
    textworld = alfworld_module("textworld")
    wrapper = alfworld_module("alfworld.agents.environment.alfred_tw_env").AlfredDemangler
    infos = textworld.EnvInfos(admissible_commands=True, won=True)
    return wrapper(alfworld_module("textworld.envs").PddlEnv(infos))


def test_the_engine_says_what_textworld_says(folder):
    """The results kept between steps and resets change nothing."""
    path = panel(folder.resolve(), "valid_unseen")[smallest(folder, "valid_unseen")].path
    ours, plain = Engine(), plain_engine()
    plain.load(str(path))
    reply, state = ours.start(path), plain.reset()
    rng = random.Random(0)
    for turn in range(20):
        expected = (state["feedback"].strip(), tuple(state["admissible_commands"]), state["won"])
        assert tuple(reply) == expected
        command = rng.choice(reply.admissible) if turn % 4 else "go to moon 1"
        reply, (state, _, _) = ours.act(command), plain.step(command)


def playthrough(env, index):
    """SHA-256 of the first messages of an episode with a random player."""
    observation = env.reset("valid_seen", index)
    player, messages = Random(random.Random(index)), [observation.message]
    while not observation.done and len(messages) < 9:
        observation = env.step(player.respond(observation))
        messages.append(observation.message)
    return hashlib.sha256("\n".join(messages).encode()).hexdigest()


def test_an_episode_is_the_same_again_in_threads_and_in_another_process(env, folder):
    index = smallest(folder, "valid_seen")
    expected = playthrough(env, index)
    envs = [env, make_env(folder, show_admissible=5)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(playthrough, envs, (index, index))) == [expected] * 2
    code = (
        "import sys, test_alfworld as t; env = t.make_env(sys.argv[1], show_admissible=5); "
        "print(t.playthrough(env, int(sys.argv[2])))"
    )
    assert run_python(code, folder, index, PYTHONHASHSEED="11") == expected


def test_messages_hold_task_observation_and_the_first_admissible_commands(env, folder):
    index = smallest(folder, "valid_unseen")
    first = env.reset("valid_unseen", index)
    task = env.task
    assert task.id.startswith("alfworld-generated/valid_unseen/")
    assert task.type in TASK_TYPES
    assert task.scene == first.text
    assert task.scene.startswith("You are in the middle of a room.")
    game = json.loads(env.games("valid_unseen")[index].path.read_text())
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
    unlisted = make_env(folder).reset("valid_unseen", index)
    assert unlisted.message == first.message.partition("\nAdmissible")[0]


def test_admissible_commands_come_most_specific_first():
    commands = ["close safe 1", "examine safe 1", "go to bed 1", "go to sofa 1", "help",
                "inventory", "look", "move pen 1 to safe 1", "use lamp 1"]  # fmt: skip
    assert alfworld.most_specific_first(commands) == (
        "close safe 1", "move pen 1 to safe 1", "use lamp 1", "go to bed 1", "go to sofa 1",
        "examine safe 1", "look", "inventory", "help",
    )  # fmt: skip


def test_the_table_of_failures_is_the_engines(folder):
    """Admissible commands never fail. All others do, with a text of the table."""
    rng, env = random.Random(5), make_env(folder, max_turns=999)
    observation = env.reset("train", smallest(folder, "train"))
    names = re.findall(r"[a-z]+ \d+", observation.text)
    failures = Counter()
    for _ in range(6):
        admissible = observation.admissible
        wrong = ["dance", "go to", "go to moon 1", "take", "open sesame", "help me", "x" * 999]
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


def test_move_and_put_are_both_understood():
    for command in ("move pen 1 to desk 2", "put pen 1 in/on desk 2"):  # since version 0.4; before
        for written in ("move pen 1 to desk 2", "put pen 1 in/on desk 2", "put pen 1 in desk 2",
                        "put pen 1 on desk 2", "  Put Pen 1  in/on desk 2 ."):  # fmt: skip
            assert alfworld.canonical(written, ["look", command]) == command
    assert alfworld.canonical(" Put pen 1 in  safe 1.", [command]) == "put pen 1 in safe 1"


def test_the_record_is_what_the_engine_says_again(folder):
    """Only the agent changes a room, so all that was told of it still holds at the end."""
    env = make_env(folder, max_turns=200)
    games = {game.type: (index, game) for index, game in enumerate(env.games("train"))}
    for kind, change in ((TWO, ": moved to "), ("pick_clean_then_place_in_recep", ": clean")):
        index, game = games[kind]
        texts = [env.reset("train", index).text]
        assert not any(env.record().values())
        commands = json.loads(game.path.read_text())["walkthrough"][:-1]
        for command in [*commands[:4], "dance", *commands[4:]]:
            texts.append(env.step(answer(command)).text)
        env.step("I see.")
        kept = env.record()
        assert_said(kept, texts)
        assert "dance: Nothing happens." in kept["tried"]
        assert [line.split(":")[0] for line in kept["tried"] if "dance" not in line] == commands
        carried = env.step(answer("inventory")).text
        assert kept["held"] == re.findall(r"\w+ \d+", carried)
        assert any(change in line for line in kept["changed"])
        for line in kept["seen"]:
            (place, *told), closed = re.findall(r"[a-z]+ \d+", line), ", closed" in line
            seen = env.step(answer(f"go to {place}"))
            text = (env.step(answer(f"examine {place}")) if seen.failure else seen).text
            assert closed == text.endswith(" is closed.")
            if not closed:
                content = re.findall(r"[a-z]+ \d+", text.rpartition(" you see ")[2])
                assert sorted(told) == sorted(content)


def test_episodes_end_at_the_turn_limit(folder):
    env, index, argv = make_env(folder, max_turns=2), smallest(folder, "train"), list(sys.argv)
    env.reset("train", index)
    assert sys.argv == argv  # the translator of problems replaces it
    assert not env.step("").done
    last = env.step(answer("look"))
    assert (last.end, last.success, last.score) == ("turn_limit", False, 0.0)
    with pytest.raises(ValueError, match="reset"):
        env.step(answer("look"))
    assert not env.reset("train", index).done


def test_wrong_arguments_are_named(folder, tmp_path):
    env = make_env(folder)
    assert [env.size(split) for split in SPLITS] == [GAMES] * len(SPLITS)
    assert env.digest("train") == alfworld_panel.digest(env.games("train"))
    for index in (-1, GAMES):
        with pytest.raises(ValueError, match=f"`index` must be from 0 to {GAMES - 1}"):
            env.reset("train", index)
    for call, message in (
        (lambda: env.size("test"), "`split`"),
        (lambda: make_env(folder, max_turns=0), "`max_turns`"),
        (lambda: make_env(folder, show_admissible=-1), "`show_admissible`"),
        (lambda: make_env(tmp_path), "`data`"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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


# The expert


def play(env, split, index, seed, strays=0.0):
    """Observations and the expert's responses; a random player acts with probability `strays`."""
    observation = env.reset(split, index)
    player = Expert(env.task, observation, rng=random.Random(seed))
    chance = random.Random(seed)
    other = Random(chance)
    observations, responses = [observation], []
    while not observation.done:
        responses.append(player.respond(observation))
        stray = len(responses) < 15 and chance.random() < strays
        observation = env.step(other.respond(observation) if stray else responses[-1])
        observations.append(observation)
    return observations, responses


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


def test_the_expert_goes_on_from_what_others_do_and_draws_from_its_own_generator(folder):
    env = make_env(folder, max_turns=120)
    index = smallest(folder, "train")
    random.seed(1)
    plays = [play(env, "train", index, seed=seed, strays=0.3) for seed in range(3)]
    assert all(observations[-1].success for observations, _ in plays)
    random.seed(2)
    assert play(env, "train", index, seed=0, strays=0.3) == plays[0]


def test_the_expert_plays_games_of_older_versions(folder, tmp_path):
    (game,) = [game for game in panel(folder.resolve(), "valid_seen") if game.type == TWO]
    old = tmp_path / "train/task/trial"
    shutil.copytree(game.path.parent, old)
    text = game.path.read_text()
    for new, before in (  # as it stands in JSON
        ('\\"move {o} to {r}\\"', '\\"put {o} in/on {r}\\"'),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
    ):
        assert new in text
        text = text.replace(new, before)
    (old / GAME_FILE).write_text(text)
    observations, _ = play(make_env(tmp_path), "train", 0, seed=0)
    assert observations[-1].success
    assert [observation.text.split()[1] for observation in observations].count("put") == 2


@needs_engine
@pytest.mark.slow
def test_the_expert_wins_95_of_100_games_within_30_turns(tmp_path):
    for index in range(100):
        alfworld_games.write(tmp_path, "valid_seen", index, seed=7)
    env = make_env(tmp_path, max_turns=30)
    won = [play(env, "valid_seen", index, seed=index)[0][-1].success for index in range(100)]
    assert sum(won) >= 95


@needs_engine
def test_an_instruction_in_other_words_is_refused():
    with pytest.raises(ValueError, match="wordings"):
        parameters(Task("alfworld/a", SIMPLE, "tidy up.", ""))
