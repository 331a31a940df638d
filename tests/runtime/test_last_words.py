"""What is printed for a process that has ended, by whatever end."""

import pytest
from conftest import Start

# A signal to a whole group reaches the shell as well. It has to have started to ignore it.
TO_ALL = """
def ignored():
    status = open(f"/proc/{words._shell.pid}/status").read()
    return int(re.search(r"SigIgn:\\s*(\\w+)", status)[1], 16)

while not ignored() >> signal.SIGTERM - 1 & 1:
    pass
os.killpg(0, signal.SIGTERM)
"""
ENDS = {
    "well": "pass",
    "by itself": "os._exit(1)",
    "aborted": "os.abort()",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "ended with all others": TO_ALL,
}


def told(start: Start, *lines: str) -> str:
    """What a process with last words prints to stderr, in a group of its own."""
    imports = (
        "import os, re, signal; from opd_jax.runtime.last_words import LastWords; os.setpgid(0, 0)"
    )
    process = start("-c", "\n".join((imports, "words = LastWords('the first')", *lines)))
    return process.communicate()[1]


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_line_prepared_last_is_printed_however_a_process_ends(start: Start, end: str) -> None:
    assert told(start, end) == "the first\n"
    assert told(start, r"words.prepare('100 %s\n of \\n')", end) == "100 %s of \\n\n"


def test_a_line_that_was_said_is_printed_once_and_at_once(start: Start) -> None:
    assert told(start, "words.say('now')", "os.write(2, b'then\\n')") == "now\nthen\n"
    assert told(start, "words.say('now')", "os.abort()") == "now\n"


def test_a_process_may_end_without_a_word(start: Start) -> None:
    assert told(start, "words.say('')", "os._exit(1)") == ""
    assert told(start, "words.prepare('')", "os._exit(1)") == ""


def test_without_its_shell_a_process_goes_on_and_speaks_for_itself(start: Start) -> None:
    lost = ("words._shell.kill()", "words._shell.wait()", "words.prepare('later')")
    assert told(start, *lost, "words.say('now')", "os.write(2, b'then\\n')") == "now\nthen\n"
    assert told(start, *lost, "words.say('')") == ""
