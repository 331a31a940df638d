"""What a process says at its end, also at one that it does not see coming."""

import contextlib
import subprocess
import sys

# Signals that are sent to all processes of a terminal or a job are not for the shell: what ends it
# is the end of its input.
_SCRIPT = """
trap '' HUP INT TERM
last=
while read -r line; do last=$line; done
[ -z "$last" ] || printf '%s\\n' "$last" >&2
"""


class LastWords:
    """A line that is printed to stderr when this process has ended, however it has.

    A process is killed, or JAX aborts it, in a thread of its own and whatever Python does at that
    moment. Nothing of the process can speak then, so that a shell does: it reads lines until its
    pipe breaks, and prints the last one.

    JAX leaves no other way. The callback that its client takes for such a moment cannot be a Python
    function, since its argument has no Python type, and the client aborts the process without it;
    `jax_enable_recoverability` changes nothing for a process that loses process 0.

    Args:
      line: printed at the end, unless another is prepared or said; "" for nothing.

    Attributes:
      line: the one that is prepared.
    """

    def __init__(self, line: str):
        self._shell = subprocess.Popen(
            ["sh", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
        self.prepare(line)

    def prepare(self, line: str) -> None:
        """Puts another line, on one line, in the place of the one before."""
        assert self._shell.stdin
        self.line = " ".join(line.split())
        with contextlib.suppress(BrokenPipeError):
            print(self.line, file=self._shell.stdin, flush=True)

    def say(self, line: str) -> None:
        """Has a line printed now, and none at the end."""
        self.prepare(line)
        self._shell.communicate()
        if self._shell.returncode and self.line:  # somebody killed the shell
            print(self.line, file=sys.stderr, flush=True)
