"""ScienceWorld: tasks and splits, what the engine says, how it is replaced, and the expert."""

import gc
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_scienceworld_record import assert_said

from opd_jax.envs.base import BROKEN, Observation
from opd_jax.envs.react import RESPONSE, Random
from opd_jax.envs.scienceworld import prompts
from opd_jax.envs.scienceworld import tasks as sets
from opd_jax.envs.scienceworld.env import FAILURES, NO_ACTION, ScienceWorld, spread
from opd_jax.envs.scienceworld.jvm import Jvm
from opd_jax.envs.scienceworld.players import Expert, GoldPaths, gold_paths, thought
from opd_jax.runtime.exits import WorldFailed

HAVE_ENGINE = bool(importlib.util.find_spec("scienceworld") and shutil.which("java"))
needs_engine = pytest.mark.skipif(not HAVE_ENGINE, reason="needs scienceworld and java")

SETTINGS = {
    "simplifications": "easy",
    "max_turns": 200,
    "list_admissible": 0,
    "heap_mb": 256,
    "timeout_s": 60.0,
}
DIGESTS = {
    "train": "f862c4893f14a25aad051e9fc9d9901ce7ec502ecfa4d9d39edcafcfbf542bb5",
    "dev": "749bb1f4e7434695cde0dda78fd9b55bf007a8aa42998da66ee22e459cc87800",
    "test": "930c9c7714a47446c47a6c413e029f5a2e4fb63c9b69ef79f21b0a0996a6c042",
    "panel": "f2bd8bf56f672829e393338cde8d4b7bf39fc49559a7a8c7053875e4c47dc9db",
    "dev_panel": "08fdc3c218765871615533f871b96851b37ed2a1b5bc217538988e1e9a2a8e4e",
}


@pytest.fixture(scope="module", autouse=True)
def java_compiles_quickly():
    """Each Java process runs for seconds; optimizing its code would take a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")
        yield


@pytest.fixture(scope="module")
def open_env():
    """Makes environments that are closed after the module, where there is an engine."""
    if not HAVE_ENGINE:
        pytest.skip("needs scienceworld and java")
    made = []

    def make(**settings):
        made.append(ScienceWorld(**{**SETTINGS, **settings}))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def env(open_env):
    return open_env()


@pytest.fixture(scope="module")
def listing_env(open_env):
    return open_env(list_admissible=60)


@pytest.fixture(scope="module")
def plain_env(open_env):
    """Without simplifications; an episode may take as many turns as the demonstration."""
    return open_env(simplifications="", max_turns=len(prompts.DEMONSTRATION))


def start(env, kind, variation):
    for split in ("train", "dev", "test"):
        if (kind, variation) in sets.tasks(split):
            return env.reset(split, sets.tasks(split).index((kind, variation)))
    raise AssertionError((kind, variation))


def act(env, command):
    return env.step(f"Thought: so\nAction: {command}")


def java(env):
    """The Java process behind an environment."""
    return env._engine._jvm


# Tasks


def test_splits_hold_every_variation_once_and_the_panel_five_of_each_type():
    parts = [sets.tasks(split) for split in ("train", "dev", "test")]
    assert [len(part) for part in parts] == [3592, 1796, 1819]
    assert len(set().union(*parts)) == sum(sets.VARIATIONS.values()) == 7207
    panel = sets.tasks("panel")
    assert len(set(panel)) == len(panel) == 150
    assert set(Counter(kind for kind, _ in panel).values()) == {5}
    assert not set(panel) & set(parts[0])
    assert [task for task in panel if task not in parts[2]] == [("identify-life-stages-2", 5)]
    unreported = sets.tasks("dev_panel")
    assert set(unreported) == set(parts[1]) - set(panel)
    assert len(unreported) == len(parts[1]) - 1
    for part in (*parts, panel):  # the first tasks are of all types
        kinds = [kind for kind, _ in part]
        assert kinds[:30] == kinds[30:60] == sorted(sets.TYPES)
    assert {split: sets.digest(split) for split in sets.SPLITS} == DIGESTS


def test_names_of_tasks_can_be_read_back():
    for task in sets.tasks("panel"):
        assert sets.parse_id(sets.task_id(*task)) == task
    for name in ("household/train/1", "scienceworld/boil/30", "scienceworld/bake/1", "boil/1"):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            sets.parse_id(name)


def test_variations_and_their_splits_are_the_engines(env):
    start(env, "boil", 0)
    server = java(env)._server
    assert {kind: server.getTaskMaxVariations(kind) for kind in sets.TYPES} == sets.VARIATIONS
    # The smallest number of variations, and every remainder by 4 that occurs.
    for kind in ("identify-life-stages-2", "chemistry-mix", "lifespan-shortest-lived", "boil"):
        start(env, kind, 0)
        for split, theirs in (
            ("train", server.getVariationsTrain()),
            ("dev", server.getVariationsDev()),
            ("test", server.getVariationsTest()),
        ):
            assert tuple(theirs) == sets.variations(split, kind)


# Errors of the user


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"simplifications": "easy,openWindows"}, "`simplifications`.*'openWindows'"),
        ({"simplifications": "noElectricalAction"}, "`simplifications`.*electricity"),
        ({"max_turns": 0}, "`max_turns`: expected at least 1, got 0"),
        ({"list_admissible": -1}, "`list_admissible`"),
        ({"heap_mb": 1}, "`heap_mb`: expected at least 64"),
        ({"timeout_s": 0.0}, "`timeout_s`"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ScienceWorld(**{**SETTINGS, **change})


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scienceworld", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[scienceworld\]' in the") as caught:
        ScienceWorld(**SETTINGS)
    assert "\n" not in str(caught.value)


@needs_engine
def test_missing_java_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ValueError, match=r"runs on Java.*install a Java runtime") as caught:
        ScienceWorld(**SETTINGS)
    assert "\n" not in str(caught.value)


@needs_engine
def test_java_that_does_not_start_says_why(monkeypatch, tmp_path):
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\necho no room for the heap >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(WorldFailed, match=r"did not start.*no room for the heap"):
        Jvm(heap_mb=256, timeout_s=60)
    first = ScienceWorld(**SETTINGS).reset("train", 0)
    assert first.end == BROKEN
    assert "no room for the heap" in first.text


@needs_engine
def test_java_may_print_warnings_first(monkeypatch, tmp_path):
    shim = tmp_path / "java"
    shim.write_text(
        f'#!/bin/sh\necho a warning\necho 12 warnings\nexec {shutil.which("java")} "$@"\n'
    )
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("JAVA_HOME", raising=False)
    jvm = Jvm(heap_mb=256, timeout_s=60)
    jvm.load("find-plant", 0, "easy")
    jvm.close()


@needs_engine
def test_threads_share_the_process_that_finds_paths():
    paths = GoldPaths(simplifications="easy", heap_mb=256, timeout_s=60)
    names = [sets.task_id("find-plant", n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(paths, names))
    alone = GoldPaths(simplifications="easy", heap_mb=256, timeout_s=60)
    assert found == [alone(name) for name in names]
    for each in (paths, alone):
        each.close()


def test_unknown_tasks_are_named(env):
    with pytest.raises(ValueError, match="'tests': expected one of train, dev, test, panel, dev_"):
        env.size("tests")
    with pytest.raises(ValueError, match=r"`index`: expected 0..149 in split 'panel', got 150"):
        env.reset("panel", 150)


# Episodes


def test_the_demonstration_is_a_real_episode_of_training(plain_env):
    env = plain_env
    assert prompts.DEMONSTRATION_TASK in sets.tasks("train")
    observation = start(env, *prompts.DEMONSTRATION_TASK)
    assert env.task.goal == prompts.DEMONSTRATION_GOAL
    assert observation.message.startswith(prompts.TASK % prompts.DEMONSTRATION_GOAL)
    for text, inventory, thinking, command in prompts.DEMONSTRATION:
        assert observation.text == text
        assert observation.message.endswith(prompts.TURN % (text, inventory))
        assert RESPONSE % (thinking, command) in env.system
        observation = env.step(RESPONSE % (thinking, command))
        assert not observation.failure
    # Reached with the last turn allowed.
    assert (observation.end, observation.score) == ("success", 100.0)
    with pytest.raises(ValueError, match="call `reset` first"):
        act(env, "look around")


def test_an_episode_ends_at_the_turn_limit(plain_env):
    start(plain_env, "boil", 0)
    responses = ["Action: wait1", "", "Action: bake a cake", "Action: look around"] * 3
    ends = [plain_env.step(r).end for r in responses[: len(prompts.DEMONSTRATION)]]
    assert ends == [""] * (len(ends) - 1) + ["turn_limit"]


def test_teleporting_is_offered_where_it_is_possible():
    assert "teleport to X" in prompts.system_message("easy")
    assert "teleport to X" in prompts.system_message("openDoors,teleportAction")
    assert "teleport to X" not in prompts.system_message("openDoors")


def test_an_episode_from_the_first_message_to_a_wrong_focus(env):
    first = start(env, "boil", 0)
    task = env.task
    assert first.message == f"Task: {task.goal}\nObservation: {first.text}\nInventory: an orange"
    assert (task.id, task.type, task.scene) == ("scienceworld/boil/0", "boil", first.text)
    assert task.goal.startswith("boil water.")
    assert not any(line != line.rstrip() for line in first.text.splitlines())
    act(env, "teleport to kitchen")
    after = act(env, "pick up thermometer.")
    assert after.action == "pick up thermometer"
    assert after.message == (
        "Observation: You move the thermometer to the inventory.\nInventory: an orange; a "
        "thermometer, currently reading a temperature of 10 degrees celsius"
    )
    last = act(env, "focus on table")
    assert (last.end, last.score, last.success) == ("failed", -100.0, False)
    assert not last.failure  # the judge says what is wrong with it


def test_a_response_without_a_command_changes_nothing(env):
    start(env, "boil", 0)
    act(env, "go to kitchen")
    asked = act(env, "focus on orange")
    assert asked.text.startswith("Ambiguous request: ")
    assert asked.failure == ""  # the engine asks back
    for response, reason in (
        ("", "empty"),
        (" \n ", "empty"),
        ("Thought: hm", "no_action"),
        ("Action:", "no_action"),
    ):
        after = env.step(response)
        assert (after.failure, after.text, after.action) == (reason, NO_ACTION, "")
        assert after.message.endswith("Inventory: an orange")
    # The engine still waits for the number.
    assert act(env, "0").end == "failed"


def test_the_record_is_what_the_messages_say(env):
    texts = [start(env, "boil", 0).message]
    commands = "go to kitchen; look around; bake cake; open cupboard; look in cupboard;" \
        "move metal pot to sink; activate sink; look in metal pot; pick up thermometer;" \
        "use thermometer on substance in metal pot; focus on orange; look at hallway"  # fmt: skip
    for command in commands.split(";"):
        texts.append(f"{command.strip()}\n{act(env, command).message}")
    texts.append(env.step("").message)
    kept = env.record()
    assert_said(kept, texts)
    places = [line.partition(": ")[0] for line in kept["seen"]]
    assert places == ["hallway", "kitchen", "cupboard in kitchen", "metal pot in kitchen"]
    hallway, kitchen, cupboard, pot = kept["seen"]
    assert hallway.count("door to the ") == texts[0].count("A door to the ") == 6
    assert "the agent" not in kitchen
    assert "; a fridge. The fridge door is closed; " in kitchen
    assert "; a drawer; a metal pot (containing nothing)" in cupboard
    assert pot == "metal pot in kitchen: a substance called water"
    assert "; ".join(kept["held"]) == texts[-1].rpartition("Inventory: ")[2]
    assert kept["changed"][:3] == [
        "cupboard in kitchen: open", "metal pot: moved to sink", "sink in kitchen: activated",
    ]  # fmt: skip
    (measured,) = kept["changed"][3:]
    assert re.fullmatch(r"substance in metal pot: \d+ degrees celsius", measured)
    assert [line.split(": ")[0] for line in kept["tried"]] == [
        command.strip() for command in commands.split(";")
    ]
    assert kept["tried"][2] == "bake cake: Nothing happens. No known action matches that input."
    start(env, "boil", 0)
    assert len(env.record()["seen"]) == 1
    assert not env.record()["tried"]


def test_scores_are_the_engines_and_progress_cannot_be_reset(env):
    assert start(env, "find-non-living-thing", 0).score == 8.0
    scores = [act(env, command).score for command in ("go to kitchen", "focus on cupboard")]
    assert scores == [25.0, 75.0]
    for command in ("reset task", "Reset the  TASK", "reset task."):
        after = act(env, command)
        assert (after.failure, after.score) == ("unknown", 75.0)
    assert act(env, "move cupboard to red box").success
    assert start(env, "boil", 0).score == 0.0
    assert "reset task" not in act(env, "help").text


def test_any_text_may_be_a_command(env):
    first = start(env, "boil", 0)
    for command in ("看 \ud800 \x00 !ye", "move " + "orange to " * 500, "\\n\\e"):
        assert act(env, command).failure == "unknown"
        assert act(env, "look around").text == first.text


# Failures

# (task, variation, commands): together they provoke every text of the table.
TROUBLE = (
    (
        "boil", 1,
        "open it; teleport to kitchen; go to kitchen; focus on orange; look around; look in fridge;"
        "look in soap; pick up air; close cupboard; open counter; close counter; eat lighter;"
        "read lighter; flush sink; activate lighter; activate oven; activate oven; deactivate sink;"
        "activate stove; move lighter to fridge; move lighter to lighter; move sink to lighter;"
        "move lighter to soap; use counter on sink; use thermometer on agent;"
        "pour glass jar in fridge; pour lighter in sink; pour bowl in soap;"
        "dunk lighter in lighter; dunk lighter in sink; dunk bowl in stove; mix glass jar;"
        "mix soap; go to counter;"
        "open freezer; open freezer; move soap to bowl; pour soap in sink; teleport to bathroom;"
        "pick up water; flush toilet; flush toilet",
    ),
    (
        "power-component", 0,
        "teleport to workshop; teleport to battery; connect battery to black wire;"
        "connect battery anode to black wire terminal 1;"
        "connect battery anode to blue wire terminal 1; connect battery anode to battery anode;"
        "dunk switch in battery anode; disconnect anode in battery",
    ),
    ("find-plant", 0, "teleport to greenhouse; pick up shovel; use shovel on sink"),
)  # fmt: skip


def test_every_text_of_the_table_is_the_engines(env):
    heard = []
    for kind, variation, commands in TROUBLE:
        start(env, kind, variation)
        heard += [act(env, command.strip()) for command in commands.split(";")]
    for reason, texts in FAILURES.items():
        answers = [re.sub(" +", " ", o.text) for o in heard if o.failure == reason]
        for text in texts:
            pattern = re.compile(re.escape(text).replace(r"\*", ".+"), re.DOTALL)
            assert any(pattern.fullmatch(answer) for answer in answers), text


def test_what_the_engine_lists_as_impossible_is_recognized(env):
    # The reference is the engine's list of admissible commands. A command about things in sight
    # that is not in the list must fail, unless it is another name for one in the list.
    rng = random.Random(0)
    templates = (
        *("activate %s", "close %s", "deactivate %s", "eat %s", "flush %s", "open %s", "read %s"),
        *("look in %s", "pick up %s", "go to %s", "mix %s", "move %s to %s", "pour %s in %s"),
        *("dunk %s in %s", "use %s on %s"),
    )
    tried = 0
    for kind, room in (("boil", "kitchen"), ("power-component", "workshop"), ("melt", "bathroom")):
        start(env, kind, 2)
        act(env, f"teleport to {room}")
        things = act(env, "objects").text.splitlines()[1:]
        admissible = set(java(env).admissible())
        for _ in range(45):
            template = rng.choice(templates)
            words = [rng.choice(things).strip() for _ in range(template.count("%s"))]
            command = template % tuple(words)
            if command in admissible:
                continue
            after = act(env, command)
            tried += 1
            if after.text.startswith("Ambiguous request"):
                act(env, "none of them")
            elif not after.failure:
                assert re.match(r"You (move|pour|dunk)|Inside the|The .* is now", after.text)
    assert tried > 80


# Admissible commands


def test_admissible_commands_are_listed_only_on_request(env, listing_env):
    unlisted = start(env, "boil", 0)
    assert unlisted.admissible == ()
    assert env._engine._log[-1][0] == "look around"  # the engine was asked nothing after it
    assert Random(random.Random(3)).respond(unlisted) == ""
    first = start(listing_env, "boil", 0)
    assert first.message == unlisted.message
    assert len(first.admissible) == len(set(first.admissible)) == 60
    verbs = {command.split()[0] for command in java(listing_env).admissible()} - {"reset"}
    assert {command.split()[0] for command in first.admissible[: len(verbs)]} == verbs
    assert act(listing_env, "focus on something").admissible == first.admissible
    assert act(listing_env, "teleport to kitchen").admissible != first.admissible
    assert act(listing_env, "focus on orange").admissible == ("0", "1")
    assert act(listing_env, "0").admissible == ()  # over


def test_spreading_keeps_every_command_and_the_order_within_a_kind():
    commands = ["eat a", "eat b", "go a", "move a", "move b", "move c"]
    assert spread(commands) == ["eat a", "go a", "move a", "eat b", "move b", "move c"]
    assert spread([]) == []


# The engine's process


def script(env, kind, variation, *, seed, turns, kill_after=None):
    """Observations of a random episode; it draws listed commands other than `focus`."""
    rng = random.Random(seed)
    seen = [start(env, kind, variation)]
    while len(seen) <= turns and not seen[-1].done:
        if len(seen) == kill_after:
            os.kill(env._engine.pid, signal.SIGKILL)
        choices = [c for c in seen[-1].admissible if not c.startswith("focus")]
        seen.append(act(env, rng.choice(choices)))
    return seen


def test_episodes_are_the_same_in_every_process(listing_env):
    # These rooms show lists in the order of Java's hashes, which are random in the original.
    rooms = {"identify-life-stages-2": "outside", "power-component": "workshop"}

    def play(kind):
        seen = script(listing_env, kind, 0, seed=1, turns=5)
        start(listing_env, kind, 0)
        commands = (f"teleport to {rooms[kind]}", "look around")
        return [*seen, *(act(listing_env, command) for command in commands)]

    seen = {kind: play(kind) for kind in rooms}
    restarts = listing_env.restarts
    os.kill(listing_env._engine.pid, signal.SIGKILL)
    start(listing_env, "freeze", 3)  # another history
    assert listing_env.restarts == restarts + 1
    assert {kind: play(kind) for kind in reversed(rooms)} == seen


def test_a_process_killed_in_an_episode_is_replaced_and_nobody_notices(listing_env):
    seen = script(listing_env, "grow-plant", 4, seed=2, turns=10)
    restarts = listing_env.restarts
    assert script(listing_env, "grow-plant", 4, seed=2, turns=10, kill_after=6) == seen
    assert listing_env.restarts == restarts + 1


@pytest.mark.slow  # it waits 15 s; with less, a busy machine could not start Java
@needs_engine
def test_a_hung_process_is_replaced_and_the_last_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    env = ScienceWorld(**{**SETTINGS, "timeout_s": 15.0})
    start(env, "boil", 0)
    act(env, "go to kitchen")
    hung = env._engine.pid
    os.kill(hung, signal.SIGSTOP)
    after = act(env, "open fridge")
    assert (after.text, after.end, env.restarts) == ("The fridge is now open.", "", 1)
    assert not alive(hung)
    last = env._engine.pid
    assert alive(last)
    del env
    gc.collect()
    assert not alive(last)
    assert not list(tmp_path.iterdir())


def test_an_episode_that_cannot_be_repeated_ends_as_broken(env):
    start(env, "boil", 0)
    act(env, "go to kitchen")
    java(env).act("open fridge")  # the environment does not know of it
    before = act(env, "open fridge")
    assert before.failure == "already"
    os.kill(env._engine.pid, signal.SIGKILL)
    after = act(env, "wait")
    assert (after.end, after.failure, after.score) == (BROKEN, "", before.score)
    assert "went another way at command 2, `open fridge`" in after.text
    assert after.text == after.message
    with pytest.raises(ValueError, match="call `reset` first"):
        act(env, "wait")
    assert not start(env, "boil", 0).done


def test_memory_is_bounded_and_a_fault_of_the_simulator_breaks_the_episode(env):
    start(env, "boil", 0)
    runtime = java(env)._gateway.jvm.java.lang.Runtime.getRuntime()
    assert runtime.maxMemory() <= SETTINGS["heap_mb"] * 2**20
    java(env)._server.agentInterface().get().setErrorState("java.lang.StackOverflowError")
    after = act(env, "wait")
    assert (after.end, after.score) == (BROKEN, 0.0)
    assert "java.lang.StackOverflowError" in after.text
    assert not start(env, "boil", 0).done


def alive(pid):
    return Path(f"/proc/{pid}").exists()


@needs_engine
def test_the_process_does_not_outlive_a_killed_python():
    code = (
        "import os, signal\n"
        "from opd_jax.envs.scienceworld.env import ScienceWorld\n"
        f"env = ScienceWorld(**{SETTINGS!r})\n"
        "env.reset('train', 0)\n"
        "print(env._engine.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


# The expert


def play_the_expert(env, paths, kind):
    """The last observation, the responses, and how many of them failed."""
    observation, responses, failures = start(env, kind, 0), [], 0
    player = Expert(paths(env.task.id))
    while not observation.done:
        responses.append(player.respond(observation))
        observation = env.step(responses[-1])
        failures += bool(observation.failure)
    return observation, responses, failures


@pytest.mark.parametrize(
    ("kind", "most"),
    [("lifespan-shortest-lived", 5), pytest.param("melt", 32, marks=pytest.mark.slow)],
)
def test_the_expert_reaches_the_goal_without_a_failed_turn(env, kind, most):
    paths = GoldPaths(simplifications="easy", heap_mb=256, timeout_s=60)
    last, responses, failures = play_the_expert(env, paths, kind)
    paths.close()
    assert (last.end, last.score, failures) == ("success", 100.0, 0)
    assert len(responses) <= most
    for response in responses:
        assert re.fullmatch(r"Thought: [^\n]+\nAction: [^\n]+", response)


def test_paths_of_the_same_settings_are_found_once():
    settings = {"simplifications": "easy", "heap_mb": 256, "timeout_s": 60.0}
    assert gold_paths(**settings) is gold_paths(**settings)
    assert gold_paths(**settings) is not gold_paths(**{**settings, "simplifications": ""})


def test_an_expert_at_the_end_of_its_path_looks_around():
    player = Expert(["wait1"])
    seen = Observation("", "", ())
    assert player.respond(seen).endswith("\nAction: wait1")
    assert player.respond(seen).endswith("\nAction: look around")
    assert thought("0") == thought("12") != thought("wait")  # a number has its own thought


@pytest.mark.slow
def test_gold_paths_reach_the_goal_of_at_least_27_of_30_types(open_env):
    paths = GoldPaths(simplifications="easy", heap_mb=256, timeout_s=300)
    env = open_env(timeout_s=300)
    played = {kind: play_the_expert(env, paths, kind) for kind in sets.TYPES}
    unsolved = [kind for kind, (last, _, _) in played.items() if not last.success]
    assert len(unsolved) <= 3, unsolved
    assert sum(failures for _, _, failures in played.values()) <= 30
    paths.close()
