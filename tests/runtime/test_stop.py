"""Signals: remembered until they are asked for, then given back."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_jax.runtime.exits import INTERRUPTED, Stopped, reported
from opd_jax.runtime.signals import signalled
from opd_jax.runtime.stop import Stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_waits_until_it_is_asked_for_and_handlers_are_given_back(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        stop.check()
        assert not signalled()
        os.kill(os.getpid(), getattr(signal, name))
        assert signalled()
        for _ in range(2):
            with pytest.raises(Stopped) as ended:
                stop.check()
        assert ended.value.code == 0
    assert capsys.readouterr().out == 2 * f"stopped by {name}; what is finished is kept\n"
    assert not signalled()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


WORKS_ON = """
import os, signal, sys
from opd_jax.runtime.stop import Stop
with Stop():
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
    print("still there")
"""


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (["SIGINT"], 0),
        (["SIGTERM", "SIGTERM"], 0),  # a launcher may send it to the process and to its group
        (["SIGINT", "SIGTERM"], 0),
        (["SIGINT", "SIGINT"], -signal.SIGINT),
        (["SIGTERM", "SIGINT", "SIGINT"], -signal.SIGINT),
    ],
)
def test_a_second_ctrl_c_ends_the_process_at_once(names: list[str], status: int) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WORKS_ON, *names], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stdout == ("" if status else "still there\n")
    assert "Traceback" not in done.stderr
    assert ("Ctrl-C again leaves at once" in done.stderr) == ("SIGINT" in names)


READ_BY_NOBODY = """
import os, signal, sys
from opd_jax.runtime import processes
from opd_jax.runtime.exits import print_error
from opd_jax.runtime.stop import Stop
sys.stdin.readline()
with Stop() as stop:
    for _ in range(2):
        processes.say("update 1")
        print_error("a warning")
    os.kill(os.getpid(), signal.SIGINT)
    stop.check()
sys.exit(1)
"""


@pytest.mark.parametrize("make", [os.pipe, pty.openpty])
def test_who_is_no_longer_read_stops_as_others_do(make: Callable[[], tuple[int, int]]) -> None:
    # As in `train | head`, and where a connection to a terminal drops.
    ours, theirs = make()
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", READ_BY_NOBODY],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(ours)
    process.communicate(b"go\n")
    os.close(theirs)
    assert process.returncode == 0


# Sends SIGINT to a process when it is about to import JAX.
WHILE_IT_IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def watch(event, details):
    if event == "import" and details[0] == "jax":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(watch)
"""


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "plan"])
def test_ctrl_c_while_a_command_imports_is_one_line(
    name: str, tmp_path: Path, command: Callable
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WHILE_IT_IMPORTS)
    done = command(name, PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    assert (done.returncode, done.stderr) == (INTERRUPTED, "error: interrupted\n")


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as ended, reported():
        raise KeyboardInterrupt
    assert ended.value.code == INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"
