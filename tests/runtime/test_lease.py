"""Who may write in a folder: one process at a time, and the next one when it is gone."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opd_jax.runtime import lease
from opd_jax.runtime.exits import WORLD
from opd_jax.runtime.lease import EXPIRES_S, FILE, Held, Owner, _Claim, held

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from opd_jax.runtime import lease
lease.HEARTBEAT_S = float(sys.argv[2])
with lease.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def write(folder: Path, *, age_s: float = 0.0, **owner: Any) -> None:
    """A lease that another process might have left."""
    content = dataclasses.asdict(dataclasses.replace(Owner.this_process(), **owner))
    text = json.dumps({"owner": content, "heartbeat": time.time() - age_s})
    (folder / FILE).write_text(text)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A living process that holds the lease on `tmp_path`, with frequent heartbeats."""
    words = [sys.executable, "-c", HOLD, str(tmp_path), "0.05"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_folder_is_created_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with held(folder) as opened:
        assert opened == folder
        assert [path.name for path in folder.iterdir()] == [FILE]
    assert list(tmp_path.iterdir()) == []
    with held(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with pytest.raises(KeyError), held(tmp_path / "refused"):
        raise KeyError
    assert not (tmp_path / "refused").exists()


def test_a_second_writer_is_refused_in_a_line(tmp_path: Path, holder: Any) -> None:
    before = json.loads((tmp_path / FILE).read_text())
    with pytest.raises(lease.Held, match=f"process {holder.pid} on .* is working in") as error:
        held(tmp_path).__enter__()
    assert "\n" not in str(error.value)
    time.sleep(0.3)
    after = json.loads((tmp_path / FILE).read_text())
    assert after["owner"] == before["owner"]
    assert after["heartbeat"] > before["heartbeat"]


def test_a_lease_that_was_copied_with_its_folder_is_nobodys(tmp_path: Path, holder: Any) -> None:
    copy, link = tmp_path.with_name("copy"), tmp_path.with_name("link")
    shutil.copytree(tmp_path, copy)
    with held(copy):
        assert json.loads((copy / FILE).read_text())["owner"]["pid"] == os.getpid()
    link.symlink_to(tmp_path)  # another path to the same folder
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is working in"):
        held(link).__enter__()


def test_the_lease_of_a_killed_process_is_taken_over(tmp_path: Path, holder: Any) -> None:
    (tmp_path / "12.summary.json.tmp").touch()  # as a kill in the middle of a write leaves it
    (tmp_path / "notes.tmp").touch()
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the list
    with held(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {FILE, "notes.tmp"}


@pytest.mark.parametrize(
    "left",
    [
        lambda: {"pid": dead_pid()},
        lambda: {"start": "1"},  # its number belongs to another process by now
        lambda: {"host": "elsewhere", "age_s": EXPIRES_S + 1},
        lambda: {"space": "another boot", "age_s": EXPIRES_S + 1},
    ],
)
def test_an_expired_lease_is_taken_over(left: Callable[[], dict], tmp_path: Path) -> None:
    write(tmp_path, **left())
    with held(tmp_path):
        owner = json.loads((tmp_path / FILE).read_text())["owner"]
        assert owner == dataclasses.asdict(Owner.this_process())
    assert not (tmp_path / FILE).exists()


def test_a_living_owner_of_this_machine_keeps_its_lease_at_any_age(
    tmp_path: Path, holder: Any
) -> None:
    # Its disk may have been full, or it may be stopped.
    owner = json.loads((tmp_path / FILE).read_text())["owner"]
    write(tmp_path, age_s=EXPIRES_S + 1, **owner)
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is working in"):
        held(tmp_path).__enter__()


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"space": "another container"}])
@pytest.mark.parametrize("given_up", [True, False])
def test_a_lease_of_another_machine_is_waited_for(
    elsewhere: dict,
    given_up: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(lease, "_LOOK_S", 0.01)
    # Its clock is ahead, so that its age never shows.
    write(tmp_path, pid=dead_pid(), age_s=-1e6, **elsewhere)
    if given_up:
        threading.Timer(0.5, (tmp_path / FILE).unlink).start()
    else:
        monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    start = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - start > 0.4
    (line,) = capsys.readouterr().out.splitlines()
    assert "on elsewhere" in line or "space" in elsewhere
    assert "waiting" in line


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"space": "another container"}])
@pytest.mark.parametrize("alive", [True, False])
def test_who_does_not_wait_is_refused_by_a_heartbeat_and_takes_over_without_one(
    elsewhere: dict, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOK_S", 0.01)
    monkeypatch.setattr(lease, "EXPIRES_S", 60.0 if alive else 0.5)
    write(tmp_path, age_s=-1e6, **elsewhere)
    if alive:
        threading.Timer(0.5, write, [tmp_path], {"age_s": -1e6 - 20, **elsewhere}).start()
        with pytest.raises(Held, match=r"process \d+ on .* is working in"):
            held(tmp_path, wait=False).__enter__()
    else:
        with held(tmp_path, wait=False):
            assert json.loads((tmp_path / FILE).read_text())["owner"]["host"] != "elsewhere"


def test_a_lease_that_is_not_written_to_its_end_expires_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOK_S", 0.01)
    monkeypatch.setattr(lease, "EXPIRES_S", 0.3)
    (tmp_path / FILE).write_text('{"owner"')
    with held(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())


def test_a_process_that_lost_its_lease_ends(tmp_path: Path, holder: Any) -> None:
    write(tmp_path, host="elsewhere")
    there = (tmp_path / FILE).read_text()
    assert holder.wait(60) == WORLD
    (line,) = holder.stderr.read().splitlines()
    assert str(tmp_path) in line
    assert (tmp_path / FILE).read_text() == there


def test_a_process_whose_lease_was_taken_and_given_up_ends(tmp_path: Path, holder: Any) -> None:
    (tmp_path / FILE).unlink()
    assert holder.wait(60) == WORLD
    assert not (tmp_path / FILE).exists()


def test_of_many_at_once_one_gets_an_expired_lease(tmp_path: Path) -> None:
    write(tmp_path, pid=dead_pid())
    words = [sys.executable, "-c", HOLD, str(tmp_path), "20"]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(words, cwd=ROOT, stderr=pipe, text=True) for _ in range(3)]
    refused = []
    deadline = time.monotonic() + 120
    while len(refused) < 2 and time.monotonic() < deadline:
        refused = [process for process in running if process.poll() is not None]
        time.sleep(0.05)
    time.sleep(1)
    (winner,) = (process for process in running if process.poll() is None)
    assert json.loads((tmp_path / FILE).read_text())["owner"]["pid"] == winner.pid
    winner.kill()
    for process in running:
        assert f"process {winner.pid} on" in process.communicate()[1] or process is winner


def test_a_folder_that_is_removed_while_it_is_claimed_is_claimed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    here = Path("/proc/self/cwd")
    assert here.is_dir(), "it looks like a folder, and nothing can be made in it"
    assert _Claim(here, "--workdir").step() == "again"


def test_who_is_late_to_an_expired_lease_leaves_the_new_one(tmp_path: Path) -> None:
    write(tmp_path, pid=dead_pid())
    expired = lease._read(tmp_path / FILE)
    assert expired
    with held(tmp_path):  # another process took it over meanwhile
        before = (tmp_path / FILE).read_bytes()
        assert lease._take_over(tmp_path / FILE, expired, expired.owner) == "again"
        assert (tmp_path / FILE).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_kill_while_a_lease_is_taken_over_delays_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, pid=dead_pid())
    lock = tmp_path / lease.LOCK
    lock.touch()
    assert _Claim(tmp_path, "--workdir").step() == "wait"
    long_ago = time.time() - EXPIRES_S - 1
    os.utime(lock, (long_ago, long_ago))
    monkeypatch.setattr(lease, "_LOOK_S", 0.01)
    with held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_of_many_threads_one_takes_an_expired_lease_over(tmp_path: Path) -> None:
    def claim(number: int) -> str:
        owner = dataclasses.replace(Owner.this_process(), host=f"machine {number}")
        claim = _Claim(tmp_path, "--workdir", ours=owner, told=True)
        ready.wait()
        while (answer := claim.step()) == "again" or (answer and (tmp_path / lease.LOCK).exists()):
            pass
        return answer

    count = 8
    for _ in range(4):
        write(tmp_path, pid=dead_pid())
        ready = threading.Barrier(count)
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(claim, range(count)))
        # The others find the lease of a machine that goes on living.
        assert sorted(answers) == ["", *["wait"] * (count - 1)]
        owner = json.loads((tmp_path / FILE).read_text())["owner"]
        assert owner["host"] == f"machine {answers.index('')}"
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("file", "not a folder"),
        ("file/below", "not a folder"),
        ("dangling", "not a folder"),
        ("/proc/nothing/below", "cannot be made"),
        ("gs://bucket/run", "URL"),
        ("hdfs://host:9000/run", "URL"),
        ("~nobody-of-this-name/run", "home"),
    ],
)
def test_what_cannot_be_a_folder_is_refused_in_a_line(
    name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "below")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=word) as error:
        held(Path(name)).__enter__()
    assert "`--workdir`" in str(error.value)
    assert "\n" not in str(error.value)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"cannot be made or written \(EACCES\)"):
            held(folder).__enter__()


def test_the_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with held(Path("~/run")) as folder:
        assert folder == tmp_path / "run"
        assert folder.is_dir()
