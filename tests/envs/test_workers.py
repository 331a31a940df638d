"""Environments in processes: the same episodes, and what happens when one hangs or dies."""

import functools
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from telling import (
    FAULTS,
    QUICK_FAULTS,
    SLOW_FAULTS,
    Telling,
    no_extra,
    no_module,
    starting,
    while_there,
)

from opd_jax.envs.base import BROKEN, Env, Observation, Task
from opd_jax.envs.faults import act, begin
from opd_jax.envs.household.env import Household
from opd_jax.envs.react import Random
from opd_jax.envs.workers import DIED, EXCEPTION, Worker

LONG_S = 60.0  # more than a busy machine needs
HOUSEHOLD = functools.partial(Household, size="small", max_turns=12, show_admissible=5)
LOOK = "Action: look"


@pytest.fixture
def make() -> Iterator[Callable[..., Worker]]:
    """Makes workers that are closed after the test."""
    made: list[Worker] = []

    def make(factory: Callable[[], Env], *, start_s: float = LONG_S, step_s: float = LONG_S):
        made.append(Worker(factory, start_timeout_s=start_s, step_timeout_s=step_s))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition does not hold after a minute")


def episode(env: Env, split: str, index: int) -> list[Observation]:
    observations = [begin(env, split, index).observation]
    player = Random(random.Random(index))
    while not observations[-1].done:
        observations.append(act(env, player.respond(observations[-1])))
    return observations


# --- The same environment


def test_one_process_plays_the_episodes_of_the_environment_itself(make: Callable) -> None:
    worker = make(HOUSEHOLD)
    assert worker.pid is None
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)
    pids = set()
    for split in ("train", "valid_unseen"):
        assert worker.size(split) == HOUSEHOLD().size(split)
        assert worker.digest(split) == HOUSEHOLD().digest(split)
        for index in (0, 5, 3):
            env = HOUSEHOLD()
            assert episode(worker, split, index) == episode(env, split, index)
            assert (worker.task, worker.system) == (env.task, env.system)
            pids.add(worker.pid)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)
    (pid,) = pids
    assert alive(pid)
    worker.close()
    assert worker.pid is None
    assert not alive(pid)
    worker.close()
    for call in (lambda: worker.reset("train", 0), lambda: worker.size("train")):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert not worker.breaks


def test_texts_and_measures_arrive_as_they_are_and_prints_go_to_stderr(
    make: Callable, capfd: pytest.CaptureFixture
) -> None:
    worker = make(Telling)
    assert worker.digest("train") == "digest of train"
    worker.reset("speak loudly", 0)
    out, err = capfd.readouterr()
    assert "loudly" not in out
    assert "loudly" in err
    for text in ("", "naïve\n\t\x00\x1b", "\ud800 \U0001d54f", "long " * 200_000):
        assert worker.step(f"echo {text}") == Observation(text, text, (f"echo {text}",))
    assert worker.step("echo").measures == {}
    assert worker.step("measure 0.1").measures == {"f1": 0.1, "em": 0.0}
    rewarded = worker.step("reward")  # numbers of NumPy
    assert (rewarded.score, rewarded.measures) == (0.5, {"seen": 3})


def test_jax_in_a_process_leaves_the_accelerator_to_the_run(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # there is none: JAX would refuse to start
    worker = make(Telling)
    loaded = worker.reset("modules", 0).text.split()
    assert "opd_jax" in loaded
    assert "jax" not in loaded
    assert set(worker.step("devices_of_jax").text.split()) == {"cpu"}
    assert not worker.breaks


def test_the_main_module_of_the_run_is_not_imported_again(tmp_path: Path) -> None:
    (tmp_path / "the_run.py").write_text(
        "import telling\n"
        "from opd_jax.envs.workers import Worker\n"
        "worker = Worker(telling.Telling, start_timeout_s=60, step_timeout_s=60)\n"
        "print(worker.reset('modules', 0).text)\n"
    )
    words = [sys.executable, "-m", "the_run"]
    done = subprocess.run(words, capture_output=True, text=True, **found(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "the_run" not in done.stdout.split()
    assert "telling" in done.stdout.split()


def found(path: Path) -> dict:
    """Settings of a process that finds the files of `path`, of the tests and of the package."""
    tests = Path(__file__).parent
    folders = [path, tests, tests.parents[1]]
    return {"env": os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}, "cwd": path}


# --- Faults


def check_a_step_that_breaks(worker: Worker, fault: str) -> None:
    breaks, restarts = worker.breaks.copy(), worker.restarts
    worker.reset("echo", 0)
    first = worker.pid
    after = worker.step(f"fail {fault}")
    _, kind, text = FAULTS[fault]
    assert (after.end, after.done, after.success) == (BROKEN, True, False)
    assert (after.score, after.failure, after.action, after.oracle) == (0.0, "", "", "")
    assert re.search(text, after.text), after.text
    assert "`step`" in after.text
    assert after.text in after.message
    assert worker.breaks - breaks == {kind: 1}
    assert worker.pid is None
    assert not alive(first)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step("echo")
    assert worker.reset("echo again", 1).text == "again"
    assert worker.step("echo on").text == "on"
    assert worker.pid != first
    assert worker.restarts == restarts + 1


def test_a_step_that_breaks_costs_only_its_episode(make: Callable) -> None:
    worker = make(Telling)
    for fault in QUICK_FAULTS:
        check_a_step_that_breaks(worker, fault)
    assert worker.breaks.total() == len(QUICK_FAULTS)


def test_a_step_that_does_not_return_costs_only_its_episode(make: Callable) -> None:
    workers = [make(Telling, step_s=3.0) for _ in SLOW_FAULTS]
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(check_a_step_that_breaks, workers, SLOW_FAULTS))


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_reset_that_breaks_is_tried_once_more(make: Callable, tmp_path: Path, fault: str) -> None:
    worker = make(Telling, start_s=5.0 if fault == "hang" else LONG_S)
    assert worker.reset(f"fail_once {fault} {tmp_path / 'broke'}", 3).text == "at last"
    assert worker.task.id == "telling/3"
    assert (worker.breaks, worker.restarts) == ({FAULTS[fault][1]: 1}, 1)
    assert not worker.step("echo").done


def test_a_reset_that_breaks_twice_returns_a_broken_observation(make: Callable) -> None:
    worker = make(Telling)
    first = worker.reset("fail burn", 3)
    assert (first.end, first.admissible) == (BROKEN, ())
    assert "`reset`: RuntimeError: the engine is in flames" in first.text
    assert worker.task == Task(id="fail burn/3", type="", goal="", scene="")
    assert (worker.breaks, worker.restarts) == ({EXCEPTION: 2}, 1)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step("echo")
    assert worker.reset("echo again", 3).text == "again"
    assert (worker.breaks.total(), worker.restarts) == (2, 2)


def test_a_process_that_does_not_start_is_a_reset_that_breaks(
    make: Callable, tmp_path: Path
) -> None:
    never = make(functools.partial(starting, "fail die"))
    assert never.reset("echo", 3).end == BROKEN
    assert never.breaks == {DIED: 2}
    later = make(functools.partial(starting, f"fail_once burn {tmp_path / 'broke'}"))
    assert later.reset("echo again", 3).text == "again"


def test_a_size_that_breaks_twice_is_an_error(make: Callable) -> None:
    worker = make(Telling)
    with pytest.raises(RuntimeError, match=r"broke in `size`, twice: .* in flames"):
        worker.size("fail burn")
    assert worker.breaks == {EXCEPTION: 2}
    assert worker.size("echo 7") == 7


def test_a_fault_is_logged_once(
    make: Callable, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    worker = make(Telling)
    worker.reset("echo", 3)
    worker.step("fail burn")
    (record,) = caplog.records
    assert "`step` of telling/3: RuntimeError: the engine" in record.getMessage()
    assert "in flames" in capfd.readouterr().err.partition("Traceback")[2]


# --- Mistakes of the user


def test_mistakes_are_raised_with_their_message_and_break_nothing(make: Callable) -> None:
    worker = make(HOUSEHOLD)
    worker.reset("train", 0)
    pid = worker.pid
    for call in (
        lambda env: env.size("nowhere"),
        lambda env: env.reset("nowhere", 0),
        lambda env: env.reset("train", -1),
    ):
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            call(HOUSEHOLD())
        with pytest.raises(ValueError) as got:  # noqa: PT011
            call(worker)
        assert str(got.value) == str(expected.value)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)
    assert begin(worker, "train", 1) == begin(HOUSEHOLD(), "train", 1)
    assert worker.pid == pid
    assert (worker.breaks, worker.restarts) == ({}, 0)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (functools.partial(HOUSEHOLD, size="huge"), "one of small, medium, large"),
        (no_extra, r"^Tell needs an engine; pip install 'opd-jax\["),
        (no_module, "an_engine_that_is_not_installed"),
    ],
    ids=["argument", "extra", "module"],
)
def test_mistakes_in_making_the_environment_are_raised(
    make: Callable, factory: Callable[[], Env], message: str
) -> None:
    worker = make(factory)
    for call in (lambda: worker.reset("train", 0), lambda: worker.size("train")):
        with pytest.raises(ValueError, match=message):
            call()
    assert worker.pid is None
    assert not worker.breaks


def test_what_could_be_made_before_and_no_longer_can_is_a_fault(
    make: Callable, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.touch()
    worker = make(functools.partial(while_there, str(data)))
    worker.reset("echo", 0)
    assert worker.step("fail die").end == BROKEN
    data.unlink()
    lost = worker.reset("echo", 1)
    assert lost.end == BROKEN
    assert f"`data`: no file {data}" in lost.text
    assert worker.breaks == {DIED: 1, EXCEPTION: 2}
    data.touch()
    assert not worker.reset("echo", 2).done


def test_errors_of_an_engine_are_faults(make: Callable) -> None:
    worker = make(Telling)
    with pytest.raises(ValueError, match=r"^said so$"):
        worker.reset("refuse said so", 0)
    for words in ("read_json", "read_an_address nowhere"):
        assert worker.reset(words, 0).end == BROKEN
    assert worker.breaks == {EXCEPTION: 4}
    worker.reset("echo", 0)
    assert worker.step("refuse said so").end == BROKEN  # a response is never a user's mistake


def test_wrong_arguments_are_refused_at_once() -> None:
    limits = {"start_timeout_s": LONG_S, "step_timeout_s": LONG_S}
    for name in limits:
        for seconds in (0, -1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"`{name}`: expected seconds above 0"):
                Worker(HOUSEHOLD, **{**limits, name: seconds})
    with pytest.raises(ValueError, match="`make`: expected something that pickles"):
        Worker(lambda: Telling(), **limits)
    of_main = type("OfMain", (Telling,), {"__module__": "__main__"})
    with pytest.raises(ValueError, match=r"`make`.*of the main module"):
        Worker(functools.partial(of_main), **limits)


# --- Side by side


def test_workers_run_side_by_side(make: Callable, tmp_path: Path) -> None:
    # None of the four returns before all have arrived: one after the other would never end.
    workers = [make(Telling) for _ in range(4)]
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(lambda worker: worker.reset("echo", 0), workers))
        texts = pool.map(
            lambda n: workers[n].step(f"meet {tmp_path} {n} {len(workers)}").text, range(4)
        )
        intervals = [tuple(map(float, text.split())) for text in texts]
    assert max(start for start, _ in intervals) <= min(end for _, end in intervals)
    assert len({worker.pid for worker in workers}) == 4


def test_an_interrupted_call_leaves_no_answer_behind(make: Callable, tmp_path: Path) -> None:
    worker = make(Telling)
    worker.reset("echo", 0)
    pid, there = worker.pid, tmp_path / "there"

    def interrupt() -> None:
        wait_for(there.exists)
        os.kill(os.getpid(), signal.SIGINT)

    # A process started in the background, as on a build machine, ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.step(f"linger {there}")
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert not alive(pid)
    assert worker.reset("echo again", 0).text == "again"


# --- Nothing is left behind


def test_what_an_environment_has_started_ends_with_it(make: Callable) -> None:
    for end in (
        lambda worker: worker.close(),
        lambda worker: os.kill(worker.pid, signal.SIGKILL) or worker.step("echo"),
    ):
        worker = make(Telling)
        engine = int(worker.reset("start_an_engine", 0).text)
        assert alive(engine)
        end(worker)
        wait_for(lambda engine=engine: not alive(engine))


def test_a_process_outlives_the_thread_that_started_it_but_not_its_worker() -> None:
    worker = Worker(HOUSEHOLD, start_timeout_s=LONG_S, step_timeout_s=LONG_S)
    thread = threading.Thread(target=worker.reset, args=("train", 0))
    thread.start()
    thread.join()
    del thread  # it holds the worker
    assert not worker.step(LOOK).done
    pid = worker.pid
    assert alive(pid)
    del worker
    gc.collect()
    assert not alive(pid)


RUN = """
import os, sys, threading, time
import telling
from opd_jax.envs.workers import Worker

workers = [
    Worker(telling.Telling, start_timeout_s=60, step_timeout_s=60),
    Worker(telling.Telling, start_timeout_s=60, step_timeout_s=3600),
    Worker(telling.Telling, start_timeout_s=60, step_timeout_s=4),
]
engines = [worker.reset("start_an_engine", 0).text for worker in workers[:2]]
workers[2].reset("echo", 0)
pids = [str(worker.pid) for worker in workers]
busy = [(workers[1], "linger " + sys.argv[1]), (workers[2], "fail hold")]
for worker, words in busy:
    threading.Thread(target=worker.step, args=(words,), daemon=True).start()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
time.sleep(0.5)  # until the other step has begun
print(*pids, *engines, flush=True)
if sys.argv[2] == "wait":
    time.sleep(3600)
"""


@pytest.mark.parametrize("how", ["killed", "over"])
def test_no_process_outlives_the_run(tmp_path: Path, how: str) -> None:
    # One process is idle, one sleeps in a step, one holds the interpreter's lock in a step.
    (tmp_path / "play.py").write_text(RUN)
    words = ["play.py", str(tmp_path / "there"), "go" if how == "over" else "wait"]
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, **found(tmp_path)
    ) as run:
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 5
        if how != "over":
            assert all(map(alive, pids))
            run.kill()
    try:
        wait_for(lambda: not any(map(alive, pids)))
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
