"""Several real processes of one run: they end as one process does, and none outlives another."""

import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import Start
from test_train import NO_EVALUATION, assert_ended_alike, saved

from opd_jax.envs.household.env import Household
from opd_jax.runtime import processes
from opd_jax.runtime.exits import DISK, MISTAKE, WORLD, WorldFailed

# A broken connection or a missed heartbeat is noticed far sooner. Only a process that waits for
# ever gets here.
PATIENCE_S = 240


@pytest.mark.parametrize("text", ["two", "host,0,2", "host:1,0", "host:1,zero,2", "host:1,0,2,3"])
def test_a_variable_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(processes.VARIABLE, text)
    with pytest.raises(ValueError, match=rf"`OPD_JAX_DISTRIBUTED` = '{text}': expected auto"):
        processes.start()


def test_without_the_variable_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(processes.VARIABLE, raising=False)
    processes.start()
    assert processes.gather("mine") == ["mine"]
    assert processes.first("mine") == "mine"
    assert processes.are_all_here()
    assert processes.share({1: "b", 0: "a"}, 2) == ["a", "b"]
    with pytest.raises(WorldFailed, match="away"):
        processes.share(WorldFailed("away"), 2)
    with pytest.raises(ValueError, match=r"all rows 0 to 2, nobody has \[1\]"):
        processes.share({0: "a", 2: "c"}, 3)


def test_devices_that_are_not_there_are_a_mistake_in_a_line(start: Start) -> None:
    code = "from opd_jax.runtime import exits, processes\nwith exits.reported(): processes.start()"
    with start("-c", code, JAX_PLATFORMS="abacus") as starting:
        output, errors = starting.communicate(timeout=PATIENCE_S)
    assert (output, starting.returncode) == ("", MISTAKE)
    assert errors.startswith("error: JAX has no such devices (JAX_PLATFORMS = 'abacus'): ")
    assert errors.count("\n") == 1
    # With JAX_PLATFORMS=cuda and no GPU, JAX fails in an assertion without words.
    assert "there are none" in str(processes.without_devices(AssertionError()))


def test_devices_that_another_process_holds_are_the_worlds_failure() -> None:
    for said in (
        "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with "
        "pid 4711. Not attempting to load libtpu.so in this process.",
        "Unable to initialize backend 'tpu': UNAVAILABLE: TPU initialization failed: open(/dev/"
        "accel0): Device or resource busy",
        "Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    ):
        found = processes.without_devices(RuntimeError(said))
        assert isinstance(found, WorldFailed)
        assert said in str(found)


def test_a_warning_is_given_once_and_of_one_kind_only_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number in [*range(1000), *range(1000)]:
        processes.warn("task %d of %s is left out", number, "a test")
    processes.warn("of another kind")
    *alike, last = caplog.messages
    assert last == "of another kind"
    assert alike[:-1] == [f"task {n} of a test is left out" for n in range(len(alike) - 1)]
    assert (
        alike[-1]
        == f"task {len(alike) - 1} of a test is left out; more of this kind are not logged"
    )
    assert len(alike) < 20


@pytest.mark.parametrize(("count", "rows"), [(1, 5), (2, 8), (3, 8), (4, 4), (4, 2)])
def test_every_row_has_one_owner_and_nobody_many_more_than_others(
    monkeypatch: pytest.MonkeyPatch, count: int, rows: int
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: count)
    owned = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        owned.append([row for row in range(rows) if processes.owns(row, rows)])
    assert sorted(row for mine in owned for row in mine) == list(range(rows))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    assert 0 in owned[0]


# --- Whole runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def together(
    start: Start, count: int, *words: object, own: Sequence[str] = (), **variables: str
) -> list[subprocess.Popen]:
    """The processes of one run of `train`, one device each; word i of `own` goes to process i."""
    port = free_port()
    return [
        start(
            *("-m", "opd_jax.train", *words, *own[process : process + 1]),
            JAX_NUM_CPU_DEVICES="1",
            OPD_JAX_DISTRIBUTED=f"localhost:{port},{process},{count}",
            **variables,
        )
        for process in range(count)
    ]


def finish(running: list[subprocess.Popen]) -> list[str]:
    """What each process printed. All of them end well, and none lost another."""
    outputs = []
    for process in running:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, stderr
        assert "error:" not in stderr
        # Gloo, which connects processes on CPUs, prints that it did.
        outputs.append(re.sub(r"\[Gloo\].*\n", "", stdout))
    return outputs


def errors_of(running: list[subprocess.Popen]) -> list[str]:
    """What each process printed to stderr. All of them end, and none of them well."""
    told = [process.communicate(timeout=PATIENCE_S)[1] for process in running]
    assert all(process.returncode for process in running)
    return told


def line_of(errors: str) -> str:
    """Our one line among what JAX may have printed."""
    (line,) = re.findall("^error: .*", errors, re.MULTILINE)
    return line


def assert_lost_the_other(process: int, errors: str) -> None:
    """Our line if Python noticed it first, else the message with which JAX aborts a process."""
    if "another task died" not in errors:
        line = line_of(errors)
        assert line.startswith(f"error: process {process} of 2 lost the others (")
        assert line.endswith(
            "); start all of them again with the same --workdir, and the run resumes from its last "
            "checkpoint"
        )


def alone(start: Start, devices: int, *words: object) -> str:
    """The same run in one process."""
    process = start("-m", "opd_jax.train", *words, JAX_NUM_CPU_DEVICES=str(devices))
    return finish([process])[0]


def settings(method: str, small: tuple[str, ...], *changed: str) -> tuple[str, ...]:
    return (f"--config=configs/quickstart.py:runlocal,method={method}", *small, *changed)


@pytest.mark.slow
def test_killed_and_started_again_two_processes_end_with_the_bits_of_one(
    start: Start, small: tuple, tmp_path: Path
) -> None:
    changed = (
        *("mesh.data=2", "train.updates=5", "checkpoint.every=1", "eval.who=before,expert"),
        # Three tasks in batches of four rows: a row of the second process has no task.
        *("eval.tasks=3", "eval.splits=valid_seen,"),
    )
    flags = settings("sage", small, *(f"--config.{change}" for change in changed))
    one, two = tmp_path / "one", tmp_path / "two"
    want = alone(start, 2, *flags, f"--workdir={one}")

    kill(together(start, 2, *flags, f"--workdir={two}"), victim=1, at="valid_seen: ")
    # A save begins when the one before it is complete.
    kill(together(start, 2, *flags, f"--workdir={two}"), victim=0, at="3/5")
    # One of them gets a signal; both leave.
    running = together(start, 2, *flags, f"--workdir={two}")
    assert any(line.startswith("4/5") for line in running[0].stdout)
    running[1].send_signal(signal.SIGTERM)
    printed, nothing = finish(running)
    assert "stopped by SIGTERM; what is finished is kept\n" in printed
    assert nothing == ""
    assert not (two / "lease.json").exists()

    printed, nothing = finish(together(start, 2, *flags, f"--workdir={two}"))
    assert re.search(r"resuming after update [45] of 5", printed)
    assert nothing == ""  # the first process speaks for all
    assert table_of(printed) == table_of(want)
    assert_ended_alike(two, one)


def kill(running: list[subprocess.Popen], *, victim: int, at: str) -> None:
    """Kills one of two processes after the line that begins with `at`; the other one ends too."""
    assert any(line.startswith(at) for line in running[0].stdout)
    running[victim].kill()
    other = 1 - victim
    assert_lost_the_other(other, errors_of(running)[other])


def table_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|")]


def test_an_error_of_one_process_is_the_runs(start: Start, small: tuple, tmp_path: Path) -> None:
    # Only process 0 writes. It cannot write this.
    (tmp_path / "metrics.jsonl").mkdir()
    flags = settings("opd", small, *NO_EVALUATION, "--config.mesh.data=2", f"--workdir={tmp_path}")
    running = together(start, 2, *flags)
    first, other = map(line_of, errors_of(running))
    assert "metrics.jsonl" in first
    assert other == first
    assert [process.returncode for process in running] == [MISTAKE, MISTAKE]


def run_code(start: Start, code: str, *words: str) -> tuple[list[str], list[int]]:
    """What two processes that run `code` printed, and their statuses."""
    port = free_port()
    running = [
        start("-c", code, *words, OPD_JAX_DISTRIBUTED=f"localhost:{port},{n},2") for n in range(2)
    ]
    printed = ["".join(process.communicate(timeout=PATIENCE_S)) for process in running]
    return printed, [process.returncode for process in running]


FAILS_ALONE = """
import errno, os, sys, jax
from opd_jax.runtime import processes
from opd_jax.runtime.exits import WorldFailed
processes.start()
with processes.ending_together():
    processes.gather("both are here")
    if jax.process_index() == int(sys.argv[1]):
        raise eval(sys.argv[2])
    processes.gather("the other one never comes")
"""


@pytest.mark.parametrize(
    ("victim", "error", "status", "said"),
    [
        (0, "OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", DISK, "No space left on device"),
        (1, "WorldFailed('the engine died')", WORLD, "the engine died; the same command goes on"),
        (1, "ValueError('`a` is wrong')", MISTAKE, "`a` is wrong"),
        (0, "TypeError('a bug')", 1, r"process 0 failed \(TypeError: a bug\)"),
    ],
)
def test_what_one_process_dies_of_all_say_and_end_with(
    start: Start, victim: int, error: str, status: int, said: str
) -> None:
    printed, statuses = run_code(start, FAILS_ALONE, str(victim), error)
    assert statuses == [status, status]
    assert re.search(f"^error: .*{said}", line_of(printed[1 - victim]))
    if status == 1:
        assert "Traceback" in printed[victim]
        assert "Traceback" not in printed[1 - victim]
    else:
        assert line_of(printed[victim]) == line_of(printed[1 - victim])


def test_if_an_environment_fails_with_the_world_all_can_still_save(start: Start) -> None:
    code = """
from types import SimpleNamespace
import jax
from opd_jax.agent.environments import everywhere
from opd_jax.runtime import processes
from opd_jax.runtime.exits import WorldFailed
class Away(WorldFailed):
    def __init__(self, where, when):
        super().__init__(f"{where} is away since {when}")
def act(env, argument):
    raise Away("the server", "noon")
processes.start()
with processes.ending_together():
    envs = [SimpleNamespace(waits=False) if jax.process_index() == 1 else None]
    try:
        everywhere(act, envs, [0])
    except WorldFailed:
        assert processes.are_all_here()
        print("saved by", processes.gather(jax.process_index()))
        raise
"""
    printed, statuses = run_code(start, code)
    assert statuses == [WORLD, WORLD]
    for text in printed:
        assert "saved by [0, 1]" in text
        assert line_of(text).startswith("error: the server is away since noon; ")


def test_messages_of_any_length_are_exchanged(start: Start) -> None:
    code = """
import jax, pickle
from opd_jax.runtime import processes
processes.start()
with processes.ending_together():
    own = jax.process_index()
    around = len(pickle.dumps("x" * 10**4)) - 10**4
    room = processes._MESSAGE_BYTES - processes._LENGTH_BYTES - around
    for size in (0, 1, room - 1, room, room + 1, 5 * room):
        # Each is longer than the other once.
        for longer in (0, 1):
            mine = str(own) * (size if own == longer else 3)
            want = ["0" * (size if longer == 0 else 3), "1" * (size if longer == 1 else 3)]
            assert processes.gather(mine) == want, (size, longer)
    print("all are equal")
"""
    printed, statuses = run_code(start, code)
    assert statuses == [0, 0]
    assert all("all are equal" in text for text in printed)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_one_process_cannot_write_ends_all(
    start: Start, tmp_path: Path, victim: int
) -> None:
    code = """
import resource, sys, jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from opd_jax.runtime import processes
from opd_jax.runtime.checkpoint import Checkpoints
processes.start()
with processes.ending_together():
    split = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
    numbers = jax.jit(jax.random.normal, static_argnums=1, out_shardings=split)(
        jax.random.key(0), (1 << 18,)
    )
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    checkpoints.save(1, {"numbers": numbers}, {})
    checkpoints.wait()
    if jax.process_index() == int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    checkpoints.save(2, {"numbers": numbers}, {})
    checkpoints.wait()
"""
    printed, statuses = run_code(start, code, str(tmp_path / "checkpoints"), str(victim))
    assert statuses == [DISK, DISK]
    assert line_of(printed[0]) == line_of(printed[1])
    assert "the disk is full or cannot be written" in line_of(printed[0])


def test_who_fails_alone_does_not_wait_for_the_others_to_save(start: Start) -> None:
    code = """
import jax
from opd_jax.runtime import processes
from opd_jax.runtime.exits import WorldFailed
processes._MEETING_S = 1.0
processes.start()
with processes.ending_together():
    processes.gather("both are here")
    if jax.process_index() == 1:
        assert not processes.are_all_here()
        raise WorldFailed("the engine died")
    processes.gather("the other one never comes")
"""
    printed, statuses = run_code(start, code)
    assert statuses == [WORLD, WORLD]
    assert len({line_of(text) for text in printed}) == 1


def test_all_refuse_a_workdir_that_process_0_cannot_make(
    start: Start, small: tuple, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    flags = settings("opd", small, *NO_EVALUATION, "--config.mesh.data=2")
    running = together(start, 2, *flags, f"--workdir={tmp_path / 'file' / 'run'}")
    first, second = map(line_of, errors_of(running))
    assert first == second
    assert f"`{tmp_path / 'file'}` is not a folder" in first
    assert [process.returncode for process in running] == [2, 2]


def test_a_computation_that_may_have_lost_the_others_keeps_its_traceback(start: Start) -> None:
    code = """
from opd_jax.runtime import processes
processes.start()
with processes.ending_together():
    if processes.gather("here") and not processes.is_first():
        raise RuntimeError("INTERNAL: a kernel failed")
    processes.gather("there")
"""
    port = free_port()
    first, second = (
        start("-c", code, OPD_JAX_DISTRIBUTED=f"localhost:{port},{n},2") for n in range(2)
    )
    _, errors = errors_of([first, second])
    assert second.returncode == WORLD
    assert "Traceback" in errors
    assert "RuntimeError: INTERNAL: a kernel failed" in errors
    assert line_of(errors).startswith("error: process 1 of 2 lost the others (INTERNAL: a kernel")


def test_processes_with_other_tasks_all_say_so(start: Start, small: tuple, tmp_path: Path) -> None:
    flags = settings("opd", small, *NO_EVALUATION, "--config.mesh.data=2", f"--workdir={tmp_path}")
    sizes = ("small", "medium")
    running = together(start, 2, *flags, own=[f"--config.env.size={size}" for size in sizes])
    first, second = map(line_of, errors_of(running))
    assert [process.returncode for process in running] == [2, 2]
    one, two = (
        re.escape(f"train: {env.size('train')} tasks, digest {env.digest('train')}")
        for env in (Household(size=size, max_turns=1, show_admissible=0) for size in sizes)
    )
    assert re.search(rf"process 1 has other tasks than process 0 \({two}; {one}\)", first)
    assert re.search(rf"process 0 has other tasks than process 1 \({one}; {two}\)", second)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_four_processes_end_as_one_with_four_devices(
    start: Start, small: tuple, tmp_path: Path
) -> None:
    changed = {"mesh.data": 2, "mesh.fsdp": 2, "train.updates": 1, "eval.splits": "valid_seen,"}
    # Almost plain gradient descent: Adam alone would magnify the rounding of a zero gradient.
    changed |= {"optimizer.eps": 1, "optimizer.learning_rate": 0.1}
    flags = settings(
        "opd", small, *NO_EVALUATION, *(f"--config.{k}={v}" for k, v in changed.items())
    )
    want = alone(start, 4, *flags, f"--workdir={tmp_path / 'one'}")
    # Processes meet for their first exchange within half a minute. No cache, then: only the first
    # process would find its programs there, and be early.
    together_alike = dict(JAX_ENABLE_COMPILATION_CACHE="false")
    got = finish(together(start, 4, *flags, f"--workdir={tmp_path / 'four'}", **together_alike))
    assert got[1:] == ["", "", ""]

    def told(text: str) -> str:
        # How long a compilation took is said where it was long.
        times = r"[\d.]+k? tok/s.*|(?<= after )[\d.]+ s|compiling .* took .*\n"
        return re.sub(times, "", text)

    assert told(got[0]) == told(want)  # losses, and the table of the evaluation
    ours, theirs = saved(tmp_path / "four")[1], saved(tmp_path / "one")[1]
    for (name, dtype, _, x), (other, _, _, y) in zip(ours, theirs, strict=True):
        assert name == other
        x, y = np.frombuffer(x, dtype), np.frombuffer(y, dtype)
        # Sums over devices add in another order.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7, err_msg=name)
