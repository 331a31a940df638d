"""Environments in processes: the same episodes, and what is left of one that hangs or dies.

The processes import this file, so it must not import JAX.
"""

import contextlib
import functools
import gc
import ipaddress
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import pytest

from opd_jax.envs.base import Env, Observation, Task
from opd_jax.envs.household.env import Household
from opd_jax.envs.react import Random
from opd_jax.envs.workers import BROKEN, DIED, EXCEPTION, GARBAGE, TIMEOUT, Worker

LONG_S = 60.0  # more than a busy machine needs
HOUSEHOLD = functools.partial(Household, size="small", max_turns=12, show_admissible=5)
LOOK = "Action: look"


# --- What goes wrong, inside the process


def sockets() -> Iterator[int]:
    for fd in range(3, 100):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                yield fd


def write(data: bytes) -> None:
    for fd in sockets():
        os.write(fd, data)


def message(body: bytes) -> bytes:
    return struct.pack(">Q", len(body)) + body


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_3() -> None:
    sys.exit(3)


def burn() -> None:
    raise RuntimeError("the engine is in flames")


def hang() -> None:
    time.sleep(3600)


def hold_the_lock() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def send_half() -> None:
    write(message(b"{" + b" " * 100)[:50])
    hang()


def trickle() -> None:
    write(struct.pack(">Q", 1 << 20))
    while True:
        write(b" ")
        time.sleep(0.01)


def scribble() -> None:
    write(b"\xff" * 64)


def send_prose() -> None:
    write(message(b"You see a desk."))


def send_a_list() -> None:
    write(message(b"[]"))


def send_another_form() -> None:
    write(message(b'{"value": {"text": "You see a desk."}}'))


def send_a_number(name: str, value: str) -> None:
    fields = {"text": "", "message": "", "admissible": [], name: json.loads(value)}
    write(message(json.dumps({"value": fields}).encode()))


def close_the_socket() -> None:
    for fd in list(sockets()):
        os.close(fd)
    hang()


FAULTS: dict[str, tuple[Callable[[], None], str, str]] = {
    "die": (die, DIED, "killed by SIGKILL"),
    "exit": (exit_3, DIED, "ended with status 3"),
    "burn": (burn, EXCEPTION, r"RuntimeError: the engine is in flames \(test_workers.py, line"),
    "scribble": (scribble, GARBAGE, "bytes are announced"),
    "prose": (send_prose, GARBAGE, "is no message"),
    "list": (send_a_list, GARBAGE, "is no answer"),
    "form": (send_another_form, GARBAGE, "is no answer: KeyError"),
    "nan": (functools.partial(send_a_number, "score", "NaN"), GARBAGE, "a finite number"),
    "text": (functools.partial(send_a_number, "score", '"high"'), GARBAGE, "a finite number"),
    "f1": (functools.partial(send_a_number, "measures", '{"f1": null}'), GARBAGE, "a finite num"),
}
LATE = r"no answer within 3 s \(`step_timeout_s`\)"
SLOW_FAULTS: dict[str, tuple[Callable[[], None], str, str]] = {
    "hang": (hang, TIMEOUT, LATE),
    "hold": (hold_the_lock, TIMEOUT, LATE),
    "stop": (stop, TIMEOUT, LATE),
    "half": (send_half, TIMEOUT, LATE),
    "trickle": (trickle, TIMEOUT, LATE),
    "close": (close_the_socket, TIMEOUT, LATE),
}


class Faulty(Household):
    """The household, with a fault where a response or the split asks for one.

    Args:
      once: a file that is there after the first fault; "" for a fault every time.
      at_start: a fault of its making.
    """

    def __init__(self, *, once: str, at_start: str):
        super().__init__(**HOUSEHOLD.keywords)
        self.once = once
        self._fail(at_start)

    def _fail(self, name: str) -> None:
        fault = (FAULTS | SLOW_FAULTS).get(name)
        if fault is None or (self.once and os.path.exists(self.once)):
            return
        if self.once:
            Path(self.once).touch()
        fault[0]()

    def size(self, split: str) -> int:
        self._fail(split)
        return super().size("train")

    def reset(self, split: str, index: int) -> Observation:
        self._fail(split)
        return super().reset("train", index)

    def step(self, response: str) -> Observation:
        self._fail(response)
        return super().step(response)


class Telling:
    """An environment that carries out a Python function of this file, and tells what it returns."""

    system = "Tell."
    waits = False

    def size(self, split: str) -> int:
        return int(self._carry_out(split))

    def digest(self, split: str) -> str:
        return f"digest of {split}"

    def reset(self, split: str, index: int) -> Observation:
        self.task = Task(id=f"telling/{index}", type="telling", goal="", scene="")
        text = self._carry_out(split)
        return Observation(text, text, ())

    def step(self, response: str) -> Observation:
        if response.startswith("measure "):
            measures = MappingProxyType({"f1": float(response.split()[1]), "em": 0.0})
            return Observation("", "", (), measures=measures)
        text = self._carry_out(response)
        return Observation(text, text, (response,))

    def _carry_out(self, words: str) -> str:
        name, _, argument = words.partition(" ")
        return str(globals()[name](argument))


def echo(text: str) -> str:
    return text


def modules(_: str) -> str:
    return " ".join(sorted({name.partition(".")[0] for name in sys.modules}))


def import_jax(_: str) -> str:
    try:
        import jax.lax  # noqa: F401
    except ImportError as error:
        return str(error)
    return "imported"


def speak(text: str) -> str:
    print(text, flush=True)
    return ""


def start_an_engine(_: str) -> int:
    """A process that its parent's death does not end."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid


def meet(argument: str) -> str:
    """Wait until so many have come to a place; when the wait began and ended."""
    place, name, expected = argument.split()
    start = time.monotonic()
    Path(place, name).touch()
    while len(os.listdir(place)) < int(expected):
        time.sleep(0.01)
    return f"{start} {time.monotonic()}"


def linger(path: str) -> str:
    Path(path).touch()
    time.sleep(3600)
    return ""


def refuse(text: str) -> str:
    raise ValueError(text)


def read_json(_: str) -> str:
    return json.loads("{")


def read_an_address(text: str) -> str:
    return str(ipaddress.ip_address(text))  # a plain ValueError, raised by somebody else's code


def no_extra() -> Env:
    raise ValueError("Tell needs an engine; pip install 'opd-jax[telling]'")


def takes_jax() -> Env:
    import jax  # noqa: F401

    return Telling()


# --- From outside


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


def faulty(once: object = "", at_start: str = "") -> Callable[[], Env]:
    return functools.partial(Faulty, once=str(once), at_start=at_start)


def alive(pid: int) -> bool:
    """Runs, and is not merely waiting for somebody to ask how it ended."""
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
    raise AssertionError("it has not come about in a minute")


def episode(env: Env, split: str, index: int) -> list[Observation]:
    observations = [env.reset(split, index)]
    player = Random(random.Random(index))
    while not observations[-1].done:
        observations.append(env.step(player.respond(observations[-1])))
    return observations


# --- The same environment


@pytest.mark.parametrize("split", ["train", "valid_unseen"])
def test_episodes_are_those_of_the_environment_itself(make: Callable, split: str) -> None:
    worker: Env = make(HOUSEHOLD)
    for index in (0, 5, 3):
        env = HOUSEHOLD()
        assert episode(worker, split, index) == episode(env, split, index)
        assert (worker.task, worker.system) == (env.task, env.system)
    assert worker.size(split) == HOUSEHOLD().size(split)


@pytest.mark.parametrize(
    "text", ["", "naïve\n\t\x00\x1b", "\ud800 \U0001d54f", "long " * 200_000], ids=len
)
def test_texts_arrive_as_they_are(make: Callable, text: str) -> None:
    worker = make(Telling)
    worker.reset("echo", 0)
    assert worker.step(f"echo {text}") == Observation(text, text, (f"echo {text}",))


def test_measures_arrive_as_they_are(make: Callable) -> None:
    worker = make(Telling)
    worker.reset("echo", 0)
    assert worker.step("echo").measures == {}
    assert worker.step("measure 0.1").measures == {"f1": 0.1, "em": 0.0}


def test_digests_are_the_environments(make: Callable) -> None:
    assert make(Telling).digest("train") == "digest of train"


def test_one_process_serves_until_it_is_closed(make: Callable) -> None:
    worker = make(HOUSEHOLD)
    assert worker.pid is None
    pids = set()
    for index in range(3):
        episode(worker, "train", index)
        pids.add(worker.pid)
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


def test_a_step_needs_a_running_episode(make: Callable) -> None:
    worker = make(HOUSEHOLD)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)
    assert episode(worker, "train", 0)[-1].done
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)


def test_what_an_engine_prints_is_no_output_of_the_run(
    make: Callable, capfd: pytest.CaptureFixture
) -> None:
    make(Telling).reset("speak loudly", 0)
    out, err = capfd.readouterr()
    assert "loudly" not in out
    assert "loudly" in err


# --- JAX stays out


def test_a_process_has_no_jax_though_the_run_has(make: Callable) -> None:
    worker = make(Telling)
    first = worker.reset("modules", 0)
    assert "opd_jax" in first.text.split()
    for name in ("jax", "jaxlib"):
        assert name in sys.modules  # of the tests' own process
        assert name not in first.text.split()
    # What takes JAX where it finds it, finds none.
    assert "not for the process of an environment" in worker.step("import_jax").text
    assert "jax" not in worker.step("modules").text.split()


def test_a_factory_that_needs_jax_is_refused(make: Callable) -> None:
    from opd_jax.agent.rollout import rollout

    with pytest.raises(ValueError, match=r"`make`: expected a factory .* without JAX.*`jax`"):
        make(functools.partial(rollout, {})).size("train")
    worker = make(takes_jax)
    with pytest.raises(ValueError, match="`jax` is not for the process of an environment"):
        worker.reset("echo", 0)
    assert not worker.breaks


def test_the_main_module_of_the_run_is_not_imported_again(tmp_path: Path) -> None:
    main = tmp_path / "with_jax.py"
    main.write_text(
        "import jax\n"
        "import test_workers\n"
        "from opd_jax.envs.workers import Worker\n"
        "worker = Worker(test_workers.Telling, start_timeout_s=60, step_timeout_s=60)\n"
        "print(worker.reset('modules', 0).text)\n"
    )
    done = run_python("-m", "with_jax", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with_jax" not in done.stdout.split()
    assert "jax" not in done.stdout.split()
    assert "test_workers" in done.stdout.split()


def run_python(*words: str, path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **found(path))


def found(path: Path) -> dict:
    """Settings of a process that finds the files of `path`, of the tests and of the package."""
    tests = Path(__file__).parent
    folders = [str(path), str(tests), str(tests.parent)]
    return {"env": os.environ | {"PYTHONPATH": os.pathsep.join(folders)}, "cwd": path}


# --- One that breaks


def check_a_step_that_breaks(worker: Worker, fault: str) -> None:
    before = [worker.reset("train", 0), worker.step(LOOK)]
    first = worker.pid
    after = worker.step(fault)
    _, kind, text = (FAULTS | SLOW_FAULTS)[fault]
    assert (after.end, after.done, after.success) == (BROKEN, True, False)
    assert (after.score, after.failure, after.action, after.oracle) == (0.0, "", "", "")
    assert re.search(text, after.text), after.text
    assert "`step`" in after.text
    assert after.text in after.message
    assert worker.breaks == {kind: 1}
    assert worker.pid is None
    assert not alive(first)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)
    assert [worker.reset("train", 0), worker.step(LOOK)] == before
    assert worker.pid != first
    assert (worker.restarts, worker.breaks.total()) == (1, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_breaks_costs_its_episode_only(make: Callable, fault: str) -> None:
    check_a_step_that_breaks(make(faulty()), fault)


def test_a_step_that_does_not_come_back_costs_its_episode_only(make: Callable) -> None:
    workers = [make(faulty(), step_s=3.0) for _ in SLOW_FAULTS]
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(check_a_step_that_breaks, workers, SLOW_FAULTS))


@pytest.mark.parametrize("fault", ["die", "burn", "list"])
def test_a_reset_that_breaks_is_tried_once_more(make: Callable, tmp_path: Path, fault: str) -> None:
    worker = make(faulty(once=tmp_path / "broke"))
    assert worker.reset(fault, 3) == HOUSEHOLD().reset("train", 3)
    assert worker.task.id == "household/small/train/3"
    assert (worker.breaks, worker.restarts) == ({FAULTS[fault][1]: 1}, 1)
    assert not worker.step(LOOK).done


@pytest.mark.parametrize("fault", ["exit", "burn", "scribble"])
def test_a_reset_that_breaks_again_is_a_broken_first_observation(
    make: Callable, fault: str
) -> None:
    worker = make(faulty())
    first = worker.reset(fault, 3)
    _, kind, text = FAULTS[fault]
    assert (first.end, first.admissible) == (BROKEN, ())
    assert re.search(text, first.text)
    assert "`reset`" in first.text
    assert worker.task == Task(id=f"{fault}/3", type="", goal="", scene="")
    assert (worker.breaks, worker.restarts) == ({kind: 2}, 1)
    with pytest.raises(ValueError, match="call `reset` first"):
        worker.step(LOOK)
    assert worker.reset("train", 3) == HOUSEHOLD().reset("train", 3)
    assert (worker.breaks.total(), worker.restarts) == (2, 2)


def test_a_reset_that_hangs_is_tried_once_more(make: Callable, tmp_path: Path) -> None:
    worker = make(faulty(once=tmp_path / "hung"), start_s=5.0)
    assert worker.reset("hang", 3) == HOUSEHOLD().reset("train", 3)
    assert (worker.breaks, worker.restarts) == ({TIMEOUT: 1}, 1)


@pytest.mark.parametrize("fault", ["die", "burn"])
def test_a_process_that_does_not_come_up_is_a_reset_that_breaks(
    make: Callable, tmp_path: Path, fault: str
) -> None:
    never = make(faulty(at_start=fault))
    assert never.reset("train", 3).end == BROKEN
    assert never.breaks == {FAULTS[fault][1]: 2}
    later = make(faulty(once=tmp_path / "came", at_start=fault))
    assert later.reset("train", 3) == HOUSEHOLD().reset("train", 3)


def test_a_size_that_breaks_twice_is_an_error(make: Callable, tmp_path: Path) -> None:
    worker = make(faulty())
    with pytest.raises(RuntimeError, match=r"broke in `size`, twice: .* in flames"):
        worker.size("burn")
    assert worker.breaks == {EXCEPTION: 2}
    assert worker.size("train") == HOUSEHOLD().size("train")
    once = make(faulty(once=tmp_path / "broke"))
    assert once.size("die") == HOUSEHOLD().size("train")


def test_what_broke_is_said_once(
    make: Callable, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    worker = make(faulty())
    worker.reset("train", 3)
    worker.step("burn")
    (record,) = caplog.records
    assert "`step` of household/small/train/3: RuntimeError: the engine" in record.getMessage()
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
    assert worker.reset("train", 1) == HOUSEHOLD().reset("train", 1)
    assert worker.pid == pid
    assert (worker.breaks, worker.restarts) == ({}, 0)


def test_mistakes_in_making_the_environment_are_raised(make: Callable) -> None:
    huge = make(functools.partial(Household, size="huge", max_turns=1, show_admissible=0))
    missing = make(no_extra)
    for _ in range(2):  # and again, by a new process
        with pytest.raises(ValueError, match="one of small, medium, large"):
            huge.reset("train", 0)
        with pytest.raises(ValueError, match=r"^Tell needs an engine; pip install 'opd-jax\["):
            missing.size("train")
    assert huge.pid is None
    assert missing.pid is None
    assert not huge.breaks
    assert not missing.breaks


def test_errors_of_an_engine_are_no_mistakes(make: Callable) -> None:
    worker = make(Telling)
    with pytest.raises(ValueError, match=r"^said so$"):
        worker.reset("refuse said so", 0)
    for words in ("read_json", "read_an_address nowhere"):  # of two packages, in two classes
        assert worker.reset(words, 0).end == BROKEN
    assert worker.breaks == {EXCEPTION: 4}
    worker.reset("echo", 0)
    assert worker.step("refuse said so").end == BROKEN  # a response is never a mistake


def test_what_cannot_work_is_refused_at_once() -> None:
    for name in ("start_timeout_s", "step_timeout_s"):
        for seconds in (0, -1, float("inf"), float("nan")):
            limits = {"start_timeout_s": 1.0, "step_timeout_s": 1.0, name: seconds}
            with pytest.raises(ValueError, match=f"`{name}`: expected seconds above 0"):
                Worker(HOUSEHOLD, **limits)
    limits = {"start_timeout_s": LONG_S, "step_timeout_s": LONG_S}
    with pytest.raises(ValueError, match="`make`: expected something that pickles"):
        Worker(lambda: Telling(), **limits)
    of_main = type("OfMain", (Telling,), {"__module__": "__main__"})
    with pytest.raises(ValueError, match=r"`make`.*of the main module"):
        Worker(functools.partial(of_main), **limits)


# --- Side by side


def test_workers_are_served_side_by_side(make: Callable, tmp_path: Path) -> None:
    # None of the four returns before all are there: one after the other would never end.
    workers = [make(Telling) for _ in range(4)]
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(lambda worker: worker.reset("echo", 0), workers))
        texts = pool.map(
            lambda n: workers[n].step(f"meet {tmp_path} {n} {len(workers)}").text, range(4)
        )
        intervals = [tuple(map(float, text.split())) for text in texts]
    assert max(start for start, _ in intervals) <= min(end for _, end in intervals)
    assert len({worker.pid for worker in workers}) == 4


def test_a_process_outlives_the_thread_that_started_it(make: Callable) -> None:
    worker = make(HOUSEHOLD)
    thread = threading.Thread(target=worker.reset, args=("train", 0))
    thread.start()
    thread.join()
    assert not worker.step(LOOK).done
    assert not worker.breaks


def test_an_interrupted_call_leaves_no_answer_behind(make: Callable, tmp_path: Path) -> None:
    worker = make(Telling)
    worker.reset("echo", 0)
    pid, there = worker.pid, tmp_path / "there"

    def interrupt() -> None:
        wait_for(there.exists)
        os.kill(os.getpid(), signal.SIGINT)

    # What started in the background, as on a build machine, ignores the signal.
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


# --- Nothing stays


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


def test_a_worker_that_is_dropped_takes_its_process_with_it() -> None:
    worker = Worker(HOUSEHOLD, start_timeout_s=LONG_S, step_timeout_s=LONG_S)
    worker.reset("train", 0)
    pid = worker.pid
    assert alive(pid)
    del worker
    gc.collect()
    assert not alive(pid)


RUN = """
import sys, threading, time
import test_workers
from opd_jax.envs.workers import Worker

workers = [
    Worker(test_workers.Telling, start_timeout_s=60, step_timeout_s=60),
    Worker(test_workers.Telling, start_timeout_s=60, step_timeout_s=3600),
    Worker(test_workers.faulty(), start_timeout_s=60, step_timeout_s=4),
]
engines = [worker.reset("start_an_engine", 0).text for worker in workers[:2]]
workers[2].reset("train", 0)
pids = [str(worker.pid) for worker in workers]
busy = [(workers[1], "linger " + sys.argv[1]), (workers[2], "hold")]
for worker, words in busy:
    threading.Thread(target=worker.step, args=(words,), daemon=True).start()
test_workers.wait_for(lambda: test_workers.Path(sys.argv[1]).exists())
time.sleep(0.5)  # for the other one to be on its way
print(*pids, *engines, flush=True)
if sys.argv[2] == "wait":
    time.sleep(3600)
"""


@pytest.mark.parametrize("how", ["killed", "over"])
def test_nothing_stays_when_the_run_is(tmp_path: Path, how: str) -> None:
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
