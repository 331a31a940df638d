"""What a run says of its progress, in a log and on a terminal."""

import os
import pty
import subprocess
import sys
import termios

from opd_jax.runtime import progress
from opd_jax.runtime.progress import Doing, begin, describe, doing, end

# Counts one of three, then waits to be ended.
WAITING = """
import sys, time
from opd_jax.runtime import processes, progress

progress.SILENT_S = float(sys.argv[1])
progress._LOOK_S = 0.05
with progress.doing("update 3: rollout"), progress.doing("", total=3, unit="episodes") as played:
    played.done = 1
    while sys.argv[2:]:  # the first line may come before the bar
        processes.say("said")
        time.sleep(0.2)
    time.sleep(600)
"""


def test_a_line_says_what_is_done_how_far_it_is_and_how_long_it_takes() -> None:
    outer = Doing("update 3: rollout", start=0.0)
    assert describe([outer], 70.2) == "update 3: rollout, 01:10 so far"
    inner = Doing("", total=16, unit="episodes", start=10.0)
    line = "update 3: rollout: 0 of 16 episodes, 01:00 so far"
    assert describe([outer, inner], 70.0) == line
    inner.done = 4  # in a minute; twelve more take three
    line = "update 3: rollout: 4 of 16 episodes, 01:00 so far, 03:00 left"
    assert describe([outer, inner], 70.0) == line
    inner.done = 16
    assert describe([outer, inner], 70.0).endswith("16 of 16 episodes, 01:00 so far")


def test_what_began_ends_in_any_order_and_once() -> None:
    first = begin("a")
    with doing("b"):
        end(first)
        assert [one.name for one in progress._doing] == ["b"]
    end(first)
    assert progress._doing == []


def test_a_silent_log_gets_lines() -> None:
    words = [sys.executable, "-c", WAITING, "0.2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        process.kill()
    for line in lines:
        assert line.startswith("update 3: rollout: 1 of 3 episodes, 00:0")


def test_a_terminal_has_a_bar_and_what_is_said_stands_above_it() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    words = [sys.executable, "-c", WAITING, "0", "say"]
    with subprocess.Popen(words, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = ""
        # The bar is wiped first, the line is whole, and the bar comes again.
        while "1/3" not in seen.partition("\rsaid\r\n")[2]:
            seen += os.read(ours, 4096).decode()
        process.kill()
    os.close(ours)
    assert "update 3: rollout" in seen
    assert " episodes" in seen
    assert "so far" not in seen
